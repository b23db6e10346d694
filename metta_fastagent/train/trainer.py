"""Trainer: collect a rollout, learn from it, log, checkpoint; and back from a checkpoint to where it stood."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

import metta_fastagent
from metta_fastagent import Fast, MettaAgent, ops
from metta_fastagent.train import ppo
from metta_fastagent.train.checkpoint import CheckpointError
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import make_environment
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.stopwatch import PHASES, Stopwatch

# Fast's LSTM starts almost saturated (biases of 1) and its first gradients are tiny: PPO's usual 1e-5 slows it down.
ADAM_EPSILON = 1e-8
COLUMNS = (
    *("update", "steps", "seconds", "cpu_seconds", "steps_per_second", "episodes", "mean_return"),
    *ppo.STATISTICS,
    *("explained_variance", "lr"),
    *(f"{phase}_seconds" for phase in PHASES),
)

Memory = tuple[dict[int, Tensor], dict[int, Tensor]]


class TrainingDiverged(RuntimeError):
    """A loss or the gradient is not finite any more; further updates would only spread it."""


class Trainer:
    """One run of recurrent PPO with `Fast` on the environment that `config` names.

    Attributes:
        config: TrainConfig.
        env: the vector environment.
        agent: MettaAgent around Fast.
        updates: updates done.
        steps: environment steps done, over all rows.
        seconds, cpu_seconds: wall and process CPU time spent in updates, also before a resume.

    Seeds torch's global generators. `config.threads` is for the caller to set, it concerns the whole process.
    Raises what `make_environment` raises (ImportError where the environment's package is missing).
    """

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = torch.device(config.device)
        self.env = make_environment(config.env, config.num_envs, self.device, config.seed, **options)
        self.agent = make_agent(config, self.env)
        self.optimizer = torch.optim.Adam(
            self.agent.parameters(), lr=config.lr, eps=ADAM_EPSILON, fused=self.device.type in ("cpu", "cuda")
        )
        self.stopwatch = Stopwatch(self.device)
        lstm = self.agent.policy.lstm
        sizes = (config.segment_length, self.env.num_tokens, lstm.num_layers, lstm.hidden_size)
        self.experience = Experience(config.num_envs, *sizes, self.device)
        self.updates, self.steps, self.seconds, self.cpu_seconds = 0, 0, 0.0, 0.0
        self._restart_environment(config.seed)

    def run(self, after_update: Callable[[dict[str, float]], None]) -> None:
        """Train up to `config.updates`, calling `after_update` with each update's row of COLUMNS."""
        while self.updates < self.config.updates:
            after_update(self.train_update())

    def train_update(self) -> dict[str, float]:
        """One rollout and one PPO update; returns the row for the log. Raises TrainingDiverged."""
        config = self.config
        wall, cpu = time.perf_counter(), time.process_time()
        lr = config.lr * (1 - self.updates / config.updates) if config.anneal_lr else config.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        episodes = self.collect()
        advantages = self.advantages()
        returns = advantages + self.experience.values
        self.agent.train()
        statistics = ppo.update(
            self.agent, self.optimizer, self.experience, advantages, returns, config, self.stopwatch
        )
        explained = ppo.explained_variance(self.experience.values, returns)
        # the only read of the update
        values = torch.cat([statistics, explained.view(1), episodes]).tolist()
        self.updates += 1
        self.steps += config.steps_per_update
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.seconds += wall
        self.cpu_seconds += cpu
        return self._row(values, lr, wall)

    def _row(self, values: list[float], lr: float, wall: float) -> dict[str, float]:
        *statistics, explained, finished, return_sum = values
        row = {
            "update": self.updates,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "steps_per_second": self.config.steps_per_update / wall,
            "episodes": finished,
            "mean_return": return_sum / finished if finished else math.nan,
            **dict(zip(ppo.STATISTICS, statistics, strict=True)),
            "explained_variance": explained if math.isfinite(explained) else math.nan,
            "lr": lr,
            **{f"{phase}_seconds": seconds for phase, seconds in self.stopwatch.read().items()},
        }
        unusable = [name for name in ppo.STATISTICS if not math.isfinite(row[name])]
        if unusable:
            raise TrainingDiverged(f"{', '.join(unusable)} not finite in update {self.updates}; try a lower --lr")
        return row

    @torch.no_grad()
    def collect(self) -> Tensor:
        """Fill `experience` with `segment_length` steps of every row.

        Returns float [2] on the device: episodes that ended, and the sum of their returns.
        """
        experience = self.experience
        # in the ablation the segments' state stays the zeros that it is made of
        if not self.config.zero_segment_state:
            experience.begin(self.memory())
        finished = torch.zeros(2, device=self.device)
        for t in range(experience.length):
            with self.stopwatch("inference"):
                starts = self._starts()
                td = self.agent(TensorDict({"env_obs": self.observations, **starts}, batch_size=self.dones.shape))
                actions, log_probs, values = td["actions"], td["act_log_prob"], td["values"]
                seen = {"observations": self.observations, **starts}
                experience.put(t, **seen, actions=actions, log_probs=log_probs, values=values)
            with self.stopwatch("environment"):
                step = self.env.step(actions)
            results = {"rewards": step.rewards, "terminals": step.terminals, "truncations": step.truncations}
            experience.put(t, **results)
            self.observations, self.dones, self.truncateds = step.observations, step.terminals, step.truncations
            ends = step.terminals | step.truncations
            self.episode_returns += step.rewards
            finished += torch.stack([ends.sum(), (self.episode_returns * ends).sum()])
            self.episode_returns *= ~ends
        return finished

    def advantages(self) -> Tensor:
        """Advantages of the collected rollout, float [B, T].

        Nothing follows the end of an episode, be it a termination or a truncation: what counts in both environments is
        the return within the time limit. The rollout's last step bootstraps from the next observation.
        """
        experience = self.experience
        return ppo.generalized_advantages(
            experience.rewards,
            experience.values,
            experience.terminals | experience.truncations,
            self.next_value(),
            torch.zeros_like(experience.values),
            self.config.gamma,
            self.config.gae_lambda,
        )

    @torch.no_grad()
    def next_value(self) -> Tensor:
        """Value of the observation after the rollout, float [B], by a segment of one step.

        The training mode neither advances the rollout memory nor draws random numbers.
        """
        with self.stopwatch("inference"):
            h, c = self.memory()
            entries: dict[str, Any] = {"env_obs": self.observations, **self._starts()}
            entries = {name: value.unsqueeze(1) for name, value in entries.items()}
            entries |= {"lstm_h": h.transpose(0, 1), "lstm_c": c.transpose(0, 1)}
            any_action = torch.zeros_like(self.experience.actions[:, :1])
            out = self.agent(TensorDict(entries, batch_size=self.dones.shape), action=any_action)
            return out["value"].reshape(-1)

    def memory(self) -> tuple[Tensor, Tensor]:
        """The agent's rollout memory (h, c), each [layers, B, hidden]: no copy, it changes with the next step."""
        return self.agent.policy.lstm_h[0], self.agent.policy.lstm_c[0]

    def _starts(self) -> dict[str, Tensor]:
        """What the agent is told of episode starts; in the ablation each step is one."""
        dones = torch.ones_like(self.dones) if self.config.reset_state_every_step else self.dones
        return {"dones": dones, "truncateds": self.truncateds}

    def _restart_environment(self, seed: int) -> None:
        self.observations = self.env.reset(seed)
        self.dones = torch.ones(self.config.num_envs, dtype=torch.bool, device=self.device)
        self.truncateds = torch.zeros_like(self.dones)
        self.episode_returns = torch.zeros(self.config.num_envs, device=self.device)
        self.agent.reset_memory()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as `save_checkpoint` wants it.

        Raises ValueError where a kernel has reported an action out of range: weights after that are not worth keeping.
        """
        ops.raise_if_reported(self.agent.cum_action_max_params, synchronize=True)
        rollout = ("observations", "dones", "truncateds", "episode_returns")
        return {
            "config": self.config.to_dict(),
            "counters": {name: getattr(self, name) for name in ("updates", "steps", "seconds", "cpu_seconds")},
            "model": self.agent.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "initial_weights": dict(self.agent.policy.initial_weights),
            "action_names": list(self.env.action_names),
            "max_action_args": list(self.env.max_action_args),
            "feature_mapping": self.agent.get_original_feature_mapping(),
            "memory": self.agent.get_memory(),
            "environment": self._environment_state(),
            "rollout": {name: getattr(self, name) for name in rollout},
            "random": _random_state(self.device),
            "package_version": metta_fastagent.__version__,
            # its own class, which a file read with weights_only may not hold
            "torch_version": str(torch.__version__),
            "backend": metta_fastagent.backend(self.device),
        }

    def _environment_state(self) -> dict[str, Any] | None:
        try:
            return self.env.state_dict()
        except NotImplementedError:
            return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; an environment that could not be saved starts new episodes.

        Raises CheckpointError where the state belongs to another network or environment.
        """
        self._check_environment(state)
        try:
            self.agent.policy.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.agent.policy.initial_weights = {k: v.to(self.device) for k, v in state["initial_weights"].items()}
            for name, value in state["counters"].items():
                setattr(self, name, value)
            if state["environment"] is None:
                # another seed than at the start, so that the same episodes do not come again
                self._restart_environment(self.config.seed + self.updates)
            else:
                self._restore_environment(state)
            _set_random_state(state["random"], self.device)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run ({str(error).splitlines()[0]})") from error

    def _restore_environment(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["environment"])
        for name, value in state["rollout"].items():
            setattr(self, name, value.to(self.device))
        h, c = ({key: value.to(self.device) for key, value in part.items()} for part in state["memory"])
        self.agent.set_memory((h, c))

    def _check_environment(self, state: dict[str, Any]) -> None:
        now = {
            "action_names": list(self.env.action_names),
            "max_action_args": list(self.env.max_action_args),
            "feature_mapping": self.agent.get_original_feature_mapping(),
        }
        for name, value in now.items():
            if state[name] != value:
                raise CheckpointError(f"the checkpoint's {name} is {state[name]}, the environment's is {value}")


def make_agent(config: TrainConfig, env: Any) -> MettaAgent:
    """Fast inside its host, tied to `env`."""
    device = torch.device(config.device)
    policy = Fast(
        env,
        clip_range=config.clip_range,
        clip_mode=config.clip_mode,
        analyze_weights_interval=config.analyze_weights_interval,
        num_envs=config.num_envs,
    )
    agent = MettaAgent(env, policy, device)
    agent.initialize_to_environment(env.features, env.action_names, env.max_action_args, device)
    return agent


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    # a run that moves to CUDA has no state of that kind yet
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
