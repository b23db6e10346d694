"""State that an agent creates lazily, and that copies and pickles of the agent do not take along."""

import logging
import math
import time
from contextlib import nullcontext

import torch
from torch import Tensor

from metta_fastagent import ops
from metta_fastagent._layer_index import LayerIndex
from metta_fastagent._shapes import Fields

logger = logging.getLogger(__name__)

# A rollout this long with so few rows per step gets advice on threads: its products are too small to split.
MANY_STEPS, FEW_ROWS = 100, 512
_told = False


class Calls:
    """Counts calls of the two handlers. Reads nothing from a device before `summary`."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        # Host times of the first and the last call in seconds, and the rows of the first.
        self.first: dict[str, tuple[float, int]] = {}
        self.last: dict[str, float] = {}
        self.entropy: dict[str, Tensor] = {}
        self.nonfinite: dict[torch.device, Tensor] = {}

    def add(self, mode: str, rows: int, entropy: Tensor | None, count_nonfinite: bool) -> None:
        """Record a call and its entropy [rows], if any; compiled code only counts rows without a distribution."""
        if count_nonfinite and entropy is not None:
            counter = self.nonfinite.get(entropy.device)
            if counter is None:
                # A counter made in inference mode could not be updated outside it.
                with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                    counter = torch.zeros((), dtype=torch.int64, device=entropy.device)
                self.nonfinite[entropy.device] = counter
            counter += entropy.isnan().sum()
        if not torch.compiler.is_compiling():
            self.calls[mode] = self.calls.get(mode, 0) + 1
            self.rows[mode] = self.rows.get(mode, 0) + rows
            self.last[mode] = time.perf_counter()
            self.first.setdefault(mode, (self.last[mode], rows))
            if self.calls[mode] == MANY_STEPS and mode == "inference" and entropy is not None and not entropy.is_cuda:
                _advise_on_threads(rows)
        if entropy is not None and not torch.compiler.is_compiling():
            # Keeps the tensor itself: its mean is computed only on request.
            self.entropy[mode] = entropy.detach() if entropy.requires_grad else entropy

    def summary(self) -> dict[str, object]:
        """The counts as plain numbers; waits for the devices."""
        return {
            "calls": dict(self.calls),
            "rows": dict(self.rows),
            "rows_per_second": {mode: self._rate(mode) for mode in self.calls},
            "mean_entropy": {mode: entropy.double().nanmean().item() for mode, entropy in self.entropy.items()},
            "nonfinite_rows": sum(counter.item() for counter in self.nonfinite.values()),
        }

    def _rate(self, mode: str) -> float:
        """Rows per second between the first and the last call; NaN before the second."""
        start, rows = self.first[mode]
        elapsed = self.last[mode] - start
        return (self.rows[mode] - rows) / elapsed if elapsed > 0 else math.nan


def _advise_on_threads(rows: int) -> None:
    """Log once that steps of this many rows run on several threads."""
    global _told
    threads = torch.get_num_threads()
    if threads > 1 and rows <= FEW_ROWS and not _told:
        _told = True
        logger.warning(
            "batches of %d run on %d threads, which mostly wait for each other: try torch.set_num_threads(1)",
            rows, threads,
        )  # fmt: skip


class AgentState:
    """The slot of one agent; a copy of the agent starts with an empty one."""

    def __init__(self) -> None:
        self.calls = Calls()
        # Where kernels report this agent's bad rows.
        self.report: ops.Report | None = None
        self.fields: Fields | None = None
        self.checked = False
        self.layers: LayerIndex | None = None

    def __copy__(self) -> "AgentState":
        return AgentState()

    def __deepcopy__(self, memo: dict) -> "AgentState":
        return AgentState()

    def __reduce__(self) -> tuple:
        return AgentState, ()
