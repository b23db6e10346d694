"""Evaluation: mean returns of the learned, a random and a scripted policy in the same worlds."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from metta_fastagent import ActionSpace
from metta_fastagent.ops._checks import first_line
from metta_fastagent.train import agents
from metta_fastagent.train.checkpoint import CheckpointError, load_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Environment, make_environment

# (observations [N, ...], dones bool [N], truncateds bool [N]) -> actions [N, 2]
Policy = Callable[[Tensor, Tensor, Tensor], Tensor]

# seeds of evaluation worlds start here; those of training are below 2**31
FIRST_SEED = 2**31
# many worlds of few rows: rows of a world may share a map, so only worlds are independent samples
WORLDS = 16
ROWS = 32
# checking whether all rows have finished is a host sync
STEPS_BETWEEN_CHECKS = 16
# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; the last one is conservative for more
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Evaluation:
    """Mean episode return over rows, one value per world; the policies played in the same worlds."""

    random: tuple[float, ...]
    learned: tuple[float, ...]
    scripted: tuple[float, ...] | None

    @property
    def score(self) -> float | None:
        """(learned - random) / (scripted - random) of the means; None without a scripted policy that beats random."""
        if self.scripted is None:
            return None
        low, high = statistics.fmean(self.random), statistics.fmean(self.scripted)
        return (statistics.fmean(self.learned) - low) / (high - low) if high > low else None

    @property
    def difference(self) -> tuple[float, float]:
        """Mean of learned - random, paired by world, and the lower bound of its two-sided 95 % confidence interval."""
        return mean_and_lower_bound([a - b for a, b in zip(self.learned, self.random, strict=True)])


def mean_and_lower_bound(samples: Sequence[float]) -> tuple[float, float]:
    """Mean of independent samples and the lower bound of its 95 % Student t interval (-inf for one sample)."""
    mean = statistics.fmean(samples)
    if len(samples) < 2:
        return mean, -math.inf
    quantile = STUDENT_T[min(len(samples) - 1, len(STUDENT_T)) - 1]
    return mean, mean - quantile * statistics.stdev(samples) / math.sqrt(len(samples))


def random_policy(env: Environment, generator: torch.Generator) -> Policy:
    """Uniform over all legal (type, parameter) pairs."""
    pairs = ActionSpace(env.action_names, env.max_action_args).action_index_tensor.to(env.device)

    def act(observations: Tensor, dones: Tensor, truncateds: Tensor) -> Tensor:
        return pairs[torch.randint(len(pairs), (env.num_envs,), generator=generator, device=env.device)]

    return act


def learned_policy(agent: Any, reset_state_every_step: bool = False, greedy: bool = False) -> Policy:
    """Samples from the agent, or with `greedy` takes its likeliest action; every call advances its rollout memory."""

    def act(observations: Tensor, dones: Tensor, truncateds: Tensor) -> Tensor:
        starts = torch.ones_like(dones) if reset_state_every_step else dones
        entries: dict[str, Any] = {"env_obs": observations, "dones": starts, "truncateds": truncateds}
        with agent.greedy() if greedy else nullcontext():
            return agent(TensorDict(entries, batch_size=dones.shape))["actions"]

    return act


def play(env: Environment, policy: Policy, seed: int, limit: int) -> Tensor:
    """Reset `env` to `seed` and play the first episode of every row, up to `limit` steps. Returns, float [N]."""
    observations = env.reset(seed)
    dones = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    truncateds = torch.zeros_like(dones)
    running = torch.ones_like(dones)
    returns = torch.zeros(env.num_envs, device=env.device)
    for t in range(limit):
        step = env.step(policy(observations, dones, truncateds))
        returns += step.rewards * running
        running &= ~(step.terminals | step.truncations)
        observations, dones, truncateds = step.observations, step.terminals, step.truncations
        if (t + 1) % STEPS_BETWEEN_CHECKS == 0 and not running.any():
            break
    return returns


@torch.no_grad()
def play_worlds(
    agent: Any,
    env: Environment,
    config: TrainConfig,
    names: Sequence[str] = ("learned",),
    worlds: int = WORLDS,
    *,
    greedy: bool = False,
    limit: int = 10_000,
) -> dict[str, list[Tensor]]:
    """Play one episode per row with each policy of `names`: learned, random, scripted. Returns [N] for each world.

    Changes neither the agent's rollout memory nor torch's random state. Without a scripted policy its list is empty.
    """
    # shares the weights, but has its own rollout memory
    player = copy.copy(agent.policy)
    player.allocate_memory(env.num_envs)
    returns: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        for seed in range(FIRST_SEED, FIRST_SEED + worlds):
            player.reset_memory()
            policies = {
                "random": random_policy(env, torch.Generator(env.device).manual_seed(seed)),
                "learned": learned_policy(player, config.reset_state_every_step, greedy),
                "scripted": lambda *observed: env.scripted_actions(),
            }
            for name in names if hasattr(env, "scripted_actions") else set(names) - {"scripted"}:
                # the same worlds for an environment that draws from torch's generator
                torch.manual_seed(seed)
                returns[name].append(play(env, policies[name], seed, limit))
    return returns


def evaluate(agent: Any, env: Environment, config: TrainConfig, worlds: int = WORLDS) -> Evaluation:
    """Play one episode per row of `env` with each of the three policies, in `worlds` worlds; see `play_worlds`."""
    played = play_worlds(agent, env, config, ("random", "learned", "scripted"), worlds)
    means = {name: tuple(row.mean().item() for row in rows) for name, rows in played.items()}
    return Evaluation(means["random"], means["learned"], means["scripted"] or None)


def load_agent(
    path: Path | str, num_envs: int = 1, device: str = "cpu", make_env: Any = None, make_agent: Any = None
) -> tuple[Any, Environment, TrainConfig]:
    """The agent of a checkpoint for acting, an environment of `num_envs` rows for it, and the run's configuration.

    A step is `agent(TensorDict({"env_obs": observations, "dones": starts}, [num_envs]))["actions"]`, (type, parameter)
    pairs [num_envs, 2]; `starts` is True where an episode starts. `make_env` and `make_agent` are those of `train`;
    without them, the checkpoint's names are imported.

    Raises CheckpointError if the file is unusable or of another network, and the errors of `make_agent`.
    """
    state = load_checkpoint(Path(path))
    config = TrainConfig.from_dict({**state["config"], "device": device, "cuda_graphs": False})
    env = make_environment(make_env or config.env, num_envs, torch.device(device))
    agent = agents.make_agent(config, env, make_agent)
    try:
        agent.policy.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: got another network ({first_line(error)}), expected the agent's own") from error
    return agent.eval(), env, config
