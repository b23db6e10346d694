import os
import platform
import subprocess
import sys

import pytest
import torch

from metta_fastagent import _native, _triton, backend, explain, use_backend
from metta_fastagent.ops import action_to_logit_index


def requested():
    """The word after "requested: " in the explanation."""
    return next(line.split()[1] for line in explain().splitlines() if line.startswith("requested: "))


def run(code, **environment):
    """Run `code` in a fresh interpreter that has these environment variables."""
    inherited = {name: value for name, value in os.environ.items() if name != "METTA_FASTAGENT_BACKEND"}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=False
    )


def test_explain_names_versions_devices_and_the_request():
    text = explain()
    assert torch.__version__ in text
    assert platform.python_version() in text
    lines = text.splitlines()
    assert any(line.startswith(("cpu: eager", "cpu: native")) for line in lines)
    assert any(line.startswith("cuda") and ("not available" in line or "triton" in line) for line in lines)
    assert any(line.startswith("other devices: eager") for line in lines)
    assert "METTA_FASTAGENT_BACKEND" in text
    assert "use_backend" in text


def test_explain_names_the_processor_and_how_it_computes():
    def line():
        return next(line for line in explain().splitlines() if line.startswith("processor: "))

    assert f"vectors {torch.backends.cpu.get_cpu_capability()}" in line()
    assert f"{torch.get_num_threads()} of {os.cpu_count()} threads" in line()
    assert line().endswith("subnormal numbers kept")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert line().endswith("subnormal numbers flushed to zero")
    finally:
        torch.set_flush_denormal(False)


def test_explain_lists_every_registered_operation():
    registered = {
        name.removeprefix("metta_fastagent::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("metta_fastagent::")
    }
    (line,) = [line for line in explain().splitlines() if line.startswith("operations: ")]
    assert set(line.removeprefix("operations: ").split(", ")) == registered
    assert {"clip_weights_", "evaluate_actions_backward", "sample_actions"} <= registered


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=str)
def test_backend_of_the_cpu(device):
    with use_backend("auto"):
        assert backend(device) == ("native" if _native.load() else "eager")
    with use_backend("eager"):
        assert backend(device) == "eager"


def test_backend_of_a_device_without_kernels():
    for name in ("auto", "native"):
        with use_backend(name):
            assert backend("meta") == "eager"


def test_native_where_it_is_not_built(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "not built: a reason")
    with use_backend("auto"):
        assert backend("cpu") == "eager"
        assert "cpu: eager; native operators not built: a reason" in explain()
    with use_backend("native"):
        assert "cpu: an error, because backend native was requested" in explain()
        with pytest.raises(RuntimeError, match="backend 'native' was requested and does not work: not built: a reason"):
            action_to_logit_index(torch.tensor([[1, 2]]), torch.tensor([0, 1, 3]))


def test_backend_refuses_what_is_no_device():
    with pytest.raises(RuntimeError, match="nowhere"):
        backend("nowhere")


def test_use_backend_nests_and_restores():
    before = requested()
    with use_backend("eager"):
        assert requested() == "eager"
        with use_backend("auto"):
            assert requested() == "auto"
        assert requested() == "eager"
    assert requested() == before


def test_use_backend_restores_after_an_exception():
    before = requested()
    other = "eager" if before == "auto" else "auto"
    with pytest.raises(KeyError, match="inside"), use_backend(other):
        raise KeyError("inside")
    assert requested() == before


@pytest.mark.parametrize("name", ["auto", "triton", "eager"])
def test_operations_run_with_each_backend(name):
    with use_backend(name):
        assert action_to_logit_index(torch.tensor([[1, 2]]), torch.tensor([0, 1, 3])).tolist() == [4]


@pytest.mark.parametrize("name", ["cuda", "EAGER", "", None, 1, ["eager"]], ids=repr)
def test_a_wrong_backend_is_refused_and_changes_nothing(name):
    before = requested()
    with pytest.raises(ValueError) as caught, use_backend(name):
        pass
    assert str(caught.value) == f"name: got {name!r}, expected one of auto, triton, native, eager"
    assert requested() == before


def test_use_backend_as_decorator():
    @use_backend("eager")
    def inside():
        return requested()

    before = requested()
    assert [inside(), inside()] == ["eager", "eager"]
    assert requested() == before


def test_the_environment_variable_is_read_at_import():
    code = "import metta_fastagent; print(metta_fastagent.explain())"
    done = run(code, METTA_FASTAGENT_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    assert "requested: eager" in done.stdout
    assert "requested: auto" in run(code).stdout


def test_a_wrong_environment_variable_is_refused_at_import():
    done = run("import metta_fastagent", METTA_FASTAGENT_BACKEND="fast")
    assert done.returncode != 0
    assert "ValueError: METTA_FASTAGENT_BACKEND: got 'fast', expected one of auto, triton, native, eager" in done.stderr


@use_backend("auto")
def test_triton_missing_is_one_warning_and_eager_operations(monkeypatch):
    monkeypatch.setattr(_triton, "import_error", ImportError("No module named 'triton'"))
    monkeypatch.setattr(_triton, "_works", {})
    device = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match=r"Triton does not work on cuda:0.*No module named 'triton'") as warned:
        assert [backend(device), backend(device)] == ["eager", "eager"]
    assert len(warned) == 1
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was requested.*cuda:0"):
        backend(device)
    with use_backend("eager"):
        assert backend(device) == "eager"


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from metta_fastagent import explain, ops;"
        "print(ops.sample_actions(torch.zeros(2, 3))[0].shape, explain())"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2])" in done.stdout
    assert "no Triton" in done.stdout
