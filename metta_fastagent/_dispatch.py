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

import torch

BACKENDS = ("auto", "eager")
ENVIRONMENT_VARIABLE = "METTA_FASTAGENT_BACKEND"

LIBRARY = torch.library.Library("metta_fastagent", "FRAGMENT")

_operations: list[str] = []


def _checked_backend(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return str(name)


# A plain global, not a ContextVar: reading a ContextVar breaks a graph that torch.compile traces.
_requested = _checked_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def register(
    schema: str, eager: Callable, fake: Callable, tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,)
) -> Callable:
    """Define `metta_fastagent::<schema>` with `eager` on every device and `fake` for tracing; return its overload."""
    LIBRARY.define(schema, tags=tags)
    name = schema[: schema.index("(")]
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"metta_fastagent::{name}", fake, lib=LIBRARY)
    _operations.append(name)
    return getattr(torch.ops.metta_fastagent, name).default


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation for the calls inside the `with` block.

    Args:
        name: "auto" (the fastest one that the device has) or "eager" (plain PyTorch everywhere).

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
    """The name of the implementation that runs on `device`."""
    torch.device(device)
    return "eager"


def explain() -> str:
    """What runs on each kind of device and why, with versions: a text of a few lines."""
    lines = [
        f"metta_fastagent on PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"requested: {_requested} ({ENVIRONMENT_VARIABLE} or use_backend)",
    ]
    for device in ("cpu", "cuda", "other"):
        lines.append(f"{device:>5}: eager for every operation (no compiled kernels in this version)")
    lines.append("operations: " + ", ".join(sorted(_operations)))
    return "\n".join(lines)
