"""This rank's parts of sharded tensors, where there are any."""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
