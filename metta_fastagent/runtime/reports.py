"""Two words of host memory per agent, in which kernels report bad rows without a host sync.

A kernel never stops on an action out of range or on logits that do not form a distribution: it sets the row's
log-probability to NaN and writes the first or the second word, in pinned memory. `raise_if_reported` reads them. A
report that a running kernel has not written yet is found by a later call, so an error comes one call late unless the
caller synchronises first. An operation takes an int, the handle of the `Report` whose words its kernel writes.

    bits 59..62: operation    28..58: row    14..27: action type + 8192    0..13: parameter + 8192
                                             0..27: index + 2^27, in operations that take an index
                                             0: whether no action is left, in the second word

0 means no report.
"""

# pyright: reportInvalidTypeForm=false

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.runtime.checks import BadRowError
from metta_fastagent.runtime.triton import jit, tl

EVALUATE_PAIR, EVALUATE_INDEX, CONVERT_PAIR, CONVERT_INDEX, EVALUATE_LOGITS, SAMPLE_LOGITS = 1, 2, 3, 4, 5, 6
PPO_PAIR, PPO_INDEX, PPO_LOGITS = 7, 8, 9
# Operation, and the argument named in the message.
NAMES = {
    EVALUATE_PAIR: ("evaluate_actions", "actions"),
    EVALUATE_INDEX: ("evaluate_actions", "actions"),
    CONVERT_PAIR: ("action_to_logit_index", "actions"),
    CONVERT_INDEX: ("logit_index_to_action", "index"),
    EVALUATE_LOGITS: ("evaluate_actions", "logits"),
    SAMPLE_LOGITS: ("sample_actions", "logits"),
    PPO_PAIR: ("ppo_loss", "actions"),
    PPO_INDEX: ("ppo_loss", "actions"),
    PPO_LOGITS: ("ppo_loss", "logits"),
}
NO_ACTION = "got no allowed action with a logit above -inf, expected at least one"
NO_DISTRIBUTION = "holds NaN or +inf, or is -inf throughout; expected finite values or some -inf"

_handles = itertools.count()
_reports: "weakref.WeakValueDictionary[int, Report]" = weakref.WeakValueDictionary()
# Reports that have words, by handle. Never freed, because a captured graph may write to a word at any replay.
_in_use: "dict[int, Report]" = {}


class Report:
    """The words of one caller, such as an agent; operations take its `handle`.

    Example:
        >>> from metta_fastagent import ops
        >>> report = Report()
        >>> drawn = ops.sample_actions(torch.zeros(2, 3), report=report.handle)
        >>> ops.raise_if_reported(report=report)
    """

    def __init__(self) -> None:
        self.handle = next(_handles)
        self.words: Any = None
        # The same memory as plain integers, which are faster to read.
        self.view: Any = None
        self.actions = 0
        _reports[self.handle] = self

    def take(self) -> int:
        """Return a reported code, 0 for none, and clear it."""
        view = self.view
        if view is None or not (view[0] or view[1]):
            return 0
        place = 0 if view[0] else 1
        code, view[place] = view[place], 0
        self.actions += place == 0
        return code

    def actions_reported(self) -> int:
        """Reports of bad actions so far, including one that has not been read yet."""
        return self.actions + (self.view is not None and self.view[0] != 0)


# Operations called without a report share this one; its handle is 0.
_SHARED = Report()


def words_of(handle: int, device: torch.device) -> Tensor:
    """The words of the report with this handle, int64 [2]; in pinned memory for CUDA devices."""
    report = _in_use.get(handle)
    if report is None:
        report = _in_use[handle] = _reports[handle]
        # A tensor made in inference mode could not be used outside it.
        with torch.inference_mode(False):
            report.words = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
        report.view = memoryview(report.words.numpy())
    return report.words


@jit
def report_pair(word, bad, row, kind, param, OPERATION: tl.constexpr):
    """Write the word if any row is bad; bad, row, kind, param: [ROWS]; row, kind and param are int64."""
    kind = tl.minimum(tl.maximum(kind, -8192), 8191) + 8192
    param = tl.minimum(tl.maximum(param, -8192), 8191) + 8192
    _report(word, bad, row, (kind << 14) | param, OPERATION)


@jit
def report_index(word, bad, row, index, OPERATION: tl.constexpr):
    """Write the word if any row is bad; bad, row, index: [ROWS]; row and index are int64."""
    index = tl.minimum(tl.maximum(index, -134217728), 134217727) + 134217728
    _report(word, bad, row, index, OPERATION)


@jit
def report_logits(word, bad, row, top, MASKED: tl.constexpr, OPERATION: tl.constexpr):
    """Write the second word if any row is not a distribution; bad, row, top: [ROWS]; top is the largest logit."""
    if MASKED:
        _report(word + 1, bad, row, (top == float("-inf")).to(tl.int64), OPERATION)
    else:
        _report(word + 1, bad, row, row * 0, OPERATION)


@jit
def _report(word, bad, row, value, OPERATION: tl.constexpr):
    code = (row & 0x7FFFFFFF) << 28 | value
    code += OPERATION << 59
    # Each bad row writes the same 64-bit word; the last write to land is the one reported.
    tl.store(word + row * 0, code, mask=bad)


def raise_if_reported(
    cum_action_max_params: Tensor | None = None, synchronize: bool = False, report: Report | None = None
) -> None:
    """Raise an error if a kernel has reported a bad row since the last call, and clear the report.

    Args:
        cum_action_max_params: int64 tensor [action types + 1], to name the limit in the message; read only on an error.
        synchronize: wait for the current CUDA device first, so that no report of an earlier launch is missed.
        report: the report to read; None reads all of them.

    Raises:
        BadRowError: an action was out of range, and the message names operation, row, type, parameter and limit; or a
            row's logits did not form a distribution.
        RuntimeError: `synchronize` while a CUDA graph is being captured.

    Example:
        >>> raise_if_reported()  # no kernel has reported a row
    """
    if not _in_use:
        return
    if synchronize and torch.cuda.is_available():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "validate: got 'sync', expected 'deferred' or 'off' while a CUDA graph is captured: 'sync' waits for "
                "the device"
            )
        torch.cuda.synchronize()
    code = report.take() if report else next(filter(None, (each.take() for each in _in_use.values())), 0)
    if code == 0:
        return
    operation, row = code >> 59, (code >> 28) & 0x7FFFFFFF
    name, argument = NAMES[operation]
    if operation in (EVALUATE_LOGITS, SAMPLE_LOGITS, PPO_LOGITS):
        found = f"mask[{row}]: {NO_ACTION}" if code & 1 else f"logits[{row}]: {NO_DISTRIBUTION}"
    elif operation in (EVALUATE_INDEX, CONVERT_INDEX, PPO_INDEX):
        index = (code & 0xFFFFFFF) - 134217728
        found = f"{argument}[{row}]: got logit index {index}, expected one of the actions"
    else:
        kind, param = ((code >> 14) & 0x3FFF) - 8192, (code & 0x3FFF) - 8192
        found = f"{argument}[{row}]: got {_describe_pair(kind, param, cum_action_max_params)}"
    raise BadRowError(f"{name}: {found} (reported by an earlier launch)")


def _describe_pair(kind: int, param: int, cum_action_max_params: Tensor | None) -> str:
    if cum_action_max_params is None:
        return f"action type {kind}, parameter {param}, expected a pair within the action tables"
    table = cum_action_max_params.tolist()
    if not 0 <= kind < len(table) - 1:
        return f"action type {kind}, parameter {param}, expected a type 0 to {len(table) - 2}"
    return f"parameter {param} for action type {kind}, expected 0 to {table[kind + 1] - table[kind]}"
