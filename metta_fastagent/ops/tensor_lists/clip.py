"""Clip many tensors in place, each to its own symmetric range.

`reference` has the formula. The tensors' autograd versions do not change in eager mode, so clipping between forward and
backward is legal, as with `tensor.data.clamp_`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metta_fastagent.ops.tensor_lists import kernels
from metta_fastagent.ops.tensor_lists.plans import Plan, find_plan, keep_plan
from metta_fastagent.ops.tensor_lists.reference import clip_weights_eager_
from metta_fastagent.runtime.checks import require_floating_point, require_list, require_number
from metta_fastagent.runtime.dispatch import Operator, needs_operator, uses_native, uses_triton
from metta_fastagent.runtime.sharded import local_shard


class _Planned(NamedTuple):
    bounds: list[float]
    tables: list[kernels.ClipTable]


def clip_weights_(tensors: Sequence[Tensor], bounds: Sequence[float], *, plan: Plan | None = None) -> None:
    """Clamp each tensor in place to [-bound, bound].

    Args:
        tensors: floating-point tensors of any shapes, dtypes and devices, leaf parameters included. For a DTensor the
            local shard is clipped.
        bounds: one float >= 0 for each tensor.
        plan: the caller's plan for these tensors, which must be those of the previous call, at the same addresses; None
            looks one up by the tensors.

    Raises:
        TypeError: an argument is not a list, a tensor does not hold floating-point numbers, or a bound is not a number;
            then nothing is clipped.
        ValueError: the lists differ in length, or a bound is negative or NaN; then nothing is clipped.

    Example:
        >>> weight, bias = torch.tensor([-3.0, 0.5]), torch.tensor([2.0])
        >>> clip_weights_([weight, bias], [1.0, 0.25])
        >>> weight, bias
        (tensor([-1.0000,  0.5000]), tensor([0.2500]))
    """
    if torch.compiler.is_compiling():
        _check(tensors, bounds)
        _clip_weights_([shard.detach() for shard in _local_shards(tensors)], list(bounds))
        return
    require_list("tensors", tensors, "a list of tensors")
    if plan is None:
        plan = find_plan("clip_weights_", tensors)
    if plan is not None and plan.value is not None and _can_run(plan.value, tensors, bounds):
        kernels.launch_clip(plan.value.tables, tensors)
        return
    plain = _are_plain(tensors, bounds)
    if plain and uses_native(tensors[0].device) and _clip_plain_(tensors, bounds):
        return
    _check(tensors, bounds)
    if len(tensors) == 0:
        return
    _clip_weights_([shard.data for shard in _local_shards(tensors)], list(bounds))
    if plain and all(map(kernels.can_clip, tensors)) and not needs_operator():
        plan = keep_plan("clip_weights_", tensors) if plan is None else plan
        plan.value = _Planned(list(bounds), kernels.clip_tables(tensors, bounds))


def _can_run(planned: _Planned, tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Whether the plan is for these bounds and dtypes, and kernels are in use."""
    return (
        planned.bounds == bounds
        and uses_triton(tensors[0].device)
        and not needs_operator()
        and all(tensors[table.example].dtype == table.dtype for table in planned.tables)
    )


def _are_plain(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Whether all tensors are a plain Tensor or Parameter and all bounds are floats."""
    return (
        len(tensors) > 0
        and {Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))
        and isinstance(bounds, Sequence)
        and {float}.issuperset(map(type, bounds))
    )


def _clip_plain_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Check and clip in the C++ operator; returns False and changes nothing if it rejects an argument."""
    # The operator writes through pointers, unseen by autograd; taking `.data` of each tensor would cost more than the
    # clip.
    with torch.no_grad():
        return torch.ops.metta_fastagent_native.clip_weights_.default(tensors, bounds)


def _check(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    require_list("tensors", tensors, "a list of tensors")
    require_list("bounds", bounds, "a list of numbers, one for each tensor")
    if len(tensors) != len(bounds):
        raise ValueError(f"bounds: got {len(bounds)} values, expected {len(tensors)}, one for each tensor")
    for position, (tensor, bound) in enumerate(zip(tensors, bounds, strict=True)):
        require_floating_point(f"tensors[{position}]", tensor)
        require_number(f"bounds[{position}]", bound, "a number >= 0", minimum=0)


def _local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local_shard(f"tensors[{position}]", tensor) for position, tensor in enumerate(tensors)]


def _clip_weights_native_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    # The operator changes nothing if it does not support one of the tensors.
    if not torch.ops.metta_fastagent_native.clip_weights_.default(tensors, bounds):
        clip_weights_eager_(tensors, bounds)


_clip_weights_ = Operator(
    "clip_weights_(Tensor(a!)[] tensors, float[] bounds) -> ()",
    clip_weights_eager_,
    lambda tensors, bounds: None,
    kernels.clip_weights_cuda_,
    _clip_weights_native_,
)
