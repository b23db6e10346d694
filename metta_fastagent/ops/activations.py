"""Element-wise tanh, on the CPU with the vector code of csrc/vec.h: on AMD PyTorch's own takes several times as long.

    d x = d tanh(x) (1 - tanh(x)^2)

Other devices and dtypes use PyTorch's. `activate_` is the last pass of a linear layer, for `products`.
"""

import torch
from torch import Tensor

from metta_fastagent.ops.autograd import in_plain_pytorch, records_graph
from metta_fastagent.ops.dtypes import NATIVE_DTYPES
from metta_fastagent.runtime.checks import require_floating_point
from metta_fastagent.runtime.dispatch import Operator, uses_native


def tanh_eager(x: Tensor) -> Tensor:
    """`tanh` in plain PyTorch, in contiguous memory."""
    return torch.tanh(x.contiguous())


def activates_in_place(x: Tensor) -> bool:
    """Whether `activate_` supports `x`."""
    return x.dtype in NATIVE_DTYPES and uses_native(x.device)


def activate_(x: Tensor, bias: Tensor | None, activation: str) -> None:
    """Overwrite contiguous `x` [..., N] with the "relu" or "tanh" of `x + bias`, using the C++ operator."""
    torch.ops.metta_fastagent_native.activate_.default(x, bias, activation == "relu")


def _tanh_native(x: Tensor) -> Tensor:
    if x.dtype not in NATIVE_DTYPES:
        return tanh_eager(x)
    return torch.ops.metta_fastagent_native.tanh.default(x.contiguous())


_tanh = Operator("tanh(Tensor x) -> Tensor", tanh_eager, lambda x: x.new_empty(x.shape), native=_tanh_native)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor):
        output = _tanh(x)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        # This is differentiable itself.
        return torch.ops.aten.tanh_backward.default(*grads, *ctx.saved_tensors)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent of each element, within 4 units in the last place; NaN stays NaN.

    Args:
        x: floating-point tensor of any shape.

    Returns:
        Tensor of the shape and dtype of `x`, differentiable any number of times.

    Raises:
        TypeError: `x` is not a floating-point tensor.

    Example:
        >>> tanh(torch.tensor([-20.0, 20.0]))
        tensor([-1.,  1.])
    """
    x = require_floating_point("x", x)
    if in_plain_pytorch() or x.device.type != "cpu" or x.dtype not in NATIVE_DTYPES:
        return torch.tanh(x)
    return _Tanh.apply(x) if records_graph(x) else _tanh(x)
