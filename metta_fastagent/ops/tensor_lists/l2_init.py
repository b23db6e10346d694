"""Squared L2 distance of the weights from their initial values: L2-init regularisation; `reference` has the formula.

Source: Kumar, Marklund and Van Roy, "Maintaining Plasticity in Continual Learning via Regenerative Regularization"
(2023).
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from metta_fastagent.ops import autograd
from metta_fastagent.ops.dtypes import NATIVE_DTYPES
from metta_fastagent.ops.tensor_lists import kernels, reference
from metta_fastagent.ops.tensor_lists.plans import Plan, find_plan, keep_plan
from metta_fastagent.runtime.checks import describe, require_floating_point, require_list, require_number
from metta_fastagent.runtime.dispatch import Operator, needs_operator, uses_triton
from metta_fastagent.runtime.sharded import full, is_sharded


def l2_init_loss(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float = 1.0, *, plan: Plan | None = None
) -> Tensor:
    """Scaled sum of squared differences between weights and their initial values.

    Args:
        params: floating-point tensors of any shapes, all on one device; if some are DTensors, every rank of their mesh
            must take part in the call.
        initial: tensors of the same shapes on the same device, one for each of `params`; no gradient flows to them.
        scale: factor of the sum.
        plan: the caller's plan for these tensors, which must be those of the previous call, at the same addresses; None
            looks one up by the tensors.

    Returns:
        0-dim float32 tensor, differentiable any number of times with respect to `params`. Without tensors: 0.

    Raises:
        TypeError: an argument is not a list, a tensor does not hold floating-point numbers, or `scale` is not a number.
        ValueError: the two lists differ in length, or a pair of tensors differs in shape or device.

    Example:
        >>> weight = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> l2_init_loss([weight], [torch.tensor([1.0, 1.0])], scale=0.5).item()
        2.0
    """
    if not torch.compiler.is_compiling():
        require_list("params", params, "a list of tensors")
        require_list("initial", initial, "a list of tensors, one for each of params")
        if plan is None:
            plan = find_plan("l2_init_loss", [*params, *initial])
        table = None if plan is None else plan.value
        if table is not None and _can_run(table, params):
            return _PlannedL2InitLoss.apply(table, initial, require_number("scale", scale, "a number"), *params)
    scale = require_number("scale", scale, "a number")
    _check(params, initial)
    if not params:
        return torch.zeros((), dtype=torch.float32)
    if any(map(is_sharded, params)):
        losses = [
            full(reference.l2_init_loss_forward_eager([p], [s], scale)) for p, s in zip(params, initial, strict=True)
        ]
        return torch.stack(losses).sum()
    if autograd.in_plain_pytorch():
        return reference.l2_init_loss_forward_eager(params, initial, scale)
    if not needs_operator(params, initial) and uses_triton(params[0].device):
        plan = keep_plan("l2_init_loss", [*params, *initial]) if plan is None else plan
        plan.value = kernels.l2_table(params, initial)
    return _L2InitLoss.apply(scale, len(params), *params, *initial)


def _check(params: Sequence[Tensor], initial: Sequence[Tensor]) -> None:
    if len(params) != len(initial):
        raise ValueError(f"initial: got {len(initial)} tensors, expected {len(params)}, one for each of params")
    for position, (param, start) in enumerate(zip(params, initial, strict=True)):
        for name, tensor in (("params", param), ("initial", start)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                require_floating_point(f"{name}[{position}]", tensor)
        if param.shape != start.shape or param.device != start.device or param.device != params[0].device:
            raise ValueError(
                f"initial[{position}]: got {describe(start)} for {describe(param)}; "
                f"expected the same shape, and every tensor on {params[0].device}"
            )


def _can_run(table: kernels.L2Table, params: Sequence[Tensor]) -> bool:
    return table.dtype == params[0].dtype and not needs_operator() and uses_triton(params[0].device)


class _L2InitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: float, count: int, *tensors: Tensor):
        ctx.scale, ctx.count, ctx.backend = scale, count, autograd.chosen_backend()
        ctx.save_for_backward(*tensors)
        return _l2_init_loss_forward(list(tensors[:count]), list(tensors[count:]), scale)

    @staticmethod
    def backward(ctx, grad):
        params, initial = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
        if autograd.needs_graph():
            grads = reference.l2_init_loss_backward_eager(params, initial, ctx.scale, grad)
        else:
            grads = autograd.run_backward(ctx.backend, _l2_init_loss_backward, params, initial, ctx.scale, grad)
        return None, None, *grads, *([None] * ctx.count)


class _PlannedL2InitLoss(torch.autograd.Function):
    """`_L2InitLoss` with a plan. It compares versions itself: saving 400 tensors takes longer than the rest."""

    @staticmethod
    def forward(ctx, table: kernels.L2Table, initial: Sequence[Tensor], scale: float, *params: Tensor):
        ctx.table, ctx.scale, ctx.initial, ctx.params = table, scale, initial, params
        ctx.versions = _versions(params), _versions(initial)
        return kernels.launch_l2_forward(table, params[0], scale)

    @staticmethod
    def backward(ctx, grad):
        if ctx.versions != (_versions(ctx.params), _versions(ctx.initial)):
            raise RuntimeError(
                "l2_init_loss: a weight or an initial value was modified in place between forward and backward; "
                "clone it first, or call backward before the change"
            )
        if autograd.needs_graph():
            grads = reference.l2_init_loss_backward_eager(ctx.params, ctx.initial, ctx.scale, grad)
        else:
            grads = kernels.launch_l2_backward(ctx.table, ctx.scale, grad)
        return None, None, None, *grads


_VERSION = operator.attrgetter("_version")


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_VERSION, tensors))


def _forward_native(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    if params[0].dtype not in NATIVE_DTYPES or not kernels.laid_out_alike(params, initial):
        return reference.l2_init_loss_forward_eager(params, initial, scale)
    return torch.ops.metta_fastagent_native.l2_init_loss_forward.default(params, initial, scale)


def _backward_native(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor) -> list[Tensor]:
    if params[0].dtype not in NATIVE_DTYPES or not kernels.laid_out_alike(params, initial):
        return reference.l2_init_loss_backward_eager(params, initial, scale, grad)
    return torch.ops.metta_fastagent_native.l2_init_loss_backward.default(params, initial, scale, grad)


_l2_init_loss_forward = Operator(
    "l2_init_loss_forward(Tensor[] params, Tensor[] initial, float scale) -> Tensor",
    reference.l2_init_loss_forward_eager,
    lambda params, initial, scale: params[0].new_empty((), dtype=torch.float32),
    kernels.l2_init_loss_forward_cuda,
    _forward_native,
)
_l2_init_loss_backward = Operator(
    "l2_init_loss_backward(Tensor[] params, Tensor[] initial, float scale, Tensor grad) -> Tensor[]",
    reference.l2_init_loss_backward_eager,
    lambda params, initial, scale, grad: [torch.empty_like(param) for param in params],
    kernels.l2_init_loss_backward_cuda,
    _backward_native,
)
