"""The one list of distillation methods, by what ``method.kind`` calls them."""

from __future__ import annotations

from .base import Method
from .dmd2 import DMD2
from .lcm import ConsistencyDistiller
from .sid import Distiller

METHODS: dict[str, type[Method]] = {"sid": Distiller, "dmd2": DMD2, "lcm": ConsistencyDistiller}
