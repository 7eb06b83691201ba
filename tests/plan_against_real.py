"""``plan`` beside what real iterations allocate, on a CPU: ``python tests/plan_against_real.py``.

The trainer runs two iterations of each row on a random model of SDXL's class; in the second, PyTorch's profiler reports
every tensor that the CPU allocator gives and takes back. ``plan`` traces the same configuration for a CPU. Nothing is
fitted: the two share the trainer's configuration and no figure. A model of your own, of any size:

    python tests/plan_against_real.py --teacher model.safetensors --config sdxl-4step-lora-24gb --set ...
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
GIB = 2**30
WIDE = {"block_out_channels": (128, 256, 256), "attention_head_dim": (2, 4, 4)}
COMMON = ["training.tracker=none", "training.iterations=2", "training.grid_every=0", "data.prompts={prompts}"]
LORA = ["adapter.rank=16", "training.gradient_checkpointing=true", "training.mixed_precision=bf16"]
# name: (the UNet's changes, overrides)
ROWS: dict[str, tuple[dict, list[str]]] = {
    "whole, fp32": ({}, ["model.resolution=256", "training.batch_size=2"]),
    "whole, bf16, recomputed, lsg, 2 parts": (
        {},
        [
            "model.resolution=512",
            "training.batch_size=2",
            "training.accumulate=2",
            "training.gradient_checkpointing=true",
            "training.mixed_precision=bf16",
            "method.guidance=lsg=1.5",
        ],
    ),
    "LoRA, bf16, recomputed": (
        {},
        ["model.resolution=512", "model.frozen_dtype=bf16", "training.batch_size=1", *LORA],
    ),
    "wide: whole, fp32, zero-cfg": (
        WIDE,
        ["model.resolution=512", "training.batch_size=1", "method.guidance=zero-cfg"],
    ),
    "wide: LoRA, bf16, recomputed": (
        WIDE,
        ["model.resolution=1024", "model.frozen_dtype=bf16", "training.batch_size=1", *LORA],
    ),
}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(config, run_dir: Path) -> int:
    """The most bytes of tensors that lived at once in the second iteration of a real run."""
    from sid_train.training.trainer import Trainer

    trainer = Trainer(config, run_dir)
    trainer.train_iteration()  # makes the optimizers' states
    networks = [
        trainer.networks["generator"],
        trainer.networks["fake_score"],
        trainer.ema.average,
        trainer.bundle.denoiser,
    ]
    optimizers = list(trainer.optimizers.values())
    held = [tensor for network in networks for tensor in network.state_dict(keep_vars=True).values()]
    held += [s for o in optimizers for state in o.state.values() for s in state.values() if isinstance(s, Tensor)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.train_iteration()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = tensor_bytes(held)
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def planned(config) -> int:
    """The most bytes that ``plan`` expects in an iteration, on a CPU."""
    from sid_train.models.families import model_shapes
    from sid_train.plan.trace import trace_iteration

    architecture = model_shapes(config.model.teacher, config.model.resolution)
    micro_batch = config.training.batch_size // config.training.accumulate
    return int(trace_iteration(architecture, config, micro_batch, device="cpu").live().max())


def write_model(path: Path, changes: dict) -> None:
    from small_sdxl import save_single_file, small_pipeline

    save_single_file(path, small_pipeline(**changes))


def compare(config_name: str | None, overrides: list[str], folder: Path) -> dict[str, float]:
    from sid_train.config import load_config

    config = load_config(config_name, overrides)
    # The profiler and the checkpointed layers' hooks would count in the resident memory: a process of its own.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    real = measure(config, folder / "run")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"real": real, "planned": planned(config), "resident": after * 1024, "resident before": before * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="one row, of this model")
    parser.add_argument("--config", help="recipe of that row")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(f"{'':44}{'real':>9}{'plan':>9}{'error':>8}{'resident':>10}   GiB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompts = folder / "prompts.txt"
        prompts.write_text("a lighthouse on a cliff at dawn\na cat in a hat\n")
        if args.teacher:
            overrides = [f"model.teacher={args.teacher}", f"data.prompts={prompts}", *args.set]
            show(args.config or "a model", compare(args.config, overrides, folder))
            return
        for name, (changes, settings) in ROWS.items():
            model = folder / f"{len(changes)}.safetensors"
            if not model.exists():
                write_model(model, changes)
            overrides = [f"model.teacher={model}", *(s.format(prompts=prompts) for s in COMMON), *settings]
            command = [sys.executable, __file__, "--teacher", str(model)]
            command += [part for value in overrides for part in ("--set", value)]
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
            show(name, json.loads(out.splitlines()[-1]))


def show(name: str, row: dict[str, float]) -> None:
    error = row["planned"] / row["real"] - 1
    figures = f"{row['real'] / GIB:9.3f}{row['planned'] / GIB:9.3f}{error:+8.1%}{row['resident'] / GIB:10.3f}"
    print(f"{name:44}{figures}", flush=True)
    if not sys.stdout.isatty():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
