"""ComfyUI's model behind the trainer's contract: generator, fake score, average and teacher as one network.

The trainer does the same with peft (``sid_train/models/adapters.py``), which ComfyUI does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..sid_train.core.noise_schedule import VPSchedule
from ..sid_train.models.conditioning import Conditioning
from ..sid_train.models.denoiser import Denoiser

TEACHER = "teacher"
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# Of ComfyUI's UNet, what the trainer's LoRAs leave alone: embeddings, the first layer and the last.
LEFT_OUT = ("time_embed.", "label_emb.", "input_blocks.0.", "out.")
BLOCKS = ("ResBlock", "BasicTransformerBlock")  # what is computed again in the backward pass


class Adapters:
    """A LoRA for each of several roles over one frozen network; a role without any is the network itself.

    Each layer's hook adds what the LoRA of the role that is active makes of the layer's input: weights in any type, on
    any device and streamed, stay as they are.
    """

    def __init__(
        self, network: nn.Module, rank: int, roles: Sequence[str], generator: torch.Generator, device: torch.device
    ):
        self.active = TEACHER
        self.layers: dict[str, nn.Module] = {
            name: layer
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(LEFT_OUT)
        }
        self.factors = {role: dict(self._new(rank, generator, device)) for role in roles}
        self._blocks: list[nn.Module] = []
        # Last: where there is no room for the factors, the network has no hook.
        self._handles = [
            layer.register_forward_hook(lambda layer, args, out, name=name: self._add(name, layer, args[0], out))
            for name, layer in self.layers.items()
        ]

    def _new(
        self, rank: int, generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[str, tuple[nn.Parameter, nn.Parameter]]]:
        """Down and up of every layer as peft begins: down like a layer's own weights, up 0."""
        for name, layer in self.layers.items():
            shape = tuple(layer.weight.shape)
            of_layer = min(rank, shape[0], math.prod(shape[1:]))
            bound = 1 / math.sqrt(math.prod(shape[1:]))  # Kaiming's with a = sqrt(5)
            down = (torch.rand(of_layer, *shape[1:], generator=generator) * 2 - 1) * bound
            up = torch.zeros(shape[0], of_layer, *[1] * (len(shape) - 2))
            yield name, (nn.Parameter(down.to(device)), nn.Parameter(up.to(device)))

    def _add(self, name: str, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        if self.active == TEACHER:
            return out
        down, up = self.factors[self.active][name]
        x = x.to(down.dtype)
        if isinstance(layer, nn.Linear):
            return out + F.linear(F.linear(x, down), up).to(out.dtype)
        inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return out + F.conv2d(inner, up).to(out.dtype)

    def use_checkpointing(self, network: nn.Module) -> None:
        """Blocks run again in the backward pass, each as the role that ran it."""
        for block in network.modules():
            if type(block).__name__ in BLOCKS and "forward" not in vars(block):
                block.forward = self._again(block.forward)
                self._blocks.append(block)

    def _again(self, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            role = self.active

            def as_the_same_role(*args: Any, **kwargs: Any) -> Any:
                self.active = role
                return forward(*args, **kwargs)

            # The network writes into its options which block runs; a block that runs again is to find its own.
            args = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
            kwargs = {name: dict(arg) if isinstance(arg, dict) else arg for name, arg in kwargs.items()}
            return checkpoint(as_the_same_role, *args, use_reentrant=False, **kwargs)

        return run

    def remove(self) -> None:
        """Leaves the network as it was."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            del block.forward
        self._handles, self._blocks = [], []


class RoleDenoiser(Denoiser):
    """One role of ComfyUI's model. Its parameters are those of its adapter alone.

    Of the conditioning it reads ``text``, and ``y`` where the network has such an input (SDXL).
    """

    def __init__(self, model: nn.Module, adapters: Adapters, role: str, schedule: VPSchedule, options: dict):
        super().__init__()
        self._shared = [model]  # in a list: the model is not part of this module
        self.adapters, self.role, self.schedule, self.options = adapters, role, schedule, options
        factors = adapters.factors.get(role, {})
        self.down = nn.ParameterList(down for down, _ in factors.values())
        self.up = nn.ParameterList(up for _, up in factors.values())

    @property
    def network(self) -> nn.Module:
        return self._shared[0].diffusion_model

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.adapters.active = self.role
        # As ComfyUI's samplers tell patches on the model; and attention through which a gradient passes.
        options = self.options | {
            "cond_or_uncond": [0],
            "sigmas": sigma,
            "optimized_attention_override": lambda own, *args, **kwargs: attention_pytorch(*args, **kwargs),
        }
        told = {"c_crossattn": cond.text} | ({"y": cond.y} if "y" in cond.tensors else {})
        return self._shared[0].apply_model(x, sigma, transformer_options=options, **told).float()

    def logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        raise NotImplementedError("real pairs need the trainer on the command line")

    def denoise_with_logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("real pairs need the trainer on the command line")


def kohya_tensors(factors: dict[str, tuple[Tensor, Tensor]], unet_config: dict, ldm_names: bool) -> dict[str, Tensor]:
    """A role's adapter under kohya's names, fp16: those of ldm, or of diffusers. Alpha is the rank."""
    names = {name: name for name in factors}
    if not ldm_names:
        theirs = {ldm: ours for ours, ldm in comfy.utils.unet_to_diffusers(unet_config).items()}
        names = {name: theirs[f"{name}.weight"].removesuffix(".weight") for name in factors}
    tensors = {}
    for name, (down, up) in factors.items():
        key = "lora_unet_" + names[name].replace(".", "_")
        tensors |= {key + DOWN: down, key + UP: up, key + ALPHA: torch.tensor(float(len(down)))}
    return {name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}
