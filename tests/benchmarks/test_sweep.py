"""The sweep of tuning constants, rehearsed in Triton's interpreter; patched constants are restored."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_for_tests import interpreter_in_a_process

from metta_fastagent.runtime import triton as _triton

if _triton.triton is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks import harness, sweep
from metta_fastagent.ops.categorical import kernels as categorical
from metta_fastagent.ops.categorical import layouts
from metta_fastagent.ops.tensor_lists import kernels as tensor_lists

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@interpreter_in_a_process
def test_every_variant_agrees_in_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "benchmarks.sweep", "--device", "cpu", "--tiny", "--out", str(tmp_path / "s.md")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "s.md").read_text().splitlines() if "|" in line]
    for name, experiment in sweep.EXPERIMENTS.items():
        labels = [sweep.SHIPPED, *experiment.variants(), sweep.SHIPPED_AGAIN]
        own = [line for line in lines if line[0] == name]
        assert [line[3] for line in own] == labels * len(experiment.operations)
        assert all(float(line[4].strip("| ")) > 0 for line in own)


@pytest.mark.parametrize(("fault", "code"), [(None, 0), ("differs", 1), ("fails", 1)])
def test_a_variant_that_differs_or_fails_is_not_timed(monkeypatch, capsys, fault, code):
    monkeypatch.setattr(sweep, "use_backend", lambda name: sweep.patched(layouts, {}))
    monkeypatch.setattr(harness.Provider, "backend", "auto")

    def operation(size, device):
        def call():
            if fault == "fails" and layouts.MAX_COLUMNS == 0:
                raise RuntimeError("out of resources:\nshared memory")
            return torch.tensor(1.0 if fault is None else float(layouts.MAX_COLUMNS))

        return harness.Case("made up", lambda name: (lambda: torch.tensor(64.0)) if fault and name == "eager" else call)

    made_up = sweep.Experiment(layouts, {"MAX_COLUMNS": (64, 0)}, [operation], [{"rows": 1}])
    monkeypatch.setattr(sweep, "EXPERIMENTS", {"made up": made_up})
    assert sweep.main(["--device", "cpu", "--tiny", "--only", "made up"]) == code
    last = {"differs": "|  | Disagreement: triton: ", "fails": "|  | RuntimeError: out of resources: shared memory |"}
    lines = [line for line in capsys.readouterr().out.splitlines() if "MAX_COLUMNS 0" in line]
    assert fault is None or last[fault] in lines[0]


def test_sizes_that_have_not_begun_in_time_are_counted(capsys):
    assert sweep.main(["--device", "cpu", "--only", "grid", "--seconds", "-1"]) == 0
    assert "sizes not begun within --seconds: 2" in capsys.readouterr().out


def test_constants_are_patched_and_restored():
    before = tensor_lists.CHUNK, tensor_lists._tables
    with sweep.patched(tensor_lists, {"CHUNK": 512, "CHUNK_WARPS": 2}):
        assert (tensor_lists.CHUNK, tensor_lists.CHUNK_WARPS, tensor_lists._tables) == (512, 2, {})
    with sweep.patched(layouts, {"MAX_COLUMNS": 0}):
        assert not _in_columns()
    assert _in_columns()
    assert before == (tensor_lists.CHUNK, tensor_lists._tables)


def _in_columns():
    constants, _ = categorical.constants_of(9, torch.float32, False, 0)
    return constants.values["PIECE"] == 1


@pytest.mark.parametrize("name", list(sweep.EXPERIMENTS))
def test_the_packages_own_constants_are_among_the_values(name):
    experiment = sweep.EXPERIMENTS[name]
    for constant, values in experiment.constants.items():
        assert getattr(experiment.module, constant) in values


def test_the_tuning_page_names_every_experiment():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "benchmarks" / "TUNING.md").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(rows))) == set(sweep.EXPERIMENTS)
