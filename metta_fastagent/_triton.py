"""Triton as an optional dependency: without it, kernels are defined but never launched.

Importing this module touches no device. `works_on` tries Triton once, at the first call on a CUDA device.
"""

import functools
import importlib
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

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
        out = torch.zeros(1, dtype=torch.int32, device=device)
        with device_guard(out):
            _first_use_kernel[(1,)](out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


_addresses_of, _dtype_of = Tensor.data_ptr, operator.attrgetter("dtype")
# (kernel, compiled kernel) by the kernel's id, device, options, dtypes and constants. None: Triton's interface differs.
_kept: dict[tuple, tuple[Any, Any]] | None = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[float] = (),
    num_warps: int = 4,
    num_stages: int | None = None,
    **constants: Any,
) -> None:
    """Launch `kernel(*tensors, *numbers, **constants)` with this many programs on the tensors' device.

    `kernel[grid]` finds the compiled kernel for its arguments at every call, which takes several times as long as the
    launch itself. Here it is looked up by what it depends on if all tensors start on 16-byte addresses. `constants` are
    in the order of the kernel's parameters.
    """
    launch_with(constants, kernel, programs, tensors, numbers, num_warps, num_stages)


def launch_with(
    constants: dict[str, Any],
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    num_warps: int = 4,
    num_stages: int | None = None,
) -> None:
    """`launch` with the constants in a dict."""
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch_with(constants, kernel, programs, tensors, numbers, num_warps, num_stages)
    values = constants.values()
    addresses = list(map(_addresses_of, tensors))
    aligned = functools.reduce(operator.or_, addresses) % 16 == 0
    # By identity: a kernel's own hash is that of its source.
    key = (id(kernel), device, num_warps, num_stages, *map(_dtype_of, tensors), *values)
    kept = _kept.get(key) if _kept and aligned and max(numbers, default=0) < 2**31 else None
    if kept is None or not _launch_kept(kept[1], programs, [*addresses, *numbers, *values]):
        options = {"num_warps": num_warps} if num_stages is None else {"num_warps": num_warps, "num_stages": num_stages}
        compiled = kernel[(programs,)](*tensors, *numbers, **constants, **options)
        if aligned and _kept is not None and hasattr(compiled, "packed_metadata"):
            _kept[key] = kernel, compiled


def _launch_kept(compiled: Any, programs: int, args: list) -> bool:
    """Launch; False, and nothing launched, if a profiler watches launches or if Triton's interface is another one."""
    global _kept
    try:
        if triton.knobs.runtime.launch_enter_hook.calls:
            return False
        active = triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        # Launch metadata and two hooks are for profilers. Addresses stand for tensors, of pinned memory too.
        compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
    except (TypeError, AttributeError):
        _kept = None
        return False
    return True


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's CUDA device the current one, on which Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def compute_type(dtype: torch.dtype) -> Any:
    """Triton's type for the arithmetic on `dtype`: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
