"""The benchmark of whole steps: its deep agent, the compiled step, and the captured one, with a graph made up here."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree

from benchmarks import bench_train_step as bench
from benchmarks import harness
from benchmarks.harness import Provider, Refused, Skipped

CPU = torch.device("cpu")
STEPS = [
    pytest.param(bench.ROLLOUT, {"rows": 6, "time": 0}, id="rollout"),
    pytest.param(bench.UPDATE, {"rows": 3, "time": 4}, id="update"),
]


def test_the_deep_agent_has_200_tensors_of_30_million_parameters():
    agent = bench.make_agent(bench.DEEP, torch.device("meta"))
    params = list(agent.parameters())
    assert len(params) == 200
    assert sum(param.numel() for param in params) == pytest.approx(30e6, rel=0.01)


@pytest.mark.parametrize("size", [{}, bench.SHALLOW])
def test_upstream_and_package_begin_with_the_same_weights(size):
    ours, theirs = (bench.make_agent(size, CPU, upstream).state_dict() for upstream in (False, True))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Graph:
    """What stands for a CUDA graph: a replay runs the step again and writes its results where the first ones lie."""

    def __init__(self, function, forgets=()):
        self.function, self.forgets = function, forgets
        # A capture runs nothing on the device: with the result's own call, as many as warm up.
        for _ in range(harness.WARM_UP_CALLS - 1):
            function()
        self.result = function()

    def replay(self):
        new = self.function()
        for kept, fresh in zip(_pytree.tree_leaves(self.result), _pytree.tree_leaves(new), strict=True):
            if isinstance(kept, torch.Tensor) and "results" not in self.forgets:
                kept.detach().copy_(fresh.detach())


@pytest.fixture
def made(monkeypatch):
    """Providers of a step, `captured` among them, by name."""

    def make(kind, size, forgets=()):
        def capture(function, device):
            graph = Graph(function, forgets)
            return graph, graph.result

        def captured_provider(name, parts, tolerance, device):
            return harness.captured_provider(name, parts, tolerance, SimpleNamespace(type="cuda"))

        monkeypatch.setattr(harness, "capture", capture)
        monkeypatch.setattr(bench, "captured_provider", captured_provider)
        return {entry.name: entry for entry in bench.make_providers(kind, size, CPU, False)}

    return make


@pytest.mark.parametrize(("kind", "size"), STEPS)
def test_a_captured_step_agrees_over_its_replays_and_from_the_start(made, kind, size):
    entries = made(kind, size)
    captured = entries["captured"]
    assert isinstance(captured, Provider)
    assert captured.is_graph
    # The replays before have rotated the inputs and advanced the memory: `reset` puts both back.
    assert harness.disagreements([entries["upstream"], captured], kind.rtol, kind.atol) == {}


@pytest.mark.parametrize(("kind", "size"), STEPS)
def test_a_graph_that_does_not_see_new_inputs_is_refused(made, kind, size):
    captured = made(kind, size, forgets=("results",))["captured"]
    assert isinstance(captured, Refused)
    assert "replay 1" in captured.reason


def test_a_graph_that_does_not_advance_the_memory_is_refused(made, monkeypatch):
    monkeypatch.setattr(Graph, "replay", forgetful(Graph.replay))
    captured = made(*STEPS[0].values)["captured"]
    assert isinstance(captured, Refused)
    # The first replay starts from the same memory as the twin's call.
    assert "replay 2" in captured.reason


def forgetful(replay):
    """A replay after which the agent's memory is as it was before."""

    def run(graph):
        (agent,) = (
            cell.cell_contents for cell in cells_of(graph.function) if isinstance(cell.cell_contents, bench.Fast)
        )
        memory = agent.get_memory()
        replay(graph)
        agent.set_memory(memory)

    return run


def cells_of(function):
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__closure__


def test_without_a_cuda_device_the_captured_step_is_skipped():
    entries = {entry.name: entry for entry in bench.make_providers(*STEPS[0].values, CPU, False)}
    assert entries["captured"] == Skipped("captured", "cpu: CUDA graphs need a CUDA device")


@pytest.mark.parametrize(("kind", "size"), STEPS)
def test_encoder_and_heads_compile_and_agree(kind, size):
    inputs = bench.make_inputs(size, CPU)
    torch._dynamo.utils.counters.clear()
    compiled = bench.compiled_step(kind, inputs, size, CPU, True, backend="aot_eager")
    assert isinstance(compiled, Provider)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    upstream = bench.make_providers(kind, size, CPU, False)[0]
    assert harness.disagreements([upstream, compiled], kind.rtol, kind.atol) == {}


def test_a_step_that_does_not_compile_is_skipped_with_its_reason():
    def backend(graph, inputs):
        raise RuntimeError("no such compiler\nmore")

    kind, size = STEPS[0].values
    entry = bench.compiled_step(kind, bench.make_inputs(size, CPU), size, CPU, True, backend=backend)
    assert isinstance(entry, Skipped)
    assert entry.reason.startswith("does not compile: ")
    assert "no such compiler" in entry.reason
    assert bench.compiled_step(kind, bench.make_inputs(size, CPU), size, CPU, False) == harness.not_compiled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "size"), STEPS)
def test_a_step_is_captured_on_the_gpu(kind, size):
    entries = {entry.name: entry for entry in bench.make_providers(kind, size, torch.device("cuda"), False)}
    captured = entries["captured"]
    assert isinstance(captured, Provider), captured
    assert harness.disagreements([entries["upstream"], captured], kind.rtol, kind.atol) == {}
