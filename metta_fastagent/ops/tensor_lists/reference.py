"""Weight clipping and the L2-init loss in plain PyTorch: the reference, and the path for devices without a kernel.

    tensor_i <- clamp(tensor_i, -bound_i, bound_i)
    loss = scale * sum_i sum((param_i - initial_i)^2)                 d param_i = 2 scale (param_i - initial_i) * d loss

Squares are summed in float32 (float64 on the CPU and for float64 weights); the loss is float32 for every dtype.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metta_fastagent.ops.dtypes import compute_dtype


def clip_weights_eager_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    """Clamp each tensor in place; NaN stays NaN, infinities are clipped."""
    for tensor, bound in zip(tensors, bounds, strict=True):
        bound = within_range(bound, tensor.dtype)
        tensor.clamp_(-bound, bound)


def within_range(bound: float, dtype: torch.dtype) -> float:
    """The bound, at most the dtype's largest number, so that infinities are clipped to a finite number."""
    return min(bound, torch.finfo(dtype).max) if math.isfinite(bound) else bound


def l2_init_loss_forward_eager(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    """The 0-dim float32 loss, differentiable any number of times."""
    total = params[0].new_zeros((), dtype=torch.float64 if params[0].device.type == "cpu" else torch.float32)
    for param, start in zip(params, initial, strict=True):
        difference = param.to(compute_dtype(param.dtype)) - start
        total = total + difference.square().sum()
    return (total * scale).to(torch.float32)


def l2_init_loss_backward_eager(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    """Gradient of each weight."""
    factor = 2.0 * scale * grad
    return [
        ((param.to(compute_dtype(param.dtype)) - start) * factor).to(param.dtype)
        for param, start in zip(params, initial, strict=True)
    ]
