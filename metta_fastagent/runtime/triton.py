"""Triton as an optional dependency: without it, kernels are defined but never launched.

Importing this module touches no device. `works_on` tries Triton once, at the first call on a CUDA device.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

# Any: type checkers cannot follow Triton's language.
triton: Any = None
tl: Any = SimpleNamespace(constexpr=int)
import_error: Exception | None = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except Exception as error:
    # Missing or broken: `works_on` warns with the reason at the first use on a CUDA device.
    import_error = error


def jit(function: Callable | None = None, *, varying: Sequence[str] = ()) -> Any:
    """`triton.jit`; without Triton the function itself, which is then never launched.

    `varying` names the integers, such as a batch size, for whose values nothing is compiled again.
    """
    if function is None:
        return functools.partial(jit, varying=varying)
    return function if triton is None else triton.jit(function, do_not_specialize=list(varying))


INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

_works: dict[torch.device, bool] = {}


@jit
def _first_use_kernel(out):
    tl.store(out, 1)


def works_on(device: torch.device) -> bool:
    """Whether Triton compiles and launches kernels on `device`: tried once, with a warning if not."""
    if device not in _works:
        reason = _failure(device)
        _works[device] = reason is None
        if reason is not None:
            warnings.warn(
                f"metta_fastagent: Triton does not work on {device} ({reason}); operations run in eager PyTorch there. "
                "Install the Triton that this PyTorch names, or set METTA_FASTAGENT_BACKEND=eager to silence this.",
                RuntimeWarning,
                stacklevel=4,
            )
    return _works[device]


def _failure(device: torch.device) -> str | None:
    if import_error is not None:
        return f"{type(import_error).__name__}: {import_error}"
    try:
        with torch.cuda.device(device):
            _first_use_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def compute_type(dtype: torch.dtype) -> Any:
    """Triton's type for the arithmetic on `dtype`: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
