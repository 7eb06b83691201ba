"""Everything that knows about ranks; accelerate does the work, and ``sharding`` where networks are sharded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from ..config import TrainingConfig
from ..models.denoiser import Denoiser
from .environment import foreign_settings, own_settings
from .parts import local_part

T = TypeVar("T")


def is_first_process() -> bool:
    """Whether this is the only process, or the one of torchrun's that may print, before there is an Accelerator."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(training: TrainingConfig, folder: Path) -> Accelerator:
    """This run's view of the processes. Trackers write into ``folder``."""
    # A process may make several runs; accelerate keeps one state a process, and refuses another precision in it.
    AcceleratorState._reset_state()
    if (ignored := foreign_settings()) and is_first_process():
        told = ", ".join(f"{name}={value}" for name, value in ignored.items())
        print(f"ignored from the environment, since the configuration says it: {told}", file=sys.stderr, flush=True)
    with own_settings():
        return Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=None if training.tracker == "none" else training.tracker,
            project_dir=str(folder),
        )


def check_processes(accelerator: Accelerator | PartialState) -> None:
    """ValueError where torchrun started processes that would each work alone."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < started:
        raise ValueError(
            f"torchrun started {started} processes, which would each work alone: accelerate finds no CUDA device for "
            "them. On a CPU, set ACCELERATE_USE_CPU=true"
        )


def micro_batch_size(accelerator: Accelerator, training: TrainingConfig) -> int:
    """Images in a pass. ValueError for a batch that cannot be divided."""
    parts = accelerator.num_processes * training.accumulate
    if training.batch_size % parts:
        raise ValueError(
            f"training.batch_size: expected a multiple of {accelerator.num_processes} process(es) times "
            f"{training.accumulate} micro-batch(es), got {training.batch_size}"
        )
    return training.batch_size // parts


def is_sharded(accelerator: Accelerator, training: TrainingConfig) -> bool:
    """Whether networks are sharded: one process keeps them whole."""
    return training.sharding == "full" and accelerator.num_processes > 1


# -- random numbers ------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    set_seed(seed)


# -- networks ------------------------------------------------------------------------------------------------------


def placement(accelerator: Accelerator, training: TrainingConfig) -> Callable[[Denoiser], object]:
    """What puts a network where it computes: on this rank's device, whole or this rank's part of it."""
    if not is_sharded(accelerator, training):
        return lambda network: network.to(accelerator.device)
    # Imported here: not every build of PyTorch has torch.distributed.
    from torch.distributed.device_mesh import init_device_mesh

    from .sharding import shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    compute_dtype = torch.bfloat16 if training.mixed_precision == "bf16" else None
    return lambda network: shard(network, mesh, compute_dtype)


def autocast(accelerator: Accelerator, training: TrainingConfig) -> AbstractContextManager:
    """Around forward passes. Sharded networks compute in their own dtype instead."""
    return nullcontext() if is_sharded(accelerator, training) else accelerator.autocast()


def reducing_gradients(accelerator: Accelerator, network: nn.Module, last: bool) -> AbstractContextManager:
    """Around the passes of a micro-batch: ranks average their gradients in the ``last`` backward pass of an update."""
    set_sync = getattr(network, "set_requires_gradient_sync", None)
    if set_sync is not None:  # a sharded network
        set_sync(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(network)


# -- agreement -----------------------------------------------------------------------------------------------------


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank; every rank must call it."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item() > 0)


def non_finite(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> str:
    """A tensor with a value that is not finite, on any rank, by name; "" if there is none. Every rank must call it."""
    parts = {name: local_part(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [name for name, part in parts.items() if not part.isfinite().all()]
    return (bad[0] if bad else "a tensor of another process") if any_rank(accelerator, bool(bad)) else ""


def on_every_rank(accelerator: Accelerator, value: int) -> list[int]:
    """``value`` of each rank; every rank must call it."""
    if accelerator.num_processes == 1:
        return [value]
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()


def on_first_rank(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What ``act`` gives on the first rank, on every rank. All must call it; where it fails, all of them raise."""
    if accelerator.num_processes == 1:
        return act()
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = act()
        except (OSError, ValueError) as error:
            told[1] = str(error)
    broadcast_object_list(told)
    value, problem = told
    if problem is not None:
        raise ValueError(problem)
    return value


def mean_over_ranks(accelerator: Accelerator, values: list[Tensor]) -> list[float]:
    """The mean of each scalar: not finite on every rank if it is not on one. All ranks must call it, with as many."""
    own = torch.stack([value.float() for value in values])
    return accelerator.reduce(own, "mean").tolist() if accelerator.num_processes > 1 else own.tolist()
