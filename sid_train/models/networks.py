"""The four networks of a run, as whole copies of the UNet or as adapters over one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..config import AdapterConfig
from .adapters import Adapter, AdapterDenoiser, SharedUNet, copy_adapter
from .unet import UNetDenoiser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Networks:
    """All with the contract ``denoise(x, sigma, cond) -> x0``; generator and fake score are trained."""

    generator: nn.Module
    fake_score: nn.Module
    generator_ema: nn.Module
    teacher: nn.Module


def build_networks(
    teacher: UNetDenoiser,
    init_generator: UNetDenoiser | Adapter | None,
    adapter: AdapterConfig,
    frozen_dtype: str,
    gradient_checkpointing: bool,
    place: Callable[[UNetDenoiser], object],
) -> Networks:
    """Networks with the teacher's weights (the generator: ``init_generator``'s, where there is one), both on the CPU.

    Whole networks are trained in fp32; ``frozen_dtype`` is that of the teacher, over which adapters are put in place.
    ``place`` moves each network, once it is made, to where it computes: main memory holds one copy at a time.
    """
    # No dropout or batch statistics in these networks: eval() everywhere, so that all compute alike.
    teacher.eval().requires_grad_(False)
    if adapter.rank:
        assert not isinstance(init_generator, UNetDenoiser)
        place(teacher.to(DTYPES[frozen_dtype]))
        return _adapters(teacher, init_generator, adapter, gradient_checkpointing)
    assert not isinstance(init_generator, dict)

    def placed(network: UNetDenoiser, dtype: torch.dtype, trained: bool) -> UNetDenoiser:
        network.to(dtype).eval().requires_grad_(trained)
        if gradient_checkpointing:
            network.unet.enable_gradient_checkpointing()
        place(network)
        return network

    start = init_generator or teacher
    return Networks(
        generator=placed(copy.deepcopy(start), torch.float32, trained=True),
        generator_ema=placed(copy.deepcopy(start), torch.float32, trained=False),
        fake_score=placed(copy.deepcopy(teacher), torch.float32, trained=True),
        teacher=placed(teacher, DTYPES[frozen_dtype], trained=False),
    )


def _adapters(
    teacher: UNetDenoiser, init_generator: Adapter | None, adapter: AdapterConfig, gradient_checkpointing: bool
) -> Networks:
    trained = ("generator", "fake_score")
    shared = SharedUNet(teacher, adapter, (*trained, "generator_ema"))
    if gradient_checkpointing:
        shared.use_checkpointing()
    roles = {role: AdapterDenoiser(shared, role) for role in (*trained, "generator_ema", SharedUNet.TEACHER)}
    if init_generator is not None:
        shared.load("generator", init_generator)
    copy_adapter(roles["generator"], roles["generator_ema"])
    for role in trained:
        roles[role].requires_grad_(True)
    return Networks(**roles)
