"""Plans: what an operation has worked out about a list of tensors, kept for the next call.

A plan is valid while the same tensors stay at the same addresses. An owner that checks this itself, such as an agent's
layer index, passes its plan to the operation. For other calls the plan is looked up by the tensors, and dropped as soon
as one of them is garbage-collected.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Plan:
    """A slot for one operation's checks and tables for a list; the caller guarantees that the list is unchanged.

    Example:
        >>> from metta_fastagent import ops
        >>> weights, plan = [torch.tensor([3.0])], Plan()
        >>> ops.clip_weights_(weights, [1.0], plan=plan)  # pass it again with the same tensors
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None


class _Known(NamedTuple):
    plan: Plan
    identities: list[int]
    addresses: list[int]
    # Each drops the plan when its tensor is freed, so the identity of a freed tensor is never compared.
    references: list[weakref.ref]


# By operation, first tensor and number of tensors.
_known: dict[tuple[str, int, int], _Known] = {}


def find_plan(operation: str, tensors: Sequence[Tensor]) -> Plan | None:
    """The plan kept for these tensors; None if there is none, or if one of them has moved."""
    known = _known.get((operation, id(tensors[0]), len(tensors))) if len(tensors) > 0 else None
    if (
        known is not None
        and known.identities == list(map(id, tensors))
        and known.addresses == list(map(Tensor.data_ptr, tensors))
    ):
        return known.plan
    return None


def keep_plan(operation: str, tensors: Sequence[Tensor]) -> Plan:
    """A new plan, which `find_plan` looks up by these tensors."""
    key = (operation, id(tensors[0]), len(tensors))
    references = [weakref.ref(tensor, lambda _: _known.pop(key, None)) for tensor in tensors]
    _known[key] = _Known(Plan(), list(map(id, tensors)), list(map(Tensor.data_ptr, tensors)), references)
    return _known[key].plan
