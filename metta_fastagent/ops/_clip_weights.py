"""Clip many tensors in place, each to its own symmetric range.

    tensor_i <- clamp(tensor_i, -bound_i, bound_i)

NaN stays NaN, infinities clip. The autograd version of the tensors does not change in eager mode, so clipping between
forward and backward is legal, as it is with `tensor.data.clamp_`.
"""

# pyright: reportInvalidTypeForm=false

import math
from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from metta_fastagent._dispatch import needs_operator, register, uses_native, uses_triton
from metta_fastagent._triton import compute_type, jit, launch, tl
from metta_fastagent.ops._checks import require_floating_point, require_number
from metta_fastagent.ops._chunk_table import (
    CHUNK,
    CHUNK_WARPS,
    cached,
    chunk_rows,
    is_dense,
    keep_plan,
    keep_while_captured,
    planned,
    upload,
)
from metta_fastagent.ops._sharded import local_shard


class _Table(NamedTuple):
    chunks: Tensor  # [chunks, 2] int64: address, length
    bounds: Tensor  # [chunks] float64


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
    length = tl.load(chunks + chunk * 2 + 1)
    # The bound as the tensor's dtype rounds it, as `clamp_` does.
    bound = tl.load(bounds + chunk).to(example.dtype.element_ty).to(COMPUTE)
    offset = tl.arange(0, CHUNK)
    # Elements of 128 bits; Triton sees that `whole` is a multiple.
    vector: tl.constexpr = 128 // example.dtype.element_ty.primitive_bitwidth
    whole = length // vector * vector
    if (whole == length) & (address % 16 == 0):
        # Loads and stores of 128 bits. No store if all values are within range.
        start = tl.multiple_of(address.to(example.dtype), 16)
        inside = offset < whole
        x = tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
        outside = (x > bound) | (x < -bound)
        if tl.max(outside.to(tl.int32), 0) > 0:
            clipped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
            tl.store(start + offset, clipped.to(example.dtype.element_ty), mask=inside)
    else:
        start = address.to(example.dtype)
        inside = offset < length
        x = tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
        clipped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
        tl.store(start + offset, clipped.to(example.dtype.element_ty), mask=inside & ((x > bound) | (x < -bound)))


class _Plan(NamedTuple):
    bounds: list[float]
    launches: "list[_Launch]"


class _Launch(NamedTuple):
    example: int  # position of one of its tensors, which gives the dtype
    dtype: torch.dtype
    table: _Table
    programs: int


def _launches(tensors: Sequence[Tensor], bounds: Sequence[float]) -> list[_Launch]:
    """A launch for each device and dtype among the dense tensors."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, tensor in enumerate(tensors):
        if tensor.numel() > 0:
            groups.setdefault((tensor.device, tensor.dtype), []).append(position)
    launches = []
    for (device, dtype), members in groups.items():
        group = [tensors[position] for position in members]
        limits = tuple(_within_range(bounds[position], dtype) for position in members)
        key = ("clip", device, dtype, limits, *[t.data_ptr() for t in group], *[t.numel() for t in group])
        table = cached(key, partial(_make_table, group, limits, device), device)
        launches.append(_Launch(members[0], dtype, table, table.bounds.numel()))
    return launches


def _run(launches: Sequence[_Launch], tensors: Sequence[Tensor]) -> None:
    for example, dtype, table, programs in launches:
        keep_while_captured(table, table.bounds.device)
        launch(
            _clip_weights_kernel,
            programs,
            (tensors[example], table.chunks, table.bounds),
            num_warps=CHUNK_WARPS,
            COMPUTE=compute_type(dtype),
            CHUNK=CHUNK,
        )


def _fits_kernel(tensor: Tensor) -> bool:
    return is_dense(tensor) and uses_triton(tensor.device)


def _clip_weights_cuda_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    fitting = [_fits_kernel(tensor) for tensor in tensors]
    for tensor, bound, fits in zip(tensors, bounds, fitting, strict=True):
        if not fits:
            clip_weights_eager_([tensor], [bound])
    group = list(compress(tensors, fitting))
    _run(_launches(group, list(compress(bounds, fitting))), group)


def _clip_as_planned_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Clip by the plan of these tensors; False, and nothing changed, if there is none."""
    plan = planned("clip_weights_", tensors)
    if plan is None or plan.bounds != list(bounds) or needs_operator() or not uses_triton(tensors[0].device):
        return False
    if any(tensors[each.example].dtype != each.dtype for each in plan.launches):
        return False
    _run(plan.launches, tensors)
    return True


def _keep_plan(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """Keep a plan for plain tensors that kernels can all clip."""
    if _are_plain(tensors, bounds) and all(map(_fits_kernel, tensors)) and not needs_operator():
        keep_plan("clip_weights_", tensors, _Plan(list(bounds), _launches(tensors, bounds)))


def _make_table(tensors: Sequence[Tensor], bounds: Sequence[float], device: torch.device) -> _Table:
    chunks, limits = [], []
    for position, first, length in chunk_rows(tensors):
        address = tensors[position].data_ptr() + first * tensors[position].element_size()
        chunks.append((address, length))
        limits.append(bounds[position])
    return _Table(upload(chunks, torch.int64, device), upload(limits, torch.float64, device))


def _clip_weights_native_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    # It changes nothing if it does not support one of the tensors.
    if not torch.ops.metta_fastagent_native.clip_weights_.default(tensors, bounds):
        clip_weights_eager_(tensors, bounds)


def clip_weights_eager_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """`clip_weights_` in plain PyTorch: the reference, and the path for devices without a kernel."""
    for tensor, bound in zip(tensors, bounds, strict=True):
        bound = _within_range(bound, tensor.dtype)
        tensor.clamp_(-bound, bound)


def _within_range(bound: float, dtype: torch.dtype) -> float:
    """The bound, at most the dtype's largest number, to which infinities then clip."""
    return min(bound, torch.finfo(dtype).max) if math.isfinite(bound) else bound


_clip_weights_ = register(
    "clip_weights_(Tensor(a!)[] tensors, float[] bounds) -> ()",
    clip_weights_eager_,
    lambda tensors, bounds: None,
    _clip_weights_cuda_,
    _clip_weights_native_,
)


def clip_weights_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """Clamp each tensor in place to [-bound, bound].

    Args:
        tensors: floating-point tensors of any shapes, dtypes and devices, leaf parameters included. Of a DTensor the
            local shard is clipped.
        bounds: one float >= 0 for each tensor.

    Raises:
        TypeError: a tensor does not hold floating-point numbers, or a bound is not a number; nothing was clipped then.
        ValueError: the lists differ in length, or a bound is negative or NaN; nothing was clipped then.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _clip_as_planned_(tensors, bounds):
        return
    if (
        not compiling
        and _are_plain(tensors, bounds)
        and uses_native(tensors[0].device)
        and _clip_plain_(tensors, bounds)
    ):
        return
    _check(tensors, bounds)
    shards = [local_shard(f"tensors[{position}]", tensor) for position, tensor in enumerate(tensors)]
    if compiling:
        _clip_weights_([tensor.detach() for tensor in shards], list(bounds))
    else:
        _clip_weights_([tensor.data for tensor in shards], list(bounds))
        _keep_plan(tensors, bounds)


def _are_plain(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Whether all tensors are of PyTorch's own two classes and all bounds are floats."""
    return (
        len(tensors) > 0
        and {Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))
        and {float}.issuperset(map(type, bounds))
    )


def _clip_plain_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Check and clip in the C++ operator; False, and nothing changed, if it refuses an argument."""
    # The operator writes through pointers, unseen by autograd; `.data` of each tensor would cost more than the clip.
    with torch.no_grad():
        return torch.ops.metta_fastagent_native.clip_weights_.default(tensors, bounds)


def _check(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    if len(tensors) != len(bounds):
        raise ValueError(f"bounds: got {len(bounds)} values, expected {len(tensors)}, one for each tensor")
    for position, (tensor, bound) in enumerate(zip(tensors, bounds, strict=True)):
        require_floating_point(f"tensors[{position}]", tensor)
        require_number(f"bounds[{position}]", bound, "a number >= 0", minimum=0)
