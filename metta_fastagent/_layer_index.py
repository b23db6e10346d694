"""An index of the layers that clipping and regularisation act on, so that a call need not walk the module tree.

PyTorch has no hook for `del`, `_parameters[...] =`, `copy.deepcopy`, an assigned submodule or `parameter.data =`.
Comparing the identities of all submodules and of the layers' parameters, and the parameters' addresses, detects each of
these in a few microseconds; a walk takes tens.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metta_fastagent import ops
from metta_fastagent.runtime.sharded import full

# Names that torch.compile, activation checkpointing and FSDP insert into the paths of the modules they wrap.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
CLIPPED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
REGULARIZED_LAYERS = (*CLIPPED_LAYERS, nn.ConvTranspose2d)


class _Group(NamedTuple):
    """The regularised weights on one device."""

    weights: list[Tensor]
    initial: list[Tensor]
    plan: ops.Plan | None


class LayerIndex:
    """The layers of a module tree, and the plans for the operations on their weights.

    Args:
        root: the agent.
        is_regularized: whether L2-init regularisation applies to a module.

    Attributes:
        clipped: each weight and bias of the clipped layers, once.
        clip_plan: plan for `ops.clip_weights_` on them.
        clipped_weights: weight of each clipped layer by layer name, a tied weight once.
    """

    def __init__(self, root: nn.Module, is_regularized: Callable[[nn.Module], bool]) -> None:
        modules = named_layers(root)
        layers = [(name or "root", module) for name, module in modules if isinstance(module, CLIPPED_LAYERS)]
        self.regularized = [(name, module) for name, module in modules if is_regularized(module)]
        # By identity, so that a layer that is both clipped and regularised counts once.
        relevant = {id(module): module for _, module in (*layers, *self.regularized)}
        parameters = [module._parameters for module in relevant.values()]
        self.owners = [*(module._modules for _, module in modules), *parameters]
        self.seen = _values(self.owners)
        self.clipped_weights: dict[str, Tensor] = {}
        unique: dict[int, Tensor] = {}
        for name, layer in layers:
            # Under parametrization `layer.weight` is a temporary and the layer has no such parameter.
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if weight is not None and not is_lazy(weight) and id(weight) not in unique:
                self.clipped_weights[name] = weight
            unique |= {id(param): param for param in (weight, bias) if param is not None and not is_lazy(param)}
        self.clipped, self.clip_plan = list(unique.values()), ops.Plan()
        held = {id(param): param for owned in parameters for param in owned.values() if param is not None}
        # A lazy parameter stays the same object when it gets its shape, so the comparison would miss it.
        self.complete = not any(map(is_lazy, held.values()))
        # FSDP's tensors and fake tensors have no address.
        self.held = list(held.values()) if {Tensor, nn.Parameter}.issuperset(map(type, held.values())) else []
        self.addresses = [] if torch.compiler.is_compiling() else list(map(Tensor.data_ptr, self.held))
        self._groups: tuple[list[Tensor], list[int], list[_Group]] | None = None

    def is_current(self, root: nn.Module) -> bool:
        """Whether the tree of `root` has the same modules and parameters, at the same addresses."""
        return (
            self.complete
            and self.owners[0] is root._modules
            and _same(_values(self.owners), self.seen)
            and (torch.compiler.is_compiling() or self.addresses == list(map(Tensor.data_ptr, self.held)))
        )

    def l2_groups(self, initial: Mapping[str, Tensor]) -> list[_Group]:
        """For each device, the regularised weights that have an initial value, those values, and a plan for both."""
        starts, compiling = list(initial.values()), torch.compiler.is_compiling()
        if self._groups is not None and not compiling:
            seen, addresses, kept = self._groups
            if _same(starts, seen) and addresses == list(map(Tensor.data_ptr, starts)):
                return kept
        initial = {without_wrappers(name): start for name, start in initial.items()}
        groups: dict[torch.device, _Group] = {}
        lasting = bool(self.held) and not compiling
        held = set(map(id, self.held))
        for name, weight in named_weights(self.regularized):
            if name in initial:
                if initial[name].is_meta and not weight.is_meta:
                    raise RuntimeError(
                        f"initial_weights[{name!r}]: on the meta device, which has no values; call "
                        "update_l2_init_weight_copy() after the weights have been loaded"
                    )
                group = groups.setdefault(weight.device, _Group([], [], None))
                group.weights.append(weight)
                group.initial.append(initial[name].to(weight.device))
                # A parametrized weight is a new tensor at every call, and so is a value copied from another device.
                lasting &= id(weight) in held and group.initial[-1] is initial[name]
        found = list(groups.values())
        if lasting:
            found = [group._replace(plan=ops.Plan()) for group in found]
            self._groups = starts, list(map(Tensor.data_ptr, starts)), found
        return found


def named_layers(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the tree; wrapping a module does not change the names of the layers inside."""
    return [(without_wrappers(name), module) for name, module in root.named_modules()]


def without_wrappers(name: str) -> str:
    """`name` of a module or weight without the parts added by wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_weights(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """(name, weight) of the modules that have one; the root module's name is "root"."""
    weights = [(name or "root", getattr(module, "weight", None)) for name, module in modules]
    return [(name, weight) for name, weight in weights if isinstance(weight, Tensor) and not is_lazy(weight)]


def largest_magnitudes(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute value of each tensor, read with one transfer per device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if weight.numel() > 0:
            by_device.setdefault(weight.device, {})[name] = full(weight.detach().abs().max()).double()
    magnitudes: dict[str, float] = {}
    for maxima in by_device.values():
        magnitudes |= dict(zip(maxima, torch.stack(list(maxima.values())).tolist(), strict=True))
    return magnitudes


def _values(owners: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, owners)))


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))
