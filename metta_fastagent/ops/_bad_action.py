"""One word of host memory in which kernels report an action out of range, read without waiting for the device.

A kernel never stops on a bad action: it marks the row's log-probability NaN and writes this word, which lies in pinned
memory that the device reaches. `raise_if_reported` looks at it; what a running kernel has not written yet is found by a
later look, so an error comes one call late unless the caller waits for the device first.

    bits 60..62: operation    28..59: row    14..27: action type + 8192    0..13: parameter + 8192
                                             0..27: index + 2^27, in operations that take an index

0 means that there is nothing to report.
"""

# pyright: reportInvalidTypeForm=false

from typing import Any

import torch
from torch import Tensor

from metta_fastagent._triton import jit, tl

EVALUATE_PAIR, EVALUATE_INDEX, CONVERT_PAIR, CONVERT_INDEX = 1, 2, 3, 4
OPERATION_NAMES = {
    EVALUATE_PAIR: "evaluate_actions",
    EVALUATE_INDEX: "evaluate_actions",
    CONVERT_PAIR: "action_to_logit_index",
    CONVERT_INDEX: "logit_index_to_action",
}

_word: Tensor | None = None
# The same memory as a NumPy array, whose elements are read faster.
_view: Any = None


def word(device: torch.device) -> Tensor:
    """The word, int64 [1], one for the process: in pinned memory where there are CUDA devices."""
    global _word, _view
    if _word is None:
        _word = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        _view = _word.numpy()
    return _word


@jit
def report_pair(word, bad, row, kind, param, OPERATION: tl.constexpr):
    """Write the word if any row is bad; bad, row, kind, param: [ROWS], row, kind and param int64."""
    kind = tl.minimum(tl.maximum(kind, -8192), 8191) + 8192
    param = tl.minimum(tl.maximum(param, -8192), 8191) + 8192
    _report(word, bad, row, (kind << 14) | param, OPERATION)


@jit
def report_index(word, bad, row, index, OPERATION: tl.constexpr):
    """Write the word if any row is bad; bad, row, index: [ROWS], row and index int64."""
    index = tl.minimum(tl.maximum(index, -134217728), 134217727) + 134217728
    _report(word, bad, row, index, OPERATION)


@jit
def _report(word, bad, row, value, OPERATION: tl.constexpr):
    code = (row & 0xFFFFFFFF) << 28 | value
    code += OPERATION << 60
    # Each bad row writes the same 64-bit word; whichever lands last is the one that is told.
    tl.store(word + row * 0, code, mask=bad)


def raise_if_reported(cum_action_max_params: Tensor | None = None, synchronize: bool = False) -> None:
    """Raise what a kernel has reported since the last look, and clear it.

    Args:
        cum_action_max_params: int64 tensor [action types + 1], to name the limit in the message; read only if there is
            an error.
        synchronize: wait for the current CUDA device first, so that nothing that was launched on it is missed.

    Raises:
        ValueError: an action was out of range; the message names operation, row, type and parameter, and the limit.
    """
    if _view is None:
        return
    if synchronize and torch.cuda.is_available():
        torch.cuda.synchronize()
    code = int(_view[0])
    if code == 0:
        return
    _view[0] = 0
    operation, row = code >> 60, (code >> 28) & 0xFFFFFFFF
    if operation in (EVALUATE_INDEX, CONVERT_INDEX):
        found = f"logit index {(code & 0xFFFFFFF) - 134217728}, expected one of the actions"
    else:
        found = _describe_pair(((code >> 14) & 0x3FFF) - 8192, (code & 0x3FFF) - 8192, cum_action_max_params)
    raise ValueError(f"{OPERATION_NAMES[operation]}: actions[{row}]: got {found} (reported by an earlier launch)")


def _describe_pair(kind: int, param: int, cum_action_max_params: Tensor | None) -> str:
    if cum_action_max_params is None:
        return f"action type {kind}, parameter {param}, expected a pair within the action tables"
    table = cum_action_max_params.tolist()
    if not 0 <= kind < len(table) - 1:
        return f"action type {kind}, parameter {param}, expected a type 0 to {len(table) - 2}"
    return f"parameter {param} for action type {kind}, expected 0 to {table[kind + 1] - table[kind]}"
