"""``evaluate``: the figures of generators, of models that are not distilled, and of pictures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ..data.prompts import load_captions
from ..demo.report import format_table
from ..demo.run import evaluate_generator
from ..files.tensors import DTYPES
from ..models.digits.layout import ARCHITECTURE
from ..models.families import open_generator
from ..scoring.metrics import METRICS, NETWORKS, Weights
from ..scoring.protocols import PROTOCOLS
from ..scoring.report import write_report
from ..scoring.run import Request, evaluate_sources
from ..scoring.sources import Sampling
from .sample import device_named


def evaluate(
    sources: list[str],
    captions: str | None,
    protocol: str | None,
    count: int | None,
    reference: Path | None,
    teacher_pictures: Path | None,
    metrics: list[str],
    weights: list[str],
    steps: int | None,
    cfg: float | None,
    base: str | None,
    resolution: int,
    iteration: int,
    device: str | None,
    dtype: str,
    seed: int,
    resamples: int,
    out: Path,
    as_json: bool,
) -> None:
    if captions is None:
        _evaluate_digits(sources, as_json)
        return
    if protocol and protocol not in PROTOCOLS:
        raise ValueError(f"--protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    named = PROTOCOLS[protocol] if protocol else None
    wanted = tuple(dict.fromkeys(metrics)) or (named.metrics if named else ("clip",))
    if strange := [name for name in wanted if name not in METRICS]:
        raise ValueError(f"--metric: expected one of {', '.join(METRICS)}, got {strange[0]!r}")
    for metric, folder, option in (
        ("fid", reference, "--reference"),
        ("precision", reference, "--reference"),
        ("recall", reference, "--reference"),
        ("fid-t", teacher_pictures, "--teacher-pictures"),
    ):
        if metric in wanted and folder is None:
            raise ValueError(f"{option}: {metric} needs a folder of pictures")
    if steps is not None and steps < 1:
        raise ValueError(f"--steps: expected 1 or more, got {steps}")
    if device is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--device: several processes take a GPU each: drop it")
    prompts = load_captions(captions)
    pictures = count or (named.pictures if named else len(prompts))
    if not 2 <= pictures <= len(prompts):
        raise ValueError(f"--count: expected 2 to {len(prompts):,}, the captions in {captions}, got {pictures:,}")
    request = Request(
        prompts=prompts[:pictures],
        captions=len(prompts),
        seed=seed,
        sampling=Sampling(steps, cfg, base, resolution, iteration, DTYPES[dtype]),
        metrics=wanted,
        weights=Weights(_weights(weights)),
        reference=reference,
        teacher=teacher_pictures,
        resamples=resamples,
    )
    found = evaluate_sources(sources, request, out, device_named(device))
    if not found:
        return
    table = write_report(out, found, request.prompts, seed, named)
    print((out / "evaluation.json").read_text() if as_json else table)
    print(f"{out / 'evaluation.md'}, .json, .csv and grid.png", file=sys.stderr)


def _evaluate_digits(sources: list[str], as_json: bool) -> None:
    """The demo's own figures, which need no captions."""
    if len(sources) != 1:
        raise ValueError("--captions: expected a file of captions, where there is more than one source")
    if Path(sources[0]).is_dir() or open_generator(sources[0]).model.architecture != ARCHITECTURE:
        raise ValueError(
            f"--captions: expected a file of captions, one a picture: without, only generators of the demo's digits "
            f"are measured, and {sources[0]} is none"
        )
    metrics = evaluate_generator(sources[0])
    print(json.dumps(metrics, indent=2) if as_json else format_table(metrics))


def _weights(given: list[str]) -> dict[str, str]:
    files = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or name not in NETWORKS:
            raise ValueError(f"--weights: expected NAME=FILE, NAME one of {', '.join(NETWORKS)}, got {text!r}")
        files[name] = file
    return files
