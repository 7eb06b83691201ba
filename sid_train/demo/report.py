"""The demo's pictures, table and page."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.recipe import SiDRecipe
from ..files.images import image_grid, to_pil
from ..files.logs import read_log
from ..models.digits.data import COLOURS, DIGITS, GROUNDS, Subject

CELL = 100
LABEL_WIDTH = 190
COLUMNS = 10
INK, FAINT, PAPER = (30, 32, 36), (110, 114, 120), (255, 255, 255)

TITLES = {
    "real_floor": "real digits (the floor)",
    "teacher_many_step": "teacher",
    "undistilled": "teacher on our timesteps",
    "sid": "SiD",
}
FIGURES = {
    "frechet": ("Frechet", "lower is better", ".3f"),
    "frechet_pixel": ("pixel Frechet", "lower is better", ".3f"),
    "prompt_accuracy": ("accuracy", "higher is better", ".3f"),
    "precision": ("precision", "higher is better", ".3f"),
    "recall": ("recall", "higher is better", ".3f"),
    "high_frequency": ("high freq.", "1 is real", ".2f"),
}


@dataclass
class Comparison:
    """The same prompts and noise through several samplers.

    subjects: the first half held out of every training, the second half not
    pictures: label and images [len(subjects) * pictures a prompt, 3, H, W] in [-1, 1]
    """

    subjects: list[Subject]
    pictures: list[tuple[str, Tensor]]


def make_grid(comparison: Comparison) -> Image.Image:
    """Two blocks of ten prompts (held out, trained); a column a prompt, a row a sampler, four pictures a cell."""
    bold, small = ImageFont.load_default(15), ImageFont.load_default(13)
    heading, caption, gap = 34, 38, 6
    block = heading + caption + len(comparison.pictures) * (CELL + gap) + 16
    canvas = Image.new("RGB", (LABEL_WIDTH + COLUMNS * (CELL + gap) + 10, 2 * block), PAPER)
    draw = ImageDraw.Draw(canvas)
    half = len(comparison.subjects) // 2
    per_prompt = len(comparison.pictures[0][1]) // len(comparison.subjects)
    for b, title in enumerate(
        (
            "Digit-colour pairs that neither teacher nor generator was trained on",
            "Prompts that the teacher and the generator were trained on",
        )
    ):
        top = b * block
        draw.text((10, top + 10), title, INK, bold)
        for c, subject in enumerate(comparison.subjects[b * half : (b + 1) * half]):
            x = LABEL_WIDTH + c * (CELL + gap)
            colour, ground = list(COLOURS)[subject.colour], list(GROUNDS)[subject.ground]
            draw.text((x, top + heading), f"{colour} {DIGITS[subject.digit]}", FAINT, small)
            draw.text((x, top + heading + 16), f"on {ground}", FAINT, small)
            for r, (_, images) in enumerate(comparison.pictures):
                start = (b * half + c) * per_prompt
                cell = to_pil(image_grid(images[start : start + per_prompt], columns=2))
                y = top + heading + caption + r * (CELL + gap)
                canvas.paste(cell.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
        for r, (label, _) in enumerate(comparison.pictures):
            y = top + heading + caption + r * (CELL + gap) + CELL // 2 - 8
            draw.text((10, y), label, INK, small)
    return canvas


def format_table(metrics: dict) -> str:
    """The figures for a terminal."""
    lines = []
    heads = "".join(f"{title:>14}" for title, _, _ in FIGURES.values())
    for title, key in (("Held-out prompts", "rows"), ("Trained prompts", "rows_trained_prompts")):
        count = f"{title} ({metrics[key][0]['images']} images a row)"
        lines.append(f"\n{count:<42}{heads}")
        for row in metrics[key]:
            figures = "".join(f"{row[f]:>14{fmt}}" for f, (_, _, fmt) in FIGURES.items())
            lines.append(f"  {row_title(row):<40}" + figures)
    return "\n".join(lines)


def count_steps(steps: int) -> str:
    return f"{steps} step" + "s" * (steps > 1)


def row_title(row: dict) -> str:
    title = TITLES[row["name"]]
    if row["steps"]:
        title += f", {count_steps(row['steps'])}"
    if row["guidance_scale"] != 1:
        title += f", CFG {row['guidance_scale']:g}"
    return title


def make_report(metrics: dict, recipe: SiDRecipe, grid: Image.Image, curve_file: Path) -> str:
    """A self-contained HTML page."""
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG", optimize=True)
    picture = base64.b64encode(buffer.getvalue()).decode()
    sid, teacher = metrics["rows"][3], metrics["rows"][1]
    calls = teacher["steps"] * (1 if teacher["guidance_scale"] in (0, 1) else 2)
    curve = read_log(curve_file)
    losses = read_log(curve_file.with_name("log.jsonl"))
    loss_curves = "".join(
        _figure([(e["iteration"], e["losses"][name]) for e in losses if name in e["losses"]], f"{title} loss")
        for name, title in (
            ("fake_score", "Fake score"),
            ("sid", "Generator (SiD)"),
        )
    )
    frechet = _figure(
        [(e["iteration"], e["frechet"]) for e in curve],
        "Frechet distance of the averaged generator, held-out prompts (512 images, so it reads higher than the table)",
    )
    return PAGE.format(
        steps=count_steps(metrics["steps"]),
        plural="s" * (metrics["steps"] > 1),
        guidance=html.escape(metrics["guidance"]),
        seed=metrics["seed"],
        iterations=metrics["iterations"],
        ours=sid["steps"],
        calls=calls,
        ratio=f"{sid['frechet'] / teacher['frechet']:.2f}",
        accuracy=f"{sid['prompt_accuracy']:.1%}",
        teacher_accuracy=f"{teacher['prompt_accuracy']:.1%}",
        picture=picture,
        tables="".join(
            _table(metrics[key], caption)
            for key, caption in (
                ("rows", "Prompts whose digit-colour pair neither teacher nor generator was trained on"),
                ("rows_trained_prompts", "Prompts of the training set"),
            )
        ),
        curves=frechet + loss_curves,
        recipe=html.escape(recipe.describe()),
        metrics=html.escape(json.dumps({k: v for k, v in metrics.items() if not k.startswith("rows")}, indent=2)),
    )


def _table(rows: list[dict], caption: str) -> str:
    head = "".join(f"<th>{title}<small>{note}</small></th>" for title, note, _ in FIGURES.values())
    body = "".join(
        f'<tr class="{row["name"]}"><th>{html.escape(row_title(row))}</th>'
        + "".join(f"<td>{row[f]:{fmt}}</td>" for f, (_, _, fmt) in FIGURES.items())
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(points: list[tuple[int, float]], title: str) -> str:
    """A line chart as SVG."""
    if len(points) < 2:
        return ""
    width, height, left, bottom = 460, 180, 54, 26
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    high = high if high > low else low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - 12),
            12 + (high - y) / (high - low) * (height - bottom - 18),
        )

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
    ticks = "".join(
        f'<text x="{left - 6}" y="{at(xs[0], v)[1] + 4:.1f}" text-anchor="end">{v:.3g}</text>' for v in (low, high)
    ) + "".join(
        f'<text x="{at(v, low)[0]:.1f}" y="{height - 6}" text-anchor="{anchor}">{v}</text>'
        for v, anchor in ((xs[0], "start"), (xs[-1], "end"))
    )
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in (at(*p) for p in points))
    frame = f'<path class="axis" d="M{left},6 V{height - bottom} H{width - 8}"/>'
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img">{frame}{ticks}<polyline points="{path}"/>'
        f"{dots if len(points) < 20 else ''}</svg></figure>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ComfyUI-SiD demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1e2024; max-width: 1290px;
  margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
p.lead {{ font-size: 1.1rem; max-width: 52rem }} 
img {{ max-width: 100%; border: 1px solid #e3e5e8; border-radius: 6px }}
table {{ border-collapse: collapse; margin: 1rem 0 1.6rem; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .3rem }}
th, td {{ padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e3e5e8 }}
tbody th {{ text-align: left; font-weight: 400 }} thead th {{ font-weight: 600; vertical-align: bottom }}
thead small {{ display: block; font-weight: 400; color: #6e7278 }}
tr.sid {{ background: #eef6ee }} tr.sid th, tr.sid td {{ font-weight: 600 }} tr.real_floor {{ color: #6e7278 }}
.curves {{ display: flex; flex-wrap: wrap; gap: 1.2rem }} figure {{ margin: 0; width: 460px; max-width: 100% }}
figcaption {{ font-size: .9rem; min-height: 2.6em }} svg {{ width: 100%; font-size: 12px; fill: #6e7278 }}
polyline {{ fill: none; stroke: #2b6cb0; stroke-width: 2 }} circle {{ fill: #2b6cb0 }}
.axis {{ fill: none; stroke: #c4c8cd }}
pre {{ background: #f6f7f8; padding: 1rem; overflow-x: auto; border-radius: 6px; font-size: .85rem }}
</style></head><body>
<h1>{steps} instead of many</h1>
<p class="lead">A small text-to-image diffusion model of coloured handwritten digits, distilled on this machine with
Score identity Distillation from prompts alone: {ours} network call{plural} a picture where the teacher makes {calls}.
On prompts that neither was trained on, its Frechet distance to real digits is {ratio} times the teacher's, and a
classifier finds what was asked for in {accuracy} of the pictures (teacher: {teacher_accuracy}).</p>
<h2>Same prompts, same noise</h2>
<img alt="Pictures of the teacher and of the distilled generator for the same prompts"
 src="data:image/png;base64,{picture}">
<h2>Figures</h2>
{tables}
<p>The floor is real digits of the teacher's own split. Frechet distance, precision and recall are taken in the features
of a classifier trained on other digits; the reference digits trained neither. Pixel Frechet and high frequency see the
speckle that a classifier forgives. The third row, the teacher's weights on our timesteps without distillation, is
what distillation has to beat.</p>
<h2>The run</h2>
<div class="curves">{curves}</div>
<p>{iterations} iterations, guidance strategy {guidance}, seed {seed}.</p>
<h2>The recipe inside the exported file</h2>
<pre>{recipe}</pre>
<pre>{metrics}</pre>
<p>Method: <a href="https://arxiv.org/abs/2505.12674">Few-Step Diffusion via Score identity Distillation</a>. Digits:
UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), CC BY 4.0, through scikit-learn.</p>
</body></html>
"""
