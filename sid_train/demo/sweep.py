"""Distils the demo under several settings and prints a row each: how the shipped values were chosen.

    python -m sid_train.demo.sweep --config demo --seed 10 --out DIR "method.guidance=none" "method.guidance=lsg=1.2"

Each argument is one run: overrides of the configuration, separated by spaces.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ..config import load_config
from ..files.logs import append_log
from ..sample import sample_images
from ..training.run import RunFolder
from ..training.trainer import Trainer
from .baselines import SAMPLING_SEED, measure_sets


def measure(folder: RunFolder) -> dict[str, dict]:
    """The figures of a run's generator for each set of subjects."""
    generator = folder.open_generator()
    bundle, recipe = generator.load(), generator.recipe
    rows = measure_sets("sid", lambda prompts: sample_images(bundle, recipe, prompts, SAMPLING_SEED), recipe.steps)
    return {name: row.to_dict() for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sid_train.demo.sweep", description=__doc__)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--seed", type=int, default=10, help="not one that results are reported for")
    parser.add_argument("--out", type=Path, required=True, help="runs and sweep.jsonl")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for setting in args.settings:
        config = load_config(args.config, [f"training.seed={args.seed}", "training.tracker=none", *setting.split()])
        run_dir = args.out / f"{args.config} {setting} seed={args.seed}".replace("/", "_")
        began = time.monotonic()
        trainer = Trainer(config, run_dir)
        trainer.run()
        entry: dict = {"config": args.config, "setting": setting, "seed": args.seed}
        entry |= {"iterations": config.training.iterations, "training_seconds": round(time.monotonic() - began)}
        entry |= measure(trainer.folder)
        append_log(args.out / "sweep.jsonl", entry)
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
