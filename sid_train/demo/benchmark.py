"""Iterations a second and network calls an iteration, for each guidance strategy, on the demo's networks.

    python -m sid_train.demo.benchmark [--steps 4] [--iterations 8] [--profile]

What a network call is, ``calls`` says.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..config import load_config
from ..training.trainer import Trainer
from .calls import count_calls

STRATEGIES = ("none", "zero-cfg", "lsg=1.2", "anti-cfg=-1", "custom=1,1,1.5")


def benchmark(strategy: str, steps: int, iterations: int, show_profile: bool = False) -> dict[str, float]:
    """Runs ``iterations`` after two for warming up; the figures of one row."""
    overrides = [f"method.guidance={strategy}", f"method.steps={steps}", "training.tracker=none"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_config("demo", overrides), Path(folder))
        calls = count_calls(trainer)
        for _ in range(2):
            trainer.train_iteration()
        calls.clear()
        begin = time.perf_counter()
        for _ in range(iterations):
            trainer.train_iteration()
        seconds = time.perf_counter() - begin
        per_iteration = {k: v / iterations / trainer.config.training.batch_size for k, v in calls.items()}
        if show_profile:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(4):
                    trainer.train_iteration()
            print(profiler.key_averages().table(sort_by="cpu_time_total", row_limit=30, max_name_column_width=44))
    return {"iterations/s": iterations / seconds, **per_iteration, "calls": sum(per_iteration.values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sid_train.demo.benchmark", description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="show where the time of 'none' goes instead")
    args = parser.parse_args()
    print(f"K = {args.steps}, {torch.get_num_threads()} threads")
    for strategy in STRATEGIES[:1] if args.profile else STRATEGIES:
        row = benchmark(strategy, args.steps, args.iterations, args.profile)
        print(f"{strategy:<16}" + "  ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
