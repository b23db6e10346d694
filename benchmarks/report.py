"""A run's Markdown page and table of ratios, from pytest-benchmark's JSON."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness import UPSTREAM

Entry = Mapping[str, Any]
# Unit, and number of units per second.
UNITS = (("s", 1), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9))


def markdown(result: Mapping[str, Any]) -> str:
    """A run's page: the machine, and one table per operation."""
    lines = [f"# Benchmarks on {result['machine_info']['name']}", "", *_circumstances(result)]
    for operation, entries in _by_operation(result).items():
        lines += ["", f"## {operation}", "", *_table(entries)]
    return "\n".join(lines) + "\n"


def ratio_table(result: Mapping[str, Any]) -> str:
    """Upstream's time and each provider's ratio to it, one line per operation and shape."""
    blocks = []
    for operation, entries in _by_operation(result).items():
        providers = list(dict.fromkeys(e["extra_info"]["provider"] for e in entries))
        shapes: dict[str, dict[str, str]] = defaultdict(dict)
        for entry in entries:
            info = entry["extra_info"]
            is_upstream = info["provider"] == UPSTREAM
            text = seconds_text(entry["stats"]["median"]) if is_upstream else f"{info['ratio']:.2f}"
            shapes[info["shape"]][info["provider"]] = text
        blocks.append([(operation, *providers)])
        blocks[-1] += [(f"  {shape}", *(own.get(name, "-") for name in providers)) for shape, own in shapes.items()]
    width = max(len(row[0]) for block in blocks for row in block)
    lines = ["upstream's time, and the ratio of each provider's time to it: below 1 is faster"]
    for head, *rows in blocks:
        sizes = [max(9, len(name)) for name in head[1:]]
        for row in (head, *rows):
            cells = [text.rjust(size) for text, size in zip(row[1:], sizes, strict=True)]
            lines.append("  ".join([row[0].ljust(width), *cells]))
    return "\n".join(lines)


def seconds_text(value: float) -> str:
    """The value with three digits and a unit."""
    unit, scale = next((u for u in UNITS if value * u[1] >= 1), UNITS[-1])
    return f"{value * scale:.3g} {unit}"


def _by_operation(result: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """Entries by operation, grouped by shape."""
    found: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        if "operation" in info:
            found[info["operation"]][info["shape"]].append(entry)
    return {operation: [entry for own in shapes.values() for entry in own] for operation, shapes in found.items()}


def _circumstances(result: Mapping[str, Any]) -> list[str]:
    info, commit, conditions = result["machine_info"], result["commit_info"], result["conditions"]
    load = conditions["load_average"]
    lines = [
        f"- {result['datetime'][:16].replace('T', ' ')} UTC, commit {(commit.get('id') or 'unknown')[:9]}"
        + (" with uncommitted changes" if commit.get("dirty") else ""),
        f"- device {info['device']}; processor {info['processor_name']}; GPU: {info['gpu']}",
        f"- torch {info['torch']}, Triton {info['triton']}, tensordict {info['tensordict']}, peers: {info['peers']}; "
        f"Python {info['python_version']}; CPU threads: {info['threads']}; the package runs {info['backend']}",
        f"- {'quick' if conditions['quick'] else 'full'} run; load average at its end "
        + ", ".join(f"{value:.1f}" for value in load)
        + f" on {conditions['cores']} cores",
    ]
    lines += ["- **Busy machine**: trust the ratios, not the times."] if load[0] > conditions["cores"] else []
    return lines + [f"- skipped {count}: {reason}" for reason, count in sorted(conditions["skipped"].items())]


def _number(key: str, form: str = "{:.3g}") -> Callable[[Entry], str]:
    return lambda entry: form.format(entry["extra_info"][key]) if key in entry["extra_info"] else ""


def _ratio(entry: Entry) -> str:
    info = entry["extra_info"]
    return "1" if info["provider"] == UPSTREAM else "{ratio:.2f} ({ratio_q1:.2f} - {ratio_q3:.2f})".format(**info)


def _rate(entry: Entry) -> str:
    info = entry["extra_info"]
    seconds = info.get("gpu_seconds") or entry["stats"]["median"]
    return f"{info['operations'] / seconds / 1e9:.0f}" if "operations" in info else ""


COLUMNS: dict[str, Callable[[Entry], str]] = {
    "wall time": lambda entry: seconds_text(entry["stats"]["median"]),
    "quartiles": lambda entry: f"{seconds_text(entry['stats']['q1'])} - {seconds_text(entry['stats']['q3'])}",
    "ratio to upstream": _ratio,
    "GPU time": lambda entry: seconds_text(entry["extra_info"].get("gpu_seconds") or 0).removesuffix("0 ns"),
    "launches": _number("launches"),
    "kernels": _number("kernels"),
    "host syncs": _number("host_syncs"),
    "peak extra bytes": _number("peak_extra_bytes", "{:,}"),
    "GFLOP/s": _rate,
    "GB/s": _number("gb_per_s"),
    "copy GB/s": _number("copy_gb_per_s"),
    "note": _number("note", "{}"),
}


def _table(entries: Sequence[Entry]) -> list[str]:
    columns = {name: text for name, text in COLUMNS.items() if any(text(entry) for entry in entries)}
    head = ["shape", "provider", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 2 + " ---: |" * len(columns)]
    for entry in entries:
        info = entry["extra_info"]
        cells = [info["shape"], info["provider"], *(text(entry) or "-" for text in columns.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
