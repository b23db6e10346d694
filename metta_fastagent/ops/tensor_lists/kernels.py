"""Triton kernels that process many tensors in one launch, their tables, and their launchers.

A tensor is cut into chunks of CHUNK elements; program i of a launch handles chunk i, whose row in a device table holds
addresses and length. A table is built once per set of tensors, uploaded asynchronously from pinned memory, and rebuilt
only if an address, a length or a constant changes. It cannot be built while a CUDA graph is captured, and a table that
a captured graph uses is never freed, because the graph reads it at every replay.
"""

# pyright: reportInvalidTypeForm=false

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent.ops.tensor_lists import reference
from metta_fastagent.runtime.dispatch import uses_triton
from metta_fastagent.runtime.launch import Constants, launch_with
from metta_fastagent.runtime.scratch import capturing, scratch_for
from metta_fastagent.runtime.triton import cdiv, compute_type, jit, next_power_of_2, tl

# 16 elements for each thread of eight warps: 16 KiB of float32, loaded before the first use. Each small tensor gets its
# own program, and 100 million parameters make 25 thousand programs, enough for any GPU.
CHUNK = 4096
CHUNK_WARPS = 8
# Number of cached tensor sets: enough for the agents, targets and optimizers of one process, with room to spare.
CAPACITY = 64
# Partial sums that the L2 loss's last program adds at a time.
PARTIALS_BLOCK = 1024
# Every tensor's part of the flat gradient starts on a 16-byte address.
FLAT_ALIGNMENT = 16

_tables: dict[tuple, Any] = {}
_captured: list[Any] = []


class ClipTable(NamedTuple):
    """One launch of the clip kernel: the tensors of one device and dtype."""

    example: int  # position of one of these tensors in the list
    dtype: torch.dtype
    chunks: Tensor  # [chunks, 2] int64: address, length
    bounds: Tensor  # [chunks] float64


class L2Table(NamedTuple):
    """Weights and their initial values, all of one dtype."""

    dtype: torch.dtype
    chunks: Tensor  # [chunks, 4] int64: address of the weight, of its initial value, length, place in the flat gradient
    layouts: tuple[list[torch.Size], list[tuple[int, ...]], list[int]]  # shapes, strides, places in the flat gradient
    flat_length: int


@jit
def _clip_weights_kernel(
    example,  # any tensor of the dtype that the addresses point to
    chunks,  # [chunks, 2] int64: address, length
    bounds,  # [chunks] float64
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    address = tl.load(chunks + chunk * 2)
    length = tl.load(chunks + chunk * 2 + 1).to(tl.int32)
    # The bound rounded to the tensor's dtype, as in `clamp_`.
    bound = tl.load(bounds + chunk).to(example.dtype.element_ty).to(COMPUTE)
    # 128-bit loads and stores from the chunk's first aligned address on; Triton sees that `whole` is a multiple.
    bits: tl.constexpr = example.dtype.element_ty.primitive_bitwidth
    vector: tl.constexpr = 128 // bits
    head = ((-address & 15) // (bits // 8)).to(tl.int32)
    whole = tl.maximum(length - head, 0) // vector * vector
    offset = tl.arange(0, CHUNK)
    start = tl.multiple_of(address.to(example.dtype) + head, 16)
    x = tl.load(start + offset, mask=offset < whole, other=0.0).to(COMPUTE)
    # The few elements before and after, in one block.
    edge = tl.arange(0, 2 * vector)
    ends = address.to(example.dtype) + tl.where(edge < head, edge, edge + whole)
    at_end = edge < length - whole
    y = tl.load(ends, mask=at_end, other=0.0).to(COMPUTE)
    # No store if all values are within range.
    if tl.max(tl.abs(x), 0) > bound:
        clipped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
        tl.store(start + offset, clipped.to(example.dtype.element_ty), mask=offset < whole)
    clipped = tl.where(y > bound, bound, -bound)
    tl.store(ends, clipped.to(example.dtype.element_ty), mask=at_end & ((y > bound) | (y < -bound)))


@jit
def _differences(example, chunks, chunk, length, COMPUTE: tl.constexpr, CHUNK: tl.constexpr):
    """Weights minus initial values of a chunk: [CHUNK] up to element `whole`, one vector from there on; and `whole`."""
    param = tl.load(chunks + chunk * 4)
    initial = tl.load(chunks + chunk * 4 + 1)
    vector: tl.constexpr = 128 // example.dtype.element_ty.primitive_bitwidth
    aligned = (param | initial) % 16 == 0
    # Elements loaded as vectors if aligned; otherwise all, loaded singly. Triton sees that `whole` is a multiple.
    whole = tl.where(aligned, length // vector, tl.cdiv(length, vector)) * vector
    offset = tl.arange(0, CHUNK)
    if aligned:
        inside = offset < whole
        weights = tl.load(tl.multiple_of(param.to(example.dtype), 16) + offset, mask=inside, other=0.0).to(COMPUTE)
        start = tl.multiple_of(initial.to(example.dtype), 16)
        differences = weights - tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
    else:
        inside = offset < length
        weights = tl.load(param.to(example.dtype) + offset, mask=inside, other=0.0).to(COMPUTE)
        differences = weights - tl.load(initial.to(example.dtype) + offset, mask=inside, other=0.0).to(COMPUTE)
    behind = whole + tl.arange(0, vector)
    weights = tl.load(param.to(example.dtype) + behind, mask=behind < length, other=0.0).to(COMPUTE)
    start = tl.load(initial.to(example.dtype) + behind, mask=behind < length, other=0.0).to(COMPUTE)
    return differences, weights - start, whole


@jit(varying=("num_chunks",))
def _l2_init_loss_fwd_kernel(
    example,  # any tensor of the dtype that the addresses point to
    chunks,  # [chunks, 4] int64
    partials,  # [chunks] float64
    counter,  # [1] int32
    loss,  # [] float32
    num_chunks,
    scale,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIALS_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    length = tl.load(chunks + chunk * 4 + 2).to(tl.int32)
    difference, behind, _ = _differences(example, chunks, chunk, length, COMPUTE, CHUNK)
    tl.store(partials + chunk, (tl.sum(difference * difference, 0) + tl.sum(behind * behind, 0)).to(tl.float64))
    # The last program to arrive adds the partial sums in order, so the result does not depend on which program that is.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_chunks - 1:
        total = tl.zeros([PARTIALS_BLOCK], tl.float64)
        for first in range(0, num_chunks, PARTIALS_BLOCK):
            position = first + tl.arange(0, PARTIALS_BLOCK)
            total += tl.load(partials + position, mask=position < num_chunks, other=0.0, cache_modifier=".cg")
        tl.store(loss, (tl.sum(total, 0) * scale).to(tl.float32))
        tl.store(counter, 0)


@jit
def _l2_init_loss_bwd_kernel(
    flat,  # [flat_length] gradient of the weights' dtype
    chunks,  # [chunks, 4] int64
    grad,  # [] float32
    scale,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    length = tl.load(chunks + chunk * 4 + 2).to(tl.int32)
    place = tl.load(chunks + chunk * 4 + 3)
    factor = (2.0 * scale * tl.load(grad)).to(COMPUTE)
    difference, behind, whole = _differences(flat, chunks, chunk, length, COMPUTE, CHUNK)
    # FLAT_ALIGNMENT in elements; the gap before the next tensor's part may be written.
    vector: tl.constexpr = 128 // flat.dtype.element_ty.primitive_bitwidth
    start, offset, last = flat + tl.multiple_of(place, vector), tl.arange(0, CHUNK), tl.arange(0, vector)
    tl.store(start + offset, (difference * factor).to(flat.dtype.element_ty), mask=offset < whole)
    tl.store(start + whole + last, (behind * factor).to(flat.dtype.element_ty), mask=whole + last < length)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _keep_while_captured(table: Any, device: torch.device) -> None:
    """Never free the table if a CUDA graph is being captured with it."""
    if capturing(device) and not any(table is kept for kept in _captured):
        _captured.append(table)


def _cached(key: tuple, make: Callable[[], Any], device: torch.device) -> Any:
    """The result of `make` for `key`, cached until CAPACITY other keys have been used since."""
    entry = _tables.pop(key, None)
    if entry is None:
        if capturing(device):
            raise RuntimeError(
                "metta_fastagent: parameter list changed during CUDA graph capture; run the step once before the "
                "capture, with the same tensors"
            )
        entry = make()
    _tables[key] = entry
    if len(_tables) > CAPACITY:
        del _tables[next(iter(_tables))]
    return entry


def _chunk_rows(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """(tensor, first element, length) of each chunk, in order."""
    return [
        (position, first, min(CHUNK, tensor.numel() - first))
        for position, tensor in enumerate(tensors)
        for first in range(0, tensor.numel(), CHUNK)
    ]


def _upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor on the device, copied asynchronously from pinned memory."""
    # A table made in inference mode could not be used outside it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def can_clip(tensor: Tensor) -> bool:
    """Whether the clip kernel supports the tensor."""
    return _is_dense(tensor) and uses_triton(tensor.device)


def clip_tables(tensors: Sequence[Tensor], bounds: Sequence[float]) -> list[ClipTable]:
    """A table for each device and dtype among the tensors."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, tensor in enumerate(tensors):
        if tensor.numel() > 0:
            groups.setdefault((tensor.device, tensor.dtype), []).append(position)
    tables = []
    for (device, dtype), members in groups.items():
        group = [tensors[position] for position in members]
        limits = [reference.within_range(bounds[position], dtype) for position in members]
        key = ("clip", device, dtype, *limits, *[t.data_ptr() for t in group], *[t.numel() for t in group])
        chunks, chunk_bounds = _cached(key, functools.partial(_make_clip_table, group, limits), device)
        tables.append(ClipTable(members[0], dtype, chunks, chunk_bounds))
    return tables


def _make_clip_table(tensors: Sequence[Tensor], bounds: Sequence[float]) -> tuple[Tensor, Tensor]:
    chunks, limits, device = [], [], tensors[0].device
    for position, first, length in _chunk_rows(tensors):
        chunks.append((tensors[position].data_ptr() + first * tensors[position].element_size(), length))
        limits.append(bounds[position])
    return _upload(chunks, torch.int64, device), _upload(limits, torch.float64, device)


@functools.cache
def _constants(dtype: torch.dtype, chunk: int, warps: int, **own: int) -> Constants:
    return Constants({"COMPUTE": compute_type(dtype), "CHUNK": chunk, **own}, warps)


def launch_clip(tables: Sequence[ClipTable], tensors: Sequence[Tensor]) -> None:
    """Clip the tensors in one launch per table."""
    for table in tables:
        _keep_while_captured(table.chunks, table.chunks.device)
        _keep_while_captured(table.bounds, table.bounds.device)
        launch_with(
            _constants(table.dtype, CHUNK, CHUNK_WARPS),
            _clip_weights_kernel,
            table.bounds.numel(),
            (tensors[table.example], table.chunks, table.bounds),
            (),
        )


def clip_weights_cuda_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """Same as `clip_weights_eager_`, in one launch per device and dtype."""
    fitting = [can_clip(tensor) for tensor in tensors]
    for tensor, bound, fits in zip(tensors, bounds, fitting, strict=True):
        if not fits:
            reference.clip_weights_eager_([tensor], [bound])
    group = [tensor for tensor, fits in zip(tensors, fitting, strict=True) if fits]
    launch_clip(clip_tables(group, [bound for bound, fits in zip(bounds, fitting, strict=True) if fits]), group)


def laid_out_alike(params: Sequence[Tensor], initial: Sequence[Tensor]) -> bool:
    """Whether all tensors have one dtype, and each pair the same layout without gaps."""
    return all(
        param.dtype == start.dtype == params[0].dtype and param.stride() == start.stride() and _is_dense(param)
        for param, start in zip(params, initial, strict=True)
    )


def l2_table(params: Sequence[Tensor], initial: Sequence[Tensor]) -> L2Table | None:
    """The table of the weights; None if the kernel does not support them."""
    if not laid_out_alike(params, initial) or not any(param.numel() for param in params):
        return None
    device, dtype = params[0].device, params[0].dtype
    key = ("l2", device, dtype, *[t.data_ptr() for t in (*params, *initial)], *[t.numel() for t in params])
    return _cached(key, functools.partial(_make_l2_table, params, initial), device)


def _make_l2_table(params: Sequence[Tensor], initial: Sequence[Tensor]) -> L2Table:
    size, device, dtype = params[0].element_size(), params[0].device, params[0].dtype
    step = FLAT_ALIGNMENT // size
    places, end = [], 0
    for param in params:
        places.append(end)
        end += cdiv(param.numel(), step) * step
    chunks = [
        (params[i].data_ptr() + first * size, initial[i].data_ptr() + first * size, length, places[i] + first)
        for i, first, length in _chunk_rows(params)
    ]
    layouts = [param.shape for param in params], [param.stride() for param in params], places
    return L2Table(dtype, _upload(chunks, torch.int64, device), layouts, end)


def launch_l2_forward(table: L2Table, example: Tensor, scale: float) -> Tensor:
    """The loss; `example` is any tensor with the device and dtype of the weights."""
    device, num_chunks = example.device, len(table.chunks)
    _keep_while_captured(table.chunks, device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    block = min(PARTIALS_BLOCK, next_power_of_2(num_chunks))
    launch_with(
        _constants(table.dtype, CHUNK, CHUNK_WARPS, PARTIALS_BLOCK=block),
        _l2_init_loss_fwd_kernel,
        num_chunks,
        (example, table.chunks, *scratch_for(num_chunks, device), loss),
        (num_chunks, scale),
    )
    return loss


def launch_l2_backward(table: L2Table, scale: float, grad: Tensor) -> list[Tensor]:
    """Gradient of each weight, views of one flat tensor."""
    _keep_while_captured(table.chunks, grad.device)
    flat = torch.empty(table.flat_length, dtype=table.dtype, device=grad.device)
    launch_with(
        _constants(table.dtype, CHUNK, CHUNK_WARPS),
        _l2_init_loss_bwd_kernel,
        len(table.chunks),
        (flat, table.chunks, grad),
        (scale,),
    )
    return list(map(flat.as_strided, *table.layouts))


def l2_init_loss_forward_cuda(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    """Same as `l2_init_loss_forward_eager`, in one launch."""
    table = l2_table(params, initial)
    if table is None:
        return reference.l2_init_loss_forward_eager(params, initial, scale)
    return launch_l2_forward(table, params[0], scale)


def l2_init_loss_backward_cuda(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    """Same as `l2_init_loss_backward_eager`, in one launch and one copy."""
    table = l2_table(params, initial)
    if table is None:
        return reference.l2_init_loss_backward_eager(params, initial, scale, grad)
    # An operator's outputs must not share memory.
    grads = [torch.empty_like(param) for param in params]
    copies = launch_l2_backward(table, scale, grad)
    torch._foreach_copy_(grads, copies)  # pyright: ignore[reportPrivateImportUsage]
    return grads
