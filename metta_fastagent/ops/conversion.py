"""Conversion between (action type, parameter) pairs and logit indices.

    index = action_type + cum_action_max_params[action_type] + action_param

with `cum_action_max_params = cumsum([0] + max_params)`. `max_params[t]` is the largest legal parameter of type t, so
type t owns `max_params[t] + 1` logits. The sum of the earlier `max_params` misses one logit per earlier type; adding
`action_type` makes up for those. `PyTorchAgentMixin` and ComponentPolicy in the Metta project use the same formula.

On the CPU, where reading values is free, a value out of range raises an error that names it. Elsewhere nothing is read
back: a bad pair becomes index -1, whose log-probability is NaN, and a bad index becomes the pair (-1, -1).
"""

# pyright: reportInvalidTypeForm=false

import functools

import torch
from torch import Tensor

from metta_fastagent.ops.autograd import checks_values, in_plain_pytorch
from metta_fastagent.ops.dtypes import is_integer, native_integers
from metta_fastagent.runtime.checks import BadRowError, require_same_device, require_tensor
from metta_fastagent.runtime.dispatch import Operator
from metta_fastagent.runtime.launch import Constants, launch_with
from metta_fastagent.runtime.reports import CONVERT_INDEX, CONVERT_PAIR, report_index, report_pair, words_of
from metta_fastagent.runtime.triton import cdiv, jit, tl

# One element per thread, four warps: a conversion moves 20 bytes per row, so it is launch-bound up to a million rows.
BLOCK = 128


@jit
def pair_to_index(actions, table, row, live, num_types, stride_row, stride_pair):
    """(index or -1, type, parameter, legal) of the pairs of the given rows, each [ROWS]."""
    kind = tl.load(actions + row * stride_row, mask=live, other=0).to(tl.int64)
    param = tl.load(actions + row * stride_row + stride_pair, mask=live, other=0).to(tl.int64)
    known = tl.minimum(tl.maximum(kind, 0), num_types - 1)
    first = tl.load(table + known)
    limit = tl.load(table + known + 1) - first
    legal = (kind == known) & (param >= 0) & (param <= limit)
    return tl.where(legal, kind + first + param, -1), kind, param, legal


@jit(varying=("N", "num_types", "stride_row", "stride_pair"))
def _action_to_logit_index_kernel(
    actions,  # [N, 2] any integer dtype, strides stride_row and stride_pair
    table,  # [T + 1] int64
    index,  # [N] int64
    word,  # [1] int64
    N,
    num_types,
    stride_row,
    stride_pair,
    OPERATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    result, kind, param, legal = pair_to_index(actions, table, row, live, num_types, stride_row, stride_pair)
    report_pair(word, live & (legal == 0), row, kind, param, OPERATION)
    tl.store(index + row, result, mask=live)


@jit(varying=("N", "A"))
def _logit_index_to_action_kernel(
    index,  # [N] any integer dtype
    table,  # [A, 2]
    pairs,  # [N, 2] of the table's dtype
    word,  # [1] int64
    N,
    A,
    OPERATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    wanted = tl.load(index + row, mask=live, other=0).to(tl.int64)
    known = tl.minimum(tl.maximum(wanted, 0), A - 1)
    legal = wanted == known
    report_index(word, live & (legal == 0), row, wanted, OPERATION)
    for column in tl.static_range(2):
        # An unsigned dtype cannot hold -1.
        entry = tl.load(table + known * 2 + column).to(tl.int64)
        tl.store(pairs + row * 2 + column, tl.where(legal, entry, -1).to(pairs.dtype.element_ty), mask=live)


@functools.cache
def _constants(operation: int, block: int) -> Constants:
    return Constants({"OPERATION": operation, "BLOCK": block})


def _action_to_logit_index_cuda(actions: Tensor, cum_action_max_params: Tensor, report: int) -> Tensor:
    pairs = actions if actions.dim() == 2 else actions.reshape(-1, 2)
    rows = pairs.shape[0]
    index = actions.new_empty(actions.shape[:-1], dtype=torch.int64)
    if rows > 0:
        launch_with(
            _constants(CONVERT_PAIR, BLOCK),
            _action_to_logit_index_kernel,
            cdiv(rows, BLOCK),
            (pairs, cum_action_max_params.contiguous(), index, words_of(report, actions.device)),
            (rows, cum_action_max_params.numel() - 1, pairs.stride(0), pairs.stride(1)),
        )
    return index


def _logit_index_to_action_cuda(index: Tensor, action_index_tensor: Tensor, report: int) -> Tensor:
    index = index.contiguous()
    pairs = torch.empty((*index.shape, 2), dtype=action_index_tensor.dtype, device=index.device)
    rows = index.numel()
    if rows > 0:
        launch_with(
            _constants(CONVERT_INDEX, BLOCK),
            _logit_index_to_action_kernel,
            cdiv(rows, BLOCK),
            (index, action_index_tensor.contiguous(), pairs, words_of(report, index.device)),
            (rows, action_index_tensor.shape[0]),
        )
    return pairs


def _action_to_logit_index_native(actions: Tensor, cum_action_max_params: Tensor, report: int) -> Tensor:
    index, bad_row = torch.ops.metta_fastagent_native.action_to_logit_index.default(
        native_integers(actions).reshape(-1, 2), cum_action_max_params.contiguous()
    )
    if bad_row >= 0:
        return action_to_logit_index_eager(actions, cum_action_max_params)
    return index if actions.dim() == 2 else index.view(actions.shape[:-1])


def _logit_index_to_action_native(index: Tensor, action_index_tensor: Tensor, report: int) -> Tensor:
    if action_index_tensor.dtype not in (torch.int32, torch.int64):
        return logit_index_to_action_eager(index, action_index_tensor)
    pairs, bad_row = torch.ops.metta_fastagent_native.logit_index_to_action.default(
        native_integers(index).reshape(-1), action_index_tensor.contiguous()
    )
    if bad_row >= 0:
        return logit_index_to_action_eager(index, action_index_tensor)
    return pairs if index.dim() == 1 else pairs.view((*index.shape, 2))


def action_to_logit_index_eager(actions: Tensor, cum_action_max_params: Tensor, report: int = 0) -> Tensor:
    """`action_to_logit_index` in plain PyTorch: the reference, and the path for devices without a kernel."""
    action_type, action_param = actions[..., 0].long(), actions[..., 1].long()
    last_type = cum_action_max_params.numel() - 2
    known_type = action_type.clamp(0, last_type)
    first = cum_action_max_params[known_type]
    limit = cum_action_max_params[known_type + 1] - first
    legal = (action_type == known_type) & (action_param >= 0) & (action_param <= limit)
    if checks_values(actions):
        if not bool(legal.all()):
            raise _illegal_pair(actions, legal, limit, last_type)
        return (action_type + first + action_param).contiguous()
    return torch.where(legal, action_type + first + action_param, -1).contiguous()


def _illegal_pair(actions: Tensor, legal: Tensor, limit: Tensor, last_type: int) -> BadRowError:
    position = tuple((~legal).nonzero()[0].tolist())
    action_type, action_param = actions[position].tolist()
    where = f"actions[{', '.join(map(str, position))}]"
    if not 0 <= action_type <= last_type:
        return BadRowError(f"{where}: got action type {action_type}, expected 0 to {last_type}")
    highest = int(limit[position])
    return BadRowError(f"{where}: got parameter {action_param} for action type {action_type}, expected 0 to {highest}")


def logit_index_to_action_eager(index: Tensor, action_index_tensor: Tensor, report: int = 0) -> Tensor:
    """`logit_index_to_action` in plain PyTorch: the reference, and the path for devices without a kernel."""
    index = index.long()
    last = action_index_tensor.shape[0] - 1
    known = index.clamp(0, last)
    legal = index == known
    if checks_values(index):
        if not bool(legal.all()):
            position = tuple((~legal).nonzero()[0].tolist())
            where = f"index[{', '.join(map(str, position))}]"
            raise BadRowError(f"{where}: got {int(index[position])}, expected 0 to {last}")
        return action_index_tensor[index].contiguous()
    return torch.where(legal.unsqueeze(-1), action_index_tensor[known], -1).contiguous()


_action_to_logit_index = Operator(
    "action_to_logit_index(Tensor actions, Tensor cum_action_max_params, int report) -> Tensor",
    action_to_logit_index_eager,
    lambda actions, cum_action_max_params, report: actions.new_empty(actions.shape[:-1], dtype=torch.int64),
    _action_to_logit_index_cuda,
    _action_to_logit_index_native,
)
_logit_index_to_action = Operator(
    "logit_index_to_action(Tensor index, Tensor action_index_tensor, int report) -> Tensor",
    logit_index_to_action_eager,
    lambda index, action_index_tensor, report: action_index_tensor.new_empty((*index.shape, 2)),
    _logit_index_to_action_cuda,
    _logit_index_to_action_native,
)


def check_pairs(actions: object, cum_action_max_params: object) -> tuple[Tensor, Tensor]:
    """Return both arguments if their types, dtypes, shapes and devices fit pairs and their table."""
    expected = "an integer tensor of (action type, parameter) pairs, shape [..., 2]"
    actions = require_tensor("actions", actions, expected, is_integer, lambda t: t.dim() > 0 and t.shape[-1] == 2)
    expected = "an int64 tensor of shape [action types + 1]"
    table = require_tensor(
        "cum_action_max_params",
        cum_action_max_params,
        expected,
        (torch.int64,).__contains__,
        lambda t: t.dim() == 1 and t.numel() > 1,
    )
    require_same_device("actions", actions, "cum_action_max_params", table)
    return actions, table


def check_action_index_tensor(action_index_tensor: object) -> Tensor:
    """Return the argument if it is an integer tensor [A, 2]."""
    expected = "an int32 tensor of shape [num_actions, 2]"
    shaped = lambda t: t.dim() == 2 and t.shape[1] == 2 and t.shape[0] > 0  # noqa: E731
    return require_tensor("action_index_tensor", action_index_tensor, expected, is_integer, shaped)


def action_to_logit_index(actions: Tensor, cum_action_max_params: Tensor, *, report: int = 0) -> Tensor:
    """Logit index of each (action type, parameter) pair.

    Args:
        actions: integer tensor [..., 2], any integer dtype, contiguous or not.
        cum_action_max_params: int64 tensor [action types + 1], `cumsum([0] + max_params)`, on the same device.
        report: handle of the `Report` to which a kernel writes a bad pair; 0 is shared by all calls without one.

    Returns:
        int64 tensor [...]. Off the CPU, a pair out of range gives -1.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also a type or parameter out of range.

    Example:
        >>> from metta_fastagent import ActionSpace
        >>> tables = ActionSpace(["noop", "move"], [0, 3])
        >>> action_to_logit_index(torch.tensor([[0, 0], [1, 3]]), tables.cum_action_max_params)
        tensor([0, 4])
    """
    actions, table = check_pairs(actions, cum_action_max_params)
    run = action_to_logit_index_eager if in_plain_pytorch() else _action_to_logit_index
    return run(actions, table, report)


def logit_index_to_action(index: Tensor, action_index_tensor: Tensor, *, report: int = 0) -> Tensor:
    """(action type, parameter) pair of each logit index: row `index` of the table.

    Args:
        index: integer tensor [...], any integer dtype.
        action_index_tensor: int32 tensor [num_actions, 2], on the same device.
        report: handle of the `Report` to which a kernel writes a bad index; 0 is shared by all calls without one.

    Returns:
        Tensor [..., 2] of the table's dtype. Off the CPU, an index out of range gives (-1, -1).

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device; on the CPU also an index out of range.

    Example:
        >>> from metta_fastagent import ActionSpace
        >>> logit_index_to_action(torch.tensor([0, 4]), ActionSpace(["noop", "move"], [0, 3]).action_index_tensor)
        tensor([[0, 0],
                [1, 3]], dtype=torch.int32)
    """
    index = require_tensor("index", index, "an integer tensor of logit indices", is_integer)
    table = check_action_index_tensor(action_index_tensor)
    require_same_device("index", index, "action_index_tensor", table)
    run = logit_index_to_action_eager if in_plain_pytorch() else _logit_index_to_action
    return run(index, table, report)
