"""``sid_train plan``, and the same check before ``distill``."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch

from ..config import Config, load_config
from ..plan.estimate import GIB, Hardware, Plan, make_planner
from ..plan.report import describe, describe_changes, fit_table, run_seconds, write_table


def plan(
    config: str | None,
    overrides: list[str],
    gpus: int | None,
    gpu_memory: float | None,
    reserve: float,
    tflops: float | None,
    seconds_per_forward: float | None,
    as_json: bool,
    table: Path | None,
) -> None:
    if table:
        write_table(table, fit_table(reserve, progress=True))
        return
    if config is None:
        raise ValueError("--config: expected a shipped configuration or a .toml file")
    settings, hardware = load_config(config, overrides), find_hardware(gpus, gpu_memory, reserve)
    for name, value in (("--tflops", tflops), ("--seconds-per-forward", seconds_per_forward)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value:g}")
    planner = make_planner(settings, progress=True)
    result = planner.plan(settings, hardware)
    speed = _flops_per_second(result, tflops, seconds_per_forward)
    changes = [] if result.fits else planner.changes_that_fit(settings, hardware)
    if as_json:
        seconds = run_seconds(result, speed) if speed else None
        facts = dataclasses.asdict(result) | {"changes": [dataclasses.asdict(c) for c in changes], "seconds": seconds}
        print(json.dumps(facts, indent=2))
        return
    print(describe(result, settings, hardware, speed))
    if not result.fits:
        print(describe_changes(changes))


def _flops_per_second(plan: Plan, tflops: float | None, seconds_per_forward: float | None) -> float | None:
    if tflops is not None:
        return tflops * 1e12
    return None if seconds_per_forward is None else plan.forward_flops / seconds_per_forward


def find_hardware(gpus: int | None, memory: float | None, reserve: float) -> Hardware:
    """What was asked for; what was not is this machine's."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if memory is None:
        if not found:
            raise ValueError("--gpu-memory: expected the GiB of a GPU, since there is no CUDA device here to ask")
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(found)) / GIB
    return Hardware((found or 1) if gpus is None else gpus, memory, reserve)


def hardware_of_run() -> Hardware | None:
    """Where this process, and torchrun's others, are about to train; None without CUDA. Nothing of it is kept free:
    only what certainly cannot run is to be refused.
    """
    if not torch.cuda.is_available():
        return None
    return find_hardware(int(os.environ.get("WORLD_SIZE", "1")), None, 0)


def refuse_what_cannot_fit(config: Config, hardware: Hardware) -> None:
    """ValueError if a run needs more memory than there is."""
    result = make_planner(config, progress=True).plan(config, hardware)
    if not result.fits:
        raise ValueError(
            f"this run needs {result.peak / GIB:.1f} GiB on each GPU, which has {hardware.memory:.1f}. Run python -m "
            "sid_train plan with the same --config and --set, which says what would fit, or go on with --force"
        )
