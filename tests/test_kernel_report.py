"""Limits on the kernels' machine code, compiled for GPUs that need not be there."""

import json

import pytest

from metta_fastagent.runtime import triton as _triton

if _triton.triton is None or _triton.INTERPRETED:
    pytest.skip("needs Triton, and its compiler in place of its interpreter", allow_module_level=True)

from benchmarks import kernel_report

CASES = {case.name: case for case in kernel_report.cases()}
# Registers a kernel may use at most: 65536 in an SM over these leave at least 4 blocks of 128 threads resident, 3 if
# numbers are float64.
MAX_REGISTERS, MAX_REGISTERS_FP64 = 128, 168
# Name, most machine instructions a row (or element) on sm_90, least width of the widest load and store in bits.
LIMITS = [
    ("advantages T=16 fp32", 66.0, 32, 32),
    ("advantages T=128 fp32", 660.0, 32, 32),
    ("advantages T=16 fp64", 98.0, 64, 64),
    ("clip_weights fp32", 0.5, 128, 128),
    ("clip_weights bf16", 0.5, 128, 128),
    ("evaluate_actions forward A=9 fp32", 20.0, 32, 32),
    ("evaluate_actions backward A=9 fp32", 20.0, 32, 32),
    ("sample_actions A=9 fp32", 20.0, 32, 32),
    ("evaluate_actions forward A=33 fp32", 82.0, 32, 32),
    ("sample_actions A=33 fp32", 92.0, 32, 32),
    ("evaluate_actions forward A=128 fp32", 180.0, 128, 128),
    ("evaluate_actions backward A=128 fp32", 160.0, 128, 128),
    ("sample_actions A=128 fp32", 240.0, 128, 128),
    ("ppo_loss forward A=9 fp32", 42.0, 32, 32),
    ("ppo_loss backward A=9 fp32", 20.0, 32, 32),
    ("ppo_loss forward A=21 fp64", 86.0, 64, 64),
    ("ppo_loss forward A=128 fp32", 360.0, 128, 32),
    ("ppo_loss backward A=128 fp32", 160.0, 128, 128),
    ("action_to_logit_index", 5.0, 32, 64),
    ("logit_index_to_action", 5.0, 32, 32),
    ("l2_init_loss forward fp32", 1.1, 128, 32),
    ("l2_init_loss backward fp32", 0.6, 128, 128),
    ("l2_init_loss backward bf16", 0.7, 128, 128),
    ("tokens_to_grid fp32", 300.0, 32, 128),
    ("lstm_layer forward H=128 fp32", 660.0, 128, 128),
    ("lstm_layer forward, many rows, H=128 fp32", 650.0, 128, 128),
    ("lstm_layer step H=128 fp32", 520.0, 128, 128),
    ("lstm_layer backward H=128 fp32", 640.0, 128, 128),
    ("lstm_layer backward, few steps, H=128 fp32", 580.0, 128, 128),
]
ELSEWHERE = [
    *[name for name in CASES if name.startswith(("clip_weights", "l2_init_loss"))],
    *[name for name in CASES if name.startswith("advantages")],
    "evaluate_actions forward A=9 fp32",
    *("ppo_loss forward A=21 fp32", "ppo_loss forward A=32 fp32", "ppo_loss forward A=128 fp32"),
    "ppo_loss backward A=128 fp32",
    "sample_actions A=128 fp32",
    "tokens_to_grid fp32",
]


# Kernels of few actions: most registers, 32-byte sectors that the stores of 32 rows touch, and instructions a row.
FEW_ACTIONS = {9: (72, 56, 18), 21: (MAX_REGISTERS, 120, 34), 32: (96, 128, 51)}
# Triton 3.5 keeps an address for each row of a tile: most registers, and instructions a row beside FEW_ACTIONS.
ADDRESSES = (168, 4) if kernel_report.triton.__version__ < "3.6" else (0, 0)


# A batch has fewer row blocks than a large GPU has multiprocessors: one program may fill one.
LSTM_REGISTERS = {"sm_80": 232, "sm_90": 232, "sm_100": 232, "gfx942": 256}
# Bytes that the smallest GPU of the kind gives one program: 99 KB (sm_86, sm_89, sm_120), 64 KB on AMD.
SHARED_BYTES = {"sm_80": 101376, "sm_90": 101376, "sm_100": 101376, "gfx942": 65536}


@pytest.fixture(autouse=True)
def fp_fusion(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize(("name", "instructions", "load_bits", "store_bits"), LIMITS, ids=[row[0] for row in LIMITS])
def test_machine_code_for_sm_90(name, instructions, load_bits, store_bits):
    figures = kernel_report.figures(CASES[name], "sm_90")
    assert figures.spills == 0
    most = MAX_REGISTERS_FP64 if name.endswith("fp64") else MAX_REGISTERS
    assert figures.registers <= (LSTM_REGISTERS["sm_90"] if name.startswith("lstm_layer") else most)
    assert figures.instructions_per_row <= instructions
    assert figures.load_bits >= load_bits
    assert figures.store_bits >= store_bits


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_machine_code_for_other_targets(name, target):
    figures = kernel_report.figures(CASES[name], target)
    assert figures.spills == 0
    assert figures.registers <= MAX_REGISTERS
    if name.startswith(("clip_weights", "l2_init_loss backward")):
        assert figures.load_bits == figures.store_bits == 128


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("actions", FEW_ACTIONS)
@pytest.mark.parametrize(
    "kernel", ["evaluate_actions forward", "evaluate_actions backward", "ppo_loss backward", "sample_actions"]
)
def test_rows_of_few_actions_are_stored_by_neighbouring_lanes(kernel, actions, target):
    registers, sectors, instructions = FEW_ACTIONS[actions]
    figures = kernel_report.figures(CASES[f"{kernel} A={actions} fp32"], target)
    assert figures.spills == 0
    # AMD's lanes have twice as many registers.
    assert figures.registers <= (2 * registers if target == "gfx942" else max(registers, ADDRESSES[0]))
    assert figures.store_sectors <= sectors
    assert figures.instructions_per_row <= instructions + ADDRESSES[1]
    # At A = 32 NVIDIA's lanes move 128 bits each, through less shared memory, and reductions cross lanes.
    assert figures.barriers <= (15 if actions == 32 else 3)


def test_sectors_of_a_store():
    store = "    tt.store %1, %2, %3 : tensor<128x16x!tt.ptr<f32>, #blocked> loc(#loc)"
    layout = "#blocked = #ttg.blocked<{{sizePerThread = [1, 1], threadsPerWarp = [{}], warpsPerCTA = [4, 1]}}>\n"
    # Rows of 64 bytes: two sectors each, or a lane for each row, which touches one sector for each of its 16 elements.
    assert kernel_report.store_sectors(layout.format("2, 16") + store, 16) == 64
    assert kernel_report.store_sectors(layout.format("32, 1") + store, 16) == 512


@pytest.mark.parametrize("target", list(LSTM_REGISTERS))
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("lstm_layer")])
def test_lstm_layer_neither_spills_nor_waits_for_each_load(name, target):
    figures = kernel_report.figures(CASES[name], target)
    assert figures.spills == 0
    assert figures.registers <= LSTM_REGISTERS[target]
    assert figures.shared_bytes <= SHARED_BYTES[target]
    if target != "gfx942":
        # All loads of a step are under way together; in the backward pass all but those of the cell's gradient.
        assert figures.load_runs <= (2 if "backward" in name else 1)
        # Two for each block of a product and one for each step; the rest change a layout. Triton 3.8 needs 13 on sm_80.
        assert figures.barriers <= 13


def test_barriers_and_loads_are_those_of_the_longest_loop():
    code = [
        ".L_x_0:",
        "BAR.SYNC 0x0",
        ".L_x_1:",
        "LDG.E R0",
        "BAR.SYNC 0x0",
        "LDG.E R1",
        "@P0 BRA `(.L_x_1)",
        "LDG.E R2",
    ]
    lines = [line if line.startswith(".") else f"        /*0{at}0*/   {line} ;" for at, line in enumerate(code)]
    pattern = r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)"
    opcodes, loop = kernel_report._opcodes(pattern, "\n".join(lines))
    assert opcodes == ["BAR.SYNC", "LDG.E", "BAR.SYNC", "LDG.E", "BRA", "LDG.E"]
    assert kernel_report._runs(loop, ("BAR.SYNC",), ("LDG.",)) == (1, 2)
    assert kernel_report._opcodes(pattern, lines[1])[1] == ["BAR.SYNC"]


def test_a_kernel_over_its_limit_is_seen(monkeypatch):
    monkeypatch.setattr(kernel_report.tensor_lists, "CHUNK_WARPS", 1)
    assert kernel_report.figures(CASES["clip_weights fp32"], "sm_90").registers > MAX_REGISTERS


def test_the_report_is_printed_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernel_report, "cases", lambda: iter([CASES["action_to_logit_index"]]))
    monkeypatch.setattr("sys.argv", ["kernel_report", "--targets", "sm_90", "--json", str(tmp_path / "kernels.json")])
    kernel_report.main()
    assert "action_to_logit_index" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert row["target"] == "sm_90"
    assert row["registers"] > 0
