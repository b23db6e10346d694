"""The environments of the trainer and their protocol.

An environment steps `num_envs` rows at once; a row is one agent. Observations are tokens, uint8 `[num_envs, M, 3]`: a
coordinate byte `(x << 4) | y` with x and y in the 11 x 11 window centered on the agent (at 5, 5), a feature id and a
value. An empty token is (255, 255, 255).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metta_fastagent.ops._checks import describe, is_integer, require_integer, require_tensor

__all__ = ["ENVIRONMENT_NAMES", "Step", "VectorEnvironment", "make_environment"]

ENVIRONMENT_NAMES = ("memory", "mettagrid")

# The largest seed that every torch.Generator accepts.
MAX_SEED = 2**63 - 1


class Step(NamedTuple):
    """The results of one step of `N` rows, in tensors that later steps do not change.

    If a row's episode ended, `observations` has the first observation of its next episode and `final_observations` the
    last one of the ended episode; otherwise both have the same observation.
    """

    observations: Tensor  # uint8 [N, M, 3]
    rewards: Tensor  # float32 [N]
    terminals: Tensor  # bool [N]: the episode reached a terminal state, whose value is 0
    truncations: Tensor  # bool [N]: the time limit ended the episode; never True together with `terminals`
    final_observations: Tensor  # uint8 [N, M, 3]


@runtime_checkable
class VectorEnvironment(Protocol):
    """The interface between the trainer and an environment."""

    name: str
    num_envs: int
    device: torch.device
    obs_width: int
    obs_height: int
    num_tokens: int
    features: dict[str, dict[str, Any]]  # name -> {"id": int, "normalization": float}
    feature_normalizations: dict[int, float]  # id -> normalization
    action_names: list[str]
    max_action_args: list[int]  # largest parameter of each action type

    def reset(self, seed: int | None = None) -> Tensor:
        """Start a new episode in every row; returns uint8 `[num_envs, M, 3]`. None continues the random stream."""
        ...

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, integer `[num_envs, 2]`, to all rows."""
        ...

    def scripted_actions(self) -> Tensor:
        """The actions of a scripted policy, int32 `[num_envs, 2]`. Raises NotImplementedError if there is none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that the next step depends on, as tensors and plain values. May raise NotImplementedError."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        ...

    def close(self) -> None:
        """Release the resources of the environment."""
        ...


def make_environment(
    name: str, num_envs: int, device: torch.device | str = "cpu", seed: int = 0, **options: Any
) -> VectorEnvironment:
    """Build the environment called `name` ("memory" or "mettagrid") with `num_envs` rows on `device`.

    `options` are keyword arguments of the environment's class. Raises ValueError for an unknown name or a value out of
    range, TypeError for a wrong type or an unknown option, and ImportError if the package `mettagrid` is missing.
    """
    if name not in ENVIRONMENT_NAMES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(ENVIRONMENT_NAMES)}")
    return _environment_class(name)(num_envs, device=device, seed=seed, **options)


def _environment_class(name: str) -> Callable[..., VectorEnvironment]:
    # Imported here because these modules import this one.
    if name == "memory":
        from metta_fastagent.train.environments.memory import MemoryEnvironment

        return MemoryEnvironment
    from metta_fastagent.train.environments.mettagrid import MettagridEnvironment

    return MettagridEnvironment


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


def check_actions(actions: object, num_envs: int, device: torch.device) -> Tensor:
    """`actions` if it is an integer tensor `[num_envs, 2]` on `device`; values are not read."""
    expected = f"an integer tensor of shape [{num_envs}, 2] on {device}"
    tensor = require_tensor("actions", actions, expected)
    if not is_integer(tensor.dtype):
        raise TypeError(f"actions: got {describe(tensor)}, expected {expected}")
    if tensor.shape != (num_envs, 2) or tensor.device != device:
        raise ValueError(f"actions: got {describe(tensor)}, expected {expected}")
    return tensor


def legal_pairs(action_types: Tensor, action_params: Tensor, max_action_args: Tensor) -> Tensor:
    """Bool `[N]`: whether each (type, parameter) pair is within `max_action_args` (int64 `[types]`)."""
    last_type = max_action_args.shape[0] - 1
    limits = max_action_args[action_types.clamp(0, last_type)]
    known_type = (action_types >= 0) & (action_types <= last_type)
    return known_type & (action_params >= 0) & (action_params <= limits)


def check_legal(legal: Tensor, actions: Tensor, action_names: list[str], max_action_args: list[int]) -> None:
    """Raise a ValueError with the first pair of `actions` that is not `legal`. Reads values: for CPU tensors only."""
    if bool(legal.all()):
        return
    row = int(legal.to(torch.uint8).argmin())
    allowed = ", ".join(
        f"{index} ({name}) with 0 to {limit}"
        for index, (name, limit) in enumerate(zip(action_names, max_action_args, strict=True))
    )
    raise ValueError(f"actions[{row}]: got {actions[row].tolist()}, expected a (type, parameter) pair of {allowed}")
