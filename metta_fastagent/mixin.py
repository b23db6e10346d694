"""PyTorchAgentMixin: behaviour shared by PyTorch agents for a Metta trainer.

Configuration, weight clipping, the TensorDict fields `bptt` and `batch`, conversion between (action type, parameter)
pairs and logit indices, the training and inference handlers, L2-init regularisation and weight metrics. The mixin holds
state and calls `ops`; it computes nothing itself and never branches on a device.
"""

import logging
import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent import _shapes, ops
from metta_fastagent._agent_environment import AgentEnvironment
from metta_fastagent._config import ORIGINAL_PARAMETERS, PARAMETERS, MixinConfig, with_suggestion
from metta_fastagent._layer_index import largest_magnitudes
from metta_fastagent._weights import AgentWeights, moved
from metta_fastagent.runtime.checks import describe, is_number
from metta_fastagent.runtime.dispatch import backend
from metta_fastagent.runtime.profiling import profiler_range

logger = logging.getLogger(__name__)

TABLES = ("action_index_tensor", "cum_action_max_params")


class PyTorchAgentMixin(AgentEnvironment, AgentWeights):
    """Shared behaviour of PyTorch agents. The mixin comes first: `class MyAgent(PyTorchAgentMixin, LSTMWrapper)`.

    It adds no parameters, buffers or submodules, and draws no random numbers. Call `extract_mixin_params` before the
    base class's `__init__` and `init_mixin` after it. `VectorAgent.__init__` and `forward` are a complete example.

    Attributes:
        clip_range, analyze_weights_interval, clip_mode, validate, action_format, on_nonfinite_logits, training_values,
            check_first_update: the parameters of `init_mixin`; they may be changed at any time.
        extra_kwargs: dict of parameters that neither the agent nor the mixin knows.
        temperature: divides the logits in both handlers; a number > 0, or a one-element tensor on their device.
        l2_init_scale: factor of `l2_init_loss`.
        clip_scale: factor of the bounds of the "init_scaled" mode.
        initial_weights: dict from layer name to a copy of its weight, for `l2_init_loss`.
        initial_weight_magnitudes: dict from layer name to its largest initial absolute weight ("init_scaled" only).
        action_index_tensor, cum_action_max_params: the action tables; see `ActionSpace`.
    """

    validate: str = MixinConfig.validate
    action_format: str = MixinConfig.action_format
    on_nonfinite_logits: str = MixinConfig.on_nonfinite_logits
    training_values: bool = MixinConfig.training_values
    check_first_update: bool = MixinConfig.check_first_update
    temperature: float | Tensor
    action_index_tensor: Tensor | None
    cum_action_max_params: Tensor | None
    _greedy = False

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
        """Take the mixin's parameters out of `kwargs`; may be called before the base class's `__init__`.

        Args:
            kwargs: the agent's keyword arguments; the mixin's own are removed.

        Returns:
            dict for `init_mixin`: `clip_range` (default 0), `analyze_weights_interval` (default 300), its other
            parameters if given, and `extra_kwargs`, which is `kwargs` itself with the rest (a dict of the rest if
            nothing can be removed from `kwargs`).

        Raises:
            TypeError, ValueError: a parameter has a wrong value; then nothing is removed.
        """
        if not isinstance(kwargs, MutableMapping):
            raise TypeError(f"kwargs: got {describe(kwargs)}, expected the dict of the agent's keyword arguments")
        given = {name: kwargs[name] for name in PARAMETERS if name in kwargs}
        config = MixinConfig(**given)
        params = {name: getattr(config, name) for name in ORIGINAL_PARAMETERS} | given
        try:
            for name in given:
                kwargs.pop(name)
        except Exception:
            # A read-only mapping, such as an OmegaConf config in struct mode.
            kwargs = {name: value for name, value in kwargs.items() if name not in given}
        return {**params, "extra_kwargs": kwargs}

    def init_mixin(
        self,
        clip_range: float = MixinConfig.clip_range,
        analyze_weights_interval: int = MixinConfig.analyze_weights_interval,
        extra_kwargs: MutableMapping[str, Any] | None = None,
        clip_mode: str = MixinConfig.clip_mode,
        validate: str = MixinConfig.validate,
        action_format: str = MixinConfig.action_format,
        on_nonfinite_logits: str = MixinConfig.on_nonfinite_logits,
        training_values: bool = MixinConfig.training_values,
        check_first_update: bool = MixinConfig.check_first_update,
        l2_init_scale: float | None = None,
        clip_scale: float | None = None,
        temperature: float | Tensor | None = None,
    ) -> None:
        """Set the configuration and keep a copy of the initial weights; call this after the base class's `__init__`.

        Args:
            clip_range: float >= 0; 0 turns clipping off.
            analyze_weights_interval: epochs between weight metrics, an integer >= 0; 0 turns them off.
            extra_kwargs: parameters that neither the agent nor the mixin knows; a warning names them, and the attribute
                `extra_kwargs` keeps them.
            clip_mode: "absolute" or "init_scaled", see `clip_weights`.
            validate: when a kernel's report of a bad action or bad logits is read: "deferred" (on the next call,
                without a host sync), "sync" (in the same call, with a host sync) or "off". On the CPU errors are raised
                immediately.
            action_format: what `handle_inference_mode` writes as actions: "pair", or the logit index as int64 ("index")
                or int32 ("index32").
            on_nonfinite_logits: "raise" an error for a row of logits that is not a distribution (NaN, +inf, or no
                allowed action), or "count" such rows, see `diagnostics`: they get log-probability NaN and action 0.
            training_values: whether `handle_training_mode` also writes `values`, which is `value` without its last
                dimension; later trainers read it.
            check_first_update: whether the first training call with gradients runs `testing.check_agent` on copies of
                the agent with that call's rows, and raises an AgentCheckError if a check fails.
            l2_init_scale, clip_scale, temperature: the attributes; None keeps the value that the agent has set,
                otherwise 1.

        Raises:
            TypeError, ValueError: a parameter has a wrong value.
        """
        config = MixinConfig(
            clip_range, analyze_weights_interval, clip_mode, validate, action_format, on_nonfinite_logits,
            training_values, check_first_update, l2_init_scale, clip_scale, temperature,
        )  # fmt: skip
        if extra_kwargs is not None and not isinstance(extra_kwargs, MutableMapping):
            raise TypeError(f"extra_kwargs: got {extra_kwargs!r}, expected a dict or None")
        for name, value in vars(config).items():
            if value is not None:
                setattr(self, name, value)
            elif not hasattr(self, name):
                setattr(self, name, 1.0)
        self.extra_kwargs = dict(extra_kwargs or {})
        self._store_initial_weights()
        scaled = config.clip_mode == "init_scaled"
        self.initial_weight_magnitudes = largest_magnitudes(self.initial_weights) if scaled else {}
        name = type(self).__name__
        logger.info("%s: %s", name, config)
        if extra_kwargs:
            logger.warning("%s: ignored unknown parameters: %s", name, ", ".join(map(with_suggestion, extra_kwargs)))

    # TensorDict fields

    def set_tensordict_fields(
        self, td: TensorDictBase, observations: Tensor, training: bool | None = None
    ) -> tuple[int, int]:
        """Set `td["bptt"]` (time steps) and `td["batch"]` (rows), which LSTM components and experience buffers read.

        Args:
            td: TensorDict of batch size [B, T], [B], [B * T] or [].
            observations: [B, ...] in rollout, [B, T, ...] in training, of any dtype; in training also flat,
                [B * T, ...], if `td` already has `bptt` T and `batch` B. Such fields, set by a trainer, are read (a
                host sync on CUDA); `training=False` reads nothing.
            training: True for training, False for rollout; None decides by the rank of `env.single_observation_space`,
                and without one takes 4 dimensions (tokens [B, T, M, 3]) as training and any other number as rollout.

        Returns:
            (B, T) as ints; T is 1 in inference. The fields are fresh int64 tensors on the observations' device: [B] in
            inference; in training [B, T] if the batch size of `td` is [B, T] or [B], else [B * T].

        Raises:
            TypeError, ValueError: `td` is not a TensorDict, or its batch size, its fields or the rank of the
                observations do not fit; `td` is unchanged then.
        """
        _shapes.require_tensordict(td)
        if not isinstance(observations, Tensor) or observations.dim() < 1:
            raise TypeError(f"observations: got {describe(observations)}, expected a tensor [B, T, ...] or [B, ...]")
        state, obs_shape = self._state(), getattr(self, "obs_shape", None)
        B, TT, training = _shapes.layout_of(td, observations, obs_shape, training, state.fields)
        shape = _shapes.field_shape(tuple(td.batch_size), B, TT, training)
        bptt = torch.full(shape, TT, dtype=torch.int64, device=observations.device)
        batch = torch.full(shape, B, dtype=torch.int64, device=observations.device)
        td.update({"bptt": bptt, "batch": batch})
        state.fields = _shapes.Fields(bptt, B, TT, training)
        return B, TT

    # Training and inference

    def handle_training_mode(
        self, td: TensorDictBase, action: Tensor, logits_list: Tensor, value: Tensor
    ) -> TensorDictBase:
        """Evaluate the given actions and write the results.

        Args:
            td: TensorDict of batch size [B, T], [B] or [B * T]. With `action_mask` in it, bool [B, T, A] or
                [B * T, A], the actions for which it is False are forbidden; see `ops.evaluate_actions`. With
                `return_logits` in it, `logits` [B * T, A] replace the first three results, for `ops.ppo_loss`, unless
                temperature, conversion or `on_nonfinite_logits` differ from the defaults.
            action: integer (type, parameter) pairs [B, T, 2] or [B * T, 2], or logit indices [B, T] or [B * T].
            logits_list, value: logits [B * T, A], which are divided by `temperature`; values [B * T, 1] or [B * T].

        Returns:
            TensorDict with `act_log_prob`, `entropy` (nats), `full_log_probs` and `value` (and flat `values`, if
            `training_values` is set) added: of batch size [B, T] with `batch` and `bptt` in `td`, flat without. A flat
            `td` itself receives the results too.

        Raises:
            RuntimeError, TypeError, ValueError: without action tables; wrong type, dtype, shape or device; on the CPU
                an action out of range, or logits that do not form a distribution. Then `td` is unchanged.
        """
        _shapes.require_tensordict(td)
        table = self._require_table("cum_action_max_params")
        self._raise_reports("deferred")
        rows = _shapes.require_rows(logits_list, value)
        actions = _shapes.flat_actions(action, rows)
        state = self._state()
        segment = _shapes.segment_shape(td, action, rows, state.fields)
        mask = _shapes.flat_mask(td, logits_list, segment or _shapes.rows_of_call(td, action, rows))
        temperature, strict = self._temperature(), self.on_nonfinite_logits == "raise"
        converts = actions.dim() == 2 and _is_overridden(self, "_convert_action_to_logit_index")
        plain = strict and not converts and not isinstance(temperature, Tensor) and temperature == 1
        if self.check_first_update and not state.checked and torch.is_grad_enabled():
            self._check_self(td, segment, rows)
        with profiler_range("handle_training_mode"):
            if converts:
                actions = self._convert_action_to_logit_index(actions)
            else:
                self._require_width(logits_list)
            if plain and "return_logits" in td.keys():
                results, entropy = {"logits": logits_list}, None
            else:
                log_prob, entropy, full_log_probs = ops.evaluate_actions(
                    logits_list, actions, table if actions.dim() == 2 else None, mask, temperature,
                    strict=strict, report=self._report_handle(),
                )  # fmt: skip
                results = {"act_log_prob": log_prob, "entropy": entropy, "full_log_probs": full_log_probs}
        self._raise_reports("sync")
        state.calls.add("training", rows, entropy, not strict)
        results["value"] = value
        if self.training_values:
            results["values"] = value.flatten()
        if segment is None:
            flat = td if td.batch_dims < 2 else td.reshape(rows)
            return flat.update(results)
        if tuple(td.batch_size) == (rows,) and td.get("bptt").dim() == 1:
            return td.update(results).reshape(segment)
        result = _shapes.as_segments(td, segment)
        return result.update({key: tensor.reshape(*segment, *tensor.shape[1:]) for key, tensor in results.items()})

    def handle_inference_mode(self, td: TensorDictBase, logits_list: Tensor, value: Tensor) -> TensorDictBase:
        """Draw an action for each row and write the results.

        Args:
            td: TensorDict of batch size [B]; an optional `action_mask`, bool [B, A], says which actions may be drawn.
            logits_list: logits [B, A], A the number of rows of `action_index_tensor`; divided by `temperature`.
            value: values [B, 1] or [B].

        Returns:
            `td` itself, with `actions` (pairs, int32 [B, 2]; indices [B] if `action_format` says so), `act_log_prob`
            [B], `values` [B] and `full_log_probs` [B, A].

        Raises:
            RuntimeError, TypeError, ValueError: without action tables; wrong type, dtype, shape or device; on the CPU
                logits that do not form a distribution. Then `td` is unchanged.
        """
        _shapes.require_tensordict(td)
        table = self._require_table("action_index_tensor")
        rows = _shapes.require_rows(logits_list, value)
        _shapes.require_step(td, rows, self._state().fields)
        self._raise_reports("deferred")
        mask = _shapes.flat_mask(td, logits_list, (rows,))
        temperature, strict, greedy = self._temperature(), self.on_nonfinite_logits == "raise", self._greedy
        as_index = self.action_format != "pair"
        if as_index or _is_overridden(self, "_convert_logit_index_to_action"):
            self._require_width(logits_list)
            table = None
        with profiler_range("handle_inference_mode"):
            index, log_prob, entropy, full_log_probs, *pairs = ops.sample_actions(
                logits_list, table, None, mask, temperature, greedy, strict=strict, report=self._report_handle()
            )
            if pairs:
                (actions,) = pairs
            elif as_index:
                actions = index if self.action_format == "index" else index.to(torch.int32)
            else:
                actions = self._convert_logit_index_to_action(index).to(torch.int32)
        self._raise_reports("sync")
        self._state().calls.add("inference", rows, entropy, not strict)
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

    @contextmanager
    def greedy(self) -> Iterator[None]:
        """In the `with` block, `handle_inference_mode` takes the most likely action, the first on a tie."""
        before, self._greedy = self._greedy, True
        try:
            yield
        finally:
            self._greedy = before

    def diagnostics(self) -> dict[str, Any]:
        """Counts of the agent's calls so far, as plain numbers; reading them waits for the devices.

        Returns:
            dict with `backend` (its name); `calls` and `rows` (int), `mean_entropy` (nats, of the last call that had
            one) and `rows_per_second` (float, on the host's clock, between the first call and the last), each a dict
            with the keys "training" and "inference"; `bad_actions`, the kernels' reports so far (on the CPU a bad
            action is an error instead); `nonfinite_rows`, counted if `on_nonfinite_logits` is "count"; `clipped`, the
            fraction of each layer's weights at its bound. Compiled code and replays of a CUDA graph are not counted.
        """
        devices = {parameter.device for parameter in self.parameters()} or {torch.device("cpu")}
        state = self._state()
        return {
            "backend": ", ".join(sorted({backend(device) for device in devices})),
            **state.calls.summary(),
            "bad_actions": self._report().actions_reported(),
            "clipped": self._clipped_fractions(),
        }

    def _check_self(self, td: TensorDictBase, segment: tuple[int, int] | None, rows: int) -> None:
        """Run `check_agent` with the observations of this call."""
        if torch.compiler.is_compiling():
            return
        # Imported here, because the checks import the mixin.
        from metta_fastagent.testing import check_agent

        samples = (td if segment is None else _shapes.as_segments(td, segment)).detach().reshape(rows)
        report = check_agent(self, None, sample_input=samples)
        report.raise_if_failed()
        self._state().checked = True
        logger.info("%s", report)

    def _temperature(self) -> float | Tensor:
        """The attribute or buffer `temperature`; a parameter or module of that name belongs to the agent."""
        temperature: Any = self.__dict__.get("temperature")
        if temperature is None:
            found: Any = getattr(self, "temperature", 1.0)
            given = is_number(found) or (isinstance(found, Tensor) and type(found) is not nn.Parameter)
            temperature = found if given else 1.0
        return temperature

    def _raise_reports(self, mode: str) -> None:
        """Raise an error for a bad row that a kernel has reported, if `validate` is this mode."""
        if self.validate == mode and not torch.compiler.is_compiling():
            table = getattr(self, "cum_action_max_params", None)
            ops.raise_if_reported(table, synchronize=mode == "sync", report=self._report())

    def _report(self) -> ops.Report:
        state = self._state()
        if state.report is None:
            state.report = ops.Report()
        return state.report

    def _report_handle(self) -> int:
        return 0 if torch.compiler.is_compiling() else self._report().handle

    # Action conversion

    def _convert_action_to_logit_index(self, flattened_action: Tensor) -> Tensor:
        """Logit index `type + cum_action_max_params[type] + param` of each pair: integer [..., 2] to int64 [...].

        Raises:
            RuntimeError: the action tables are not set.
            TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also a pair out of range.
        """
        table = self._require_table("cum_action_max_params")
        return ops.action_to_logit_index(flattened_action, table, report=self._report_handle())

    def _convert_logit_index_to_action(self, action_logit_index: Tensor) -> Tensor:
        """Pair of each logit index, from `action_index_tensor`: integer [...] to int32 [..., 2].

        Raises:
            RuntimeError: the action tables are not set.
            TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also an index out of range.
        """
        table = self._require_table("action_index_tensor")
        try:
            return ops.logit_index_to_action(action_logit_index, table, report=self._report_handle())
        except (TypeError, ValueError) as error:
            # The operation itself calls the argument `index`.
            raise type(error)(re.sub("^index", "action_logit_index", str(error))) from None

    def _require_width(self, logits: Tensor) -> None:
        """Reject logits whose columns do not match the tables' actions."""
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

    def _apply(self, fn: Callable, recurse: bool = True) -> "PyTorchAgentMixin":
        """Move tables and temperature along with `.to`, `.cuda`, `.half` and the like; they keep their dtype."""
        super()._apply(fn, recurse)
        for name in (*TABLES, "temperature"):
            table = self.__dict__.get(name)
            if isinstance(table, Tensor):
                self.__dict__[name] = moved(table, fn, keep_dtype=True)
        return self


def _is_overridden(agent: PyTorchAgentMixin, method: str) -> bool:
    return method in agent.__dict__ or getattr(type(agent), method) is not getattr(PyTorchAgentMixin, method)
