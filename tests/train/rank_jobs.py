"""Jobs that the tests run on each rank, in the processes of a RankPool."""

import contextlib
import io
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.train import checkpoint, cli, ppo, ranks, returns
from metta_fastagent.train import run as train_run
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import ProtocolError, make_environment
from metta_fastagent.train.experience import Experience
from metta_fastagent.train.timer import PhaseTimer
from metta_fastagent.train.trainer import Trainer, make_agent

CPU = torch.device("cpu")
ENTRIES = (
    *("observations", "actions", "log_probs", "values", "rewards", "dones", "truncateds", "terminals", "truncations"),
    *("bootstrap_values", "lstm_h", "lstm_c"),
)


def share(values: torch.Tensor) -> torch.Tensor:
    """This rank's rows of all ranks' rows."""
    return values.chunk(ranks.world_size())[ranks.rank()]


def learn(
    config: TrainConfig,
    dtype: torch.dtype,
    model: dict[str, Any],
    rollout: dict[str, torch.Tensor],
    optimizer_type: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """One `ppo.update` on this rank's share of `rollout`: parameters, this rank's statistics, passes."""
    config = replace(config, num_envs=config.num_envs // ranks.world_size())
    agent = make_agent(config, make_environment("memory", config.num_envs, CPU))
    agent.policy.load_state_dict(model)
    agent.update_l2_init_weight_copy()
    learner = ranks.wrap_ddp(agent.to(dtype), CPU)
    optimizer = optimizer_type(agent.parameters(), lr=config.lr)
    state = agent.policy.lstm_h[0], agent.policy.lstm_c[0]
    experience = Experience(share(rollout["observations"])[:, 0], config.segment_length, state)
    for name in ENTRIES:
        setattr(experience, name, share(rollout[name]))
    advantages, returns = share(rollout["advantages"]).to(dtype), share(rollout["returns"]).to(dtype)
    statistics, epochs = ppo.update(learner, optimizer, experience, advantages, returns, config, PhaseTimer(CPU))
    return {name: parameter.detach() for name, parameter in agent.named_parameters()}, statistics, epochs


def shifted_kl(config: TrainConfig, shift: float) -> tuple[float, int]:
    """(KL of this rank, passes) if the stored log-probs of rank 0 are off by `shift` and those of rank 1 are right."""
    trainer = Trainer(config)
    trainer.collect()
    trainer.experience.log_probs += shift if ranks.is_first() else 0.0
    advantages = trainer.advantages()
    returns = advantages + trainer.experience.values
    arguments = (trainer.experience, advantages, returns, config, trainer.timer)
    statistics, epochs = ppo.update(trainer.learner, trainer.optimizer, *arguments)
    return statistics[ppo.KL].item(), epochs


def return_moments(samples: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The moments of all ranks' shares of `samples`, in two parts."""
    moments, own = returns.no_moments(CPU), None if valid is None else share(valid)
    for part in (slice(0, 2), slice(2, None)):
        moments = returns.merged(moments, share(samples)[:, part], None if own is None else own[:, part])
    return moments


def start(config: TrainConfig) -> dict[str, Any]:
    """The initial state of a rank."""
    trainer = Trainer(config)
    return {
        "parameters": ranks.parameter_hash(trainer.agent),
        "initial_weights": {name: weight.clone() for name, weight in trainer.agent.policy.initial_weights.items()},
        "observations": trainer.observations,
        "draws": torch.rand(8),
        "seed": ranks.seed(config.seed),
    }


def two_updates(config: TrainConfig) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The rows of two updates, and what this rank alone saw in the second one's rollout."""
    trainer = Trainer(config)
    rows = [trainer.train_update(), trainer.train_update()]
    experience = trainer.experience
    ends = experience.terminals | experience.truncations
    return rows, {"episodes": ends.sum().item(), "steps": trainer.steps, "last_update": trainer.last_update}


def different_parameters(config: TrainConfig) -> str:
    """The error after one bit of a parameter of rank 1 has been flipped; none before that."""
    trainer = Trainer(config)
    trainer.train_update()
    if not ranks.is_first():
        with torch.no_grad():
            # not the last bit, which the next step may round away
            trainer.agent.policy.policy.fc1.weight.view(torch.int32)[0, 0] ^= 1 << 20
    try:
        trainer.train_update()
    except ranks.RanksDiffer as error:
        return str(error)
    return "no error"


def diverging(config: TrainConfig) -> str:
    """The error after rewards of NaN on rank 1 only."""
    trainer = Trainer(config)
    trainer.train_update()
    if not ranks.is_first():
        trainer.experience.store = with_nan_rewards(trainer.experience.store)
    try:
        trainer.train_update()
    except (ProtocolError, ranks.RankError) as error:
        return str(error)
    return "no error"


class Unused(VectorAgent):
    """Has a layer that no loss uses, and one that only rank 0 uses, and only every other time."""

    def __init__(self, env: Any, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.never, self.sometimes, self.calls = torch.nn.Linear(2, 2), torch.nn.Linear(1, 1), 0

    def forward(self, td: Any, state: Any = None, action: Any = None) -> Any:
        out = super().forward(td, state, action)
        self.calls += 1
        if action is not None and ranks.is_first() and self.calls % 2:
            out["value"] = self.sometimes(out["value"])
        return out


def with_unused_parameters(config: TrainConfig) -> list[str]:
    """The hash of the parameters, before and after two updates."""
    trainer = Trainer(config, "memory", Unused)
    before = {name: value.clone() for name, value in trainer.agent.policy.state_dict().items()}
    for _ in range(2):
        trainer.train_update()
    after = trainer.agent.policy.state_dict()
    changed = {name: not torch.equal(value, after[name]) for name, value in before.items()}
    return [ranks.parameter_hash(trainer.agent), *(name for name in changed if changed[name])]


def valid_on_one_rank(config: TrainConfig, first: bool) -> str:
    """The hash of the parameters after an update in which one rank alone, the first or the other, has `valid`."""
    trainer = Trainer(config)
    collect = trainer.collect

    def marking() -> torch.Tensor:
        finished = collect()
        if ranks.is_first() == first:
            trainer.experience.store_valid(0, torch.zeros_like(trainer.dones))
        return finished

    trainer.collect = marking
    trainer.train_update()
    return ranks.parameter_hash(trainer.agent)


def with_nan_rewards(store: Any) -> Any:
    def store_nan(t: int, **step: torch.Tensor) -> None:
        store(t, **{name: value * torch.nan if name == "rewards" else value for name, value in step.items()})

    return store_nan


def failing_alone(failing: int) -> tuple[str, str]:
    """Type and text of the error of `run_on_all_ranks` if rank `failing` fails."""

    def action() -> int:
        if ranks.rank() == failing:
            raise OSError(28, "No space left on device")
        return ranks.rank()

    try:
        ranks.run_on_all_ranks(action)
    except (OSError, ranks.RankError) as error:
        return type(error).__name__, str(error)
    return "", ""


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command, inside the group that this process has joined."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli._run(list(arguments))
    return code, out.getvalue(), err.getvalue()


def train(*arguments: str) -> None:
    """The command up to its last checkpoint, without evaluation and plot."""
    options = vars(cli.make_parser().parse_args(list(arguments)))
    given = {name: value for name, value in options.items() if name in TrainConfig.__dataclass_fields__}
    train_run.run_updates(train_run.prepare(given, options["out"], options["resume"]), train_run.keep_best)


def interrupted_on_one_rank(*arguments: str) -> str:
    """The error after a SIGINT that only rank 1 gets, in its second update."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train_update = Trainer.train_update

    def interrupting(trainer: Trainer) -> dict[str, float]:
        if trainer.updates == 1 and not ranks.is_first():
            signal.raise_signal(signal.SIGINT)
        return train_update(trainer)

    Trainer.train_update = interrupting
    try:
        train(*arguments)
    except KeyboardInterrupt:
        return "KeyboardInterrupt"
    finally:
        Trainer.train_update = train_update
    return "no error"


def train_until_killed(update: int, *arguments: str) -> None:
    """`train`, but SIGKILL in the middle of the learning of `update`."""
    backward, calls = ppo._backward, []

    def killing(*rest: Any) -> torch.Tensor:
        calls.append(None)
        # two passes over two minibatches of two micro-batches each
        if len(calls) == 8 * (update - 1) + 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*rest)

    ppo._backward = killing
    train(*arguments)


def in_a_fork(job: Any, *arguments: Any) -> int:
    """The signal that ended a copy of this process which ran `job`; 0 for none."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            job(*arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(state: dict[str, Any], file: Any) -> None:
    whole = io.BytesIO()
    torch_save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die()


torch_save = torch.save
fsync = os.fsync


def second_fsync() -> Any:
    """An os.fsync that dies on its second call, which is the folder's: the file is in place by then."""
    calls = []

    def dying(descriptor: int) -> None:
        calls.append(None)
        fsync(descriptor) if len(calls) == 1 else die()

    return dying


KILL_POINTS = {
    "before the first byte": (torch, "save", die),
    "during the write": (torch, "save", half_a_file),
    "before the flush": (os, "fsync", die),
    "before the rename": (os, "replace", die),
    "after the rename": (os, "fsync", second_fsync()),
}


def write_until_killed(point: str, path: Path) -> None:
    """Train one update from the checkpoint at `path`, and die at `point` of writing the next one."""
    state = checkpoint.load_checkpoint(path)
    trainer = Trainer(TrainConfig.from_dict(state["config"]))
    trainer.load_state_dict(state)
    trainer.train_update()
    place, name, replacement = KILL_POINTS[point]
    setattr(place, name, replacement)
    train_run.save(trainer, path)
