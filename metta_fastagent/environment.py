"""The protocol of vectorized environments.

An environment steps N rows at once; a row is one agent. It needs `max_action_args`, `reset` and `step`, see
VectorEnvironment. `make_env(num_envs, device)` builds one with N = `num_envs` rows on `device`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metta_fastagent.action_space import ActionSpace, checked_max_params
from metta_fastagent.ops._checks import describe

# What an environment's members give, for the error if one is missing.
MEMBERS = {
    "max_action_args": "a list with the largest parameter of each action type, such as [1] for two actions",
    "reset": "a method reset(seed) that returns the first observations, a tensor [num_envs, ...]",
    "step": "a method step(actions) that returns (observations, rewards, terminals)",
}


class ProtocolError(ValueError):
    """An environment gave something else than the protocol says."""


class Step(NamedTuple):
    """The results of one step of N rows, in tensors on the environment's device. A plain tuple is as good.

    If a row's episode ended, `observations` has the first observation of its next episode and `final_observations` the
    last one of the ended episode; otherwise both have the same observation.
    """

    observations: Tensor  # any dtype [N, ...], the same in each step
    rewards: Tensor  # float32 [N]
    terminals: Tensor  # bool [N]: the episode reached a terminal state, whose value is 0
    truncations: Any = None  # bool [N]: a time limit ended the episode, not a terminal state; None for none
    # As `observations`; None if no episode was truncated, or if a truncated one is worth 0 at its end.
    final_observations: Tensor | None = None
    valid: Tensor | None = None  # bool [N]: False if the row only restarted, which is not learned from; None for all


@runtime_checkable
class VectorEnvironment(Protocol):
    """What the trainer needs of an environment. Optional members, with their defaults:

    action_names: a name for each action type ("action_0", "action_1", ...).
    scripted_actions(): actions of a reference policy, int [N, 2], to compare the agent with (none).
    state_dict(), load_state_dict(state): the state that the next step depends on, as tensors and plain values. Without
        them, or if they raise NotImplementedError, a resumed run starts new episodes.
    close(): release resources (nothing to do).
    features, feature_normalizations, obs_width, obs_height: read by Fast, for token observations.
    """

    max_action_args: list[int]  # the largest parameter of each action type

    def reset(self, seed: int) -> Tensor:
        """Start an episode in every row and return the observations, any dtype [N, ...]. `seed` is below 2**32."""
        ...

    def step(self, actions: Tensor) -> Step | tuple[Tensor, ...]:
        """Apply (type, parameter) pairs, int32 [N, 2], and restart the rows whose episodes end."""
        ...


class Environment:
    """A VectorEnvironment with its results checked and its optional members filled in; other members are its own.

    The constructor resets it to `seed`: the first observations give `single_observation_space` its shape and dtype.
    Raises ProtocolError; the checks read no values of tensors.
    """

    def __init__(self, source: Any, num_envs: int, device: torch.device, seed: int = 0) -> None:
        for name, expected in MEMBERS.items():
            member = getattr(source, name, None)
            if member is None or (name != "max_action_args" and not callable(member)):
                raise ProtocolError(f"environment: got {type(source).__name__} without {name}, expected {expected}")
        self.source, self.num_envs, self.device = source, num_envs, torch.empty(0, device=device).device
        self.max_action_args = checked_max_params("max_action_args", source.max_action_args)
        default = [f"action_{index}" for index in range(len(self.max_action_args))]
        self.action_names = ActionSpace(getattr(source, "action_names", default), self.max_action_args).action_names
        self.features: dict[str, dict[str, Any]] = getattr(source, "features", {})
        first = source.reset(seed)
        if not isinstance(first, Tensor) or first.dim() < 2 or len(first) != num_envs or first.device != self.device:
            expected = f"the observations, a tensor [{num_envs}, ...] on {self.device}"
            raise ProtocolError(f"reset: got {describe(first)}, expected {expected}")
        self.single_observation_space = SimpleNamespace(shape=tuple(first.shape[1:]), dtype=first.dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def reset(self, seed: int) -> Tensor:
        """The first observations of new episodes, [N, ...]."""
        return self._checked_observations("reset: observations", self.source.reset(seed))

    def step(self, actions: Tensor) -> Step:
        """The results of `actions`, with tensors for `truncations` and float32 rewards."""
        result = self.source.step(actions)
        if not isinstance(result, tuple) or not 3 <= len(result) <= len(Step._fields):
            expected = f"a tuple of the first 3 to {len(Step._fields)} of ({', '.join(Step._fields)})"
            raise ProtocolError(f"step: got {describe(result)}, expected {expected}")
        step = Step(*result)
        self._checked_observations("step: observations", step.observations)
        if step.final_observations is not None:
            self._checked_observations("step: final_observations", step.final_observations)
        rows = (self.num_envs,)
        self._check("step: rewards", step.rewards, rows, torch.float32)
        self._check("step: terminals", step.terminals, rows, torch.bool)
        if step.truncations is None:
            step = step._replace(truncations=torch.zeros_like(step.terminals))
        for name in ("truncations", "valid") if step.valid is not None else ("truncations",):
            self._check(f"step: {name}", getattr(step, name), rows, torch.bool)
        return step

    def state_dict(self) -> dict[str, Any] | None:
        """The environment's state; None if it cannot be saved and restored."""
        try:
            return self.source.state_dict() if hasattr(self.source, "load_state_dict") else None
        except (AttributeError, NotImplementedError):
            return None

    def close(self) -> None:
        """Release the environment's resources."""
        getattr(self.source, "close", lambda: None)()

    def _checked_observations(self, name: str, value: Any) -> Tensor:
        space = self.single_observation_space
        return self._check(name, value, (self.num_envs, *space.shape), space.dtype)

    def _check(self, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fits = isinstance(value, Tensor) and (value.shape, value.dtype, value.device) == (shape, dtype, self.device)
        if not fits:
            expected = describe(torch.empty(shape, dtype=dtype, device="meta")).replace(
                " on meta", f" on {self.device}"
            )
            raise ProtocolError(f"{name}: got {describe(value)}, expected {expected}")
        return value
