"""Time the kernels with tuning constants other than the package's: the experiments in TUNING.md.

    python -m benchmarks.sweep [--only layout,chunk] [--seconds 240] [--out sweep.md]
    TRITON_INTERPRET=1 python -m benchmarks.sweep --device cpu --tiny

Constants of the imported package are patched for one measurement. Each variant must agree with the eager twin before it
is timed. At each size the package's own constants run first and last: differences smaller than the one between these
two runs are noise.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import (
    bench_clip,
    bench_evaluate,
    bench_l2_init,
    bench_lstm,
    bench_sample,
    bench_tokens_to_grid,
    cuda,
    harness,
    machine,
)
from benchmarks.harness import Case, Provider, Size
from metta_fastagent import use_backend
from metta_fastagent.ops.categorical import kernels as categorical
from metta_fastagent.ops.categorical import layouts
from metta_fastagent.ops.lstm import kernels as lstm
from metta_fastagent.ops.tensor_lists import kernels as tensor_lists
from metta_fastagent.ops.tensor_lists import plans
from metta_fastagent.ops.tokens import kernels as tokens

SHIPPED, SHIPPED_AGAIN = "package", "package again"
BOTH = "forward + backward"
# Experiment, operation, size, variant, microseconds, fault.
Row = tuple[str, str, str, str, str, str]
LOSSES = (partial(bench_l2_init.make_case, "forward"), partial(bench_l2_init.make_case, BOTH))
LSTMS = (partial(bench_lstm.make_case, "forward"), partial(bench_lstm.make_case, BOTH))
HEADS = (*(partial(bench_evaluate.make_case, mode) for mode in ("forward", BOTH)), bench_sample.make_case)


class Experiment(NamedTuple):
    """Constants of a module and the values to try, and the operations and sizes to time with them."""

    module: Any
    constants: Mapping[str, Sequence[int]]
    operations: Sequence[Callable[[Size, torch.device], Case]]
    # The last size is for a trial run in Triton's interpreter.
    sizes: Sequence[Size]

    def variants(self) -> dict[str, dict[str, int]]:
        """Every combination of the constants' values, by label."""
        found = [dict(zip(self.constants, each, strict=True)) for each in itertools.product(*self.constants.values())]
        return {harness.size_text(each): each for each in found}


def sizes(names: str, *values: tuple[int, ...]) -> list[Size]:
    return [dict(zip(names.split(), each, strict=True)) for each in values]


def head_sizes(*actions: int, tiny: int = 9) -> list[Size]:
    return sizes("rows actions", *itertools.product((4096, 262144), actions), (5, tiny))


TENSORS = sizes("tensors parameters", (200, 200_000), (200, 30_000_000), (200, 100_000_000), (2, 5000))
SEGMENTS = sizes("segments time resets", (512, 64, 3), (4096, 16, 3), (3, 2, 3))
TOKENS = sizes("rows tokens", (4096, 200), (16384, 200), (2, 40))
EXPERIMENTS = {
    # With 0, pieces are never single columns.
    "layout": Experiment(layouts, {"MAX_COLUMNS": (24, 32, 0)}, HEADS, head_sizes(9, 21, 32, 33, 48, 64)),
    "rows": Experiment(layouts, {"ROWS_PER_PROGRAM": (64, 128, 256, 512)}, HEADS, head_sizes(9, 21)),
    "tile": Experiment(layouts, {"WARP_ELEMENTS": (256, 512, 1024)}, HEADS, head_sizes(128, 1024, tiny=70)),
    "chunk": Experiment(
        tensor_lists,
        {"CHUNK": (2048, 4096, 8192, 16384), "CHUNK_WARPS": (4, 8)},
        (bench_clip.make_case, *LOSSES),
        TENSORS,
    ),
    "partials": Experiment(tensor_lists, {"PARTIALS_BLOCK": (256, 1024, 4096)}, LOSSES[:1], TENSORS[1:]),
    "grid": Experiment(
        tokens,
        {"ZERO_BLOCK": (256, 512, 1024), "TOKEN_BLOCK": (16, 32, 64)},
        [partial(bench_tokens_to_grid.make_case, "tokens_to_grid")],
        TOKENS,
    ),
    "lstm": Experiment(
        lstm, {"MANY_ROWS_BLOCK_B": (16, 32), "PARTS_STEPS": (3, 1000), "BLOCK_N": (64, 128)}, LSTMS, SEGMENTS
    ),
}


@contextmanager
def patched(module: Any, constants: Mapping[str, int]) -> Iterator[None]:
    """The package with other constants, and without the tables and launches cached for its own."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tensor_lists, "_tables", {}))
        stack.enter_context(mock.patch.object(plans, "_known", {}))
        stack.callback(categorical.constants_of.cache_clear)
        for name, value in constants.items():
            stack.enter_context(mock.patch.object(module, name, value))
        categorical.constants_of.cache_clear()
        yield


def measure(case: Case, device: torch.device) -> tuple[str, str]:
    """Microseconds of the kernel's call: device time on CUDA, otherwise wall time; and the fault, if any."""
    eager, kernel = (Provider(name, case.call_of(name)) for name in ("eager", "triton"))
    try:
        harness.require_agreement(case, eager, kernel)
        if device.type != "cuda":
            return f"{1e6 * kernel.seconds(1, time.perf_counter):.0f}", ""
        with use_backend("triton"):
            return f"{1e6 * cuda.gpu_seconds(kernel.call, device):.2f}", ""
    except Exception as error:
        return "", f"{type(error).__name__}: {' '.join(str(error).split())}"


def run(name: str, operation: Callable[[Size, torch.device], Case], size: Size, device: torch.device) -> list[Row]:
    """All variants of an experiment, for one operation and size."""
    experiment, rows = EXPERIMENTS[name], []
    for label, constants in {SHIPPED: {}, **experiment.variants(), SHIPPED_AGAIN: {}}.items():
        with patched(experiment.module, constants):
            case = operation(size, device)
            rows.append((name, case.operation, harness.size_text(size), label, *measure(case, device)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if a variant failed or differs, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="comma-separated, of " + ", ".join(EXPERIMENTS))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1")
    parser.add_argument("--tiny", action="store_true", help="one small size each, as a rehearsal")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="skip sizes that have not begun by then")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(EXPERIMENTS)):
        parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    deadline = time.monotonic() + options.seconds
    rows: list[Row] = []
    skipped = 0
    for name in names:
        chosen = EXPERIMENTS[name].sizes[-1:] if options.tiny else EXPERIMENTS[name].sizes[:-1]
        for operation, size in itertools.product(EXPERIMENTS[name].operations, chosen):
            if time.monotonic() < deadline:
                rows += run(name, operation, size, torch.device(options.device))
            else:
                skipped += 1
    head = ["| experiment | operation | size | variant | µs | fault |", "|" + " --- |" * 4 + " ---: | --- |"]
    table = "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])
    text = f"{table}\n\nsizes not begun within --seconds: {skipped}"
    print(text)
    if options.out:
        options.out.write_text(f"{json.dumps(machine.facts())}\n\n{text}\n")
    return int(any(fault for *_, fault in rows))


if __name__ == "__main__":
    sys.exit(main())
