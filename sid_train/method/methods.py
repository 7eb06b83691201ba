"""The one list of distillation methods, by what ``method.kind`` calls them."""

from __future__ import annotations

from .base import Method
from .sid import Distiller

METHODS: dict[str, type[Method]] = {"sid": Distiller}
