"""What several test files need: SDXL's schedule, the demo's tiny UNet with random weights, a record of its calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sid_train.core.noise_schedule import NoiseSchedule
from sid_train.demo.model import DigitConditioner, build_unet
from sid_train.models.conditioning import Conditioning
from sid_train.models.unet import UNetDenoiser

sys.path.append(str(Path(__file__).parent))  # for small_sdxl
torch.set_num_threads(1)  # the networks here are too small to share


@dataclass
class Call:
    """One call of a network, as its forward hook saw it."""

    x: Tensor
    sigma: Tensor
    cond: Conditioning
    output: str
    grad_enabled: bool


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.sdxl()


@pytest.fixture(scope="session")
def conditioner() -> DigitConditioner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DigitConditioner()


@pytest.fixture(scope="session")
def cond(conditioner) -> Conditioning:
    return conditioner.encode(["a red three on a blue ground", "a green seven on a black ground"])


@pytest.fixture(scope="session")
def unconditional(conditioner) -> Conditioning:
    return conditioner.encode([""])


@pytest.fixture(scope="session")
def make_denoiser(schedule) -> Callable[..., UNetDenoiser]:
    """``make_denoiser(seed, prediction_type)``: a new tiny UNet, the same weights for the same seed."""

    def make(seed: int = 0, prediction_type: str = "epsilon", schedule: NoiseSchedule = schedule) -> UNetDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNetDenoiser(build_unet(), schedule, prediction_type)

    return make


@pytest.fixture
def record_calls() -> Callable[[UNetDenoiser], list[Call]]:
    """``record_calls(network)``: a list that grows by one entry a call; the network itself is left as it is."""

    def record(network: UNetDenoiser) -> list[Call]:
        calls: list[Call] = []

        def hook(module, args, kwargs) -> None:
            calls.append(Call(*args, output=kwargs.get("output", "x0"), grad_enabled=torch.is_grad_enabled()))

        network.register_forward_pre_hook(hook, with_kwargs=True)
        return calls

    return record


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
