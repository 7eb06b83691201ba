"""LoRAs of SDXL: kohya's files, and the one nearest to the difference of two networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.tensors import open_tensors
from ..adapters import Adapter
from ..family import Tensors
from .keys import invert, kohya_name, rename, unet_modules

UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


def kohya_modules(unet: Tensors, config: Mapping[str, Any]) -> dict[str, str]:
    """``{diffusers' name: kohya's name}`` of every module with a weight in a UNet."""
    modules = [name.removesuffix(".weight") for name in unet if name.endswith(".weight")]
    return {ours: kohya_name(ldm) for ours, ldm in rename(modules, unet_modules(config)).items()}


def read_lora(path: Path, unet: Tensors, config: Mapping[str, Any]) -> Adapter:
    """A kohya LoRA file for ``unet``, by diffusers' module names; ValueError for modules that it does not have."""
    tensors = open_tensors(path)
    ours = invert(kohya_modules(unet, config))
    adapter: Adapter = {}
    for name in tensors:
        module = name.removesuffix(DOWN)
        if module == name:
            continue
        if module not in ours:
            raise ValueError(f"{path}: module {module}: expected kohya's name of a module of this UNet")
        down, up = tensors[name].load(), tensors[module + UP].load()
        alpha = tensors.get(module + ALPHA)
        adapter[ours[module]] = (down, up, float(alpha.load()) if alpha else float(len(down)))
    if not adapter:
        raise ValueError(f"{path}: expected a kohya LoRA (lora_unet_...{DOWN}), got {next(iter(tensors), 'nothing')}")
    return adapter


def extract_lora(distilled: Tensors, base: Tensors, rank: int = 0, energy: float = 0) -> tuple[Adapter, list[str]]:
    """The LoRA nearest to ``distilled - base`` in the least-squares sense, and lines that report its error.

    rank: of every module; or energy: the share of each module's squared difference that is to be kept, which then
    decides its rank. Norms and biases cannot be in a LoRA; the report says how large their part is.
    """
    if bool(rank) == bool(energy) or rank < 0 or not 0 <= energy <= 1:
        raise ValueError(
            "LoRA extraction: expected --rank (1 or more) or --energy (above 0, at most 1), one of the two"
        )
    adapter: Adapter = {}
    total = lost = left_out = 0.0
    worst: tuple[float, str] = (0.0, "")
    for name, tensor in distilled.items():
        difference = tensor.load().float() - base[name].load().float()
        size = float(difference.double().square().sum())
        total += size
        if difference.ndim < 2:
            left_out += size
            continue
        if not size:
            continue
        module = name.removesuffix(".weight")
        down, up, error = _factors(difference, rank, energy)
        adapter[module] = (down, up, float(len(down)))
        lost += error
        worst = max(worst, ((error / size) ** 0.5, module))
    if not adapter:
        raise ValueError("LoRA extraction: the distilled UNet equals its base: there is nothing to extract")
    ranks = [len(down) for down, _, _ in adapter.values()]
    return adapter, [
        f"{len(adapter)} modules, rank {min(ranks)} to {max(ranks)}",
        f"relative error {((lost + left_out) / total) ** 0.5:.4f} (root of the lost share of the squared difference)",
        f"worst module: {worst[1]}, {worst[0]:.4f}",
        f"norms and biases, which a LoRA cannot hold: {(left_out / total) ** 0.5:.4f}",
    ]


def _factors(difference: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor, float]:
    """down, up and the squared error of the best factorisation.

    The left singular vectors come from the smaller Gram matrix, in fp64: much faster than a singular value
    decomposition of SDXL's widest matrices, and down = up^T @ difference makes the product an exact projection.
    """
    matrix = difference.flatten(1)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(wide.double() @ wide.double().T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if energy:
        kept = values.cumsum(0) / values.sum()
        rank = int((kept < energy).sum()) + 1
    basis = vectors[:, :rank].float()
    inner = basis.T @ wide
    if wide is matrix:
        down, up = inner, basis
    else:
        down, up = basis.T, inner.T
    error = float((up @ down - matrix).double().square().sum())
    return down.reshape(-1, *difference.shape[1:]).contiguous(), up.contiguous(), error
