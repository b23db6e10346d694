"""A run: a trainer with its folder, logs, checkpoints and final evaluation."""

import math
import os
import re
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import metta_fastagent
from metta_fastagent.runtime.checks import first_line
from metta_fastagent.runtime.output import show
from metta_fastagent.train import ranks
from metta_fastagent.train.checkpoint import load_checkpoint, save_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Environment, make_environment
from metta_fastagent.train.evaluate import CHOICE_SEED, ROWS, Evaluation, evaluate, load_agent, play_worlds
from metta_fastagent.train.folder import BEST, CHECKPOINT, PLOT, claim_folder, files_of_a_run, is_folder_of, refusal
from metta_fastagent.train.ranks import say
from metta_fastagent.train.report import Log, Progress, draw_learning_curve, require_package, summary, time_split
from metta_fastagent.train.resume import how_to_resume, keep_files, resumed_config
from metta_fastagent.train.trainer import COLUMNS, Trainer

# few, because training waits for them
BEST_WORLDS = 4
# seconds by which a signal may reach this process later than others
SIGNAL_DELAY = 1.0


class Stopped(KeyboardInterrupt):
    """A signal ended the run; `reason` says why no checkpoint was saved, and is empty if one was."""

    def __init__(self, number: int, reason: str = "") -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


class Run(NamedTuple):
    """A run: its trainer, folder, log (rank 0 only), the environment of its evaluations, and the final evaluation.

    No other run can use the folder until the end of `with run.lock`.
    """

    trainer: Trainer
    folder: Path
    log: Log | None
    evaluation_env: Environment
    quiet: bool
    lock: AbstractContextManager = nullcontext()
    evaluation: Evaluation | None = None

    @property
    def agent(self) -> Any:
        """The agent, without its host."""
        return self.trainer.agent.policy


def apply_settings(config: TrainConfig) -> None:
    """Apply settings to the process in which a run trains or its agent is evaluated."""
    # Subnormal numbers slow the saturated gates of a trained LSTM; torch's threads inherit the mode if it is set first.
    torch.set_flush_denormal(True)
    # The importance ratio before the first update is 1 within 1e-5 only without TF32 convolutions.
    torch.backends.cudnn.allow_tf32 = False
    if config.threads:
        torch.set_num_threads(config.threads)


def prepare(
    given: dict[str, Any],
    out: Path | None = None,
    resume: Path | None = None,
    quiet: bool = True,
    tensorboard: bool = False,
    make_env: Any = None,
    make_agent: Any = None,
) -> Run:
    """Check the request and build the trainer, its folder and its log. `given` holds fields of TrainConfig."""
    config, folder, state = ranks.run_on_all_ranks(lambda: read_request(given, out, resume, tensorboard))
    apply_settings(config)
    trainer = Trainer(config, make_env, make_agent)
    with torch.random.fork_rng(devices=[]):
        env = ranks.run_on_all_ranks(lambda: make_environment(trainer.make_env, ROWS, trainer.device))
    if state is not None:
        ranks.run_on_all_ranks(lambda: trainer.load_state_dict(state))
        _note_differences(trainer, state["backend"])

    def open_folder() -> tuple[Path, AbstractContextManager, float, Log | None]:
        if not ranks.is_first():
            return folder, nullcontext(), 0.0, None
        claimed, held = claim_folder(folder, resume, numbered=out is None)
        with ExitStack() as failing:
            failing.enter_context(held)
            best = keep_files(claimed, resume, state) if resume and state else trainer.best_return
            log = Log(claimed, COLUMNS, resume and resume.parent, trainer.updates, tensorboard, trainer.steps)
            for note in log.notes:
                say(f"note: {note}")
            failing.pop_all()
        return claimed, held, best, log

    folder, held, best, log = ranks.run_on_all_ranks(open_folder)
    folder, trainer.best_return = ranks.all_gather((folder, best))[0]
    return Run(trainer, folder, log, env, quiet, held)


def read_request(
    given: dict[str, Any], out: Path | None, resume: Path | None, tensorboard: bool
) -> tuple[TrainConfig, Path, dict[str, Any] | None]:
    """The configuration, the folder and the state to resume from, checked as far as possible without a trainer."""
    if tensorboard:
        require_package("tensorboard")
    state = None if resume is None else load_checkpoint(resume)
    config = TrainConfig.for_environment(**given) if state is None else resumed_config(state["config"], given)
    name = re.sub(r"\W+", "-", config.env)
    folder = out or (resume.parent if resume else Path("runs") / f"{name}-seed{config.seed}")
    if out and not is_folder_of(out, resume) and (used := files_of_a_run(out)):
        raise refusal(out, used)
    return config, folder, state


def _note_differences(trainer: Trainer, saved_backend: str) -> None:
    backend = metta_fastagent.backend(trainer.device)
    if backend != saved_backend:
        say(f"note: the checkpoint is of backend {saved_backend}, this run uses {backend}: its random numbers differ")
    if trainer.updates >= trainer.last_update:
        have = f"the checkpoint has {trainer.steps} steps and --steps is {trainer.config.steps}"
        say(f"note: {have}: nothing to train, only evaluating; to continue, pass e.g. --steps {2 * trainer.steps}")
    elif trainer.solved:
        say(f"note: {_why_solved(trainer)}: nothing to train, only evaluating; to continue, pass --stop-return inf")
    elif trainer.lr_share < trainer.scheduled_share():
        lr = trainer.lr_share * trainer.config.lr
        say(f"note: the learning rate has fallen to {lr:.2g} and stays there: a longer run does not raise it again")


def _why_solved(trainer: Trainer) -> str:
    before, last = trainer.last_returns
    return f"two evaluations in a row, {before:.3f} and {last:.3f}, reach --stop-return {trainer.config.stop_return}"


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the first SIGINT or SIGTERM received, or 0.

    In a single process, another Ctrl-C raises Stopped at once; torchrun repeats the signals that it gets. Does nothing
    outside the main thread, or for a signal that is ignored or has a handler set by the caller.
    """
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        alone = ranks.world_size() == 1
        if len(received) > 1 and number == signal.SIGINT and alone:
            raise Stopped(number, "Ctrl-C came twice")
        if len(received) == 1 and ranks.is_first():
            again = "; Ctrl-C again to stop now" * alone
            # print is not reentrant
            os.write(2, f"\ninterrupted: saving a checkpoint after this update{again}\n".encode())

    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number, default in defaults.items() if in_main_thread and signal.getsignal(number) == default]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number in ours:
            signal.signal(number, defaults[number])


def run_updates(run: Run, evaluate_agent: Callable[[Run], None]) -> None:
    """Train for the configured steps, with logs and checkpoints; `evaluate_agent` is `keep_best` or a replacement.

    After Ctrl-C or SIGTERM on any rank, all ranks finish the update, save a checkpoint and raise Stopped.
    """
    trainer, folder, log = run.trainer, run.folder, run.log
    config = trainer.config
    total_steps = trainer.last_update * config.steps_per_update(ranks.world_size())
    progress = Progress(total_steps, run.quiet or log is None)

    def due(interval: int) -> bool:
        return bool(interval) and (trainer.updates == trainer.last_update or trainer.updates % interval == 0)

    def after_update(row: dict[str, float]) -> None:
        stop = max(ranks.all_gather(interrupted()))
        # Whatever decides when the run stops must not depend on interruptions.
        if due(config.evaluation_interval) and (not stop or config.stop_return < math.inf):
            evaluate_agent(run)
            row["evaluated_return"] = trainer.last_returns[-1]
        progress.update(row)
        if log is not None:
            log.add(row)
            if (metrics := trainer.agent.maybe_compute_weight_metrics(trainer.updates)) is not None:
                log.add_weight_metrics(trainer.updates, metrics)
        if stop or trainer.solved or trainer.updates == trainer.last_update or due(config.checkpoint_interval):
            save(trainer, folder / CHECKPOINT)
        if stop:
            raise Stopped(stop)

    if trainer.updates and not ranks.all_gather((folder / CHECKPOINT).exists())[0]:
        # resumed into another folder
        save(trainer, folder / CHECKPOINT)
    with deferred_interrupt() as interrupted:
        try:
            trainer.run(after_update)
            return progress.close()
        except (Exception, KeyboardInterrupt) as error:
            progress.close()
            failure = error if isinstance(error, Stopped) else _stopped_or(error, run, interrupted)
    if isinstance(failure, Stopped) and log is not None and log.rows:
        with suppress(OSError):
            say(f"curve: {_draw(run, log, {})}")
    raise failure


def _stopped_or(failure: BaseException, run: Run, interrupted: Callable[[], int]) -> BaseException:
    """Stopped if a signal explains `failure`, because it may have ended the environment's processes; else `failure`.

    Completed updates are saved, without the environment: a resumed run starts new episodes.
    """
    trainer, limit = run.trainer, time.monotonic() + SIGNAL_DELAY
    # the environment's processes may get the signal first
    while not interrupted() and isinstance(failure, (OSError, EOFError)) and time.monotonic() < limit:
        time.sleep(0.01)
    if not interrupted():
        return failure
    reason = f"{type(failure).__name__} in the last update: {first_line(failure)}"
    if ranks.world_size() == 1 and not trainer.learning:
        say(f"note: the checkpoint is of update {trainer.updates}, without the environment's state; {reason}")
        try:
            save(trainer, run.folder / CHECKPOINT, with_environment=False)
            reason = ""
        except OSError as error:
            reason = str(error)
    # gymnasium warns about the step that its processes do not finish
    with warnings.catch_warnings(action="ignore"), suppress(Exception):
        trainer.env.close()
    return Stopped(interrupted(), reason).with_traceback(failure.__traceback__)


def keep_best(run: Run) -> None:
    """Evaluate the agent in a few worlds; save the run as best.pt if no earlier evaluation had a higher return."""
    trainer, env = run.trainer, run.evaluation_env
    env.load_statistics(trainer.env.state_dict())
    returns = play_worlds(trainer.agent, env, trainer.config, worlds=BEST_WORLDS, first_seed=CHOICE_SEED)["learned"]
    value = ranks.all_gather(torch.cat(returns).mean().item())[0]
    trainer.last_returns = (trainer.last_returns[1], value)
    if value >= trainer.best_return:
        trainer.best_return = value
        save(trainer, run.folder / BEST)


def save(trainer: Trainer, path: Path, with_environment: bool = True) -> None:
    """Write the state of all ranks to one file; all ranks wait until it is complete."""
    state = trainer.state_dict(with_environment)
    ranks.run_on_all_ranks(lambda: save_checkpoint(path, state) if ranks.is_first() else None)


def report(run: Run) -> Run:
    """Evaluate, draw the learning curve and print the summary on rank 0; returns the run with its evaluation."""
    evaluation = ranks.run_on_all_ranks(lambda: None if run.log is None else _summarize(run, run.log))
    run.evaluation_env.close()
    run.trainer.env.close()
    return run._replace(evaluation=evaluation)


def _summarize(run: Run, log: Log) -> Evaluation:
    trainer, folder, config = run.trainer, run.folder, run.trainer.config
    run.evaluation_env.load_statistics(trainer.env.state_dict())
    evaluation = evaluate(trainer.agent, run.evaluation_env, config)
    best = ""
    if (folder / BEST).exists():
        evaluation = replace(evaluation, best=_evaluate_best(run, evaluation))
        mean = statistics.fmean(evaluation.best or ())
        best = f"mean return {mean:.3f}, {trainer.best_return:.3f} when it was chosen: {folder / BEST}"
    played = {"random": evaluation.random, "scripted": evaluation.scripted}
    baselines = {name: statistics.fmean(returns) for name, returns in played.items() if returns}
    plot = _draw(run, log, baselines)
    rate = trainer.steps / trainer.seconds if trainer.seconds else 0.0
    further = ("--stop-return", "inf") if trainer.solved else ("--steps", str(2 * trainer.steps))
    where = " on rank 0" if ranks.world_size() > 1 else ""
    facts = {
        "trained": f"{trainer.steps:,} steps in {trainer.seconds:.1f} s ({trainer.cpu_seconds:.1f} s of CPU{where})",
        "speed": f"{rate:,.0f} steps/s",
        "time": time_split(log.rows),
        "backend": f"{metta_fastagent.backend(trainer.device)} on {_devices(config)}",
        "stopped": _why_solved(trainer) if trainer.solved else "",
        "learning curve": plot,
        "best": best,
        "resume": how_to_resume(trainer, folder / CHECKPOINT, *further),
    }
    show(summary(facts, evaluation, log.rows))
    return evaluation


def _evaluate_best(run: Run, evaluation: Evaluation) -> tuple[float, ...]:
    """The returns of best.pt in the worlds of `evaluation`, which has them already if the last update was the best."""
    trainer, path = run.trainer, run.folder / BEST
    if load_checkpoint(path)["counters"]["updates"] == trainer.updates:
        return evaluation.learned
    best = load_agent(path, ROWS, str(trainer.device), trainer.make_env, trainer.make_policy)
    returns = play_worlds(*best)["learned"]
    best[1].close()
    return tuple(row.mean().item() for row in returns)


def _draw(run: Run, log: Log, baselines: dict[str, float]) -> str:
    """Draw the learning curve; returns its path, or why there is none."""
    config = run.trainer.config
    title = f"{type(run.agent).__name__} on {config.env}, seed {config.seed}, {_devices(config)}"
    return draw_learning_curve(run.folder / PLOT, log.rows, title, baselines, run.trainer.solved)


def _devices(config: TrainConfig) -> str:
    """For example "cpu" or "2 x cuda"."""
    return f"{ranks.world_size()} x {config.device}" if ranks.world_size() > 1 else config.device
