"""Generator, fake score and teacher as one frozen UNet: two LoRA adapters over it, and the UNet itself.

Which of them the UNet is, is a state that every call sets first. With gradient checkpointing a backward pass runs parts
of the UNet again, when another call may have changed that state; each part therefore remembers whose it was.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import AdapterConfig
from .conditioning import Conditioning
from .unet import Output, UNetDenoiser

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The modules that LCM's and DMD2's SDXL LoRAs adapt.
ALL = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
DOWN, UP = "lora_A", "lora_B"  # peft's names of the two factors


class SharedUNet:
    """A frozen UNet with an adapter for every role but the teacher, which is the UNet without any."""

    TEACHER = "teacher"

    def __init__(self, denoiser: UNetDenoiser, config: AdapterConfig, roles: tuple[str, ...]):
        self.denoiser = denoiser
        unet = denoiser.unet
        unet.requires_grad_(False)
        targets = list(ALL if config.targets == "all" else ATTENTION)
        # alpha = rank, so that the factor in front of up @ down is 1.
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            for role in roles:
                inject_adapter_in_model(lora, unet, role)
        self.layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
        for role in roles:
            for parameter in self.parameters(role).values():
                parameter.data = parameter.data.float()  # trained in fp32 whatever the UNet's dtype
                parameter.requires_grad_(False)
        self.active = ""
        self.activate(self.TEACHER)

    def activate(self, role: str) -> None:
        """Makes the UNet the network of ``role``. peft's own switch would also decide which parameters learn."""
        if role == self.active:
            return
        for layer in self.layers.values():
            layer._disable_adapters = role == self.TEACHER
            layer._active_adapter = [role]
        self.active = role

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The factors of a role's adapter by ``module.lora_A`` (down) and ``module.lora_B`` (up)."""
        return {
            f"{name}.{factor}": getattr(layer, factor)[role].weight
            for name, layer in self.layers.items()
            for factor in (DOWN, UP)
        }

    @torch.no_grad()
    def load(self, role: str, adapter: Adapter) -> None:
        """Gives a role the weights of a LoRA of the same modules and rank; ValueError for another one."""
        missing, strange = self.layers.keys() - adapter.keys(), adapter.keys() - self.layers.keys()
        if missing or strange:
            raise ValueError(
                f"adapter: expected a LoRA of {len(self.layers)} modules (adapter.targets); {len(missing)} of them are "
                f"missing, {len(strange)} are others, such as {sorted(missing | strange)[0]}"
            )
        parameters = self.parameters(role)
        for module, (down, up, alpha) in adapter.items():
            ours = parameters[f"{module}.{DOWN}"]
            if len(down) != len(ours):
                raise ValueError(f"adapter.rank: expected {len(down)}, as in the LoRA, got {len(ours)}")
            ours.copy_(down * (alpha / len(down)))
            parameters[f"{module}.{UP}"].copy_(up.reshape(parameters[f"{module}.{UP}"].shape))

    def use_checkpointing(self) -> None:
        """Recomputes blocks in the backward pass, each as the role that ran it."""

        def as_the_same_role(module: nn.Module, *args: Any) -> Any:
            role = self.active

            def run(*inputs: Any) -> Any:
                self.activate(role)
                return module(*inputs)

            return checkpoint(run, *args, use_reentrant=False)

        self.denoiser.unet.enable_gradient_checkpointing(as_the_same_role)


class AdapterDenoiser(nn.Module):
    """One role of a shared UNet, with the interface of ``UNetDenoiser``. Its parameters are its adapter's alone."""

    def __init__(self, shared: SharedUNet, role: str):
        super().__init__()
        self.role = role
        self._shared = [shared]  # in a list: the UNet is not part of this module
        adapter = {} if role == SharedUNet.TEACHER else shared.parameters(role)
        self.adapter = nn.ParameterDict({name.replace(".", "/"): p for name, p in adapter.items()})  # no dots allowed
        self.schedule, self.prediction_type = shared.denoiser.schedule, shared.denoiser.prediction_type

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, output: Output = "x0"):
        """As ``UNetDenoiser.forward``."""
        (shared,) = self._shared
        shared.activate(self.role)
        return shared.denoiser(x, sigma, cond, output)


Adapter = dict[str, tuple[Tensor, Tensor, float]]
"""A LoRA by the UNet's module names: down [rank, in, ...], up [out, rank, ...], alpha."""


def adapter_from_state(state: dict[str, Tensor]) -> Adapter:
    """The adapter in the ``state_dict`` of an ``AdapterDenoiser``."""
    factors = {name.removeprefix("adapter.").replace("/", "."): tensor for name, tensor in state.items()}
    downs = {name.removesuffix(f".{DOWN}"): t for name, t in factors.items() if name.endswith(f".{DOWN}")}
    return {name: (down, factors[f"{name}.{UP}"], float(len(down))) for name, down in downs.items()}


def lora_difference(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """What a LoRA adds to a weight: ``alpha / rank * up @ down``, fp32, in the weight's shape [out, in, ...]."""
    product = up.float().flatten(1) @ down.float().flatten(1)
    return (alpha / len(down) * product).unflatten(1, down.shape[1:])


@torch.no_grad()
def merge_adapter(unet: UNet2DConditionModel, adapter: Adapter) -> None:
    """Adds an adapter to the weights of a UNet that has none, in place."""
    for name, factors in adapter.items():
        weight = unet.get_submodule(name).weight
        weight.copy_(weight.float() + lora_difference(*factors))


def copy_adapter(source: AdapterDenoiser, target: AdapterDenoiser) -> None:
    """Gives one role the weights of another."""
    with torch.no_grad():
        torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
