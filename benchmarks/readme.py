"""The README's tables of what got faster, from the newest full result of each kind of device."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# Columns by kind of device: provider -> heading.
PROVIDERS = {
    "cuda": {"torch.compile": "torch.compile", "eager": "plain PyTorch", "triton": "Triton", "captured": "CUDA graph"},
    "cpu": {"eager": "plain PyTorch", "native": "C++"},
}


class Line(NamedTuple):
    """One line of a table: what it is called, and where in the results it is found."""

    label: str
    operation: str
    size: Mapping[str, int]


LINES = (
    Line("rollout step of `Fast`, {rows} rows", "rollout step", {"rows": 512}),
    Line("rollout step of `Fast`, {rows} rows", "rollout step", {"rows": 4096}),
    Line("update step of `Fast`, {rows} segments of {time}", "update step", {"rows": 64, "time": 16}),
    Line("update step of `Fast`, {rows} segments of {time}", "update step", {"rows": 4096, "time": 64}),
    Line(
        "LSTM with resets inside {segments} segments of {time}, with gradient; upstream is `nn.LSTM` without resets",
        "run_lstm forward + backward",
        {"segments": 64, "time": 64, "resets": 3},
    ),
    Line(
        "evaluate actions with gradient, {rows} x {actions}",
        "evaluate_actions forward + backward",
        {"rows": 4096, "actions": 21},
    ),
    Line("sample actions, {rows} x {actions}", "sample_actions", {"rows": 4096, "actions": 21}),
    Line("clip {tensors} small tensors", "clip_weights", {"tensors": 200, "parameters": 200_000}),
    Line("clip {tensors} tensors of 30M parameters", "clip_weights", {"tensors": 200, "parameters": 30_000_000}),
    Line(
        "L2-init loss with gradient, 3M parameters",
        "l2_init_loss forward + backward",
        {"tensors": 100, "parameters": 3_000_000},
    ),
    Line("observation grid, {rows} rows of {tokens} tokens", "tokens_to_grid", {"rows": 1024, "tokens": 200}),
    Line("pairs to logit indices, {rows}", "action_to_logit_index", {"rows": 4096}),
    Line("logit indices to pairs, {rows}", "logit_index_to_action", {"rows": 4096}),
    Line("TensorDict fields, {rows} rows", "set_tensordict_fields", {"rows": 4096, "time": 0}),
)


def update(readme: Path, results: Path) -> None:
    """Put the tables of the newest results between the README's two marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{readme}: expected the marks {BEGIN} and {END}, in this order")
    text = tables(newest(results.glob("*/*.json")), readme.parent)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def newest(paths: Iterable[Path]) -> list[Path]:
    """The newest full result of each kind of device, CUDA's first; file names begin with their moment."""
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: path.name):
        result = json.loads(path.read_text())
        if not result["conditions"]["quick"]:
            found[_kind(result)] = path
    return [found[kind] for kind in PROVIDERS if kind in found]


def tables(paths: Sequence[Path], root: Path) -> str:
    """Their tables in Markdown, each beside its machine, date and versions; links are relative to `root`."""
    return "\n\n".join(_table(path, root) for path in paths)


def _kind(result: Mapping[str, Any]) -> str:
    return "cuda" if str(result["machine_info"]["device"]).startswith("cuda") else "cpu"


def _table(path: Path, root: Path) -> str:
    result = json.loads(path.read_text())
    info, providers = result["machine_info"], PROVIDERS[_kind(result)]
    link = os.path.relpath(path.with_suffix(".md"), root)
    threads = f"{info['threads']} thread" + ("s" if int(info["threads"]) > 1 else "")
    versions = f"PyTorch {info['torch']}, Triton {info['triton']}, Python {info['python_version']}"
    where = f"{info['name']}, {threads}, {versions}, {result['datetime'][:10]}"
    lines = [
        f"{where} ([all shapes, with spread and plots]({link})):",
        "",
        "| | upstream | " + " | ".join(providers.values()) + " |",
        "| --- |" + " ---: |" * (1 + len(providers)),
    ]
    rows = report.rows_of(result)
    for line in LINES:
        own = {row.provider: row for row in rows if row.operation == line.operation and _same(row.size, line.size)}
        reference = next((row for row in own.values() if row.provider == row.figures["reference"]), None)
        if reference is not None:
            ratios = [f"{own[name].figures['ratio']:.2f}" if name in own else "-" for name in providers]
            cells = [line.label.format(**line.size), report.seconds_text(reference.seconds[1]), *ratios]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _same(size: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    return all(size.get(key) == value for key, value in wanted.items())
