"""Time the kernels with other tuning constants than the package's: the experiments of TUNING.md.

    python -m benchmarks.sweep [--only layout,chunk] [--seconds 240] [--out sweep.json]
    TRITON_INTERPRET=1 python -m benchmarks.sweep --device cpu --tiny

Constants of the imported package are patched for one measurement. Each variant has to agree with the eager twin before
it is timed. The package's own constants come first in each table and again at its end: smaller differences than the one
between these two are noise.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import bench_l2_init, bench_tokens_to_grid, categorical, harness, machine
from metta_fastagent import ops, use_backend
from metta_fastagent.ops import (
    _action_index,
    _categorical,
    _chunk_table,
    _clip_weights,
    _l2_init_loss,
    _lstm_layer,
    _tokens_to_grid,
)

SHIPPED, SHIPPED_AGAIN = "package", "package again"
RTOL, ATOL = 1e-4, 1e-5

Size = Mapping[str, Any]
Call = Callable[[], Any]
CHUNK_MODULES = (_chunk_table, _clip_weights, _l2_init_loss)


class Experiment(NamedTuple):
    """Constants to vary, and calls of the package at several sizes."""

    # A call of the package, whose result is compared.
    make: Callable[[Size, torch.device], Call]
    sizes: Sequence[Size]
    # For a rehearsal in Triton's interpreter.
    tiny: Sequence[Size]
    # Name of a constant -> the modules that hold it, and its values.
    constants: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]

    def variants(self) -> list[dict[str, Any]]:
        """Every combination of the constants' values."""
        values = [values for _, values in self.constants.values()]
        return [dict(zip(self.constants, each, strict=True)) for each in itertools.product(*values)]


class Row(NamedTuple):
    """Microseconds of one variant's call: of the device on CUDA, else on the clock; `fault` if it failed or differed."""

    experiment: str
    size: Size
    variant: str
    microseconds: float | None
    fault: str = ""


def make_head(size: Size, device: torch.device) -> Call:
    """evaluate_actions, with its backward or without, or sample_actions."""
    inputs = categorical.make_inputs(size, device)
    logits, pairs, table = inputs.logits, inputs.pairs, inputs.cum_action_max_params
    if size["op"] == "sample":
        # full_log_probs alone: the draws differ.
        return lambda: ops.sample_actions(logits, inputs.action_index_tensor)[3]
    if size["op"] == "forward":
        return lambda: ops.evaluate_actions(logits, pairs, table)
    logits.requires_grad_()
    grads = (inputs.grad_log_prob, inputs.grad_entropy)
    return lambda: torch.autograd.grad(ops.evaluate_actions(logits, pairs, table)[:2], logits, grads)


def make_list(size: Size, device: torch.device) -> Call:
    """clip_weights_, or l2_init_loss with its backward or without."""
    params, initial = bench_l2_init.make_inputs(size, device)
    if size["op"] == "clip":
        weights = [param.detach() for param in params]
        return lambda: ops.clip_weights_(weights, [0.5] * len(weights)) or weights
    if size["op"] == "l2 forward":
        return lambda: ops.l2_init_loss([param.detach() for param in params], initial)
    return lambda: torch.autograd.grad(ops.l2_init_loss(params, initial), params)


def make_grid(size: Size, device: torch.device) -> Call:
    """tokens_to_grid."""
    inputs = bench_tokens_to_grid.make_inputs(size, device)
    return lambda: bench_tokens_to_grid.package(*inputs)


def make_conversion(size: Size, device: torch.device) -> Call:
    """action_to_logit_index."""
    inputs = categorical.make_inputs({"rows": size["rows"], "actions": 21}, device)
    return lambda: ops.action_to_logit_index(inputs.pairs, inputs.cum_action_max_params)


def make_lstm(size: Size, device: torch.device) -> Call:
    """lstm_layer, with its backward or without."""
    steps, rows, hidden = size["time"], size["rows"], size["hidden"]
    generator = torch.Generator().manual_seed(0)
    shapes = ((steps, rows, 4 * hidden), (4 * hidden, hidden), (rows, hidden), (rows, hidden))
    inputs = [(0.1 * torch.randn(shape, generator=generator)).to(device) for shape in shapes]
    resets = (torch.rand(steps, rows, generator=generator) < 0.03).to(device)
    if size["op"] == "forward":
        return lambda: ops.lstm_layer(*inputs, resets)[0]
    inputs[0].requires_grad_()
    grad = torch.ones(steps, rows, hidden, device=device)
    return lambda: torch.autograd.grad(ops.lstm_layer(*inputs, resets)[0], inputs[0], grad)


def sizes(ops: Sequence[str], *rest: Size) -> list[Size]:
    return [{"op": op, **size} for op in ops for size in rest]


HEADS, LISTS, PASSES = ("forward", "backward", "sample"), ("clip", "l2 forward", "l2 backward"), ("forward", "backward")
ACTIONS = [{"rows": rows, "actions": actions} for rows in (4096, 262144) for actions in (9, 21, 32, 48, 64)]
TENSORS = [{"tensors": 200, "parameters": count} for count in (200_000, 30_000_000, 100_000_000)]
TINY_TENSORS = {"tensors": 2, "parameters": 5000}
EXPERIMENTS = {
    # 0: every number of actions as a tile.
    "layout": Experiment(
        make_head,
        sizes(HEADS, *ACTIONS),
        sizes(HEADS, {"rows": 5, "actions": 9}),
        {"MAX_COLUMNS": ([_categorical], [64, 0])},
    ),
    "rows": Experiment(
        make_head,
        sizes(HEADS, *(size for size in ACTIONS if size["actions"] <= 21)),
        sizes(HEADS, {"rows": 5, "actions": 9}),
        {"ROWS_PER_PROGRAM": ([_categorical], [64, 128, 256, 512])},
    ),
    "tile": Experiment(
        make_head,
        sizes(HEADS, {"rows": 4096, "actions": 128}, {"rows": 4096, "actions": 1024}),
        sizes(HEADS, {"rows": 5, "actions": 70}),
        {"TILE_ELEMENTS": ([_categorical], [512, 1024, 2048, 4096])},
    ),
    "chunk": Experiment(
        make_list,
        sizes(LISTS, *TENSORS),
        sizes(LISTS, TINY_TENSORS),
        {"CHUNK": (CHUNK_MODULES, [2048, 4096, 8192, 16384]), "CHUNK_WARPS": (CHUNK_MODULES, [4, 8])},
    ),
    "partials": Experiment(
        make_list,
        sizes(["l2 forward"], *TENSORS[1:]),
        sizes(["l2 forward"], TINY_TENSORS),
        {"PARTIALS_BLOCK": ([_l2_init_loss], [256, 1024, 4096, 8192])},
    ),
    "grid": Experiment(
        make_grid,
        [{"rows": rows, "tokens": 200} for rows in (4096, 16384)],
        [{"rows": 2, "tokens": 40}],
        {"ZERO_BLOCK": ([_tokens_to_grid], [512, 1024, 4096]), "TOKEN_BLOCK": ([_tokens_to_grid], [16, 32, 64])},
    ),
    "lstm": Experiment(
        make_lstm,
        sizes(PASSES, {"rows": 512, "time": 64, "hidden": 128}, {"rows": 4096, "time": 16, "hidden": 128}),
        sizes(PASSES, {"rows": 3, "time": 2, "hidden": 16}),
        {"BLOCK_B": ([_lstm_layer], [16, 32]), "BLOCK_N": ([_lstm_layer], [32, 64, 128])},
    ),
    "conversion": Experiment(
        make_conversion,
        [{"rows": 4096}, {"rows": 1 << 20}],
        [{"rows": 5}],
        {"BLOCK": ([_action_index], [128, 256, 512, 1024])},
    ),
}


@contextmanager
def patched(experiment: Experiment, variant: Mapping[str, Any]) -> Iterator[None]:
    """The package with other constants, and without the tables of chunks made with its own."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_chunk_table, "_tables", {}))
        for name, value in variant.items():
            for module in experiment.constants[name][0]:
                stack.enter_context(mock.patch.object(module, name, value))
        yield


def measure(call: Call, expected: Any, device: torch.device) -> tuple[float | None, str]:
    """(microseconds, fault) of one call."""
    try:
        harness.require_close("differs", expected, call(), RTOL, ATOL)
        provider = harness.Provider("variant", call)
        on_cuda = device.type == "cuda"
        seconds = harness.gpu_seconds(provider, device) if on_cuda else provider.seconds(1, time.perf_counter)
        return seconds * 1e6, ""
    except Exception as error:
        return None, harness.first_line(error)


def run(name: str, experiment: Experiment, size: Size, device: torch.device) -> list[Row]:
    """All variants of an experiment at one size, the package's own first and last."""
    with use_backend("eager"):
        expected = experiment.make(size, device)()
    variants = {", ".join(f"{key} {value}" for key, value in each.items()): each for each in experiment.variants()}
    rows = []
    for label, variant in {SHIPPED: {}, **variants, SHIPPED_AGAIN: {}}.items():
        with patched(experiment, variant), use_backend("triton"):
            rows.append(Row(name, size, label, *measure(experiment.make(size, device), expected, device)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| experiment | size | variant | µs | fault |", "| --- | --- | --- | ---: | --- |"]
    for row in rows:
        size = ", ".join(f"{name} {value}" for name, value in row.size.items())
        figure = "" if row.microseconds is None else f"{row.microseconds:.2f}"
        lines.append(f"| {row.experiment} | {size} | {row.variant} | {figure} | {row.fault} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a variant failed or differed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="comma-separated, of " + ", ".join(EXPERIMENTS))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="skip sizes that have not begun by then")
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(EXPERIMENTS)):
        parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    deadline = time.monotonic() + options.seconds
    rows: list[Row] = []
    skipped = []
    for name in names:
        experiment = EXPERIMENTS[name]
        for size in experiment.tiny if options.tiny else experiment.sizes:
            if time.monotonic() < deadline:
                rows += run(name, experiment, size, torch.device(options.device))
            else:
                skipped.append({"experiment": name, **size})
    print(table(rows))
    print(f"not begun within --seconds: {len(skipped)} sizes")
    if options.out:
        whole = {"machine": machine.facts(), "skipped": skipped, "rows": [row._asdict() for row in rows]}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
