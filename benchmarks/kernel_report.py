"""Compile every Triton kernel for GPUs that need not be there, and read the machine code.

    python -m benchmarks.kernel_report [--json FILE] [--targets sm_80,sm_90]

Prints registers, spills, barriers, the widest loads and stores, machine instructions and seconds to compile for each
kernel and target; for kernels that store values of all actions, also the 32-byte sectors that their stores of 32 rows
touch.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metta_fastagent.ops import (
    _action_index,
    _clip_weights,
    _evaluate_actions,
    _l2_init_loss,
    _lstm_layer,
    _sample_actions,
    _tokens_to_grid,
)
from metta_fastagent.ops._bad_action import CONVERT_INDEX, CONVERT_PAIR
from metta_fastagent.ops._categorical import MAX_COLUMNS, block_shape
from metta_fastagent.ops._chunk_table import CHUNK, CHUNK_WARPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TRITON_DTYPES = {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.float32, "fp16": tl.float32}
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """One specialisation of a kernel."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    scalars: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    rows_per_program: int
    # None: Triton's default.
    num_stages: int | None = None
    # The case launched in its place on AMD GPUs; None: the same.
    on_amd: "Case | None" = None


class Figures(NamedTuple):
    """Figures of one case's machine code for one target."""

    case: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    load_bits: int
    store_bits: int
    instructions: int
    # In the longest loop, the one over time of an LSTM layer; without loops, in the whole code.
    barriers: int
    # Runs of loads into registers that barriers separate there, in the order of the code: each may wait for memory.
    load_runs: int
    instructions_per_row: float
    # Of 32 rows [A]; 0 for kernels that store none.
    store_sectors: int
    # Next to none if Triton had the code in its cache.
    compile_seconds: float


def cases() -> Iterator[Case]:
    """The specialisations that users meet: float32 at several numbers of actions, and the other dtypes once."""
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        yield _clip_case(dtype)
    for num_actions in (5, 9, 21, 32, 33, 64, 128, 1024, 4096):
        yield from _categorical_cases(num_actions, "fp32")
    for dtype in ("bf16", "fp64"):
        yield from _categorical_cases(21, dtype)
    yield from _conversion_cases()
    for dtype in ("fp32", "bf16"):
        yield from _l2_cases(dtype)
        yield _tokens_case(dtype)
    for size, dtype in ((128, "fp32"), (128, "bf16"), (128, "fp16"), (32, "fp32"), (512, "fp32"), (512, "bf16")):
        yield from _lstm_cases(size, dtype)


def _clip_case(dtype: str) -> Case:
    return Case(
        f"clip_weights {dtype}",
        _clip_weights._clip_weights_kernel,
        {"example": dtype, "chunks": "i64", "bounds": "fp64"},
        {},
        {"COMPUTE": TRITON_DTYPES[dtype], "CHUNK": CHUNK},
        CHUNK_WARPS,
        CHUNK,
    )


def _categorical_cases(num_actions: int, dtype: str) -> Iterator[Case]:
    on_amd = _categorical_cases_of(num_actions, dtype, lanes=64)
    for case, other in zip(_categorical_cases_of(num_actions, dtype, lanes=32), on_amd, strict=True):
        yield case._replace(on_amd=other)


def _categorical_cases_of(num_actions: int, dtype: str, lanes: int) -> Iterator[Case]:
    kind = "columns" if num_actions <= MAX_COLUMNS else "tile"
    rows, block, warps = block_shape(num_actions, lanes)
    constants = {"A": num_actions, "COMPUTE": TRITON_DTYPES[dtype], "ROWS": rows, "BLOCK_A": block}
    outputs = {"log_prob": dtype, "entropy": dtype, "full_log_probs": dtype}
    suffix = f"A={num_actions} {dtype}"
    conditions = {"word": "i64", "mask": "i1", "temperature_tensor": dtype}
    constants |= {"MASKED": False, "TEMPERATURE": 0}
    yield Case(
        f"evaluate_actions forward {suffix}",
        getattr(_evaluate_actions, f"_evaluate_actions_fwd_{kind}_kernel"),
        {"logits": dtype, "actions": "i32", "table": "i64", **outputs, "index": "i64", **conditions},
        {"N": "i32", "num_types": "i32", "stride_row": "i32", "stride_pair": "i32", "temperature": "fp32"},
        {**constants, "PAIRS": True, "STRICT": True},
        warps,
        rows,
    )
    yield Case(
        f"evaluate_actions backward {suffix}",
        getattr(_evaluate_actions, f"_evaluate_actions_bwd_{kind}_kernel"),
        {"logits": dtype, "index": "i64", "grad_log_prob": dtype, "grad_entropy": dtype, "grad_full": dtype}
        | {"grad_logits": dtype, "mask": "i1", "temperature_tensor": dtype},
        {"N": "i32", "stride_log_prob": "i32", "stride_entropy": "i32", "temperature": "fp32"},
        {**constants, "HAS_LOG_PROB": True, "HAS_ENTROPY": True, "HAS_FULL": False},
        warps,
        rows,
    )
    yield Case(
        f"sample_actions {suffix}",
        getattr(_sample_actions, f"_sample_actions_{kind}_kernel"),
        {"logits": dtype, "uniform": "fp64" if dtype == "fp64" else "fp32", "table": "i32", "index": "i64", **outputs}
        | {"pair": "i32", **conditions},
        {"N": "i32", "temperature": "fp32"},
        {**constants, "PAIRS": True, "STRICT": True, "GREEDY": False},
        warps,
        rows,
    )


def _conversion_cases() -> Iterator[Case]:
    block = _action_index.BLOCK
    yield Case(
        "action_to_logit_index",
        _action_index._action_to_logit_index_kernel,
        {"actions": "i32", "table": "i64", "index": "i64", "word": "i64"},
        {"N": "i32", "num_types": "i32", "stride_row": "i32", "stride_pair": "i32"},
        {"OPERATION": CONVERT_PAIR, "BLOCK": block},
        4,
        block,
    )
    yield Case(
        "logit_index_to_action",
        _action_index._logit_index_to_action_kernel,
        {"index": "i64", "table": "i32", "pairs": "i32", "word": "i64"},
        {"N": "i32", "A": "i32"},
        {"OPERATION": CONVERT_INDEX, "BLOCK": block},
        4,
        block,
    )


def _l2_cases(dtype: str) -> Iterator[Case]:
    constants = {"COMPUTE": TRITON_DTYPES[dtype], "CHUNK": CHUNK}
    yield Case(
        f"l2_init_loss forward {dtype}",
        _l2_init_loss._l2_init_loss_fwd_kernel,
        {"example": dtype, "chunks": "i64", "partials": "fp64", "counter": "i32", "loss": "fp32"},
        {"num_chunks": "i32", "scale": "fp32"},
        {**constants, "PARTIALS_BLOCK": _l2_init_loss.PARTIALS_BLOCK},
        CHUNK_WARPS,
        CHUNK,
    )
    yield Case(
        f"l2_init_loss backward {dtype}",
        _l2_init_loss._l2_init_loss_bwd_kernel,
        {"flat": dtype, "chunks": "i64", "grad": "fp32"},
        {"scale": "fp32"},
        constants,
        CHUNK_WARPS,
        CHUNK,
    )


def _tokens_case(dtype: str) -> Case:
    module = _tokens_to_grid
    blocks = {"ZERO_BLOCK": module.ZERO_BLOCK, "TOKEN_BLOCK": module.TOKEN_BLOCK}
    return Case(
        f"tokens_to_grid {dtype}",
        module._tokens_to_grid_kernel,
        {"tokens": "u8", "scale": "fp32", "grid": dtype},
        {"num_tokens": "i32"},
        {"L": 25, "W": 11, "H": 11, **blocks},
        4,
        1,
    )


def _lstm_cases(size: int, dtype: str) -> Iterator[Case]:
    module = _lstm_layer
    upstream = ("grad_output", "grad_last_h", "grad_last_c")
    backward = dict.fromkeys(("weight_hh", "c", "cells", "gates", *upstream, "grad_projected", "grad_h"), dtype)
    # Steps and whether rows are many: a rollout's step keeps no gates.
    for kind, steps, many_rows in (("forward", 64, False), ("forward, many rows,", 64, True), ("step", 1, False)):
        for_each = ("projected", "weight_hh", "h", "c", "output", "cells", "gates")
        constants = {"H": size, "HAS_RESETS": True, "KEEP_GATES": steps > 1}
        yield _lstm_case(
            f"lstm_layer {kind} H={size} {dtype}",
            module._lstm_layer_fwd_kernel,
            {**dict.fromkeys(for_each, dtype), "parts": "fp16"},
            constants,
            module.FORWARD_SHAPES,
            many_rows,
            steps,
        )
    # In float32 many rows change nothing backwards, but few steps do.
    for kind, steps, many_rows in (
        ("backward", 64, False),
        ("backward, few steps,", 1, False) if dtype == "fp32" else ("backward, many rows,", 64, True),
    ):
        yield _lstm_case(
            f"lstm_layer {kind} H={size} {dtype}",
            module._lstm_layer_bwd_kernel,
            {**backward, "grad_c": "fp32", "parts": "bf16"},
            {"H": size, "HAS_RESETS": True, "HAS_OUTPUT": True, "HAS_LAST_H": True, "HAS_LAST_C": True},
            module.BACKWARD_SHAPES,
            many_rows,
            steps,
        )


def _lstm_case(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    shapes: Mapping[str, Any],
    many_rows: bool,
    steps: int,
) -> Case:
    dtype = TORCH_DTYPES[pointers["weight_hh"]]
    rows = _lstm_layer.MANY_ROWS_BLOCK_B if many_rows else _lstm_layer.BLOCK_B

    def launched(platform: str, on_amd: Case | None = None) -> Case:
        in_parts = _lstm_layer._in_parts(dtype, steps, many_rows, platform)
        layout = _lstm_layer._layout(shapes, dtype, in_parts, rows, platform)
        warps, num_stages = layout.pop("num_warps"), layout.pop("num_stages")
        scalars = {"T": "i32", "B": "i32", "width": "i32"}
        everything = {**pointers, "resets": "i1"}
        return Case(name, kernel, everything, scalars, {**constants, **layout}, warps, rows, num_stages, on_amd)

    return launched("cuda", launched("hip"))


def compile_case(case: Case, target: GPUTarget) -> Any:
    """The compiled kernel, every pointer known to be 16-byte aligned as PyTorch's allocator makes it."""
    names = case.kernel.arg_names
    types = {
        **{n: f"*{t}" for n, t in case.pointers.items()},
        **case.scalars,
        **dict.fromkeys(case.constants, "constexpr"),
    }
    signature = {name: types[name] for name in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.pointers}
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, attributes)
    stages = {} if case.num_stages is None else {"num_stages": case.num_stages}
    return triton.compile(source, target=target, options={"num_warps": case.num_warps, **stages})


def figures(case: Case, target_name: str) -> Figures:
    """Compile one case for one target and read its machine code."""
    target = TARGETS[target_name]
    case = case.on_amd or case if target.backend == "hip" else case
    start = time.perf_counter()
    compiled = compile_case(case, target)
    seconds = time.perf_counter() - start
    read = _read_amd if target_name.startswith("gfx") else _read_nvidia
    registers, spills, *counts = read(compiled)
    return Figures(
        case.name,
        target_name,
        registers,
        spills,
        compiled.metadata.shared,
        *counts,
        counts[2] * case.num_warps / case.rows_per_program,
        store_sectors(compiled.asm["ttgir"], case.constants["A"]) if "A" in case.constants else 0,
        seconds,
    )


def store_sectors(ttgir: str, num_actions: int) -> int:
    """32-byte sectors that the stores of 32 rows of an output [N, num_actions] touch, by the layout of the lanes."""
    store = re.search(r"store .*tensor<\d+x\d+x(?:!tt\.ptr<)?[a-z]+(\d+)>?, (#\w+)>", ttgir)
    if store is None:
        raise RuntimeError("the kernel stores no rows")
    layout = re.search(
        rf"^{store[2]} = .*sizePerThread = \[1, (\d+)\], threadsPerWarp = \[(\d+), (\d+)\]", ttgir, re.MULTILINE
    )
    if layout is None:
        raise RuntimeError(f"the kernel's listing lacks the layout {store[2]}")
    adjacent, row_lanes, column_lanes = map(int, layout.groups())
    element, width, sectors = int(store[1]) // 8, adjacent * column_lanes, 0
    # 64 rows: a wave of AMD may store as many at once.
    for top in range(0, 64, row_lanes):
        for left in range(0, num_actions, width):
            row_columns = product(range(top, top + row_lanes), range(left, min(left + width, num_actions)))
            sectors += len({(row * num_actions + column) * element // 32 for row, column in row_columns})
    return sectors // 2


def _read_nvidia(compiled: Any) -> tuple[int, ...]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", cubin.name)
        code = _output(tools / "nvdisasm", "-c", cubin.name)
    registers = _number(r"REG:(\d+)", usage)
    spills = _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage)
    opcodes, loop = _opcodes(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", code)
    useful = [opcode for opcode in opcodes if opcode != "NOP" and not opcode.startswith("BRA")]
    stops = _runs(loop, ("BAR.SYNC",), ("LDG.",))
    return registers, spills, _widest(opcodes, "LDG"), _widest(opcodes, "STG"), len(useful), *stops


def _opcodes(instruction: str, listing: str) -> tuple[list[str], list[str]]:
    """All opcodes, and those of the longest loop: from a label to the last branch back to it; all without one."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        label, found = re.match(r"(\.L\w+):", line), re.match(instruction, line)
        if label:
            labels[label[1]] = len(opcodes)
        elif found:
            opcodes.append(found[1])
            loops += [opcodes[labels[target] :] for target in re.findall(r"\.L\w+", line) if target in labels]
    longest = max(loops, key=len, default=[])
    # A branch to itself ends the code.
    return opcodes, longest if len(longest) > 1 else opcodes


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the disassembler's report lacks {pattern}")
    return int(found.group(1))


def _widest(opcodes: list[str], kind: str) -> int:
    widths = []
    for opcode in opcodes:
        if opcode.split(".")[0] == kind:
            sizes = re.findall(r"\.(?:U|S)?(8|16|64|128)\b", opcode)
            widths.append(max(map(int, sizes)) if sizes else 32)
    return max(widths, default=0)


def _runs(opcodes: list[str], barriers: tuple[str, ...], loads: tuple[str, ...]) -> tuple[int, int]:
    """(barriers, runs of loads between them)."""
    kinds = "".join("b" if o.startswith(barriers) else "l" if o.startswith(loads) else "" for o in opcodes)
    return kinds.count("b"), sum(run != "" for run in kinds.split("b"))


def _read_amd(compiled: Any) -> tuple[int, ...]:
    code = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s+(\d+)", code)
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
    opcodes, loop = _opcodes(r"\s+([a-z]\w+)", code[: code.rindex("s_endpgm")])
    widths = {"dwordx4": 128, "dwordx2": 64, "dword": 32}
    loads = [widths.get(o.rsplit("_", 1)[-1], 16) for o in opcodes if o.startswith(("global_load", "buffer_load"))]
    stores = [widths.get(o.rsplit("_", 1)[-1], 16) for o in opcodes if o.startswith(("global_store", "buffer_store"))]
    stops = _runs(loop, ("s_barrier",), ("global_load", "buffer_load"))
    return registers, spills, max(loads, default=0), max(stores, default=0), len(opcodes), *stops


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of " + ", ".join(TARGETS))
    arguments = parser.parse_args()
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    rows = [figures(case, target) for target in arguments.targets.split(",") for case in cases()]
    print(f"Triton {triton.__version__}")
    print("kernel".ljust(42), "target  regs spill shared load store  instr bars runs per row sectors seconds")
    for row in rows:
        print(
            f"{row.case:42} {row.target:7} {row.registers:4} {row.spills:5} {row.shared_bytes:6} {row.load_bits:4} "
            f"{row.store_bits:5} {row.instructions:6} {row.barriers:4} {row.load_runs:4} "
            f"{row.instructions_per_row:7.2f} {row.store_sectors:7} {row.compile_seconds:7.2f}"
        )
    if arguments.json:
        figures_by_name = {"triton": triton.__version__, "rows": [row._asdict() for row in rows]}
        arguments.json.write_text(json.dumps(figures_by_name, indent=1))


if __name__ == "__main__":
    main()
