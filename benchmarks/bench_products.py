"""The matrix products of Fast and the LSTM: a linear layer with relu, and the gradients of a layer's input and weight.

`upstream` is PyTorch's BLAS. `onednn` sends every product to oneDNN; the package chooses by `ops/products.py`. The
square product shows what the processor reaches at best. On CUDA every product is cuBLAS's.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Size, choose, parametrized, shapes
from metta_fastagent import ops
from metta_fastagent.ops import products

KINDS = ("linear layer with relu", "gradient of a layer's input", "gradient of a layer's weight")
PROVIDERS = ("upstream", "onednn", "eager", "native", "triton")
SHAPES = shapes(
    "rows inputs outputs",
    quick=[(512, 128, 512)],
    full=[
        (1024, 64, 128),
        (1024, 128, 128),
        (1024, 128, 512),
        (1024, 128, 1024),
        (1024, 512, 16),
        (1024, 576, 64),
        (1024, 1024, 1024),
    ],
    gpu=[(65536, 128, 1024)],
)


def upstream(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """PyTorch's operators in turn."""
    output = F.linear(x, weight, bias)
    return F.relu(output) if activation == "relu" else output


def by_onednn(call: Callable[[], Any]) -> Any:
    """The call's result, with every product sent to oneDNN."""
    rule, products.limits = products.limits, lambda: products.ALWAYS
    try:
        return call()
    finally:
        products.limits = rule


def make_case(kind: str, size: Size, device: torch.device) -> Case:
    rows, inputs, outputs = size["rows"], size["inputs"], size["outputs"]
    torch.manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape).to(device) for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )

    def call_of(provider: str) -> Callable[[], Any]:
        layer = choose(provider, {"upstream": upstream}, ops.linear)
        made_by = by_onednn if provider == "onednn" else lambda call: call()
        if kind == KINDS[0]:
            return torch.no_grad()(lambda: made_by(lambda: layer(x, weight, bias, "relu")))
        own = x.detach(), weight.detach()
        leaf = own[KINDS.index(kind) - 1].requires_grad_()
        output = made_by(lambda: layer(*own, bias, "none"))
        return lambda: made_by(lambda: torch.autograd.grad(output, leaf, grad, retain_graph=True))

    return Case(kind, call_of, operations=2 * rows * inputs * outputs, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@parametrized(PROVIDERS, SHAPES)
def test_products(measure, kind):
    measure(functools.partial(make_case, kind))
