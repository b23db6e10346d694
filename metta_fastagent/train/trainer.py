"""Trainer: collects rollouts, updates the agent, and saves and restores the state of the run."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

import metta_fastagent
from metta_fastagent import ops
from metta_fastagent.ops._checks import first_line
from metta_fastagent.train import ppo, ranks
from metta_fastagent.train.agents import interface, make_agent, one_step_segments
from metta_fastagent.train.checkpoint import CheckpointError
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Step, make_environment
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.graphs import Captured
from metta_fastagent.train.timer import PHASES, PhaseTimer

# Fast's LSTM starts almost saturated (biases of 1) and its first gradients are tiny: PPO's usual 1e-5 slows it down.
ADAM_EPSILON = 1e-8
COUNTERS = ("updates", "steps", "seconds", "cpu_seconds", "best_return")
COLUMNS = (
    *("update", "steps", "seconds", "cpu_seconds", "steps_per_second", "episodes", "mean_return"),
    *ppo.STATISTICS,
    *("explained_variance", "epochs", "lr"),
    *(f"{phase}_seconds" for phase in PHASES),
)


class TrainingDiverged(RuntimeError):
    """A loss or the gradient norm is not finite, an action is out of range, or logits are no distribution."""


class Trainer:
    """One run of recurrent PPO, or one rank of it.

    Each rank steps its own environment and learns from its own rows; gradients and statistics are averaged over ranks.

    Attributes:
        config: TrainConfig.
        make_env: function that makes this run's environments, see `make_environment`.
        device: this rank's device.
        env: this rank's vector environment.
        agent: MettaAgent around the agent.
        learner: the module that computes the loss: `agent`, or with several ranks DistributedDataParallel around it.
        updates, last_update: updates so far and in the whole run.
        steps: environment steps so far, over all rows and ranks.
        best_return: highest evaluated return so far; -inf before an evaluation.
        seconds, cpu_seconds: wall and process CPU time of all updates, those before a resume included.

    Seeds torch's global generators, see `ranks.seed`. Does not apply `config.threads`, which affects the whole process.
    Raises TypeError or ValueError for an environment or agent that breaks the protocol or a device or launch that does
    not fit `config`.
    """

    def __init__(self, config: TrainConfig, make_env: Any = None, make_policy: Any = None) -> None:
        if config.cuda_graphs and ranks.world_size() > 1:
            raise ValueError(f"cuda_graphs: got True with {ranks.world_size()} ranks, expected a single process")
        torch.manual_seed(config.seed)
        self.config, self.make_env = config, make_env or config.env
        self.device = ranks.run_on_all_ranks(lambda: ranks.device(config.device))
        seed = ranks.seed(config.seed)
        self.env = ranks.run_on_all_ranks(lambda: make_environment(self.make_env, config.num_envs, self.device, seed))
        self.agent = ranks.run_on_all_ranks(lambda: make_agent(config, self.env, make_policy))
        self.learner = ranks.wrap_ddp(self.agent, self.device)
        if not ranks.is_first():
            torch.manual_seed(seed)
        # a graph reads the rate of each step from a tensor
        lr = torch.tensor(config.lr, device=self.device) if config.cuda_graphs else config.lr
        options: dict[str, Any] = {"fused": self.device.type in ("cpu", "cuda"), "capturable": config.cuda_graphs}
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=lr, eps=ADAM_EPSILON, **options)
        self.timer = PhaseTimer(self.device)
        self.last_update = config.updates(ranks.world_size())
        self.updates, self.steps, self.seconds, self.cpu_seconds, self.best_return = 0, 0, 0.0, 0.0, -math.inf
        self._reset_environment(seed)
        self.experience = Experience(self.observations, config.segment_length, self.memory())
        self._prepare_steps()
        if ranks.world_size() > 1:
            self._warm_up_ddp()

    def _warm_up_ddp(self) -> None:
        """One backward whose gradients are discarded.

        DistributedDataParallel rebuilds its buckets after the first backward, which changes the order of summation.
        After this warm-up a resumed run sums in the same order as the run that it continues.
        """
        segments = one_step_segments(self.observations, self.memory(), self._episode_starts())
        out = self.learner(segments, action=torch.zeros_like(self.experience.actions[:, :1]))
        (out["act_log_prob"].sum() + out["value"].sum()).backward()
        self.optimizer.zero_grad()

    def _prepare_steps(self) -> None:
        """Make the steps of agent and optimizer; with `config.cuda_graphs` their next calls capture them."""
        self.act, self.value, self.optimizer_steps = self._act, self._value, {}
        if self.config.cuda_graphs:
            self.act, self.value = Captured(self._act), Captured(self._value)
            # timed from outside, as a graph cannot hold a timer's events; one for each branch on `valid`
            step = partial(ppo.optimizer_step, self.learner, self.optimizer, self.experience, self.config, nullcontext)
            self.optimizer_steps = {kind: self.timer("learning")(Captured(step)) for kind in (True, False)}

    def run(self, after_update: Callable[[dict[str, float]], None]) -> None:
        """Train until `last_update`; call `after_update` with the row of COLUMNS of each update."""
        while self.updates < self.last_update:
            after_update(self.train_update())

    def train_update(self) -> dict[str, float]:
        """One rollout and one PPO update. Returns the row of COLUMNS, equal on all ranks except for the times.

        Raises TrainingDiverged, and ranks.RanksDiffer every `config.check_ranks` updates; on all ranks.
        """
        try:
            return self._train_update()
        except ops.BadRowError as error:
            raise TrainingDiverged(f"update {self.updates + 1}: {error}") from error

    def _train_update(self) -> dict[str, float]:
        config = self.config
        wall, cpu = time.perf_counter(), time.process_time()
        left = 1 - self.updates / self.last_update
        lr = config.lr * (min(1.0, left / config.anneal_lr) if config.anneal_lr else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if config.cuda_graphs else lr
        episodes = self.collect()
        advantages = self.advantages()
        returns = advantages + self.experience.values
        self.agent.train()
        rollout, step = (self.experience, advantages, returns), self.optimizer_steps.get(self.experience.valid is None)
        statistics, epochs = ppo.update(self.learner, self.optimizer, *rollout, config, self.timer, step)
        explained = ppo.explained_variance(self.experience.values, returns, self.experience.valid)
        # the only host sync of the update besides that of target_kl, after which all actions have been checked
        values = ranks.mean(torch.cat([statistics, explained.view(1), episodes])).tolist()
        ops.raise_if_reported(self.agent.cum_action_max_params)
        self.updates += 1
        self.steps += config.steps_per_update(ranks.world_size())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.seconds += wall
        self.cpu_seconds += cpu
        row = self._row(values, epochs, lr, wall)
        if config.check_ranks and self.updates % config.check_ranks == 0:
            ranks.check_parameters_equal(self.agent, f"after update {self.updates}")
        return row

    def _row(self, values: list[float], epochs: int, lr: float, wall: float) -> dict[str, float]:
        *statistics, explained, finished, return_sum = values
        row = {
            "update": self.updates,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "steps_per_second": self.config.steps_per_update(ranks.world_size()) / wall,
            "episodes": round(finished * ranks.world_size()),
            "mean_return": return_sum / finished if finished else math.nan,
            **dict(zip(ppo.STATISTICS, statistics, strict=True)),
            "explained_variance": explained if math.isfinite(explained) else math.nan,
            "epochs": epochs,
            "lr": lr,
            **{f"{phase}_seconds": seconds for phase, seconds in self.timer.read().items()},
        }
        unusable = [name for name in ppo.STATISTICS if not math.isfinite(row[name])]
        if unusable:
            raise TrainingDiverged(f"{', '.join(unusable)}: not finite in update {self.updates}; try a lower --lr")
        return row

    @torch.no_grad()
    def collect(self) -> Tensor:
        """Fill `experience` with `segment_length` steps of every row.

        Returns float [2] on the device: the number of finished episodes and the sum of their returns.
        """
        experience = self.experience
        # in the ablation the stored state keeps its initial zeros
        if not self.config.zero_segment_state:
            experience.store_initial_state(self.memory())
        finished = torch.zeros(2, device=self.device)
        for t in range(experience.length):
            with self.timer("inference"):
                seen = {"observations": self.observations, **self._episode_starts()}
                actions, log_probs, values = self.act(*seen.values())
                experience.store(t, **seen, actions=actions, log_probs=log_probs, values=values)
            with self.timer("environment"):
                step = self.env.step(actions)
            results = {"rewards": step.rewards, "terminals": step.terminals, "truncations": step.truncations}
            experience.store(t, **results, bootstrap_values=self._bootstrap_values(step))
            self.observations, self.dones, self.truncateds = step.observations, step.terminals, step.truncations
            ends = step.terminals | step.truncations
            experience.store_valid(t, step.valid)
            if step.valid is not None:
                ends &= step.valid
            self.episode_returns += step.rewards
            finished += torch.stack([ends.sum(), (self.episode_returns * ends).sum()])
            self.episode_returns *= ~ends
        return finished

    def advantages(self) -> Tensor:
        """Generalized advantages of the collected rollout, float [B, T]; see `ppo.generalized_advantages`."""
        experience = self.experience
        ends = experience.terminals | experience.truncations
        rollout = experience.rewards, experience.values, ends, self.next_value(), experience.bootstrap_values
        return ppo.generalized_advantages(*rollout, self.config.gamma, self.config.gae_lambda)

    @torch.no_grad()
    def next_value(self) -> Tensor:
        """Value of the observation after the rollout, float [B]."""
        with self.timer("inference"):
            return self.value(self.observations, *self._episode_starts().values())

    def _bootstrap_values(self, step: Step) -> Tensor:
        """Values of the final observations of truncated episodes, float [B]; 0 for other rows.

        A truncated episode could have continued, so the LSTM state is not reset before its final observation.
        """
        values = torch.zeros_like(step.rewards)
        if not self.config.bootstrap_truncations or step.final_observations is None:
            return values
        with self.timer("inference"):
            if self.device.type != "cpu":
                # all rows: selecting the truncated ones would need a host sync
                all_values = self.value(step.final_observations, *self._no_episode_starts(len(values)).values())
                return torch.where(step.truncations, all_values, values)
            rows = step.truncations.nonzero().squeeze(1)
            if len(rows):
                state = tuple(part[:, rows] for part in self.memory())
                starts = self._no_episode_starts(len(rows)).values()
                values[rows] = self._value(step.final_observations[rows], *starts, state=state)
        return values

    def _act(self, observations: Tensor, dones: Tensor, truncateds: Tensor) -> tuple[Tensor, ...]:
        """Actions [B, 2], their log-probabilities [B] and values [B]; advances the rollout memory."""
        inputs: dict[str, Any] = {"env_obs": observations, "dones": dones, "truncateds": truncateds}
        td = self.agent(TensorDict(inputs, batch_size=dones.shape))
        return td["actions"], td["act_log_prob"], td["values"]

    def _value(self, observations: Tensor, dones: Tensor, truncateds: Tensor, state: Any = None) -> Tensor:
        """Values, float [b], of observations [b, ...] given the LSTM state (h, c); None is the rollout memory.

        Uses segments of one step: the training mode neither changes the rollout memory nor draws random numbers.
        """
        any_action = torch.zeros_like(self.experience.actions[: len(observations), :1])
        starts = {"dones": dones, "truncateds": truncateds}
        out = self.agent(one_step_segments(observations, state or self.memory(), starts), action=any_action)
        return out["value"].reshape(-1)

    def memory(self) -> tuple[Tensor, Tensor]:
        """The agent's rollout memory (h, c), each [layers, B, hidden]; views that the next step changes in place."""
        return self.agent.policy.lstm_h[0], self.agent.policy.lstm_c[0]

    def _episode_starts(self) -> dict[str, Tensor]:
        """The agent's inputs dones and truncateds, bool [B]; in the ablation every step starts an episode."""
        dones = torch.ones_like(self.dones) if self.config.reset_state_every_step else self.dones
        return {"dones": dones, "truncateds": self.truncateds}

    def _no_episode_starts(self, rows: int) -> dict[str, Tensor]:
        """The same inputs, bool [rows], for observations in the middle of an episode."""
        zeros = torch.zeros_like(self.dones[:rows])
        return {"dones": zeros | self.config.reset_state_every_step, "truncateds": zeros}

    def _reset_environment(self, seed: int) -> None:
        self.observations = self.env.reset(seed)
        self.dones = torch.ones(self.config.num_envs, dtype=torch.bool, device=self.device)
        self.truncateds = torch.zeros_like(self.dones)
        self.episode_returns = torch.zeros(self.config.num_envs, device=self.device)
        self.agent.reset_memory()

    def state_dict(self) -> dict[str, Any]:
        """The state that the next update depends on, of all ranks, in the form that `save_checkpoint` expects.

        Raises ValueError if a kernel of this rank has reported an action out of range, which makes the weights invalid,
        or ranks.RankError if one of another rank has.
        """
        own = ranks.run_on_all_ranks(self._rank_state)
        return {
            "config": self.config.to_dict(),
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "model": self.agent.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "initial_weights": dict(self.agent.policy.initial_weights),
            "initial_weight_magnitudes": dict(self.agent.policy.initial_weight_magnitudes),
            **interface(self.agent, self.env),
            "ranks": ranks.all_gather(own),
            "package_version": metta_fastagent.__version__,
            # torch.__version__ is of a subclass of str, which weights_only refuses
            "torch_version": str(torch.__version__),
            "backend": metta_fastagent.backend(self.device),
        }

    def _rank_state(self) -> dict[str, Any]:
        """The state that only this rank has, on the CPU."""
        ops.raise_if_reported(self.agent.cum_action_max_params, synchronize=True)
        rollout = ("observations", "dones", "truncateds", "episode_returns")
        state = {
            "memory": self.agent.get_memory(),
            "environment": self.env.state_dict(),
            "rollout": {name: getattr(self, name) for name in rollout},
            "random": _random_state(self.device),
        }
        return _on_cpu(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; an environment that could not be saved starts new episodes.

        Raises CheckpointError if the state is of another network, environment or number of ranks.
        """
        self._check_compatible(state)
        try:
            self.agent.policy.load_state_dict(state["model"])
            # the groups of this run: the checkpoint's may be those of another device
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
            self.agent.policy.initial_weights = {k: v.to(self.device) for k, v in state["initial_weights"].items()}
            self.agent.policy.initial_weight_magnitudes = dict(state["initial_weight_magnitudes"])
            for name, value in state["counters"].items():
                setattr(self, name, value)
            own = state["ranks"][ranks.rank()]
            if own["environment"] is None:
                # a seed other than the initial one, so that episodes are not repeated
                self._reset_environment(ranks.seed(self.config.seed + self.updates))
            else:
                self._restore_environment(own)
            _set_random_state(own["random"], self.device)
            self._prepare_steps()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            came = f"an incompatible state ({first_line(error)})"
            raise CheckpointError(f"checkpoint: got {came}, expected one of this network and environment") from error

    def _restore_environment(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["environment"])
        for name, value in state["rollout"].items():
            setattr(self, name, value.to(self.device))
        h, c = ({key: value.to(self.device) for key, value in part.items()} for part in state["memory"])
        self.agent.set_memory((h, c))

    def _check_compatible(self, state: dict[str, Any]) -> None:
        saved, now = len(state["ranks"]), ranks.world_size()
        if saved != now:
            start = ranks.TORCHRUN.replace("=N", f"={saved}")
            raise CheckpointError(f"checkpoint: got {saved} ranks, expected {now} as in this run; resume with {start}")
        for name, value in interface(self.agent, self.env).items():
            if state[name] != value:
                raise CheckpointError(f"checkpoint: got {name} {state[name]}, expected {value} as in the environment")


def _on_cpu(state: Any) -> Any:
    """`state` (nested dicts and tuples) with every tensor on the CPU."""
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_on_cpu, state))
    return state.cpu() if isinstance(state, Tensor) else state


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    # a checkpoint of a CPU run has no CUDA state
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
