"""What was measured, as JSON, CSV, Markdown and a grid of pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ..evaluation.intervals import Estimate
from ..files.atomic import replacing, write_text
from .metrics import DISTANCES, SCORES
from .pictures import read_picture
from .protocols import PUBLISHED, Protocol
from .run import Evaluated

GRID_PROMPTS = 6
CELL = 256
FORMS = {**dict.fromkeys(DISTANCES, ".3f"), **{name: metric.form for name, metric in SCORES.items()}}
TITLES = {**DISTANCES, **{name: metric.title for name, metric in SCORES.items()}}


def write_report(
    out: Path, found: Sequence[Evaluated], prompts: Sequence[str], seed: int, protocol: Protocol | None
) -> str:
    """Writes ``evaluation.json``, ``.csv``, ``.md`` and ``grid.png``; returns the table for people."""
    content = {
        "pictures": len(prompts),
        "seed": seed,
        "protocol": protocol.name if protocol else None,
        "sources": [
            {"source": e.name, "sampling": e.told, "figures": {name: asdict(f) for name, f in e.figures.items()}}
            for e in found
        ],
    }
    write_text(out / "evaluation.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "evaluation.csv", _csv(found))
    table = _table(found)
    lines = [f"# {len(prompts):,} pictures, seed {seed}\n", table]
    if protocol:
        lines += [f"\nProtocol `{protocol.name}`: {protocol.told}\n", PUBLISHED]
    write_text(out / "evaluation.md", "\n".join(lines).rstrip() + "\n")
    with replacing(out / "grid.png") as temporary:
        _grid(found).save(temporary, format="PNG")
    return table


def _csv(found: Sequence[Evaluated]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "sampling", "metric", "value", "low", "high"])
    for evaluated in found:
        for name, figure in evaluated.figures.items():
            writer.writerow([evaluated.name, evaluated.told, name, figure.value, figure.low, figure.high])
    return text.getvalue()


def _table(found: Sequence[Evaluated]) -> str:
    names = list(found[0].figures)
    lines = [f"| source | sampled | {' | '.join(TITLES[name] for name in names)} |", "|---" * (len(names) + 2) + "|"]
    for evaluated in found:
        cells = [_text(evaluated.figures[name], FORMS[name]) for name in names]
        lines.append(f"| {evaluated.name} | {evaluated.told} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(figure: Estimate, form: str) -> str:
    half = (figure.high - figure.low) / 2
    return f"{figure.value:{form}}" + (f" ± {half:{form}}" if half else "")


def _grid(found: Sequence[Evaluated]) -> Image.Image:
    """A row a source, a column a prompt."""
    columns = min(GRID_PROMPTS, len(found[0].files))
    canvas = Image.new("RGB", (columns * CELL, len(found) * CELL), "white")
    for row, evaluated in enumerate(found):
        for column in range(columns):
            picture = read_picture(evaluated.files[column]).resize((CELL, CELL))
            canvas.paste(picture, (column * CELL, row * CELL))
    return canvas
