"""Counts of an agent's calls, and the ranges that a profiler shows."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]

Function = TypeVar("Function", bound=Callable)


def profiled(function: Function) -> Function:
    """A decorator: each call is a range `metta_fastagent.<name>` in the trace of a profiler, if one is active."""
    name = f"metta_fastagent.{function.__name__.lstrip('_')}"

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling() or not _profiler_enabled():
            return function(*args, **kwargs)
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


class Calls:
    """Counts of the calls of the two handlers. Nothing is read from a device before `summary`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.entropy: dict[str, Tensor] = {}
        self.nonfinite: dict[torch.device, Tensor] = {}

    def add(self, mode: str, entropy: Tensor, count_nonfinite: bool) -> None:
        """Note a call with this entropy [rows]; under a compiler only rows without a distribution are counted."""
        if count_nonfinite:
            counter = self.nonfinite.get(entropy.device)
            if counter is None:
                counter = self.nonfinite[entropy.device] = entropy.new_zeros((), dtype=torch.int64)
            counter += entropy.isnan().sum()
        if not torch.compiler.is_compiling():
            self.calls[mode] += 1
            self.rows[mode] += entropy.shape[0]
            # The tensor itself: its mean is taken only if someone asks.
            self.entropy[mode] = entropy.detach() if entropy.requires_grad else entropy

    def summary(self) -> dict[str, object]:
        """Plain numbers; waits for the devices."""
        return {
            "calls": dict(self.calls),
            "rows": dict(self.rows),
            "mean_entropy": {mode: entropy.double().nanmean().item() for mode, entropy in self.entropy.items()},
            "nonfinite_rows": sum(counter.item() for counter in self.nonfinite.values()),
        }
