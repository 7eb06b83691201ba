"""Generator, fake score and teacher as one frozen network: LoRA adapters over it, and the network itself.

Every call first activates the adapter of its role. With gradient checkpointing a backward pass runs blocks of the
network again, when a later call may have activated another role: each block therefore remembers the role that ran it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapter_config import AdapterConfig
from .conditioning import Conditioning
from .denoiser import Denoiser

DOWN, UP = "lora_A", "lora_B"  # peft's names of the two factors


class SharedNetwork:
    """A frozen network with an adapter for every role but the teacher, which is the network without any."""

    TEACHER = "teacher"

    def __init__(self, denoiser: Denoiser, config: AdapterConfig, roles: tuple[str, ...]):
        self.denoiser = denoiser
        network = denoiser.network
        network.requires_grad_(False)
        targets = denoiser.lora_targets(attention_only=config.targets == "attention")
        # alpha = rank, so that the factor in front of up @ down is 1.
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            for role in roles:
                inject_adapter_in_model(lora, network, role)
        self.layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        for role in roles:
            for parameter in self.parameters(role).values():
                parameter.data = parameter.data.float()  # trained in fp32 whatever the network's dtype
                parameter.requires_grad_(False)
        self.active = ""
        self.activate(self.TEACHER)

    def activate(self, role: str) -> None:
        """Makes the shared network that of ``role``. peft's own switch would also decide which parameters learn."""
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

        self.denoiser.use_checkpointing(as_the_same_role)


class AdapterDenoiser(Denoiser):
    """One role of a shared network. Its parameters are its adapter's alone."""

    def __init__(self, shared: SharedNetwork, role: str):
        super().__init__()
        self.role = role
        self._shared = [shared]  # in a list: the network is not part of this module
        adapter = {} if role == SharedNetwork.TEACHER else shared.parameters(role)
        self.adapter = nn.ParameterDict({name.replace(".", "/"): p for name, p in adapter.items()})  # no dots allowed
        self.schedule = shared.denoiser.schedule

    @property
    def network(self) -> nn.Module:
        return self._shared[0].denoiser.network

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._activated().denoise(x, sigma, cond)

    def logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._activated().logits(x, sigma, cond)

    def denoise_with_logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        return self._activated().denoise_with_logits(x, sigma, cond)

    def _activated(self) -> Denoiser:
        (shared,) = self._shared
        shared.activate(self.role)
        return shared.denoiser


Adapter = dict[str, tuple[Tensor, Tensor, float]]
"""A LoRA by the network's module names: down [rank, in, ...], up [out, rank, ...], alpha."""


def adapter_from_state(state: dict[str, Tensor]) -> Adapter:
    """The adapter in the ``state_dict`` of an ``AdapterDenoiser``."""
    factors = {name.removeprefix("adapter.").replace("/", "."): tensor for name, tensor in state.items()}
    downs = {name.removesuffix(f".{DOWN}"): t for name, t in factors.items() if name.endswith(f".{DOWN}")}
    return {name: (down, factors[f"{name}.{UP}"], float(len(down))) for name, down in downs.items()}


def lora_difference(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """What a LoRA adds to a weight: ``alpha / rank * up @ down``, fp32, in the weight's shape [out, in, ...]."""
    product = up.float().flatten(1) @ down.float().flatten(1)
    return (alpha / len(down) * product).unflatten(1, down.shape[1:])


def copy_adapter(source: AdapterDenoiser, target: AdapterDenoiser) -> None:
    """Gives one role the weights of another."""
    with torch.no_grad():
        torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
