"""An index of the modules that weight clipping and regularisation act on, so that a call need not walk the tree.

PyTorch has no hook for `del`, `_parameters[...] =`, `copy.deepcopy` or an assigned submodule. Comparing the identities
of all submodules and of the layers' parameters detects each of them, in a few microseconds instead of the tens that a
walk takes.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CLIPPED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Transient:
    """A cache slot that copies and pickles of its owner do not carry over."""

    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __copy__(self) -> "Transient":
        return Transient()

    def __deepcopy__(self, memo: dict) -> "Transient":
        return Transient()

    def __reduce__(self) -> tuple:
        return Transient, ()


class _ClippedTensors:
    """Parameters of the clipped layers: all of them once (`tensors`), and the weights by layer name (`weights`)."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        self.owners = [layer._parameters for _, layer in layers]
        self.seen = _values(self.owners)
        self.weights: dict[str, Tensor] = {}
        unique: dict[int, Tensor] = {}
        for name, layer in layers:
            # Under parametrization `layer.weight` is a temporary and the layer has no such parameter.
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if weight is not None and not is_lazy(weight) and id(weight) not in unique:
                self.weights[name] = weight
            unique |= {id(param): param for param in (weight, bias) if param is not None and not is_lazy(param)}
        self.tensors = list(unique.values())
        # A lazy parameter stays the same object when it gets its shape, so the comparison would miss it.
        self.complete = not any(is_lazy(param) for param in self.seen)

    def is_current(self) -> bool:
        return self.complete and _same(_values(self.owners), self.seen)


class LayerIndex:
    """The modules of a tree and their clipped parameters; `is_current` checks whether the tree is unchanged."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.named_modules())
        self.owners = [module._modules for _, module in self.modules]
        self.seen = _values(self.owners)
        self._clipped: _ClippedTensors | None = None

    def is_current(self, root: nn.Module) -> bool:
        return self.owners[0] is root._modules and _same(_values(self.owners), self.seen)

    def clipped(self) -> _ClippedTensors:
        if self._clipped is None or not self._clipped.is_current():
            layers = [(name or "root", layer) for name, layer in self.modules if isinstance(layer, CLIPPED_LAYERS)]
            self._clipped = _ClippedTensors(layers)
        return self._clipped


def _values(owners: list[dict[str, Any]]) -> list[Any]:
    return [value for owner in owners for value in owner.values()]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))
