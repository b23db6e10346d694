"""Which implementation runs an operation, and the library that the operations register in.

Every operation is a `torch.library` operator, so PyTorch's dispatcher picks the implementation by device: the eager
twin is registered for every device, a Triton kernel for CUDA, and a C++ operator, once built, for the CPU. This module
holds the switch that overrides the choice (`METTA_FASTAGENT_BACKEND`, `use_backend`) and the functions that report it
(`backend`, `explain`).
"""

import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metta_fastagent import _native, _triton
from metta_fastagent._machine import describe_cpu

BACKENDS = ("auto", "triton", "native", "eager")
ENVIRONMENT_VARIABLE = "METTA_FASTAGENT_BACKEND"

LIBRARY = torch.library.Library("metta_fastagent", "FRAGMENT")


class _Kernels(NamedTuple):
    triton: bool
    native: bool


_operations: dict[str, _Kernels] = {}


def _checked_backend(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return str(name)


_default = _checked_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


class _Request(threading.local):
    """The backend that `use_backend` chose in this thread."""

    backend = _default


_request = _Request()


def requested() -> str:
    """The backend requested in this thread: by `use_backend`, else by METTA_FASTAGENT_BACKEND."""
    return _request.backend


def register(
    schema: str,
    eager: Callable,
    fake: Callable,
    cuda: Callable | None = None,
    native: Callable | None = None,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> Callable:
    """Define the operator `metta_fastagent::<schema>` and return a function that calls it.

    The function bypasses PyTorch's dispatcher if nothing there has to see the call: an operator written in Python costs
    as much as eight written in C++.

    Args:
        schema: name, arguments and results.
        eager: implementation on every device without a kernel.
        fake: shapes and dtypes of the results, for tracing.
        cuda: launcher of the Triton kernel; without a working Triton, `eager` runs instead.
        native: caller of the C++ operator for the CPU; if that is not built, `eager` runs instead.
        tags: the operator's tags.
    """
    LIBRARY.define(schema, tags=tags)
    name = schema[: schema.index("(")]
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    if cuda is not None:
        LIBRARY.impl(name, _choosing(cuda, native, eager), "CUDA")
    if native is not None or (cuda is not None and _triton.INTERPRETED):
        LIBRARY.impl(name, _choosing_on_cpu(cuda, native, eager), "CPU")
    torch.library.register_fake(f"metta_fastagent::{name}", fake, lib=LIBRARY)
    _operations[name] = _Kernels(cuda is not None, native is not None)
    overload = getattr(torch.ops.metta_fastagent, name).default
    run = _choosing(cuda, native, eager)

    def call(*args: Any) -> Any:
        return overload(*args) if needs_operator(*args) else run(*args)

    return call


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype})


def needs_operator(*args: Any) -> bool:
    """Whether a compiler, a tracer, a mode, a transform or a tensor subclass has to see these arguments' operator."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN_TYPES.issuperset(map(type, args))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _choosing(cuda: Callable | None, native: Callable | None, eager: Callable) -> Callable:
    cuda, native = cuda or eager, native or eager

    def run(*args: Any) -> Any:
        # As `backend`, with fewer calls.
        device = _device_of(args)
        if uses_triton(device):
            return cuda(*args)
        return native(*args) if uses_native(device) else eager(*args)

    return run


def _choosing_on_cpu(cuda: Callable | None, native: Callable | None, eager: Callable) -> Callable:
    """As `_choosing`, with a shortcut for the automatic choice: calls on the CPU are short."""
    choose = _choosing(cuda, native, eager)

    def run(*args: Any) -> Any:
        if _request.backend == "auto" and native is not None and _native.loaded():
            return native(*args)
        return choose(*args)

    return run


def _device_of(args: tuple) -> torch.device:
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return first.device


def uses_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on `device` now.

    Raises:
        RuntimeError: backend "triton" was requested and does not work on this CUDA device.
    """
    if _request.backend == "eager":
        return False
    if device.type == "cpu":
        return _triton.INTERPRETED and _request.backend == "triton"
    if device.type != "cuda":
        return False
    works = _triton.works_on(device)
    if not works and _request.backend == "triton":
        raise RuntimeError(
            f"backend 'triton' was requested and does not work on {device}; see metta_fastagent.explain()"
        )
    return works


def uses_native(device: torch.device) -> bool:
    """Whether the C++ operators run on `device` now.

    Raises:
        RuntimeError: backend "native" was requested on the CPU and the operators are not built or cannot be loaded.
    """
    if device.type != "cpu" or _request.backend not in ("auto", "native"):
        return False
    available = _native.load()
    if not available and _request.backend == "native":
        raise RuntimeError(f"backend 'native' was requested and does not work: {_native.reason()}")
    return available


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation for the calls inside the `with` block, in this thread.

    A backward runs on the implementation of its forward.

    Args:
        name: "auto" (the fastest one on each device), "triton" (an error on a CUDA device if it does not work),
            "native" (the C++ operators: an error on the CPU if they are not built; as "auto" elsewhere) or "eager"
            (plain PyTorch on every device).

    Raises:
        ValueError: `name` is not a backend.
    """
    previous, _request.backend = _request.backend, _checked_backend(name, "name")
    try:
        yield
    finally:
        _request.backend = previous


def backend(device: torch.device | str) -> str:
    """The name of the implementation that runs on `device`: "triton", "native" or "eager".

    Raises:
        RuntimeError: the requested backend does not work on this device.
    """
    device = torch.device(device)
    if uses_triton(device):
        return "triton"
    return "native" if uses_native(device) else "eager"


def explain() -> str:
    """A few lines of text: which implementation runs on each device and why, with versions."""
    triton = _triton.triton
    version = f"Triton {triton.__version__}" if triton is not None else f"no Triton ({_triton.import_error})"
    lines = [
        f"metta_fastagent on PyTorch {torch.__version__}, {version}, Python {platform.python_version()}",
        f"requested: {requested()} (by {ENVIRONMENT_VARIABLE} or use_backend; one of {', '.join(BACKENDS)})",
        f"processor: {describe_cpu()}",
        f"cpu: {_explain_cpu()}",
        *_explain_cuda(),
        "other devices: eager, because there are no kernels for them",
        "operations: " + ", ".join(sorted(_operations)),
        "without a Triton kernel: " + (", ".join(sorted(n for n, k in _operations.items() if not k.triton)) or "none"),
        "without a C++ operator: " + (", ".join(sorted(n for n, k in _operations.items() if not k.native)) or "none"),
    ]
    return "\n".join(lines)


def _explain_cpu() -> str:
    if uses_triton(torch.device("cpu")):
        return "triton in its interpreter, because TRITON_INTERPRET=1 and backend triton are set; slow, for tests"
    if requested() in ("eager", "triton"):
        return f"eager, because backend {requested()} was requested"
    if _native.load():
        return f"native, {_native.reason()}"
    if requested() == "native":
        return f"an error, because backend native was requested and does not work: {_native.reason()}"
    return f"eager; native operators {_native.reason()}"


def _explain_cuda() -> list[str]:
    if not torch.cuda.is_available():
        reason = "no device" if torch.backends.cuda.is_built() else "PyTorch was built without it"
        return [f"cuda: not available here, {reason}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if requested() == "eager":
            chosen = "eager, as requested"
        elif _triton.works_on(device):
            chosen = "triton"
        else:
            chosen = "eager, because Triton does not work here"
        lines.append(f"{device} ({torch.cuda.get_device_name(index)}): {chosen}")
    return lines
