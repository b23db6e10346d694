"""L2 distance of the weights to their initial values: L2-init regularisation.

    loss = scale * sum_i sum((param_i - initial_i)^2)                 d param_i = 2 scale (param_i - initial_i) * d loss

Source: Kumar, Marklund and Van Roy, "Maintaining Plasticity in Continual Learning via Regenerative Regularization"
(2023). Squares are summed in float32 (float64 for float64 weights) and the loss is float32 for every dtype.
"""

# pyright: reportInvalidTypeForm=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metta_fastagent._dispatch import register
from metta_fastagent._triton import compute_type, device_guard, jit, next_power_of_2, tl
from metta_fastagent.ops._autograd import chosen_backend, in_plain_pytorch, needs_graph, run_backward
from metta_fastagent.ops._checks import NATIVE_DTYPES, compute_dtype, describe, require_floating_point, require_number
from metta_fastagent.ops._chunk_table import CHUNK, CHUNK_WARPS, cached, chunk_rows, is_dense, upload
from metta_fastagent.ops._sharded import full, is_sharded

# Partial sums that the last program adds at a time.
PARTIALS_BLOCK = 1024
# Every tensor's part of the flat gradient starts on a 16-byte address.
FLAT_ALIGNMENT = 16


class _Table(NamedTuple):
    chunks: Tensor  # [chunks, 4] int64: address of the weight, of its initial value, length, place in the flat gradient
    partials: Tensor  # [chunks] float64, scratch
    counter: Tensor  # [1] int32, 0 between launches
    places: list[int]  # first element of each tensor in the flat gradient
    flat_length: int


@jit
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
    param = tl.load(chunks + chunk * 4).to(example.dtype)
    initial = tl.load(chunks + chunk * 4 + 1).to(example.dtype)
    length = tl.load(chunks + chunk * 4 + 2)
    offset = tl.arange(0, CHUNK)
    inside = offset < length
    difference = tl.load(param + offset, mask=inside, other=0.0).to(COMPUTE)
    difference -= tl.load(initial + offset, mask=inside, other=0.0).to(COMPUTE)
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
    param = tl.load(chunks + chunk * 4).to(flat.dtype)
    initial = tl.load(chunks + chunk * 4 + 1).to(flat.dtype)
    length = tl.load(chunks + chunk * 4 + 2)
    place = tl.load(chunks + chunk * 4 + 3)
    offset = tl.arange(0, CHUNK)
    inside = offset < length
    difference = tl.load(param + offset, mask=inside, other=0.0).to(COMPUTE)
    difference -= tl.load(initial + offset, mask=inside, other=0.0).to(COMPUTE)
    factor = (2.0 * scale * tl.load(grad)).to(COMPUTE)
    tl.store(flat + place + offset, (difference * factor).to(flat.dtype.element_ty), mask=inside)


def _fits_kernel(params: Sequence[Tensor], initial: Sequence[Tensor]) -> bool:
    """One dtype for all, and each pair laid out alike without gaps."""
    return all(
        param.dtype == start.dtype == params[0].dtype and param.stride() == start.stride() and is_dense(param)
        for param, start in zip(params, initial, strict=True)
    )


def _table(params: Sequence[Tensor], initial: Sequence[Tensor]) -> _Table:
    device, dtype = params[0].device, params[0].dtype
    # The scratch is used by one launch at a time: each stream has its own.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = ("l2", device, dtype, stream, *[t.data_ptr() for t in (*params, *initial)], *[t.numel() for t in params])
    return cached(key, lambda: _make_table(params, initial), device)


def _make_table(params: Sequence[Tensor], initial: Sequence[Tensor]) -> _Table:
    size, device = params[0].element_size(), params[0].device
    step = FLAT_ALIGNMENT // size
    places, end = [], 0
    for param in params:
        places.append(end)
        end += -(-param.numel() // step) * step
    chunks = [
        (params[i].data_ptr() + first * size, initial[i].data_ptr() + first * size, length, places[i] + first)
        for i, first, length in chunk_rows(params)
    ]
    return _Table(
        upload(chunks, torch.int64, device),
        torch.empty(len(chunks), dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        places,
        end,
    )


def _l2_init_loss_forward_cuda(params: Sequence[Tensor], initial: Sequence[Tensor], scale: float) -> Tensor:
    if not _fits_kernel(params, initial) or not any(param.numel() for param in params):
        return l2_init_loss_forward_eager(params, initial, scale)
    table = _table(params, initial)
    loss = torch.empty((), dtype=torch.float32, device=params[0].device)
    num_chunks = table.partials.numel()
    with device_guard(params[0]):
        _l2_init_loss_fwd_kernel[(num_chunks,)](
            params[0],
            table.chunks,
            table.partials,
            table.counter,
            loss,
            num_chunks,
            scale,
            COMPUTE=compute_type(params[0].dtype),
            CHUNK=CHUNK,
            PARTIALS_BLOCK=min(PARTIALS_BLOCK, next_power_of_2(num_chunks)),
            num_warps=CHUNK_WARPS,
        )
    return loss


def _l2_init_loss_backward_cuda(
    params: Sequence[Tensor], initial: Sequence[Tensor], scale: float, grad: Tensor
) -> list[Tensor]:
    if not _fits_kernel(params, initial) or not any(param.numel() for param in params):
        return l2_init_loss_backward_eager(params, initial, scale, grad)
    table = _table(params, initial)
    flat = torch.empty(table.flat_length, dtype=params[0].dtype, device=params[0].device)
    with device_guard(params[0]):
        _l2_init_loss_bwd_kernel[(table.partials.numel(),)](
            flat,
            table.chunks,
            grad,
            scale,
            COMPUTE=compute_type(params[0].dtype),
            CHUNK=CHUNK,
            num_warps=CHUNK_WARPS,
        )
    return [
        flat.as_strided(param.shape, param.stride(), place) for param, place in zip(params, table.places, strict=True)
    ]


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
    if len(params) != len(initial):
        raise ValueError(f"initial: got {len(initial)} tensors, expected {len(params)}, one for each of params")
    scale = require_number("scale", scale, "a number")
    for position, (param, start) in enumerate(zip(params, initial, strict=True)):
        require_floating_point(f"params[{position}]", param)
        require_floating_point(f"initial[{position}]", start)
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
    return _L2InitLoss.apply(scale, len(params), *params, *initial)
