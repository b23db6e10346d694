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
from metta_fastagent.train import ppo, ranks
from metta_fastagent.train.checkpoint import CheckpointError
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Step, VectorEnvironment, make_environment
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.stopwatch import PHASES, Stopwatch

# Fast's LSTM starts almost saturated (biases of 1) and its first gradients are tiny: PPO's usual 1e-5 slows it down.
ADAM_EPSILON = 1e-8
COLUMNS = (
    *("update", "steps", "seconds", "cpu_seconds", "steps_per_second", "episodes", "mean_return"),
    *ppo.STATISTICS,
    *("explained_variance", "epochs", "lr"),
    *(f"{phase}_seconds" for phase in PHASES),
)


class TrainingDiverged(RuntimeError):
    """A loss or the gradient is not finite any more; further updates would only spread it."""


class Trainer:
    """One run of recurrent PPO with `Fast` on the environment that `config` names, or one rank's part in it.

    Each rank has its own environment, whose rows it collects and learns from; gradients and statistics are averages
    over all ranks.

    Attributes:
        config: TrainConfig.
        device: this rank's device.
        env: this rank's vector environment.
        agent: MettaAgent around Fast.
        learner: what the loss is computed with: `agent`, or with several ranks DistributedDataParallel around it.
        updates: updates done.
        steps: environment steps done, over all rows and ranks.
        last_update: updates in the whole run.
        seconds, cpu_seconds: wall and process CPU time spent in updates, also before a resume.

    Seeds torch's global generators, see `ranks.seed`. `config.threads` is for the caller to set, it concerns the whole
    process.
    Raises what `make_environment` raises (ImportError where the environment's package is missing).
    """

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = ranks.together(lambda: ranks.device(config.device))
        self.env = ranks.together(lambda: self._make_environment(**options))
        self.agent = make_agent(config, self.env)
        self.learner = ranks.wrap(self.agent, self.device)
        if not ranks.is_first():
            torch.manual_seed(ranks.seed(config.seed))
        self.optimizer = torch.optim.Adam(
            self.agent.parameters(), lr=config.lr, eps=ADAM_EPSILON, fused=self.device.type in ("cpu", "cuda")
        )
        self.stopwatch = Stopwatch(self.device)
        lstm = self.agent.policy.lstm
        sizes = (config.segment_length, self.env.num_tokens, lstm.num_layers, lstm.hidden_size)
        self.experience = Experience(config.num_envs, *sizes, self.device)
        self.last_update = config.updates(ranks.count())
        self.updates, self.steps, self.seconds, self.cpu_seconds = 0, 0, 0.0, 0.0
        self._restart_environment(ranks.seed(config.seed))
        if ranks.count() > 1:
            self._settle()

    def _make_environment(self, **options: Any) -> VectorEnvironment:
        config = self.config
        return make_environment(config.env, config.num_envs, self.device, ranks.seed(config.seed), **options)

    def _settle(self) -> None:
        """One backward that counts for nothing.

        After its first one DistributedDataParallel arranges the gradients anew, which changes the order of the sums
        over the ranks. With that done here, a resumed run adds up as the one that it goes on with.
        """
        segments = _one_step_segments(self.observations, self.memory(), self._starts())
        out = self.learner(segments, action=torch.zeros_like(self.experience.actions[:, :1]))
        (out["act_log_prob"].sum() + out["value"].sum()).backward()
        self.optimizer.zero_grad()

    def run(self, after_update: Callable[[dict[str, float]], None]) -> None:
        """Train up to `last_update`, calling `after_update` with each update's row of COLUMNS."""
        while self.updates < self.last_update:
            after_update(self.train_update())

    def train_update(self) -> dict[str, float]:
        """One rollout and one PPO update; returns the row for the log, which is the same on all ranks but for times.

        Raises TrainingDiverged or, where `config.check_ranks` says to look, ranks.RanksDiffer; on all ranks.
        """
        config = self.config
        wall, cpu = time.perf_counter(), time.process_time()
        lr = config.lr * (1 - self.updates / self.last_update) if config.anneal_lr else config.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        episodes = self.collect()
        advantages = self.advantages()
        returns = advantages + self.experience.values
        self.agent.train()
        statistics, epochs = ppo.update(
            self.learner, self.optimizer, self.experience, advantages, returns, config, self.stopwatch
        )
        explained = ppo.explained_variance(self.experience.values, returns)
        # the only read of the update, but for the one that target_kl asks for
        values = ranks.mean(torch.cat([statistics, explained.view(1), episodes])).tolist()
        self.updates += 1
        self.steps += config.steps_per_update(ranks.count())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.seconds += wall
        self.cpu_seconds += cpu
        row = self._row(values, epochs, lr, wall)
        if config.check_ranks and self.updates % config.check_ranks == 0:
            ranks.check_same(self.agent, f"after update {self.updates}")
        return row

    def _row(self, values: list[float], epochs: int, lr: float, wall: float) -> dict[str, float]:
        *statistics, explained, finished, return_sum = values
        row = {
            "update": self.updates,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "steps_per_second": self.config.steps_per_update(ranks.count()) / wall,
            "episodes": round(finished * ranks.count()),
            "mean_return": return_sum / finished if finished else math.nan,
            **dict(zip(ppo.STATISTICS, statistics, strict=True)),
            "explained_variance": explained if math.isfinite(explained) else math.nan,
            "epochs": epochs,
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
            experience.put(t, **results, cut_values=self._cut_values(step))
            self.observations, self.dones, self.truncateds = step.observations, step.terminals, step.truncations
            ends = step.terminals | step.truncations
            self.episode_returns += step.rewards
            finished += torch.stack([ends.sum(), (self.episode_returns * ends).sum()])
            self.episode_returns *= ~ends
        return finished

    def advantages(self) -> Tensor:
        """Advantages of the collected rollout, float [B, T].

        A termination is followed by nothing, a truncation by the value that `collect` estimated, the rollout's last
        step by the value of the next observation.
        """
        experience = self.experience
        return ppo.generalized_advantages(
            experience.rewards,
            experience.values,
            experience.terminals | experience.truncations,
            self.next_value(),
            experience.cut_values,
            self.config.gamma,
            self.config.gae_lambda,
        )

    @torch.no_grad()
    def next_value(self) -> Tensor:
        """Value of the observation after the rollout, float [B]."""
        with self.stopwatch("inference"):
            return self._value(self.observations, self.memory(), self._starts())

    def _cut_values(self, step: Step) -> Tensor:
        """Values of the final observations where `step` cut an episode, float [B]; 0 elsewhere.

        The episode might have gone on, so its end is no reset: the state is the one that the step has left.
        """
        values = torch.zeros_like(step.rewards)
        if not self.config.bootstrap_truncations:
            return values
        with self.stopwatch("inference"):
            if self.device.type != "cpu":
                # every row, because choosing the truncated ones would wait for the device
                found = self._value(step.final_observations, self.memory(), self._no_starts(len(values)))
                return torch.where(step.truncations, found, values)
            rows = step.truncations.nonzero().squeeze(1)
            if len(rows):
                h, c = self.memory()
                state = h[:, rows], c[:, rows]
                values[rows] = self._value(step.final_observations[rows], state, self._no_starts(len(rows)))
        return values

    def _value(self, observations: Tensor, memory: tuple[Tensor, Tensor], starts: dict[str, Tensor]) -> Tensor:
        """Values, float [b], of observations [b, M, 3] that meet `memory`, by a segment of one step.

        The training mode neither advances the rollout memory nor draws random numbers.
        """
        any_action = torch.zeros_like(self.experience.actions[: len(observations), :1])
        out = self.agent(_one_step_segments(observations, memory, starts), action=any_action)
        return out["value"].reshape(-1)

    def memory(self) -> tuple[Tensor, Tensor]:
        """The agent's rollout memory (h, c), each [layers, B, hidden]: no copy, it changes with the next step."""
        return self.agent.policy.lstm_h[0], self.agent.policy.lstm_c[0]

    def _starts(self) -> dict[str, Tensor]:
        """What the agent is told of episode starts; in the ablation each step is one."""
        dones = torch.ones_like(self.dones) if self.config.reset_state_every_step else self.dones
        return {"dones": dones, "truncateds": self.truncateds}

    def _no_starts(self, rows: int) -> dict[str, Tensor]:
        """The same of `rows` observations that go on with an episode."""
        going_on = torch.zeros_like(self.dones[:rows])
        return {"dones": going_on | self.config.reset_state_every_step, "truncateds": going_on}

    def _restart_environment(self, seed: int) -> None:
        self.observations = self.env.reset(seed)
        self.dones = torch.ones(self.config.num_envs, dtype=torch.bool, device=self.device)
        self.truncateds = torch.zeros_like(self.dones)
        self.episode_returns = torch.zeros(self.config.num_envs, device=self.device)
        self.agent.reset_memory()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, as `save_checkpoint` wants it; the whole of it on every rank.

        Raises ValueError where a kernel has reported an action out of range: weights after that are not worth keeping.
        A rank where none was reported raises ranks.RankError then.
        """
        own = ranks.together(self._rank_state)
        return {
            "config": self.config.to_dict(),
            "counters": {name: getattr(self, name) for name in ("updates", "steps", "seconds", "cpu_seconds")},
            "model": self.agent.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "initial_weights": dict(self.agent.policy.initial_weights),
            "initial_weight_magnitudes": dict(self.agent.policy.initial_weight_magnitudes),
            "action_names": list(self.env.action_names),
            "max_action_args": list(self.env.max_action_args),
            "feature_mapping": self.agent.get_original_feature_mapping(),
            "ranks": ranks.gather(own),
            "package_version": metta_fastagent.__version__,
            # its own class, which a file read with weights_only may not hold
            "torch_version": str(torch.__version__),
            "backend": metta_fastagent.backend(self.device),
        }

    def _rank_state(self) -> dict[str, Any]:
        """What is this rank's own, on the CPU."""
        ops.raise_if_reported(self.agent.cum_action_max_params, synchronize=True)
        rollout = ("observations", "dones", "truncateds", "episode_returns")
        state = {
            "memory": self.agent.get_memory(),
            "environment": self._environment_state(),
            "rollout": {name: getattr(self, name) for name in rollout},
            "random": _random_state(self.device),
        }
        return _on_cpu(state)

    def _environment_state(self) -> dict[str, Any] | None:
        try:
            return self.env.state_dict()
        except NotImplementedError:
            return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; an environment that could not be saved starts new episodes.

        Raises CheckpointError where the state belongs to another network, environment or number of ranks.
        """
        self._check_ranks(state)
        self._check_environment(state)
        try:
            self.agent.policy.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.agent.policy.initial_weights = {k: v.to(self.device) for k, v in state["initial_weights"].items()}
            self.agent.policy.initial_weight_magnitudes = dict(state["initial_weight_magnitudes"])
            for name, value in state["counters"].items():
                setattr(self, name, value)
            own = state["ranks"][ranks.index()]
            if own["environment"] is None:
                # another seed than at the start, so that the same episodes do not come again
                self._restart_environment(ranks.seed(self.config.seed + self.updates))
            else:
                self._restore_environment(own)
            _set_random_state(own["random"], self.device)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run ({str(error).splitlines()[0]})") from error

    def _restore_environment(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["environment"])
        for name, value in state["rollout"].items():
            setattr(self, name, value.to(self.device))
        h, c = ({key: value.to(self.device) for key, value in part.items()} for part in state["memory"])
        self.agent.set_memory((h, c))

    def _check_ranks(self, state: dict[str, Any]) -> None:
        saved, now = len(state["ranks"]), ranks.count()
        if saved != now:
            raise CheckpointError(
                f"the checkpoint is of {saved} ranks and this run has {now}; "
                f"go on with {ranks.START.replace('=N', f'={saved}')}"
            )

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
    policy = Fast(
        env,
        clip_range=config.clip_range,
        clip_mode=config.clip_mode,
        analyze_weights_interval=config.analyze_weights_interval,
        num_envs=config.num_envs,
    )
    agent = MettaAgent(env, policy, env.device)
    agent.initialize_to_environment(env.features, env.action_names, env.max_action_args, env.device)
    return agent


def _one_step_segments(observations: Tensor, memory: tuple[Tensor, Tensor], starts: dict[str, Tensor]) -> TensorDict:
    """What the agent trains on, of observations [b, M, 3] that meet `memory`, each a segment of its own."""
    entries: dict[str, Any] = {"env_obs": observations, **starts}
    entries = {name: value.unsqueeze(1) for name, value in entries.items()}
    entries |= {"lstm_h": memory[0].transpose(0, 1), "lstm_c": memory[1].transpose(0, 1)}
    return TensorDict(entries, batch_size=observations.shape[:1])


def _on_cpu(state: Any) -> Any:
    """`state`, nested dicts and tuples, with every tensor on the CPU."""
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
    # a run that moves to CUDA has no state of that kind yet
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
