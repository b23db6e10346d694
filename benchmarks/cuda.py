"""Figures for one call that need a CUDA device: GPU time, launches, kernels, host syncs, peak memory, GB/s."""

import functools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

WARM_UP_CALLS = 3
TIMED_REPLAYS = 10
# A short call is captured this many times, or for this many seconds, so that the graph's start-up does not count.
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


class Counts(NamedTuple):
    """CUDA activity in one call; a graph counts as one launch with many kernels."""

    launches: int
    kernels: int
    host_syncs: int


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device before each reading."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def device_figures(call: Call, moved_bytes: int | None, device: torch.device, is_graph: bool) -> dict[str, Any]:
    """All figures for a call, itself a graph replay if `is_graph`; `note` if some are missing. Empty off CUDA."""
    if device.type != "cuda":
        return {}
    counts = profiled_counts(call, device)
    found: dict[str, Any] = counts._asdict() if counts else {}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    found["peak_extra_bytes"] = torch.cuda.max_memory_allocated(device) - before
    if counts and counts.host_syncs:
        return {**found, "note": "not capturable: it waits for the device"}
    try:
        seconds = queued_seconds(call, device) if is_graph else gpu_seconds(call, device)
    except RuntimeError as error:
        return {**found, "note": "not captured: " + str(error).partition("\n")[0]}
    found["gpu_seconds"] = seconds
    if moved_bytes:
        found["gb_per_s"] = moved_bytes / seconds / 1e9
        found["copy_gb_per_s"] = copy_gb_per_s(min(moved_bytes, MAX_COPIED_BYTES), device)
    return found


def profiled_counts(call: Call, device: torch.device) -> Counts | None:
    """Counts for one profiled call."""
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(PROFILED):
            call()
        torch.cuda.synchronize(device)
    return count_events(profile.events() or [])


def count_events(events: Iterable[Any]) -> Counts | None:
    """Counts from a profiler's events: launches and waits inside the range PROFILED; None if there is no kernel.

    Copies and fills are not kernels.
    """
    events = list(events)
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    # Host ranges also appear among the device's events, under the same names.
    left_out = {event.name for event in on_host}
    names = [event.name for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    kernels = [name for name in names if name not in left_out and not name.startswith(("Memcpy", "Memset"))]
    if not kernels:
        return None
    (span,) = (event.time_range for event in on_host if event.name == PROFILED)
    inside = [e for e in on_host if span.start <= e.time_range.start and e.time_range.end <= span.end]
    return Counts(_outermost(inside, LAUNCHES), len(kernels), _outermost(inside, SYNCHRONISATIONS))


def _outermost(events: Sequence[Any], names: re.Pattern) -> int:
    """The number of events with matching names that are not nested in another one."""
    found = [event.time_range for event in events if names.match(event.name)]
    return sum(not any(o is not e and o.start <= e.start and e.end <= o.end for o in found) for e in found)


def gpu_seconds(call: Call, device: torch.device) -> float:
    """Median device time of one call, from replays of a CUDA graph.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    # A wait during capture would leave the random generators unusable, so it must raise first.
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    clock = clock_of(device)
    started = clock()
    call()
    calls = max(1, min(MAX_CALLS_IN_GRAPH, int(GRAPH_SECONDS / (clock() - started))))

    def repeat() -> None:
        for _ in range(calls):
            call()

    graph, _ = capture(repeat, device)
    return queued_seconds(graph.replay, device) / calls


def queued_seconds(call: Call, device: torch.device) -> float:
    """Median device time between two events around a call, all queued while the device sleeps."""
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
    """GB/s of a copy that reads and writes this many bytes in total."""
    source = torch.zeros(max(1, moved_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved_bytes / gpu_seconds(lambda: target.copy_(source), device) / 1e9


def capture(function: Call, device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of `function`, warmed up on the same stream, and the result of its captured call."""
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
