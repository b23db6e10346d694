"""TrainConfig: the hyperparameters of a run, their ranges and their defaults per environment."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from metta_fastagent.ops._checks import describe, first_line, require_integer, require_number

Check = tuple[str, Callable[[Any], bool]]

POSITIVE_INT: Check = ("an integer above 0", lambda value: value > 0)
NON_NEGATIVE_INT: Check = ("an integer of at least 0", lambda value: value >= 0)
POSITIVE: Check = ("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
NON_NEGATIVE: Check = ("a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0)
FRACTION: Check = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
FLAG: Check = ("True or False", lambda value: True)
SEED: Check = ("an integer from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31)


def one_of(*names: str) -> Check:
    return f"one of {', '.join(names)}", lambda value: value in names


def option(help: str, check: Check) -> Any:
    return field(metadata={"help": help, "check": check})


# Defaults that differ between the environments; all others are in COMMON.
DEFAULTS: dict[str, dict[str, Any]] = {
    # Larger Adam steps, or noisier ones of smaller minibatches, saturate the LSTM before it separates all cues: two of
    # them reach the same state, and no gradient separates them again. Four passes make up for the smaller steps.
    # With an entropy bonus of 0.005, two seeds in ten fell back at the end.
    "memory": {"steps": 300_000, "epochs": 4, "ent_coef": 0.002},
    # All rows start and end their 64-step episodes together, so a segment is a whole episode: no update sees only its
    # beginning or its end. Shorter segments and twice the step size learned more on most seeds and nothing on one.
    "mettagrid": {"steps": 200_000, "num_envs": 64, "segment_length": 64, "minibatches": 8},
}
COMMON: dict[str, Any] = {
    "device": "cpu",
    "seed": 1,
    # Fast's forward and backward are most of the time, so a step's price does not depend on how the steps are batched:
    # small rollouts give the most optimizer steps for it.
    "num_envs": 128,
    "segment_length": 16,
    "epochs": 2,
    "minibatches": 4,
    "accumulate": 1,
    "lr": 5e-4,
    "anneal_lr": False,
    # both games pay within a dozen steps
    "gamma": 0.95,
    "gae_lambda": 0.9,
    "bootstrap_truncations": True,
    "clip_coef": 0.2,
    "vf_clip_coef": 0.0,
    "target_kl": 0.0,
    "vf_coef": 0.5,
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
    """The hyperparameters of one run. `TrainConfig.for_environment` fills in the defaults.

    Raises ValueError for a value out of range and TypeError for a wrong type; both name the field.
    """

    env: str = option("environment to train on", one_of(*DEFAULTS))
    device: str = option("torch device, such as cpu or cuda", ("the name of a device", bool))
    seed: int = option("seed of the weights, the environment and the actions", SEED)
    steps: int = option("total environment steps of all rows and ranks, rounded up to whole rollouts", POSITIVE_INT)
    num_envs: int = option("parallel rows of the environment, per rank", POSITIVE_INT)
    segment_length: int = option("steps per segment, the length of backpropagation through time", POSITIVE_INT)
    epochs: int = option("passes over each rollout", POSITIVE_INT)
    minibatches: int = option("minibatches per pass, each a set of whole segments", POSITIVE_INT)
    accumulate: int = option("micro-batches per minibatch, whose gradients are accumulated", POSITIVE_INT)
    lr: float = option("Adam's learning rate", POSITIVE)
    anneal_lr: bool = option("anneal the learning rate linearly to 0 over --steps", FLAG)
    gamma: float = option("discount per step", FRACTION)
    gae_lambda: float = option("lambda of generalized advantage estimation", FRACTION)
    bootstrap_truncations: bool = option("bootstrap truncated episodes with the value of their final observation", FLAG)
    clip_coef: float = option("clip range of the importance ratio", POSITIVE)
    vf_clip_coef: float = option("clip range of the value around that of the rollout, 0 for none", NON_NEGATIVE)
    target_kl: float = option("end an update after a pass whose approximate KL exceeds this, 0 for never", NON_NEGATIVE)
    vf_coef: float = option("weight of the value loss", NON_NEGATIVE)
    ent_coef: float = option("weight of the entropy bonus", NON_NEGATIVE)
    max_grad_norm: float = option("maximum gradient norm", POSITIVE)
    clip_range: float = option("range of the mixin's weight clip after each optimizer step, 0 for none", NON_NEGATIVE)
    clip_mode: str = option("meaning of --clip-range: absolute or init_scaled", one_of("absolute", "init_scaled"))
    l2_init_coef: float = option("weight of the squared distance to the initial weights", NON_NEGATIVE)
    analyze_weights_interval: int = option("updates between weight metrics, 0 for none", NON_NEGATIVE_INT)
    checkpoint_interval: int = option("updates between checkpoints, 0 for one at the end only", NON_NEGATIVE_INT)
    check_ranks: int = option("updates between comparisons of all ranks' parameters, 0 for none", NON_NEGATIVE_INT)
    threads: int = option("CPU threads of torch, 0 for torch's default", NON_NEGATIVE_INT)
    reset_state_every_step: bool = option("ablation: zero the LSTM state at every step (no memory)", FLAG)
    zero_segment_state: bool = option("ablation: train segments from a zero LSTM state, not the stored one", FLAG)

    @classmethod
    def for_environment(cls, env: str = "memory", **changes: Any) -> "TrainConfig":
        """The defaults of environment `env`, overridden by `changes`."""
        if env not in DEFAULTS:
            raise ValueError(f"env: got {env!r}, expected one of {', '.join(DEFAULTS)}")
        return cls(env=env, **{**COMMON, **DEFAULTS[env], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`. Raises ValueError for missing or unknown fields."""
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            differing = ", ".join(sorted(map(str, names ^ set(values))))
            raise ValueError(f"config: got missing or unknown fields ({differing}), expected those of TrainConfig")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = _checked(each.name, getattr(self, each.name), each.type, each.metadata["check"])
            # plain numbers: a checkpoint cannot hold those of NumPy
            object.__setattr__(self, each.name, value)
        if self.num_envs % self.minibatches:
            raise ValueError(f"minibatches: got {self.minibatches}, expected a divisor of num_envs ({self.num_envs})")
        rows = self.num_envs // self.minibatches
        if rows % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of a minibatch's rows ({rows})")
        require_device("device", self.device)

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
        reason = first_line(error)
        raise ValueError(f"{name}: got {str(value)!r}, expected an available torch device ({reason})") from None
