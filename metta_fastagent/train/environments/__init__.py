"""The environments that the trainer knows, and the protocol that they share.

Every environment steps `num_envs` rows at once; one row is one agent. Observations are tokens, uint8
`[num_envs, M, 3]`: a coordinate byte `(x << 4) | y` with x and y counted in the 11 x 11 window centred on the agent (so
the agent stands at 5, 5), a feature id and a value. An empty token is (255, 255, 255).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["ENVIRONMENT_NAMES", "Step", "VectorEnvironment", "make_environment"]

ENVIRONMENT_NAMES = ("memory", "mettagrid")

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The largest seed that every torch.Generator takes.
MAX_SEED = 2**63 - 1


class Step(NamedTuple):
    """What one step of `N` rows gives; every tensor is new, so it may be kept.

    A row whose episode ended has the first observation of its next episode in `observations` and the last one of the
    ended episode in `final_observations`; other rows have the same observation in both.
    """

    observations: Tensor  # uint8 [N, M, 3]
    rewards: Tensor  # float32 [N]
    terminals: Tensor  # bool [N]: the episode ended by its own rules; the value of what follows is 0
    truncations: Tensor  # bool [N]: the time limit cut the episode; never set together with `terminals`
    final_observations: Tensor  # uint8 [N, M, 3]


@runtime_checkable
class VectorEnvironment(Protocol):
    """What the trainer needs of an environment."""

    name: str
    num_envs: int
    device: torch.device
    obs_width: int
    obs_height: int
    num_tokens: int
    features: dict[str, dict[str, Any]]  # name -> {"id": int, "normalization": float}
    feature_normalizations: dict[int, float]  # id -> normalization
    action_names: list[str]
    max_action_args: list[int]  # largest legal parameter of each action type

    def reset(self, seed: int | None = None) -> Tensor:
        """Start a new episode in every row; returns uint8 `[num_envs, M, 3]`. `None` goes on with the random stream."""
        ...

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, integer `[num_envs, 2]`, to all rows."""
        ...

    def scripted_actions(self) -> Tensor:
        """An expert's actions for the present state, int32 `[num_envs, 2]`; NotImplementedError where there is none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        ...

    def close(self) -> None:
        """Give back what the environment holds."""
        ...


def make_environment(
    name: str, num_envs: int, device: torch.device | str = "cpu", seed: int = 0, **options: Any
) -> VectorEnvironment:
    """Build the environment called `name` ("memory" or "mettagrid") with `num_envs` rows on `device`.

    `options` are keyword arguments of the environment's class. Raises ValueError for an unknown name or a bad value and
    TypeError for a wrong type or an unknown option; "mettagrid" raises ImportError where that package is missing.
    """
    if name not in ENVIRONMENT_NAMES:
        raise ValueError(f"name must be one of {', '.join(ENVIRONMENT_NAMES)}, got {name!r}")
    return _environment_class(name)(num_envs, device=device, seed=seed, **options)


def _environment_class(name: str) -> Callable[..., VectorEnvironment]:
    # Imported on demand: the classes need the names above, and mettagrid is an extra.
    if name == "memory":
        from metta_fastagent.train.environments.memory import MemoryEnvironment

        return MemoryEnvironment
    from metta_fastagent.train.environments.mettagrid import MettagridEnvironment

    return MettagridEnvironment


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in `[low, high]`; TypeError or ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")
    return value


def check_seed(seed: object) -> int:
    """`seed` as an int that every random generator here takes."""
    return check_int("seed", seed, 0, MAX_SEED)


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a torch.device with its index filled in; ValueError where it cannot hold a random generator."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or a str, got {type(device).__name__} {device!r}")
    try:
        torch.Generator(device)
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be a torch device that is present, got {device!r}: {reason}") from error


def check_actions(actions: object, num_envs: int, device: torch.device) -> Tensor:
    """`actions` if it is an integer tensor `[num_envs, 2]` on `device`; values are not read."""
    if not isinstance(actions, Tensor):
        raise TypeError(f"actions must be a Tensor, got {type(actions).__name__}")
    if actions.dtype not in INTEGER_DTYPES:
        raise TypeError(f"actions must have an integer dtype, got {actions.dtype}")
    if actions.shape != (num_envs, 2):
        raise ValueError(f"actions must have shape [{num_envs}, 2], got {list(actions.shape)}")
    if actions.device != device:
        raise ValueError(f"actions must be on {device}, got {actions.device}")
    return actions


def legal_pairs(action_types: Tensor, action_params: Tensor, max_action_args: Tensor) -> Tensor:
    """Bool `[N]`: which (type, parameter) pairs `max_action_args` (int64 `[types]`) allows."""
    last_type = max_action_args.shape[0] - 1
    limits = max_action_args[action_types.clamp(0, last_type)]
    known_type = (action_types >= 0) & (action_types <= last_type)
    return known_type & (action_params >= 0) & (action_params <= limits)


def raise_on_illegal_pair(legal: Tensor, actions: Tensor, action_names: list[str], max_action_args: list[int]) -> None:
    """ValueError that shows the first pair of `actions` that is not `legal`; reads values, so for the CPU only."""
    if bool(legal.all()):
        return
    row = int(legal.to(torch.uint8).argmin())
    allowed = ", ".join(
        f"{index} ({name}) with 0 to {limit}"
        for index, (name, limit) in enumerate(zip(action_names, max_action_args, strict=True))
    )
    raise ValueError(f"actions[{row}] must be a legal (type, parameter) pair: {allowed}; got {actions[row].tolist()}")
