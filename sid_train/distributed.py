"""Everything that knows about ranks; accelerate does the work, and ``sharding`` where networks are sharded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from .rng import BatchRNG

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .models.unet import UNetDenoiser


def is_first_process() -> bool:
    """Whether this is the only process, or the one of torchrun's that may print, before there is an Accelerator."""
    return os.environ.get("RANK", "0") == "0"


def check_processes(accelerator: Accelerator) -> None:
    """ValueError where torchrun started processes that would each train alone."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < started:
        raise ValueError(
            f"torchrun started {started} processes, which would each train alone: accelerate finds no CUDA device for "
            "them. To train on a CPU, set ACCELERATE_USE_CPU=true"
        )


def is_sharded(accelerator: Accelerator, training: TrainingConfig) -> bool:
    """Whether networks are sharded: one process keeps them whole."""
    return training.sharding == "full" and accelerator.num_processes > 1


# -- random numbers ------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    set_seed(seed)


def step_generator(seed: int) -> torch.Generator:
    """A CPU generator, the same on every rank, for what a whole iteration shares."""
    return torch.Generator().manual_seed(seed * 10_007)


def batch_generator(accelerator: Accelerator, seed: int) -> torch.Generator:
    """A generator on this rank's device, in the same state on every rank, for what is drawn a sample."""
    return torch.Generator(accelerator.device).manual_seed(seed * 10_007 + 1)


def batch_parts(accelerator: Accelerator, generator: torch.Generator, micro_batches: int) -> Iterator[BatchRNG]:
    """The draws for this rank's part of each micro-batch. Every part draws for the whole batch, from the same state."""
    ranks, state = accelerator.num_processes, generator.get_state()
    for micro_batch in range(micro_batches):
        generator.set_state(state)
        yield BatchRNG(generator, micro_batch * ranks + accelerator.process_index, micro_batches * ranks)


# -- networks ------------------------------------------------------------------------------------------------------


def placement(accelerator: Accelerator, training: TrainingConfig) -> Callable[[UNetDenoiser], None]:
    """What puts a network where it computes: on this rank's device, whole or this rank's part of it."""
    if not is_sharded(accelerator, training):
        return lambda network: network.to(accelerator.device)
    from torch.distributed.device_mesh import init_device_mesh

    from .sharding import shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    compute_dtype = torch.bfloat16 if training.mixed_precision == "bf16" else None
    return lambda network: shard(network, mesh, compute_dtype)


def autocast(accelerator: Accelerator, training: TrainingConfig) -> AbstractContextManager:
    """Around forward passes. Sharded networks compute in their own dtype instead."""
    return nullcontext() if is_sharded(accelerator, training) else accelerator.autocast()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reducing_gradients(accelerator: Accelerator, network: nn.Module, last: bool) -> AbstractContextManager:
    """Around the passes of a micro-batch: ranks average their gradients in the ``last`` backward pass of an update."""
    if hasattr(network, "set_requires_gradient_sync"):  # a sharded network
        network.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(network)


def clip_gradients(accelerator: Accelerator, network: nn.Module, limit: float) -> float:
    """Scales the gradients of ``network`` down to the norm ``limit``; returns the norm, the same on every rank."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return mean_over_ranks(accelerator, {"norm": float(norm)})["norm"]


# -- agreement -----------------------------------------------------------------------------------------------------


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank; every rank must call it."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item() > 0)


def on_every_rank(accelerator: Accelerator, value: int) -> list[int]:
    """``value`` of each rank; every rank must call it."""
    if accelerator.num_processes == 1:
        return [value]
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()


def mean_over_ranks(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """The mean of each value: not finite on every rank if it is not on one. All ranks must call it, with these keys."""
    if accelerator.num_processes == 1:
        return values
    own = torch.tensor(list(values.values()), device=accelerator.device)
    return dict(zip(values, accelerator.reduce(own, "mean").tolist(), strict=True))
