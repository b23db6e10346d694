"""The dtypes that operations compute in, and the tensor form that the C++ operators take."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Dtypes that the C++ operators compute in; other floating-point dtypes are converted to float32.
NATIVE_DTYPES = (torch.float32, torch.float64)
# Integer dtypes that they read; others are converted first.
NATIVE_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INTEGERS = frozenset((*NATIVE_INTEGERS, torch.uint16, torch.uint32, torch.uint64))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_integer(dtype: torch.dtype) -> bool:
    """Whether the dtype holds integers (bool does not count)."""
    return dtype in INTEGERS


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for `device`; some devices do not support it."""
    return _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


# Constant for Dynamo, which cannot trace this function before PyTorch 2.12.
@torch.compiler.assume_constant_result
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Keep matrix products in their tensors' dtype: autocast would run float32 products in half precision."""
    return torch.autocast(device.type, enabled=False) if under_autocast(device) else nullcontext()


def contiguous(tensor: Any) -> Any:
    """A tensor in contiguous memory; None stays None."""
    return None if tensor is None else tensor.contiguous()


def native_floats(tensor: Tensor) -> Tensor:
    """Floating-point numbers in the form that the C++ operators take: contiguous, float32 or float64."""
    return (tensor if tensor.dtype in NATIVE_DTYPES else tensor.float()).contiguous()


def native_integers(values: Tensor) -> Tensor:
    """Integers in the form that the C++ operators take, with any strides."""
    return values if values.dtype in NATIVE_INTEGERS else values.long()
