"""What one loss of 10^6 times its size costs the demo, with and without ``optimizer.skip_norm``.

    python tests/toy/spike.py --out DIR --skip-norm 0
    python tests/toy/spike.py --out DIR --skip-norm 20

Prints the largest gradient norm that a step which was taken had, in medians of the network's 100 steps before, and the
figures of the generator. ``--at 0`` is the run without a spike.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import median

from sid_train.config import load_config
from sid_train.demo.sweep import measure
from sid_train.files.logs import read_log
from sid_train.training.guard import NormGuard
from sid_train.training.trainer import Trainer


def with_spike(trainer: Trainer, at: int, factor: float) -> None:
    """Multiplies the losses of the generator in iteration ``at``."""
    updates = trainer.method.updates

    def spiked(step, images_seen):
        for update in updates(step, images_seen):
            if update.network == "generator" and trainer.iteration + 1 == at:
                loss = update.loss
                update = replace(
                    update, loss=lambda *given, loss=loss: {k: v * factor for k, v in loss(*given).items()}
                )
            yield update

    trainer.method.updates = spiked


def largest(norms: list[float], skip: int) -> float:
    """The largest norm but that of step ``skip``, in medians of the steps before it."""
    ratios = []
    for step in range(NormGuard.ENOUGH, len(norms)):
        if step != skip:
            ratios.append(norms[step] / median(norms[max(0, step - NormGuard.WINDOW) : step]))
    return max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip-norm", type=float, default=0)
    parser.add_argument("--at", type=int, default=60, help="iteration of the spike; 0: none")
    parser.add_argument("--factor", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--config", default="demo")
    args = parser.parse_args()
    values = [f"training.seed={args.seed}", "training.tracker=none", "training.log_every=1"]
    config = load_config(args.config, [*values, f"optimizer.skip_norm={args.skip_norm}"])
    folder = args.out / f"{args.config} spike at {args.at}, skip_norm {args.skip_norm:g}, seed {args.seed}"
    trainer = Trainer(config, folder)
    with_spike(trainer, args.at, args.factor)
    trainer.run()
    log = [entry["gradient_norms"] for entry in read_log(trainer.folder.log)]
    found = {name: largest([entry[name] for entry in log], args.at - 1) for name in log[0]}
    figures = {
        name: {k: row[k] for k in ("frechet", "prompt_accuracy")} for name, row in measure(trainer.folder).items()
    }
    print(json.dumps({"skip_norm": args.skip_norm, "at": args.at, "largest_norm_in_medians": found, **figures}))


if __name__ == "__main__":
    main()
