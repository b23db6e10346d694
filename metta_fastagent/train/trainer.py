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
from metta_fastagent.runtime.checks import first_line
from metta_fastagent.train import ppo, ranks, returns
from metta_fastagent.train.agents import interface, make_agent, one_step_segments
from metta_fastagent.train.checkpoint import CheckpointError, layout, on_cpu, random_state, set_random_state
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import ProtocolError, Step, make_environment
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.graphs import Captured
from metta_fastagent.train.timer import PHASES, PhaseTimer

# Fast's LSTM starts almost saturated (biases of 1) and its first gradients are tiny: PPO's usual 1e-5 slows it down.
ADAM_EPSILON = 1e-8
# With larger rewards, squares of their sums overflow float32.
LARGEST_REWARD = 1e18
COUNTERS = ("updates", "steps", "seconds", "cpu_seconds", "best_return", "last_returns", "lr_share")
ROLLOUT = ("observations", "action_mask", "dones", "truncateds", "episode_returns", "episode_lengths", "discounted")
COLUMNS = (
    *("update", "steps", "seconds", "cpu_seconds", "steps_per_second", "episodes"),
    *("mean_return", "mean_length", "evaluated_return"),
    *ppo.STATISTICS,
    *("explained_variance", "epochs", "lr"),
    *(f"{phase}_seconds" for phase in PHASES),
)


class TrainingDiverged(RuntimeError):
    """A loss or the gradient norm is not finite, an action is out of range, or logits do not form a distribution."""


class Trainer:
    """One run of recurrent PPO, or one rank of it.

    Each rank steps its own environment and learns from its own rows; gradients and statistics are averaged over ranks.

    Attributes:
        make_env: function that makes this run's environments, see `make_environment`.
        make_policy: function that makes the agent; None if `config` names it.
        device, env, agent: this rank's; the agent is a MettaAgent.
        learner: the module that computes the loss: `agent`, or with several ranks DistributedDataParallel around it.
        updates, last_update: number of updates so far and in the whole run.
        steps: environment steps so far, over all rows and ranks.
        learning: whether an update is changing the weights; the state then belongs to no completed update.
        best_return, last_returns: the highest evaluated return and the last two; -inf before an evaluation.
        lr_share: fraction of `config.lr` in the last update; it never rises, even in a run extended on resume.
        return_moments: count, mean and variance of the discounted rewards so far, see `returns`; zeros without
            `config.normalize_returns`.
        seconds, cpu_seconds: wall and process CPU time of all updates, including those before a resume.

    Seeds torch's global generators, see `ranks.seed`. Does not apply `config.threads`, which affects the whole process.
    Raises TypeError or ValueError for an environment or agent that breaks the protocol, or for a device or launch that
    does not match `config`.
    """

    def __init__(self, config: TrainConfig, make_env: Any = None, make_policy: Any = None) -> None:
        if config.cuda_graphs and ranks.world_size() > 1:
            raise ValueError(f"cuda_graphs: got True with {ranks.world_size()} ranks, expected a single process")
        torch.manual_seed(config.seed)
        self.config, self.make_env, self.make_policy = config, make_env or config.env, make_policy
        self.device = ranks.run_on_all_ranks(lambda: ranks.device(config.device))
        seed = ranks.seed(config.seed)
        self.env = ranks.run_on_all_ranks(lambda: make_environment(self.make_env, config.num_envs, self.device, seed))
        self.agent = ranks.run_on_all_ranks(lambda: make_agent(config, self.env, make_policy))
        self.learner = ranks.wrap_ddp(self.agent, self.device)
        if not ranks.is_first():
            torch.manual_seed(seed)
        # a graph reads each step's rate from a tensor
        lr = torch.tensor(config.lr, device=self.device) if config.cuda_graphs else config.lr
        options: dict[str, Any] = {"fused": self.device.type in ("cpu", "cuda"), "capturable": config.cuda_graphs}
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=lr, eps=ADAM_EPSILON, **options)
        self.timer = PhaseTimer(self.device)
        self.last_update = config.updates(ranks.world_size())
        self.updates, self.steps, self.seconds, self.cpu_seconds, self.lr_share = 0, 0, 0.0, 0.0, 1.0
        self.best_return, self.last_returns = -math.inf, (-math.inf, -math.inf)
        self.learning, self.return_moments = False, returns.no_moments(self.device)
        self._reset_environment(seed)
        self.experience = Experience(self.observations, config.segment_length, self.memory(), self.action_mask)
        self._prepare_steps()
        if ranks.world_size() > 1:
            self._warm_up_ddp()

    def _warm_up_ddp(self) -> None:
        """Run one backward and discard its gradients.

        DistributedDataParallel rebuilds its buckets after the first backward, which changes the order of summation.
        After this warm-up a resumed run sums in the same order as the original run.
        """
        segments = one_step_segments(self.observations, self.memory(), self._episode_starts())
        out = self.learner(segments, action=torch.zeros_like(self.experience.actions[:, :1]))
        ranks.backward(self.learner, out["act_log_prob"].sum() + out["value"].sum())
        self.optimizer.zero_grad()

    def _prepare_steps(self) -> None:
        """Create the agent's and optimizer's steps; with `config.cuda_graphs` their next calls capture them."""
        self.act, self.value, self.optimizer_steps = self._act, self._value, {}
        if self.config.cuda_graphs:
            self.act, self.value = Captured(self._act), Captured(self._value)
            # timed from outside, because a graph cannot hold a timer's events; one per branch on `valid`
            step = partial(ppo.optimizer_step, self.learner, self.optimizer, self.experience, self.config, nullcontext)
            self.optimizer_steps = {kind: self.timer("learning")(Captured(step)) for kind in (True, False)}

    @property
    def solved(self) -> bool:
        """Whether the last two evaluations reached `config.stop_return`, which ends the run."""
        return min(self.last_returns) >= self.config.stop_return

    def scheduled_share(self) -> float:
        """The fraction of `config.lr` for the next update in a run that started with this number of steps."""
        left = 1 - self.updates / self.last_update
        return min(1.0, left / self.config.anneal_lr) if self.config.anneal_lr else 1.0

    def run(self, after_update: Callable[[dict[str, float]], None]) -> None:
        """Train until `last_update` or `solved`; call `after_update` with each update's row of COLUMNS."""
        while self.updates < self.last_update and not self.solved:
            after_update(self.train_update())

    def train_update(self) -> dict[str, float]:
        """Run one rollout and one PPO update. Returns the row of COLUMNS, equal on all ranks except for the times.

        Raises TrainingDiverged, and ranks.RanksDiffer every `config.check_ranks` updates; on all ranks.
        """
        try:
            return self._train_update()
        except ops.BadRowError as error:
            self._check_observations()
            raise TrainingDiverged(f"update {self.updates + 1}: {error}") from error

    def _train_update(self) -> dict[str, float]:
        config = self.config
        wall, cpu = time.perf_counter(), time.process_time()
        self.lr_share = min(self.lr_share, self.scheduled_share())
        lr = config.lr * self.lr_share
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if config.cuda_graphs else lr
        episodes = self.collect()
        if self.device.type == "cpu":
            ranks.run_on_all_ranks(self._check_rewards)
        # Ranks take the same collective steps only with the same kind of rollout.
        if any(ranks.all_gather(self.experience.valid is not None)):
            self.experience.mark_invalid()
        if config.normalize_returns:
            self._measure_returns()
        advantages = self.advantages()
        targets = advantages + self.experience.values
        self.agent.train()
        self.learning = True
        rollout, step = (self.experience, advantages, targets), self.optimizer_steps.get(self.experience.valid is None)
        statistics, epochs = ppo.update(self.learner, self.optimizer, *rollout, config, self.timer, step)
        explained = ppo.explained_variance(self.experience.values, targets, self.experience.valid)
        # the update's only host sync besides target_kl's; after it, all actions have been checked
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
        self.learning = False
        return row

    def _row(self, values: list[float], epochs: int, lr: float, wall: float) -> dict[str, float]:
        *statistics, explained, finished, return_sum, length_sum = values
        row = {
            "update": self.updates,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "steps_per_second": self.config.steps_per_update(ranks.world_size()) / wall,
            "episodes": round(finished * ranks.world_size()),
            "mean_return": return_sum / finished if finished else math.nan,
            "mean_length": length_sum / finished if finished else math.nan,
            "evaluated_return": math.nan,
            **dict(zip(ppo.STATISTICS, statistics, strict=True)),
            "explained_variance": explained if math.isfinite(explained) else math.nan,
            "epochs": epochs,
            "lr": lr,
            **{f"{phase}_seconds": seconds for phase, seconds in self.timer.read().items()},
        }
        if unusable := [name for name in ppo.STATISTICS if not math.isfinite(row[name])]:
            ranks.run_on_all_ranks(self._check_rewards)
            largest = f"rewards up to {self.experience.rewards.abs().max().item():.3g}; try a lower --lr"
            raise TrainingDiverged(f"{', '.join(unusable)}: not finite in update {self.updates} with {largest}")
        return row

    def _check_rewards(self) -> None:
        """Raise ProtocolError for a reward that no update can learn from; reads from the device."""
        rewards = self.experience.rewards
        wrong = ~(rewards.abs() <= LARGEST_REWARD)
        if wrong.any():
            row, t = wrong.nonzero()[0].tolist()
            came = f"{rewards[row, t].item()} in row {row}, step {t + 1} of {self.experience.length} of this rollout"
            raise ProtocolError(f"step: rewards: got {came}, expected finite numbers up to {LARGEST_REWARD:g}")

    def _check_observations(self) -> None:
        """Raise ProtocolError for observations that are not finite or allow no action; reads from the device."""
        if self.action_mask is not None and not self.action_mask.any(1).all():
            row = (~self.action_mask.any(1)).nonzero()[0].item()
            raise ProtocolError(f"step: action_mask: got no legal action in row {row}, expected at least one")
        for observations in (self.experience.observations, self.observations):
            wrong = ~observations.flatten(1).isfinite().all(1)
            if wrong.any():
                came = f"NaN or infinity in row {wrong.nonzero()[0].item()}"
                raise ProtocolError(f"step: observations: got {came}, expected finite numbers")

    @torch.no_grad()
    def collect(self) -> Tensor:
        """Fill `experience` with `segment_length` steps of every row, run in evaluation mode.

        Returns float [3] on the device: the number of finished episodes and the sums of their returns and lengths.
        """
        experience = self.experience
        self.agent.eval()
        # in the ablation the stored state keeps its initial zeros
        if not self.config.zero_segment_state:
            experience.store_initial_state(self.memory())
        experience.bootstrap_values.zero_()
        finished = torch.zeros(3, len(self.episode_returns), device=self.device)
        for t in range(experience.length):
            with self.timer("inference"):
                seen = {"observations": self.observations, **self._episode_starts()}
                if self.action_mask is not None:
                    seen["action_mask"] = self.action_mask
                actions, log_probs, values = self.act(*seen.values())
                experience.store(t, **seen, actions=actions, log_probs=log_probs, values=values)
            with self.timer("environment"):
                step = self.env.step(actions)
            results = {"rewards": step.rewards, "terminals": step.terminals, "truncations": step.truncations}
            values = self._bootstrap_values(step)
            experience.store(t, **results, **({} if values is None else {"bootstrap_values": values}))
            self.observations, self.dones, self.truncateds = step.observations, step.terminals, step.truncations
            self.action_mask = step.action_mask
            ends = step.terminals | step.truncations
            experience.store_valid(t, step.valid)
            if step.valid is not None:
                ends &= step.valid
            sums = self.episode_returns + step.rewards, self.episode_lengths + (1 if step.valid is None else step.valid)
            self.episode_returns, self.episode_lengths = (each.masked_fill(ends, 0) for each in sums)
            finished += torch.stack([ends, sums[0] - self.episode_returns, sums[1] - self.episode_lengths])
        return finished.sum(1)

    def _measure_returns(self) -> None:
        """Update `return_moments` with the collected rewards."""
        experience = self.experience
        ends = experience.terminals | experience.truncations
        sums, self.discounted = returns.discounted_sums(experience.rewards, ends, self.discounted, self.config.gamma)
        self.return_moments = returns.merged(self.return_moments, sums, experience.valid)

    def advantages(self) -> Tensor:
        """Generalized advantages of the collected rollout, float [B, T]; see `ops.advantages`.

        Their unit is `returns.scale(return_moments)`, like that of the agent's values.
        """
        experience = self.experience
        ends = experience.terminals | experience.truncations
        rewards = experience.rewards / returns.scale(self.return_moments).to(experience.rewards.dtype)
        rollout = rewards, experience.values, ends, self.next_value(), experience.bootstrap_values
        return ops.advantages(*rollout, self.config.gamma, self.config.gae_lambda, valid=experience.valid)

    @torch.no_grad()
    def next_value(self) -> Tensor:
        """Value of the observation after the rollout, float [B]."""
        with self.timer("inference"):
            return self.value(self.observations, *self._episode_starts().values()).to(self.experience.values.dtype)

    def _bootstrap_values(self, step: Step) -> Tensor | None:
        """Values of the final observations of truncated episodes, float [B], 0 for other rows; None if all are 0.

        A truncated episode could have continued, so the LSTM state is not reset before its final observation.
        """
        if not self.config.bootstrap_truncations or step.final_observations is None:
            return None
        with self.timer("inference"):
            if self.device.type != "cpu":
                # uses all rows: selecting the truncated ones would need a host sync
                all_values = self.value(step.final_observations, *self._no_episode_starts(len(step.rewards)).values())
                return torch.where(step.truncations, all_values.to(step.rewards.dtype), 0)
            rows = step.truncations.nonzero().squeeze(1)
            if len(rows) == 0:
                return None
            state = tuple(part[:, rows] for part in self.memory())
            starts = self._no_episode_starts(len(rows)).values()
            found = self._value(step.final_observations[rows], *starts, state=state)
            return torch.zeros_like(step.rewards).index_copy(0, rows, found.to(step.rewards.dtype))

    def _act(self, *seen: Tensor) -> tuple[Tensor, ...]:
        """Actions [B, 2], log-probabilities [B] and values [B], given observations, dones, truncateds and any mask."""
        inputs: dict[str, Any] = dict(zip(("env_obs", "dones", "truncateds", "action_mask"), seen, strict=False))
        td = self.agent(TensorDict(inputs, batch_size=seen[1].shape))
        return td["actions"], td["act_log_prob"], td["values"]

    def _value(self, observations: Tensor, dones: Tensor, truncateds: Tensor, state: Any = None) -> Tensor:
        """Values, float [b], of observations [b, ...] given the LSTM state (h, c); None means the rollout memory.

        Uses one-step segments: training mode neither changes the rollout memory nor draws random numbers.
        """
        any_action = torch.zeros_like(self.experience.actions[: len(observations), :1])
        starts = {"dones": dones, "truncateds": truncateds}
        out = self.agent(one_step_segments(observations, state or self.memory(), starts), action=any_action)
        return out["value"].reshape(-1)

    def memory(self) -> tuple[Tensor, Tensor]:
        """The agent's rollout memory (h, c), each [layers, B, hidden]; the next step changes these views in place."""
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
        self.observations, self.action_mask = self.env.reset(seed), self.env.action_mask
        self.dones = torch.ones(self.config.num_envs, dtype=torch.bool, device=self.device)
        self.truncateds = torch.zeros_like(self.dones)
        zeros = torch.zeros(3, self.config.num_envs, device=self.device)
        self.episode_returns, self.episode_lengths, self.discounted = zeros
        self.agent.reset_memory()

    def state_dict(self, with_environment: bool = True) -> dict[str, Any]:
        """The state of all ranks on which the next update depends, in the form that `save_checkpoint` expects.

        Without the environment's state, a resumed run starts new episodes.

        Raises ValueError if a kernel on this rank has reported an action out of range, which makes the weights invalid,
        or ranks.RankError if one on another rank has.
        """
        own = ranks.run_on_all_ranks(lambda: self._rank_state(with_environment))
        return {
            "config": self.config.to_dict(),
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "model": self.agent.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "return_moments": self.return_moments,
            "initial_weights": dict(self.agent.policy.initial_weights),
            "initial_weight_magnitudes": dict(self.agent.policy.initial_weight_magnitudes),
            **interface(self.agent, self.env),
            "ranks": ranks.all_gather(own),
            "package_version": metta_fastagent.__version__,
            # torch.__version__ is a subclass of str, which weights_only rejects
            "torch_version": str(torch.__version__),
            "backend": metta_fastagent.backend(self.device),
        }

    def _rank_state(self, with_environment: bool) -> dict[str, Any]:
        """The state specific to this rank, on the CPU."""
        ops.raise_if_reported(self.agent.cum_action_max_params, synchronize=True)
        state = {
            "memory": self.agent.get_memory(),
            "environment": self.env.state_dict() if with_environment else None,
            "rollout": {name: getattr(self, name) for name in ROLLOUT},
            "random": random_state(self.device),
        }
        return on_cpu(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state_dict`; an environment that could not be saved starts new episodes.

        Raises CheckpointError if the state belongs to another network, environment or number of ranks.
        """
        try:
            self._check_compatible(state)
            self.agent.policy.load_state_dict(state["model"])
            # this run's groups, because the checkpoint's may be for another device
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
            self.agent.policy.initial_weights = {k: v.to(self.device) for k, v in state["initial_weights"].items()}
            self.agent.policy.initial_weight_magnitudes = dict(state["initial_weight_magnitudes"])
            self.return_moments = state["return_moments"].to(self.return_moments)
            for name in COUNTERS:
                setattr(self, name, state["counters"][name])
            own = state["ranks"][ranks.rank()]
            try:
                self._restore_environment(own)
            except NotImplementedError:
                # a seed other than the initial one, so that episodes do not repeat
                self._reset_environment(ranks.seed(self.config.seed + self.updates))
            set_random_state(own["random"], self.device)
            self._prepare_steps()
        except CheckpointError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            came = f"an incompatible state ({first_line(error)})"
            raise CheckpointError(f"checkpoint: got {came}, expected one of this network and environment") from error

    def _restore_environment(self, state: dict[str, Any]) -> None:
        if state["environment"] is None:
            raise NotImplementedError
        self.env.load_state_dict(state["environment"])
        for name in ROLLOUT:
            value = state["rollout"][name]
            setattr(self, name, None if value is None else value.to(self.device))
        h, c = ({key: value.to(self.device) for key, value in part.items()} for part in state["memory"])
        self.agent.set_memory((h, c))

    def _check_compatible(self, state: dict[str, Any]) -> None:
        saved, now = len(state["ranks"]), ranks.world_size()
        if saved != now:
            start = ranks.TORCHRUN.replace("=N", f"={saved}")
            raise CheckpointError(f"checkpoint: got {saved} ranks, expected {now} as in this run; resume with {start}")
        policy, own = self.agent.policy, state["ranks"][ranks.rank()]
        pairs = {
            "counters": (state["counters"], {name: getattr(self, name) for name in COUNTERS}),
            "initial_weights": (state["initial_weights"], policy.initial_weights),
            "initial_weight_magnitudes": (state["initial_weight_magnitudes"], policy.initial_weight_magnitudes),
        }
        if own["environment"] is not None:
            pairs["rollout"] = own["rollout"], {name: getattr(self, name) for name in ROLLOUT}
        for name, (values, expected) in pairs.items():
            came, ours = layout(values), layout(expected)
            if came != ours:
                different = sorted(str(key) for key in {*came, *ours} if came.get(key) != ours.get(key))
                raise CheckpointError(f"checkpoint: got other {name} ({', '.join(different)}) than this run's")
        for name, value in interface(self.agent, self.env).items():
            if state[name] != value:
                raise CheckpointError(f"checkpoint: got {name} {state[name]}, expected {value} as in the environment")
