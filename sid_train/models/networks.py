"""The networks of a run, as whole copies of the teacher or as adapters over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..files.tensors import DTYPES
from .adapter_config import AdapterConfig
from .adapters import Adapter, AdapterDenoiser, SharedNetwork, copy_adapter
from .denoiser import Denoiser

AVERAGE, TEACHER = "generator_ema", SharedNetwork.TEACHER


@dataclass
class Networks:
    """All with the contract ``denoise(x, sigma, cond) -> x0``.

    trained: by role; ``generator`` is one of them
    """

    trained: dict[str, Denoiser]
    generator_ema: Denoiser
    teacher: Denoiser


def build_networks(
    teacher: Denoiser,
    init_generator: Denoiser | Adapter | None,
    adapter: AdapterConfig,
    frozen_dtype: str,
    gradient_checkpointing: bool,
    place: Callable[[Denoiser], object],
    trained: tuple[str, ...],
) -> Networks:
    """Networks with the teacher's weights; generator and average start from ``init_generator`` where there is one.

    Teacher and ``init_generator`` are on the CPU. Whole networks are trained in fp32; ``frozen_dtype`` is that of the
    teacher, over which adapters are put in place. ``place`` moves each network, once it is made, to where it computes:
    main memory holds one copy at a time.

    trained: the roles that the method trains
    """
    # No dropout or batch statistics in these networks: eval() everywhere, so that all compute alike.
    teacher.eval().requires_grad_(False)
    if adapter.rank:
        assert not isinstance(init_generator, Denoiser)
        place(teacher.to(DTYPES[frozen_dtype]))
        return _adapters(teacher, init_generator, adapter, gradient_checkpointing, trained)
    assert not isinstance(init_generator, dict)

    def placed(network: Denoiser, dtype: torch.dtype, learns: bool) -> Denoiser:
        network.to(dtype).eval().requires_grad_(learns)
        if gradient_checkpointing:
            network.use_checkpointing()
        place(network)
        return network

    start = init_generator or teacher
    networks = {
        role: placed(copy.deepcopy(start if role == "generator" else teacher), torch.float32, learns=True)
        for role in trained
    }
    average = placed(copy.deepcopy(start), torch.float32, learns=False)
    return Networks(networks, average, placed(teacher, DTYPES[frozen_dtype], learns=False))


def _adapters(
    teacher: Denoiser,
    init_generator: Adapter | None,
    adapter: AdapterConfig,
    gradient_checkpointing: bool,
    trained: tuple[str, ...],
) -> Networks:
    shared = SharedNetwork(teacher, adapter, (*trained, AVERAGE))
    if gradient_checkpointing:
        shared.use_checkpointing()
    roles = {role: AdapterDenoiser(shared, role) for role in (*trained, AVERAGE, TEACHER)}
    if init_generator is not None:
        shared.load("generator", init_generator)
    copy_adapter(roles["generator"], roles[AVERAGE])
    for role in trained:
        roles[role].requires_grad_(True)
    return Networks({role: roles[role] for role in trained}, roles[AVERAGE], roles[TEACHER])
