"""The environments of the trainer and their protocol.

An environment steps N rows at once; a row is one agent. It needs `max_action_args`, `reset` and `step`, see
VectorEnvironment. `make_env(num_envs, device)` builds one with N = `num_envs` rows on `device`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metta_fastagent import ActionSpace
from metta_fastagent.action_space import checked_max_params
from metta_fastagent.ops._checks import describe, require_integer
from metta_fastagent.train.config import require_device

# The largest seed that every torch.Generator accepts.
MAX_SEED = 2**63 - 1
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
    final_observations: Tensor | None = None  # as `observations`; None: a truncated episode is worth 0 at its end
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
        self.source, self.num_envs, self.device = source, num_envs, require_device("device", device)
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
        truncations = torch.zeros_like(step.terminals) if step.truncations is None else step.truncations
        flags = {"terminals": step.terminals, "truncations": truncations}
        for name, value in (flags if step.valid is None else flags | {"valid": step.valid}).items():
            self._check(f"step: {name}", value, (self.num_envs,), torch.bool)
        self._check("step: rewards", step.rewards, (self.num_envs,), torch.float32)
        return step._replace(truncations=truncations)

    def scripted_actions(self) -> Tensor:
        """The actions of the scripted policy, [N, 2]. Raises NotImplementedError if there is none."""
        return self._optional("scripted_actions")()

    def state_dict(self) -> dict[str, Any]:
        """The environment's state. Raises NotImplementedError if it cannot be saved."""
        self._optional("load_state_dict")
        return self._optional("state_dict")()

    def close(self) -> None:
        """Release the environment's resources."""
        getattr(self.source, "close", lambda: None)()

    def _optional(self, name: str) -> Callable[[], Any]:
        if not hasattr(self.source, name):
            raise NotImplementedError(f"environment: got {type(self.source).__name__} without {name}")
        return getattr(self.source, name)

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


def import_object(option: str, path: str) -> Any:
    """The object at `path`, as in package.module:name. Raises ValueError, which names `option`."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{option}: got {path!r} ({error}), expected package.module:name of an importable object"
        ) from error
    if not callable(found):
        raise ValueError(f"{option}: got {path!r}, which is {describe(found)}, expected a function or a class")
    return found


def environment_maker(name: str) -> Callable[..., Any]:
    """The function `make_env(num_envs, device)` that `TrainConfig.env` names. Raises ValueError or ImportError."""
    # Imported here because these modules import this one.
    if name == "memory":
        from metta_fastagent.train.environments.memory import MemoryEnvironment as make_env
    elif name == "mettagrid":
        from metta_fastagent.train.environments.mettagrid import MettagridEnvironment as make_env
    elif name.startswith("gym:"):
        from metta_fastagent.train.environments.gym import maker

        make_env = maker(name.removeprefix("gym:"))
    else:
        make_env = import_object("env", name)
    return make_env


def make_environment(
    make_env: str | Callable[..., Any], num_envs: int, device: torch.device, seed: int = 0
) -> Environment:
    """`make_env(num_envs, device)`, reset to `seed` and checked; a name is looked up by `environment_maker`.

    A gymnasium.vector.VectorEnv gets its adapter.
    """
    if isinstance(make_env, str):
        make_env = environment_maker(make_env)
    source = make_env(num_envs, device)
    gymnasium = sys.modules.get("gymnasium")
    if gymnasium is not None and isinstance(source, gymnasium.vector.VectorEnv):
        from metta_fastagent.train.environments.gym import GymnasiumEnvironment

        source = GymnasiumEnvironment(source, device)
    return Environment(source, num_envs, device, seed)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` if it is an int in `[low, high]`, else a TypeError or a ValueError."""
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    checked = require_integer(name, value, expected, low)
    if high is not None and checked > high:
        raise ValueError(f"{name}: got {checked}, expected {expected}")
    return checked


def check_seed(seed: object) -> int:
    """`seed` if every torch.Generator accepts it, else a TypeError or a ValueError."""
    return check_int("seed", seed, 0, MAX_SEED)
