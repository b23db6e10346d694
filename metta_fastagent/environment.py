"""The protocol of vectorized environments.

An environment steps N rows at once; a row is one agent. It needs `max_action_args`, `reset` and `step`; see
VectorEnvironment. `make_env(num_envs, device)` builds one with N = `num_envs` rows on `device`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metta_fastagent.action_space import ActionSpace, checked_max_params
from metta_fastagent.runtime.checks import describe, require_call

# What an environment's members return, for the error if one is missing.
MEMBERS = {
    "max_action_args": "a list with the largest parameter of each action type, such as [1] for two actions",
    "reset": "a method reset(seed) that returns the first observations, a tensor [num_envs, ...]",
    "step": "a method step(actions) that returns (observations, rewards, terminals)",
}


class ProtocolError(ValueError):
    """An environment returned something that breaks the protocol."""


class Step(NamedTuple):
    """The results of one step of N rows, as tensors on the environment's device. A plain tuple works too.

    If a row's episode ended, `observations` has the first observation of its next episode, and `final_observations` the
    last one of the ended episode; otherwise both have the same observation.

    Example:
        >>> step = Step(torch.zeros(2, 4), torch.ones(2), torch.tensor([False, True]))
        >>> step.terminals.tolist()
        [False, True]
    """

    observations: Tensor  # any dtype and shape [N, ...], the same at each step
    rewards: Tensor  # float32 [N]
    terminals: Tensor  # bool [N]: the episode reached a terminal state, whose value is 0
    # bool [N]: a time limit ended the episode, not a terminal state (which takes precedence); None for none
    truncations: Any = None
    # Like `observations`; None if no episode was truncated, or if a truncated one has value 0 at its end.
    final_observations: Tensor | None = None
    # bool [N]: False if the row only restarted, so that step and reward do not count for learning; None for all
    valid: Tensor | None = None
    # the legal actions at `observations`: bool [N, A], or a pair, bool [N, types] and [N, largest parameter + 1]
    action_mask: Any = None


@runtime_checkable
class VectorEnvironment(Protocol):
    """The members that the trainer needs from an environment. Optional members, with their defaults:

    action_names: a name for each action type ("action_0", "action_1", ...).
    scripted_actions(): a reference policy's actions, int [N, 2], to compare the agent with (none).
    state_dict(), load_state_dict(state): the state on which the next step depends, as tensors and plain values. Without
        them, or if they raise NotImplementedError, a resumed run starts new episodes.
    action_masks(): the mask for the current observations, like `Step.action_mask`, for environments whose `step`
        returns none (every action is legal). The mask for the first observations comes from here or from `reset`.
    load_statistics(state): copy what evaluation needs, such as running means, from the state of an environment with a
        different number of rows (load_state_dict, if both states have the same form).
    close(): release resources (nothing to do).
    features, feature_normalizations, obs_width, obs_height: read by Fast, for token observations.

    Example:
        >>> class Still:
        ...     max_action_args = [1]
        ...     def __init__(self, num_envs, device):
        ...         self.rows = num_envs
        ...     def reset(self, seed):
        ...         return torch.zeros(self.rows, 1)
        ...     def step(self, actions):
        ...         return torch.zeros(self.rows, 1), actions[:, 1].float(), torch.ones(self.rows, dtype=torch.bool)
        >>> isinstance(Still(2, "cpu"), VectorEnvironment)
        True
    """

    max_action_args: list[int]  # the largest parameter of each action type

    def reset(self, seed: int) -> Tensor | tuple[Tensor, Any]:
        """Start an episode in every row and return the observations, any dtype [N, ...]. `seed` is below 2**32.

        An environment whose `step` returns masks returns (observations, action_mask).
        """
        ...

    def step(self, actions: Tensor) -> Step | tuple[Tensor, ...]:
        """Apply (type, parameter) pairs, int32 [N, 2], and restart rows whose episodes end."""
        ...


class Environment:
    """Wraps a VectorEnvironment, checks its results and fills in optional members; other members pass through.

    The constructor resets it to `seed`: the first observations give `single_observation_space` its shape and dtype.
    `action_mask` is the mask for the latest observations, bool [N, A], or None if every action is always legal. Raises
    ProtocolError, or TypeError if `reset` takes no seed; the checks read no tensor values.
    """

    def __init__(self, source: Any, num_envs: int, device: torch.device, seed: int = 0) -> None:
        for name, expected in MEMBERS.items():
            member = getattr(source, name, None)
            if member is None or (name != "max_action_args" and not callable(member)):
                raise ProtocolError(f"environment: got {type(source).__name__} without {name}, expected {expected}")
        require_call("reset", source.reset, "a method reset(seed)", seed)
        self.source, self.num_envs, self.device = source, num_envs, torch.empty(0, device=device).device
        self.max_action_args = checked_max_params("max_action_args", source.max_action_args)
        default = [f"action_{index}" for index in range(len(self.max_action_args))]
        space = ActionSpace(getattr(source, "action_names", default), self.max_action_args)
        self.action_names, self._pairs = space.action_names, space.action_index_tensor.long().to(self.device)
        self.features: dict[str, dict[str, Any]] = getattr(source, "features", {})
        first, mask = _observations_and_mask(source.reset(seed))
        if not isinstance(first, Tensor) or first.dim() < 2 or len(first) != num_envs or first.device != self.device:
            expected = f"the observations, a tensor [{num_envs}, ...] on {self.device}"
            raise ProtocolError(f"reset: got {describe(first)}, expected {expected}")
        self.single_observation_space = SimpleNamespace(shape=tuple(first.shape[1:]), dtype=first.dtype)
        self.action_mask = self._mask("reset", mask)
        check_plain("state_dict()", self.state_dict())

    def __getattr__(self, name: str) -> Any:
        if name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def reset(self, seed: int) -> Tensor:
        """The first observations of new episodes, [N, ...]."""
        observations, mask = _observations_and_mask(self.source.reset(seed))
        self._checked_observations("reset: observations", observations)
        self.action_mask = self._checked_mask("reset", mask)
        return observations

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
        if step.truncations is not None:
            self._check("step: truncations", step.truncations, rows, torch.bool)
        if step.valid is not None:
            self._check("step: valid", step.valid, rows, torch.bool)
            step = step._replace(rewards=step.rewards.where(step.valid, 0))
        self.action_mask = self._checked_mask("step", step.action_mask)
        step = step._replace(action_mask=self.action_mask)
        if step.truncations is None:
            return step._replace(truncations=torch.zeros_like(step.terminals))
        # A terminal state has value 0, even at the time limit.
        return step._replace(truncations=step.truncations & ~step.terminals)

    def state_dict(self) -> dict[str, Any] | None:
        """The environment's state; None if it cannot be saved and restored."""
        return state_of(self.source)

    def load_statistics(self, state: dict[str, Any] | None) -> None:
        """Copy from the `state` of another environment, with any number of rows, everything except episode state."""
        load_statistics(self.source, copy.deepcopy(state))

    def close(self) -> None:
        """Release the environment's resources."""
        getattr(self.source, "close", lambda: None)()

    def _checked_mask(self, method: str, mask: Any) -> Tensor | None:
        mask = self._mask(method, mask)
        if (mask is None) != (self.action_mask is None):
            came, before = ("none", "one") if mask is None else ("one", "none")
            advice = "reset returns (observations, action_mask) where step gives masks"
            raise ProtocolError(
                f"{method}: action_mask: got {came}, expected {before} as with the first observations; {advice}"
            )
        return mask

    def _mask(self, method: str, mask: Any) -> Tensor | None:
        """`mask`, or the result of the environment's `action_masks()`, as bool [N, A]; None without either."""
        mask = getattr(self.source, "action_masks", lambda: None)() if mask is None else mask
        if isinstance(mask, tuple | list) and len(mask) == 2:
            widths = len(self.max_action_args), max(self.max_action_args) + 1
            for name, part, width in zip(("types", "parameters"), mask, widths, strict=True):
                self._check(f"{method}: action_mask: {name}", part, (self.num_envs, width), torch.bool)
            return mask[0][:, self._pairs[:, 0]] & mask[1][:, self._pairs[:, 1]]
        if mask is None:
            return None
        return self._check(f"{method}: action_mask", mask, (self.num_envs, len(self._pairs)), torch.bool)

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


def _observations_and_mask(first: Any) -> tuple[Any, Any]:
    # gymnasium's reset returns a dict of infos with the observations
    masked = isinstance(first, tuple) and len(first) == 2 and not isinstance(first[1], dict)
    return first if masked else (first, None)


def state_of(source: Any) -> dict[str, Any] | None:
    """The state of `source`; None if it cannot be saved and restored."""
    try:
        return source.state_dict() if hasattr(source, "load_state_dict") else None
    except (AttributeError, NotImplementedError):
        return None


def load_statistics(source: Any, state: dict[str, Any] | None) -> None:
    """Pass `source` what it can use from another environment's state; see `VectorEnvironment`."""
    if state is not None and hasattr(source, "load_statistics"):
        source.load_statistics(state)
    elif state is not None and same_form(state, state_of(source)):
        source.load_state_dict(state)


def check_plain(name: str, state: Any) -> None:
    """Raise ProtocolError if a checkpoint with `state` could not be loaded, for example because of NumPy arrays."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            check_plain(f"{name}[{key!r}]", value)
    elif not isinstance(state, Tensor) and type(state) not in (int, float, bool, str, bytes, complex, type(None)):
        raise ProtocolError(f"{name}: got {type(state).__name__}, expected tensors and plain values")


def same_form(state: Any, other: Any) -> bool:
    """Whether two states have the same keys and lengths, and tensors of the same shapes."""
    if isinstance(state, dict) and isinstance(other, dict):
        return state.keys() == other.keys() and all(same_form(value, other[key]) for key, value in state.items())
    if isinstance(state, list | tuple) and isinstance(other, list | tuple):
        return len(state) == len(other) and all(map(same_form, state, other))
    return getattr(state, "shape", None) == getattr(other, "shape", None) and type(state) is type(other)
