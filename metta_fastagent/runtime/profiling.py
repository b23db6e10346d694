"""Ranges in the trace of PyTorch's profiler."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]

_NO_RANGE = nullcontext()


def profiler_range(name: str) -> AbstractContextManager:
    """A context that appears as `metta_fastagent.<name>` in a profiler's trace; does nothing without a profiler."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _NO_RANGE if not _profiler_enabled() else torch.profiler.record_function(f"metta_fastagent.{name}")
