"""Figures of CUDA: counts from a profiler's events, made up here, and all of them where there is a device."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda, harness

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def event(name, start, end, device=torch.autograd.DeviceType.CPU):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def kernel(name, start=150, end=180):
    return event(name, start, end, torch.autograd.DeviceType.CUDA)


def counted(*inside):
    # The host's range appears among the device's events too; the wait for the device follows the call.
    around = [event(cuda.PROFILED, 0, 100), kernel(cuda.PROFILED, 2, 190), event("cudaDeviceSynchronize", 110, 190)]
    return cuda.count_events([*around, *inside])


LAUNCHES = "cudaLaunchKernel cuLaunchKernelEx hipModuleLaunchKernel cudaLaunchKernelExC_v11060 cudaGraphLaunch_v10000"
WAITS = (
    "cudaStreamSynchronize cudaDeviceSynchronize_v3020 cuEventSynchronize cudaMemcpy cudaMemcpy_v3020 cuMemcpyDtoH_v2"
)
NEITHER = "aten::add cudaMemcpyAsync cudaStreamWaitEvent cudaLaunchHostFunc"


@pytest.mark.parametrize(("names", "launches", "waits"), [(LAUNCHES, 1, 0), (WAITS, 0, 1), (NEITHER, 0, 0)])
def test_api_calls(names, launches, waits):
    for name in names.split():
        assert counted(event(name, 10, 20), kernel("some_kernel")) == cuda.Counts(launches, 1, waits), name


def test_nested_calls_and_calls_outside_of_the_range_do_not_count():
    inside = [event("cudaLaunchKernel", 10, 20), event("cuLaunchKernel", 12, 18), event("cudaLaunchKernel", 30, 40)]
    waits = [event("aten::item", 50, 90), event("cudaStreamSynchronize", 60, 80), event("cuStreamSynchronize", 61, 79)]
    copies = [kernel("Memcpy DtoH"), kernel("Memset")]
    kernels = [kernel("first_kernel"), kernel("second_kernel")]
    assert counted(*inside, *waits, *copies, *kernels) == cuda.Counts(launches=2, kernels=2, host_syncs=1)


def test_what_saw_no_kernel_counts_nothing():
    assert counted() is None
    assert cuda.device_figures(lambda: None, 8, torch.device("cpu"), is_graph=False) == {}


def test_a_graph_is_one_launch_of_many_kernels():
    kernels = [kernel("k", start, start + 5) for start in range(110, 190, 10)]
    assert counted(event("cudaGraphLaunch", 10, 20), *kernels) == cuda.Counts(launches=1, kernels=8, host_syncs=0)


def test_the_profiler_of_this_pytorch_has_what_the_counts_read():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        with torch.profiler.record_function(cuda.PROFILED):
            torch.ones(3).sum()
        torch.ones(3).sum()
    assert cuda.count_events([*record.events(), kernel("made_up_kernel")]) == cuda.Counts(0, 1, 0)


def made_up_figures(monkeypatch, gpu_seconds, counts):
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: 1512 if name.startswith("max") else 1000)
    monkeypatch.setattr(cuda, "profiled_counts", lambda call, device: counts)
    monkeypatch.setattr(cuda, "gpu_seconds", gpu_seconds)
    monkeypatch.setattr(cuda, "copy_gb_per_s", lambda moved_bytes, device: 3000.0)
    return cuda.device_figures(lambda: None, 10_000, torch.device("cuda"), is_graph=False)


def test_figures_and_rates(monkeypatch):
    figures = made_up_figures(monkeypatch, lambda call, device: 1e-5, cuda.Counts(4, 5, 0))
    counts = {"launches": 4, "kernels": 5, "host_syncs": 0, "peak_extra_bytes": 512}
    assert figures == {**counts, "gpu_seconds": 1e-5, "gb_per_s": pytest.approx(1.0), "copy_gb_per_s": 3000.0}


def test_a_call_that_waits_for_the_device_is_not_captured(monkeypatch):
    figures = made_up_figures(monkeypatch, lambda *_: pytest.fail("was captured"), cuda.Counts(4, 4, 1))
    assert "gpu_seconds" not in figures
    assert figures["note"] == "not capturable: it waits for the device"


def test_a_failed_capture_is_noted(monkeypatch):
    def refuse(call, device):
        raise RuntimeError("operation not permitted\nmore")

    figures = made_up_figures(monkeypatch, refuse, None)
    assert figures == {"peak_extra_bytes": 512, "note": "not captured: operation not permitted"}


@pytest.mark.parametrize("waits", [pytest.param(waits, marks=ON_GPU) for waits in (False, True)])
def test_figures_on_the_gpu(waits):
    device = torch.device("cuda")
    x = torch.ones(1 << 20, device=device)
    figures = cuda.device_figures(lambda: (x * 2).sum().item() if waits else x * 2, 8 << 20, device, is_graph=False)
    if waits:
        assert figures["host_syncs"] >= 1 and "gpu_seconds" not in figures
    else:
        assert (figures["launches"], figures["kernels"], figures["host_syncs"]) == (1, 1, 0)
        assert figures["peak_extra_bytes"] == 4 << 20
        assert 0 < figures["gpu_seconds"] < 1 and figures["copy_gb_per_s"] > 0


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ON_GPU) for kind in ("rollout", "update")])
def test_a_step_is_captured_on_the_gpu(kind):
    from benchmarks import bench_train_step

    size = {"rows": 6, "time": 4} if kind == "update" else {"rows": 6, "time": 0}
    call = bench_train_step.make_case(kind, size, torch.device("cuda")).call_of("captured")
    assert harness.Provider("captured", call).seconds(1, cuda.clock_of(torch.device("cuda"))) > 0
