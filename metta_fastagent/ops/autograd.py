"""Autograd around the operators: gradients of gradients, torch.func, and the backend of a backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metta_fastagent.runtime.dispatch import requested, use_backend


def in_plain_pytorch() -> bool:
    """Whether a call may only use PyTorch's own operators.

    True under a torch.func transform (grad, vmap, ...), in forward-mode differentiation, and in non-strict torch.export
    with backend "eager", so that converters find no operator of this package.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and requested() == "eager"
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def checks_values(tensor: Tensor) -> bool:
    """Whether values may be read: the tensor is on the CPU, and neither a transform nor torch.export hides them."""
    return tensor.device.type == "cpu" and not in_plain_pytorch()


def needs_graph() -> bool:
    """Whether a backward must itself be differentiable (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def records_graph(*tensors: Tensor) -> bool:
    """Whether autograd must record an operation on these tensors."""
    if not torch.is_grad_enabled():
        return False
    # A loop, because any() of a generator costs three times as much.
    for tensor in tensors:  # noqa: SIM110
        if tensor.requires_grad:
            return True
    return False


def chosen_backend() -> str:
    """The requested backend, for `run_backward`."""
    return "auto" if torch.compiler.is_compiling() else requested()


def run_backward(backend: str, function: Callable, *args: Any) -> Any:
    """Call `function(*args)` with the forward's backend, which autograd's own threads do not inherit."""
    if torch.compiler.is_compiling() or backend == requested():
        return function(*args)
    with use_backend(backend):
        return function(*args)


def gradients_with_graph(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` in plain PyTorch, differentiable in the inputs and the upstream gradients."""
    used = [(output, grad) for output, grad in zip(function(*inputs), grads, strict=True) if grad is not None]
    outputs, upstream = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, upstream, create_graph=True)


class _Refusal(torch.autograd.Function):
    """A gradient that depends on `sources` and raises an error when differentiated."""

    @staticmethod
    def forward(ctx, message: str, grad: Tensor, *sources: Tensor | None):
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(ctx.message)


def refuse_second_derivative(
    name: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients, computed from `sources`; differentiating them raises a RuntimeError."""
    message = f"{name}: got a second derivative, expected first derivatives only; torch.func supports higher ones"
    return [None if grad is None else _Refusal.apply(message, grad, *sources) for grad in grads]
