"""Observation tokens to a normalised feature grid.

A token is three bytes: coordinate (x in the high four bits, y in the low four; or the other way round), feature id,
value. It sets

    grid[n, feature, x, y] = value / scale[feature]

Empty tokens (coordinate 255), tokens outside the window and tokens with an unknown feature are dropped without touching
any cell. If two tokens set the same cell, the later one wins, on every device. Cells without a token are 0.
"""

import torch
from torch import Tensor

from metta_fastagent.ops.autograd import in_plain_pytorch
from metta_fastagent.ops.dtypes import compute_dtype
from metta_fastagent.ops.tokens.reference import tokens_to_grid_eager
from metta_fastagent.runtime.checks import describe, require_same_device, require_tensor
from metta_fastagent.runtime.dispatch import Operator


def tokens_to_grid(
    tokens: Tensor,
    num_features: int,
    width: int,
    height: int,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    coordinates: str = "xy",
) -> Tensor:
    """Scatter observation tokens into a grid and normalise each feature.

    Args:
        tokens: uint8 tensor [N, M, 3] of (coordinate byte, feature id, value).
        num_features: L, the number of feature planes, 1 to 256.
        width, height: size of the window, 1 to 16, because a coordinate has four bits.
        scale: floating-point tensor [L] on the tokens' device, by which each feature's values are divided.
        dtype: floating-point dtype of the result.
        coordinates: "xy" for x in a coordinate's high four bits, "yx" for x in the low four bits.

    Returns:
        Tensor [N, L, width, height], indexed by x, then y.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.

    Example:
        >>> tokens = torch.tensor([[[0x21, 0, 6], [255, 255, 255]]], dtype=torch.uint8)  # x 2, y 1, value 6
        >>> tokens_to_grid(tokens, 1, 3, 3, torch.tensor([2.0]))[0, 0]
        tensor([[0., 0., 0.],
                [0., 0., 0.],
                [0., 3., 0.]])
    """
    tokens = require_tokens(tokens)
    for name, size, largest in (("num_features", num_features, 256), ("width", width, 16), ("height", height, 16)):
        require_size(name, size, 1, largest)
    require_scale(scale, num_features, tokens)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point dtype")
    run = tokens_to_grid_eager if in_plain_pytorch() else _tokens_to_grid
    return run(tokens, num_features, width, height, scale, dtype, is_x_low(coordinates))


def is_x_low(coordinates: object) -> bool:
    """Whether `coordinates` is "yx" rather than "xy"."""
    if coordinates not in ("xy", "yx"):
        kind = ValueError if isinstance(coordinates, str) else TypeError
        raise kind(f"coordinates: got {describe(coordinates)}, expected 'xy' or 'yx', the high four bits first")
    return coordinates == "yx"


def require_tokens(tokens: object) -> Tensor:
    """Return `tokens` if it is a uint8 tensor [N, M, 3]."""
    expected = "a uint8 tensor of shape [N, M, 3]"
    return require_tensor(
        "tokens", tokens, expected, (torch.uint8,).__contains__, lambda t: t.dim() == 3 and t.shape[2] == 3
    )


def require_size(name: str, size: object, smallest: int, largest: int) -> None:
    """`size` must be an integer from `smallest` to `largest`; a symbolic one is accepted."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {describe(size)}, expected an integer {smallest} to {largest}")
    if not smallest <= size <= largest:
        raise ValueError(f"{name}: got {size}, expected {smallest} to {largest}")


def require_scale(scale: object, num_features: int, tokens: Tensor) -> None:
    """`scale` must be a floating-point tensor [num_features] on the device of `tokens`."""
    expected = f"a floating-point tensor of shape [{num_features}]"
    tensor = require_tensor("scale", scale, expected)
    if not tensor.is_floating_point() or tensor.shape != (num_features,):
        raise ValueError(f"scale: got {describe(tensor)}, expected {expected}")
    require_same_device("scale", tensor, "tokens", tokens)


def _tokens_to_grid_native(
    tokens: Tensor, num_features: int, width: int, height: int, scale: Tensor, dtype: torch.dtype, x_low: bool
) -> Tensor:
    grid = torch.ops.metta_fastagent_native.tokens_to_grid.default(
        tokens.contiguous(), num_features, width, height, scale.to(compute_dtype(scale.dtype)).contiguous(), x_low
    )
    return grid.to(dtype)


_tokens_to_grid = Operator(
    "tokens_to_grid(Tensor tokens, int num_features, int width, int height, Tensor scale, ScalarType dtype,"
    " bool x_low) -> Tensor",
    tokens_to_grid_eager,
    lambda tokens, num_features, width, height, scale, dtype, x_low: tokens.new_empty(
        (tokens.shape[0], num_features, width, height), dtype=dtype
    ),
    f"{__package__}.kernels:tokens_to_grid_cuda",
    _tokens_to_grid_native,
)
