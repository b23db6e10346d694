"""Time the kernels under other tuning constants than the package's: the experiments of TUNING.md.

    python -m benchmarks.sweep [--only layout,chunk] [--seconds 240] [--out sweep.json]
    TRITON_INTERPRET=1 python -m benchmarks.sweep --device cpu --tiny

Constants and launchers are replaced in the imported package for the length of one measurement; nothing of this is an
option of the package. Each variant has to agree with the eager twin before it is timed. The package's own constants
come first in each table and once more at its end: what differs by less than these two is noise.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree

from benchmarks import categorical, harness, machine
from metta_fastagent import _triton, ops, use_backend
from metta_fastagent.ops import (
    _action_index,
    _categorical,
    _chunk_table,
    _clip_weights,
    _evaluate_actions,
    _l2_init_loss,
    _lstm_layer,
    _sample_actions,
    _tokens_to_grid,
)

tl = _triton.tl

SHIPPED, SHIPPED_AGAIN = "package", "package again"
# Few enough to stay in the queue of launches, so that the host does not wait.
HOST_CALLS = 200
HOST_ROUNDS = 5
TOLERANCE = (1e-4, 1e-5)

Size = Mapping[str, Any]
Patch = tuple[Any, str, Any]  # module, name, value


class Variant(NamedTuple):
    """One way to run an operation, and what is replaced in the package meanwhile."""

    label: str
    call: Callable[[], Any]
    patches: Sequence[Patch] = ()


class Made(NamedTuple):
    """An experiment at one size: the call of the package, the variants, and what to compare of a result."""

    call: Callable[[], Any]
    variants: Sequence[Variant]
    compared: Callable[[Any], Any] = lambda result: result
    reset: Callable[[], Any] = lambda: None


class Experiment(NamedTuple):
    """A question, the sizes that answer it, those of a rehearsal, and how to set it up."""

    name: str
    sizes: Sequence[Size]
    tiny: Sequence[Size]
    make: Callable[[Size, torch.device], Made]


class Row(NamedTuple):
    """What one variant took; `fault` where it failed or computed something else."""

    experiment: str
    size: Size
    variant: str
    gpu_us: float | None
    host_us: float | None
    fault: str = ""


def head_call(size: Size, device: torch.device) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """A call of evaluate forward, its backward, or sample, and what of its result does not hang on the draw."""
    inputs = categorical.make_inputs(size, device)
    table = inputs.cum_action_max_params
    if size["op"] == "sample":
        # The uniforms are given, so that all variants draw alike.
        uniform = torch.rand(size["rows"], generator=torch.Generator().manual_seed(0)).to(device)
        return lambda: _sample_actions._draw_cuda(inputs.logits, inputs.action_index_tensor, uniform), lambda r: r[3]
    if size["op"] == "forward":
        return lambda: _evaluate_actions._evaluate_actions_forward_cuda(inputs.logits, inputs.pairs, table)[:3], _same
    index = categorical.upstream_index(inputs.pairs, table)
    gradients = (inputs.grad_log_prob, inputs.grad_entropy, None)
    return lambda: _evaluate_actions._evaluate_actions_backward_cuda(inputs.logits, index, *gradients), _same


def _same(result: Any) -> Any:
    return result


def layout_patches(rows: int, warps: int, block: int | None) -> list[Patch]:
    """A layout for both categorical kernels: columns, or where `block` is given tiles of so many columns."""

    def choose(count: int, num_actions: int, columns_kernel: Any, tile_kernel: Any) -> tuple[Any, Any, dict[str, int]]:
        layout = {"ROWS": rows, "num_warps": warps} | ({} if block is None else {"BLOCK_A": block})
        return (_triton.cdiv(count, rows),), columns_kernel if block is None else tile_kernel, layout

    return [(module, "choose_kernel", choose) for module in (_evaluate_actions, _sample_actions)]


def make_layout(size: Size, device: torch.device) -> Made:
    """Rows in threads against tiles: the crossover MAX_COLUMNS."""
    call, compared = head_call(size, device)
    columns = Variant("columns", call, layout_patches(_categorical.ROWS_PER_PROGRAM, 4, None))
    rows, block, warps = _categorical.tile_shape(size["actions"])
    return Made(call, [columns, Variant("tile", call, layout_patches(rows, warps, block))], compared)


def make_rows(size: Size, device: torch.device) -> Made:
    """Rows of a program and its warps, in the layout of columns: ROWS_PER_PROGRAM."""
    call, compared = head_call(size, device)
    shapes = ((64, 2), (128, 2), (128, 4), (256, 4), (256, 8), (512, 4))
    return Made(call, [Variant(f"{r} rows, {w} warps", call, layout_patches(r, w, None)) for r, w in shapes], compared)


def make_tile(size: Size, device: torch.device) -> Made:
    """Elements of a tile and its warps: TILE_ELEMENTS."""
    call, compared = head_call(size, device)
    block = _triton.next_power_of_2(size["actions"])
    variants = [
        Variant(f"{elements} elements, {warps} warps", call, layout_patches(max(1, elements // block), warps, block))
        for elements in (1024, 2048, 4096)
        for warps in (2, 4, 8)
        if elements >= block
    ]
    return Made(call, variants, compared)


def chunk_patches(chunk: int, warps: int) -> list[Patch]:
    """Elements of a chunk, and the warps of its program."""
    lists = [
        (module, name, value)
        for module in (_clip_weights, _l2_init_loss)
        for name, value in (("CHUNK", chunk), ("CHUNK_WARPS", warps))
    ]
    return [(_chunk_table, "CHUNK", chunk), (_chunk_table, "_tables", {}), *lists]


def make_chunk(size: Size, device: torch.device) -> Made:
    """Elements of a chunk and its warps, in the operations on lists: CHUNK, CHUNK_WARPS."""
    made = list_calls(size, device)
    shapes = [(chunk, warps) for chunk in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8) if chunk >= 128 * warps]
    variants = [
        Variant(f"{chunk} elements, {warps} warps", made.call, chunk_patches(chunk, warps)) for chunk, warps in shapes
    ]
    return made._replace(variants=variants)


def make_partials(size: Size, device: torch.device) -> Made:
    """Partial sums that the last program of the L2 loss adds up at a time: PARTIALS_BLOCK."""
    made = list_calls({**size, "op": "l2 forward"}, device)
    blocks = (256, 1024, 2048, 4096, 8192)
    patches = {block: [(_l2_init_loss, "PARTIALS_BLOCK", block)] for block in blocks}
    return made._replace(variants=[Variant(f"{block} partial sums", made.call, patches[block]) for block in blocks])


def list_calls(size: Size, device: torch.device) -> Made:
    """clip, or the L2 loss forward or backward, on square tensors."""
    width = round((size["parameters"] / size["tensors"]) ** 0.5)
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> list[Tensor]:
        shape = (width, width)
        return [torch.randn(shape, device=device, generator=generator) for _ in range(size["tensors"])]

    params, initial = draw(), draw()
    if size["op"] == "clip":
        first = [param.clone() for param in params]
        bounds = [0.5] * len(params)

        def reset() -> None:
            for param, value in zip(params, first, strict=True):
                param.copy_(value)

        return Made(lambda: ops.clip_weights_(params, bounds), [], lambda _: params, reset)
    if size["op"] == "l2 forward":
        return Made(lambda: _l2_init_loss._l2_init_loss_forward(params, initial, 0.5), [])
    grad = torch.ones((), device=device)
    return Made(lambda: _l2_init_loss._l2_init_loss_backward(params, initial, 0.5, grad), [])


@_triton.jit
def _clip_storing_kernel(example, chunks, bounds, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, LOOKS: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + chunk * 3).to(example.dtype)
    length = tl.load(chunks + chunk * 3 + 1)
    aligned = tl.load(chunks + chunk * 3 + 2)
    bound = tl.load(bounds + chunk).to(example.dtype.element_ty).to(COMPUTE)
    offset = tl.arange(0, CHUNK)
    if (length == CHUNK) & (aligned == 1):
        start = tl.multiple_of(start, 16)
        x = tl.load(start + offset).to(COMPUTE)
        clipped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
        if LOOKS:
            # -1, which the compiler does not know: it looks for something out of range, and stores in any case.
            least = 0 - (bound >= 0).to(tl.int32)
            if tl.max(((x > bound) | (x < -bound)).to(tl.int32), 0) > least:
                tl.store(start + offset, clipped.to(example.dtype.element_ty))
        else:
            tl.store(start + offset, clipped.to(example.dtype.element_ty))
    else:
        inside = offset < length
        x = tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
        clipped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
        tl.store(start + offset, clipped.to(example.dtype.element_ty), mask=inside)


class _Storing:
    """The kernel above in place of the package's."""

    def __init__(self, looks: bool) -> None:
        self._looks = looks

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **options: _clip_storing_kernel[grid](*args, **options, LOOKS=self._looks)


def make_stores(size: Size, device: torch.device) -> Made:
    """The clip where everything is within range and nothing is stored, against kernels that store all of it.

    The second of these is what the package's kernel does where each chunk holds something out of range. Calls that are
    repeated find everything within range, so that case cannot be timed by itself.
    """
    made = list_calls({**size, "op": "clip"}, device)
    kinds = {"always stores": False, "looks, then stores": True}
    variants = [
        Variant(name, made.call, [(_clip_weights, "_clip_weights_kernel", _Storing(looks))])
        for name, looks in kinds.items()
    ]
    return made._replace(variants=variants)


def make_grid(size: Size, device: torch.device) -> Made:
    """Cells zeroed at once and tokens compared at once: ZERO_BLOCK, TOKEN_BLOCK."""
    shape = (size["rows"], size["tokens"])
    generator = torch.Generator().manual_seed(0)
    x, y, feature, value = (torch.randint(n, shape, generator=generator) for n in (11, 11, 25, 256))
    tokens = torch.stack((x * 16 + y, feature, value), -1).to(torch.uint8).to(device)
    scale = torch.ones(25, device=device)
    blocks = [(zero, token) for zero in (512, 1024, 2048, 4096) for token in (16, 32, 64)]

    def call() -> Tensor:
        return ops.tokens_to_grid(tokens, 25, 11, 11, scale)

    return Made(call, [Variant(f"{z} cells, {t} tokens", call, _grid_patches(z, t)) for z, t in blocks])


def _grid_patches(cells: int, tokens: int) -> list[Patch]:
    return [(_tokens_to_grid, "ZERO_BLOCK", cells), (_tokens_to_grid, "TOKEN_BLOCK", tokens)]


def make_lstm(size: Size, device: torch.device) -> Made:
    """Rows of a program, hidden columns at a time, warps and stages of the LSTM layer: BLOCK_B, BLOCK_N, OPTIONS."""
    steps, rows, hidden = size["time"], size["rows"], size["hidden"]
    generator = torch.Generator().manual_seed(0)
    shapes = ((steps, rows, 4 * hidden), (4 * hidden, hidden), (rows, hidden), (rows, hidden), (steps, rows, hidden))
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    projected, weight, h, c, grad = [0.1 * tensor for tensor in drawn]
    resets = (torch.rand(steps, rows, generator=generator) < 0.03).to(device)

    def forward() -> Any:
        return _lstm_layer._lstm_layer_forward(projected, weight, h, c, resets)

    _, cells, gates = _lstm_layer.lstm_layer_forward_eager(projected, weight, h, c, resets)

    def backward() -> Any:
        return _lstm_layer._lstm_layer_backward(weight, c, resets, cells, gates, grad, None, None)

    call = forward if size["op"] == "lstm forward" else backward
    shapes = ((16, 32, 8, 3), (16, 128, 8, 3), (16, 64, 4, 3), (16, 64, 8, 2), (32, 64, 8, 3))
    variants = [
        Variant(f"{b} rows, {n} columns, {warps} warps, {stages} stages", call, _lstm_patches(b, n, warps, stages))
        for b, n, warps, stages in shapes
    ]
    return Made(call, variants)


def _lstm_patches(block_b: int, block_n: int, warps: int, stages: int) -> list[Patch]:
    def layout(block_k: Mapping[int, int], dtype: torch.dtype) -> dict[str, Any]:
        options = {**_lstm_layer.OPTIONS, "num_warps": warps, "num_stages": stages}
        return {"BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_K": block_k[dtype.itemsize], **options}

    return [(_lstm_layer, "BLOCK_B", block_b), (_lstm_layer, "_layout", layout)]


def make_conversion(size: Size, device: torch.device) -> Made:
    """Rows of a program that converts pairs to indices: BLOCK."""
    inputs = categorical.make_inputs({"rows": size["rows"], "actions": 21}, device)

    def call() -> Tensor:
        return ops.action_to_logit_index(inputs.pairs, inputs.cum_action_max_params)

    return Made(
        call, [Variant(f"{block} rows", call, [(_action_index, "BLOCK", block)]) for block in (128, 256, 512, 1024)]
    )


def make_host(size: Size, device: torch.device) -> Made:
    """What each level of a call costs the host: the public function, the operator, the launcher, a kept kernel."""
    inputs = categorical.make_inputs(size, device)
    logits, pairs, table = inputs.logits, inputs.pairs, inputs.cum_action_max_params
    levels = {
        "operator": lambda: _evaluate_actions._evaluate_actions_forward(logits, pairs, table)[:3],
        "launcher": lambda: _evaluate_actions._evaluate_actions_forward_cuda(logits, pairs, table)[:3],
    }
    variants = [Variant(name, call) for name, call in levels.items()]
    return Made(lambda: ops.evaluate_actions(logits, pairs, table), variants)


def make_handle(size: Size, device: torch.device) -> Made:
    """The clip's launch through Triton's own look-up, against a compiled kernel that is kept."""
    made = list_calls({**size, "op": "clip"}, device)
    with use_backend("triton"), noted_launch(_clip_weights, "_clip_weights_kernel") as launch:
        made.call()
    variants = [Variant("kernel alone", launch.repeat)]
    # The interpreter compiles nothing.
    return made._replace(variants=variants + ([Variant("kept kernel", launch.kept)] if launch.compiled else []))


class Launch:
    """A kernel whose last launch can be repeated, through Triton and through the compiled kernel that it returned."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.compiled: Any = None
        self._grid: tuple[int, ...] = ()
        self._args: tuple[Any, ...] = ()
        self._options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self._grid, self._args, self._options = grid, args, options
            self.compiled = self._kernel[grid](*args, **options)
            return self.compiled

        return launch

    def repeat(self) -> None:
        """The launch as it was."""
        self._kernel[self._grid](*self._args, **self._options)

    def kept(self) -> None:
        """The same by the compiled kernel: all arguments in order, the constants among them."""
        names = self._kernel.arg_names[len(self._args) :]
        constants = [self._options[name] for name in names]
        grid = (*self._grid, 1, 1)[:3]
        self.compiled[grid](*self._args, *constants)


@contextmanager
def noted_launch(module: Any, name: str) -> Iterator[Launch]:
    """A Launch in place of a module's kernel."""
    launch = Launch(getattr(module, name))
    with mock.patch.object(module, name, launch):
        yield launch


HEADS = ("forward", "backward", "sample")
MANY, FEW = 262144, 4096


def _heads(rows: Sequence[int], actions: Sequence[int]) -> list[Size]:
    return [{"op": op, "rows": r, "actions": a} for op in HEADS for r in rows for a in actions]


EXPERIMENTS = [
    Experiment("layout", _heads((FEW, MANY), (9, 21, 32, 48, 64)), _heads((5,), (9,)), make_layout),
    Experiment("rows", _heads((FEW, MANY), (9, 21)), _heads((5,), (9,)), make_rows),
    Experiment("tile", _heads((FEW,), (128, 1024)), _heads((5,), (70,)), make_tile),
    Experiment(
        "chunk",
        [
            {"op": op, "tensors": tensors, "parameters": parameters}
            for op in ("clip", "l2 forward", "l2 backward")
            for tensors, parameters in ((200, 200_000), (200, 30_000_000), (200, 100_000_000))
        ],
        [{"op": op, "tensors": 2, "parameters": 5000} for op in ("clip", "l2 forward", "l2 backward")],
        make_chunk,
    ),
    Experiment(
        "partials",
        [{"tensors": 200, "parameters": parameters} for parameters in (30_000_000, 100_000_000)],
        [{"tensors": 2, "parameters": 5000}],
        make_partials,
    ),
    Experiment(
        "stores", [{"tensors": 200, "parameters": 100_000_000}], [{"tensors": 2, "parameters": 5000}], make_stores
    ),
    Experiment("grid", [{"rows": r, "tokens": 200} for r in (FEW, 16384)], [{"rows": 2, "tokens": 40}], make_grid),
    Experiment(
        "lstm",
        [
            {"op": op, "rows": rows, "time": time, "hidden": 128}
            for op in ("lstm forward", "lstm backward")
            for rows, time in ((512, 64), (4096, 16))
        ],
        [{"op": op, "rows": 3, "time": 2, "hidden": 16} for op in ("lstm forward", "lstm backward")],
        make_lstm,
    ),
    Experiment("conversion", [{"rows": r} for r in (FEW, 1 << 20)], [{"rows": 5}], make_conversion),
    Experiment("host", [{"rows": 256, "actions": 21}], [{"rows": 5, "actions": 9}], make_host),
    Experiment("handle", [{"tensors": 14, "parameters": 300_000}], [{"tensors": 2, "parameters": 5000}], make_handle),
]


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """The package with other constants."""
    with ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def run(experiment: Experiment, size: Size, device: torch.device) -> list[Row]:
    """All variants of an experiment at one size, the package's own first and last."""
    made = experiment.make(size, device)
    with use_backend("eager"):
        made.reset()
        expected = _copied(made.compared(expected_of(made, size, device)))
    package = Variant(SHIPPED, made.call)
    variants = [package, *made.variants, package._replace(label=SHIPPED_AGAIN)]
    with use_backend("triton"):
        return [
            Row(experiment.name, size, variant.label, *measure(made, variant, expected, device)) for variant in variants
        ]


def expected_of(made: Made, size: Size, device: torch.device) -> Any:
    """The eager twin's result; private launchers have twins of their own."""
    twins = {
        "_evaluate_actions_forward_cuda": _evaluate_actions.evaluate_actions_forward_eager,
        "_evaluate_actions_backward_cuda": _evaluate_actions.evaluate_actions_backward_eager,
    }
    with patched([(_evaluate_actions, name, twin) for name, twin in twins.items()]):
        if size.get("op") == "sample":
            inputs = categorical.make_inputs(size, device)
            return [None, None, None, inputs.logits.log_softmax(-1)]
        return made.call()


def _copied(result: Any) -> Any:
    return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)


def measure(
    made: Made, variant: Variant, expected: Any, device: torch.device
) -> tuple[float | None, float | None, str]:
    """(microseconds of the device, of the host, fault) of one call of a variant."""
    try:
        with patched(variant.patches):
            made.reset()
            fault = harness.difference(expected, made.compared(variant.call()), *TOLERANCE)
            if fault is not None:
                return None, None, f"computes something else: {fault}"
            gpu = harness.gpu_seconds(harness.Provider(variant.label, variant.call), device)
            return None if gpu is None else gpu * 1e6, host_seconds(variant.call, device) * 1e6, ""
    except Exception as error:
        return None, None, harness.first_line(error)


def host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of the host in one call, which does not wait for the device."""
    calls = HOST_CALLS if device.type == "cuda" else 1
    seconds = []
    for _ in range(HOST_ROUNDS if device.type == "cuda" else 1):
        harness.wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - started) / calls)
    harness.wait(device)
    return statistics.median(seconds)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| experiment | size | variant | GPU µs | host µs | fault |", "| --- | --- | --- | ---: | ---: | --- |"]
    for row in rows:
        size = ", ".join(f"{name} {value}" for name, value in row.size.items())
        figures = ["" if value is None else f"{value:.2f}" for value in (row.gpu_us, row.host_us)]
        lines.append(f"| {row.experiment} | {size} | {row.variant} | {' | '.join(figures)} | {row.fault} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no variant failed or computed something else."""
    names = [experiment.name for experiment in EXPERIMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help="comma-separated, of " + ", ".join(names))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further size is begun after these")
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only.split(",")) - set(names))
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(names)}")
    device = torch.device(options.device)
    deadline = time.monotonic() + options.seconds
    rows: list[Row] = []
    left_out = []
    for experiment in (each for each in EXPERIMENTS if each.name in options.only.split(",")):
        for size in experiment.tiny if options.tiny else experiment.sizes:
            if time.monotonic() < deadline:
                rows += run(experiment, size, device)
            else:
                left_out.append({"experiment": experiment.name, "size": dict(size)})
    print(table(rows))
    print(f"left out, as the time was used up: {len(left_out)} sizes")
    if options.out:
        whole = {"machine": machine.facts(), "left_out": left_out, "rows": [row._asdict() for row in rows]}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
