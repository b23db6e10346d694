"""Compile every Triton kernel for GPUs that need not be present, and read the machine code.

    python -m benchmarks.kernel_report [--json FILE] [--targets sm_80,sm_90]

Prints registers, spills, barriers, the widest loads and stores, machine instructions and compile seconds for each
kernel and target; for kernels that store values for all actions, also the 32-byte sectors touched by their stores of 32
rows.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import metta_fastagent.runtime.triton as package_triton
from metta_fastagent import ops, use_backend
from metta_fastagent.ops import conversion
from metta_fastagent.ops.categorical import kernels as categorical
from metta_fastagent.ops.categorical import layouts
from metta_fastagent.ops.lstm import kernels as lstm
from metta_fastagent.ops.lstm.layer import lstm_step_into
from metta_fastagent.ops.lstm.reference import LayerInputs
from metta_fastagent.ops.ppo import kernels as ppo
from metta_fastagent.ops.tensor_lists import kernels as tensor_lists
from metta_fastagent.ops.tokens import kernels as tokens
from metta_fastagent.runtime.launch import Constants

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
TRITON_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Names of the constant that sets how many rows or elements a program handles.
ROWS = ("ROWS", "CHUNK", "BLOCK", "BLOCK_B")
# Outputs [N, A].
ROW_OUTPUTS = {"full_log_probs", "grad_logits"}


class Launch(NamedTuple):
    """One launch as an operation makes it."""

    kernel: Any
    dtypes: list[torch.dtype]
    numbers: list[float]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def rows_per_program(self) -> int:
        """Rows or elements that a program handles."""
        return next((self.constants[name] for name in ROWS if name in self.constants), 1)


class Case(NamedTuple):
    """One specialisation of a kernel: the launch in `call` whose kernel has this name."""

    name: str
    kernel: str
    call: Callable[[], Any]


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
    # In the longest loop, which is the one over time in an LSTM layer; without loops, in the whole code.
    barriers: int
    # Runs of loads into registers there, separated by barriers, in code order: each may wait for memory.
    load_runs: int
    instructions_per_row: float
    # For 32 rows [A]; 0 for kernels that store none.
    store_sectors: int
    # Almost 0 if Triton had the code in its cache.
    compile_seconds: float


def cases() -> Iterator[Case]:
    """The specialisations that users encounter: float32 at several numbers of actions, other dtypes once."""
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        yield Case(f"clip_weights {dtype}", "clip_weights", partial(_clip, DTYPES[dtype]))
    for num_actions in (5, 9, 21, 32, 33, 64, 128, 1024, 4096):
        yield from _categorical_cases(num_actions, "fp32")
    for dtype in ("bf16", "fp64"):
        yield from _categorical_cases(21, dtype)
    for num_actions, dtype in ((9, "fp32"), (21, "fp32"), (32, "fp32"), (128, "fp32"), (21, "bf16"), (21, "fp64")):
        call = partial(_ppo_loss, num_actions, DTYPES[dtype])
        yield Case(f"ppo_loss forward A={num_actions} {dtype}", "ppo_loss_fwd", call)
        yield Case(f"ppo_loss backward A={num_actions} {dtype}", "ppo_loss_bwd", call)
    for steps, dtype in ((16, "fp32"), (128, "fp32"), (16, "fp64")):
        yield Case(f"advantages T={steps} {dtype}", "advantages", partial(_advantages, steps, DTYPES[dtype]))
    yield Case("action_to_logit_index", "action_to_logit_index", _to_index)
    yield Case("logit_index_to_action", "logit_index_to_action", _to_pair)
    for dtype in ("fp32", "bf16"):
        for kind, kernel in (("forward", "l2_init_loss_fwd"), ("backward", "l2_init_loss_bwd")):
            yield Case(f"l2_init_loss {kind} {dtype}", kernel, partial(_l2, DTYPES[dtype]))
        yield Case(f"tokens_to_grid {dtype}", "tokens_to_grid", partial(_grid, DTYPES[dtype]))
    for size, dtype in ((128, "fp32"), (128, "bf16"), (128, "fp16"), (32, "fp32"), (512, "fp32"), (512, "bf16")):
        yield from _lstm_cases(size, dtype)


def _clip(dtype: torch.dtype) -> None:
    ops.clip_weights_([torch.empty(8, dtype=dtype)], [1.0])


def _categorical_cases(num_actions: int, dtype: str) -> Iterator[Case]:
    suffix = f"A={num_actions} {dtype}"
    evaluate = partial(_evaluate, num_actions, DTYPES[dtype])
    yield Case(f"evaluate_actions forward {suffix}", "evaluate_actions_fwd", evaluate)
    yield Case(f"evaluate_actions backward {suffix}", "evaluate_actions_bwd", evaluate)
    yield Case(f"sample_actions {suffix}", "sample_actions", partial(_sample, num_actions, DTYPES[dtype]))


def _evaluate(num_actions: int, dtype: torch.dtype) -> None:
    logits = torch.empty(8, num_actions, dtype=dtype, requires_grad=True)
    outputs = ops.evaluate_actions(logits, torch.empty(8, 2, dtype=torch.int32), torch.tensor([0, num_actions - 1]))
    torch.autograd.grad(outputs[:2], logits, [torch.empty(8, dtype=dtype)] * 2)


def _ppo_loss(num_actions: int, dtype: torch.dtype) -> None:
    logits = torch.empty(8, num_actions, dtype=dtype, requires_grad=True)
    actions, table = torch.empty(8, 2, dtype=torch.int32), torch.tensor([0, num_actions - 1])
    numbers, valid = [torch.empty(8, dtype=dtype) for _ in range(5)], torch.empty(8, dtype=torch.bool)
    loss, _ = ops.ppo_loss(
        logits, actions, *numbers, table, valid=valid, clip_coef=0.2, vf_clip_coef=0.2, vf_coef=0.5, ent_coef=0.01
    )
    torch.autograd.grad(loss, logits, torch.empty_like(loss))


def _sample(num_actions: int, dtype: torch.dtype) -> None:
    ops.sample_actions(torch.empty(8, num_actions, dtype=dtype), torch.empty(num_actions, 2, dtype=torch.int32))


def _advantages(steps: int, dtype: torch.dtype) -> None:
    numbers, flags = torch.empty(8, steps, dtype=dtype), torch.empty(8, steps, dtype=torch.bool)
    next_value = torch.empty(8, dtype=dtype)
    ops.advantages(numbers, numbers, flags, next_value, numbers, 0.9, 0.8, valid=flags, ratios=numbers)


def _to_index() -> None:
    ops.action_to_logit_index(torch.empty(8, 2, dtype=torch.int32), torch.tensor([0, 3]))


def _to_pair() -> None:
    ops.logit_index_to_action(torch.empty(8, dtype=torch.int64), torch.empty(4, 2, dtype=torch.int32))


def _l2(dtype: torch.dtype) -> None:
    # As many chunks as the last program adds at a time.
    size = tensor_lists.CHUNK * tensor_lists.PARTIALS_BLOCK
    params = [torch.empty(size, dtype=dtype, requires_grad=True)]
    loss = ops.l2_init_loss(params, [torch.empty(size, dtype=dtype)], 0.5)
    torch.autograd.grad(loss, params, torch.empty(()))


def _grid(dtype: torch.dtype) -> None:
    ops.tokens_to_grid(torch.empty(2, 8, 3, dtype=torch.uint8), 25, 11, 11, torch.empty(25), dtype)


def _lstm_cases(size: int, dtype: str) -> Iterator[Case]:
    few, many = lstm.BLOCK_B, lstm.BLOCK_B + 1
    # In float32, many rows change nothing in the backward kernel, but few steps do.
    last = ("backward, few steps,", 1, few) if dtype == "fp32" else ("backward, many rows,", 64, many)
    kinds = (("forward", 64, few), ("forward, many rows,", 64, many), ("step", 1, few), ("backward", 64, few), last)
    for kind, steps, batch in kinds:
        call = partial(_lstm, size, DTYPES[dtype], steps, batch, kind != "step")
        kernel = "lstm_layer_bwd" if "backward" in kind else "lstm_layer_fwd"
        yield Case(f"lstm_layer {kind} H={size} {dtype}", kernel, call)


def _lstm(size: int, dtype: torch.dtype, steps: int, batch: int, with_gradient: bool) -> None:
    shapes = (steps, batch, 4 * size), (4 * size, size), (batch, size), (batch, size)
    inputs = [torch.empty(shape, dtype=dtype, requires_grad=with_gradient) for shape in shapes]
    resets = torch.empty(steps, batch, dtype=torch.bool)
    if not with_gradient:
        # As a rollout does, with two flags a row and the memory in place.
        lstm_step_into(LayerInputs(*inputs, resets), resets, torch.empty(4 * size, dtype=dtype), *inputs[2:])
        return
    outputs = ops.lstm_layer(*inputs, resets)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


def launches(call: Callable[[], Any], platform: str) -> list[Launch]:
    """The launches that a call on CPU tensors would make on a GPU of this platform; none of them runs."""
    found: list[Launch] = []

    def record(
        constants: Constants, kernel: Any, programs: int, tensors: Sequence[Tensor], numbers: Sequence[float]
    ) -> None:
        dtypes = [tensor.dtype for tensor in tensors]
        found.append(Launch(kernel, dtypes, list(numbers), constants.values, constants.options))

    with ExitStack() as stack:
        for module in (conversion, categorical, lstm, ppo, tensor_lists, tokens):
            stack.enter_context(mock.patch.object(module, "launch_with", record))
        # The operations send CPU tensors to their kernels if they think that the interpreter is in use.
        stack.enter_context(mock.patch.object(package_triton, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(lstm, "INTERPRETED", False))
        stack.enter_context(mock.patch.object(lstm, "PLATFORM", platform))
        stack.enter_context(mock.patch.object(layouts, "LANES", 32 if platform == "cuda" else 64))
        stack.enter_context(use_backend("triton"))
        categorical.constants_of.cache_clear()
        call()
    categorical.constants_of.cache_clear()
    return found


def launch_of(case: Case, platform: str) -> Launch:
    """The launch that a case describes."""
    return next(each for each in launches(case.call, platform) if case.kernel in each.kernel.fn.__name__)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel, with every pointer declared 16-byte aligned, as PyTorch's allocator guarantees."""
    names = launch.kernel.arg_names
    types = [f"*{TRITON_NAMES[dtype]}" for dtype in launch.dtypes]
    types += ["fp32" if isinstance(number, float) else "i32" for number in launch.numbers]
    signature = dict(zip(names, types + ["constexpr"] * len(launch.constants), strict=True))
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(len(launch.dtypes))}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def figures(case: Case, target_name: str) -> Figures:
    """Compile one case for one target and read its machine code."""
    target = TARGETS[target_name]
    launch = launch_of(case, target.backend)
    start = time.perf_counter()
    compiled = compile_launch(launch, target)
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
        counts[2] * launch.options["num_warps"] / launch.rows_per_program,
        store_sectors(compiled.asm["ttgir"], launch.constants["A"]) if ROW_OUTPUTS & {*launch.kernel.arg_names} else 0,
        seconds,
    )


def store_sectors(ttgir: str, num_actions: int) -> int:
    """32-byte sectors touched by the stores of 32 rows of an output [N, num_actions], given the lanes' layout."""
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
    # 64 rows, because an AMD wave may store as many at once.
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
    """All opcodes, and those of the longest loop, from a label to the last branch back to it; all if there is none."""
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
