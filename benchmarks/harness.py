"""The shared body of all benchmarks: a provider has to agree with `upstream` on the same inputs, then it is timed.

pytest-benchmark times the provider. Its ratio to `upstream` comes from `interleaved_ratios`, which alternates the two, so
that other work on the machine affects both alike. On CUDA, `device_figures` adds what only the device can say.
"""

import functools
import importlib.util
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import metta_fastagent

UPSTREAM = "upstream"
# A shape belongs to the smallest selection that holds it.
LEVELS = ("quick", "full", "gpu")
# Each half of a round lasts at least this long: well above the grain of clock and scheduler.
ROUND_SECONDS = 1e-3
MIN_ROUNDS = 5
# Tracing unrolls lists of tensors: thousands of them take minutes.
MAX_COMPILED_TENSORS = 200
PEERS = {"torchrl": "torchrl.modules", "pufferlib": "pufferlib.pytorch"}

WARM_UP_CALLS = 3
COMPARED_REPLAYS = 3
TIMED_REPLAYS = 10
# A short call is captured this often, or for this many seconds, so that the start of a graph does not count.
MAX_CALLS_IN_GRAPH, GRAPH_SECONDS = 20, 2e-3
# About half a millisecond: long enough for the host to queue a graph and both events behind it.
SLEEP_CYCLES = 1_000_000
MAX_COPIED_BYTES = 1 << 30
PROFILED = "benchmark call"
# Some releases of CUDA append a version: cudaGraphLaunch_v10000.
LAUNCHES = re.compile(r"(cuda|cu|hip)(Module)?(Ext)?(Launch(?!HostFunc)|GraphLaunch)")
SYNCHRONISATIONS = re.compile(
    r"(cuda|cu|hip)\w*Synchronize|(cuda|hip)Memcpy(_v\d+)?(_ptds)?$|cuMemcpy(DtoH|HtoD)(_v\d+)?(_ptds)?$"
)


Size = Mapping[str, int]


class Disagreement(AssertionError):
    """A provider computes something else than upstream."""


class Shape(NamedTuple):
    """Sizes of a benchmark's inputs, and the smallest selection they belong to: quick, full or gpu."""

    level: str
    size: Size

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.size.items())


class Options(NamedTuple):
    """The device, whether torch.compile takes part, and the seconds that each ratio is measured for."""

    device: torch.device
    compiled: bool
    seconds: float


class Case(NamedTuple):
    """One operation on one set of inputs."""

    operation: str
    # Name of a provider -> the function to time; "upstream" gives the reference.
    call_of: Callable[[str], Callable[[], Any]]
    # Result of a call -> what is compared; for operations that work in place or draw at random.
    compared: Callable[[Any], Any] = lambda result: result
    # Restores the inputs before a compared call.
    reset: Callable[[], Any] = lambda: None
    # Providers that are timed without a comparison.
    uncompared: Sequence[str] = ()
    # The least that has to be read and written, in bytes.
    moved_bytes: int | None = None
    rtol: float = 1e-4
    atol: float = 1e-5


class Provider(NamedTuple):
    """A function to time, and the package's backend while it runs."""

    name: str
    call: Callable[[], Any]

    @property
    def backend(self) -> str:
        return "eager" if self.name == "eager" else "auto"

    def seconds(self, count: int, clock: Callable[[], float]) -> float:
        """Mean over `count` calls."""
        with metta_fastagent.use_backend(self.backend):
            started = clock()
            for _ in range(count):
                self.call()
            return (clock() - started) / count


def choose(provider: str, formulas: Mapping[str, Callable], package: Callable) -> Callable:
    """The function of a provider: its formula (a peer's is made by a function that imports it), or the package's."""
    if provider == "torch.compile":
        return torch.compile(formulas[UPSTREAM], dynamic=False)
    if provider in PEERS:
        return formulas[provider]()
    return formulas.get(provider, package)


def parametrized(providers: Sequence[str], shapes: Sequence[Shape]) -> Callable[[Callable], Callable]:
    """A decorator that runs a benchmark for each provider and shape."""
    by_provider = pytest.mark.parametrize("provider", providers)
    by_shape = pytest.mark.parametrize("shape", shapes, ids=[str(shape).replace(", ", "-") for shape in shapes])
    return lambda test: by_shape(by_provider(test))


def unavailable(provider: str, shape: Shape, options: Options) -> str | None:
    """The reason why a provider cannot run here, or None."""
    if provider == "torch.compile" and not options.compiled:
        return "torch.compile: off, --compile on turns it on"
    if provider == "torch.compile" and shape.size.get("tensors", 0) > MAX_COMPILED_TENSORS:
        return f"torch.compile: compiling takes minutes above {MAX_COMPILED_TENSORS} tensors"
    if provider == "captured" and options.device.type != "cuda":
        return "captured: CUDA graphs need a CUDA device"
    if provider in ("triton", "native") and provider != metta_fastagent.backend(options.device):
        return f"{provider}: the package runs {metta_fastagent.backend(options.device)} on {options.device}"
    if provider in PEERS and importlib.util.find_spec(PEERS[provider].partition(".")[0]) is None:
        return f"{provider}: not installed"
    return None


def measure(benchmark: Any, case: Case, name: str, shape: Shape, options: Options) -> None:
    """Compare one provider with upstream, time it, and record ratio and device figures in `benchmark.extra_info`.

    Raises:
        Disagreement: the provider computes something else.
    """
    reference = Provider(UPSTREAM, case.call_of(UPSTREAM))
    provider = reference if name == UPSTREAM else Provider(name, case.call_of(name))
    if name != UPSTREAM and name not in case.uncompared:
        require_agreement(case, reference, provider)
    benchmark.group = f"{case.operation}: {shape}"
    info = {"operation": case.operation, "shape": str(shape), "provider": name}
    with metta_fastagent.use_backend(provider.backend):
        benchmark(provider.call)
        info |= device_figures(provider, case.moved_bytes, options.device)
    ratios = (1.0, 1.0, 1.0)
    if name != UPSTREAM:
        ratios = interleaved_ratios(reference, provider, options.seconds, clock_of(options.device))
    benchmark.extra_info.update(info, **dict(zip(("ratio_q1", "ratio", "ratio_q3"), ratios, strict=True)))


def require_agreement(case: Case, reference: Provider, provider: Provider) -> None:
    """Raise Disagreement if the provider's result on the case's inputs differs from the reference's."""
    with full_precision():
        expected, actual = _result(case, reference), _result(case, provider)
    require_close(provider.name, expected, actual, case.rtol, case.atol)


def require_close(name: str, expected: Any, actual: Any, rtol: float, atol: float) -> None:
    """Raise Disagreement, which names the first difference of two nested results, where it is and how large."""
    tolerance = {"rtol": rtol, "atol": atol, "equal_nan": True, "check_dtype": False}
    try:
        torch.testing.assert_close(actual, expected, **tolerance)
    except AssertionError as error:
        raise Disagreement(f"{name}: {' '.join(str(error).split())}") from None


def _result(case: Case, provider: Provider) -> Any:
    case.reset()
    torch.manual_seed(0)
    with metta_fastagent.use_backend(provider.backend):
        result = case.compared(provider.call())
    # The next provider may work in the same memory.
    return _pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, result)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products and convolutions on CUDA without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def interleaved_ratios(
    reference: Provider, provider: Provider, seconds: float, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Quartiles of the provider's time divided by the reference's, taken within rounds that run both.

    The order alternates from round to round; rounds go on for `seconds`, and for MIN_ROUNDS at least.
    """
    pair = (reference, provider)
    # The first call warms up.
    once = [min(each.seconds(1, clock) for _ in range(2)) for each in pair]
    counts = [max(1, round(ROUND_SECONDS / max(each, 1e-9))) for each in once]
    ratios: list[float] = []
    until = clock() + seconds
    for number in itertools.count():
        if number >= MIN_ROUNDS and clock() >= until:
            break
        times = [0.0, 0.0]
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            times[i] = pair[i].seconds(counts[i], clock)
        ratios.append(times[1] / max(times[0], 1e-9))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device before it is read."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


class Counts(NamedTuple):
    """CUDA activity in one call; a graph is one launch of many kernels."""

    launches: int
    kernels: int
    host_syncs: int


def device_figures(provider: Provider, moved_bytes: int | None, device: torch.device) -> dict[str, Any]:
    """GPU time, launches, kernels, host syncs, peak memory and GB/s of one call; empty off CUDA."""
    if device.type != "cuda":
        return {}
    found: dict[str, Any] = {"peak_extra_bytes": peak_extra_bytes(provider.call, device)}
    counts = profiled_counts(provider.call, device)
    found |= counts._asdict() if counts else {}
    if counts and counts.host_syncs:
        return {**found, "note": "not capturable: it waits for the device"}
    try:
        found["gpu_seconds"] = gpu_seconds(provider, device)
    except RuntimeError as error:
        return {**found, "note": f"not captured: {first_line(error)}"}
    if moved_bytes:
        found["gb_per_s"] = moved_bytes / found["gpu_seconds"] / 1e9
        found["copy_gb_per_s"] = copy_gb_per_s(min(moved_bytes, MAX_COPIED_BYTES), device)
    return found


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """GPU memory in use at the peak of a call beyond what was in use before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def profiled_counts(call: Callable[[], Any], device: torch.device) -> Counts | None:
    """Counts of one profiled call."""
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(PROFILED):
            call()
        torch.cuda.synchronize(device)
    return count_events(profile.events() or [])


def count_events(events: Iterable[Any]) -> Counts | None:
    """Counts from a profiler's events; None if it saw no kernel.

    Launches and waits are counted inside the range PROFILED, without those that another of them makes. Copies and fills
    are not kernels.
    """
    events = list(events)
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    # Ranges of the host appear among the device's events too, under the same names.
    ranges = {event.name for event in on_host}
    kernels = [
        event
        for event in events
        if event.device_type != torch.autograd.DeviceType.CPU
        and event.name not in ranges
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    if not kernels:
        return None
    (span,) = (event.time_range for event in on_host if event.name == PROFILED)
    inside = [e for e in on_host if span.start <= e.time_range.start and e.time_range.end <= span.end]
    return Counts(_outermost(inside, LAUNCHES), len(kernels), _outermost(inside, SYNCHRONISATIONS))


def _outermost(events: Sequence[Any], names: re.Pattern) -> int:
    """The number of events with such a name that are not part of another one."""
    ranges = [(event.time_range.start, event.time_range.end) for event in events if names.match(event.name)]
    count, covered = 0, float("-inf")
    for _, end in sorted(ranges, key=lambda each: (each[0], -each[1])):
        if end > covered:
            count, covered = count + 1, end
    return count


def gpu_seconds(provider: Provider, device: torch.device) -> float:
    """Median time of the device in one call, from replays of a CUDA graph.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    if provider.name == "captured":
        return _queued_seconds(provider.call, device)
    # A wait under capture would leave the random generators unusable: it has to raise before.
    torch.cuda.set_sync_debug_mode("error")
    try:
        provider.call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    once = provider.seconds(1, clock_of(device))
    calls = max(1, min(MAX_CALLS_IN_GRAPH, int(GRAPH_SECONDS / once)))

    def repeat() -> None:
        for _ in range(calls):
            provider.call()

    graph, _ = capture(repeat, device)
    return _queued_seconds(graph.replay, device) / calls


def _queued_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of the device between two events around a call, all queued while the device sleeps."""
    seconds = []
    for _ in range(TIMED_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


@functools.lru_cache
def copy_gb_per_s(moved_bytes: int, device: torch.device) -> float:
    """GB/s of a copy that reads and writes so many bytes in all."""
    source = torch.zeros(max(1, moved_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved_bytes / gpu_seconds(Provider("copy", lambda: target.copy_(source)), device) / 1e9


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of `function`, warmed up on the same stream, and what its captured call returned."""
    stream = torch.cuda.Stream(device)
    before = torch.cuda.current_stream(device)
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
        # A failed capture leaves its own stream behind as the current one.
        torch.cuda.set_stream(before)
    return graph, result


def captured(
    step: Callable[[], Any], twin: Callable[[], Any], change_inputs: Callable[[], Any], case: Case, device: torch.device
) -> Callable[[], Any]:
    """Replays of a CUDA graph of `step`, compared with calls of its `twin` over COMPARED_REPLAYS changes of the inputs.

    Raises:
        Disagreement: a replay differs.
    """
    graph, result = capture(step, device)
    for _ in range(WARM_UP_CALLS):
        twin()
    for number in range(COMPARED_REPLAYS):
        change_inputs()
        expected = case.compared(twin())
        graph.replay()
        require_close(f"captured: replay {number + 1}", expected, case.compared(result), case.rtol, case.atol)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
