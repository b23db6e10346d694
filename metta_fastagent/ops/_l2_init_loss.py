"""L2 distance of the weights to their initial values: L2-init regularisation.

    loss = scale * sum_i sum((param_i - initial_i)^2)                 d param_i = 2 scale (param_i - initial_i) * d loss

Source: Kumar, Marklund and Van Roy, "Maintaining Plasticity in Continual Learning via Regenerative Regularization"
(2023). Squares are summed in float32 (float64 for float64 weights) and the loss is float32 whatever the weights are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metta_fastagent._dispatch import register
from metta_fastagent.ops._checks import compute_dtype, describe, require_floating_point, require_number


def l2_init_loss_forward_eager(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    """The 0-dim float32 loss in plain PyTorch."""
    total = params[0].new_zeros((), dtype=torch.float64 if params[0].device.type == "cpu" else torch.float32)
    for param, start in zip(params, initial, strict=True):
        difference = param.to(compute_dtype(param.dtype)) - start
        total += difference.square().sum()
    return (total * scale).to(torch.float32)


def l2_init_loss_backward_eager(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    """Gradient of each weight in plain PyTorch."""
    factor = 2.0 * scale * grad
    return [
        ((param.to(compute_dtype(param.dtype)) - start) * factor).to(param.dtype)
        for param, start in zip(params, initial, strict=True)
    ]


_l2_init_loss_forward = register(
    "l2_init_loss_forward(Tensor[] params, Tensor[] initial, float scale) -> Tensor",
    l2_init_loss_forward_eager,
    lambda params, initial, scale: params[0].new_empty((), dtype=torch.float32),
)
_l2_init_loss_backward = register(
    "l2_init_loss_backward(Tensor[] params, Tensor[] initial, float scale, Tensor grad) -> Tensor[]",
    l2_init_loss_backward_eager,
    lambda params, initial, scale, grad: [torch.empty_like(param) for param in params],
)


class _L2InitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: float, count: int, *tensors: Tensor):
        ctx.scale, ctx.count = scale, count
        ctx.save_for_backward(*tensors)
        return _l2_init_loss_forward(list(tensors[:count]), list(tensors[count:]), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        params, initial = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
        return None, None, *_l2_init_loss_backward(params, initial, ctx.scale, grad), *([None] * ctx.count)


def l2_init_loss(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Scaled sum of squared differences between weights and their initial values.

    Args:
        params: floating-point tensors of any shapes, all on one device.
        initial: tensors of the same shapes on the same device, one for each of `params`; no gradient flows to them.
        scale: factor of the sum.

    Returns:
        0-dim float32 tensor, differentiable once with respect to `params`. Without tensors: 0.

    Raises:
        TypeError: a tensor does not hold floating-point numbers, or `scale` is no number.
        ValueError: the two lists differ in length, or a pair of tensors in shape or device.
    """
    if len(params) != len(initial):
        raise ValueError(f"initial: got {len(initial)} tensors, expected {len(params)}, one for each of params")
    scale = require_number("scale", scale, "a number")
    for position, (param, start) in enumerate(zip(params, initial, strict=True)):
        require_floating_point(f"params[{position}]", param)
        require_floating_point(f"initial[{position}]", start)
        if param.shape != start.shape or param.device != start.device or param.device != params[0].device:
            raise ValueError(
                f"initial[{position}]: got {describe(start)} for {describe(param)}; "
                f"expected the same shape, and every tensor on {params[0].device}"
            )
    if not params:
        return torch.zeros((), dtype=torch.float32)
    return _L2InitLoss.apply(scale, len(params), *params, *initial)
