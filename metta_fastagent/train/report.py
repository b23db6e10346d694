"""A run's output: progress, CSV and JSON Lines logs, the learning curve and the final summary."""

import csv
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from metta_fastagent.runtime.install import how_to_install, missing
from metta_fastagent.runtime.output import COLUMNS, show, wrapped
from metta_fastagent.train.evaluate import Evaluation
from metta_fastagent.train.folder import EVENTS, LOG, METRICS, append, replacing, set_aside
from metta_fastagent.train.timer import PHASES

Row = Mapping[str, float]

# seconds between progress lines
LINE_INTERVAL = 10.0
# window of the smoothed curve, as a share of the updates
SMOOTHING_SHARE = 0.03


class Progress:
    """A line of up to COLUMNS every LINE_INTERVAL seconds, updated in place on a terminal. Nothing if `quiet`."""

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self._total, self._quiet, self._in_place = total_steps, quiet, sys.stdout.isatty()
        self._next, self._line_is_open = time.monotonic() + LINE_INTERVAL, False

    def update(self, row: Row) -> None:
        """Show that `row`'s update is done."""
        last, now = row["steps"] >= self._total, time.monotonic()
        if self._quiet or not (self._in_place or last or now >= self._next):
            return
        left = str(timedelta(seconds=round((self._total - row["steps"]) / row["steps_per_second"]))).removeprefix("0:")
        done, speed = f"{100 * row['steps'] / self._total:.0f} %", f"{row['steps_per_second']:,.0f}/s"
        line = f"{done}, {episodes_of(row)}, {speed}, {left} left, {update_of(row)}, "
        line = line[: COLUMNS + 2].rpartition(", ")[0]
        self._line_is_open = self._in_place and not last
        show(f"\r\x1b[K{line}" if self._in_place else line, end="" if self._line_is_open else "\n")
        self._next = now + LINE_INTERVAL

    def close(self) -> None:
        """End the line, so that the next message starts a new one."""
        if self._line_is_open:
            show("")
            self._line_is_open = False


def require_package(name: str) -> None:
    """Raise an ImportError with the command that installs the package `name` if it cannot be imported."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise missing(name, error) from None


def episodes_of(row: Row) -> str:
    """The return and length of the episodes that ended in the update of `row`."""
    if math.isnan(row["mean_return"]):
        return "no episode ended"
    return f"return {row['mean_return']:.3f}, length {row['mean_length']:.1f}"


def update_of(row: Row) -> str:
    """The entropy, KL and losses of the update of `row`."""
    names = {"entropy": "entropy", "approx_kl": "KL", "policy_loss": "policy loss", "value_loss": "value loss"}
    return ", ".join(f"{text} {row[name]:.3f}" for name, text in names.items())


def time_split(rows: Sequence[Row]) -> str:
    """Percentage of time per phase, such as "environment 9 %, inference 20 %, learning 70 %, clip 1 %"."""
    seconds = {phase: sum(row[f"{phase}_seconds"] for row in rows) for phase in PHASES}
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{phase} {100 * value / total:.0f} %" for phase, value in seconds.items())


class Log:
    """The run's log.csv, with a row per update, and its weight_metrics.jsonl.

    A resumed run keeps the rows of the files in `source` up to update `after`, which is at `steps` steps. A file in
    `folder` of which it drops rows is set aside, and `notes` says so. With `tensorboard`, the same numbers go to event
    files in the folder tensorboard.
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

            if (folder / EVENTS).is_symlink():
                raise OSError(f"{folder / EVENTS}: got a link, expected a folder")
            self._writer = SummaryWriter(folder / EVENTS, purge_step=steps + 1 if after else None)
        self._columns, self.notes = tuple(columns), list[str]()
        self._csv, self._metrics = folder / LOG, folder / METRICS
        header = _csv_line(self._columns)
        self.rows: list[dict[str, float]] = self._kept(source, self._csv, after, self._parsed, header)
        self._kept(source, self._metrics, after, _parsed_metrics)

    def _kept(
        self, source: Path | None, path: Path, after: int, parsed: Callable[[str], dict], header: str = ""
    ) -> list[dict]:
        """The rows of the file in `source` up to update `after`; makes `path` hold only these."""
        found = None if source is None else source / path.name
        if found is None or not os.path.lexists(found):
            return []
        rows, unreadable = read_lines(found, parsed, header)
        kept = {line: row for line, row in rows.items() if row["update"] <= after}
        dropped = len(rows) - len(kept)
        lost = [unreadable] * bool(unreadable) + [f"{dropped} rows are later than update {after}"] * bool(dropped)
        if lost:
            aside = f"; kept as {set_aside(path)}" if os.path.lexists(path) else ""
            self.notes.append(f"{found}: {', '.join(lost)}{aside}")
        with replacing(path) as file:
            file.write("".join([header, *kept] if kept else []).encode())
        return list(kept.values())

    def _parsed(self, line: str) -> dict[str, float]:
        (cells,) = csv.reader([line])
        row = {name: float(cell or "nan") for name, cell in zip(self._columns, cells, strict=True)}
        return row | {"update": int(row["update"])}

    def add(self, row: Row) -> None:
        self.rows.append(dict(row))
        header = "" if self._csv.exists() and self._csv.stat().st_size else _csv_line(self._columns)
        cells = ("" if math.isnan(row[name]) else f"{row[name]:.7g}" for name in self._columns)
        append(self._csv, header + _csv_line(cells))
        if self._writer is not None:
            for name, value in row.items():
                if not math.isnan(value):
                    self._writer.add_scalar(name, value, int(row["steps"]))
            # so that a reader sees each update and a killed run loses none
            self._writer.flush()

    def add_weight_metrics(self, update: int, metrics: list[dict[str, Any]]) -> None:
        append(self._metrics, json.dumps({"update": update, "metrics": metrics}) + "\n")


def _csv_line(cells: Iterable[str]) -> str:
    return ",".join(cells) + "\r\n"


def _parsed_metrics(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("update"), int):
        raise ValueError(f"got {row!r}, expected a dict with an update")
    return row


def read_lines(path: Path, parsed: Callable[[str], dict], header: str = "") -> tuple[dict[str, dict], str]:
    """Line -> its content, for a log's lines after its `header`, and which lines cannot be read, if any.

    An incomplete last line, as left by a killed run, does not count.
    """
    try:
        first, *lines = [header] * (not header) + path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        return {}, f"it cannot be read ({getattr(error, 'strerror', None) or 'it is empty'})"
    if first.rstrip() != header.rstrip():
        return {}, f"got the columns {' '.join(first.split(',')).strip()[:200]}, expected those of this trainer"
    rows, unreadable = {}, []
    for number, line in enumerate(lines, start=1 + bool(header)):
        if line.endswith("\n") and line.strip():
            try:
                rows[line] = parsed(line)
            except (ValueError, OverflowError, csv.Error, RecursionError):
                unreadable.append(number)
    return rows, f"{len(unreadable)} lines cannot be read, the first is line {unreadable[0]}" if unreadable else ""


def new_axes() -> tuple[Any, Any]:
    """A matplotlib (figure, axes) for learning curves, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def returns_by_step(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """(steps, mean returns) for the updates in which episodes ended."""
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


def draw_learning_curve(
    path: Path, rows: Sequence[Row], title: str, baselines: Mapping[str, float], solved: bool = False
) -> str:
    """Plot the mean return over environment steps as a PNG, with `baselines` (name -> return) as horizontal lines.

    Evaluations are points; a vertical line marks the end of a run that stopped because it was `solved`.
    Returns the path, or why there is no plot.
    """
    try:
        require_package("matplotlib")
    except ImportError:
        return f"not drawn without matplotlib, which this installs:\n{how_to_install('matplotlib')}"
    figure, axes = new_axes()
    evaluated = [(row["steps"], row["evaluated_return"]) for row in rows if not math.isnan(row["evaluated_return"])]
    steps, returns = returns_by_step(rows)
    axes.plot(steps, returns, color="#9db8d2", linewidth=0.8)
    axes.plot(steps, smoothed(returns), color="#1f4e79", linewidth=1.8, label="learned")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o", color="#d98032", markersize=3, label="evaluated")
    if solved and rows:
        axes.axvline(rows[-1]["steps"], color="#2e7d32", linewidth=1.2, label="stopped: solved")
    finish_axes(axes, title, baselines, ("--", ":", "-."))
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.legend(loc="best", frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return str(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a trailing window of SMOOTHING_SHARE of all values (at least one)."""
    width = max(1, round(len(values) * SMOOTHING_SHARE))
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def summary(facts: Mapping[str, str], evaluation: Evaluation, rows: Sequence[Row]) -> str:
    """The final lines: the returns and their comparison, the last of `rows`, then the `facts` (name -> text)."""
    mean = {"random": evaluation.random, "scripted": evaluation.scripted, "learned": evaluation.learned}
    returns = ", ".join(f"{name} {sum(each) / len(each):.3f}" for name, each in mean.items() if each)
    difference, bound = evaluation.difference
    lines = {
        "mean return": f"{returns} ({len(evaluation.learned)} worlds)",
        "learned - random": f"{difference:.3f}, 95 % lower bound {bound:.3f}",
        "score": "no scripted policy to compare with"
        if evaluation.score is None
        else f"{evaluation.score:.3f} = (learned - random) / (scripted - random)",
        "last episodes": next((episodes_of(row) for row in reversed(rows) if row["episodes"]), ""),
        "last update": update_of(rows[-1]) if rows else "",
        **facts,
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:{width}}{wrapped(text, indent=width)}" for name, text in lines.items() if text)
