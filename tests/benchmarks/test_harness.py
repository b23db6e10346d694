"""The harness: what disagrees is refused untimed, rounds are interleaved, a slowdown is seen by pytest-benchmark."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import metta_fastagent
from benchmarks import harness
from benchmarks.harness import Disagreement, Options, Provider, Shape, Skipped, Suite
from metta_fastagent import ops

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = Options(CPU, quick=True, compiled=False)
SHAPE = Shape("quick", {"rows": 3})


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self):
        self.calls += 1
        return self.function()


def suite_of(*providers, count_bytes=None):
    return Suite("op", tuple(p.name for p in providers), [SHAPE], lambda *_: list(providers), count_bytes)


def ones():
    return torch.ones(3)


def test_a_provider_that_computes_something_else_is_refused_before_it_is_timed():
    right, wrong = Counted(ones), Counted(lambda: torch.tensor([1.0, 1.5, 1.0]))
    providers = [Provider("upstream", ones), Provider("right", right), Provider("wrong", wrong)]
    measured = harness.measure(suite_of(*providers), SHAPE, QUICK)
    assert wrong.calls == 1
    assert right.calls > 1
    assert measured.timings.keys() == {"upstream", "right"}
    assert measured.refused.keys() == {"wrong"}
    message = measured.refused["wrong"]
    assert message.startswith("wrong computes something else than upstream: ")
    assert "33.3%" in message
    assert "0.5" in message


def test_nothing_is_timed_when_no_provider_agrees():
    reference = Counted(ones)
    providers = [Provider("upstream", reference), Provider("wrong", lambda: torch.zeros(3))]
    with pytest.raises(Disagreement, match="wrong computes something else than upstream"):
        harness.measure(suite_of(*providers), SHAPE, QUICK)
    assert reference.calls == 1


def test_what_works_in_place_starts_from_the_same_inputs():
    memory = torch.zeros(3)
    shared = {"compared": lambda _: memory, "reset": memory.zero_}
    providers = [
        Provider("upstream", lambda: memory.add_(1), **shared),
        Provider("twice", lambda: memory.add_(2), **shared),
    ]
    assert harness.disagreements([providers[0], providers[0]._replace(name="same")], 0, 0) == {}
    assert harness.disagreements(providers, 0, 0).keys() == {"twice"}


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.tensor([1.0, math.nan])),
        (torch.ones(2), [1.0, 1.0]),
        (torch.ones(2), torch.ones(2) + 0.1),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
        ({"a": 1.0}, {"b": 1.0}),
        ({"a": 1.0}, {"a": 1.1}),
        (True, False),
    ],
)
def test_differences(expected, actual):
    assert harness.difference(expected, actual, 1e-3, 1e-3) is not None
    assert harness.difference(expected, expected, 0, 0) is None


def test_rounding_is_no_difference():
    assert harness.difference({"a": [torch.ones(2)]}, {"a": (torch.ones(2) + 1e-4,)}, 1e-3, 1e-3) is None
    assert harness.difference(torch.tensor([math.nan]), torch.tensor([math.nan]), 0, 0) is None


def test_rounds_are_interleaved_in_random_order(monkeypatch):
    monkeypatch.setattr(harness, "MIN_ROUND_SECONDS", 0.0)
    calls = []
    providers = [Provider(name, lambda name=name: calls.append(name)) for name in "abc"]
    timings = harness.interleaved(providers, 0.0, CPU)
    rounds = len(timings["a"].seconds)
    assert rounds == harness.MIN_ROUNDS
    played = calls[-3 * rounds :]
    orders = ["".join(played[start : start + 3]) for start in range(0, len(played), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1


def test_a_slow_provider_has_a_large_ratio():
    providers = [Provider("upstream", lambda: time.sleep(0.002)), Provider("slow", lambda: time.sleep(0.03))]
    measured = harness.measure(suite_of(*providers, count_bytes=lambda size: 1000), SHAPE, QUICK)
    slow = harness.summary(measured, "slow")
    assert slow["ratio"] > 2
    assert slow["ratio_q1"] <= slow["ratio"] <= slow["ratio_q3"]
    assert harness.summary(measured, "upstream")["ratio"] == 1
    assert slow["gb_per_s"] == pytest.approx(1000 / 1e9 / sorted(measured.timings["slow"].seconds)[2], rel=5)
    assert harness.summary(measured, harness.COPY)["copy_gb_per_s"] > 0


def test_the_package_runs_on_each_of_its_implementations():
    seen = []
    made = harness.package_providers(CPU, lambda: seen.append(metta_fastagent.backend(CPU)))
    for provider in made:
        if isinstance(provider, Provider):
            with provider.context():
                provider.call()
    skipped = {entry.name for entry in made if isinstance(entry, Skipped)}
    assert seen[0] == "eager"
    assert len(seen) + len(skipped) == len(made) == 3
    assert skipped == {"triton", "native"} - {metta_fastagent.backend(CPU)}


def test_shapes_by_selection():
    shapes = [Shape(level, {"rows": 1}) for level in harness.LEVELS]
    suite = Suite("op", (), shapes, lambda *_: [])

    def levels(device, quick):
        return [shape.level for shape in harness.selected_shapes(suite, Options(torch.device(device), quick, False))]

    assert levels("cpu", True) == levels("cuda", True) == ["quick"]
    assert levels("cpu", False) == ["quick", "full"]
    assert levels("cuda", False) == ["quick", "full", "gpu"]


def event(name, start, end, device=torch.autograd.DeviceType.CPU):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def kernel(name, start, end):
    return event(name, start, end, torch.autograd.DeviceType.CUDA)


def profiled(name, start, call_end, wait_end, *inside):
    return [
        event(harness.FINISHED + name, start, wait_end),
        event(harness.CALLED + name, start + 1, call_end),
        kernel(harness.CALLED + name, start + 2, call_end),
        event("cudaDeviceSynchronize", call_end + 1, wait_end - 1),
        *inside,
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[
            (name, (1, 0))
            for name in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "hipModuleLaunchKernel")
        ],
        *[(name, (1, 0)) for name in ("cudaLaunchKernelExC_v11060", "cudaGraphLaunch", "cudaGraphLaunch_v10000")],
        *[(name, (0, 1)) for name in ("cudaStreamSynchronize", "cudaDeviceSynchronize_v3020", "cuStreamSynchronize")],
        *[(name, (0, 1)) for name in ("cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy_v3020", "cuMemcpyDtoH_v2")],
        *[(name, (0, 0)) for name in ("aten::add", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaFuncGetAttributes")],
        *[(name, (0, 0)) for name in ("cudaStreamWaitEvent", "cudaLaunchHostFunc", "vectorized_kernel")],
    ],
)
def test_counting_of_api_calls(name, expected):
    events = profiled("ours", 0, 100, 200, event(name, 10, 20), kernel("some_kernel", 60, 70))
    assert harness.count_calls(events) == {"ours": harness.Counts(expected[0], 1, expected[1])}


def test_calls_inside_of_calls_and_outside_of_the_range_do_not_count():
    inside = [
        event("cudaLaunchKernel", 10, 20),
        event("cuLaunchKernel", 12, 18),
        event("cudaLaunchKernel", 30, 40),
        event("aten::item", 50, 90),
        event("cudaStreamSynchronize", 60, 80),
        event("cuStreamSynchronize", 61, 79),
        kernel("Memcpy DtoH", 55, 56),
        kernel("ours_kernel", 21, 22),
        # Starts when the call has returned already.
        kernel("ours_kernel", 150, 180),
    ]
    warm_up = [event("cudaLaunchKernel", -5000, -4990), kernel("ours_kernel", -4980, -4900)]
    other = profiled("other", 10_000, 10_100, 10_200, event("cuLaunchKernelEx", 10_010, 10_020))
    other.append(kernel("other_kernel", 10_150, 10_160))
    assert harness.count_calls([*warm_up, *profiled("ours", 0, 100, 200, *inside), *other]) == {
        "ours": harness.Counts(launches=2, kernels=2, host_syncs=1),
        "other": harness.Counts(launches=1, kernels=1, host_syncs=0),
    }


def test_a_graph_is_one_launch_of_many_kernels():
    kernels = [kernel("k", start, start + 5) for start in range(110, 190, 10)]
    counted = harness.count_calls(profiled("captured", 0, 100, 200, event("cudaGraphLaunch", 10, 20), *kernels))
    assert counted == {"captured": harness.Counts(launches=1, kernels=8, host_syncs=0)}


def test_a_profiler_that_does_not_see_the_device_counts_nothing():
    events = [each for each in profiled("ours", 0, 100, 200) if each.device_type == torch.autograd.DeviceType.CPU]
    assert harness.count_calls(events) == {}


def test_the_profiler_of_this_pytorch_has_what_the_counts_read():
    profile, section = torch.profiler.profile, torch.profiler.record_function
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record, section(harness.FINISHED + "op"):
        with section(harness.CALLED + "op"):
            torch.ones(3).sum()
        torch.ones(3).sum()
    events = [*record.events(), kernel("made_up_kernel", *span_of(record.events(), harness.FINISHED + "op"))]
    assert harness.count_calls(events) == {"op": harness.Counts(0, 1, 0)}


def span_of(events, name):
    (found,) = [event.time_range for event in events if event.name == name]
    return found.start, found.end


@pytest.mark.parametrize(("seconds", "calls"), [(2.5e-6, 50), (1e-4, 5), (4.9e-4, 2), (1e-3, 1), (2.0, 1)])
def test_short_calls_are_captured_often(seconds, calls):
    assert harness.calls_in_graph(seconds) == calls


BENCH = """
import os, time, torch
from benchmarks.harness import Provider, Shape, Suite

def providers(size, device, compiled):
    def slow():
        time.sleep(float(os.environ["SLEEP"]))
        return torch.ones(int(os.environ["ONES"]))
    return [
        Provider("upstream", lambda: torch.ones(2)),
        Provider("same", lambda: torch.ones(2)),
        Provider("ours", slow),
    ]

SUITES = [Suite("op", ("upstream", "same", "ours"), [Shape("quick", {"rows": 1})], providers)]

def test_providers(case, run_case):
    run_case(case)
"""


@pytest.fixture
def run_bench(tmp_path):
    (tmp_path / "bench_op.py").write_text(BENCH)

    def run(*arguments, sleep, ones=2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLEEP": str(sleep), "ONES": str(ones)}
        command = [sys.executable, "-m", "pytest", "-p", "no:importnb", "-p", "benchmarks.conftest", "-p", "no:xdist"]
        command += ["bench_op.py", "--quick", "--device=cpu", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return SimpleNamespace(code=done.returncode, text=done.stdout + done.stderr)

    return run


def test_a_slowdown_fails_the_comparison_of_two_runs(run_bench):
    first = run_bench("--benchmark-save=before", sleep=0.002)
    assert first.code == 0, first.text
    # A busy machine may slow a run down too, but not tenfold.
    compare = ("-k", "ours", "--benchmark-compare", "--benchmark-compare-fail=median:900%")
    unchanged = run_bench(*compare, sleep=0.002)
    assert unchanged.code == 0, unchanged.text
    slower = run_bench(*compare, sleep=0.1)
    assert slower.code != 0
    assert "Performance has regressed" in slower.text
    assert "ours" in slower.text


def test_a_wrong_provider_fails_its_benchmark_and_no_other(run_bench):
    done = run_bench(sleep=0.0, ones=3)
    assert done.code == 1
    assert "ours computes something else than upstream" in done.text
    assert "1 failed, 2 passed" in done.text


def figures_of(monkeypatch, gpu_seconds, **counts):
    """device_figures of one provider on a made-up CUDA device."""
    counted = {"op": harness.Counts(**{"launches": 4, "kernels": 4, "host_syncs": 0, **counts})}
    monkeypatch.setattr(harness, "_api_calls", lambda providers, device: counted)
    monkeypatch.setattr(harness, "_peak_extra_bytes", lambda call, device: 512)
    monkeypatch.setattr(harness, "gpu_seconds", gpu_seconds)
    return harness.device_figures([Provider("op", ones)], torch.device("cuda"))["op"]


def test_what_waits_for_the_device_is_not_captured(monkeypatch):
    figures = figures_of(monkeypatch, lambda *_: pytest.fail("was captured"), host_syncs=1)
    assert figures[:5] == (None, 4, 4, 1, 512)
    assert "waits for the device" in figures.note


def test_a_failed_capture_is_told(monkeypatch):
    def refuse(provider, device):
        raise RuntimeError("operation not permitted\nmore")

    figures = figures_of(monkeypatch, refuse)
    assert figures.gpu_seconds is None
    assert figures.launches == 4
    assert figures.note == "not captured: RuntimeError: operation not permitted"


def test_a_provider_that_the_profiler_missed_is_timed_still(monkeypatch):
    monkeypatch.setattr(harness, "_api_calls", lambda providers, device: {})
    monkeypatch.setattr(harness, "_peak_extra_bytes", lambda call, device: 512)
    monkeypatch.setattr(harness, "gpu_seconds", lambda *_: 1e-3)
    figures = harness.device_figures([Provider("op", ones)], torch.device("cuda"))["op"]
    assert figures == harness.DeviceFigures(1e-3, None, None, None, 512)


def test_the_cpu_has_no_device_figures():
    assert harness.device_figures([Provider("upstream", ones)], CPU) == {"upstream": harness.DeviceFigures()}


def test_a_provider_that_fails_is_refused_and_the_others_are_timed():
    def fail():
        raise RuntimeError("no kernel image\nmore")

    providers = [Provider("upstream", ones), Provider("fails", fail), Provider("right", ones)]
    measured = harness.measure(suite_of(*providers), SHAPE, QUICK)
    assert measured.refused == {"fails": "fails fails: RuntimeError: no kernel image"}
    assert measured.timings.keys() == {"upstream", "right"}


class Counter:
    """A step with a state: it adds the input to what it has added up."""

    def __init__(self, inputs, wrong_from=99):
        self.inputs, self.wrong_from, self.total, self.calls = inputs, wrong_from, torch.zeros(2), 0

    def __call__(self):
        self.calls += 1
        self.total += self.inputs + (self.calls >= self.wrong_from)
        return self.total


@pytest.mark.parametrize("wrong_from", [99, 4, 5, 6])
def test_replays_are_compared_with_calls_of_a_twin(wrong_from):
    inputs = torch.ones(2)
    step, twin = Counter(inputs, wrong_from), Counter(inputs)
    for _ in range(harness.WARM_UP_CALLS):
        step()
    text = harness.replay_difference(step, twin, lambda: inputs.mul_(2), lambda result: result, (0, 0))
    assert (text is None) is (wrong_from > harness.WARM_UP_CALLS + harness.COMPARED_REPLAYS)
    assert text is None or f"replay {wrong_from - harness.WARM_UP_CALLS}" in text


def captured_from(monkeypatch, replayed, device="cuda"):
    """captured_provider of a twin that returns ones, whose graph was captured as `replayed` says."""
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(harness, "capture", lambda step, device: (graph, replayed()))
    parts = harness.Capturable(ones, ones, lambda: None, lambda: None, lambda result: result)
    return harness.captured_provider("captured", lambda: parts, (0, 0), torch.device(device))


def test_a_captured_step_that_agrees_is_a_provider(monkeypatch):
    provider = captured_from(monkeypatch, ones)
    assert isinstance(provider, Provider)
    assert provider.is_graph
    assert torch.equal(provider.call(), ones())


def test_a_captured_step_that_differs_is_refused_untimed(monkeypatch):
    entry = captured_from(monkeypatch, lambda: torch.zeros(3))
    assert isinstance(entry, harness.Refused)
    assert "replay 1" in entry.reason
    suite = Suite("op", ("upstream", "same", "captured"), [SHAPE], lambda *_: [*same, entry])
    same = [Provider("upstream", ones), Provider("same", ones)]
    measured = harness.measure(suite, SHAPE, QUICK)
    assert measured.refused == {"captured": entry.reason}
    assert measured.timings.keys() == {"upstream", "same"}


def test_a_step_that_cannot_be_captured_is_skipped_with_its_reason(monkeypatch):
    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    entry = captured_from(monkeypatch, fail)
    assert entry == Skipped("captured", "not captured: RuntimeError: operation not permitted when stream is capturing")
    assert captured_from(monkeypatch, ones, "cpu") == Skipped("captured", "cpu: CUDA graphs need a CUDA device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_figures():
    cuda = torch.device("cuda")
    x = torch.ones(1 << 20, device=cuda)
    providers = [Provider("doubled", lambda: x * 2), Provider("read", lambda: (x * 2).sum().item())]
    doubled, read = harness.device_figures(providers, cuda).values()
    assert doubled.gpu_seconds is not None
    assert 0 < doubled.gpu_seconds < 1
    assert doubled[1:5] == (1, 1, 0, 4 << 20)
    assert read.host_syncs is not None
    assert read.host_syncs >= 1
    assert read.gpu_seconds is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_figures_of_the_package():
    cuda = torch.device("cuda")
    weights = [torch.randn(n, device=cuda) for n in (10, 5000, 70000)]
    starts = [torch.zeros_like(weight) for weight in weights]
    providers = [
        Provider("clip", lambda: ops.clip_weights_(weights, [1.0] * 3)),
        Provider("l2", lambda: ops.l2_init_loss(weights, starts)),
    ]
    for figures in harness.device_figures(providers, cuda).values():
        assert figures.note == ""
        assert figures.gpu_seconds is not None
        assert figures[1:4] == (1, 1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_captured_and_compared():
    cuda = torch.device("cuda")
    inputs = torch.ones(2, device=cuda)
    step, twin = Counter(inputs), Counter(inputs)
    step.total, twin.total = step.total.cuda(), twin.total.cuda()
    parts = harness.Capturable(step, twin, lambda: inputs.mul_(2), lambda: None, lambda result: result)
    provider = harness.captured_provider("captured", lambda: parts, (0, 0), cuda)
    assert isinstance(provider, Provider)
