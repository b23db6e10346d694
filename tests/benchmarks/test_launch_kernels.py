"""The program that sanitizers watch: it launches every kernel, and a kernel or operator that it misses is an error."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metta_fastagent import _dispatch, _triton

if _triton.triton is None:
    pytest.skip("needs Triton", allow_module_level=True)

from benchmarks import launch_kernels

ROOT = Path(__file__).parents[2]


def test_every_operator_with_a_kernel_has_a_case():
    assert launch_kernels.uncovered() == set()


def test_an_operator_without_a_case_is_seen(monkeypatch):
    monkeypatch.setitem(_dispatch._operations, "made_up", _dispatch._Kernels(triton=True, native=False))
    assert launch_kernels.uncovered() == {"made_up"}


def test_cases_name_registered_operators_once():
    named = [operator for case in launch_kernels.cases() for operator in case.operators]
    assert len(named) == len(set(named))
    assert set(named) <= set(_dispatch._operations)


def test_every_kernel_is_launched_in_the_interpreter():
    command = [sys.executable, "-m", "benchmarks.launch_kernels", "--device", "cpu"]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"launches of {len(launch_kernels.kernel_names())} kernels on cpu" in done.stdout


def test_a_kernel_that_is_not_launched_is_named(monkeypatch, capsys):
    case = launch_kernels.Case(tuple(_dispatch._operations), lambda device: None)
    monkeypatch.setattr(launch_kernels, "cases", lambda: [case])
    assert launch_kernels.main(["--device", "cpu"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"kernel not launched: {name}" for name in sorted(launch_kernels.kernel_names())]
    assert "kernel not launched: _clip_weights_kernel" in errors


def test_launches_are_noted_and_the_kernels_put_back():
    module = launch_kernels.importlib.import_module("metta_fastagent.ops._clip_weights")
    before = module._clip_weights_kernel
    with launch_kernels.noted_launches() as launched:
        assert module._clip_weights_kernel is not before
        assert module._clip_weights_kernel.fn is before.fn
        # Indexing by a grid is what a launch begins with; nothing runs before the call.
        module._clip_weights_kernel[(1,)]
    assert module._clip_weights_kernel is before
    assert {name for name, count in launched.items() if count} == {"_clip_weights_kernel"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_is_launched_on_the_gpu():
    launched = launch_kernels.launch_all(torch.device("cuda"))
    assert min(launched.values()) > 0
