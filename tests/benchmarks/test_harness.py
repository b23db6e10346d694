"""The shared body: a disagreeing provider is refused untimed, ratios find a slowdown, captured steps are compared."""

import itertools
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


def test_a_provider_that_agrees_is_timed_and_its_ratio_recorded():
    calls = {"upstream": ones, "same": ones}
    benchmark = measured(Case("op", calls.__getitem__), "same")
    assert benchmark.timed == [ones]
    assert benchmark.group == "op: rows 3"
    info = benchmark.extra_info
    assert (info["operation"], info["shape"], info["provider"]) == ("op", "rows 3", "same")
    assert 0 < info["ratio_q1"] <= info["ratio"] <= info["ratio_q3"]
    assert measured(Case("op", calls.__getitem__), "upstream").extra_info["ratio"] == 1
    calls["other"] = lambda: torch.zeros(3)
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
        ({"a": [1.0]}, {"a": [1.1]}),
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


def test_ratios_find_the_factor_of_a_slowdown():
    clock = Clock()
    reference, slow = (clock.provider(name, itertools.repeat(s)) for name, s in (("upstream", 0.25), ("slow", 0.75)))
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
    harness.interleaved_ratios(*(clock.provider(name, itertools.repeat(1.0)) for name in "ab"), 0.0, clock)
    rounds = "".join(clock.order)[4:]
    assert rounds == "abba" * 2 + "ab"


SHORT, LONG = (Shape("full", {"tensors": count}) for count in (200, 2000))


@pytest.mark.parametrize(
    ("provider", "shape", "compiled", "reason"),
    [
        ("upstream", SHAPE, False, None),
        ("captured", SHAPE, False, "CUDA"),
        ("triton", SHAPE, False, "the package runs"),
        ("torch.compile", SHAPE, False, "--compile on"),
        ("torch.compile", SHORT, True, None),
        ("torch.compile", LONG, True, "minutes"),
    ],
)
def test_providers_that_cannot_run_are_named_with_the_reason(provider, shape, compiled, reason):
    found = harness.unavailable(provider, shape, OPTIONS._replace(compiled=compiled))
    assert found is None if reason is None else reason in found


def accumulating(inputs, wrong_from=99):
    """A step with a state of its own, wrong from some call on."""
    total, calls = torch.zeros(2), itertools.count(1)

    def step():
        total.add_(inputs + (next(calls) >= wrong_from))
        return total.clone()

    return step


@pytest.mark.parametrize(
    ("wrong_from", "forgets", "replay"), [(99, False, None), (4, False, 1), (6, False, 3), (99, True, 1)]
)
def test_replays_are_compared_with_calls_of_a_twin(monkeypatch, wrong_from, forgets, replay):
    inputs = torch.ones(2)

    def capture(step, device):
        """Stands for a graph, whose replays run the step again and write into the first result's memory."""
        results = [step() for _ in range(cuda.WARM_UP_CALLS)]
        graph = SimpleNamespace(replay=lambda: step() if forgets else results[-1].copy_(step()))
        return graph, results[-1]

    monkeypatch.setattr(cuda, "capture", capture)
    case = Case("op", lambda name: ones, rtol=0, atol=0)
    arguments = (accumulating(inputs, wrong_from), accumulating(inputs), lambda: inputs.mul_(2), case, "cuda")
    if replay is None:
        assert harness.captured(*arguments)().shape == (2,)
    else:
        with pytest.raises(Disagreement, match=f"^captured: replay {replay}: "):
            harness.captured(*arguments)
