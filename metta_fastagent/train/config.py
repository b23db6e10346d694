"""TrainConfig: the hyperparameters of a run, their ranges and their defaults per environment."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from metta_fastagent.runtime.checks import describe, first_line, require_integer, require_number

Check = tuple[str, Callable[[Any], bool]]

POSITIVE_INT: Check = ("an integer above 0", lambda value: value > 0)
NON_NEGATIVE_INT: Check = ("an integer of at least 0", lambda value: value >= 0)
POSITIVE: Check = ("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
NON_NEGATIVE: Check = ("a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0)
FRACTION: Check = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
NUMBER: Check = ("a number, inf for never", lambda value: not math.isnan(value))
CLIP_MODE: Check = ("one of absolute, init_scaled", lambda value: value in ("absolute", "init_scaled"))
FLAG: Check = ("True or False", lambda value: True)
SEED: Check = ("an integer from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31)


def option(default: Any, help: str, check: Check) -> Any:
    return field(default=default, metadata={"help": help, "check": check})


# Defaults of the built-in environments that differ from TrainConfig's.
DEFAULTS: dict[str, dict[str, Any]] = {
    # With larger or noisier Adam steps the entropy collapses before the policy tells all cues apart; four passes make
    # up for the smaller steps. When almost every episode succeeds, advantages are small: scaled to a standard deviation
    # of 1, four passes over them can undo what was learned, so the KL limit ends an update that goes too far. The
    # learning rate falls in runs not yet solved.
    "memory": {"steps": 360_000, "epochs": 4, "target_kl": 0.03, "ent_coef": 0.002, "max_grad_norm": 0.15}
    | {"anneal_lr": 1 / 3, "advantage_floor": 0.2, "normalize_returns": False}
    | {"stop_return": 0.98, "evaluation_interval": 10},
    # All rows start and end their 64-step episodes together, so a segment is a whole episode: no update sees only its
    # beginning or its end. Four passes with a KL limit learn twice as much from a rollout as two without.
    "mettagrid": {"num_envs": 64, "segment_length": 64, "minibatches": 8, "normalize_returns": False}
    | {"epochs": 4, "target_kl": 0.03, "anneal_lr": 0.5},
}
# For gymnasium's environments (`--env gym:ID`), whose episodes are long.
GYMNASIUM = {"gamma": 0.99, "anneal_lr": 1.0}
ENVIRONMENT: Check = (
    f"one of {', '.join(DEFAULTS)}, gym:ID, package.module:make_env",
    lambda value: value in DEFAULTS or ":" in value,
)
AGENT: Check = ("auto or package.module:MyAgent", lambda value: value == "auto" or ":" in value)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The hyperparameters of one run; `TrainConfig.for_environment` has the defaults for an environment.

    Raises ValueError for a value out of range, TypeError for a wrong type; both name the field.

    Example:
        >>> TrainConfig(steps=10_000, lr=1e-3).num_envs
        128
    """

    env: str = option("memory", f"environment to train on: {ENVIRONMENT[0]}", ENVIRONMENT)
    agent: str = option("auto", "package.module:MyAgent; auto: Fast for tokens, else VectorAgent", AGENT)
    device: str = option("cpu", "torch device, such as cpu or cuda", ("the name of a device", bool))
    seed: int = option(1, "seed of the weights, the environment and the actions", SEED)
    steps: int = option(200_000, "environment steps of all rows and ranks, rounded up to whole rollouts", POSITIVE_INT)
    # Fast's forward and backward take most of the time, so a step's cost does not depend on how steps are batched:
    # small rollouts give the most optimizer steps for that cost.
    num_envs: int = option(128, "parallel rows of the environment, per rank", POSITIVE_INT)
    segment_length: int = option(16, "steps per segment, the length of backpropagation through time", POSITIVE_INT)
    epochs: int = option(2, "passes over each rollout", POSITIVE_INT)
    minibatches: int = option(4, "minibatches per pass, each a set of whole segments", POSITIVE_INT)
    accumulate: int = option(1, "micro-batches per minibatch, whose gradients are accumulated", POSITIVE_INT)
    lr: float = option(5e-4, "Adam's learning rate", POSITIVE)
    anneal_lr: float = option(0.0, "share of --steps, the last, in which the learning rate falls to 0", FRACTION)
    # both built-in games give their reward within a dozen steps
    gamma: float = option(0.95, "discount per step", FRACTION)
    gae_lambda: float = option(0.9, "lambda of generalized advantage estimation", FRACTION)
    normalize_returns: bool = option(True, "learn from rewards divided by the running deviation of returns", FLAG)
    advantage_floor: float = option(0.0, "smallest deviation that is scaled to 1 in the advantages", NON_NEGATIVE)
    bootstrap_truncations: bool = option(True, "value truncated episodes by their final observation", FLAG)
    clip_coef: float = option(0.2, "clip range of the importance ratio", POSITIVE)
    vf_clip_coef: float = option(0.0, "clip range of the value around the rollout's, 0 for none", NON_NEGATIVE)
    target_kl: float = option(0.0, "end an update after a pass whose KL exceeds this, 0 for never", NON_NEGATIVE)
    vf_coef: float = option(0.5, "weight of the value loss", NON_NEGATIVE)
    ent_coef: float = option(0.003, "weight of the entropy bonus", NON_NEGATIVE)
    max_grad_norm: float = option(0.5, "maximum gradient norm", POSITIVE)
    clip_range: float = option(0.0, "range of the weight clip after each optimizer step, 0 for none", NON_NEGATIVE)
    clip_mode: str = option("absolute", "absolute or init_scaled", CLIP_MODE)
    l2_init_coef: float = option(0.0, "weight of the squared distance to the initial weights", NON_NEGATIVE)
    analyze_weights_interval: int = option(300, "updates between weight metrics, 0 for none", NON_NEGATIVE_INT)
    evaluation_interval: int = option(50, "updates between evaluations that keep best.pt, 0 for none", NON_NEGATIVE_INT)
    stop_return: float = option(math.inf, "stop after two evaluations in a row of at least this return", NUMBER)
    checkpoint_interval: int = option(50, "updates between checkpoints, 0 for one at the end only", NON_NEGATIVE_INT)
    check_ranks: int = option(0, "updates between comparisons of all ranks' parameters, 0 for none", NON_NEGATIVE_INT)
    cuda_graphs: bool = option(False, "replay the steps of agent and optimizer from CUDA graphs", FLAG)
    # batches are too small for a second thread to help much, and it waits if a core is busy; also, with one thread
    # results do not depend on the number of cores
    threads: int = option(1, "CPU threads of torch, 0 for torch's default", NON_NEGATIVE_INT)
    reset_state_every_step: bool = option(False, "ablation: zero the LSTM state at every step (no memory)", FLAG)
    zero_segment_state: bool = option(False, "ablation: train segments from a zero LSTM state", FLAG)

    @classmethod
    def for_environment(cls, env: str = "memory", **changes: Any) -> "TrainConfig":
        """The defaults of environment `env`, overridden by `changes`."""
        own = GYMNASIUM if env.startswith("gym:") else DEFAULTS.get(env, {})
        return cls(env=env, **{**own, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`. Raises TypeError for unknown fields."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = _checked(each.name, getattr(self, each.name), each.type, each.metadata["check"])
            # plain numbers, because a checkpoint cannot hold NumPy's
            object.__setattr__(self, each.name, value)
        if self.num_envs % self.minibatches:
            raise ValueError(f"minibatches: got {self.minibatches}, expected a divisor of num_envs ({self.num_envs})")
        rows = self.num_envs // self.minibatches
        if rows % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of a minibatch's rows ({rows})")
        device = require_device("device", self.device)
        if self.cuda_graphs and device.type != "cuda":
            raise ValueError(f"cuda_graphs: got True with device {self.device}, expected a CUDA device")

    def steps_per_update(self, ranks: int = 1) -> int:
        """Environment steps per update with `ranks` ranks."""
        return ranks * self.num_envs * self.segment_length

    def updates(self, ranks: int = 1) -> int:
        """Updates in the whole run with `ranks` ranks; `steps` is rounded up to whole rollouts."""
        return -(-self.steps // self.steps_per_update(ranks))


def _checked(name: str, value: Any, kind: Any, check: Check) -> Any:
    expected, accepts = check
    if kind in (int, float):
        value = (require_integer if kind is int else require_number)(name, value, expected)
    elif not isinstance(value, kind):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    if not accepts(value):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return value


def require_device(name: str, value: object) -> torch.device:
    """`value` as a torch.device with its index, on which tensors and random generators can be created."""
    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name}: got {describe(value)}, expected a torch.device or its name")
    try:
        device = torch.empty(0, device=value).device
        torch.Generator(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        expected = f"an available torch device ({first_line(error)})"
        raise ValueError(f"{name}: got {str(value)!r}, expected {expected}") from None
