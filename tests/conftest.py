"""What several test files need: SDXL's schedule, the demo's tiny UNet with random weights, a record of its calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sid_train.core.noise_schedule import VPSchedule
from sid_train.models.conditioning import Conditioning
from sid_train.models.digits.layout import DigitConditioner
from sid_train.models.digits.model import build_unet
from sid_train.models.unet import UNetDenoiser

sys.path.append(str(Path(__file__).parent))  # for small_sdxl
torch.set_num_threads(1)  # the networks here are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too


@dataclass
class Call:
    """One call of a network, as its forward hook saw it."""

    x: Tensor
    sigma: Tensor
    cond: Conditioning
    call: str
    grad_enabled: bool


@pytest.fixture(scope="session")
def schedule() -> VPSchedule:
    return VPSchedule.sdxl()


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
def make_denoiser() -> Callable[..., UNetDenoiser]:
    """``make_denoiser(seed, prediction_type)``: a new tiny UNet, the same weights for the same seed."""

    def make(seed: int = 0, prediction_type: str = "epsilon", zero_snr: bool = False) -> UNetDenoiser:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNetDenoiser(build_unet(), VPSchedule.sdxl(zero_snr, prediction_type))

    return make


@pytest.fixture
def record_calls() -> Callable[[UNetDenoiser], list[Call]]:
    """``record_calls(network)``: a list that grows by one entry a call; the network itself is left as it is."""

    def record(network: UNetDenoiser) -> list[Call]:
        calls: list[Call] = []

        def hook(module, args, kwargs) -> None:
            calls.append(Call(*args, call=kwargs.get("call", "denoise"), grad_enabled=torch.is_grad_enabled()))

        network.register_forward_pre_hook(hook, with_kwargs=True)
        return calls

    return record


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> str:
    """A small random CLIP model in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from sid_train.models.stable_diffusion.text import clip_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    path = tmp_path_factory.mktemp("clip") / "small-clip"
    CLIPModel(config).save_pretrained(path)
    size = {"size": {"shortest_edge": 32}, "crop_size": 32}
    CLIPProcessor(CLIPImageProcessor(**size), clip_tokenizers()[0]).save_pretrained(path)
    return str(path)
