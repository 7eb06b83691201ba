"""A file's tensors into a network: names and shapes are checked by headers alone, values when they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..files.reading import shown
from ..files.tensors import LazyTensor


def require_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, LazyTensor], where: str, prefix: str = ""
) -> None:
    """ValueError unless ``found`` are floating-point tensors of the very names and shapes of ``expected``; nothing is
    read.

    expected: on the meta device
    where: the file, and what in it is meant, for the message
    prefix: what the names have in front of them in the file
    """
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"{where}: expected {len(expected):,} tensors, but {len(missing):,} are missing, such as "
            f"{shown(prefix + missing[0], 120)}"
        )
    if unexpected := [name for name in found if name not in expected]:
        raise ValueError(
            f"{where}: expected {len(expected):,} tensors, but there are {len(unexpected):,} that do not belong to "
            f"such a network, such as {shown(prefix + unexpected[0], 120)}"
        )
    if others := [name for name, tensor in expected.items() if tuple(tensor.shape) != found[name].shape]:
        name = others[0]
        raise ValueError(
            f"{where}: {len(others):,} tensors have other shapes than such a network needs, such as "
            f"{shown(prefix + name, 120)}: expected {_shape(expected[name].shape)}, got {_shape(found[name].shape)}"
        )
    if others := [name for name, tensor in found.items() if not tensor.dtype.is_floating_point]:
        raise ValueError(
            f"{where}: {len(others):,} tensors are no floating-point numbers, such as {shown(prefix + others[0], 120)} "
            f"({str(found[others[0]].dtype).removeprefix('torch.')}): quantised weights are not read"
        )


def fill(network: nn.Module, tensors: Mapping[str, LazyTensor], where: str, dtype: torch.dtype) -> None:
    """Gives a network on the meta device its ``tensors`` in ``dtype``, one after another: memory holds them once.
    ValueError where they are not the network's (see ``require_tensors``) or not finite.
    """
    require_tensors(network.state_dict(), tensors, where)
    network.load_state_dict({name: tensor.load_finite().to(dtype) for name, tensor in tensors.items()}, assign=True)


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "a single number"
