"""Clip many tensors in place, each to its own symmetric range.

    tensor_i <- clamp(tensor_i, -bound_i, bound_i)

NaN stays NaN, infinities clip. The autograd version of the tensors does not change in eager mode, so clipping between
forward and backward is legal, as it is with `tensor.data.clamp_`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent.ops._checks import require_floating_point, require_number


def clip_weights_eager_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """`clip_weights_` in plain PyTorch: the reference, and what runs where there is no kernel."""
    for tensor, bound in zip(tensors, bounds, strict=True):
        # A bound beyond the dtype's range clips infinities to its largest number.
        bound = min(bound, torch.finfo(tensor.dtype).max) if math.isfinite(bound) else bound
        tensor.clamp_(-bound, bound)


_clip_weights_ = register(
    "clip_weights_(Tensor(a!)[] tensors, float[] bounds) -> ()",
    clip_weights_eager_,
    lambda tensors, bounds: None,
)


def clip_weights_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """Clamp each tensor in place to [-bound, bound].

    Args:
        tensors: floating-point tensors of any shapes, dtypes and devices, leaf parameters included.
        bounds: one float >= 0 for each tensor.

    Raises:
        TypeError: a tensor does not hold floating-point numbers, or a bound is no number; nothing was clipped then.
        ValueError: the lists differ in length, or a bound is negative or NaN; nothing was clipped then.
    """
    if len(tensors) != len(bounds):
        raise ValueError(f"bounds: got {len(bounds)} values, expected {len(tensors)}, one for each tensor")
    for position, (tensor, bound) in enumerate(zip(tensors, bounds, strict=True)):
        require_floating_point(f"tensors[{position}]", tensor)
        if not require_number(f"bounds[{position}]", bound, "a number >= 0") >= 0:
            raise ValueError(f"bounds[{position}]: got {bound!r}, expected a number >= 0")
    if torch.compiler.is_compiling():
        _clip_weights_([tensor.detach() for tensor in tensors], list(bounds))
    else:
        _clip_weights_([tensor.data for tensor in tensors], list(bounds))
