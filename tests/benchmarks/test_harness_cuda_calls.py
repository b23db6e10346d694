"""What the harness asks of CUDA, in which order, against a stand-in for torch.cuda: none of it needs a device."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Options, Provider, Shape, Suite

CUDA = torch.device("cuda")


class Cuda:
    """Streams are names, a graph counts its replays, every event is 2 ms after the one before."""

    def __init__(self, monkeypatch, fails_under_capture=False):
        self.current, self.streams, self.graphs, self.mode, self.waited = "default", [], [], "default", []
        self.milliseconds, self.capturing, self.fails = 0.0, False, fails_under_capture
        stand_ins = {
            "Stream": self.make_stream,
            "current_stream": lambda device: self.stream(self.current),
            "stream": self.on_stream,
            "set_stream": lambda stream: setattr(self, "current", stream.name),
            "CUDAGraph": self.make_graph,
            "graph": self.capture,
            "Event": self.make_event,
            "synchronize": lambda device: None,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "memory_allocated": lambda device: 1000,
            "max_memory_allocated": lambda device: 1512,
            "reset_peak_memory_stats": lambda device: None,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def stream(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.waited.append((name, other.name)))

    def make_stream(self, device):
        self.streams.append(f"side {len(self.streams)}")
        return self.stream(self.streams[-1])

    @contextmanager
    def on_stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def make_graph(self):
        graph = SimpleNamespace(replays=0, stream="")
        graph.replay = lambda: setattr(graph, "replays", graph.replays + 1)
        self.graphs.append(graph)
        return graph

    @contextmanager
    def capture(self, graph, stream):
        graph.stream = self.current = stream.name
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        # As PyTorch does where a capture has failed, nothing puts the stream back then.
        self.current = "default"

    def make_event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)

        def record():
            self.milliseconds += 2.0
            event.at = self.milliseconds

        event.record, event.elapsed_time = record, lambda later: later.at - event.at
        return event


class Step:
    """A call that notes on which stream it ran, and whether under capture."""

    def __init__(self, cuda):
        self.cuda, self.ran = cuda, []

    def __call__(self):
        if self.cuda.capturing and self.cuda.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.ran.append((self.cuda.current, self.cuda.capturing, self.cuda.mode))
        return torch.ones(3)


def test_a_capture_warms_up_on_its_own_stream(monkeypatch):
    cuda = Cuda(monkeypatch)
    step = Step(cuda)
    graph, result = harness.capture(step, CUDA)
    assert torch.equal(result, torch.ones(3))
    assert step.ran == [("side 0", False, "default")] * harness.WARM_UP_CALLS + [("side 0", True, "default")]
    assert graph.stream == "side 0"
    assert cuda.waited == [("side 0", "default"), ("default", "side 0")]
    assert cuda.current == "default"


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    cuda = Cuda(monkeypatch, fails_under_capture=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        harness.capture(Step(cuda), CUDA)
    assert cuda.current == "default"


@pytest.mark.parametrize(("limit", "calls", "graphs"), [(2e-3, 1, 1), (5e-3, 3, 2)])
def test_gpu_seconds_of_short_and_long_calls(monkeypatch, limit, calls, graphs):
    monkeypatch.setattr(harness, "GRAPH_SECONDS", limit)
    cuda = Cuda(monkeypatch)
    step = Step(cuda)
    # The stand-in's graph takes 2 ms, however many calls it holds.
    assert harness.gpu_seconds(Provider("op", step), CUDA) == pytest.approx(2e-3 / calls)
    assert len(cuda.graphs) == graphs
    assert [graph.replays for graph in cuda.graphs] == [1 + harness.GRAPH_REPLAYS] * graphs
    assert step.ran[0] == ("default", False, "error")
    assert cuda.mode == "default"
    assert sum(captured for _, captured, _ in step.ran) == (1 if graphs == 1 else 1 + calls)


def test_no_result_of_a_capture_is_alive_in_the_next(monkeypatch):
    cuda = Cuda(monkeypatch)
    captured, alive = [], []

    def step():
        result = torch.ones(3)
        if cuda.capturing:
            alive.extend(earlier() is not None for earlier in captured)
            captured.append(weakref.ref(result))
        return result

    monkeypatch.setattr(harness, "GRAPH_SECONDS", 5e-3)
    harness.gpu_seconds(Provider("op", step), CUDA)
    assert len(cuda.graphs) == 2
    assert len(captured) > 2
    assert not any(alive)


def test_what_replays_a_graph_is_not_captured(monkeypatch):
    cuda = Cuda(monkeypatch)
    step = Step(cuda)
    assert harness.gpu_seconds(Provider("captured", step, is_graph=True), CUDA) == pytest.approx(2e-3)
    assert cuda.graphs == []
    assert len(step.ran) == 1 + harness.GRAPH_REPLAYS


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("fails", [False, True])
def test_a_whole_measurement(monkeypatch, fails):
    cuda = Cuda(monkeypatch, fails_under_capture=fails)
    providers = [Provider("upstream", lambda: torch.ones(3)), Provider("ours", Step(cuda))]
    shape = Shape("quick", {"rows": 3})
    suite = Suite("op", ("upstream", "ours"), [shape], lambda *_: providers)
    measured = harness.measure(suite, shape, Options(CUDA, quick=True, compiled=False))
    ours = measured.device["ours"]
    assert ours.peak_extra_bytes == 512
    assert (ours.gpu_seconds is None) is fails
    assert ours.note == (
        "not captured: RuntimeError: operation not permitted when stream is capturing" if fails else ""
    )
    # No profiler sees a device that is none.
    assert (ours.launches, ours.kernels, ours.host_syncs) == (None, None, None)
    assert harness.summary(measured, "ours")["peak_extra_bytes"] == 512


def test_the_host_is_timed_without_waiting_for_the_device(monkeypatch):
    from benchmarks import sweep

    Cuda(monkeypatch)
    calls = []
    assert sweep.host_seconds(lambda: calls.append(1), CUDA) > 0
    assert len(calls) == sweep.HOST_CALLS * sweep.HOST_ROUNDS
