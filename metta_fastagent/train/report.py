"""Output of a run: progress, CSV and JSON Lines logs, the learning curve and the final summary."""

import csv
import importlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metta_fastagent.train.evaluate import Evaluation
from metta_fastagent.train.timer import PHASES

Row = Mapping[str, float]

# seconds between progress lines
LINE_INTERVAL = 10.0
# window of the smoothed curve, as a share of the updates
SMOOTHING_SHARE = 0.03


class Progress:
    """A line every LINE_INTERVAL seconds; on a terminal one short line, updated in place. Nothing if `quiet`."""

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self._total, self._quiet, self._in_place = total_steps, quiet, sys.stdout.isatty()
        self._next = time.monotonic() + LINE_INTERVAL

    def update(self, row: Row) -> None:
        """Show that the update of `row` is done."""
        last, now = row["steps"] >= self._total, time.monotonic()
        if self._quiet or not (self._in_place or last or now >= self._next):
            return
        line = f"{row['steps']:,.0f} of {self._total:,} steps, {_status(row)}"
        if self._in_place:
            print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
        else:
            print(f"{line}, {time_split(row)}", flush=True)
        self._next = now + LINE_INTERVAL


def require_packages(tensorboard: bool = False) -> None:
    """Raise an ImportError that names the extra if a package of the plot or of the log cannot be imported."""
    for name, extra in [("matplotlib", "train")] + [("tensorboard", "tensorboard")] * tensorboard:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{name}: {error}; pip install 'metta-fastagent[{extra}]'") from None


def _status(row: Row) -> str:
    mean = "no episode ended" if math.isnan(row["mean_return"]) else f"return {row['mean_return']:.3f}"
    return f"{row['steps_per_second']:,.0f} steps/s, {mean}"


def time_split(row: Row) -> str:
    """Percentages of the phases, as in "environment 9 %, inference 20 %, learning 70 %, clip 1 %"."""
    total = sum(row[f"{phase}_seconds"] for phase in PHASES) or 1.0
    return ", ".join(f"{phase} {100 * row[f'{phase}_seconds'] / total:.0f} %" for phase in PHASES)


class Log:
    """The run's log.csv, with a row per update, and its weight_metrics.jsonl.

    A resumed run keeps the rows of the files in `source` up to update `after`, which is `steps` steps. With
    `tensorboard`, the same numbers and those of `add_scalar` go to event files in the folder tensorboard.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        source: Path | None = None,
        after: int = 0,
        tensorboard: bool = False,
        steps: int = 0,
    ) -> None:
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=steps + 1 if after else None)
        self._columns = tuple(columns)
        self._csv, self._metrics = folder / "log.csv", folder / "weight_metrics.jsonl"
        rows = read_log(source / "log.csv", columns) if source else []
        self.rows: list[dict[str, float]] = [row for row in rows if row["update"] <= after]
        metrics = read_metrics(source / "weight_metrics.jsonl") if source else []
        with open(self._csv, "w", newline="") as file:
            csv.writer(file).writerows([self._columns, *(self._cells(row) for row in self.rows)])
        kept = [line for line in metrics if line["update"] <= after]
        self._metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _cells(self, row: Row) -> list[str]:
        return ["" if math.isnan(row[name]) else f"{row[name]:.7g}" for name in self._columns]

    def add(self, row: Row) -> None:
        self.rows.append(dict(row))
        with open(self._csv, "a", newline="") as file:
            csv.writer(file).writerow(self._cells(row))
        for name, value in row.items():
            if not math.isnan(value):
                self.add_scalar(name, value, int(row["steps"]))

    def add_scalar(self, name: str, value: float, steps: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, steps)
            # a reader sees each update, and a killed run loses none
            self._writer.flush()

    def add_weight_metrics(self, update: int, metrics: list[dict[str, Any]]) -> None:
        with open(self._metrics, "a") as file:
            file.write(json.dumps({"update": update, "metrics": metrics}) + "\n")


def read_log(path: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    """The rows of a log.csv, empty cells as NaN, without an incomplete last line that a killed run has left.

    A missing file is an empty log. Raises ValueError if the file has other columns.
    """
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]
    if tuple(reader.fieldnames or ()) != tuple(columns):
        came = ", ".join(reader.fieldnames or ()) or "none"
        raise ValueError(
            f"{path}: got the columns {came}, expected those of this trainer; resume without it by moving it"
        )
    return [{name: float(cell or "nan") for name, cell in row.items()} for row in rows]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a weight_metrics.jsonl, without an incomplete last line that a killed run has left."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def new_axes() -> tuple[Any, Any]:
    """A matplotlib (figure, axes) for learning curves, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def returns_by_step(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """(steps, mean returns) of the updates in which episodes ended."""
    finished = [row for row in rows if not math.isnan(row["mean_return"])]
    return [row["steps"] for row in finished], [row["mean_return"] for row in finished]


def finish_axes(axes: Any, title: str, baselines: Mapping[str, float], styles: Sequence[str]) -> None:
    """Add horizontal lines at `baselines` (name -> return) with these line styles, title, y label and grid."""
    for (name, value), style in zip(baselines.items(), styles, strict=False):
        axes.axhline(value, color="#444444", linewidth=1.2, linestyle=style, label=f"{name} ({value:.3g})")
    axes.set_ylabel("mean return of finished episodes")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)


def draw_learning_curve(path: Path, rows: Sequence[Row], title: str, baselines: Mapping[str, float]) -> None:
    """Plot the mean return over environment steps as a PNG, with `baselines` (name -> return) as horizontal lines."""
    figure, axes = new_axes()
    steps, returns = returns_by_step(rows)
    axes.plot(steps, returns, color="#9db8d2", linewidth=0.8)
    axes.plot(steps, smoothed(returns), color="#1f4e79", linewidth=1.8, label="learned")
    finish_axes(axes, title, baselines, ("--", ":", "-."))
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.legend(loc="best", frameon=False)
    figure.savefig(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a trailing window of SMOOTHING_SHARE of all values (at least one)."""
    width = max(1, round(len(values) * SMOOTHING_SHARE))
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def summary(facts: Mapping[str, str], evaluation: Evaluation) -> str:
    """The final lines: the returns and their comparison, then `facts` (name -> text)."""
    mean = {"random": evaluation.random, "scripted": evaluation.scripted, "learned": evaluation.learned}
    returns = ", ".join(f"{name} {sum(each) / len(each):.3f}" for name, each in mean.items() if each)
    difference, bound = evaluation.difference
    lines = {
        "mean return": f"{returns} ({len(evaluation.learned)} worlds)",
        "learned - random": f"{difference:.3f}, 95 % lower bound {bound:.3f}",
        "score": "no scripted policy to compare with"
        if evaluation.score is None
        else f"{evaluation.score:.3f} = (learned - random) / (scripted - random)",
        **facts,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())
