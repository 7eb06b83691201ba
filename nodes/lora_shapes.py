"""Whether an adapter of a LoRA file fits the weight that it is for.

ComfyUI computes the difference when it loads the model onto the device. Where the shapes do not allow that it logs a
line and leaves the weight as it is, or fails in the middle of sampling. Here the shapes alone are computed with, on
PyTorch's meta device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

# Of the adapters in comfy.weight_adapter: for people, and where the DoRA magnitude is among their weights.
LABELS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
MAGNITUDE = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}


def misfit(patch, weight: torch.Size) -> str:
    """What a patch of ``comfy.lora.load_lora`` is, for people, where it does not fit a weight of this shape; "" where
    it does, and for kinds that are not known here.
    """
    name = getattr(patch, "name", "")
    if isinstance(patch, tuple) and patch[0] in ("diff", "set"):
        fits, label, weights = patch[1][0].shape == weight, "difference", patch[1]
    elif name in SHAPES:
        fits, label, weights = _fits(name, patch.weights, weight), LABELS[name], patch.weights
    else:
        return ""
    shapes = ", ".join(_shown(t.shape) for t in weights if isinstance(t, Tensor))
    return "" if fits else f"a {label} of {shapes}"


def _shown(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _fits(name: str, weights: tuple, shape: torch.Size) -> bool:
    weight = torch.empty(shape, device="meta")
    values = [value.to("meta") if isinstance(value, Tensor) else value for value in weights]
    if len(values) + 1 != len(inspect.signature(SHAPES[name]).parameters):
        return True  # of a version of ComfyUI that is not known here
    try:
        found = SHAPES[name](weight, *values)
        is_flat = 2 in (len(found), len(shape)) and _flat(found) == _flat(shape)
        return (found == shape or is_flat) and _magnitude_fits(values[MAGNITUDE[name]], shape)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # what PyTorch raises for shapes
        return False


def _flat(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _magnitude_fits(magnitude: Tensor | None, shape: torch.Size) -> bool:
    """Whether DoRA's magnitudes, divided by the norms of the weight's rows or columns, scale a weight of this shape."""
    if magnitude is None:
        return True
    axis = 0 if magnitude.shape[0] == shape[0] else 1
    norms = [size if place == axis else 1 for place, size in enumerate(shape)]
    return torch.broadcast_shapes(magnitude.shape, norms, shape) == shape


# -- the shape of the difference that each kind makes, as ComfyUI computes it -----------------------------------------


def _lora(weight: Tensor, up: Tensor, down: Tensor, alpha, mid: Tensor | None, magnitude, reshape) -> torch.Size:
    if reshape is not None and list(reshape) != list(weight.shape):
        raise ValueError("a weight of another shape")
    if mid is not None:
        if mid.shape[0] != mid.shape[1]:
            raise ValueError("a core that is not square")
        down = torch.einsum("a b h w, b i -> a i h w", mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).shape


def _loha(weight: Tensor, w1a, w1b, alpha, w2a, w2b, t1: Tensor | None, t2: Tensor | None, magnitude) -> torch.Size:
    first, second = _rebuilt(w1a, w1b, t1), _rebuilt(w2a, w2b, t2)
    if first.shape != second.shape:  # one row or column would be spread
        raise ValueError("two products of other shapes")
    return first.shape


def _lokr(weight: Tensor, w1, w2, alpha, w1a, w1b, w2a, w2b, t2: Tensor | None, magnitude) -> torch.Size:
    w1 = _rebuilt(w1a, w1b, None) if w1 is None else w1
    w2 = _rebuilt(w2a, w2b, t2) if w2 is None else w2
    if w2.ndim == 4:
        w1 = w1[..., None, None]
    return torch.kron(w1, w2).shape


def _rebuilt(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """``a @ b``, or with a core in between, as of convolutions, ``a`` and ``b`` being [rank, width] then."""
    return torch.mm(a, b) if core is None else torch.einsum("p q h w, q i, p o -> o i h w", core, b, a)


def _glora(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, alpha, magnitude) -> torch.Size:
    older = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    newer = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if newer and not (older and a2.shape[0] == weight.shape[0] == weight.shape[1]):
        older = False
    a1, a2, b1, b2 = (factor.flatten(1) for factor in (a1, a2, b1, b2))
    if older:
        added, scaled = b2 @ b1, weight.flatten(1) @ a2 @ a1
    elif newer:
        added, scaled = b1 @ b2, torch.einsum("o i ..., i r, r j -> o j ...", weight, a1, a2).flatten(1)
    else:
        raise ValueError("factors of several ranks")
    if added.shape != scaled.shape:
        raise ValueError("two products of other shapes")
    return added.shape


def _oft(weight: Tensor, blocks: Tensor, rescale, alpha, magnitude) -> torch.Size:
    count, size, also_size = blocks.shape
    if size != also_size:
        raise ValueError("blocks that are not square")
    return weight.view(count, size, *weight.shape[1:]).flatten(0, 1).shape


def _boft(weight: Tensor, blocks: Tensor, rescale: Tensor | None, alpha, magnitude) -> torch.Size:
    factors, count, size, also_size = blocks.shape
    if alpha is None:  # ComfyUI compares it with a number
        raise ValueError("no alpha")
    if size != also_size or size % 2 or count * size != len(weight):
        raise ValueError("other blocks")
    for factor in range(factors):
        weight.unflatten(0, (-1, 2, 2**factor * size // 2))
    if rescale is not None:
        weight = weight * rescale
    return weight.shape


SHAPES: dict[str, Callable[..., torch.Size]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
}
