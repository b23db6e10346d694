"""Weights that FSDP2 or tensor parallelism has turned into DTensors."""

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    # A DTensor can only exist after this module has been imported, and importing it takes a while.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(name: str, tensor: Any) -> Tensor:
    """The local part of a DTensor, in the same memory; other tensors are returned as they are.

    Raises:
        ValueError: the parts are summands (placement Partial), on which an element-wise operation cannot act
            separately.
    """
    if not is_sharded(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{name}: got a DTensor with placements {tensor.placements}, expected Shard or Replicate")
    return tensor._local_tensor


def full(tensor: Any) -> Tensor:
    """The full DTensor, gathered by all of its ranks; other tensors as they are. Differentiable."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
