"""PhaseTimer: seconds spent in each phase of training, without a device sync per phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES: tuple[str, ...] = ("environment", "inference", "learning", "clip")


class PhaseTimer:
    """Adds up the seconds spent in each of PHASES: `with timer("clip"): ...`.

    On CUDA a phase is the GPU time between two events, read by `read`; elsewhere it is wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((phase, first, last))
        else:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the seconds per phase since the last call, and reset them to 0. Synchronizes with the GPU."""
        if self._events:
            self._events[-1][2].synchronize()
        for phase, first, last in self._events:
            self._seconds[phase] += first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, dict.fromkeys(PHASES, 0.0), []
        return seconds
