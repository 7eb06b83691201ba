"""The rows that a distilled generator is compared with: real digits, and the teacher at many steps."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.sampling import initial_noise
from ..files.atomic import write_text
from ..files.hashing import file_sha256
from ..models.bundle import ModelBundle
from ..models.digits.data import HELD_OUT_SUBJECTS, TRAINING_SUBJECTS, RealDigits, Subject
from ..models.digits.layout import ASSETS, TEACHER_FILE
from ..models.families import load_model
from ..sample import TEACHER_STEPS, sample_teacher_latents
from .metrics import CLASSIFIER_FILE, REFERENCE_SEED, DigitEvaluator, Row

IMAGES = 2048
TEACHER_SCALES = (1.0, 1.5, 2.0, 3.0)
CACHE_FILE = ASSETS / "baselines.json"
FLOOR_SEED = 2
SAMPLING_SEED = 3

# The figures of record are those of prompts that trained nothing.
SUBJECT_SETS = {"held_out": HELD_OUT_SUBJECTS, "trained": TRAINING_SUBJECTS}


def evaluation_subjects(name: str) -> list[Subject]:
    """2,048 subjects that repeat a set evenly."""
    return list(itertools.islice(itertools.cycle(SUBJECT_SETS[name]), IMAGES))


@torch.no_grad()
def teacher_images(
    bundle: ModelBundle,
    prompts: Sequence[str],
    scale: float,
    seed: int,
    progress: bool = False,
    steps: int = TEACHER_STEPS,
) -> Tensor:
    """The teacher's pictures from DPM-Solver++ (2M) at guidance ``scale``: [N, 3, H, W] in [-1, 1]."""
    unconditional = bundle.conditioner.encode([""])
    cond = bundle.conditioner.encode(prompts)
    noise = initial_noise((len(prompts), *bundle.latent_shape), seed)
    parts = []
    starts = range(0, len(prompts), 256)
    for start in tqdm(starts, desc=f"teacher at guidance {scale:g}", disable=not progress):
        rows = slice(start, start + 256)
        parts.append(sample_teacher_latents(bundle, cond[rows], unconditional, noise[rows], steps, scale))
    return bundle.codec.decode(torch.cat(parts)).clamp(-1, 1)


@functools.cache
def evaluator_of(name: str) -> DigitEvaluator:
    """Of a set of subjects: its reference digits and their features are the same for all pictures."""
    return DigitEvaluator(evaluation_subjects(name))


def measure_sets(name: str, pictures: Callable[[list[str]], Tensor], steps: int, scale: float = 1.0) -> dict[str, Row]:
    """The figures of what ``pictures`` makes of prompts, for each set of subjects."""
    return {
        subjects: evaluator.row(name, pictures([s.prompt for s in evaluator.subjects]), steps, scale)
        for subjects, evaluator in ((subjects, evaluator_of(subjects)) for subjects in SUBJECT_SETS)
    }


def compute_baselines(bundle: ModelBundle, progress: bool = True) -> dict[str, list[Row]]:
    """``real_floor`` and ``teacher_many_step`` for each set of subjects.

    The floor is real digits of the teacher's split. The teacher's guidance scale is the one with the lowest Frechet
    distance on the held-out prompts.
    """
    rows: dict[str, list[Row]] = {}
    best = None
    for name in SUBJECT_SETS:
        subjects = evaluation_subjects(name)
        evaluator = DigitEvaluator(subjects)
        floor = RealDigits("teacher").draw(subjects, torch.Generator().manual_seed(FLOOR_SEED))
        rows[name] = [evaluator.row("real_floor", floor, steps=0)]
        prompts = [s.prompt for s in subjects]
        candidates = [
            evaluator.row(
                "teacher_many_step", teacher_images(bundle, prompts, s, SAMPLING_SEED, progress), TEACHER_STEPS, s
            )
            for s in ([best] if best else TEACHER_SCALES)
        ]
        chosen = min(candidates, key=lambda row: row.frechet)
        best = chosen.guidance_scale
        rows[name].append(chosen)
        if len(candidates) > 1:
            rows["teacher_scales"] = candidates
    return rows


def cache_key() -> dict:
    """What the cached rows depend on."""
    return {
        "teacher": file_sha256(TEACHER_FILE),
        "classifier": file_sha256(CLASSIFIER_FILE),
        "images": IMAGES,
        "teacher_steps": TEACHER_STEPS,
        "seeds": [REFERENCE_SEED, FLOOR_SEED, SAMPLING_SEED],
    }


def load_baselines(bundle: ModelBundle, recompute: bool = False) -> dict[str, list[Row]]:
    """The baselines from the cache beside the weights if it was made with these weights, else computed anew."""
    if not recompute and CACHE_FILE.is_file():
        cached = json.loads(CACHE_FILE.read_text())
        if cached["made_with"] == cache_key():
            return {name: [Row(**r) for r in rows] for name, rows in cached["rows"].items()}
    return compute_baselines(bundle)


def main() -> None:
    """``python -m sid_train.demo.baselines`` writes the cache."""
    rows = compute_baselines(load_model("demo"))
    content = {"made_with": cache_key(), "rows": {name: [r.to_dict() for r in rs] for name, rs in rows.items()}}
    write_text(CACHE_FILE, json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
