"""Convolution of the grid of observation tokens, directly from the tokens.

The result equals `conv2d` of the grid, which is sparse: with 25 features and an 11 x 11 window, a row of 200 tokens
fills at most a fifteenth of it. `reference` has the formulas. Infinite or NaN weights reach only the outputs that read
a token with them; in a dense product they reach every output. On CUDA a Triton kernel builds the grid and cuDNN
convolves it: docs/internals.md has the estimate.
"""

import torch
from torch import Tensor

from metta_fastagent.ops import autograd
from metta_fastagent.ops.dtypes import NATIVE_DTYPES, compute_dtype, contiguous, under_autocast
from metta_fastagent.ops.tokens.grid import is_x_low, require_scale, require_size, require_tokens, tokens_to_grid
from metta_fastagent.ops.tokens.reference import (
    Convolution,
    ConvolutionGradient,
    convolve,
    tokens_conv2d_backward_eager,
    tokens_conv2d_forward_eager,
)
from metta_fastagent.runtime.checks import (
    describe,
    is_floating,
    require_floating_point,
    require_same_device,
    require_tensor,
)
from metta_fastagent.runtime.dispatch import Operator


def tokens_conv2d(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    width: int,
    height: int,
    stride: int = 1,
    relu: bool = False,
    coordinates: str = "xy",
) -> Tensor:
    """`conv2d` of `tokens_to_grid(tokens, L, width, height, scale)` without padding, optionally with ReLU.

    Args:
        tokens: uint8 tensor [N, M, 3] of (coordinate byte, feature id, value).
        weight: floating-point tensor [O, L, kernel_x, kernel_y], L 1 to 256, on the tokens' device.
        bias: tensor [O] of the weight's dtype, or None.
        scale: floating-point tensor [L] by which each feature's values are divided.
        width, height: size of the window, from the kernel's size to 16.
        stride: step between outputs along both axes, at least 1.
        relu: whether to set negative outputs to 0.
        coordinates: "xy" or "yx", see `tokens_to_grid`.

    Returns:
        Tensor [N, O, (width - kernel_x) // stride + 1, (height - kernel_y) // stride + 1], in channels-last memory on
        the CPU. Its dtype is that of `weight`; under autocast and in half precision it is `conv2d`'s. Differentiable
        any number of times with respect to weight, bias and scale. The C++ operators' results do not depend on the
        number of threads.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.

    Example:
        >>> tokens = torch.tensor([[[0x21, 0, 6]]], dtype=torch.uint8)  # x 2, y 1, value 6
        >>> tokens_conv2d(tokens, torch.ones(1, 1, 3, 3), None, torch.tensor([2.0]), 3, 3)
        tensor([[[[3.]]]])
    """
    tokens = require_tokens(tokens)
    _require_weight_and_bias(weight, bias, tokens)
    require_scale(scale, weight.shape[1], tokens)
    require_size("width", width, weight.shape[2], 16)
    require_size("height", height, weight.shape[3], 16)
    require_size("stride", stride, 1, 2**31 - 1)
    if not isinstance(relu, bool):
        raise TypeError(f"relu: got {describe(relu)}, expected True or False")
    scale = scale.to(compute_dtype(weight.dtype))
    given = Convolution(tokens, weight, bias, scale, width, height, stride, relu, is_x_low(coordinates))
    plain, device = autograd.in_plain_pytorch(), weight.device
    if not plain and device.type == "cpu" and weight.dtype in NATIVE_DTYPES and not under_autocast(device):
        return _TokensConv2d.apply(*given)
    return convolve(_grid_by_scale if plain or scale.requires_grad else _grid, given)


def _require_weight_and_bias(weight: object, bias: object, tokens: Tensor) -> None:
    expected = "a floating-point tensor of shape [O, L, kernel_x, kernel_y] with L at most 256"
    shaped = lambda t: t.dim() == 4 and 0 not in t.shape and t.shape[1] <= 256  # noqa: E731
    weight = require_tensor("weight", weight, expected, is_floating, shaped)
    require_same_device("weight", weight, "tokens", tokens)
    if bias is None:
        return
    bias = require_floating_point("bias", bias)
    if bias.dtype != weight.dtype or bias.shape != weight.shape[:1]:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"bias: got {describe(bias)}, expected a {dtype} tensor of shape [{weight.shape[0]}]")
    require_same_device("bias", bias, "tokens", tokens)


def _grid(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype, x_low: bool
) -> Tensor:
    return tokens_to_grid(tokens, num_features, width, height, scale, dtype, "yx" if x_low else "xy")


def _grid_by_scale(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype, x_low: bool
) -> Tensor:
    """`_grid`, differentiable with respect to `scale`."""
    ones = torch.ones(scale.shape, dtype=scale.dtype, device=scale.device)
    grid = _grid(tokens, num_features, width, height, ones, scale.dtype, x_low)
    return (grid / scale.view(1, -1, 1, 1)).to(dtype)


class _TokensConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight, bias, scale, width, height, stride, relu, x_low):
        output = _tokens_conv2d_forward(Convolution(tokens, weight, bias, scale, width, height, stride, relu, x_low))
        ctx.save_for_backward(tokens, weight, bias, scale, output if relu else None)
        ctx.window = width, height, stride, x_low
        ctx.backend = autograd.chosen_backend()
        return output

    @staticmethod
    def backward(ctx, *grads):
        tokens, weight, bias, scale, output = ctx.saved_tensors
        (width, height, stride, x_low), wanted = ctx.window, ctx.needs_input_grad[1:4]
        if autograd.needs_graph():
            inputs = [tensor for tensor, needed in zip((weight, bias, scale), wanted, strict=True) if needed]
            given = Convolution(tokens, weight, bias, scale, width, height, stride, output is not None, x_low)
            found = iter(autograd.gradients_with_graph(lambda *_: (convolve(_grid_by_scale, given),), inputs, grads))
            gradients = [next(found) if needed else None for needed in wanted]
        else:
            given = ConvolutionGradient(
                tokens, weight, scale, output, grads[0], width, height, stride, wanted[2], x_low
            )
            gradients = autograd.run_backward(ctx.backend, _tokens_conv2d_backward, given)
            gradients = [grad if needed else None for grad, needed in zip(gradients, wanted, strict=True)]
        return None, *gradients, None, None, None, None, None


def _forward_native(given: Convolution) -> Tensor:
    if given.weight.dtype not in NATIVE_DTYPES:
        return tokens_conv2d_forward_eager(given)
    output = torch.ops.metta_fastagent_native.tokens_conv2d_forward.default(*map(contiguous, given[:4]), *given[4:])
    return output.permute(0, 3, 1, 2)


def _backward_native(given: ConvolutionGradient) -> tuple[Tensor, Tensor, Tensor]:
    if given.weight.dtype not in NATIVE_DTYPES:
        return tokens_conv2d_backward_eager(given)
    output, grad_output = (None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in given[3:5])
    return torch.ops.metta_fastagent_native.tokens_conv2d_backward.default(
        *map(contiguous, given[:3]), output, grad_output, *given[5:]
    )


def _forward_fake(given: Convolution) -> Tensor:
    weight = given.weight
    kernel, window = weight.shape[2:], (given.width, given.height)
    x, y = ((size - length) // given.stride + 1 for size, length in zip(window, kernel, strict=True))
    return weight.new_empty(given.tokens.shape[0], x, y, weight.shape[0]).permute(0, 3, 1, 2)


def _backward_fake(given: ConvolutionGradient) -> tuple[Tensor, Tensor, Tensor]:
    weight, scale = given.weight, given.scale
    grad_scale = scale.new_empty(scale.shape[0] if given.with_scale else 0)
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), grad_scale


_tokens_conv2d_forward = Operator(
    "tokens_conv2d_forward(Tensor tokens, Tensor weight, Tensor? bias, Tensor scale, int width, int height, int stride,"
    " bool relu, bool x_low) -> Tensor",
    tokens_conv2d_forward_eager,
    _forward_fake,
    native=_forward_native,
    packed=(0, Convolution),
)
_tokens_conv2d_backward = Operator(
    "tokens_conv2d_backward(Tensor tokens, Tensor weight, Tensor scale, Tensor? output, Tensor grad_output, int width,"
    " int height, int stride, bool with_scale, bool x_low) -> (Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_scale)",
    tokens_conv2d_backward_eager,
    _backward_fake,
    native=_backward_native,
    packed=(0, ConvolutionGradient),
)
