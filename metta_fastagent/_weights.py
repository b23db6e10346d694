"""AgentWeights: the part of the mixin that clips, regularises and measures an agent's weights."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metta_fastagent import ops
from metta_fastagent._agent_state import AgentState
from metta_fastagent._config import MixinConfig
from metta_fastagent._layer_index import REGULARIZED_LAYERS, LayerIndex, named_layers, named_weights
from metta_fastagent.runtime.checks import require_integer
from metta_fastagent.runtime.profiling import profiler_range
from metta_fastagent.runtime.sharded import full
from metta_fastagent.weight_metrics import analyze_weights

# For type checkers the class is a module; at run time it adds no base to the class it is mixed into.
Module = nn.Module if TYPE_CHECKING else object


class AgentWeights(Module):
    """Base class of `PyTorchAgentMixin`, which documents the attributes."""

    clip_range: float
    clip_mode: str = MixinConfig.clip_mode
    analyze_weights_interval: int
    l2_init_scale: float
    clip_scale: float
    initial_weights: dict[str, Tensor]
    initial_weight_magnitudes: dict[str, float]

    def clip_weights(self) -> None:
        """Clip the weights of the agent's layers in place; a trainer calls this after each optimizer step.

        Mode "absolute": `weight` and `bias` of Linear, Conv1d, Conv2d and their subclasses, to
        [-clip_range, clip_range].
        Mode "init_scaled", as in Metta's host: only the weights, each to clip_range x clip_scale x its largest initial
        absolute weight; layers added after `init_mixin` have none and are not clipped. ComponentPolicy's own layers
        have another rule (docs/migration.md).
        With `clip_range` <= 0 nothing happens. NaN stays NaN. A parametrized weight is a temporary and is skipped; tied
        weights are clipped once.
        """
        clip_range = self._configured("clip_range")
        if not clip_range > 0:
            return
        layers = self._layers()
        with profiler_range("clip_weights"):
            if self.clip_mode == "absolute":
                bounds = [float(clip_range)] * len(layers.clipped)
                ops.clip_weights_(layers.clipped, bounds, plan=layers.clip_plan)
            else:
                bounded = [(layers.clipped_weights[name], bound) for name, bound in self._scaled_bounds(layers)]
                ops.clip_weights_([weight for weight, _ in bounded], [bound for _, bound in bounded])

    def _scaled_bounds(self, layers: LayerIndex) -> list[tuple[str, float]]:
        """(name, bound) of each layer that the "init_scaled" mode clips."""
        factor, magnitudes = self.clip_range * self.clip_scale, self.initial_weight_magnitudes
        return [(name, factor * magnitudes[name]) for name in layers.clipped_weights if name in magnitudes]

    def _clipped_fractions(self) -> dict[str, float]:
        """Fraction of each layer's weights that is at its bound; waits for the devices."""
        layers = self._layers()
        bounds = dict.fromkeys(layers.clipped_weights, float(getattr(self, "clip_range", 0)))
        if self.clip_mode != "absolute":
            bounds = dict(self._scaled_bounds(layers))
        weights = {name: layers.clipped_weights[name].detach() for name, bound in bounds.items() if bound > 0}
        return {n: (w.abs() >= bounds[n]).double().mean().item() for n, w in weights.items() if w.numel() > 0}

    def _configured(self, name: str) -> Any:
        """An attribute that `init_mixin` sets."""
        value = getattr(self, name, None)
        if value is None:
            raise RuntimeError(
                f"{name} not set: call self.init_mixin(**mixin_params) at the end of {type(self).__name__}.__init__"
            )
        return value

    def _state(self) -> AgentState:
        state = self.__dict__.get("_agent_state")
        if state is None:
            state = self._agent_state = AgentState()
        return state

    def _layers(self) -> LayerIndex:
        """The layers that clipping and regularisation act on; re-indexed only if they have changed."""
        state = self._state()
        if state.layers is None or not state.layers.is_current(self):
            state.layers = LayerIndex(self, self._is_regularizable_layer)
        return state.layers

    @staticmethod
    def _is_regularizable_layer(module: nn.Module) -> bool:
        """Whether L2-init regularisation applies to this layer: Linear, Conv1d, Conv2d or ConvTranspose2d."""
        return isinstance(module, REGULARIZED_LAYERS)

    def _store_initial_weights(self) -> None:
        """Keep a copy of each regularisable layer's weight under its module name ("root" for the agent itself)."""
        regularized = [(name, module) for name, module in named_layers(self) if self._is_regularizable_layer(module)]
        # A training loss cannot use tensors that were made in inference mode.
        with torch.inference_mode(False):
            self.initial_weights = {name: weight.detach().clone() for name, weight in named_weights(regularized)}

    def update_l2_init_weight_copy(self) -> None:
        """Make the current weights the reference for `l2_init_loss`."""
        self._store_initial_weights()

    def l2_init_loss(self) -> Tensor:
        """`l2_init_scale` times the sum of squared differences of the weights (no biases) from their initial values.

        Returns:
            0-dim float32 tensor on the weights' device, differentiable; a plain 0.0 if no initial weights are
            stored.
        """
        initial = self.__dict__.get("initial_weights")
        groups = self._layers().l2_groups(initial) if initial else ()
        losses = [
            ops.l2_init_loss(group.weights, group.initial, self.l2_init_scale, plan=group.plan) for group in groups
        ]
        if not losses:
            return torch.tensor(0.0, dtype=torch.float32)
        # If an agent spans several devices, the sum is on the device of its last layer.
        return functools.reduce(lambda total, loss: total.to(loss.device) + loss, losses)

    def compute_weight_metrics(self, delta: float = 0.01) -> list[dict]:
        """Singular-value metrics of the weight of each Linear; see `metta_fastagent.weight_metrics.analyze_weights`.

        Sharded weights (DTensor) are gathered, so every rank of their mesh must take part in the call.
        """
        linear = [(name, module) for name, module in named_layers(self) if isinstance(module, nn.Linear)]
        weights = {name: full(weight.detach()) for name, weight in named_weights(linear) if weight.dim() == 2}
        return analyze_weights(weights, delta)

    def maybe_compute_weight_metrics(self, epoch: int, delta: float = 0.01) -> list[dict] | None:
        """`compute_weight_metrics` in every `analyze_weights_interval`-th epoch, otherwise None; 0 means never."""
        epoch = require_integer("epoch", epoch, "an integer")
        interval = self._configured("analyze_weights_interval")
        if interval > 0 and epoch % interval == 0:
            return self.compute_weight_metrics(delta)
        return None

    def _apply(self, fn: Callable, recurse: bool = True) -> "AgentWeights":
        """Move the initial weights with `.to`, `.cuda`, `.half` and the like."""
        super()._apply(fn, recurse)
        initial = self.__dict__.get("initial_weights")
        if initial:
            self.initial_weights = {name: moved(weight, fn) for name, weight in initial.items()}
        return self


def moved(tensor: Tensor, fn: Callable, keep_dtype: bool = False) -> Tensor:
    """`tensor` with the device and dtype given by `fn` of `nn.Module._apply`; values survive `to_empty`."""
    target = fn(tensor.new_empty(0))
    if target.is_meta or tensor.is_meta:
        return tensor
    return tensor.to(target.device, tensor.dtype if keep_dtype else target.dtype)
