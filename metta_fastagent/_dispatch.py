"""Which implementation runs an operation, and the library that the operations register in.

Every operation is a `torch.library` operator, so PyTorch's dispatcher picks the implementation by device: the eager
twin is registered for every device, and a kernel, where there is one, for its own. This module holds the one switch
that overrides that choice (`METTA_FASTAGENT_BACKEND`, `use_backend`) and the functions that say what was chosen
(`backend`, `explain`).
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metta_fastagent import _triton

BACKENDS = ("auto", "triton", "eager")
ENVIRONMENT_VARIABLE = "METTA_FASTAGENT_BACKEND"

LIBRARY = torch.library.Library("metta_fastagent", "FRAGMENT")

# Operation name to whether it has a Triton kernel.
_operations: dict[str, bool] = {}


def _checked_backend(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return str(name)


# A plain global, not a ContextVar: reading a ContextVar breaks a graph that torch.compile traces.
_requested = _checked_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def register(
    schema: str,
    eager: Callable,
    fake: Callable,
    cuda: Callable | None = None,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> Callable:
    """Define the operator `metta_fastagent::<schema>` and return its overload.

    Args:
        schema: name, arguments and results.
        eager: implementation on every device without a kernel.
        fake: shapes and dtypes of the results, for tracing.
        cuda: launcher of the Triton kernel; `eager` runs in its place where Triton does not work.
        tags: the operator's tags.
    """
    LIBRARY.define(schema, tags=tags)
    name = schema[: schema.index("(")]
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    if cuda is not None:
        LIBRARY.impl(name, _choosing(cuda, eager), "CUDA")
        if _triton.INTERPRETED:
            LIBRARY.impl(name, _choosing(cuda, eager), "CPU")
    torch.library.register_fake(f"metta_fastagent::{name}", fake, lib=LIBRARY)
    _operations[name] = cuda is not None
    return getattr(torch.ops.metta_fastagent, name).default


def _choosing(kernel: Callable, eager: Callable) -> Callable:
    def run(*args: Any) -> Any:
        return kernel(*args) if uses_triton(_device_of(args)) else eager(*args)

    return run


def _device_of(args: tuple) -> torch.device:
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return first.device


def uses_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on `device` now.

    Raises:
        RuntimeError: backend "triton" was asked for and does not work on this CUDA device.
    """
    if _requested == "eager":
        return False
    if device.type == "cpu":
        return _triton.INTERPRETED and _requested == "triton"
    if device.type != "cuda":
        return False
    works = _triton.works_on(device)
    if not works and _requested == "triton":
        raise RuntimeError(
            f"backend 'triton' was asked for and does not work on {device}; see metta_fastagent.explain()"
        )
    return works


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation for the calls inside the `with` block.

    Args:
        name: "auto" (the fastest one that the device has), "triton" (an error on a CUDA device where it does not work)
            or "eager" (plain PyTorch everywhere).

    Raises:
        ValueError: `name` is not a backend.
    """
    global _requested
    previous, _requested = _requested, _checked_backend(name, "name")
    try:
        yield
    finally:
        _requested = previous


def backend(device: torch.device | str) -> str:
    """The name of the implementation that runs on `device`: "triton" or "eager"."""
    return "triton" if uses_triton(torch.device(device)) else "eager"


def explain() -> str:
    """What runs on each kind of device and why, with versions: a text of a few lines."""
    triton = _triton.triton
    version = f"Triton {triton.__version__}" if triton is not None else f"no Triton ({_triton.import_error})"
    lines = [
        f"metta_fastagent on PyTorch {torch.__version__}, {version}, Python {platform.python_version()}",
        f"requested: {_requested} (by {ENVIRONMENT_VARIABLE} or use_backend; one of {', '.join(BACKENDS)})",
        f"cpu: {_explain_cpu()}",
        *_explain_cuda(),
        "other devices: eager, as there are no kernels for them",
        "operations: " + ", ".join(sorted(_operations)),
        "without a Triton kernel: " + (", ".join(sorted(n for n, k in _operations.items() if not k)) or "none"),
    ]
    return "\n".join(lines)


def _explain_cpu() -> str:
    if uses_triton(torch.device("cpu")):
        return "triton in its interpreter, as TRITON_INTERPRET=1 and backend triton were asked for; slow, for tests"
    return "eager"


def _explain_cuda() -> list[str]:
    if not torch.cuda.is_available():
        reason = "no device" if torch.backends.cuda.is_built() else "PyTorch was built without it"
        return [f"cuda: not available here, {reason}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if _requested == "eager":
            chosen = "eager, as asked for"
        elif _triton.works_on(device):
            chosen = "triton"
        else:
            chosen = "eager, as Triton does not work here"
        lines.append(f"{device} ({torch.cuda.get_device_name(index)}): {chosen}")
    return lines
