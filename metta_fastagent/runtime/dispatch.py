"""Which implementation runs an operation, and the library in which the operations register.

Every operation is a `torch.library` operator with up to three implementations: plain PyTorch for every device (the
eager twin), Triton kernels for CUDA, and C++ for the CPU once it is built. `Operator` calls the right one.
`use_backend` and METTA_FASTAGENT_BACKEND override the choice, and `backend` returns it.
"""

import functools
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metta_fastagent.runtime import native, triton

BACKENDS = ("auto", "triton", "native", "eager")
ENVIRONMENT_VARIABLE = "METTA_FASTAGENT_BACKEND"

LIBRARY = torch.library.Library("metta_fastagent", "FRAGMENT")
# By name, for `explain`.
OPERATORS: dict[str, "Operator"] = {}

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype})


class Operator:
    """One operation: calling it runs the implementation for its first tensor's device.

    A call bypasses PyTorch's dispatcher if nothing there must see it: an operator written in Python costs as much as
    eight written in C++. Values that belong together are one NamedTuple for the implementations; its fields are
    separate arguments in the schema.

    Args:
        schema: name, arguments and results of the `torch.library` operator; no argument has a default.
        eager: implementation for every device without a kernel.
        fake: shapes and dtypes of the results, for tracing.
        cuda: launcher of the Triton kernel, or "package.module:function", which is imported when it is first needed;
            without a working Triton, `eager` runs instead.
        native: caller of the C++ operator for the CPU; if that is not built, `eager` runs instead.
        packed: position and type of an argument that is a NamedTuple; None instead stands for its defaults.
        tags: the operator's tags.
    """

    def __init__(
        self,
        schema: str,
        eager: Callable,
        fake: Callable,
        cuda: Callable | str | None = None,
        native: Callable | None = None,
        packed: tuple[int, Any] | None = None,
        tags: Sequence[torch.Tag] = (torch.Tag.pt2_compliant_tag,),
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.packed, self.eager, self._launcher, self.native = packed, eager, cuda, native
        LIBRARY.define(schema, tags=tags)
        LIBRARY.impl(self.name, lambda *args: self._run(*self._pack(args)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LIBRARY.ns}::{self.name}", lambda *args: fake(*self._pack(args)), lib=LIBRARY)
        self.overload = getattr(getattr(torch.ops, LIBRARY.ns), self.name).default
        OPERATORS[self.name] = self

    @functools.cached_property
    def cuda(self) -> Callable | None:
        """The launcher of the Triton kernel, if there is one."""
        return pkgutil.resolve_name(self._launcher) if isinstance(self._launcher, str) else self._launcher

    def __call__(self, *args: Any) -> Any:
        """Run the operation on arguments in the order that the implementations take."""
        if needs_operator(*args):
            return self.overload(*self._spell_out(args))
        return self.implementation(_device_of(args[0]))(*args)

    def implementation(self, device: torch.device) -> Callable:
        """The implementation that runs on `device` now."""
        if uses_triton(device):
            return self.cuda or self.eager
        return self.native if self.native is not None and uses_native(device) else self.eager

    def _run(self, *args: Any) -> Any:
        return self.implementation(_device_of(args[0]))(*args)

    def _spell_out(self, args: tuple) -> tuple:
        if self.packed is None:
            return args
        at, kind = self.packed
        return (*args[:at], *(kind() if args[at] is None else args[at]), *args[at + 1 :])

    def _pack(self, args: tuple) -> tuple:
        if self.packed is None:
            return args
        at, kind = self.packed
        end = at + len(kind._fields)
        return (*args[:at], kind(*args[at:end]), *args[end:])


def _device_of(first: Any) -> torch.device:
    """Device of an operation's first argument: a tensor, or a list or NamedTuple that starts with one."""
    if isinstance(first, Tensor):
        return first.device
    return first[0].device if len(first) > 0 else torch.device("cpu")


def needs_operator(*args: Any) -> bool:
    """Whether a compiler, tracer, mode, transform or tensor subclass must see the operator for these arguments."""
    return (
        torch.compiler.is_compiling()
        or not _are_plain(args)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether all arguments, and the elements of lists and NamedTuples among them, are of well-known types."""
    if _PLAIN_TYPES.issuperset(map(type, args)):
        return True
    # A loop, because all() of a generator costs three times as much.
    for arg in args:
        if isinstance(arg, (list, tuple)):
            if not _PLAIN_TYPES.issuperset(map(type, arg)):
                return False
        elif type(arg) not in _PLAIN_TYPES:
            return False
    return True


def _checked_backend(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return str(name)


class _Request(threading.local):
    """The backend that `use_backend` chose in this thread."""

    backend = _checked_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


_request = _Request()


def requested() -> str:
    """The backend requested in this thread by `use_backend`, otherwise by METTA_FASTAGENT_BACKEND."""
    return _request.backend


def uses_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on `device` now.

    Raises:
        RuntimeError: backend "triton" was requested and does not work on this CUDA device.
    """
    if _request.backend == "eager":
        return False
    if device.type == "cpu":
        return triton.INTERPRETED and _request.backend == "triton"
    if device.type != "cuda":
        return False
    works = triton.works_on(device)
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
    available = native.load()
    if not available and _request.backend == "native":
        raise RuntimeError(f"backend 'native' was requested and does not work: {native.reason()}")
    return available


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation for calls inside the `with` block, in this thread.

    A backward pass uses the implementation of its forward.

    Args:
        name: "auto" (the fastest one on each device), "triton" (an error on a CUDA device if it does not work),
            "native" (the C++ operators: an error on the CPU if they are not built; like "auto" elsewhere) or "eager"
            (plain PyTorch on every device).

    Raises:
        ValueError: `name` is not a backend.

    Example:
        >>> with use_backend("eager"):
        ...     backend("cpu")
        'eager'
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

    Example:
        >>> backend("cpu") in ("native", "eager")
        True
    """
    device = torch.device(device)
    if uses_triton(device):
        return "triton"
    return "native" if uses_native(device) else "eager"
