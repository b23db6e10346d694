"""Markdown and plots of one run's JSON: what was measured, beside the machine that it was measured on."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.harness import COPY

# Colours that differ in lightness too, so that they are told apart in a black-and-white print.
STYLES = {
    "upstream": ("#000000", "o"),
    "foreach": ("#9a9a9a", "s"),
    "torch.compile": ("#7b3294", "^"),
    "eager": ("#0072b2", "D"),
    "triton": ("#d55e00", "*"),
    "native": ("#e69f00", "P"),
    "captured": ("#8c510a", "p"),
    "torch.distributions": ("#56b4e9", "v"),
    "torchrl": ("#009e73", "<"),
    "pufferlib": ("#cc79a7", ">"),
}
FALLBACK_STYLE = ("#555555", "x")
PLOTS_PER_ROW = 2
PANEL_WIDTH_INCHES = 5.2
INCHES_PER_BAR = 0.16
CURVE_HEIGHT_IN_BARS = 11
DPI = 120
RATIO_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Row(NamedTuple):
    """One provider of one shape."""

    operation: str
    shape: str
    size: Mapping[str, int]
    provider: str
    seconds: tuple[float, float, float]  # first quartile, median, third quartile
    figures: Mapping[str, Any]


def folder_of(result: Mapping[str, Any]) -> str:
    """Name of the folder that holds this machine's results."""
    return machine.folder(result["machine_info"]["name"])


def write(path: Path, out: Path) -> list[Path]:
    """Write the Markdown and, where matplotlib is installed, the plots of a result; the files that were written."""
    result = json.loads(path.read_text())
    rows = rows_of(result)
    if not rows:
        raise ValueError(f"{path}: holds no benchmark of this suite")
    out.mkdir(parents=True, exist_ok=True)
    plots = _plot(rows, _title(result), out, path.stem)
    text = markdown(result, rows, [plot.name for plot in plots])
    target = out / f"{path.stem}.md"
    target.write_text(text)
    return [target, *plots]


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of a pytest-benchmark result that the harness has filled in."""
    return [
        Row(
            entry["extra_info"]["operation"],
            entry["extra_info"]["shape"],
            entry["extra_info"]["size"],
            entry["extra_info"]["provider"],
            (entry["stats"]["q1"], entry["stats"]["median"], entry["stats"]["q3"]),
            entry["extra_info"],
        )
        for entry in result["benchmarks"]
        if "operation" in entry["extra_info"]
    ]


def markdown(result: Mapping[str, Any], rows: Sequence[Row], plots: Sequence[str]) -> str:
    """The report's text."""
    lines = [f"# {_title(result)}", "", *_circumstances(result), ""]
    lines += [f"![{name}]({name})" for name in plots]
    for operation, own in _grouped(rows, lambda row: row.operation).items():
        lines += ["", f"## {operation}", "", *_table(own)]
    return "\n".join(lines) + "\n"


def _title(result: Mapping[str, Any]) -> str:
    return f"Benchmarks on {result['machine_info']['name']}"


def _circumstances(result: Mapping[str, Any]) -> list[str]:
    info, commit, conditions = result["machine_info"], result["commit_info"], result["conditions"]
    load = conditions["load_average"]
    lines = [
        f"- {result['datetime'][:16].replace('T', ' ')} UTC, commit {(commit.get('id') or 'unknown')[:9]}"
        + (" with uncommitted changes" if commit.get("dirty") else ""),
        f"- device {info['device']}; processor {info['processor_name']}; GPU: {info['gpu']}",
        f"- torch {info['torch']}, Triton {info['triton']}, tensordict {info['tensordict']}, "
        f"peers: {info['peers']}; "
        f"Python {info['python_version']}; CPU threads: {info['threads']}; the package runs {info['backend']}",
        f"- {'quick' if conditions['quick'] else 'full'} run; load average at its end "
        + ", ".join(f"{value:.1f}" for value in load)
        + f" on {conditions['cores']} cores",
    ]
    if load[0] > conditions["cores"]:
        lines.append(
            "- **The machine was busy with other work**: times on the clock are inflated and scattered. Ratios within "
            "a round, and those of processor time, say more than times do."
        )
    lines += [f"- no {name}: {reason}" for name, reason in sorted(conditions["skipped"].items())]
    left_out = conditions.get("left_out")
    lines += [f"- left out, as the time was used up: {', '.join(left_out)}"] if left_out else []
    lines += [f"- no results of {name}: it was stopped, its time was used up" for name in conditions.get("killed", ())]
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    columns = [column for column in COLUMNS if any(column.text(row) for row in rows)]
    head = ["shape", "provider", *(column.name for column in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 2 + " ---: |" * len(columns)]
    for row in rows:
        shape = ", ".join(f"{key} {value}" for key, value in row.size.items())
        lines.append("| " + " | ".join([shape, row.provider, *(column.text(row) or "-" for column in columns)]) + " |")
    return lines


class Column(NamedTuple):
    """One column of the tables; empty text where a row has no such figure."""

    name: str
    text: Callable[[Row], str]


def seconds_text(value: float | None) -> str:
    """Three digits and a unit; empty for None."""
    if value is None:
        return ""
    scale, unit = next(
        (s, u) for s, u in ((1, "s"), (1e3, "ms"), (1e6, "µs"), (1e9, "ns")) if value * s >= 1 or s == 1e9
    )
    return f"{value * scale:.3g} {unit}"


def _number(key: str, form: str = "{:.3g}") -> Callable[[Row], str]:
    return lambda row: "" if row.figures.get(key) is None else form.format(row.figures[key])


def _ratio(row: Row) -> str:
    if row.provider == row.figures["reference"]:
        return "1"
    return f"{row.figures['ratio']:.2f} ({row.figures['ratio_q1']:.2f} - {row.figures['ratio_q3']:.2f})"


COLUMNS = (
    Column("wall time", lambda row: seconds_text(row.seconds[1])),
    Column("quartiles", lambda row: f"{seconds_text(row.seconds[0])} - {seconds_text(row.seconds[2])}"),
    Column("of upstream's", _ratio),
    Column("in processor time", _number("cpu_ratio", "{:.2f}")),
    Column("GPU time", lambda row: seconds_text(row.figures.get("gpu_seconds"))),
    Column("launches", _number("launches")),
    Column("kernels", _number("kernels")),
    Column("host syncs", _number("host_syncs")),
    Column("peak extra bytes", _number("peak_extra_bytes", "{:,}")),
    Column("GB/s", _number("gb_per_s")),
    Column("copy GB/s", _number("copy_gb_per_s")),
    Column("note", lambda row: str(row.figures.get("note") or "")),
)


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def _plot(rows: Sequence[Row], title: str, out: Path, stem: str) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    operations = _grouped([row for row in rows if row.provider != COPY], lambda row: row.operation)
    ratios = {name: own for name, own in operations.items() if len({row.provider for row in own}) > 1}
    curves = {name: own for name, own in operations.items() if _axis(own) is not None}
    written = []
    for name, panels, draw in (("ratios", ratios, _draw_ratios), ("scaling", curves, _draw_scaling)):
        if panels:
            written.append(_draw(panels, draw, f"{title}: {name}", out / f"{stem}-{name}.png"))
    return written


def _draw(panels: Mapping[str, list[Row]], draw: Callable[[Any, list[Row]], None], title: str, target: Path) -> Path:
    from matplotlib import pyplot

    entries = list(panels.values())
    lines = [entries[start : start + PLOTS_PER_ROW] for start in range(0, len(entries), PLOTS_PER_ROW)]
    bars = [max(map(len, line)) if draw is _draw_ratios else CURVE_HEIGHT_IN_BARS for line in lines]
    heights = [INCHES_PER_BAR * count + 1.0 for count in bars]
    figure, axes = pyplot.subplots(
        len(lines),
        PLOTS_PER_ROW,
        figsize=(PANEL_WIDTH_INCHES * PLOTS_PER_ROW, sum(heights) + 0.4),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (operation, own) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(operation, fontsize=10)
        axis.tick_params(labelsize=7)
        draw(axis, own)
    figure.suptitle(title, fontsize=11)
    figure.savefig(target, dpi=DPI)
    pyplot.close(figure)
    return target


def _draw_ratios(axis: Any, rows: list[Row]) -> None:
    """Bars of each provider's time as a ratio to the reference's, quartiles as whiskers."""
    others = [row for row in rows if row.provider != row.figures["reference"]]
    places, labels = [], []
    for group, own in enumerate(_grouped(others, lambda row: row.shape).values()):
        for row in own:
            place = len(places) + group
            figures = row.figures
            middle, low, high = figures["ratio"], figures["ratio_q1"], figures["ratio_q3"]
            axis.barh(
                place,
                middle - 1,
                left=1,
                color=STYLES.get(row.provider, FALLBACK_STYLE)[0],
                xerr=[[middle - low], [high - middle]],
                error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            )
            places.append(place)
            labels.append(f"{row.shape}  {row.provider}")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(RATIO_TICKS, [f"{tick:g}" for tick in RATIO_TICKS])
    axis.set_xticks([], minor=True)
    reached = [value for row in others for value in (row.figures["ratio_q1"], row.figures["ratio_q3"])]
    axis.set_xlim(min(0.45, *reached) / 1.1, max(2.2, *reached) * 1.1)
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.set_xlabel("wall time / upstream's (left of the line: faster)", fontsize=7)


def _axis(rows: Sequence[Row]) -> tuple[str, dict[str, int]] | None:
    """The size that takes most values while the others stand still, and where they stand; None for one shape."""
    sizes = [dict(shape) for shape in {tuple(row.size.items()) for row in rows}]
    best: tuple[str, dict[str, int]] | None = None
    most = 1
    for key in sizes[0]:
        rest = Counter(tuple((k, v) for k, v in size.items() if k != key) for size in sizes)
        fixed, count = max(rest.items(), key=lambda entry: (entry[1], entry[0]))
        if count > most:
            best, most = (key, dict(fixed)), count
    return best


def _draw_scaling(axis: Any, rows: list[Row]) -> None:
    """Median wall time against the size that varies, one curve for each provider."""
    found = _axis(rows)
    if found is None:
        return
    key, fixed = found
    own = [row for row in rows if all(row.size[name] == value for name, value in fixed.items())]
    for provider, points in _grouped(own, lambda row: row.provider).items():
        points = sorted(points, key=lambda row: row.size[key])
        color, marker = STYLES.get(provider, FALLBACK_STYLE)
        sizes = [row.size[key] for row in points]
        axis.plot(sizes, [row.seconds[1] for row in points], color=color, marker=marker, label=provider, linewidth=1.2)
        axis.fill_between(
            sizes, [row.seconds[0] for row in points], [row.seconds[2] for row in points], color=color, alpha=0.12
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    held = ", ".join(f"{name} {value}" for name, value in fixed.items())
    axis.set_xlabel(f"{key} ({held})" if held else key, fontsize=8)
    axis.set_ylabel("wall time, s", fontsize=8)
    axis.tick_params(which="minor", labelsize=6)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=7)
