"""Argument checks: each error names the argument, the value received and what was expected."""

import inspect
import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

# Maximum length of a value in an error message, in characters.
LONGEST_TEXT = 200


class BadRowError(ValueError):
    """A row's action is out of range or its logits do not form a distribution; the message names the row.

    Example:
        >>> from metta_fastagent import ops
        >>> try:
        ...     ops.sample_actions(torch.full((1, 2), -torch.inf))
        ... except BadRowError as error:
        ...     print("a row without a possible action")
        a row without a possible action
    """


def describe(value: object) -> str:
    """A short description of `value` for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor of shape {list(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype} and shape {list(value.shape)}, not a tensor"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + '...'} ({type(value).__name__})"


def is_floating(dtype: torch.dtype) -> bool:
    """Whether the dtype holds floating-point numbers."""
    return dtype.is_floating_point


def require_tensor(
    name: str,
    value: object,
    expected: str,
    holds: Callable[[torch.dtype], bool] | None = None,
    shaped: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Return `value`; TypeError unless it is a tensor whose dtype passes `holds`, ValueError unless it is `shaped`."""
    if not isinstance(value, Tensor) or (holds is not None and not holds(value.dtype)):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    if shaped is not None and not shaped(value):
        raise ValueError(f"{name}: got {describe(value)}, expected {expected}")
    return value


def require_floating_point(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor of floating-point numbers; otherwise raise a TypeError."""
    return require_tensor(name, value, "a floating-point tensor", is_floating)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or two if the first ends in a colon; the type if there is no message."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def printable(text: str) -> str:
    """`text` with escapes for characters that standard output cannot encode, such as undecodable bytes in a path."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_number(value: object) -> TypeGuard[Real]:
    """Whether `value` is a real number; bool does not count."""
    # The usual type comes first: a check against an abstract class costs as much as a PyTorch call.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def is_whole(value: object) -> TypeGuard[Integral]:
    """Whether `value` is an integer; bool does not count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_number(name: str, value: object, expected: str, minimum: float | None = None) -> float:
    """`value` as a float; TypeError if it is not a real number, ValueError if it is NaN or below `minimum`."""
    if not is_number(value):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    if minimum is not None and not float(value) >= minimum:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return float(value)


def require_integer(name: str, value: object, expected: str, minimum: int | None = None) -> int:
    """`value` as an int; TypeError if it is not an integer, ValueError if it is below `minimum`."""
    if not is_whole(value):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    if minimum is not None and int(value) < minimum:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return int(value)


def require_list(name: str, value: object, expected: str) -> None:
    """Raise a TypeError if `value` is not a list, a tuple or the like."""
    if isinstance(value, (list, tuple)):
        return
    if isinstance(value, (Tensor, str, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")


def require_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors must be on the same device."""
    if value.device != other.device:
        raise ValueError(f"{name}: on {value.device}, expected the device of {other_name} ({other.device})")


def require_call(name: str, function: Callable, expected: str, *args: object, **options: object) -> None:
    """Raise a TypeError if `function(*args, **options)` does not fit the function's signature."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        # A builtin may have no signature.
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        called = getattr(function, "__qualname__", type(function).__name__)
        raise TypeError(f"{name}: got {called}{signature} ({error}), expected {expected}") from None


def own_computation(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why `module` may compute something other than a plain `kind` with its parameters; empty if it does not."""
    if type(module) is not kind:
        return f"it is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if nn.modules.module._has_any_global_hook():
        return "all modules have hooks"
    return ""
