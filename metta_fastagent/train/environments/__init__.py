"""The trainer's environments: how a name or a function becomes an Environment, and shared checks."""

from __future__ import annotations

import importlib
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from metta_fastagent.environment import Environment, ProtocolError, Step, VectorEnvironment
from metta_fastagent.runtime.checks import describe, require_call, require_integer

__all__ = ["Environment", "ProtocolError", "Step", "VectorEnvironment", "environment_maker", "make_environment"]

# The largest seed that every torch.Generator accepts.
MAX_SEED = 2**63 - 1
BUILT_IN = {"memory": "memory:MemoryEnvironment", "mettagrid": "mettagrid:MettagridEnvironment"}


def import_object(option: str, path: str) -> Any:
    """The object at `path`, such as package.module:name. Raises ValueError, which names `option`."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "start in its folder or set PYTHONPATH"
        if module == "__main__":
            hint = "a script has to pass its own to load_agent, or to train with resume="
        raise ValueError(
            f"{option}: got {path!r} ({error}), expected package.module:name of an importable object; {hint}"
        ) from error
    if not callable(found):
        raise ValueError(f"{option}: got {path!r}, which is {describe(found)}, expected a function or a class")
    return found


def environment_maker(name: str) -> Callable[..., Any]:
    """The function `make_env(num_envs, device)` named by `TrainConfig.env`. Raises ValueError or ImportError."""
    # Imported here because these modules import this one.
    if name in BUILT_IN:
        return pkgutil.resolve_name(f"{__name__}.{BUILT_IN[name]}")
    if name.startswith("gym:"):
        return partial(pkgutil.resolve_name(f"{__name__}.gym:make_registered"), name.removeprefix("gym:"))
    return import_object("env", name)


def make_environment(
    make_env: str | Callable[..., Any], num_envs: int, device: torch.device, seed: int = 0
) -> Environment:
    """`make_env(num_envs, device)`, reset to `seed` and checked; `environment_maker` looks up a name.

    A gymnasium.vector.VectorEnv is wrapped in its adapter.
    """
    if isinstance(make_env, str):
        make_env = environment_maker(make_env)
    require_call("env", make_env, "make_env(num_envs, device), which makes all rows at once", num_envs, device)
    with _workers_without_ctrl_c():
        source = make_env(num_envs, device)
        gymnasium = sys.modules.get("gymnasium")
        if gymnasium is not None and isinstance(source, gymnasium.Env):
            rows = f"{num_envs} rows, such as gymnasium.vector.SyncVectorEnv([make_one] * {num_envs})"
            raise ProtocolError(f"environment: got one {type(source).__name__}, a gymnasium.Env, expected {rows}")
        if gymnasium is not None and isinstance(source, gymnasium.vector.VectorEnv):
            from metta_fastagent.train.environments.gym import GymnasiumEnvironment

            source = GymnasiumEnvironment(source, device)
        return Environment(source, num_envs, device, seed)


@contextmanager
def _workers_without_ctrl_c() -> Iterator[None]:
    """Processes started here never receive Ctrl-C, which goes to the whole group: the trainer stops them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` if it is an int in `[low, high]`; otherwise raise a TypeError or a ValueError."""
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    checked = require_integer(name, value, expected, low)
    if high is not None and checked > high:
        raise ValueError(f"{name}: got {checked}, expected {expected}")
    return checked


def check_seed(seed: object) -> int:
    """Return `seed` if every torch.Generator accepts it; otherwise raise a TypeError or a ValueError."""
    return check_int("seed", seed, 0, MAX_SEED)
