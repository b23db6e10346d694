"""The shared body: a disagreeing provider is refused untimed, ratios find a slowdown, captured steps are compared."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda, harness
from benchmarks.harness import Case, Disagreement, Options, Provider, Shape

OPTIONS = Options(torch.device("cpu"), compiled=False, seconds=0.0)
SHAPE = Shape("quick", {"rows": 3})


def ones():
    return torch.ones(3)


class Benchmark:
    """pytest-benchmark's fixture: notes what it was asked to time."""

    def __init__(self):
        self.extra_info, self.group, self.timed = {}, "", []

    def __call__(self, function):
        self.timed.append(function)


def measured(case, name):
    benchmark = Benchmark()
    harness.measure(benchmark, case, name, SHAPE, OPTIONS)
    return benchmark


def test_a_provider_that_disagrees_is_refused_before_it_is_timed():
    calls = {"upstream": ones, "wrong": lambda: torch.tensor([1.0, 1.5, 1.0])}
    benchmark = Benchmark()
    with pytest.raises(Disagreement, match=r"^wrong: .*1 / 3 \(33\.3%\).*difference: 0\.5 at index \(1,\)"):
        harness.measure(benchmark, Case("op", calls.__getitem__), "wrong", SHAPE, OPTIONS)
    assert benchmark.timed == []


def test_a_difference_inside_of_a_nested_result_is_located():
    calls = {"upstream": lambda: {"a": [ones(), ones()]}, "wrong": lambda: {"a": [ones(), 2 * ones()]}}
    with pytest.raises(Disagreement, match=r"item \['a'\]\[1\]"):
        measured(Case("op", calls.__getitem__), "wrong")


def test_a_provider_that_agrees_is_timed_and_its_ratio_recorded():
    calls = {"upstream": ones, "same": ones}
    benchmark = measured(Case("op", calls.__getitem__), "same")
    assert benchmark.timed == [ones]
    assert benchmark.group == "op: rows 3"
    info = benchmark.extra_info
    assert (info["operation"], info["shape"], info["provider"]) == ("op", "rows 3", "same")
    assert 0 < info["ratio_q1"] <= info["ratio"] <= info["ratio_q3"]
    assert measured(Case("op", calls.__getitem__), "upstream").extra_info["ratio"] == 1


def test_an_uncompared_provider_is_timed_all_the_same():
    calls = {"upstream": ones, "other": lambda: torch.zeros(3)}
    assert measured(Case("op", calls.__getitem__, uncompared=("other",)), "other").timed == [calls["other"]]


def test_providers_that_work_in_place_start_from_the_same_inputs():
    memory = torch.zeros(3)
    calls = {"upstream": lambda: memory.add_(1), "same": lambda: memory.add_(1), "twice": lambda: memory.add_(2)}
    case = Case("op", calls.__getitem__, compared=lambda _: memory, reset=memory.zero_)
    reference = Provider("upstream", calls["upstream"])
    harness.require_agreement(case, reference, Provider("same", calls["same"]))
    with pytest.raises(Disagreement, match=r"^twice: "):
        harness.require_agreement(case, reference, Provider("twice", calls["twice"]))


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.tensor([1.0, math.nan])),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
        ({"a": 1.0}, {"b": 1.0}),
        ({"a": 1.0}, {"a": 1.1}),
    ],
)
def test_differences(expected, actual):
    case = Case("op", lambda name: ones, rtol=1e-3, atol=1e-3)
    rounded = torch.utils._pytree.tree_map(
        lambda leaf: leaf + 1e-4 if isinstance(leaf, torch.Tensor) else leaf, expected
    )
    harness.require_close("rounded", expected, rounded, case)
    with pytest.raises(Disagreement, match=r"^other: "):
        harness.require_close("other", expected, actual, case)


class Clock:
    """A clock that only calls move on, and that notes their order."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def provider(self, name, seconds):
        def call():
            self.now += next(seconds)
            self.order.append(name)

        return Provider(name, call)


def constant(seconds):
    while True:
        yield seconds


def test_ratios_find_the_factor_of_a_slowdown():
    clock = Clock()
    reference, slow = (clock.provider(name, constant(s)) for name, s in (("upstream", 0.25), ("slow", 0.75)))
    assert harness.interleaved_ratios(reference, slow, 20.0, clock) == pytest.approx((3, 3, 3))


def test_ratios_are_taken_within_rounds():
    clock = Clock()
    # Both slow down together, eightfold in the end: only times of the same round have the ratio 2.
    drift = [0.25 * 2 ** (number // 4) for number in range(20)]
    reference = clock.provider("upstream", iter(drift))
    other = clock.provider("other", iter([2 * seconds for seconds in drift]))
    assert harness.interleaved_ratios(reference, other, 0.0, clock) == pytest.approx((2, 2, 2))


def test_the_order_alternates_between_rounds():
    clock = Clock()
    harness.interleaved_ratios(*(clock.provider(name, constant(1.0)) for name in "ab"), 0.0, clock)
    rounds = "".join(clock.order)[4:]
    assert rounds == "abba" * 2 + "ab"


def test_short_calls_are_repeated_within_a_round():
    clock = Clock()
    harness.interleaved_ratios(*(clock.provider(name, constant(1e-4)) for name in "ab"), 0.0, clock)
    assert len(clock.order) == 4 + 2 * 10 * harness.MIN_ROUNDS


@pytest.mark.parametrize(
    ("provider", "tensors", "compiled", "reason"),
    [
        ("upstream", 1, False, None),
        ("torch.distributions", 1, False, None),
        ("torch.compile", 1, False, "--compile on"),
        ("torch.compile", 1, True, None),
        ("torch.compile", 1000, True, "minutes"),
        ("captured", 1, False, "CUDA"),
        ("triton", 1, False, "the package runs"),
    ],
)
def test_providers_that_cannot_run_are_named_with_the_reason(provider, tensors, compiled, reason):
    options = OPTIONS._replace(compiled=compiled)
    found = harness.unavailable(provider, Shape("quick", {"tensors": tensors}), options)
    assert (found is None) is (reason is None)
    assert reason is None or reason in found


class Graph:
    """Stands for a CUDA graph: a replay runs the step again and writes its result into the first one's memory."""

    def __init__(self, step, forgets):
        self.step, self.forgets = step, forgets
        for _ in range(cuda.WARM_UP_CALLS - 1):
            step()
        # A capture runs nothing on the device: with this call, as many as warm up.
        self.result = step().clone()

    def replay(self):
        new = self.step()
        if not self.forgets:
            self.result.copy_(new)


def accumulating(inputs, wrong_from=99):
    """A step with a state of its own, wrong from some call on."""
    state = SimpleNamespace(total=torch.zeros(2), calls=0)

    def step():
        state.calls += 1
        state.total = state.total + inputs + (state.calls >= wrong_from)
        return state.total

    return step


@pytest.mark.parametrize(
    ("wrong_from", "forgets", "replay"), [(99, False, None), (4, False, 1), (6, False, 3), (99, True, 1)]
)
def test_replays_are_compared_with_calls_of_a_twin(monkeypatch, wrong_from, forgets, replay):
    inputs = torch.ones(2)

    def capture(step, device):
        graph = Graph(step, forgets)
        return graph, graph.result

    monkeypatch.setattr(cuda, "capture", capture)
    case = Case("op", lambda name: ones, rtol=0, atol=0)
    arguments = (accumulating(inputs, wrong_from), accumulating(inputs), lambda: inputs.mul_(2), case, "cuda")
    if replay is None:
        assert harness.captured(*arguments)().shape == (2,)
    else:
        with pytest.raises(Disagreement, match=f"^captured: replay {replay}: "):
            harness.captured(*arguments)
