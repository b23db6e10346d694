"""Clip many tensors in place, each to its own symmetric range.

    tensor_i <- clamp(tensor_i, -bound_i, bound_i)

NaN stays NaN, infinities clip. The autograd version of the tensors does not change in eager mode, so clipping between
forward and backward is legal, as it is with `tensor.data.clamp_`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent.ops._checks import describe


def clip_weights_eager_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """`clip_weights_` in plain PyTorch: the reference, and what runs where there is no kernel."""
    for tensor, bound in zip(tensors, bounds, strict=True):
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
        ValueError: the lists differ in length, or a bound is negative or NaN.
        TypeError: a tensor does not hold floating-point numbers.
    """
    if len(tensors) != len(bounds):
        raise ValueError(f"bounds: got {len(bounds)} values, expected {len(tensors)}, one for each tensor")
    for position, (tensor, bound) in enumerate(zip(tensors, bounds, strict=True)):
        if not bound >= 0:
            raise ValueError(f"bounds[{position}]: got {bound!r}, expected a number >= 0")
        if not tensor.is_floating_point():
            raise TypeError(f"tensors[{position}]: got {describe(tensor)}, expected floating-point numbers")
    if torch.compiler.is_compiling():
        _clip_weights_([tensor.detach() for tensor in tensors], list(bounds))
    else:
        _clip_weights_([tensor.data for tensor in tensors], list(bounds))
