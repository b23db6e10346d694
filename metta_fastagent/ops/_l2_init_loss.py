"""L2 distance of the weights to their initial values: L2-init regularisation.

    loss = scale * sum_i sum((param_i - initial_i)^2)                 d param_i = 2 scale (param_i - initial_i) * d loss

Source: Kumar, Marklund and Van Roy, "Maintaining Plasticity in Continual Learning via Regenerative Regularization"
(2023). Squares are summed in float32 (float64 for float64 weights) and the loss is float32 for every dtype.
"""

# pyright: reportInvalidTypeForm=false

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metta_fastagent._dispatch import needs_operator, register, uses_triton
from metta_fastagent._triton import cdiv, compute_type, jit, launch, next_power_of_2, tl
from metta_fastagent.ops._autograd import chosen_backend, in_plain_pytorch, needs_graph, run_backward
from metta_fastagent.ops._checks import NATIVE_DTYPES, compute_dtype, describe, require_floating_point, require_number
from metta_fastagent.ops._chunk_table import (
    CHUNK,
    CHUNK_WARPS,
    cached,
    capturing,
    chunk_rows,
    is_dense,
    keep_plan,
    keep_while_captured,
    planned,
    upload,
)
from metta_fastagent.ops._sharded import full, is_sharded

# Partial sums that the last program adds at a time.
PARTIALS_BLOCK = 1024
# Every tensor's part of the flat gradient starts on a 16-byte address.
FLAT_ALIGNMENT = 16
_VERSION = operator.attrgetter("_version")


class _Table(NamedTuple):
    chunks: Tensor  # [chunks, 4] int64: address of the weight, of its initial value, length, place in the flat gradient
    dtype: torch.dtype
    layouts: tuple[list[torch.Size], list[tuple[int, ...]], list[int]]  # shapes, strides, places in the flat gradient
    flat_length: int


@jit
def _differences(example, chunks, chunk, length, COMPUTE: tl.constexpr, CHUNK: tl.constexpr):
    """Weights minus initial values [CHUNK] of a chunk, 0 past its length."""
    param = tl.load(chunks + chunk * 4)
    initial = tl.load(chunks + chunk * 4 + 1)
    offset = tl.arange(0, CHUNK)
    # Elements of 128 bits; Triton sees that `whole` is a multiple.
    vector: tl.constexpr = 128 // example.dtype.element_ty.primitive_bitwidth
    whole = length // vector * vector
    if (whole == length) & ((param | initial) % 16 == 0):
        inside = offset < whole
        weights = tl.load(tl.multiple_of(param.to(example.dtype), 16) + offset, mask=inside, other=0.0).to(COMPUTE)
        start = tl.multiple_of(initial.to(example.dtype), 16)
        differences = weights - tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
    else:
        inside = offset < length
        weights = tl.load(param.to(example.dtype) + offset, mask=inside, other=0.0).to(COMPUTE)
        differences = weights - tl.load(initial.to(example.dtype) + offset, mask=inside, other=0.0).to(COMPUTE)
    return differences


@jit(varying=("num_chunks",))
def _l2_init_loss_fwd_kernel(
    example,  # any tensor of the dtype that the addresses point to
    chunks,  # [chunks, 4] int64
    partials,  # [chunks] float64
    counter,  # [1] int32
    loss,  # [] float32
    num_chunks,
    scale,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIALS_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    length = tl.load(chunks + chunk * 4 + 2)
    difference = _differences(example, chunks, chunk, length, COMPUTE, CHUNK)
    tl.store(partials + chunk, tl.sum(difference * difference, 0).to(tl.float64))
    # The last program to arrive adds the partial sums in their order, so the result does not depend on which one it is.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_chunks - 1:
        total = tl.zeros([PARTIALS_BLOCK], tl.float64)
        for first in range(0, num_chunks, PARTIALS_BLOCK):
            position = first + tl.arange(0, PARTIALS_BLOCK)
            total += tl.load(partials + position, mask=position < num_chunks, other=0.0, cache_modifier=".cg")
        tl.store(loss, (tl.sum(total, 0) * scale).to(tl.float32))
        tl.store(counter, 0)


@jit
def _l2_init_loss_bwd_kernel(
    flat,  # [flat_length] gradient of the weights' dtype
    chunks,  # [chunks, 4] int64
    grad,  # [] float32
    scale,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    length = tl.load(chunks + chunk * 4 + 2)
    place = tl.load(chunks + chunk * 4 + 3)
    offset = tl.arange(0, CHUNK)
    factor = (2.0 * scale * tl.load(grad)).to(COMPUTE)
    gradient = (_differences(flat, chunks, chunk, length, COMPUTE, CHUNK) * factor).to(flat.dtype.element_ty)
    # FLAT_ALIGNMENT in elements; the gap before the next tensor's part may be written.
    vector: tl.constexpr = 128 // flat.dtype.element_ty.primitive_bitwidth
    tl.store(flat + tl.multiple_of(place, vector) + offset, gradient, mask=offset < tl.cdiv(length, vector) * vector)


def _fits_kernel(params: Sequence[Tensor], initial: Sequence[Tensor]) -> bool:
    """One dtype for all, and each pair laid out alike without gaps."""
    return all(
        param.dtype == start.dtype == params[0].dtype and param.stride() == start.stride() and is_dense(param)
        for param, start in zip(params, initial, strict=True)
    )


def _table(params: Sequence[Tensor], initial: Sequence[Tensor]) -> _Table:
    device, dtype = params[0].device, params[0].dtype
    key = ("l2", device, dtype, *[t.data_ptr() for t in (*params, *initial)], *[t.numel() for t in params])
    return cached(key, lambda: _make_table(params, initial), device)


def _make_table(params: Sequence[Tensor], initial: Sequence[Tensor]) -> _Table:
    size, device = params[0].element_size(), params[0].device
    step = FLAT_ALIGNMENT // size
    places, end = [], 0
    for param in params:
        places.append(end)
        end += cdiv(param.numel(), step) * step
    chunks = [
        (params[i].data_ptr() + first * size, initial[i].data_ptr() + first * size, length, places[i] + first)
        for i, first, length in chunk_rows(params)
    ]
    layouts = [param.shape for param in params], [param.stride() for param in params], places
    return _Table(upload(chunks, torch.int64, device), params[0].dtype, layouts, end)


# Partial sums and counter of each device and stream; launches on one stream follow each other.
_scratch: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _scratch_for(num_chunks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums [>= num_chunks] and a counter that is 0, for one launch on the current stream.

    Under capture they lie in the graph's memory, and the graph sets the counter to 0.
    """
    if capturing(device):
        return _new_scratch(num_chunks, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _scratch.get((device, stream))
    if kept is None or kept[0].numel() < num_chunks:
        kept = _scratch[device, stream] = _new_scratch(num_chunks, device)
    return kept


def _new_scratch(num_chunks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    partials = torch.empty(num_chunks, dtype=torch.float64, device=device)
    return partials, torch.zeros(1, dtype=torch.int32, device=device)


def _run_forward(table: _Table, example: Tensor, scale: float) -> Tensor:
    device, num_chunks = example.device, table.chunks.shape[0]
    keep_while_captured(table, device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _l2_init_loss_fwd_kernel,
        num_chunks,
        (example, table.chunks, *_scratch_for(num_chunks, device), loss),
        (num_chunks, scale),
        num_warps=CHUNK_WARPS,
        COMPUTE=compute_type(table.dtype),
        CHUNK=CHUNK,
        PARTIALS_BLOCK=min(PARTIALS_BLOCK, next_power_of_2(num_chunks)),
    )
    return loss


def _run_backward(table: _Table, scale: float, grad: Tensor) -> list[Tensor]:
    keep_while_captured(table, grad.device)
    flat = torch.empty(table.flat_length, dtype=table.dtype, device=grad.device)
    launch(
        _l2_init_loss_bwd_kernel,
        table.chunks.shape[0],
        (flat, table.chunks, grad),
        (scale,),
        num_warps=CHUNK_WARPS,
        COMPUTE=compute_type(table.dtype),
        CHUNK=CHUNK,
    )
    return list(map(flat.as_strided, *table.layouts))


def _l2_init_loss_forward_cuda(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    if not _fits_kernel(params, initial) or not any(param.numel() for param in params):
        return l2_init_loss_forward_eager(params, initial, scale)
    return _run_forward(_table(params, initial), params[0], scale)


def _l2_init_loss_backward_cuda(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    if not _fits_kernel(params, initial) or not any(param.numel() for param in params):
        return l2_init_loss_backward_eager(params, initial, scale, grad)
    return _run_backward(_table(params, initial), scale, grad)


def _l2_init_loss_forward_native(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    if params[0].dtype not in NATIVE_DTYPES or not _fits_kernel(params, initial):
        return l2_init_loss_forward_eager(params, initial, scale)
    return torch.ops.metta_fastagent_native.l2_init_loss_forward.default(params, initial, scale)


def _l2_init_loss_backward_native(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    if params[0].dtype not in NATIVE_DTYPES or not _fits_kernel(params, initial):
        return l2_init_loss_backward_eager(params, initial, scale, grad)
    return torch.ops.metta_fastagent_native.l2_init_loss_backward.default(params, initial, scale, grad)


def l2_init_loss_forward_eager(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    """The 0-dim float32 loss in plain PyTorch."""
    total = params[0].new_zeros((), dtype=torch.float64 if params[0].device.type == "cpu" else torch.float32)
    for param, start in zip(params, initial, strict=True):
        difference = param.to(compute_dtype(param.dtype)) - start
        total = total + difference.square().sum()
    return (total * scale).to(torch.float32)


def l2_init_loss_backward_eager(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    """Gradient of each weight in plain PyTorch."""
    factor = 2.0 * scale * grad
    return [
        ((param.to(compute_dtype(param.dtype)) - start) * factor).to(param.dtype)
        for param, start in zip(params, initial, strict=True)
    ]


_l2_init_loss_forward = register(
    "l2_init_loss_forward(Tensor[] params, Tensor[] initial, float scale) -> Tensor",
    l2_init_loss_forward_eager,
    lambda params, initial, scale: params[0].new_empty((), dtype=torch.float32),
    _l2_init_loss_forward_cuda,
    _l2_init_loss_forward_native,
)
_l2_init_loss_backward = register(
    "l2_init_loss_backward(Tensor[] params, Tensor[] initial, float scale, Tensor grad) -> Tensor[]",
    l2_init_loss_backward_eager,
    lambda params, initial, scale, grad: [torch.empty_like(param) for param in params],
    _l2_init_loss_backward_cuda,
    _l2_init_loss_backward_native,
)


class _L2InitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: float, count: int, *tensors: Tensor):
        ctx.scale, ctx.count, ctx.backend = scale, count, chosen_backend()
        ctx.save_for_backward(*tensors)
        return _l2_init_loss_forward(list(tensors[:count]), list(tensors[count:]), scale)

    @staticmethod
    def backward(ctx, grad):
        params, initial = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
        if needs_graph():
            grads = l2_init_loss_backward_eager(params, initial, ctx.scale, grad)
        else:
            grads = run_backward(ctx.backend, _l2_init_loss_backward, params, initial, ctx.scale, grad)
        return None, None, *grads, *([None] * ctx.count)


class _PlannedL2InitLoss(torch.autograd.Function):
    """`_L2InitLoss` by a plan. It compares versions itself: 400 saved tensors take longer than the rest."""

    @staticmethod
    def forward(ctx, table: _Table, initial: Sequence[Tensor], scale: float, *params: Tensor):
        ctx.table, ctx.scale, ctx.initial, ctx.params = table, scale, initial, params
        ctx.versions = _versions(params), _versions(initial)
        return _run_forward(table, params[0], scale)

    @staticmethod
    def backward(ctx, grad):
        if ctx.versions != (_versions(ctx.params), _versions(ctx.initial)):
            raise RuntimeError(
                "l2_init_loss: a weight or an initial value was modified in place between forward and backward; "
                "clone it first, or call backward before the change"
            )
        if needs_graph():
            grads = l2_init_loss_backward_eager(ctx.params, ctx.initial, ctx.scale, grad)
        else:
            grads = _run_backward(ctx.table, ctx.scale, grad)
        return None, None, None, *grads


def _can_run(table: _Table, params: Sequence[Tensor]) -> bool:
    return table.dtype == params[0].dtype and not needs_operator() and uses_triton(params[0].device)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_VERSION, tensors))


def l2_init_loss(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Scaled sum of squared differences between weights and their initial values.

    Args:
        params: floating-point tensors of any shapes, all on one device; with DTensors among them, every rank of their
            mesh has to take part in the call.
        initial: tensors of the same shapes on the same device, one for each of `params`; no gradient flows to them.
        scale: factor of the sum.

    Returns:
        0-dim float32 tensor, differentiable any number of times with respect to `params`. Without tensors: 0.

    Raises:
        TypeError: a tensor does not hold floating-point numbers, or `scale` is not a number.
        ValueError: the two lists differ in length, or a pair of tensors in shape or device.
    """
    table = None if torch.compiler.is_compiling() else planned("l2_init_loss", [*params, *initial])
    if table is not None and type(scale) is float and _can_run(table, params):
        return _PlannedL2InitLoss.apply(table, initial, scale, *params)
    if len(params) != len(initial):
        raise ValueError(f"initial: got {len(initial)} tensors, expected {len(params)}, one for each of params")
    scale = require_number("scale", scale, "a number")
    for position, (param, start) in enumerate(zip(params, initial, strict=True)):
        for name, tensor in (("params", param), ("initial", start)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                require_floating_point(f"{name}[{position}]", tensor)
        if param.shape != start.shape or param.device != start.device or param.device != params[0].device:
            raise ValueError(
                f"initial[{position}]: got {describe(start)} for {describe(param)}; "
                f"expected the same shape, and every tensor on {params[0].device}"
            )
    if not params:
        return torch.zeros((), dtype=torch.float32)
    if any(map(is_sharded, params)):
        losses = [full(l2_init_loss_forward_eager([p], [s], scale)) for p, s in zip(params, initial, strict=True)]
        return torch.stack(losses).sum()
    if in_plain_pytorch():
        return l2_init_loss_forward_eager(params, initial, scale)
    if not needs_operator(*params, *initial) and uses_triton(params[0].device) and _fits_kernel(params, initial):
        keep_plan("l2_init_loss", [*params, *initial], _table(params, initial))
    return _L2InitLoss.apply(scale, len(params), *params, *initial)
