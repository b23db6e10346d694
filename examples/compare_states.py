"""Compare training from the stored LSTM state with training from a zero state, on the memory task.

    python examples/compare_states.py

Segments are shorter than the delay between the cue and the first effective press, so no gradient flows from a press
back to its cue: in training, a press depends on the cue only through the state at the start of its segment.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from metta_fastagent import Fast
from metta_fastagent.train import report
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import make_environment
from metta_fastagent.train.environments.memory import MemoryEnvironment
from metta_fastagent.train.evaluate import ROWS, WORLDS, Evaluation, evaluate
from metta_fastagent.train.trainer import Trainer, TrainingDiverged

PROGRAM = "python examples/compare_states.py"
# A small room means shorter walks, so the rewarded press is less rare.
TASK = {"delay": 5, "room_size": 3}
SEGMENT_LENGTH = 4
# as many steps per update as by default: more rows make up for shorter segments
NUM_ENVS = 512
STEPS = 1_500_000
# label in the plot -> the ablation
RUNS = {"stored state": False, "zero state": True}
# distinguishable in grayscale: dark and solid, light and dashed
STYLES = {"stored state": ("#1f4e79", "-"), "zero state": ("#d98032", "--")}


class Run(NamedTuple):
    rows: list[report.Row]
    evaluation: Evaluation


def configuration(zero_segment_state: bool, seed: int, steps: int) -> TrainConfig:
    """The configuration of a run; TASK has its environment's options."""
    return TrainConfig(
        seed=seed,
        steps=steps,
        num_envs=NUM_ENVS,
        segment_length=SEGMENT_LENGTH,
        # Both leave the plateau of pressing any switch sooner than the defaults; so does not bootstrapping truncations.
        lr=1.5e-3,
        ent_coef=0.005,
        bootstrap_truncations=False,
        normalize_returns=False,
        zero_segment_state=zero_segment_state,
    )


def train(config: TrainConfig) -> Run:
    """Train on the task and evaluate. Flushes subnormal numbers and sets torch's number of threads."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(config.threads)
    make_env = partial(MemoryEnvironment, **TASK)
    trainer, rows = Trainer(config, make_env, Fast), []
    progress = report.Progress(config.steps)

    def after_update(row: report.Row) -> None:
        rows.append(row)
        progress.update(row)

    trainer.run(after_update)
    return Run(rows, evaluate(trainer.agent, make_environment(make_env, ROWS, trainer.device), config))


def draw(path: Path, runs: dict[str, Run], seed: int) -> None:
    """Plot each run's mean return over environment steps, with both baselines' returns, as a PNG."""
    figure, axes = report.new_axes()
    for name, run in runs.items():
        color, style = STYLES[name]
        steps, returns = report.returns_by_step(run.rows)
        label = f"{name} ({statistics.fmean(run.evaluation.learned):.3g} at the end)"
        axes.plot(steps, report.smoothed(returns), color=color, linestyle=style, linewidth=1.8, label=label)
    evaluation = next(iter(runs.values())).evaluation
    baselines = {"scripted": statistics.fmean(evaluation.scripted or ()), "random": statistics.fmean(evaluation.random)}
    task = f"cue {TASK['delay']} steps before a press, segments of {SEGMENT_LENGTH} steps"
    report.finish_axes(axes, f"Memory task, seed {seed}: {task}", baselines, ("-.", ":"))
    axes.set_xlabel("environment steps, thousands")
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value / 1000:,.0f}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both, print the scores, draw the plot. Returns 0, or 1 if training diverged, or 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(PROGRAM, description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("stored_state.png"), help="the plot (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of both runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="environment steps per run (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"--out: got {options.out}, expected a file in an existing folder")
    runs = {}
    try:
        report.require_package("matplotlib")
        for name, zero in RUNS.items():
            print(f"{name}:", flush=True)
            runs[name] = train(configuration(zero, options.seed, options.steps))
            learned, score = statistics.fmean(runs[name].evaluation.learned), runs[name].evaluation.score
            print(f"{name}: mean return {learned:.3f}, score {score:.3f} ({WORLDS} worlds)", flush=True)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    except TrainingDiverged as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    draw(options.out, runs, options.seed)
    print(f"plot: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
