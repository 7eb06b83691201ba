"""``evaluate``: the figures of a generator of the demo's architecture."""

from __future__ import annotations

import json

from ..demo.report import format_table
from ..demo.run import evaluate_generator


def evaluate(model: str, as_json: bool) -> None:
    metrics = evaluate_generator(model)
    print(json.dumps(metrics, indent=2) if as_json else format_table(metrics))
