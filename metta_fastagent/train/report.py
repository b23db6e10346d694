"""What a run shows and leaves behind: progress, CSV and JSON-lines logs, the learning curve, the closing summary."""

import csv
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from metta_fastagent.train.evaluate import Evaluation
from metta_fastagent.train.stopwatch import PHASES

Row = Mapping[str, float]

# without a terminal, a line this often (seconds)
LINE_INTERVAL = 10.0
# the curve's bold line is a mean over this share of the updates
SMOOTHING_SHARE = 0.03


class Progress(Protocol):
    def update(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Silent:
    def update(self, row: Row) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A plain line every LINE_INTERVAL seconds."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._next = time.monotonic() + LINE_INTERVAL

    def update(self, row: Row) -> None:
        if time.monotonic() >= self._next or row["steps"] >= self._total:
            print(f"{row['steps']:,.0f} of {self._total:,} steps, {_status(row)}", flush=True)
            self._next = time.monotonic() + LINE_INTERVAL

    def close(self) -> None:
        pass


class Bar:
    """A progress bar for terminals."""

    def __init__(self, total_steps: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("", total=total_steps, completed=done, status="")
        self._bar.start()

    def update(self, row: Row) -> None:
        self._bar.update(self._task, completed=int(row["steps"]), status=_status(row))

    def close(self) -> None:
        self._bar.stop()


def make_progress(total_steps: int, done: int, quiet: bool) -> Progress:
    """A bar where the output is a terminal, lines where it is not, nothing if `quiet`."""
    if quiet:
        return Silent()
    return Bar(total_steps, done) if sys.stdout.isatty() else Lines(total_steps)


def _status(row: Row) -> str:
    mean = "no episode ended" if math.isnan(row["mean_return"]) else f"return {row['mean_return']:.3f}"
    return f"{row['steps_per_second']:,.0f} steps/s, {mean}, {time_split(row)}"


def time_split(row: Row) -> str:
    """Percentages of the phases, as in "environment 9 %, inference 20 %, learning 70 %, clip 1 %"."""
    total = sum(row[f"{phase}_seconds"] for phase in PHASES) or 1.0
    return ", ".join(f"{phase} {100 * row[f'{phase}_seconds'] / total:.0f} %" for phase in PHASES)


class Log:
    """The run's CSV of one row per update and its JSON lines of weight metrics.

    A resumed run keeps the lines of `source`'s files up to update `after` and goes on from there.
    """

    def __init__(self, folder: Path, columns: Sequence[str], source: Path | None = None, after: int = 0) -> None:
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

    def add_weight_metrics(self, update: int, metrics: list[dict[str, Any]]) -> None:
        with open(self._metrics, "a") as file:
            file.write(json.dumps({"update": update, "metrics": metrics}) + "\n")


def read_log(path: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    """The rows of a log.csv, empty cells as NaN; the last line is left out where a killed run did not finish it.

    No file is an empty log. Raises ValueError where the file has other columns.
    """
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise ValueError(f"{path} is no log of this trainer (its columns differ); move it away to go on without it")
    return [{name: float(cell or "nan") for name, cell in row.items()} for row in rows]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a weight_metrics.jsonl; the last one is left out where a killed run did not finish it."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def new_curves() -> tuple[Any, Any]:
    """(figure, axes) of matplotlib to draw learning curves on, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def returns_by_step(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """(steps, mean returns) of the updates in which an episode ended."""
    finished = [row for row in rows if not math.isnan(row["mean_return"])]
    return [row["steps"] for row in finished], [row["mean_return"] for row in finished]


def finish_curves(axes: Any, title: str, levels: Mapping[str, float], styles: Sequence[str]) -> None:
    """Horizontal lines at `levels` (name -> return), each in its style, then title, y axis and grid."""
    for (name, level), style in zip(levels.items(), styles, strict=False):
        axes.axhline(level, color="#444444", linewidth=1.2, linestyle=style, label=f"{name} ({level:.3g})")
    axes.set_ylabel("mean return of finished episodes")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)


def draw_learning_curve(path: Path, rows: Sequence[Row], title: str, levels: Mapping[str, float]) -> None:
    """Mean return over environment steps as a PNG, with `levels` (name -> return) as horizontal lines."""
    figure, axes = new_curves()
    steps, returns = returns_by_step(rows)
    axes.plot(steps, returns, color="#9db8d2", linewidth=0.8)
    axes.plot(steps, smoothed(returns), color="#1f4e79", linewidth=1.8, label="learned")
    finish_curves(axes, title, levels, ("--", ":", "-."))
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.legend(loc="best", frameon=False)
    figure.savefig(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last SMOOTHING_SHARE of all values (at least one)."""
    width = max(1, round(len(values) * SMOOTHING_SHARE))
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def summary(facts: Mapping[str, str], evaluation: Evaluation) -> str:
    """The closing lines: `facts` (name -> text), between them the returns and how they compare."""
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
