"""Everything that knows about ranks; accelerate does the work."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor


def rank_generator(accelerator: Accelerator, seed: int) -> torch.Generator:
    """A generator on this rank's device whose draws differ from every other rank's."""
    return torch.Generator(accelerator.device).manual_seed(seed * 10_007 + accelerator.process_index + 1)


def shared_generator(seed: int) -> torch.Generator:
    """A CPU generator whose draws are the same on every rank."""
    return torch.Generator().manual_seed(seed * 10_007)


def seed_everything(seed: int) -> None:
    set_seed(seed)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank; every rank must call it."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item() > 0)


def gather_states(accelerator: Accelerator, generator: torch.Generator) -> list[Tensor]:
    """The generator states of all ranks, in order."""
    state = generator.get_state()
    if accelerator.num_processes == 1:
        return [state]
    gathered = accelerator.gather(state[None].to(accelerator.device))
    return list(gathered.cpu())
