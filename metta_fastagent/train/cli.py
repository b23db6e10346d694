"""The command line: `python -m metta_fastagent.train`."""

import argparse
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch

import metta_fastagent
from metta_fastagent.train import ranks
from metta_fastagent.train.checkpoint import load_checkpoint, save_checkpoint
from metta_fastagent.train.config import DEFAULTS, TrainConfig
from metta_fastagent.train.environments import Environment, ProtocolError, make_environment
from metta_fastagent.train.evaluate import ROWS, Evaluation, evaluate, load_agent, play_worlds
from metta_fastagent.train.report import Log, Progress, draw_learning_curve, require_packages, summary, time_split
from metta_fastagent.train.timer import PHASES
from metta_fastagent.train.trainer import COLUMNS, Trainer, TrainingDiverged

PROGRAM = "python -m metta_fastagent.train"
CHECKPOINT, BEST = "checkpoint.pt", "best.pt"
# few, as training waits for them
BEST_WORLDS = 4
# options that a resumed run may change; the others must match, so that it equals an uninterrupted run
RESUMABLE = ("steps", "device", "cuda_graphs", "threads", "evaluation_interval", "checkpoint_interval", "check_ranks")


class UsageError(ValueError):
    """An invalid request of the user, shown as one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate and report. Returns 0, 1 if training diverged, 2 for an invalid request, or 130 on Ctrl-C.

    With torchrun, all ranks return the same.
    """
    try:
        with ranks.process_group():
            return _run(arguments)
    except ranks.LaunchError as error:
        return _fail(error, 2)


def _run(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["evaluate"]:
            return print_evaluation(arguments[1:])
        options = vars(make_parser().parse_args(arguments))
        given = {each.name: options[each.name] for each in fields(TrainConfig) if each.name in options}
        run = prepare(given, options["out"], options["resume"], options["quiet"], options["tensorboard"])
    except (ValueError, TypeError, ImportError, OSError, ranks.RankError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        _say("interrupted before training")
        return 130
    try:
        run_updates(run)
        report(run)
    except (TrainingDiverged, ranks.RanksDiffer) as error:
        return _fail(error, 1)
    except (OSError, ranks.RankError, ProtocolError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        saved = run.folder / CHECKPOINT
        _say(f"interrupted; {f'resume with: {resume_command(saved)}' if saved.exists() else 'no checkpoint saved'}")
        return 130
    return 0


def train(
    config: TrainConfig,
    *,
    make_env: Callable[..., Any] | None = None,
    make_agent: Callable[..., Any] | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    quiet: bool = True,
    tensorboard: bool = False,
) -> "Run":
    """Train as the command does, with the same files, summary and errors.

    Args:
        config: the hyperparameters; `env` and `agent` become the names of the two functions, if given.
        make_env: `make_env(num_envs, device)` gives a VectorEnvironment or a gymnasium.vector.VectorEnv.
        make_agent: `make_agent(env)` gives the agent, see `agents.make_agent`.
        out, resume, quiet, tensorboard: as the command's options.
    """
    names = {"env": make_env, "agent": make_agent}
    config = replace(config, **{name: _path_of(made) for name, made in names.items() if made is not None})
    folder, checkpoint = (None if path is None else Path(path) for path in (out, resume))
    run = prepare(config.to_dict(), folder, checkpoint, quiet, tensorboard, make_env, make_agent)
    run_updates(run)
    return report(run)


def _path_of(made: Any) -> str:
    """The name that `import_object` takes, if `made` can be imported."""
    named = made if hasattr(made, "__qualname__") else type(made)
    return f"{named.__module__}:{named.__qualname__}"


def print_evaluation(arguments: list[str]) -> int:
    """The command `evaluate`: mean and deviation of the returns of a checkpoint's agent. Returns 0."""
    parser = Parser(f"{PROGRAM} evaluate", description="Evaluate a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="checkpoint file")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest action instead of a random draw")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    options = parser.parse_args(arguments)
    agent, env, config = load_agent(options.checkpoint, ROWS, options.device)
    returns = torch.cat(play_worlds(agent, env, config, greedy=options.greedy)["learned"])
    print(f"mean return {returns.mean():.3f}, deviation {returns.std():.3f}, {len(returns)} episodes")
    env.close()
    return 0


def _fail(error: Exception, code: int) -> int:
    _say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    return code


def _say(message: str) -> None:
    # one line is enough for all ranks
    if ranks.is_first():
        print(f"{PROGRAM}: {message}", file=sys.stderr)


def resume_command(checkpoint: Path) -> str:
    """The shell command that resumes from `checkpoint` with this Python and number of ranks, in this folder."""
    python = Path(sys.executable or "python")
    if python.is_relative_to(Path.cwd()) and python.parent != Path.cwd():
        python = python.relative_to(Path.cwd())
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks.world_size()}"]
    start = [str(python), *(launcher if ranks.world_size() > 1 else ())]
    return shlex.join([*start, "-m", "metta_fastagent.train", "--resume", str(checkpoint)])


def make_parser() -> argparse.ArgumentParser:
    """Options of the run, and one per field of TrainConfig, which is absent from the result if it is not given."""
    parser = Parser(
        PROGRAM,
        description="Train an agent with recurrent PPO; `evaluate CHECKPOINT` evaluates one.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the run (default: runs/ENV-seedN; with --resume that of the checkpoint)"
    )
    parser.add_argument("--resume", type=Path, metavar="PATH", help="resume from this checkpoint file")
    parser.add_argument("--quiet", action="store_true", help="print the final summary only")
    parser.add_argument("--tensorboard", action="store_true", help="also log to FOLDER/tensorboard")
    for each in fields(TrainConfig):
        name, kind = "--" + each.name.replace("_", "-"), cast(type, each.type)
        text = f"{each.metadata['help']} ({_default(each.name)})"
        if text.startswith("ablation"):
            text = argparse.SUPPRESS
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            form = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **form)
    return parser


def _default(name: str) -> str:
    """For example "default: 0.95" or "default: 128 for memory, 64 for mettagrid"."""
    values = {env: getattr(TrainConfig.for_environment(env), name) for env in DEFAULTS}
    if name == "env":
        return "default: memory"
    own = getattr(TrainConfig(), name)
    return f"default: {own}" + "".join(f", {value} for {env}" for env, value in values.items() if value != own)


class Run(NamedTuple):
    """A run: its trainer, folder, log (rank 0 only), the environment of its evaluations, and the final evaluation."""

    trainer: Trainer
    folder: Path
    log: Log | None
    evaluation_env: Environment
    quiet: bool
    evaluation: Evaluation | None = None

    @property
    def agent(self) -> Any:
        """The agent, without its host."""
        return self.trainer.agent.policy


def prepare(
    given: dict[str, Any],
    out: Path | None = None,
    resume: Path | None = None,
    quiet: bool = True,
    tensorboard: bool = False,
    make_env: Any = None,
    make_agent: Any = None,
) -> Run:
    """Check the request and build the trainer, its folder and its log. `given` has fields of TrainConfig."""
    config, folder, state = ranks.run_on_all_ranks(lambda: read_request(given, out, resume, tensorboard))
    # Subnormal numbers slow the saturated gates of a trained LSTM; torch's threads inherit the mode if it is set first.
    torch.set_flush_denormal(True)
    # The importance ratio before the first update is 1 within 1e-5 only without TF32 convolutions.
    torch.backends.cudnn.allow_tf32 = False
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config, make_env, make_agent)
    with torch.random.fork_rng(devices=[]):
        env = ranks.run_on_all_ranks(lambda: make_environment(trainer.make_env, ROWS, trainer.device))
    if state is not None:
        ranks.run_on_all_ranks(lambda: trainer.load_state_dict(state))
        _note_differences(trainer, state["backend"])

    def open_log() -> Log | None:
        if not ranks.is_first():
            return None
        _make_folder(folder)
        source = resume and resume.parent
        if source and (source / BEST).exists() and not (folder / BEST).exists():
            shutil.copy(source / BEST, folder / BEST)
        return Log(folder, COLUMNS, source, trainer.updates, tensorboard, trainer.steps)

    return Run(trainer, folder, ranks.run_on_all_ranks(open_log), env, quiet)


def read_request(
    given: dict[str, Any], out: Path | None, resume: Path | None, tensorboard: bool
) -> tuple[TrainConfig, Path, dict[str, Any] | None]:
    """The configuration, the folder and the state to resume from, checked as far as possible without a trainer."""
    require_packages(tensorboard)
    state = None if resume is None else load_checkpoint(resume)
    config = TrainConfig.for_environment(**given) if state is None else resumed_config(state["config"], given)
    name = re.sub(r"\W+", "-", config.env)
    default = resume.parent if resume else _unused_folder(Path("runs") / f"{name}-seed{config.seed}")
    folder = out or default
    if (folder / CHECKPOINT).exists() and not (resume and folder.samefile(resume.parent)):
        hint = f"to continue that run, pass --resume {folder / CHECKPOINT}"
        raise UsageError(f"--out: got {folder}, which has a checkpoint, expected a folder without one; {hint}")
    return config, folder, state


def _note_differences(trainer: Trainer, saved_backend: str) -> None:
    backend = metta_fastagent.backend(trainer.device)
    if backend != saved_backend:
        _say(f"note: the checkpoint is of backend {saved_backend}, this run uses {backend}: its random numbers differ")
    if trainer.updates >= trainer.last_update:
        have = f"the checkpoint has {trainer.steps} steps and --steps is {trainer.config.steps}"
        _say(f"note: {have}: nothing to train, only evaluating; to continue, pass e.g. --steps {2 * trainer.steps}")


def resumed_config(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The checkpoint's config, overridden by the given options. Raises UsageError if others than RESUMABLE differ."""
    for name, value in given.items():
        if name not in RESUMABLE and value != saved.get(name):
            raise UsageError(f"{name}: got {value!r}, expected {saved.get(name)!r} as in the checkpoint")
    return TrainConfig.from_dict({**saved, **given})


def _unused_folder(folder: Path) -> Path:
    """`folder`, or the first of `folder`-2, `folder`-3, ... without a checkpoint."""
    candidate, number = folder, 1
    while (candidate / CHECKPOINT).exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: got {folder} ({error.strerror or error}), expected a writable folder") from None


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt at once.

    Does nothing outside the main thread, or if SIGINT is ignored or has a handler of the caller.
    """
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if ranks.is_first():
            # print is not reentrant
            os.write(2, b"\ninterrupted: saving a checkpoint after this update; Ctrl-C again to stop now\n")

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_updates(run: Run) -> None:
    """Train for the configured steps, with logs, checkpoints and the best agent so far.

    After Ctrl-C on any rank, all ranks finish the update, save a checkpoint and raise KeyboardInterrupt.
    """
    trainer, folder, log = run.trainer, run.folder, run.log
    config = trainer.config
    total_steps = trainer.last_update * config.steps_per_update(ranks.world_size())
    progress = Progress(total_steps, run.quiet or log is None)

    def due(interval: int) -> bool:
        return bool(interval) and (trainer.updates == trainer.last_update or trainer.updates % interval == 0)

    def after_update(row: dict[str, float]) -> None:
        progress.update(row)
        if log is not None:
            log.add(row)
            metrics = trainer.agent.maybe_compute_weight_metrics(trainer.updates)
            if metrics is not None:
                log.add_weight_metrics(trainer.updates, metrics)
        stop = any(ranks.all_gather(interrupted()))
        if not stop and due(config.evaluation_interval):
            keep_best(run)
        if stop or trainer.updates == trainer.last_update or due(config.checkpoint_interval):
            save(trainer, folder / CHECKPOINT)
        if stop:
            raise KeyboardInterrupt

    if trainer.updates and not ranks.all_gather((folder / CHECKPOINT).exists())[0]:
        # resumed into another folder
        save(trainer, folder / CHECKPOINT)
    with deferred_interrupt() as interrupted:
        trainer.run(after_update)


def keep_best(run: Run) -> None:
    """Evaluate the agent, and save the run as best.pt if no earlier evaluation had a higher mean return."""
    trainer = run.trainer
    returns = play_worlds(trainer.agent, run.evaluation_env, trainer.config, worlds=BEST_WORLDS)["learned"]
    value = ranks.all_gather(torch.cat(returns).mean().item())[0]
    if run.log is not None:
        run.log.add_scalar("evaluated_return", value, trainer.steps)
    if value >= trainer.best_return:
        trainer.best_return = value
        save(trainer, run.folder / BEST)


def save(trainer: Trainer, path: Path) -> None:
    """Write the state of all ranks to one file; all ranks wait until it is complete."""
    state = trainer.state_dict()
    ranks.run_on_all_ranks(lambda: save_checkpoint(path, state) if ranks.is_first() else None)


def report(run: Run) -> Run:
    """Evaluate, draw the learning curve and print the summary on rank 0; returns the run with its evaluation."""
    evaluation = ranks.run_on_all_ranks(lambda: None if run.log is None else _summarize(run, run.log))
    run.evaluation_env.close()
    run.trainer.env.close()
    return run._replace(evaluation=evaluation)


def _summarize(run: Run, log: Log) -> Evaluation:
    trainer, folder, config = run.trainer, run.folder, run.trainer.config
    evaluation = evaluate(trainer.agent, run.evaluation_env, config)
    baselines = {"random": statistics.fmean(evaluation.random)}
    if evaluation.scripted:
        baselines["scripted"] = statistics.fmean(evaluation.scripted)
    plot = folder / "learning_curve.png"
    draw_learning_curve(
        plot, log.rows, f"{type(run.agent).__name__} on {config.env}, seed {config.seed}, {_devices(config)}", baselines
    )
    phases = {f"{phase}_seconds": sum(row[f"{phase}_seconds"] for row in log.rows) for phase in PHASES}
    backend = metta_fastagent.backend(trainer.device)
    rate = trainer.steps / trainer.seconds if trainer.seconds else 0.0
    where = " on rank 0" if ranks.world_size() > 1 else ""
    facts = {
        "trained": f"{trainer.steps:,} steps in {trainer.seconds:.1f} s ({trainer.cpu_seconds:.1f} s of CPU{where})",
        "speed": f"{rate:,.0f} steps/s: {time_split(phases)}",
        "backend": f"{backend} on {_devices(config)}",
        "learning curve": str(plot),
        "best": f"{folder / BEST}, evaluated return {trainer.best_return:.3f}",
        "resume": f"{resume_command(folder / CHECKPOINT)} --steps {2 * trainer.steps}",
    }
    if not (folder / BEST).exists():
        del facts["best"]
    print(summary(facts, evaluation))
    return evaluation


def _devices(config: TrainConfig) -> str:
    """For example "cpu" or "2 x cuda"."""
    return f"{ranks.world_size()} x {config.device}" if ranks.world_size() > 1 else config.device
