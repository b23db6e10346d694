"""The command line: `python -m metta_fastagent.train`."""

import argparse
import os
import shlex
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
from metta_fastagent.train.evaluate import Evaluation, evaluate
from metta_fastagent.train.report import Log, draw_learning_curve, make_progress, require_packages, summary, time_split
from metta_fastagent.train.timer import PHASES
from metta_fastagent.train.trainer import COLUMNS, Trainer, TrainingDiverged

PROGRAM = "python -m metta_fastagent.train"
CHECKPOINT = "checkpoint.pt"
# options that a resumed run may change; the others must match, so that it equals an uninterrupted run
RESUMABLE = ("steps", "device", "threads", "checkpoint_interval", "check_ranks")


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
    try:
        options = vars(make_parser().parse_args(arguments))
        trainer, folder, log = prepare(options)
    except (ValueError, TypeError, ImportError, OSError, ranks.RankError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        _say("interrupted before training")
        return 130
    try:
        train(trainer, folder, log, options["quiet"])
        ranks.run_on_all_ranks(lambda: None if log is None else report(trainer, folder, log))
    except (TrainingDiverged, ranks.RanksDiffer) as error:
        return _fail(error, 1)
    except (OSError, ranks.RankError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        saved = folder / CHECKPOINT
        _say(f"interrupted; {f'resume with: {resume_command(saved)}' if saved.exists() else 'no checkpoint saved'}")
        return 130
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
    parser = Parser(PROGRAM, description="Train Fast with recurrent PPO.", allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, help="folder of the run (default: runs/ENV-seedN; with --resume that of the checkpoint)"
    )
    parser.add_argument("--resume", type=Path, metavar="PATH", help="resume from this checkpoint file")
    parser.add_argument("--quiet", action="store_true", help="print the final summary only")
    for each in fields(TrainConfig):
        name, kind = "--" + each.name.replace("_", "-"), cast(type, each.type)
        text = f"{each.metadata['help']} ({_default(each.name)})"
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            form = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **form)
    return parser


def _default(name: str) -> str:
    """For example "default: 0.95" or "default: 128 for memory, 64 for mettagrid"."""
    values = {env: getattr(TrainConfig.for_environment(env), name) for env in DEFAULTS}
    if name == "env":
        return f"{' or '.join(DEFAULTS)}, default: memory"
    if len(set(values.values())) == 1:
        return f"default: {values['memory']}"
    return "default: " + ", ".join(f"{value} for {env}" for env, value in values.items())


class Request(NamedTuple):
    """The checked options: what to train, the folder of the run, and the checkpoint to resume from."""

    config: TrainConfig
    folder: Path
    resume: Path | None
    state: dict[str, Any] | None


def prepare(options: dict[str, Any]) -> tuple[Trainer, Path, Log | None]:
    """Check the request and build the trainer, its folder and its log. Only rank 0 has a log."""
    config, folder, resume, state = ranks.run_on_all_ranks(lambda: read_request(options))
    # Subnormal numbers slow the saturated gates of a trained LSTM; torch's threads inherit the mode if it is set first.
    torch.set_flush_denormal(True)
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    if state is not None:
        ranks.run_on_all_ranks(lambda: trainer.load_state_dict(state))
        _note_differences(trainer, state["backend"])

    def open_log() -> Log | None:
        if not ranks.is_first():
            return None
        _make_writable(folder)
        return Log(folder, COLUMNS, source=resume and resume.parent, after=trainer.updates)

    return trainer, folder, ranks.run_on_all_ranks(open_log)


def read_request(options: dict[str, Any]) -> Request:
    """Check the options as far as possible without a trainer."""
    given = {each.name: options[each.name] for each in fields(TrainConfig) if each.name in options}
    require_packages(options["quiet"])
    resume: Path | None = options["resume"]
    state = None if resume is None else load_checkpoint(resume)
    config = TrainConfig.for_environment(**given) if state is None else resumed_config(state["config"], given)
    default = resume.parent if resume else _unused_folder(Path("runs") / f"{config.env}-seed{config.seed}")
    folder = options["out"] or default
    if (folder / CHECKPOINT).exists() and not (resume and folder.samefile(resume.parent)):
        hint = f"to continue that run, pass --resume {folder / CHECKPOINT}"
        raise UsageError(f"--out: got {folder}, which has a checkpoint, expected a folder without one; {hint}")
    return Request(config, folder, resume, state)


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
    return replace(TrainConfig.from_dict(saved), **given)


def _unused_folder(folder: Path) -> Path:
    """`folder`, or the first of `folder`-2, `folder`-3, ... without a checkpoint."""
    candidate, number = folder, 1
    while (candidate / CHECKPOINT).exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
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


def train(trainer: Trainer, folder: Path, log: Log | None, quiet: bool) -> None:
    """Train for the configured steps, with logs and checkpoints.

    After Ctrl-C on any rank, all ranks finish the update, save a checkpoint and raise KeyboardInterrupt.
    """
    interval = trainer.config.checkpoint_interval
    total_steps = trainer.last_update * trainer.config.steps_per_update(ranks.world_size())
    progress = make_progress(total_steps, trainer.steps, quiet or log is None)

    def after_update(row: dict[str, float]) -> None:
        progress.update(row)
        if log is not None:
            log.add(row)
            metrics = trainer.agent.maybe_compute_weight_metrics(trainer.updates)
            if metrics is not None:
                log.add_weight_metrics(trainer.updates, metrics)
        stop = any(ranks.all_gather(interrupted()))
        if stop or trainer.updates == trainer.last_update or (interval and trainer.updates % interval == 0):
            save(trainer, folder / CHECKPOINT)
        if stop:
            raise KeyboardInterrupt

    try:
        if trainer.updates and not ranks.all_gather((folder / CHECKPOINT).exists())[0]:
            # resumed into another folder
            save(trainer, folder / CHECKPOINT)
        with deferred_interrupt() as interrupted:
            trainer.run(after_update)
    finally:
        progress.close()


def save(trainer: Trainer, path: Path) -> None:
    """Write the state of all ranks to one file; all ranks wait until it is complete."""
    state = trainer.state_dict()
    ranks.run_on_all_ranks(lambda: save_checkpoint(path, state) if ranks.is_first() else None)


def report(trainer: Trainer, folder: Path, log: Log) -> Evaluation:
    """Evaluate, draw the learning curve and print the summary."""
    config = trainer.config
    evaluation = evaluate(trainer.agent, config)
    baselines = {"random": statistics.fmean(evaluation.random)}
    if evaluation.scripted:
        baselines["scripted"] = statistics.fmean(evaluation.scripted)
    plot = folder / "learning_curve.png"
    draw_learning_curve(plot, log.rows, f"Fast on {config.env}, seed {config.seed}, {_devices(config)}", baselines)
    phases = {f"{phase}_seconds": sum(row[f"{phase}_seconds"] for row in log.rows) for phase in PHASES}
    backend = metta_fastagent.backend(trainer.device)
    rate = trainer.steps / trainer.seconds if trainer.seconds else 0.0
    where = " on rank 0" if ranks.world_size() > 1 else ""
    facts = {
        "trained": f"{trainer.steps:,} steps in {trainer.seconds:.1f} s ({trainer.cpu_seconds:.1f} s of CPU{where})",
        "speed": f"{rate:,.0f} steps/s: {time_split(phases)}",
        "backend": f"{backend} on {_devices(config)}",
        "learning curve": str(plot),
        "resume": f"{resume_command(folder / CHECKPOINT)} --steps {2 * trainer.steps}",
    }
    print(summary(facts, evaluation))
    return evaluation


def _devices(config: TrainConfig) -> str:
    """For example "cpu" or "2 x cuda"."""
    return f"{ranks.world_size()} x {config.device}" if ranks.world_size() > 1 else config.device
