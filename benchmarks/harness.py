"""Measures several implementations of one operation: they agree first, then they are timed in turn within each round.

A `Suite` names an operation, its shapes and a function that makes the providers (implementations) for a shape. The
first provider is the reference. `measure` runs every provider once on the same inputs and refuses one whose results
differ; the others are timed in rounds, in random order within each, so that what else the machine does falls on all of
them alike. Ratios are taken within a round.

Where data moves, a copy of as many bytes is timed in the same rounds: the fastest that memory allows there.
"""

import gc
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

import metta_fastagent

# Of each provider in one round: longer than the clock's and the scheduler's grain.
MIN_ROUND_SECONDS = 2e-3
MAX_ITERATIONS = 2000
MIN_ROUNDS, MAX_ROUNDS = 5, 40
# Inductor takes seconds to minutes for each shape.
MAX_COMPILED_SHAPES = 4
# Tracing unrolls lists of tensors: thousands of them take minutes.
MAX_COMPILED_TENSORS = 200
# Memory of the copy is bounded; its rate does not change above.
MAX_COPY_BYTES = 1 << 30
GRAPH_REPLAYS = 20
COPY = "copy"
LEVELS = ("quick", "full", "gpu")
LAUNCHES = re.compile(r"(cuda|cu|hip)(Module)?(Ext)?(Launch|GraphLaunch)")
SYNCHRONISATIONS = re.compile(r"(cuda|cu|hip)\w*Synchronize|(cuda|hip)Memcpy$|cuMemcpy(DtoH|HtoD)(_v2)?$")


class Provider(NamedTuple):
    """One implementation of a suite's operation, bound to its inputs."""

    name: str
    # What is timed. What it returns is compared with the reference's.
    call: Callable[[], Any]
    # Turns what `call` returned into what is compared; for operations that work in place or draw at random.
    compared: Callable[[Any], Any] = lambda result: result
    # Puts the inputs back before the call that is compared.
    reset: Callable[[], Any] = lambda: None
    # Entered around calls, outside of what is timed.
    context: Callable[[], AbstractContextManager] = nullcontext


class Skipped(NamedTuple):
    """A provider that does not run here."""

    name: str
    reason: str


class Shape(NamedTuple):
    """One size of a suite's inputs; `level` is the smallest selection that holds it: quick, full or gpu."""

    level: str
    size: Mapping[str, int]

    @property
    def label(self) -> str:
        return "-".join(f"{key}{value}" for key, value in self.size.items())


class Suite(NamedTuple):
    """An operation and how to measure it."""

    operation: str
    provider_names: Sequence[str]
    shapes: Sequence[Shape]
    # (shape's size, device, compiled) -> providers, the reference first. `compiled`: whether torch.compile is wanted.
    make_providers: Callable[[Mapping[str, int], torch.device, bool], list[Provider | Skipped]]
    # Bytes that have to be read and written at least; None where that says nothing.
    count_bytes: Callable[[Mapping[str, int]], int] | None = None
    rtol: float = 1e-4
    atol: float = 1e-5


class Options(NamedTuple):
    """How much is measured, and where."""

    device: torch.device
    quick: bool
    compiled: bool

    @property
    def seconds_per_shape(self) -> float:
        return 0.5 if self.quick else 2.0 if self.device.type == "cpu" else 1.0


class Timing(NamedTuple):
    """Seconds per call in each round, and how many calls each of these is a mean of."""

    seconds: list[float]
    # Of the process's threads, which other programs disturb less than the clock.
    cpu_seconds: list[float]
    iterations: int


class DeviceFigures(NamedTuple):
    """What only a CUDA device tells, per call; None where it is not known, with the reason in `note`."""

    gpu_seconds: float | None = None
    launches: float | None = None
    host_syncs: float | None = None
    peak_extra_bytes: int | None = None
    note: str = ""


class Measurement(NamedTuple):
    """Everything that was found out about one shape."""

    timings: dict[str, Timing]
    refused: dict[str, str]
    skipped: dict[str, str]
    device: dict[str, DeviceFigures]
    reference: str
    moved_bytes: int | None
    copied_bytes: int | None


class Disagreement(AssertionError):
    """A provider computes something else than the reference."""


def package_providers(
    device: torch.device,
    call: Callable[[], Any],
    **options: Any,
) -> list[Provider | Skipped]:
    """The package's operation on each implementation that it has for this device: eager, and triton or native."""
    automatic = metta_fastagent.backend(device)
    found: list[Provider | Skipped] = [
        Provider("eager", call, context=lambda: metta_fastagent.use_backend("eager"), **options)
    ]
    for name, reason in (("triton", "it runs on CUDA devices"), ("native", "its C++ operators are not loaded")):
        if name == automatic:
            found.append(Provider(name, call, context=lambda: metta_fastagent.use_backend("auto"), **options))
        else:
            found.append(Skipped(name, f"{device}: {reason}; the package runs {automatic} there"))
    return found


def compiled_provider(
    function: Callable, bind: Callable[[Callable], Callable[[], Any]], wanted: bool, **options: Any
) -> Provider | Skipped:
    """`torch.compile` of a function; `bind` makes the provider's call of the compiled one."""
    if not wanted:
        return Skipped(
            "torch.compile", "off (--compile on turns it on), or a shape left out because compiling takes long"
        )
    torch._dynamo.reset()
    return Provider("torch.compile", bind(torch.compile(function, dynamic=False)), **options)


def selected_shapes(suite: Suite, options: Options) -> list[Shape]:
    """The shapes of a suite that these options ask for."""
    levels = LEVELS[: 1 if options.quick else 2 if options.device.type == "cpu" else 3]
    return [shape for shape in suite.shapes if shape.level in levels]


def difference(expected: Any, actual: Any, rtol: float, atol: float, name: str = "result") -> str | None:
    """Where and how far two nested results are apart, or None where they agree."""
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or expected.keys() != actual.keys():
            return f"{name}: got {_kind(actual)}, expected the keys {sorted(map(str, expected))}"
        return _first(difference(expected[k], actual[k], rtol, atol, f"{name}[{k!r}]") for k in expected)
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
            return f"{name}: got {_kind(actual)}, expected {len(expected)} entries"
        pairs = enumerate(zip(expected, actual, strict=True))
        return _first(difference(e, a, rtol, atol, f"{name}[{i}]") for i, (e, a) in pairs)
    if isinstance(expected, Tensor):
        return _tensor_difference(expected, actual, rtol, atol, name)
    if isinstance(expected, float) and isinstance(actual, float):
        return _tensor_difference(torch.tensor(expected), torch.tensor(actual), rtol, atol, name)
    return None if expected == actual else f"{name}: got {actual!r}, expected {expected!r}"


def _tensor_difference(expected: Tensor, actual: Any, rtol: float, atol: float, name: str) -> str | None:
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return f"{name}: got {_kind(actual)}, expected shape {list(expected.shape)}"
    wanted, found = expected.detach().double(), actual.detach().double().to(expected.device)
    wrong = ~torch.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if not bool(wrong.any()):
        return None
    worst = float((found - wanted).abs()[wrong].max())
    share = float(wrong.double().mean())
    return f"{name}: {share:.1%} of its values differ, by up to {worst:.3g} (allowed: {atol:g} + {rtol:g} x value)"


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _first(differences: Iterable[str | None]) -> str | None:
    return next((text for text in differences if text is not None), None)


def disagreements(providers: Sequence[Provider], rtol: float, atol: float) -> dict[str, str]:
    """Name and difference of each provider whose results are not those of the first one; runs each of them once."""
    expected = _result(providers[0])
    found = {}
    for provider in providers[1:]:
        text = difference(expected, _result(provider), rtol, atol)
        if text is not None:
            found[provider.name] = f"{provider.name} computes something else than {providers[0].name}: {text}"
    return found


def _result(provider: Provider) -> Any:
    provider.reset()
    torch.manual_seed(0)
    with provider.context():
        result = provider.compared(provider.call())
    # A copy: a later provider may work in the same memory.
    return _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, result)


def measure(suite: Suite, shape: Shape, options: Options) -> Measurement:
    """Check and time all providers of one shape.

    Raises:
        Disagreement: none is left to compare with the reference.
    """
    few = shape in selected_shapes(suite, options)[:MAX_COMPILED_SHAPES]
    compiled = options.compiled and few and shape.size.get("tensors", 0) <= MAX_COMPILED_TENSORS
    made = suite.make_providers(shape.size, options.device, compiled)
    skipped = {entry.name: entry.reason for entry in made if isinstance(entry, Skipped)}
    providers = [entry for entry in made if isinstance(entry, Provider)]
    reference = providers[0].name
    refused = disagreements(providers, suite.rtol, suite.atol)
    if refused and len(refused) == len(providers) - 1:
        raise Disagreement("; ".join(refused.values()))
    agreeing = [provider for provider in providers if provider.name not in refused]
    moved = suite.count_bytes(shape.size) if suite.count_bytes else None
    copied = min(moved, MAX_COPY_BYTES) if moved else None
    timed = [*agreeing, _copy_provider(copied, options.device)] if copied else agreeing
    timings = interleaved(timed, options.seconds_per_shape, options.device)
    figures = {provider.name: device_figures(provider, options.device) for provider in timed}
    return Measurement(timings, refused, skipped, figures, reference, moved, copied)


def _copy_provider(moved: int, device: torch.device) -> Provider:
    # Half of the bytes are read, the other half written.
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Provider(COPY, lambda: target.copy_(source))


def interleaved(
    providers: Sequence[Provider], seconds: float, device: torch.device, seed: int = 0
) -> dict[str, Timing]:
    """Wall time per call of each provider in each round, for about so many seconds in all.

    A provider's calls in one round follow each other, the device is waited for once after the last of them.
    """
    order = random.Random(seed)
    iterations = {provider.name: _iterations(provider, device) for provider in providers}
    timings = {provider.name: Timing([], [], iterations[provider.name]) for provider in providers}
    deadline = time.perf_counter() + seconds
    for number in itertools.count():
        if number >= MAX_ROUNDS or (number >= MIN_ROUNDS and time.perf_counter() > deadline):
            return timings
        for provider in order.sample(list(providers), len(providers)):
            count = iterations[provider.name]
            wall, cpu = _timed(provider, count, device)
            timings[provider.name].seconds.append(wall / count)
            timings[provider.name].cpu_seconds.append(cpu / count)
    raise RuntimeError("unreachable: the loop above is endless")


def _iterations(provider: Provider, device: torch.device) -> int:
    """Calls that make a round long enough; a warm-up too."""
    _timed(provider, 1, device)
    once = min(_timed(provider, 1, device)[0] for _ in range(2))
    return max(1, min(MAX_ITERATIONS, round(MIN_ROUND_SECONDS / max(once, 1e-9))))


def _timed(provider: Provider, count: int, device: torch.device) -> tuple[float, float]:
    """(wall, processor) seconds of so many calls."""
    call = provider.call
    collecting = gc.isenabled()
    gc.disable()
    try:
        with provider.context():
            _wait(device)
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count):
                call()
            _wait(device)
            return time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if collecting:
            gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_figures(provider: Provider, device: torch.device) -> DeviceFigures:
    """GPU time, launches, host synchronisations and peak extra memory of one call; empty off CUDA."""
    if device.type != "cuda":
        return DeviceFigures()
    with provider.context():
        launches, syncs = _api_calls(provider.call)
        peak = _peak_extra_bytes(provider.call, device)
        if syncs:
            return DeviceFigures(None, launches, syncs, peak, "not capturable: it waits for the device")
        try:
            return DeviceFigures(_replay_seconds(provider.call, device), launches, syncs, peak)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:100]
            return DeviceFigures(None, launches, syncs, peak, f"not captured: {reason}")


def _api_calls(call: Callable[[], Any]) -> tuple[float | None, float | None]:
    """(launches, synchronisations) per call: the difference between one profiled call and three, halved.

    None where the profiler does not see the device.
    """
    counts = []
    for calls in (1, 3):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                call()
        counts.append(count_api_calls(event.name for event in profile.events() or []))
    (first_launches, first_syncs), (last_launches, last_syncs) = counts
    if last_launches == 0:
        # The profiler saw nothing of the device.
        return None, None
    return (last_launches - first_launches) / 2, (last_syncs - first_syncs) / 2


def count_api_calls(names: Iterable[str]) -> tuple[int, int]:
    """(kernel and graph launches, host synchronisations) among the names of CUDA or HIP API calls."""
    names = list(names)
    return sum(bool(LAUNCHES.match(name)) for name in names), sum(bool(SYNCHRONISATIONS.match(name)) for name in names)


def _peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    # Kept until the peak is read, as a caller would keep it.
    result = call()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def _replay_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of the device in one call, from replays of a captured graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    seconds = []
    for _ in range(GRAPH_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def summary(measurement: Measurement, name: str) -> dict[str, Any]:
    """The figures of one provider, as plain values for JSON; what is not known is None."""
    timing, figures = measurement.timings[name], measurement.device[name]
    reference = measurement.timings[measurement.reference]
    low, middle, high = statistics.quantiles(_ratios(timing.seconds, reference.seconds), n=4)
    copy = measurement.timings.get(COPY)
    return {
        "provider": name,
        "reference": measurement.reference,
        "iterations": timing.iterations,
        "ratio": middle,
        "ratio_q1": low,
        "ratio_q3": high,
        "cpu_ratio": statistics.median(_ratios(timing.cpu_seconds, reference.cpu_seconds)),
        "bytes": measurement.moved_bytes,
        "gb_per_s": _rate(measurement.moved_bytes, timing, figures),
        "copy_gb_per_s": _rate(measurement.copied_bytes, copy, measurement.device[COPY]) if copy else None,
        **figures._asdict(),
    }


def _ratios(own: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [a / max(b, 1e-9) for a, b in zip(own, reference, strict=True)]


def _rate(moved: int | None, timing: Timing, figures: DeviceFigures) -> float | None:
    """GB/s, in the device's time where it is known, else on the clock."""
    seconds = figures.gpu_seconds or statistics.median(timing.seconds)
    return moved / seconds / 1e9 if moved else None


class ReplayClock:
    """A clock for pytest-benchmark that shows durations measured before: it records what `interleaved` has timed."""

    def __init__(self) -> None:
        self._now = 0.0
        self._waiting: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        """The durations of the next rounds."""
        self._waiting = iter(seconds)

    def round(self) -> None:
        """Let one duration pass."""
        self._now += next(self._waiting)

    def now(self) -> float:
        """Seconds since some moment."""
        return self._now


CLOCK = ReplayClock()
