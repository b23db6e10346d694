"""Argument checks that the operations share: each error names the argument, what came and what was expected."""

from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

# Dtypes that the C++ operators compute in; other floating-point dtypes are converted to float32.
NATIVE_DTYPES = (torch.float32, torch.float64)
# Integer dtypes that they read; others are converted first.
_NATIVE_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_INTEGERS = frozenset((*_NATIVE_INTEGERS, torch.uint16, torch.uint32, torch.uint64))


class BadRowError(ValueError):
    """A row's action is out of range or its logits are no distribution; the message names the row."""


def describe(value: object) -> str:
    """A short description of `value` for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor of shape {list(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{value!r} ({type(value).__name__})"


def require_tensor(name: str, value: object, expected: str) -> Tensor:
    """`value` if it is a tensor, else a TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    return value


def require_floating_point(name: str, value: object) -> Tensor:
    """`value` if it is a tensor of floating-point numbers, else a TypeError."""
    tensor = require_tensor(name, value, "a floating-point tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {describe(tensor)}, expected a floating-point tensor")
    return tensor


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or two if the first ends in a colon; the type if there is no message."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def is_number(value: object) -> TypeGuard[Real]:
    """Whether `value` is a real number; bool does not count."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[Integral]:
    """Whether `value` is an integer; bool does not count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_number(name: str, value: object, expected: str, minimum: float | None = None) -> float:
    """`value` as a float; a TypeError if it is not a real number, a ValueError if it is NaN or below `minimum`."""
    if not is_number(value):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    if minimum is not None and not float(value) >= minimum:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return float(value)


def require_integer(name: str, value: object, expected: str, minimum: int | None = None) -> int:
    """`value` as an int; a TypeError if it is not an integer, a ValueError if it is below `minimum`."""
    if not is_whole(value):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    if minimum is not None and int(value) < minimum:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return int(value)


def is_integer(dtype: torch.dtype) -> bool:
    """Whether `dtype` holds integers (bool does not count)."""
    return dtype in _INTEGERS


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors must be on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: on {value.device}, expected the device of {other_name} ({other.device})")


def require_logits(logits: object) -> Tensor:
    """`logits` if it is a floating-point tensor [N, A] with at least one action."""
    expected = "a floating-point tensor of shape [N, A] with A >= 1"
    logits = require_tensor("logits", logits, expected)
    if not logits.is_floating_point():
        raise TypeError(f"logits: got {describe(logits)}, expected {expected}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: got {describe(logits)}, expected {expected}")
    return logits


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic runs in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for `device`; some devices do not support it."""
    return _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


# A constant for Dynamo, which cannot trace this function before PyTorch 2.12.
@torch.compiler.assume_constant_result
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor in contiguous memory; None stays None."""
    return None if tensor is None else tensor.contiguous()


def native_logits(logits: Tensor) -> Tensor:
    """Logits as the C++ operators take them: contiguous, float32 or float64."""
    return (logits if logits.dtype in NATIVE_DTYPES else logits.float()).contiguous()


def native_integers(values: Tensor) -> Tensor:
    """Integers as the C++ operators take them, of any strides."""
    return values if values.dtype in _NATIVE_INTEGERS else values.long()
