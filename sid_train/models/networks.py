"""The four networks of a run, as whole copies of the UNet or as adapters over one."""

from __future__ import annotations

import copy
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
) -> Networks:
    """Networks with the teacher's weights (the generator: ``init_generator``'s, where there is one).

    Whole networks are trained in fp32; ``frozen_dtype`` is that of the teacher, over which adapters are put in place.
    """
    # No dropout or batch statistics in these networks: eval() everywhere, so that all compute alike.
    teacher.eval().requires_grad_(False)
    if adapter.rank:
        assert not isinstance(init_generator, UNetDenoiser)
        return _adapters(teacher.to(DTYPES[frozen_dtype]), init_generator, adapter, gradient_checkpointing)
    assert not isinstance(init_generator, dict)
    device = next(teacher.parameters()).device
    generator = copy.deepcopy(init_generator or teacher).to(device, torch.float32).eval()
    ema = copy.deepcopy(generator).requires_grad_(False)
    fake_score = copy.deepcopy(teacher).float()
    if gradient_checkpointing:
        for network in (generator, fake_score, teacher):
            network.unet.enable_gradient_checkpointing()
    teacher.to(DTYPES[frozen_dtype])
    return Networks(generator.requires_grad_(True), fake_score.requires_grad_(True), ema, teacher)


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
