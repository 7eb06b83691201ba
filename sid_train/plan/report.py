"""A plan as text, and the table of what fits where."""

from __future__ import annotations

import re
from pathlib import Path

from .. import configs
from ..config import Config, load_config
from .estimate import GIB, Change, Hardware, Plan, Planner, make_planner

TABLE_BEGIN, TABLE_END = "<!-- python -m sid_train plan --table README.md -->\n", "<!-- end of table -->\n"
TABLE_HARDWARE = ((1, 24), (1, 48), (1, 80), (2, 80), (8, 80))
NOT_COUNTED = "not counted: the CUDA context, workspaces of cuDNN and cuBLAS, and the allocator's fragmentation"


def describe(plan: Plan, config: Config, hardware: Hardware, flops_per_second: float | None) -> str:
    """What ``plan`` says to a person; ``flops_per_second`` of one GPU is theirs, for the time."""
    kind = f"LoRA adapters of rank {config.adapter.rank}" if config.adapter.rank else "whole networks"
    shared = {"none": "each GPU holds all", "full": "sharded over the GPUs"}[plan.sharding]
    parts = f"{plan.gpus} GPU(s) x {plan.accumulate} micro-batch(es) of {plan.micro_batch}"
    lines = [
        f"model     {plan.model}",
        f"trained   {kind}{f', {shared}' if plan.gpus > 1 else ''}",
        f"batch     {plan.batch_size} = {parts}",
        "",
        "GiB on each GPU, at the peak:",
        f"{'':14}{'parameters':>12}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}",
    ]
    for role, memory in plan.roles.items():
        sizes = f"{_gib(memory.weights):>10}{_gib(memory.gradients):>11}{_gib(memory.optimizer):>11}"
        lines.append(f"{role:14}{memory.parameters / 1e6:>10,.1f} M{sizes}{_gib(memory.activations):>13}")
    lines += [f"{name}: {_gib(size)}" for name, size in plan.other.items()]
    lines += ["", "highest in each part of an iteration, GiB:"]
    lines += [f"  {name:24}{_gib(size):>8}" for name, size in plan.phases.items()]
    usable = f"{hardware.memory:g} GiB, of which {hardware.reserve:g} are kept free"
    lines += [
        f"peak      {_gib(plan.peak)} GiB ({plan.peak_phase}); a GPU has {usable}",
        f"          {NOT_COUNTED}; attention is fused, as PyTorch chooses it on CUDA",
        f"fits      {'yes' if plan.fits else 'no'}",
        "",
        "network calls an iteration on each GPU (pictures a call), on average:",
    ]
    for call in plan.calls:
        what = f"{'encoder only, ' if call.encoder_only else ''}{'with' if call.with_gradient else 'without'} gradient"
        lines.append(f"  {call.update} update: {call.role}, {call.calls:g} ({call.pictures}), {what}")
    if config.training.gradient_checkpointing:
        lines.append("  and each call with gradient once more, block by block, in its backward pass")
    lines += [
        f"FLOPs     {plan.flops_per_iteration / 1e12:,.1f} T an iteration over all GPUs; "
        f"{plan.forward_flops / 1e12:,.2f} T a picture through the generator",
        f"disk      {_gib(plan.checkpoint)} GiB a checkpoint, {config.training.keep_checkpoints} of them kept while "
        f"the next is written; {_gib(plan.snapshots)} GiB of snapshots",
        f"          cache of encoded prompts: {_cache(plan)}",
        f"time      {_time(plan, flops_per_second)}",
    ]
    return "\n".join(lines)


def describe_changes(changes: list[Change]) -> str:
    if not changes:
        return "None of the changes that plan knows makes it fit: lower model.resolution, or use larger GPUs."
    told = [f"  {' '.join(f'--set {s}' for s in change.settings)}   {_gib(change.peak)} GiB" for change in changes]
    return "\n".join(["Any of these makes it fit:", *told])


def run_seconds(plan: Plan, flops_per_second: float) -> float:
    """Of the whole run, at ``flops_per_second`` on each GPU."""
    return plan.flops_per_iteration * plan.iterations / (flops_per_second * plan.gpus)


def _time(plan: Plan, flops_per_second: float | None) -> str:
    if flops_per_second is None:
        return "state a throughput: --tflops or --seconds-per-forward"
    hours = run_seconds(plan, flops_per_second) / 3600
    return f"{hours:,.1f} hours for {plan.iterations:,} iterations, at {flops_per_second / 1e12:,.1f} TFLOPS a GPU"


def _cache(plan: Plan) -> str:
    each = f"{plan.cache_per_prompt / 1000:,.0f} kB a prompt in fp32"
    return each if plan.cache is None else f"{_gib(plan.cache)} GiB ({each})"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


# -- the table ---------------------------------------------------------------------------------------------------


def table_configs() -> list[str]:
    """The configurations that ship for real models."""
    return configs.shipped("sd*-*")


def fit_table(reserve: float, progress: bool = False) -> str:
    """Markdown: what each of them needs, with one picture a micro-batch and a cache of encoded data."""
    planners: dict[tuple[str, int], Planner] = {}
    rows = [
        "| configuration | " + " | ".join(f"{gpus}x{memory} GB" for gpus, memory in TABLE_HARDWARE) + " |",
        "|---" * (len(TABLE_HARDWARE) + 1) + "|",
    ]
    for name in table_configs():
        config = load_config(name, ["data.cache=cache"])
        key = (config.model.teacher, config.model.resolution)
        if key not in planners:
            planners[key] = make_planner(config, progress)
        cells = [fit_cell(planners[key], name, Hardware(gpus, memory, reserve)) for gpus, memory in TABLE_HARDWARE]
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def fit_cell(planner: Planner, name: str, hardware: Hardware) -> str:
    """The peak in GiB, and what has to be set for it to fit; ``no`` if nothing helps."""
    config = load_config(name, ["data.cache=cache"])
    accumulate = config.training.batch_size // hardware.gpus
    config = load_config(name, ["data.cache=cache", f"training.accumulate={accumulate}"])
    plan = planner.plan(config, hardware)
    if plan.fits:
        return f"{plan.peak / GIB:.1f}"
    # Adapters are a configuration of their own.
    changes = [c for c in planner.changes_that_fit(config, hardware) if not c.settings[0].startswith("adapter")]
    if not changes:
        return "no"
    settings = ", ".join(setting.partition(".")[2] for setting in changes[0].settings)
    return f"{changes[0].peak / GIB:.1f} with {settings}"


def write_table(path: Path, table: str) -> None:
    """Puts the table between its two markers in ``path``."""
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"({re.escape(TABLE_BEGIN)}).*?({re.escape(TABLE_END)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path}: expected the lines {TABLE_BEGIN.strip()} and {TABLE_END.strip()} around the table")
    path.write_text(pattern.sub(lambda m: m[1] + table + m[2], text), encoding="utf-8")
