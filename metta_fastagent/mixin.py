"""PyTorchAgentMixin: behaviour shared by the PyTorch agents of a Metta trainer.

Configuration, weight clipping, the TensorDict fields `bptt` and `batch`, conversion between (action type, parameter)
pairs and logit indices, the training and inference handlers, L2-init regularisation and weight metrics. The mixin holds
state and calls `ops`; it computes nothing itself and never branches on a device.
"""

import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_non_tensor
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metta_fastagent import ops
from metta_fastagent._diagnostics import Calls, profiled
from metta_fastagent._dispatch import backend
from metta_fastagent._layer_index import CLIPPED_LAYERS, LayerIndex, Transient
from metta_fastagent._mode import Fields, is_training
from metta_fastagent.action_space import ActionSpace, checked_max_params
from metta_fastagent.ops._bad_action import Report, reporting_to
from metta_fastagent.ops._checks import describe, require_integer, require_number
from metta_fastagent.ops._sharded import full
from metta_fastagent.weight_metrics import analyze_weights

logger = logging.getLogger(__name__)

CLIP_MODES = ("absolute", "init_scaled")
VALIDATE_MODES = ("deferred", "sync", "off")
ACTION_FORMATS = ("pair", "index")
NONFINITE_MODES = ("raise", "count")
OPTIONS = ("clip_mode", "validate", "action_format", "on_nonfinite_logits")
PARAMETERS = ("clip_range", "analyze_weights_interval", *OPTIONS)
TABLES = ("action_index_tensor", "cum_action_max_params")
REGULARIZED_LAYERS = (*CLIPPED_LAYERS, nn.ConvTranspose2d)

# For type checkers the mixin is a module; at run time it adds nothing to the class it is mixed into.
_Module = nn.Module if TYPE_CHECKING else object


class PyTorchAgentMixin(_Module):
    """Shared behaviour of PyTorch agents; comes before the base class: `class MyAgent(PyTorchAgentMixin, LSTMWrapper)`.

    It adds no parameters, buffers or submodules, and draws no random numbers. Call `extract_mixin_params` before the
    base class's `__init__` and `init_mixin` after it.

    Attributes:
        clip_range: weights are clipped to [-clip_range, clip_range]; 0 or less turns clipping off.
        clip_mode: "absolute", or "init_scaled" for ComponentPolicy's rule (see `clip_weights`).
        validate: when a kernel's report of a bad action or bad logits is read: "deferred", "sync" or "off".
        action_format: "pair" or "index", of the actions that `handle_inference_mode` writes.
        on_nonfinite_logits: "raise" or "count" for logits that are no distribution.
        temperature: divides the logits of both handlers; a number > 0, or a tensor with one element on their device.
        analyze_weights_interval: epochs between weight metrics; 0 turns them off.
        l2_init_scale: factor of `l2_init_loss`.
        clip_scale: factor of the bounds of the "init_scaled" mode.
        initial_weights: dict from layer name to a copy of its weight, for `l2_init_loss`.
        initial_weight_magnitudes: dict from layer name to its largest initial absolute weight ("init_scaled" only).
        action_index_tensor, cum_action_max_params: the action tables; see `ActionSpace`.
    """

    clip_range: float
    clip_mode: str
    validate: str
    action_format: str
    on_nonfinite_logits: str
    temperature: float | Tensor
    analyze_weights_interval: int
    l2_init_scale: float
    clip_scale: float
    initial_weights: dict[str, Tensor]
    initial_weight_magnitudes: dict[str, float]
    action_index_tensor: Tensor | None
    cum_action_max_params: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(PyTorchAgentMixin)]
        shadowing = [base for base in before if issubclass(base, nn.Module) and not issubclass(base, PyTorchAgentMixin)]
        if shadowing:
            bases = sorted(cls.__bases__, key=lambda base: not issubclass(base, PyTorchAgentMixin))
            order = ", ".join(base.__name__ for base in bases)
            raise TypeError(
                f"class {cls.__name__}: {shadowing[0].__name__} comes before PyTorchAgentMixin, so the mixin's methods "
                f"would not override it; write class {cls.__name__}({order})"
            )

    # Configuration

    def extract_mixin_params(self, kwargs: MutableMapping[str, Any]) -> dict[str, Any]:
        """Take the mixin's parameters out of `kwargs`; callable before the base class's `__init__`.

        Args:
            kwargs: the agent's keyword arguments; the mixin's own are removed from it.

        Returns:
            dict for `init_mixin`: `clip_range` (default 0), `analyze_weights_interval` (default 300), the others of its
            parameters if given, and `extra_kwargs`, which is `kwargs` itself with the rest (a dict of the rest if
            nothing can be removed from `kwargs`).

        Raises:
            TypeError, ValueError: a parameter has a wrong value; nothing was removed then.
        """
        if not isinstance(kwargs, MutableMapping):
            raise TypeError(f"kwargs: got {describe(kwargs)}, expected the dict of the agent's keyword arguments")
        params = {"clip_range": 0, "analyze_weights_interval": 300}
        params |= {name: kwargs[name] for name in PARAMETERS if name in kwargs}
        _check_configuration(**params)
        try:
            for name in params:
                kwargs.pop(name, None)
        except Exception:
            # A read-only mapping, such as an OmegaConf config in struct mode.
            kwargs = {name: value for name, value in kwargs.items() if name not in params}
        return {**params, "extra_kwargs": kwargs}

    def init_mixin(
        self,
        clip_range: float = 0,
        analyze_weights_interval: int = 300,
        extra_kwargs: MutableMapping[str, Any] | None = None,
        clip_mode: str = "absolute",
        validate: str = "deferred",
        action_format: str = "pair",
        on_nonfinite_logits: str = "raise",
    ) -> None:
        """Set the configuration and keep a copy of the initial weights; call it after the base class's `__init__`.

        Args:
            clip_range: float >= 0; 0 turns clipping off.
            analyze_weights_interval: epochs between weight metrics, an integer >= 0; 0 turns them off.
            extra_kwargs: parameters that neither the agent nor the mixin knows; a warning names them, and they are
                otherwise ignored.
            clip_mode: "absolute" or "init_scaled".
            validate: when a kernel's report of a bad action or bad logits is read: "deferred" (on the next call,
                without a host sync), "sync" (in the same call, with one) or "off". On the CPU errors are immediate.
            action_format: what `handle_inference_mode` writes as actions: "pair" or "index", the logit index.
            on_nonfinite_logits: "raise" an error for a row of logits that is no distribution (NaN, +inf, or no allowed
                action), or "count" such rows, see `diagnostics`: they have log-probability NaN and action 0.

        Raises:
            TypeError, ValueError: a parameter has a wrong value.
        """
        _check_configuration(
            clip_range, analyze_weights_interval, clip_mode, validate, action_format, on_nonfinite_logits
        )
        if extra_kwargs is not None and not isinstance(extra_kwargs, MutableMapping):
            raise TypeError(f"extra_kwargs: got {extra_kwargs!r}, expected a dict or None")
        self.clip_range = clip_range
        self.clip_mode = clip_mode
        self.validate = validate
        self.action_format = action_format
        self.on_nonfinite_logits = on_nonfinite_logits
        if not hasattr(self, "temperature"):
            self.temperature = 1.0
        self.analyze_weights_interval = analyze_weights_interval
        self.l2_init_scale = 1
        self.clip_scale = 1
        self.initial_weight_magnitudes = {}
        self._store_initial_weights()
        if clip_mode == "init_scaled":
            self.initial_weight_magnitudes = _largest_magnitudes(self.initial_weights)
        name = type(self).__name__
        logger.info(
            "%s: clip_range=%s, clip_mode=%s, validate=%s, analyze_weights_interval=%s",
            name,
            clip_range,
            clip_mode,
            validate,
            analyze_weights_interval,
        )
        if extra_kwargs:
            logger.warning("%s: ignored unknown parameters: %s", name, ", ".join(map(_with_suggestion, extra_kwargs)))

    # Weight clipping

    @profiled
    def clip_weights(self) -> None:
        """Clip the weights of the agent's layers in place; a trainer calls it after each optimizer step.

        Mode "absolute": `weight` and `bias` of Linear, Conv1d, Conv2d and their subclasses, to
        [-clip_range, clip_range].
        Mode "init_scaled", ComponentPolicy's: their weights only, each to clip_range x clip_scale x its largest initial
        absolute weight; layers added after `init_mixin` have none and stay as they are.
        With `clip_range` <= 0 nothing happens. NaN stays NaN. A parametrized weight is a temporary and is skipped; tied
        weights are clipped once.
        """
        clip_range = self._configured("clip_range")
        if not clip_range > 0:
            return
        clipped = self._layers().clipped()
        if self._configured("clip_mode") == "absolute":
            ops.clip_weights_(clipped.tensors, [float(clip_range)] * len(clipped.tensors))
            return
        factor = clip_range * self.clip_scale
        bounded = [
            (weight, factor * self.initial_weight_magnitudes[name])
            for name, weight in clipped.weights.items()
            if name in self.initial_weight_magnitudes
        ]
        ops.clip_weights_([weight for weight, _ in bounded], [bound for _, bound in bounded])

    def _configured(self, name: str) -> Any:
        """An attribute that `init_mixin` sets."""
        value = getattr(self, name, None)
        if value is None:
            raise RuntimeError(
                f"{name} not set: call self.init_mixin(**mixin_params) at the end of {type(self).__name__}.__init__"
            )
        return value

    def _layers(self) -> LayerIndex:
        """The layers that clipping and regularisation act on, indexed again only if the module tree has changed."""
        cache = self.__dict__.get("_layer_cache")
        if cache is None:
            cache = self._layer_cache = Transient()
        if cache.value is None or not cache.value.is_current(self):
            cache.value = LayerIndex(self)
        return cache.value

    # TensorDict fields

    def set_tensordict_fields(
        self, td: TensorDictBase, observations: Tensor, training: bool | None = None
    ) -> tuple[int, int]:
        """Set `td["bptt"]` (time steps) and `td["batch"]` (rows), which LSTM components and experience buffers read.

        Args:
            td: TensorDict of batch size [B, T], [B], [B * T] or [].
            observations: [B, ...] in rollout, [B, T, ...] in training, of any dtype.
            training: which of the two; None decides by the rank of `env.single_observation_space`, and without one
                takes 4 dimensions (tokens [B, T, M, 3]) for training and any other number for rollout.

        Returns:
            (B, T) as ints; T is 1 in inference. The fields are fresh int64 tensors on the observations' device: [B] in
            inference; in training [B, T] if the batch size of `td` is [B, T] or [B], else [B * T].

        Raises:
            TypeError, ValueError: `td` is not a TensorDict, or its batch size or the rank of the observations does not
                fit; `td` is unchanged then.
        """
        if not isinstance(td, TensorDictBase):
            raise TypeError(f"td: got {type(td).__name__}, expected a TensorDict")
        if not isinstance(observations, Tensor) or observations.dim() < 1:
            raise TypeError(f"observations: got {describe(observations)}, expected a tensor [B, T, ...] or [B, ...]")
        B = observations.shape[0]
        training = is_training(observations, getattr(self, "obs_shape", None), training)
        TT = observations.shape[1] if training else 1
        shape = _field_shape(tuple(td.batch_size), B, TT, training)
        bptt = torch.full(shape, TT, dtype=torch.int64, device=observations.device)
        batch = torch.full(shape, B, dtype=torch.int64, device=observations.device)
        td.update({"bptt": bptt, "batch": batch})
        self._fields = Transient(Fields(bptt, B, TT, training))
        return B, TT

    # Training and inference

    @profiled
    def handle_training_mode(
        self, td: TensorDictBase, action: Tensor, logits_list: Tensor, value: Tensor
    ) -> TensorDictBase:
        """Evaluate the given actions and write the results.

        Args:
            td: TensorDict of batch size [B, T], [B] or [B * T]. With `action_mask` in it, bool [B, T, A] or
                [B * T, A], the actions for which it is False are forbidden; see `ops.evaluate_actions`.
            action: integer (type, parameter) pairs [B, T, 2] or [B * T, 2], or logit indices [B, T] or [B * T],
                contiguous or not.
            logits_list: logits [B * T, A], which are divided by `temperature`.
            value: values [B * T, 1] or [B * T].

        Returns:
            TensorDict with `act_log_prob`, `entropy` (nats), `full_log_probs` and `value` added. With `batch` and
            `bptt` in `td` it has batch size [B, T]; without them it is flat, [B * T]. A flat `td` receives the results
            itself too.

        Raises:
            RuntimeError: the action tables are not set.
            TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also an action out of range, or logits
                that are no distribution. `td` is unchanged then.
        """
        require_tensordict(td)
        table = self._require_table("cum_action_max_params")
        self._raise_reports("deferred")
        rows = _require_rows(logits_list, value)
        actions = _flat_actions(action, rows)
        segment = self._segment_shape(td, action, rows)
        conditions = self._conditions(td, logits_list)
        with self._reporting():
            if actions.dim() == 1:
                self._require_width(logits_list)
                outputs = ops.evaluate_actions(logits_list, actions, **conditions)
            elif _is_overridden(self, "_convert_action_to_logit_index"):
                index = self._convert_action_to_logit_index(actions)
                outputs = ops.evaluate_actions(logits_list, index, **conditions)
            else:
                self._require_width(logits_list)
                outputs = ops.evaluate_actions(logits_list, actions, table, **conditions)
        log_prob, entropy, full_log_probs = outputs
        self._raise_reports("sync")
        self._calls().add("training", entropy, not conditions["strict"])
        results = {"act_log_prob": log_prob, "entropy": entropy, "full_log_probs": full_log_probs, "value": value}
        if segment is None:
            flat = td if td.batch_dims < 2 else td.reshape(rows)
            return flat.update(results)
        if tuple(td.batch_size) == (rows,) and td.get("bptt").dim() == 1:
            return td.update(results).reshape(segment)
        result = _as_segments(td, segment)
        return result.update({key: tensor.reshape(*segment, *tensor.shape[1:]) for key, tensor in results.items()})

    @profiled
    def handle_inference_mode(self, td: TensorDictBase, logits_list: Tensor, value: Tensor) -> TensorDictBase:
        """Draw an action for each row and write the results.

        Args:
            td: TensorDict of batch size [B]. With `action_mask` in it, bool [B, A], only actions for which it is True
                are drawn.
            logits_list: logits [B, A], A the number of rows of `action_index_tensor`; divided by `temperature`.
            value: values [B, 1] or [B].

        Returns:
            `td` itself, with `actions` (pairs, int32 [B, 2]; int64 [B] if `action_format` is "index"), `act_log_prob`
            [B], `values` [B] and `full_log_probs` [B, A].

        Raises:
            RuntimeError: the action tables are not set.
            TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also logits that are no distribution.
                `td` is unchanged then.
        """
        require_tensordict(td)
        table = self._require_table("action_index_tensor")
        rows = _require_rows(logits_list, value)
        if td.batch_dims > 0 and tuple(td.batch_size) != (rows,):
            raise ValueError(f"td: got batch size {list(td.batch_size)}, expected {[rows]}, the rows of logits_list")
        self._raise_reports("deferred")
        conditions = self._conditions(td, logits_list) | {"greedy": self.__dict__.get("_greedy", False)}
        as_index = getattr(self, "action_format", "pair") == "index"
        with self._reporting():
            if as_index or _is_overridden(self, "_convert_logit_index_to_action"):
                self._require_width(logits_list)
                actions, log_prob, entropy, full_log_probs = ops.sample_actions(logits_list, **conditions)
                if not as_index:
                    actions = self._convert_logit_index_to_action(actions).to(torch.int32)
            else:
                _, log_prob, entropy, full_log_probs, actions = ops.sample_actions(logits_list, table, **conditions)
        self._raise_reports("sync")
        self._calls().add("inference", entropy, not conditions["strict"])
        return td.update(
            {"actions": actions, "act_log_prob": log_prob, "values": value.flatten(), "full_log_probs": full_log_probs}
        )

    def forward_training(
        self, td: TensorDictBase, action: Tensor, logits_list: Tensor, value: Tensor
    ) -> TensorDictBase:
        """The later name of `handle_training_mode`."""
        return self.handle_training_mode(td, action, logits_list, value)

    def forward_inference(self, td: TensorDictBase, logits_list: Tensor, value: Tensor) -> TensorDictBase:
        """The later name of `handle_inference_mode`."""
        return self.handle_inference_mode(td, logits_list, value)

    def _segment_shape(self, td: TensorDictBase, action: Tensor, rows: int) -> tuple[int, int] | None:
        """[B, T] of the result, without reading a tensor if possible; None if `td` lacks the fields."""
        batch_size = tuple(td.batch_size)
        if not {"batch", "bptt"} <= set(td.keys()):
            if batch_size and math.prod(batch_size) != rows:
                raise ValueError(f"td: got batch size {list(batch_size)}, expected {rows} rows as in logits_list")
            return None
        if action.dim() == 3 or (action.dim() == 2 and action.numel() == rows):
            segment = (action.shape[0], action.shape[1])
        elif td.get("bptt").dim() >= 2:
            segment = (td.get("bptt").shape[0], td.get("bptt").shape[1])
        else:
            segment = self._segment_from_fields(td)
        if segment[0] * segment[1] != rows:
            raise ValueError(f"td: batch x bptt is {segment[0]} x {segment[1]}, expected {rows} rows as in logits_list")
        if batch_size not in ((rows,), segment, segment[:1]):
            expected = f"{list(segment)}, {[segment[0]]} or {[rows]}"
            raise ValueError(f"td: got batch size {list(batch_size)}, expected {expected}")
        return segment

    @contextmanager
    def greedy(self) -> Iterator[None]:
        """In the `with` block, `handle_inference_mode` takes the likeliest action, the first of several."""
        before, self._greedy = self.__dict__.get("_greedy", False), True
        try:
            yield
        finally:
            self._greedy = before

    def diagnostics(self) -> dict[str, Any]:
        """What the agent has done so far, as plain numbers; reading them waits for the devices.

        Returns:
            dict with `backend` (its name); `calls` and `rows` (int) and `mean_entropy` (nats, of the last call), each a
            dict from "training" and "inference"; `bad_actions`, the reports of kernels so far (on the CPU a bad action
            is an error at once); `nonfinite_rows`, rows of logits without a distribution, counted if
            `on_nonfinite_logits` is "count"; `clipped`, the fraction of each layer's weights at their bound. Calls in
            compiled code and replays of a CUDA graph are not counted.
        """
        devices = {parameter.device for parameter in self.parameters()} or {torch.device("cpu")}
        return {
            "backend": ", ".join(sorted({backend(device) for device in devices})),
            **self._calls().summary(),
            "bad_actions": self._report().actions_reported(),
            "clipped": self._clipped_fractions(),
        }

    def _clipped_fractions(self) -> dict[str, float]:
        weights = self._layers().clipped().weights
        bounds = dict.fromkeys(weights, float(getattr(self, "clip_range", 0)))
        if getattr(self, "clip_mode", "absolute") != "absolute":
            factor = self.clip_range * self.clip_scale
            bounds = {name: factor * self.initial_weight_magnitudes.get(name, 0) for name in weights}
        return {
            name: (weight.detach().abs() >= bounds[name]).double().mean().item()
            for name, weight in weights.items()
            if bounds[name] > 0 and weight.numel() > 0
        }

    def _calls(self) -> Calls:
        return self._transient("_calls_cache", Calls)

    def _conditions(self, td: TensorDictBase, logits: Tensor) -> dict[str, Any]:
        """Arguments of the operations: mask, temperature and whether bad logits are errors."""
        mask = td.get("action_mask", None)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.numel() != logits.numel():
                raise ValueError(
                    f"action_mask: got {describe(mask)}, expected bool values, {list(logits.shape)} as logits_list"
                )
            mask = mask.reshape(logits.shape)
        # A parameter of that name is the agent's own.
        temperature = self.__dict__.get("temperature", 1.0)
        strict = getattr(self, "on_nonfinite_logits", "raise") == "raise"
        return {"mask": mask, "temperature": temperature, "strict": strict}

    def _raise_reports(self, mode: str) -> None:
        """Raise an error for a bad row that a kernel has reported, if `validate` is this mode."""
        if getattr(self, "validate", "deferred") == mode and not torch.compiler.is_compiling():
            table = getattr(self, "cum_action_max_params", None)
            ops.raise_if_reported(table, synchronize=mode == "sync", report=self._report())

    def _report(self) -> Report:
        """Where kernels report this agent's bad actions."""
        return self._transient("_report_cache", Report)

    def _transient(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of a cache slot that copies and pickles leave behind, made at its first use."""
        cache = self.__dict__.get(name)
        if cache is None:
            cache = Transient()
            setattr(self, name, cache)
        if cache.value is None:
            cache.value = make()
        return cache.value

    def _reporting(self) -> AbstractContextManager:
        return nullcontext() if torch.compiler.is_compiling() else reporting_to(self._report())

    def _segment_from_fields(self, td: TensorDictBase) -> tuple[int, int]:
        known = self.__dict__.get("_fields")
        if known is not None and known.value is not None and td.get("bptt") is known.value.bptt:
            return known.value.rows, known.value.steps
        # Fields of a flat TensorDict that were set elsewhere: their values have to be read, a host sync on CUDA.
        return int(td.get("batch")[0]), int(td.get("bptt")[0])

    # Action conversion

    def _convert_action_to_logit_index(self, flattened_action: Tensor) -> Tensor:
        """Logit index `type + cum_action_max_params[type] + param` of each pair: integer [..., 2] to int64 [...].

        Raises:
            RuntimeError: the action tables are not set.
            TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also a pair out of range.
        """
        with self._reporting():
            return ops.action_to_logit_index(flattened_action, self._require_table("cum_action_max_params"))

    def _convert_logit_index_to_action(self, action_logit_index: Tensor) -> Tensor:
        """Pair of each logit index, from `action_index_tensor`: integer [...] to int32 [..., 2].

        Raises:
            RuntimeError: the action tables are not set.
            TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also an index out of range.
        """
        with self._reporting():
            return ops.logit_index_to_action(action_logit_index, self._require_table("action_index_tensor"))

    def _require_width(self, logits: Tensor) -> None:
        """Refuse logits whose columns are not the actions of the tables."""
        table = getattr(self, "action_index_tensor", None)
        if table is not None and logits.shape[1] != table.shape[0]:
            raise ValueError(
                f"logits_list: got {describe(logits)}, expected {table.shape[0]} columns, one for each row of "
                "action_index_tensor; do the policy's heads know the environment's actions?"
            )

    def _require_table(self, name: str) -> Tensor:
        table = getattr(self, name, None)
        if table is None:
            raise RuntimeError(
                f"{name} not set. MettaAgent.initialize_to_environment() must be called first "
                "(or activate_actions() on the agent)."
            )
        return table

    # Environment

    def activate_actions(
        self,
        action_names: Sequence[str],
        action_max_params: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        """Set the action tables, for use without a host, and activate the policy's action embeddings.

        Args:
            action_names: name of each action type.
            action_max_params: largest legal parameter of each type.
            device: device of the tables; None means the device of the agent's parameters.

        Raises:
            TypeError, ValueError: see `ActionSpace`; nothing was changed then.
        """
        if device is None:
            device = next((param.device for param in self.parameters()), None)
        space = ActionSpace(action_names, action_max_params, device)
        self.activate_action_embeddings(space.full_action_names, device)
        self.action_index_tensor = space.action_index_tensor
        self.cum_action_max_params = space.cum_action_max_params

    def activate_action_embeddings(
        self, full_action_names: list[str], device: torch.device | str | None = None
    ) -> None:
        """Call the method of that name on `self.policy`, if it has one."""
        _pass_on(self, "activate_action_embeddings", full_action_names, device)

    def initialize_to_environment(self, full_action_names: list[str], device: torch.device | str | None = None) -> None:
        """Call the method of that name on `self.policy`, if it has one."""
        _pass_on(self, "initialize_to_environment", full_action_names, device)

    def create_action_heads(self, env: Any, input_size: int = 512 + 16) -> nn.ModuleList:
        """A ModuleList of one orthogonal Linear (gain 0.01) with sum(max_arg + 1) outputs for `env.max_action_args`."""
        max_action_args = checked_max_params("env.max_action_args", env.max_action_args)
        head = nn.Linear(input_size, sum(max_action_args) + len(max_action_args))
        nn.init.orthogonal_(head.weight, 0.01)
        nn.init.constant_(head.bias, 0)
        return nn.ModuleList([head])

    def _apply_feature_remapping(self, remap_tensor: Tensor) -> None:
        """Do nothing: an agent whose features can be renumbered overrides it."""

    def update_normalization_factors(
        self, features: dict[str, dict], original_feature_mapping: dict[str, int] | None
    ) -> None:
        """Do nothing: an agent whose normalisation can be updated overrides it."""

    # Regularisation and metrics

    @staticmethod
    def _is_regularizable_layer(module: nn.Module) -> bool:
        """Whether L2-init regularisation takes this layer: Linear, Conv1d, Conv2d or ConvTranspose2d."""
        return isinstance(module, REGULARIZED_LAYERS)

    def _store_initial_weights(self) -> None:
        """Keep a copy of each regularisable layer's weight under its module name ("root" for the agent itself)."""
        named = _named_weights(self.named_modules(), self._is_regularizable_layer)
        # A loss in training cannot use tensors that were made in inference mode.
        with torch.inference_mode(False):
            self.initial_weights = {name: weight.detach().clone() for name, weight in named}

    def update_l2_init_weight_copy(self) -> None:
        """Make the current weights the reference of `l2_init_loss`."""
        self._store_initial_weights()

    def l2_init_loss(self) -> Tensor:
        """`l2_init_scale` times the sum of squared differences of the weights (no biases) to their initial values.

        Returns:
            0-dim float32 tensor on the weights' device, differentiable; a plain 0.0 if no initial weights are
            stored.
        """
        initial = self.__dict__.get("initial_weights") or {}
        groups: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for name, weight in _named_weights(self._layers().modules, self._is_regularizable_layer):
            if name in initial:
                if initial[name].is_meta and not weight.is_meta:
                    raise RuntimeError(
                        f"initial_weights[{name!r}]: on the meta device, which has no values; call "
                        "update_l2_init_weight_copy() after the weights have been loaded"
                    )
                groups.setdefault(weight.device, []).append((weight, initial[name].to(weight.device)))
        losses = [
            ops.l2_init_loss([weight for weight, _ in pairs], [start for _, start in pairs], self.l2_init_scale)
            for pairs in groups.values()
        ]
        if not losses:
            return torch.tensor(0.0, dtype=torch.float32)
        # The sum of an agent spread over several devices is on that of its last layer.
        return functools.reduce(lambda total, loss: total.to(loss.device) + loss, losses)

    def compute_weight_metrics(self, delta: float = 0.01) -> list[dict]:
        """Singular-value metrics of each Linear's weight; see `metta_fastagent.weight_metrics.analyze_weights`.

        Sharded weights (DTensor) are gathered, so every rank of their mesh has to take part in the call.
        """
        named = _named_weights(self.named_modules(), lambda module: isinstance(module, nn.Linear))
        return analyze_weights({name: full(weight.detach()) for name, weight in named if weight.dim() == 2}, delta)

    def maybe_compute_weight_metrics(self, epoch: int, delta: float = 0.01) -> list[dict] | None:
        """`compute_weight_metrics` on every `analyze_weights_interval`-th epoch, else None; 0 means never."""
        epoch = require_integer("epoch", epoch, "an integer")
        interval = self._configured("analyze_weights_interval")
        if interval > 0 and epoch % interval == 0:
            return self.compute_weight_metrics(delta)
        return None

    def _apply(self, fn: Callable, recurse: bool = True) -> "PyTorchAgentMixin":
        """Move the tables, the temperature and the initial weights with `.to`, `.cuda`, `.half` and the like."""
        super()._apply(fn, recurse)
        for name in (*TABLES, "temperature"):
            table = self.__dict__.get(name)
            if isinstance(table, Tensor):
                self.__dict__[name] = _moved(table, fn, keep_dtype=True)
        initial = self.__dict__.get("initial_weights")
        if initial:
            self.initial_weights = {name: _moved(weight, fn) for name, weight in initial.items()}
        return self


def _check_configuration(
    clip_range: Any,
    analyze_weights_interval: Any,
    clip_mode: Any = "absolute",
    validate: Any = "deferred",
    action_format: Any = "pair",
    on_nonfinite_logits: Any = "raise",
) -> None:
    require_number("clip_range", clip_range, "a number >= 0", minimum=0)
    require_integer("analyze_weights_interval", analyze_weights_interval, "an integer >= 0 (epochs)", minimum=0)
    given = (clip_mode, validate, action_format, on_nonfinite_logits)
    known = (CLIP_MODES, VALIDATE_MODES, ACTION_FORMATS, NONFINITE_MODES)
    for name, value, values in zip(OPTIONS, given, known, strict=True):
        if value not in values:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(values)}")


def _with_suggestion(name: str) -> str:
    close = difflib.get_close_matches(str(name), PARAMETERS, n=1)
    return f"{name} (did you mean {close[0]}?)" if close else str(name)


def _named_weights(
    modules: Iterable[tuple[str, nn.Module]], wanted: Callable[[nn.Module], bool]
) -> list[tuple[str, Tensor]]:
    weights = [(name or "root", getattr(module, "weight", None)) for name, module in modules if wanted(module)]
    return [(name, weight) for name, weight in weights if isinstance(weight, Tensor) and not is_lazy(weight)]


def _largest_magnitudes(weights: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute value of each tensor, read with one transfer for each device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if weight.numel() > 0:
            by_device.setdefault(weight.device, {})[name] = full(weight.detach().abs().max()).double()
    magnitudes: dict[str, float] = {}
    for maxima in by_device.values():
        magnitudes |= dict(zip(maxima, torch.stack(list(maxima.values())).tolist(), strict=True))
    return magnitudes


def _moved(tensor: Tensor, fn: Callable, keep_dtype: bool = False) -> Tensor:
    """`tensor` with the device and dtype that `fn` of `nn.Module._apply` gives; values survive `to_empty`."""
    target = fn(tensor.new_empty(0))
    if target.is_meta or tensor.is_meta:
        return tensor
    return tensor.to(target.device, tensor.dtype if keep_dtype else target.dtype)


def _pass_on(agent: nn.Module, method: str, *args: Any) -> None:
    target = getattr(getattr(agent, "policy", None), method, None)
    if target is not None:
        target(*args)


def _is_overridden(agent: PyTorchAgentMixin, method: str) -> bool:
    return method in agent.__dict__ or getattr(type(agent), method) is not getattr(PyTorchAgentMixin, method)


def _field_shape(batch_size: tuple[int, ...], B: int, TT: int, training: bool) -> tuple[int, ...]:
    if batch_size == (B, TT) or (batch_size == (B,) and training):
        return (B, TT)
    if batch_size in ((), (B * TT,)):
        return (B * TT,)
    raise ValueError(
        f"td: got batch size {list(batch_size)}, expected {[B, TT]}, {[B]} or {[B * TT]} as in observations"
    )


def require_tensordict(td: Any) -> None:
    """Raise a TypeError that names `td` if it is not a TensorDict."""
    if not isinstance(td, TensorDictBase):
        raise TypeError(f"td: got {describe(td)}, expected a TensorDict")


def _require_rows(logits: Any, value: Any) -> int:
    """Number of rows of the logits, if they have two dimensions and the values as many rows."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"logits_list: got {describe(logits)}, expected a tensor of shape [rows, actions]")
    rows = logits.shape[0]
    expected = f"floating-point numbers of shape {[rows, 1]} or {[rows]} on {logits.device}, as logits_list"
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((rows,), (rows, 1)):
        raise ValueError(f"value: got {describe(value)}, expected {expected}")
    if value.device != logits.device or not value.is_floating_point():
        raise ValueError(f"value: got {describe(value)}, expected {expected}")
    return rows


def _flat_actions(action: Any, rows: int) -> Tensor:
    """Pairs [rows, 2] or logit indices [rows]."""
    expected = "pairs of shape [B, T, 2] or [B * T, 2], or logit indices of shape [B, T] or [B * T]"
    if not isinstance(action, Tensor) or not 1 <= action.dim() <= 3:
        raise ValueError(f"action: got {describe(action)}, expected {expected}")
    if action.dim() < 3 and action.numel() == rows:
        return action.reshape(rows)
    if action.dim() == 1 or action.shape[-1] != 2:
        raise ValueError(f"action: got {describe(action)}, expected {expected}, {rows} rows as in logits_list")
    if action.numel() != rows * 2:
        raise ValueError(f"action: got {describe(action)}, expected {rows} pairs as in logits_list")
    return action.reshape(rows, 2)


def _as_segments(td: TensorDictBase, segment: tuple[int, int]) -> TensorDictBase:
    """A shallow copy of `td` with batch size [B, T]; entries of one row per segment are expanded over its steps."""
    if tuple(td.batch_size) == segment:
        return td.copy()
    B, TT = segment
    result = TensorDict({}, batch_size=segment, device=td.device)
    for key, entry in td.items():
        if isinstance(entry, TensorDictBase) and not is_non_tensor(entry):
            entry = _as_segments(entry, segment)
        elif not isinstance(entry, NonTensorData) and tuple(entry.shape[:2]) != segment:
            entry = entry.unsqueeze(1).expand(B, TT, *entry.shape[1:])
        result.set(key, entry)
    return result
