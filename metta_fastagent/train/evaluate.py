"""Evaluation: mean returns of the learned, a random and a scripted policy in the same worlds."""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from metta_fastagent import ActionSpace
from metta_fastagent.runtime.checks import first_line
from metta_fastagent.runtime.settings import random_state_kept
from metta_fastagent.train import agents, ranks
from metta_fastagent.train.checkpoint import CheckpointError, load_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Environment, ProtocolError, make_environment

# (observations [N, ...], dones bool [N], truncateds bool [N]) -> actions [N, 2]
Policy = Callable[[Tensor, Tensor, Tensor], Tensor]

# First seeds of the worlds for the final score, and for evaluations during training, which decide when to stop and
# which checkpoint is best; training seeds are below 2**31.
FIRST_SEED, CHOICE_SEED = 2**31, 3 * 2**30
# many worlds with few rows: rows of a world may share a map, so only worlds are independent samples
WORLDS = 16
ROWS = 32
# on a device, checking whether all rows have finished is a host sync
STEPS_BETWEEN_CHECKS = 16
# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; the last one is conservative for more
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Evaluation:
    """Mean episode return over rows, one value per world; all policies played in the same worlds.

    `learned` is the agent at the end, `best` the one in best.pt, or None if there is none.
    """

    random: tuple[float, ...]
    learned: tuple[float, ...]
    scripted: tuple[float, ...] | None
    best: tuple[float, ...] | None = None

    @property
    def score(self) -> float | None:
        """(learned - random) / (scripted - random) of the means; None unless a scripted policy beats random."""
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
    """Uniform over all (type, parameter) pairs that are legal under the environment's mask, if it has one."""
    pairs = ActionSpace(env.action_names, env.max_action_args).action_index_tensor.to(env.device)

    def act(observations: Tensor, dones: Tensor, truncateds: Tensor) -> Tensor:
        if env.action_mask is not None:
            return pairs[torch.multinomial(env.action_mask.float(), 1, generator=generator).squeeze(1)]
        return pairs[torch.randint(len(pairs), (env.num_envs,), generator=generator, device=env.device)]

    return act


def learned_policy(agent: Any, env: Environment, reset_state_every_step: bool = False, greedy: bool = False) -> Policy:
    """Samples a legal action, or with `greedy` takes the most likely one; calls advance the agent's rollout memory."""

    def act(observations: Tensor, dones: Tensor, truncateds: Tensor) -> Tensor:
        starts = torch.ones_like(dones) if reset_state_every_step else dones
        entries: dict[str, Any] = {"env_obs": observations, "dones": starts, "truncateds": truncateds}
        if env.action_mask is not None:
            entries["action_mask"] = env.action_mask
        with agent.greedy() if greedy else nullcontext():
            return agent(TensorDict(entries, batch_size=dones.shape))["actions"]

    return act


@contextmanager
def _player(policy: Any, num_envs: int) -> Iterator[Any]:
    """A copy of `policy` in evaluation mode, with its own memory and counts but the same modules.

    Modes and buffers of the modules are restored after the `with` block.
    """
    # the object that torch.compile returns sets attributes on the agent inside it, even in a copy
    policy = getattr(policy, "_orig_mod", policy)
    player = copy.copy(policy)
    player.__dict__.pop("_agent_state", None)
    player.allocate_memory(num_envs)
    modes = [(module, module.training) for module in policy.modules()]
    owners = [module._buffers for module in policy.modules()]
    kept = [(owner, name, buffer) for owner in owners for name, buffer in owner.items() if buffer is not None]
    buffers = [(*each, each[-1].clone()) for each in kept]
    try:
        yield player.eval()
    finally:
        for module, training in modes:
            module.training = training
        for owner, name, buffer, before in buffers:
            owner[name] = buffer.copy_(before)


def play(env: Environment, policy: Policy, seed: int, limit: int) -> Tensor:
    """Reset `env` to `seed` and play the first episode of every row, up to `limit` steps. Returns, float [N]."""
    observations = env.reset(seed)
    dones = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    truncateds = torch.zeros_like(dones)
    running = torch.ones_like(dones)
    returns = torch.zeros(env.num_envs, device=env.device)
    interval = 1 if env.device.type == "cpu" else STEPS_BETWEEN_CHECKS
    for t in range(limit):
        step = env.step(policy(observations, dones, truncateds))
        returns += step.rewards * running
        running &= ~(step.terminals | step.truncations)
        observations, dones, truncateds = step.observations, step.terminals, step.truncations
        if (t + 1) % interval == 0 and not running.any():
            break
    else:
        if cut := int(running.sum()):
            ranks.say(
                f"note: {cut} of {len(running)} evaluated episodes were cut after {limit} steps, at their return so far"
            )
    if not returns.isfinite().all():
        row = int((~returns.isfinite()).nonzero()[0])
        raise ProtocolError(f"step: rewards: got a sum of {returns[row].item()} in row {row}, expected finite numbers")
    return returns


@torch.no_grad()
def play_worlds(
    agent: Any,
    env: Environment,
    config: TrainConfig,
    names: Sequence[str] = ("learned",),
    worlds: int = WORLDS,
    *,
    first_seed: int = FIRST_SEED,
    greedy: bool = False,
    limit: int = 10_000,
) -> dict[str, list[Tensor]]:
    """Play one episode per row with each policy in `names`: learned, random, scripted. Returns [N] for each world.

    The agent plays in evaluation mode. Its memory, buffers, modes and counts do not change, nor does torch's random
    state. Without a scripted policy its list is empty.
    """
    returns: dict[str, list[Tensor]] = {name: [] for name in names}
    with random_state_kept(env.device), _player(agent.policy, env.num_envs) as player:
        for seed in range(first_seed, first_seed + worlds):
            player.reset_memory()
            policies = {
                "random": random_policy(env, torch.Generator(env.device).manual_seed(seed)),
                "learned": learned_policy(player, env, config.reset_state_every_step, greedy),
                "scripted": lambda *observed: env.scripted_actions(),
            }
            for name in names if hasattr(env, "scripted_actions") else set(names) - {"scripted"}:
                # gives the same worlds if the environment draws from torch's generator
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
    """The agent of checkpoint `path`, for acting on `device`; an environment of `num_envs` rows; its TrainConfig.

    A step is `agent(TensorDict({"env_obs": observations, "dones": starts}, [num_envs]))["actions"]`, (type, parameter)
    pairs [num_envs, 2]; `starts` is True where an episode starts. An environment with masks has the current mask in
    `env.action_mask`; put it into the TensorDict as `action_mask`. Pass `make_env` and `make_agent` as to `train`;
    without them, the names in the checkpoint are imported.

    Raises CheckpointError if the file is unusable or belongs to another network, and the errors of `make_agent`.

    Example:
        agent, env, config = load_agent("runs/cartpole/best.pt", num_envs=1)
        observations, starts = env.reset(seed=0), torch.tensor([True])
        actions = agent(TensorDict({"env_obs": observations, "dones": starts}, [1]))["actions"]
    """
    state = load_checkpoint(Path(path))
    config = TrainConfig.from_dict({**state["config"], "device": device, "cuda_graphs": False})
    with random_state_kept(torch.device(device)):
        env = make_environment(make_env or config.env, num_envs, torch.device(device))
        agent = agents.make_agent(config, env, make_agent)
    try:
        agent.policy.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path}: got another network ({first_line(error)}), expected the agent's own") from error
    env.load_statistics(state["ranks"][0]["environment"])
    return agent.eval(), env, config
