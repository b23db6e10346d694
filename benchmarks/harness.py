"""Measures several implementations of one operation: they agree first, then they are timed in turn within each round.

A `Suite` names an operation, its shapes and a function that makes the providers (implementations) for a shape. The
first provider is the reference. `measure` runs every provider once on the same inputs and refuses one whose results
differ; the others are timed in rounds, in random order within each, so that what else the machine does falls on all of
them alike. Ratios are taken within a round.

Where data moves, a copy of as many bytes is timed in the same rounds: the fastest that memory allows there.
"""

import gc
import itertools
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
MAX_COMPILED_SHAPES = 6
# Tracing unrolls lists of tensors: thousands of them take minutes.
MAX_COMPILED_TENSORS = 200
# Memory of the copy is bounded; its rate does not change above.
MAX_COPY_BYTES = 1 << 30
GRAPH_REPLAYS = 20
# A graph's own launch takes some microseconds: a short call is captured often enough to drown it.
GRAPH_SECONDS = 5e-4
MAX_CALLS_IN_GRAPH = 50
WARM_UP_CALLS = 3
# Between two profiled calls: more than the clocks of host and device are apart.
PROFILER_GAP_SECONDS = 1e-3
MESSAGE_LENGTH = 160
COPY = "copy"
LEVELS = ("quick", "full", "gpu")
# With the version that some releases of CUDA's profiling interface append: cudaGraphLaunch_v10000.
LAUNCHES = re.compile(r"(cuda|cu|hip)(Module)?(Ext)?(Launch(?!HostFunc)|GraphLaunch)")
SYNCHRONISATIONS = re.compile(
    r"(cuda|cu|hip)\w*Synchronize|(cuda|hip)Memcpy(_v\d+)?(_ptds)?$|cuMemcpy(DtoH|HtoD)(_v\d+)?(_ptds)?$"
)
# Ranges of a profile: a call, and the call with the wait for it.
CALLED, FINISHED = "benchmark call: ", "benchmark call with wait: "
# Of a captured step, before it is timed.
COMPARED_REPLAYS = 3


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
    # Whether `call` replays a graph itself, so that it cannot be captured into another.
    is_graph: bool = False


class Skipped(NamedTuple):
    """A provider that does not run here."""

    name: str
    reason: str


class Refused(NamedTuple):
    """A provider that was found to compute something else while it was made."""

    name: str
    reason: str


Entry = Provider | Skipped | Refused


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
    make_providers: Callable[[Mapping[str, int], torch.device, bool], Sequence[Entry]]
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
    launches: int | None = None
    kernels: int | None = None
    host_syncs: int | None = None
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
        return not_compiled()
    torch._dynamo.reset()
    return Provider("torch.compile", bind(torch.compile(function, dynamic=False)), **options)


def not_compiled() -> Skipped:
    """What stands for `torch.compile` where it is not wanted."""
    return Skipped("torch.compile", "off (--compile on turns it on), or a shape left out because compiling takes long")


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
    """Name and reason of each provider that fails, or whose results are not the first one's; runs each of them once."""
    expected = _result(providers[0])
    found = {}
    for provider in providers[1:]:
        try:
            text = difference(expected, _result(provider), rtol, atol)
        except Exception as error:
            found[provider.name] = f"{provider.name} fails: {first_line(error)}"
            continue
        if text is not None:
            found[provider.name] = f"{provider.name} computes something else than {providers[0].name}: {text}"
    return found


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message, with the next one where a colon announces it."""
    first, *others = str(error).strip().splitlines() or [""]
    told = f"{first} {others[0]}" if first.endswith(":") and others else first
    return f"{type(error).__name__}: {told[:MESSAGE_LENGTH]}".removesuffix(": ")


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
    refused = {entry.name: entry.reason for entry in made if isinstance(entry, Refused)}
    refused |= disagreements(providers, suite.rtol, suite.atol)
    if refused and all(provider.name in refused for provider in providers[1:]):
        raise Disagreement("; ".join(refused.values()))
    agreeing = [provider for provider in providers if provider.name not in refused]
    moved = suite.count_bytes(shape.size) if suite.count_bytes else None
    copied = min(moved, MAX_COPY_BYTES) if moved else None
    timed = [*agreeing, _copy_provider(copied, options.device)] if copied else agreeing
    timings = interleaved(timed, options.seconds_per_shape, options.device)
    figures = device_figures(timed, options.device)
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
            wait(device)
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count):
                call()
            wait(device)
            return time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if collecting:
            gc.enable()


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_figures(providers: Sequence[Provider], device: torch.device) -> dict[str, DeviceFigures]:
    """GPU time, launches, host synchronisations and peak extra memory of one call of each; empty off CUDA."""
    if device.type != "cuda":
        return {provider.name: DeviceFigures() for provider in providers}
    counted = _api_calls(providers, device)
    return {provider.name: _figures(provider, counted.get(provider.name), device) for provider in providers}


def _figures(provider: Provider, counts: "Counts | None", device: torch.device) -> DeviceFigures:
    known = counts._asdict() if counts else {}
    with provider.context():
        known["peak_extra_bytes"] = _peak_extra_bytes(provider.call, device)
        if counts and counts.host_syncs:
            return DeviceFigures(**known, note="not capturable: it waits for the device")
        try:
            return DeviceFigures(gpu_seconds(provider, device), **known)
        except RuntimeError as error:
            return DeviceFigures(**known, note=f"not captured: {first_line(error)}")


class Counts(NamedTuple):
    """What one call asked of the device."""

    launches: int
    kernels: int
    host_syncs: int


def _api_calls(providers: Sequence[Provider], device: torch.device) -> dict[str, Counts]:
    """Counts of one call of each provider, from one profile of them all: starting the profiler takes long."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for provider in providers:
            with provider.context():
                provider.call()
                torch.cuda.synchronize(device)
                time.sleep(PROFILER_GAP_SECONDS)
                with torch.profiler.record_function(FINISHED + provider.name):
                    with torch.profiler.record_function(CALLED + provider.name):
                        provider.call()
                    torch.cuda.synchronize(device)
                time.sleep(PROFILER_GAP_SECONDS)
    return count_calls(profile.events() or [])


def count_calls(events: Iterable[Any]) -> dict[str, Counts]:
    """Counts of each profiled call, by provider, from the profiler's events; empty where it saw nothing of the device.

    Launches and waits are the calls of CUDA's (or HIP's) interface within the call, without those that another such
    call makes. Kernels are what the device ran until the host had waited for it, copies and fills left out: a graph is
    one launch of many kernels.
    """
    events = list(events)
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    # The host's ranges show among the device's events too, under the same names.
    left_out = {event.name for event in on_host}
    kernels = [
        event
        for event in events
        if event.device_type != torch.autograd.DeviceType.CPU
        and event.name not in left_out
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    if not kernels:
        return {}
    called = {e.name.removeprefix(CALLED): e.time_range for e in on_host if e.name.startswith(CALLED)}
    finished = {e.name.removeprefix(FINISHED): e.time_range for e in on_host if e.name.startswith(FINISHED)}
    # Microseconds, as the events' times.
    slack = PROFILER_GAP_SECONDS * 1e6 / 2
    counted = {}
    for name, span in called.items():
        inside = [e for e in on_host if span.start <= e.time_range.start and e.time_range.end <= span.end]
        first, last = finished[name].start - slack, finished[name].end + slack
        ran = sum(first <= kernel.time_range.start <= last for kernel in kernels)
        counted[name] = Counts(_outermost(inside, LAUNCHES), ran, _outermost(inside, SYNCHRONISATIONS))
    return counted


def _outermost(events: Sequence[Any], names: re.Pattern) -> int:
    """How many events have such a name and are not part of another one that has."""
    ranges = [(event.time_range.start, event.time_range.end) for event in events if names.match(event.name)]
    count, covered = 0, -math.inf
    for _, end in sorted(ranges, key=lambda each: (each[0], -each[1])):
        if end > covered:
            count, covered = count + 1, end
    return count


def _peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    # Kept until the peak is read, as a caller would keep it.
    result = call()
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def gpu_seconds(provider: Provider, device: torch.device) -> float | None:
    """Median seconds of the device in one call, from replays of a captured graph; None off CUDA."""
    if device.type != "cuda":
        return None
    if provider.is_graph:
        return _median_gpu_seconds(provider.call)
    with _refusing_to_wait():
        provider.call()
    # Without the captured results: a graph of gradients that is alive would tie the next capture to this stream.
    graph = capture(provider.call, device)[0]
    once = _median_gpu_seconds(graph.replay)
    calls = calls_in_graph(once)
    if calls == 1:
        return once

    def repeat() -> None:
        for _ in range(calls):
            provider.call()

    graph = capture(repeat, device)[0]
    return _median_gpu_seconds(graph.replay) / calls


def calls_in_graph(seconds: float) -> int:
    """How often a call that takes so long is captured, so that the graph's own launch does not count."""
    return max(1, min(MAX_CALLS_IN_GRAPH, math.ceil(GRAPH_SECONDS / max(seconds, 1e-9))))


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """A RuntimeError for what waits for the device: under capture, that leaves random numbers unusable afterwards."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of `function` and what its captured call returned, after calls that warm up on the same stream.

    The same stream, because scratch memory of an operation may belong to a stream and cannot be made under capture.
    """
    before = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = function()
    finally:
        # A capture that fails leaves its own stream behind as the current one.
        torch.cuda.set_stream(before)
    return graph, result


def _median_gpu_seconds(call: Callable[[], Any]) -> float:
    """Between two events on the device, around each of some calls."""
    call()
    seconds = []
    for _ in range(GRAPH_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


class Capturable(NamedTuple):
    """A step to capture, and what it takes to compare its replays with calls without a graph."""

    # Reads its inputs from the same memory at each call.
    step: Callable[[], Any]
    # The same with a state of its own, equal at the start; called without a graph.
    twin: Callable[[], Any]
    # Writes other inputs into that memory.
    change_inputs: Callable[[], Any]
    # Puts the first inputs and the first state of `step` back.
    reset: Callable[[], Any]
    compared: Callable[[Any], Any]


def captured_provider(
    name: str, make: Callable[[], Capturable], tolerance: tuple[float, float], device: torch.device
) -> Entry:
    """The provider that replays a step from a CUDA graph, after it has agreed with eager calls of its twin.

    Off CUDA, and where the capture fails, it is skipped; where a replay differs, it is refused.
    """
    if device.type != "cuda":
        return Skipped(name, f"{device}: CUDA graphs need a CUDA device")
    try:
        parts = make()
        graph, result = capture(parts.step, device)
    except RuntimeError as error:
        return Skipped(name, f"not captured: {first_line(error)}")

    def replay() -> Any:
        graph.replay()
        return result

    text = replay_difference(replay, parts.twin, parts.change_inputs, parts.compared, tolerance)
    if text is not None:
        return Refused(name, f"{name} computes something else than calls without a graph: {text}")
    return Provider(name, replay, parts.compared, parts.reset, is_graph=True)


def replay_difference(
    replay: Callable[[], Any],
    twin: Callable[[], Any],
    change_inputs: Callable[[], Any],
    compared: Callable[[Any], Any],
    tolerance: tuple[float, float],
) -> str | None:
    """Where replays and the twin's calls differ, over COMPARED_REPLAYS changes of the inputs; None where they agree.

    The twin is called first as often as the step was to warm up.
    """
    for _ in range(WARM_UP_CALLS):
        twin()
    for number in range(COMPARED_REPLAYS):
        change_inputs()
        expected = compared(twin())
        text = difference(expected, compared(replay()), *tolerance, name=f"replay {number + 1}")
        if text is not None:
            return text
    return None


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
