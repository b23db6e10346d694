"""Convolution of the grid of observation tokens, straight from the tokens.

With (c, f, v) the tokens that `tokens_to_grid` would write, c being (x, y), and s the stride:

    sums[n, o, i, j] = bias[o] + sum over tokens of row n: v / scale[f] weight[o, f, x - s i, y - s j]

where a token whose cell lies outside of the window of (i, j) adds nothing. It equals `conv2d` of the grid, of which a
row of 200 tokens fills a fifteenth at most with 25 features in a window of 11 x 11. For an upstream gradient g of sums:

    d weight[o, f, a, b] = sum over n, i, j and tokens at (s i + a, s j + b): v / scale[f] g[n, o, i, j]
    d bias[o]            = sum over n, i, j: g[n, o, i, j]
    d scale[f]           = -sum over n, o, i, j and tokens: v / scale[f]^2 weight[o, f, x - s i, y - s j] g[n, o, i, j]

Weights that are infinite or NaN reach only the outputs that read a token with them; in a dense product, every output.

On CUDA the grid is made, by its Triton kernel, and convolved by cuDNN: docs/internals.md has the estimate.
"""

# pyright: reportInvalidTypeForm=false

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from metta_fastagent._dispatch import register
from metta_fastagent.ops._autograd import (
    chosen_backend,
    gradients_with_graph,
    in_plain_pytorch,
    needs_graph,
    run_backward,
)
from metta_fastagent.ops._checks import (
    NATIVE_DTYPES,
    compute_dtype,
    contiguous,
    describe,
    require_floating_point,
    require_same_device,
    under_autocast,
)
from metta_fastagent.ops._tokens_to_grid import (
    require_scale,
    require_size,
    require_tokens,
    tokens_to_grid,
    tokens_to_grid_eager,
)


def _channels_last(images: Tensor) -> Tensor:
    """The images [N, O, X, Y] in channels-last memory."""
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def tokens_conv2d_forward_eager(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    width: int,
    height: int,
    stride: int,
    relu: bool,
) -> Tensor:
    """`tokens_conv2d` in plain PyTorch: the grid, its convolution, and ReLU if asked for."""
    return _channels_last(_convolve(tokens_to_grid_eager, tokens, weight, bias, scale, width, height, stride, relu))


def _grid_by_scale(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`tokens_to_grid`, differentiable with respect to `scale`."""
    ones = torch.ones(scale.shape, dtype=scale.dtype, device=scale.device)
    return (tokens_to_grid(tokens, num_features, width, height, ones, scale.dtype) / scale.view(1, -1, 1, 1)).to(dtype)


def _convolve(
    make_grid: Callable[..., Tensor],
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    width: int,
    height: int,
    stride: int,
    relu: bool,
) -> Tensor:
    """Convolution of the grid, in channels-last memory on the CPU, where it takes a third less time."""
    grid = make_grid(tokens, weight.shape[1], width, height, scale, weight.dtype)
    on_cpu = grid.device.type == "cpu"
    sums = F.conv2d(_channels_last(grid) if on_cpu else grid, weight, bias, stride)
    sums = F.relu(sums) if relu else sums
    return _channels_last(sums) if on_cpu else sums


def tokens_conv2d_backward_eager(
    tokens: Tensor,
    weight: Tensor,
    scale: Tensor,
    output: Tensor | None,
    grad_output: Tensor,
    width: int,
    height: int,
    stride: int,
    with_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and, if asked for, scale in plain PyTorch; `output` is None without ReLU."""
    grid = tokens_to_grid_eager(tokens, weight.shape[1], width, height, scale, weight.dtype)
    if output is not None:
        grad_output = torch.where(output <= 0, 0.0, grad_output)
    grad_grid, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad_output, grid, weight, [weight.shape[0]], [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1,
        [with_scale, True, True],
    )  # fmt: skip
    grad_scale = -(grid * grad_grid).sum((0, 2, 3)) / scale if with_scale else scale.new_empty(0)
    return grad_weight.contiguous(), grad_bias, grad_scale


def _tokens_conv2d_forward_native(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    width: int,
    height: int,
    stride: int,
    relu: bool,
) -> Tensor:
    if weight.dtype not in NATIVE_DTYPES:
        return tokens_conv2d_forward_eager(tokens, weight, bias, scale, width, height, stride, relu)
    output = torch.ops.metta_fastagent_native.tokens_conv2d_forward.default(
        tokens.contiguous(), weight.contiguous(), contiguous(bias), scale.contiguous(), width, height, stride, relu
    )
    return output.permute(0, 3, 1, 2)


def _tokens_conv2d_backward_native(
    tokens: Tensor,
    weight: Tensor,
    scale: Tensor,
    output: Tensor | None,
    grad_output: Tensor,
    width: int,
    height: int,
    stride: int,
    with_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype not in NATIVE_DTYPES:
        return tokens_conv2d_backward_eager(
            tokens, weight, scale, output, grad_output, width, height, stride, with_scale
        )
    return torch.ops.metta_fastagent_native.tokens_conv2d_backward.default(
        tokens.contiguous(),
        weight.contiguous(),
        scale.contiguous(),
        None if output is None else output.permute(0, 2, 3, 1).contiguous(),
        grad_output.permute(0, 2, 3, 1).contiguous(),
        width,
        height,
        stride,
        with_scale,
    )


def _forward_fake(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    width: int,
    height: int,
    stride: int,
    relu: bool,
) -> Tensor:
    x, y = ((size - kernel) // stride + 1 for size, kernel in zip((width, height), weight.shape[2:], strict=True))
    return weight.new_empty(tokens.shape[0], x, y, weight.shape[0]).permute(0, 3, 1, 2)


def _backward_fake(
    tokens: Tensor,
    weight: Tensor,
    scale: Tensor,
    output: Tensor | None,
    grad_output: Tensor,
    width: int,
    height: int,
    stride: int,
    with_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale = scale.new_empty(scale.shape[0] if with_scale else 0)
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), grad_scale


_tokens_conv2d_forward = register(
    "tokens_conv2d_forward(Tensor tokens, Tensor weight, Tensor? bias, Tensor scale, int width, int height, int stride,"
    " bool relu) -> Tensor",
    tokens_conv2d_forward_eager,
    _forward_fake,
    None,
    _tokens_conv2d_forward_native,
)
_tokens_conv2d_backward = register(
    "tokens_conv2d_backward(Tensor tokens, Tensor weight, Tensor scale, Tensor? output, Tensor grad_output, int width,"
    " int height, int stride, bool with_scale) -> (Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)",
    tokens_conv2d_backward_eager,
    _backward_fake,
    None,
    _tokens_conv2d_backward_native,
)


class _TokensConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight, bias, scale, width, height, stride, relu):
        output = _tokens_conv2d_forward(tokens, weight, bias, scale, width, height, stride, relu)
        ctx.save_for_backward(tokens, weight, bias, scale, output if relu else None)
        ctx.sizes = width, height, stride
        ctx.backend = chosen_backend()
        return output

    @staticmethod
    def backward(ctx, *grads):
        tokens, weight, bias, scale, output = ctx.saved_tensors
        width, height, stride = ctx.sizes
        wanted = ctx.needs_input_grad[1:4]
        if needs_graph():
            inputs = [tensor for tensor, needed in zip((weight, bias, scale), wanted, strict=True) if needed]
            arguments = (tokens, weight, bias, scale, width, height, stride, output is not None)
            found = iter(gradients_with_graph(lambda *_: (_convolve(_grid_by_scale, *arguments),), inputs, grads))
            gradients = [next(found) if needed else None for needed in wanted]
        else:
            gradients = run_backward(
                ctx.backend, _tokens_conv2d_backward, tokens, weight, scale, output, *grads, *ctx.sizes, wanted[2]
            )
            gradients = [grad if needed else None for grad, needed in zip(gradients, wanted, strict=True)]
        return None, *gradients, None, None, None, None


def tokens_conv2d(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    width: int,
    height: int,
    stride: int = 1,
    relu: bool = False,
) -> Tensor:
    """`conv2d` of `tokens_to_grid(tokens, L, width, height, scale)` without padding, and ReLU if asked for.

    Args:
        tokens: uint8 tensor [N, M, 3] of (coordinate byte, feature id, value).
        weight: floating-point tensor [O, L, kernel_x, kernel_y], L 1 to 256, on the tokens' device.
        bias: tensor [O] of the weight's dtype, or None.
        scale: floating-point tensor [L] that divides the values of each feature.
        width, height: size of the window, from the kernel's size to 16.
        stride: step between two outputs along both axes, at least 1.
        relu: whether negative outputs become 0.

    Returns:
        Tensor [N, O, (width - kernel_x) // stride + 1, (height - kernel_y) // stride + 1], in channels-last memory on
        the CPU. Its dtype is that of `weight`; under autocast and in half precision it is `conv2d`'s. Differentiable
        any number of times with respect to weight, bias and scale. The C++ operators' results do not depend on the
        number of threads.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
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
    arguments = (tokens, weight, bias, scale, width, height, stride, relu)
    plain, device = in_plain_pytorch(), weight.device
    if not plain and device.type == "cpu" and weight.dtype in NATIVE_DTYPES and not under_autocast(device):
        return _TokensConv2d.apply(*arguments)
    return _convolve(_grid_by_scale if plain or scale.requires_grad else tokens_to_grid, *arguments)


def _require_weight_and_bias(weight: object, bias: object, tokens: Tensor) -> None:
    expected = "a floating-point tensor of shape [O, L, kernel_x, kernel_y] with L at most 256"
    weight = require_floating_point("weight", weight)
    if weight.dim() != 4 or 0 in weight.shape or weight.shape[1] > 256:
        raise ValueError(f"weight: got {describe(weight)}, expected {expected}")
    require_same_device("weight", weight, "tokens", tokens)
    if bias is None:
        return
    bias = require_floating_point("bias", bias)
    if bias.dtype != weight.dtype or bias.shape != weight.shape[:1]:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"bias: got {describe(bias)}, expected a {dtype} tensor of shape [{weight.shape[0]}]")
    require_same_device("bias", bias, "tokens", tokens)
