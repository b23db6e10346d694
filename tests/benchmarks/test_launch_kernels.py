"""The program that sanitizers watch launches every kernel, and names one that it misses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_for_tests import interpreter_in_a_process

from metta_fastagent.runtime import triton as _triton

if _triton.triton is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks import launch_kernels

ROOT = Path(__file__).parents[2]


@interpreter_in_a_process
def test_every_kernel_is_launched_in_the_interpreter():
    command = [sys.executable, "-m", "benchmarks.launch_kernels", "--device", "cpu"]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"launches of {len(launch_kernels.kernels())} kernels on cpu" in done.stdout


def test_a_kernel_that_is_not_launched_is_named(monkeypatch, capsys):
    monkeypatch.setattr(launch_kernels, "CASES", ())
    assert launch_kernels.main(["--device", "cpu"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"kernel not launched: {name}" for name in sorted(launch_kernels.kernels())]
    assert "kernel not launched: _clip_weights_kernel" in errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_is_launched_on_the_gpu():
    assert min(launch_kernels.launch_all(torch.device("cuda")).values()) > 0
