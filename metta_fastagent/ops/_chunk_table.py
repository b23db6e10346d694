"""Tables of chunks on the device, through which one launch reaches many tensors, and plans that find them again.

A tensor is cut into chunks of CHUNK elements; program i of a launch handles chunk i, whose row of the table holds the
addresses and the length. A table is built once for a set of tensors, uploaded asynchronously from pinned memory, and
rebuilt only if an address, a length or a constant changes. It cannot be built while a CUDA graph is captured, and one
that a captured graph uses is never freed, because the graph reads it at every replay.

A plan holds what an operation has worked out about a list of tensors: its checks and its tables. It is valid while the
same tensors lie at the same addresses, and goes with the first of them.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# 16 elements for each thread of eight warps: 16 KiB of float32, loaded before the first use. Small tensors get programs
# of their own, and 100 million parameters make 25 thousand programs, enough for any GPU.
CHUNK = 4096
CHUNK_WARPS = 8
# Sets of tensors that are kept: agents, targets and optimizers of one process, with room to spare.
CAPACITY = 64

_tables: dict[tuple, Any] = {}
_captured: list[Any] = []


class _Plan(NamedTuple):
    value: Any
    identities: list[int]
    addresses: list[int]
    # Each drops the plan when its tensor dies, so the identity of a dead tensor is never compared.
    references: list[weakref.ref]


# By operation, first tensor and number of tensors.
_plans: dict[tuple[str, int, int], _Plan] = {}


def planned(operation: str, tensors: Sequence[Tensor]) -> Any:
    """The plan kept for these tensors, or None if there is none or if one of them has moved."""
    plan = _plans.get((operation, id(tensors[0]), len(tensors))) if len(tensors) > 0 else None
    if (
        plan is not None
        and plan.identities == list(map(id, tensors))
        and plan.addresses == list(map(Tensor.data_ptr, tensors))
    ):
        return plan.value
    return None


def keep_plan(operation: str, tensors: Sequence[Tensor], value: Any) -> None:
    """Keep `value` for `planned`."""
    key = (operation, id(tensors[0]), len(tensors))
    references = [weakref.ref(tensor, lambda _: _plans.pop(key, None)) for tensor in tensors]
    _plans[key] = _Plan(value, list(map(id, tensors)), list(map(Tensor.data_ptr, tensors)), references)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_while_captured(table: Any, device: torch.device) -> None:
    """Never free the table if a CUDA graph is being captured with it."""
    if capturing(device) and not any(table is kept for kept in _captured):
        _captured.append(table)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def cached(key: tuple, make: Callable[[], Any], device: torch.device) -> Any:
    """The result of `make` for `key`, kept until CAPACITY other keys have been used since.

    Raises:
        RuntimeError: there is nothing for `key` yet and a CUDA graph is being captured.
    """
    entry = _tables.pop(key, None)
    if entry is None:
        if capturing(device):
            raise RuntimeError(
                "metta_fastagent: the tensors of an operation on a list have changed while a CUDA graph is captured; "
                "run the step once before the capture, with the same tensors"
            )
        entry = make()
    _tables[key] = entry
    if len(_tables) > CAPACITY:
        del _tables[next(iter(_tables))]
    return entry


def chunk_rows(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """(tensor, first element, length) of each chunk, in order."""
    return [
        (position, first, min(CHUNK, tensor.numel() - first))
        for position, tensor in enumerate(tensors)
        for first in range(0, tensor.numel(), CHUNK)
    ]


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor on the device, copied asynchronously from pinned memory."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
