"""The command line, `python -m metta_fastagent.train`, and its Python counterpart `train`."""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from metta_fastagent.runtime.origin import origin_of
from metta_fastagent.runtime.output import show
from metta_fastagent.runtime.settings import process_settings_kept
from metta_fastagent.train import ranks
from metta_fastagent.train.config import DEFAULTS, GYMNASIUM, TrainConfig
from metta_fastagent.train.environments import ProtocolError
from metta_fastagent.train.evaluate import ROWS, load_agent, play_worlds
from metta_fastagent.train.folder import CHECKPOINT, UsageError
from metta_fastagent.train.ranks import PROGRAM, say
from metta_fastagent.train.resume import how_to_resume
from metta_fastagent.train.run import Run, Stopped, apply_settings, keep_best, prepare, report, run_updates
from metta_fastagent.train.trainer import TrainingDiverged


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate and report.

    Returns 0, 1 if training diverged, 2 for an invalid request or a failed write, 130 on Ctrl-C, or 143 on SIGTERM.

    With torchrun, all ranks return the same value.
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
        say("interrupted before training")
        return 130
    try:
        with run.lock:
            run_updates(run, keep_best)
            report(run)
    except (TrainingDiverged, ranks.RanksDiffer) as error:
        return _fail(error, 1)
    except (OSError, ranks.RankError, ProtocolError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt as error:
        number, reason = (error.number, error.reason) if isinstance(error, Stopped) else (signal.SIGINT, "")
        checkpoint, hint = run.folder / CHECKPOINT, "no checkpoint saved"
        if checkpoint.exists():
            hint = f"resume with:\n{how_to_resume(run.trainer, checkpoint)}"
        say(f"interrupted; {f'the last update is not saved ({reason}); ' * bool(reason)}{hint}")
        return 128 + number
    return 0


def print_evaluation(arguments: list[str]) -> int:
    """The command `evaluate`: mean and standard deviation of a checkpoint agent's returns. Returns 0."""
    parser = Parser(f"{PROGRAM} evaluate", description="Evaluate a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="checkpoint file")
    parser.add_argument("--greedy", action="store_true", help="take the most likely action instead of a random draw")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    options = parser.parse_args(arguments)
    agent, env, config = load_agent(options.checkpoint, ROWS, options.device)
    apply_settings(config)
    returns = torch.cat(play_worlds(agent, env, config, greedy=options.greedy)["learned"])
    show(f"mean return {returns.mean():.3f}, deviation {returns.std():.3f}, {len(returns)} episodes")
    env.close()
    return 0


def train(
    config: TrainConfig,
    *,
    make_env: Callable[..., Any] | None = None,
    make_agent: Callable[..., Any] | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Run:
    """Train like the command, with the same files, summary and errors.

    Args:
        config: the hyperparameters; `env` and `agent` become the names of the two functions, if given.
            `TrainConfig.for_environment` has the command's defaults for an environment.
        make_env: `make_env(num_envs, device)` returns a VectorEnvironment or a gymnasium.vector.VectorEnv.
        make_agent: `make_agent(env)` returns the agent, see `agents.make_agent`.
        out, resume, quiet, tensorboard: like the command's options.

    Example:
        run = train(TrainConfig.for_environment("gym:CartPole-v1", steps=20_000), out="runs/cartpole")
        print(statistics.fmean(run.evaluation.learned), run.folder)
    """
    names = {"env": make_env, "agent": make_agent}
    config = replace(config, **{name: _path_of(made) for name, made in names.items() if made is not None})
    folder, checkpoint = (None if path is None else Path(path) for path in (out, resume))
    with process_settings_kept(torch.device(config.device)):
        run = prepare(config.to_dict(), folder, checkpoint, quiet, tensorboard, make_env, make_agent)
        with run.lock:
            run_updates(run, keep_best)
            return report(run)


def _path_of(made: Any) -> str:
    """The name that `import_object` would take, if `made` can be imported."""
    named = made if hasattr(made, "__qualname__") else type(made)
    return f"{named.__module__}:{named.__qualname__}"


def _fail(error: Exception, code: int) -> int:
    message = str(error).strip() if sys.stderr.isatty() else " ".join(str(error).split())
    origin, place = origin_of(error)
    say(f"error: {message or type(error).__name__}" + f"\n  {type(origin).__name__} at {place}" * bool(place))
    return code


def make_parser() -> argparse.ArgumentParser:
    """Options of the run, and one per field of TrainConfig; options not given are absent from the result."""
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
    known = [*DEFAULTS.items(), ("gym:ID", GYMNASIUM)]
    for each in fields(TrainConfig):
        name, kind = "--" + each.name.replace("_", "-"), cast(type, each.type)
        others = (f", {_shown(values[each.name])} for {env}" for env, values in known if each.name in values)
        text = f"{each.metadata['help']} (default: {_shown(each.default)}{''.join(others)})"
        if text.startswith("ablation"):
            text = argparse.SUPPRESS
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            form = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **form)
    return parser


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
