"""LoRAs of UNets: kohya's files, and the one nearest to the difference of two networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.recipe import LORA_SUFFIX
from ..files.reading import reading, shown
from ..files.tensors import LazyTensor, open_tensors, write_tensors
from .adapters import Adapter
from .family import Generator, Tensors

UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


def is_kohya(path: Path) -> bool:
    """Whether a file holds a LoRA of a UNet in kohya's form, by the names of its tensors."""
    with reading(path, "a safetensors file"):
        return any(name.startswith("lora_unet_") for name in open_tensors(path))


def modules_of(network: Tensors) -> list[str]:
    """Those with a weight."""
    return [name.removesuffix(".weight") for name in network if name.endswith(".weight")]


def kohya_names(modules: Mapping[str, str]) -> dict[str, str]:
    """``{our name: kohya's name}`` of modules, given the names that kohya's are made of."""
    return {ours: "lora_unet_" + name.replace(".", "_") for ours, name in modules.items()}


def read_lora(path: Path, unet: Tensors, kohya: Mapping[str, str]) -> Adapter:
    """A kohya LoRA file for ``unet``, by our module names, to which ``kohya`` gives its names; ValueError for modules
    that are not there, and for factors that do not fit.
    """
    with reading(path, "a kohya LoRA"):
        tensors = open_tensors(path)
        ours = {theirs: name for name, theirs in kohya.items()}
        modules: dict[str, None] = {}
        for name in tensors:
            end = next((end for end in (UP, DOWN, ALPHA) if name.endswith(end)), None)
            module = name.removesuffix(end or "")
            if end is None or module not in ours:
                raise ValueError(
                    f"tensor {shown(name, 120)}: expected a kohya LoRA (lora_unet_...{DOWN}, {UP} and {ALPHA}) of "
                    "modules of this UNet: other kinds, and LoRAs with text encoders, are not read"
                )
            modules[module] = None
        if not modules:
            raise ValueError(f"expected tensors such as lora_unet_...{DOWN}, got none")
        return {ours[module]: _factors_of(tensors, module, unet[f"{ours[module]}.weight"]) for module in modules}


def _factors_of(tensors: Tensors, module: str, weight: LazyTensor) -> tuple[Tensor, Tensor, float]:
    """down, up and alpha of one module; ValueError where they do not make a difference of its ``weight``."""
    shown_module = shown(module, 120)
    if missing := [end for end in (DOWN, UP) if module + end not in tensors]:
        raise ValueError(f"module {shown_module}: {missing[0]} is missing")
    down, up = (tensors[module + end].load_finite() for end in (DOWN, UP))
    rank = len(down) if down.ndim else 0
    fits = down.ndim == len(weight.shape) and tuple(down.shape[1:]) == weight.shape[1:]
    if not rank or not fits or up.ndim < 2 or tuple(up.flatten(1).shape) != (weight.shape[0], rank):
        raise ValueError(
            f"module {shown_module}: expected factors of its weight {list(weight.shape)}, got {list(up.shape)} (up) "
            f"and {list(down.shape)} (down)"
        )
    if module + ALPHA not in tensors:
        return down, up, float(rank)
    alpha = tensors[module + ALPHA].load_finite()
    if alpha.numel() != 1:
        raise ValueError(f"module {shown_module}: alpha: expected one number, got {alpha.numel()}")
    return down, up, float(alpha)


def write_lora(
    path: Path, generator: Generator, adapter: Adapter, kohya: Mapping[str, str], dtype: torch.dtype
) -> None:
    """An adapter with kohya's names, which ComfyUI, diffusers and the web UIs read; ``kohya`` as in ``read_lora``."""
    if dtype == torch.float8_e4m3fn:
        raise ValueError("--dtype: a LoRA is stored in fp16, bf16 or fp32, not fp8")
    tensors = {}
    adapter = with_one_alpha(adapter, dtype)
    for module, (down, up, alpha) in adapter.items():
        if up.ndim < down.ndim:  # a convolution's second factor is 1x1
            up = up.reshape(*up.shape, 1, 1)
        for end, tensor in ((DOWN, down), (UP, up), (ALPHA, torch.tensor(alpha))):
            name = kohya[module] + end
            tensors[name] = LazyTensor.of(tensor, f"{path.name}: tensor {name}").narrowed(dtype)
    ranks = sorted({len(down) for down, _, _ in adapter.values()})
    rank = str(ranks[-1]) if len(ranks) == 1 else "Dynamic"
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": f"{next(iter(adapter.values()))[2]:g}",
        "ss_base_model_version": generator.recipe.kohya_version,
    }
    metadata = generator.metadata() | about
    metadata["modelspec.architecture"] += LORA_SUFFIX
    write_tensors(path, tensors, metadata)


def with_one_alpha(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The same differences with the same alpha for every module, which ``dtype`` can hold: the factors between go into
    ``up``. Where alphas differ, as ranks do, diffusers gives attention a scale of its own.
    """
    alphas = [alpha for _, _, alpha in adapter.values()]
    one = max(alphas, key=abs)
    if float(torch.tensor(one, dtype=dtype)) != one:
        one = 2.0 ** min(max(math.ceil(math.log2(abs(one))), -14), 15)  # what fp16 has no fewer bits for
    return {
        module: (down, up if alpha == one else up.float() * (alpha / one), one)
        for module, (down, up, alpha) in adapter.items()
    }


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
        if name not in base or base[name].shape != tensor.shape:
            raise ValueError(f"LoRA extraction: the base has no tensor {name} of shape {list(tensor.shape)}")
        difference = tensor.load_finite().float() - base[name].load_finite().float()
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
