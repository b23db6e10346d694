"""The grid of observation tokens, and its convolution, in plain PyTorch.

    grid[n, feature, x, y] = value / scale[feature]

for the tokens (coordinate x, y; feature; value) of row n. Empty tokens (coordinate 255), tokens outside the window and
tokens with an unknown feature are dropped; of two tokens in one cell the later wins. With (c, f, v) the remaining
tokens, c being (x, y), and s the stride:

    sums[n, o, i, j] = bias[o] + sum over tokens of row n: v / scale[f] weight[o, f, x - s i, y - s j]

where a token whose cell lies outside the window of (i, j) adds nothing. The result equals `conv2d` of the grid, of
which a row of 200 tokens fills at most a fifteenth, with 25 features and an 11 x 11 window. For an upstream gradient g
of sums:

    d weight[o, f, a, b] = sum over n, i, j and tokens at (s i + a, s j + b): v / scale[f] g[n, o, i, j]
    d bias[o]            = sum over n, i, j: g[n, o, i, j]
    d scale[f]           = -sum over n, o, i, j and tokens: v / scale[f]^2 weight[o, f, x - s i, y - s j] g[n, o, i, j]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EMPTY_COORDINATE = 255


class Convolution(NamedTuple):
    """The arguments of `tokens_conv2d`."""

    tokens: Tensor  # [N, M, 3] uint8
    weight: Tensor  # [O, L, kernel_x, kernel_y]
    bias: Tensor | None  # [O]
    scale: Tensor  # [L]
    width: int
    height: int
    stride: int
    relu: bool
    x_low: bool  # the coordinate's order: x in the low four bits


class ConvolutionGradient(NamedTuple):
    """The arguments of the gradient of `tokens_conv2d`."""

    tokens: Tensor
    weight: Tensor
    scale: Tensor
    output: Tensor | None  # [N, O, X, Y]; None without ReLU
    grad_output: Tensor  # [N, O, X, Y]
    width: int
    height: int
    stride: int
    with_scale: bool
    x_low: bool


def tokens_to_grid_eager(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype, x_low: bool
) -> Tensor:
    """`tokens_to_grid` in plain PyTorch: the reference, and the path for devices without a kernel."""
    rows, cells = tokens.shape[0], num_features * width * height
    grid_shape = (rows, num_features, width, height)
    coordinate, feature, value = tokens.unbind(-1)
    high, low, feature = (coordinate >> 4).int(), (coordinate & 15).int(), feature.int()
    x, y = (low, high) if x_low else (high, low)
    valid = (coordinate != EMPTY_COORDINATE) & (x < width) & (y < height) & (feature < num_features)
    cell = torch.where(valid, (feature * width + x) * height + y, cells).long()
    if tokens.device.type == "cpu":
        return _scatter_in_order(cell, feature, value, scale, rows, cells).view(grid_shape).to(dtype)
    # Position in the high bits, value in the low bits: a cell's maximum is its latest token, in any order.
    # One extra cell takes the dropped tokens.
    position = torch.arange(1, tokens.shape[1] + 1, dtype=torch.int32, device=tokens.device)
    latest = torch.zeros(rows, cells + 1, dtype=torch.int32, device=tokens.device)
    grid = latest.scatter_reduce_(1, cell, position * 256 + value.int(), "amax")[:, :cells] & 255
    return (grid.view(grid_shape) / scale.view(1, -1, 1, 1)).to(dtype)


def _scatter_in_order(cell: Tensor, feature: Tensor, value: Tensor, scale: Tensor, rows: int, cells: int) -> Tensor:
    """Grid [rows * cells]; the CPU's one-dimensional scatter runs in order, so the later token wins."""
    scaled = value.float() / scale[feature.clamp(max=scale.numel() - 1)]
    first = torch.arange(rows).unsqueeze(1) * cells
    # One extra element takes the dropped tokens.
    place = torch.where(cell == cells, rows * cells, first + cell)
    grid = torch.zeros(rows * cells + 1, dtype=scaled.dtype)
    return grid.scatter_(0, place.reshape(-1), scaled.reshape(-1))[:-1]


def channels_last(images: Tensor) -> Tensor:
    """The images [N, O, X, Y] in channels-last memory format."""
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def convolve(make_grid: Callable[..., Tensor], given: Convolution) -> Tensor:
    """Convolution of the grid; on the CPU in channels-last memory, where it takes a third less time."""
    weight = given.weight
    grid = make_grid(given.tokens, weight.shape[1], given.width, given.height, given.scale, weight.dtype, given.x_low)
    on_cpu = grid.device.type == "cpu"
    sums = F.conv2d(channels_last(grid) if on_cpu else grid, weight, given.bias, given.stride)
    sums = F.relu(sums) if given.relu else sums
    return channels_last(sums) if on_cpu else sums


def tokens_conv2d_forward_eager(given: Convolution) -> Tensor:
    """Outputs [N, O, X, Y] in channels-last memory."""
    return channels_last(convolve(tokens_to_grid_eager, given))


def tokens_conv2d_backward_eager(given: ConvolutionGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and, if requested, scale."""
    tokens, weight, scale, output, grad_output, width, height, stride, with_scale, x_low = given
    grid = tokens_to_grid_eager(tokens, weight.shape[1], width, height, scale, weight.dtype, x_low)
    if output is not None:
        grad_output = torch.where(output <= 0, 0.0, grad_output)
    grad_grid, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad_output, grid, weight, [weight.shape[0]], [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1,
        [with_scale, True, True],
    )  # fmt: skip
    grad_scale = -(grid * grad_grid).sum((0, 2, 3)) / scale if with_scale else scale.new_empty(0)
    return grad_weight.contiguous(), grad_bias, grad_scale
