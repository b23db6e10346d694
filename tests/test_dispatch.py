"""Which implementation runs, how it is chosen, and what explain() says about it."""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch

from metta_fastagent import backend, explain, ops, use_backend
from metta_fastagent.runtime import dispatch, native, triton

ACTION, OFFSETS = torch.tensor([[1, 2]]), torch.tensor([0, 1, 3])


def line(start):
    """The rest of the line of the explanation that starts so."""
    (found,) = [each for each in explain().splitlines() if each.startswith(start)]
    return found.removeprefix(start)


def requested():
    return line("requested: ").split()[0]


def run(code, **environment):
    """Run `code` in a fresh interpreter that has these environment variables."""
    inherited = {name: value for name, value in os.environ.items() if name != "METTA_FASTAGENT_BACKEND"}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)


def test_an_import_leaves_the_kernels_of_cuda_to_their_first_use():
    code = "import sys, metta_fastagent; print(*(name for name in sys.modules if name.endswith('.kernels')))"
    loaded = run(code).stdout.split()
    # the plans of weight lists are made on every device; who replaces the kernels' driver looks for the LSTM's
    assert loaded == [f"metta_fastagent.ops.{family}.kernels" for family in ("lstm", "tensor_lists")]


def test_explain_names_versions_devices_and_the_request():
    text = explain()
    assert all(word in text for word in (torch.__version__, platform.python_version(), "METTA_FASTAGENT_BACKEND"))
    assert "use_backend" in line("requested: ")
    assert line("cpu: ").startswith(("eager", "native"))
    assert any(each.startswith("cuda") and ("not available" in each or "triton" in each) for each in text.splitlines())
    assert line("other devices: ").startswith("eager")


def test_explain_names_the_processor_and_how_it_computes():
    processor = line("processor: ")
    assert f"vectors {torch.backends.cpu.get_cpu_capability()}" in processor
    assert f"{torch.get_num_threads()} of {os.cpu_count()} threads" in processor
    assert processor.endswith("subnormal numbers kept")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert line("processor: ").endswith("subnormal numbers flushed to zero")
    finally:
        torch.set_flush_denormal(False)


def test_explain_lists_every_registered_operation():
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    registered = {name for namespace, name in names if namespace == "metta_fastagent"}
    assert set(line("operations: ").split(", ")) == registered
    assert {"clip_weights_", "evaluate_actions_backward", "sample_actions"} <= registered


def test_backend_of_the_cpu():
    with use_backend("auto"):
        assert backend("cpu") == backend(torch.device("cpu")) == ("native" if native.load() else "eager")
    with use_backend("eager"):
        assert backend("cpu") == "eager"


def test_backend_of_another_device():
    for name in ("auto", "native"):
        with use_backend(name):
            assert backend("meta") == "eager"
    with pytest.raises(RuntimeError, match="nowhere"):
        backend("nowhere")


def test_native_where_it_is_not_built(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "not built: a reason")
    with use_backend("auto"):
        assert backend("cpu") == "eager"
        assert line("cpu: ").startswith("eager; native operators not built: a reason")
    with use_backend("native"):
        assert line("cpu: ").startswith("an error, because backend native was requested")
        with pytest.raises(RuntimeError, match="backend 'native' was requested and does not work: not built: a reason"):
            ops.action_to_logit_index(ACTION, OFFSETS)


@use_backend("auto")
def test_triton_missing_is_one_warning_and_eager_operations(monkeypatch):
    monkeypatch.setattr(triton, "import_error", ImportError("No module named 'triton'"))
    monkeypatch.setattr(triton, "_works", {})
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"Triton does not work on cuda:0.*No module named 'triton'") as warned:
        assert [backend(device), backend(device)] == ["eager", "eager"]
    assert len(warned) == 1
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was requested.*cuda:0"):
        backend(device)
    with use_backend("eager"):
        assert backend(device) == "eager"


@pytest.mark.parametrize("name", ["auto", "triton", "eager"])
def test_operations_run_with_each_backend(name):
    with use_backend(name):
        assert ops.action_to_logit_index(ACTION, OFFSETS).tolist() == [4]


def test_use_backend_nests_and_restores():
    before = requested()
    with use_backend("eager"):
        with use_backend("auto"):
            assert requested() == "auto"
        assert requested() == "eager"
        with pytest.raises(KeyError, match="inside"), use_backend("auto"):
            raise KeyError("inside")
        assert requested() == "eager"
    assert requested() == before


def test_use_backend_as_decorator():
    @use_backend("eager")
    def inside():
        return requested()

    before = requested()
    assert [inside(), inside()] == ["eager", "eager"]
    assert requested() == before


@pytest.mark.parametrize("name", ["cuda", "EAGER", "", None, 1, ["eager"]], ids=repr)
def test_a_wrong_backend_is_refused_and_changes_nothing(name):
    before = requested()
    with pytest.raises(ValueError) as caught, use_backend(name):
        pass
    assert str(caught.value) == f"name: got {name!r}, expected one of auto, triton, native, eager"
    assert requested() == before


def test_use_backend_is_right_if_blocks_overlap_in_threads():
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with use_backend("eager"):
            inside.set()
            leave.wait(30)
            seen.append(requested())
        seen.append(requested())

    before = requested()
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    with use_backend("triton"):
        leave.set()
        thread.join(30)
        assert requested() == "triton"
    assert (requested(), seen) == (before, ["eager", before])


def test_a_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    used = []
    logits = torch.randn(3, 4, requires_grad=True)
    with use_backend("eager"):
        log_prob, _, _ = ops.evaluate_actions(logits, torch.tensor([0, 1, 2]))
    monkeypatch.setattr(dispatch, "uses_native", lambda device: used.append(requested()) or False)
    with use_backend("auto"):
        log_prob.sum().backward()
    assert used == ["eager"]


def test_the_environment_variable_is_read_at_import():
    done = run("import metta_fastagent; print(metta_fastagent.explain())", METTA_FASTAGENT_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    assert "requested: eager" in done.stdout


def test_a_wrong_environment_variable_is_refused_at_import():
    done = run("import metta_fastagent", METTA_FASTAGENT_BACKEND="fast")
    assert done.returncode != 0
    assert "ValueError: METTA_FASTAGENT_BACKEND: got 'fast', expected one of auto, triton, native, eager" in done.stderr


def test_the_package_works_without_triton_and_without_the_environment_variable():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from metta_fastagent import explain, ops;"
        "print(ops.sample_actions(torch.zeros(2, 3))[0].shape, explain())"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2])" in done.stdout
    assert "no Triton" in done.stdout and "requested: auto" in done.stdout
