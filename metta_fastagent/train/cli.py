"""The command line: `python -m metta_fastagent.train`."""

import argparse
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import metta_fastagent
from metta_fastagent.train import ranks
from metta_fastagent.train.checkpoint import load_checkpoint, save_checkpoint
from metta_fastagent.train.config import DEFAULTS, TrainConfig
from metta_fastagent.train.evaluate import Evaluation, evaluate
from metta_fastagent.train.report import Log, draw_learning_curve, make_progress, summary, time_split
from metta_fastagent.train.stopwatch import PHASES
from metta_fastagent.train.trainer import COLUMNS, Trainer, TrainingDiverged

PROGRAM = "python -m metta_fastagent.train"
CHECKPOINT = "checkpoint.pt"
# what a resumed run may set anew: nothing that an update depends on but its length and its place
RESUMABLE = ("steps", "device", "threads", "checkpoint_interval", "check_ranks")


class Refused(ValueError):
    """What the user asked for can not be done; shown as one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, report. Returns 0; 1 where training diverged; 2 for a wrong request; 130 on Ctrl-C.

    Started by torchrun it is one of several ranks, all of which return the same.
    """
    try:
        with ranks.joined():
            return _run(arguments)
    except ranks.LaunchError as error:
        print(_error_line(error), file=sys.stderr)
        return 2


def _run(arguments: list[str] | None) -> int:
    try:
        options = vars(make_parser().parse_args(arguments))
        trainer, folder, log = prepare(options)
    except (ValueError, TypeError, ImportError, OSError, ranks.RankError) as error:
        return _fail(error, 2)
    try:
        train(trainer, folder, log, options["quiet"])
        ranks.together(lambda: None if log is None else report(trainer, folder, log))
    except (TrainingDiverged, ranks.RanksDiffer) as error:
        return _fail(error, 1)
    except (OSError, ranks.RankError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        saved = folder / CHECKPOINT
        hint = f"to go on: {resume_command(saved)}" if saved.exists() else "no checkpoint yet"
        return _fail(f"stopped; {hint}", 130)
    return 0


def _fail(error: Exception | str, code: int) -> int:
    # all ranks fail together: one line is enough
    if ranks.is_first():
        print(_error_line(error), file=sys.stderr)
    return code


def _error_line(error: Exception | str) -> str:
    return f"{PROGRAM}: error: {' '.join(str(error).split()) or type(error).__name__}"


def resume_command(checkpoint: Path) -> str:
    """What to type to go on from `checkpoint` with as many ranks as now."""
    start = f"torchrun --nproc-per-node={ranks.count()}{PROGRAM.removeprefix('python')}"
    return f"{start if ranks.count() > 1 else PROGRAM} --resume {shlex.quote(str(checkpoint))}"


def make_parser() -> argparse.ArgumentParser:
    """One option per field of TrainConfig, absent from the result where it was not given, and those of the run."""
    parser = Parser(PROGRAM, description="Train Fast with recurrent PPO.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder for logs and checkpoints (default: runs/<env>-seed<k>)")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="go on from this checkpoint")
    parser.add_argument("--quiet", action="store_true", help="show the closing summary only")
    for each in fields(TrainConfig):
        name = "--" + each.name.replace("_", "-")
        common: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{each.metadata['help']} ({_default(each.name)})",
        }
        if each.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(name, type=each.type, metavar="X", **common)
    return parser


def _default(name: str) -> str:
    """As in "default: 320000 for memory, 200000 for mettagrid"."""
    values = {env: getattr(TrainConfig.for_environment(env), name) for env in DEFAULTS}
    if name == "env":
        return f"{' or '.join(DEFAULTS)}, default: memory"
    if len(set(values.values())) == 1:
        return f"default: {values['memory']}"
    return "default: " + ", ".join(f"{value} for {env}" for env, value in values.items())


class Request(NamedTuple):
    """What to train, where its files go, and where a resumed run stood."""

    config: TrainConfig
    folder: Path
    resume: Path | None
    state: dict[str, Any] | None


def prepare(options: dict[str, Any]) -> tuple[Trainer, Path, Log | None]:
    """Check the whole request before anything is trained; what fails here is the request's fault.

    Only the first rank has a log.
    """
    config, folder, resume, state = ranks.together(lambda: read_request(options))
    if config.threads:
        torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    if state is not None:
        ranks.together(lambda: trainer.load_state_dict(state))
        _compare_backends(state["backend"], metta_fastagent.backend(trainer.device))

    def open_log() -> Log | None:
        if not ranks.is_first():
            return None
        _make_writable(folder)
        return Log(folder, COLUMNS, source=resume and resume.parent, after=trainer.updates)

    return trainer, folder, ranks.together(open_log)


def read_request(options: dict[str, Any]) -> Request:
    """The options, checked as far as that is possible without a trainer."""
    given = {each.name: options[each.name] for each in fields(TrainConfig) if each.name in options}
    # fails here and not after hours where it is not installed
    import matplotlib  # noqa: F401

    resume: Path | None = options["resume"]
    if resume is not None:
        state = load_checkpoint(resume)
        return Request(resumed_config(state["config"], given), options["out"] or resume.parent, resume, state)
    config = TrainConfig.for_environment(**given)
    folder = options["out"] or _unused_folder(Path("runs") / f"{config.env}-seed{config.seed}")
    if (folder / CHECKPOINT).exists():
        raise Refused(f"--out {folder} holds a run; go on with --resume {folder / CHECKPOINT}, or name another")
    return Request(config, folder, None, None)


def _compare_backends(saved: str, now: str) -> None:
    if saved != now and ranks.is_first():
        was = f"the checkpoint was written with backend {saved}, this run goes on with {now}"
        print(f"{PROGRAM}: note: {was}: its random draws differ", file=sys.stderr)


def resumed_config(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The checkpoint's config with what was given on top; ValueError where that is none of RESUMABLE and differs."""
    for name, value in given.items():
        if name not in RESUMABLE and value != saved.get(name):
            raise Refused(f"{name} is {saved.get(name)!r} in the checkpoint and can not change to {value!r}")
    return replace(TrainConfig.from_dict(saved), **given)


def _unused_folder(folder: Path) -> Path:
    """`folder`, or the first of `folder`-2, `folder`-3 ... that holds no run."""
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
        raise Refused(f"--out {folder} can not be written to ({error.strerror or error})") from None


def train(trainer: Trainer, folder: Path, log: Log | None, quiet: bool) -> None:
    """Run to the end of the configured steps, with logs and checkpoints on the way."""
    interval = trainer.config.checkpoint_interval
    total_steps = trainer.last_update * trainer.config.steps_per_update(ranks.count())
    progress = make_progress(total_steps, trainer.steps, quiet or log is None)

    def after_update(row: dict[str, float]) -> None:
        progress.update(row)
        if log is not None:
            log.add(row)
            metrics = trainer.agent.maybe_compute_weight_metrics(trainer.updates)
            if metrics is not None:
                log.add_weight_metrics(trainer.updates, metrics)
        if trainer.updates == trainer.last_update or (interval and trainer.updates % interval == 0):
            save(trainer, folder / CHECKPOINT)

    try:
        trainer.run(after_update)
    finally:
        progress.close()


def save(trainer: Trainer, path: Path) -> None:
    """Write the state of all ranks to one file; no rank goes on before it is there."""
    state = trainer.state_dict()
    ranks.together(lambda: save_checkpoint(path, state) if ranks.is_first() else None)


def report(trainer: Trainer, folder: Path, log: Log) -> Evaluation:
    """Compare with a random and a scripted policy, draw the curve, print the summary."""
    config = trainer.config
    evaluation = evaluate(trainer.agent, config)
    levels = {"random": _mean(evaluation.random)}
    if evaluation.scripted:
        levels["scripted"] = _mean(evaluation.scripted)
    plot = folder / "learning_curve.png"
    draw_learning_curve(plot, log.rows, f"Fast on {config.env}, seed {config.seed}, {_devices(config)}", levels)
    phases = {f"{phase}_seconds": sum(row[f"{phase}_seconds"] for row in log.rows) for phase in PHASES}
    backend = metta_fastagent.backend(trainer.device)
    rate = trainer.steps / trainer.seconds if trainer.seconds else 0.0
    each = " on rank 0" if ranks.count() > 1 else ""
    facts = {
        "trained": f"{trainer.steps:,} steps in {trainer.seconds:.1f} s ({trainer.cpu_seconds:.1f} s of CPU{each})",
        "speed": f"{rate:,.0f} steps/s: {time_split(phases)}",
        "backend": f"{backend} on {_devices(config)}",
        "learning curve": str(plot),
        "resume": f"{resume_command(folder / CHECKPOINT)} --steps {2 * trainer.steps}",
    }
    print(summary(facts, evaluation))
    return evaluation


def _devices(config: TrainConfig) -> str:
    """As in "cpu" or "2 x cuda"."""
    return f"{ranks.count()} x {config.device}" if ranks.count() > 1 else config.device


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
