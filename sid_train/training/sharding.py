"""Whole networks sharded over a run's processes with PyTorch's fully_shard (FSDP2): each holds its part of every
parameter, its gradient and its optimizer states, and gathers a block's weights while the block runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..models.denoiser import Denoiser


def shard(network: Denoiser, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> None:
    """Leaves on this process's device its part of every parameter of ``network``, as DTensors in their own dtype.

    Blocks compute in ``compute_dtype``, if it is given; gradients are averaged in fp32.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        # Inputs are not cast: a Denoiser casts what its network gets itself, and its own arithmetic stays in fp32.
        "mp_policy": MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        # Of the root, too: outside of a pass parameters() are then always the parts, which optimizer, average and
        # requires_grad_() rely on.
        "reshard_after_forward": True,
    }
    for block in network.blocks():
        fully_shard(block, **options)
    fully_shard(network, **options)
