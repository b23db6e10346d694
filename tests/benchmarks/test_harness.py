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


def test_counting_of_api_calls():
    launches = ["cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch"]
    waits = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cudaMemcpy"]
    others = ["aten::add", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaFuncGetAttributes", "vectorized_kernel"]
    assert harness.count_api_calls(launches + waits + others) == (len(launches), len(waits))


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_wrong_provider_fails_its_benchmark_and_no_other(run_bench):
    done = run_bench(sleep=0.0, ones=3)
    assert done.code == 1
    assert "ours computes something else than upstream" in done.text
    assert "1 failed, 2 passed" in done.text


def test_what_waits_for_the_device_is_not_captured(monkeypatch):
    monkeypatch.setattr(harness, "_api_calls", lambda call: (4.0, 1.0))
    monkeypatch.setattr(harness, "_peak_extra_bytes", lambda call, device: 512)
    monkeypatch.setattr(harness, "_replay_seconds", lambda call, device: pytest.fail("was captured"))
    figures = harness.device_figures(Provider("waits", ones), torch.device("cuda"))
    assert figures[:4] == (None, 4.0, 1.0, 512)
    assert "waits for the device" in figures.note


def test_a_failed_capture_is_told(monkeypatch):
    def refuse(call, device):
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(harness, "_api_calls", lambda call: (4.0, 0.0))
    monkeypatch.setattr(harness, "_peak_extra_bytes", lambda call, device: 0)
    monkeypatch.setattr(harness, "_replay_seconds", refuse)
    figures = harness.device_figures(Provider("odd", ones), torch.device("cuda"))
    assert figures.gpu_seconds is None
    assert figures.note == "not captured: operation not permitted"


def test_the_cpu_has_no_device_figures():
    assert harness.device_figures(Provider("upstream", ones), CPU) == harness.DeviceFigures()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_figures():
    cuda = torch.device("cuda")
    x = torch.ones(1 << 20, device=cuda)
    doubled = harness.device_figures(Provider("doubled", lambda: x * 2), cuda)
    assert doubled.gpu_seconds is not None
    assert 0 < doubled.gpu_seconds < 1
    assert doubled.launches == 1
    assert doubled.host_syncs == 0
    assert doubled.peak_extra_bytes == 4 << 20
    read = harness.device_figures(Provider("read", lambda: (x * 2).sum().item()), cuda)
    assert read.host_syncs is not None
    assert read.host_syncs >= 1
    assert read.gpu_seconds is None
