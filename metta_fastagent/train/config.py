"""TrainConfig: every hyperparameter of a run, its range, and its default per environment."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

Check = tuple[str, Callable[[Any], bool]]

POSITIVE_INT: Check = ("an integer above 0", lambda value: value > 0)
NON_NEGATIVE_INT: Check = ("an integer of at least 0", lambda value: value >= 0)
POSITIVE: Check = ("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
NON_NEGATIVE: Check = ("a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0)
FRACTION: Check = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
FLAG: Check = ("true or false", lambda value: True)
SEED: Check = ("an integer from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31)


def one_of(*names: str) -> Check:
    return f"one of {', '.join(names)}", lambda value: value in names


def option(help: str, check: Check) -> Any:
    return field(metadata={"help": help, "check": check})


# What differs between the environments, and why. Everything else is in COMMON.
DEFAULTS: dict[str, dict[str, Any]] = {
    # The plateau of walking to the board and pressing any switch is left after 50 to 250 thousand steps.
    "memory": {"steps": 400_000},
    # All rows start and end their 64-step episodes together, so a segment is a whole episode: no update sees only its
    # beginning or its end. Shorter segments and twice the step size learned more on most seeds and nothing on one.
    "mettagrid": {"steps": 200_000, "num_envs": 64, "segment_length": 64, "minibatches": 8, "lr": 5e-4},
}
COMMON: dict[str, Any] = {
    "device": "cpu",
    "seed": 1,
    # Fast's forward and backward are most of the time, so a step's price does not depend on how the steps are batched:
    # small rollouts and two passes give the most optimizer steps for it.
    "num_envs": 128,
    "segment_length": 16,
    "epochs": 2,
    "minibatches": 4,
    "accumulate": 1,
    "lr": 1e-3,
    "anneal_lr": False,
    # both games pay within a dozen steps
    "gamma": 0.95,
    "gae_lambda": 0.9,
    "bootstrap_truncations": True,
    "clip_coef": 0.2,
    "vf_clip_coef": 0.0,
    "target_kl": 0.0,
    "vf_coef": 0.5,
    # at 0.01 the learned policy of the memory task stays half random
    "ent_coef": 0.003,
    "max_grad_norm": 0.5,
    "clip_range": 0.0,
    "clip_mode": "absolute",
    "l2_init_coef": 0.0,
    "analyze_weights_interval": 300,
    "checkpoint_interval": 50,
    "check_ranks": 0,
    # batches are too small for a second thread to gain much, and it waits for a busy core; also, results then do not
    # depend on the number of cores
    "threads": 1,
    "reset_state_every_step": False,
    "zero_segment_state": False,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The hyperparameters of one run. Build it with `TrainConfig.for_environment`, which fills in the defaults.

    Raises ValueError (a value out of its range) or TypeError (a value of another type); both name the field.
    """

    env: str = option("environment to train on", one_of(*DEFAULTS))
    device: str = option("torch device, such as cpu or cuda", ("the name of a device", bool))
    seed: int = option("seed of the weights, the environment and the draws", SEED)
    steps: int = option("environment steps in total, over all rows and ranks", POSITIVE_INT)
    num_envs: int = option("rows stepped at once, on each rank", POSITIVE_INT)
    segment_length: int = option("steps per segment that gradients flow through", POSITIVE_INT)
    epochs: int = option("passes over each rollout", POSITIVE_INT)
    minibatches: int = option("minibatches per pass, each a set of whole segments", POSITIVE_INT)
    accumulate: int = option("micro-batches per minibatch, whose gradients add up to one step", POSITIVE_INT)
    lr: float = option("Adam's learning rate", POSITIVE)
    anneal_lr: bool = option("let the learning rate fall linearly to 0 over --steps", FLAG)
    gamma: float = option("discount per step", FRACTION)
    gae_lambda: float = option("decay of the advantage estimator", FRACTION)
    bootstrap_truncations: bool = option("let the value of the final observation follow a truncated episode", FLAG)
    clip_coef: float = option("PPO's clip of the importance ratio", POSITIVE)
    vf_clip_coef: float = option("PPO2's clip of the value around the rollout's, 0 for none", NON_NEGATIVE)
    target_kl: float = option("begin no further pass after one with a larger approximate KL, 0 for none", NON_NEGATIVE)
    vf_coef: float = option("weight of the value loss", NON_NEGATIVE)
    ent_coef: float = option("weight of the entropy bonus", NON_NEGATIVE)
    max_grad_norm: float = option("largest norm of the whole gradient", POSITIVE)
    clip_range: float = option("the mixin's weight clip after each optimizer step, 0 for none", NON_NEGATIVE)
    clip_mode: str = option("how clip_range is read", one_of("absolute", "init_scaled"))
    l2_init_coef: float = option("weight of the distance to the initial weights", NON_NEGATIVE)
    analyze_weights_interval: int = option("updates between two weight metrics, 0 for none", NON_NEGATIVE_INT)
    checkpoint_interval: int = option("updates between two checkpoints, 0 for one at the end", NON_NEGATIVE_INT)
    check_ranks: int = option("updates between two comparisons of all ranks' parameters, 0 for none", NON_NEGATIVE_INT)
    threads: int = option("threads that torch uses on the CPU, 0 for its own choice", NON_NEGATIVE_INT)
    reset_state_every_step: bool = option("ablation: zero the LSTM's state at each step (no memory)", FLAG)
    zero_segment_state: bool = option("ablation: train each segment from zeros, not from the rollout's state", FLAG)

    @classmethod
    def for_environment(cls, env: str = "memory", **changes: Any) -> "TrainConfig":
        """The defaults of environment `env`, with `changes` on top."""
        if env not in DEFAULTS:
            raise ValueError(f"env must be one of {', '.join(DEFAULTS)}, got {env!r}")
        return cls(env=env, **{**COMMON, **DEFAULTS[env], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`; fields that are missing or unknown are a ValueError."""
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            raise ValueError(f"config must have exactly the fields of TrainConfig, differs in {names ^ set(values)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_field(each.name, getattr(self, each.name), each.type, each.metadata["check"])
        if self.num_envs % self.minibatches:
            raise ValueError(f"minibatches must divide num_envs ({self.num_envs}), got {self.minibatches}")
        rows = self.num_envs // self.minibatches
        if rows % self.accumulate:
            raise ValueError(f"accumulate must divide the rows of a minibatch ({rows}), got {self.accumulate}")
        _check_device(self.device)

    def steps_per_update(self, ranks: int = 1) -> int:
        """Environment steps in one update of `ranks` ranks."""
        return ranks * self.num_envs * self.segment_length

    def updates(self, ranks: int = 1) -> int:
        """Updates in the whole run: `steps` rounded up to whole rollouts of `ranks` ranks."""
        return -(-self.steps // self.steps_per_update(ranks))


def _check_field(name: str, value: Any, kind: Any, check: Check) -> None:
    expected, accepts = check
    # bool is an int to Python; an int is as good as a float
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")
    if not accepts(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be a device that torch can use here, got {name!r} ({reason})") from None
