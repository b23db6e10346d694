"""Linear layers on the CPU by the faster of PyTorch's two libraries for matrix products: its BLAS, or oneDNN.

    output = f(input W^T + b), f the identity, relu or tanh
    d input = d W        d W = d^T input        d b = sum of d        with d = d output f'

PyTorch multiplies float32 matrices with its BLAS. On AMD processors with AVX-512, MKL takes its AVX2 path and oneDNN
its AVX-512 path, which pays off above a certain size. The choice, made by `LIMITS`, depends only on the processor, the
BLAS and the shapes, so a repeated call takes the same path. METTA_FASTAGENT_PRODUCTS=blas turns oneDNN off, =onednn
uses it for every product that it supports, and the eager backend never uses it. Then one pass of a C++ operator adds
the bias, unless oneDNN has, and applies the activation in place.
"""

import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metta_fastagent.ops import autograd
from metta_fastagent.ops.activations import activate_, activates_in_place
from metta_fastagent.ops.dtypes import without_autocast
from metta_fastagent.runtime.checks import own_computation
from metta_fastagent.runtime.dispatch import needs_operator, requested, uses_triton

VARIABLE = "METTA_FASTAGENT_PRODUCTS"
CHOICES = ("auto", "blas", "onednn")
# PyTorch's operator is private: `_operator` checks that it has this schema.
_SCHEMA = "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"


class Limits(NamedTuple):
    """Floating-point operations of the smallest product that goes to oneDNN."""

    layer: float  # forward and the gradient of the input
    weight: float  # the gradient of the weight


NEVER, ALWAYS = Limits(math.inf, math.inf), Limits(0, 0)
# By family of AMD processors with AVX-512, measured against MKL on one thread. AVX2 also reaches the peak of Zen 4
# (25): oneDNN gains up to a seventh from 16 million on, and is slower at weight gradients. From Zen 5 (26) on it takes
# as little as 0.4 of the time; below 2 million, its call costs what it gains.
LIMITS = {25: Limits(2**24, math.inf), 26: Limits(2e6, 2e6)}
# Products narrower than a vector are memory-bound.
NARROWEST = 16
# With fewer results, separate passes for bias and activation cost less than the checks before a single one: a product
# has evicted the interpreter from the caches. PyTorch's tanh is slow on AMD.
FEWEST_RESULTS = {"relu": 2**18, "tanh": 2**15}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`F.linear` and an activation: "none", "relu" or "tanh".

    Args:
        input: tensor [..., K].
        weight: tensor [N, K].
        bias: tensor [N], or None.
        activation: "none", "relu" or "tanh".

    Returns:
        Tensor [..., N], differentiable any number of times.

    Raises:
        ValueError: `activation` is none of these.

    Example:
        >>> linear(torch.randn(4, 3), torch.randn(5, 3), activation="relu").shape
        torch.Size([4, 5])
    """
    activate = _activation(activation)
    library = _library(input, weight, bias, activation)
    if library is None:
        return activate(F.linear(input, weight, bias))
    if autograd.records_graph(input, weight, *(() if bias is None else (bias,))):
        return _Linear.apply(input, weight, bias, activation, library)
    return _forward(input, weight, bias, activation, library)


def linear_layer(layer: nn.Linear, input: Tensor, activation: str = "none") -> Tensor:
    """`activation(layer(input))` by `linear`.

    Args:
        layer: `nn.Linear`; one with hooks, a parametrization or its own forward is called as it is.
        input: tensor [..., layer.in_features].
        activation: "none", "relu" or "tanh".

    Returns:
        Tensor [..., layer.out_features], differentiable any number of times.

    Example:
        >>> linear_layer(nn.Linear(3, 5), torch.randn(4, 3), "relu").shape
        torch.Size([4, 5])
    """
    if own_computation(layer, nn.Linear):
        return _activation(activation)(layer(input))
    return linear(input, layer.weight, layer.bias, activation)


def weight_gradient(grad: Tensor, input: Tensor) -> Tensor:
    """grad^T input [N, K] from grad [M, N] and input [M, K], in their dtype, under autocast too."""
    if _served("weight", grad.t(), input.t()):
        return _onednn(grad.t(), input.t())
    with without_autocast(grad.device):
        return grad.t() @ input


class _Linear(torch.autograd.Function):
    """A linear layer and its activation; saves the result, not the pre-activation, which no gradient needs."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, library: str):
        output = _forward(input, weight, bias, activation, library)
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            input if needs_weight else None, weight if needs_input else None, output if activation != "none" else None
        )
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx, *grads):
        input, weight, output = ctx.saved_tensors
        (grad,) = grads
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if ctx.activation == "relu":
            grad = torch.ops.aten.threshold_backward.default(grad, output, 0)
        elif ctx.activation == "tanh":
            grad = torch.ops.aten.tanh_backward.default(grad, output)
        rows = _matrix(grad)
        grad_input = grad_weight = None
        if needs_input:
            by_onednn = not autograd.needs_graph() and _served("layer", grad, weight.t())
            grad_input = _onednn(grad, weight.t()) if by_onednn else grad @ weight
        if needs_weight:
            columns = _matrix(input)
            grad_weight = rows.t() @ columns if autograd.needs_graph() else weight_gradient(rows, columns)
        return grad_input, grad_weight, rows.sum(0) if needs_bias else None, None, None


_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "tanh": torch.tanh}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _library(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> str | None:
    """What makes the product in `_forward`: "cublas", "onednn" or "blas"; None for PyTorch's operators in turn."""
    # Sizes may be symbols or tensors there.
    if torch.compiler.is_compiling() or torch._C._is_tracing() or input.dim() < 2 or weight.dim() != 2:
        return None
    if uses_triton(input.device):
        # PyTorch's operator for product, bias and relu in one launch.
        library = "cublas" if activation == "relu" and bias is not None and input.dim() == 2 else None
    elif _pays("layer", input, weight):
        library = "onednn"
    elif activation != "none" and _rows(input) * weight.shape[0] >= FEWEST_RESULTS[activation]:
        library = "blas" if activates_in_place(input) else None
    else:
        return None
    return library if library and _is_plain(input, weight, bias) else None


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, library: str) -> Tensor:
    if library == "cublas":
        return torch.ops.aten._addmm_activation.default(bias, input, weight.t())
    if library == "onednn":
        # oneDNN's own relu would turn NaN into 0.
        output, bias = _onednn(input, weight, bias), None
        if activation == "none" or not activates_in_place(output):
            return _ACTIVATIONS[activation](output)
    else:
        # The activation's pass adds the bias too: F.linear would first write it everywhere.
        output = F.linear(input, weight)
    activate_(output, None if bias is None else bias.contiguous(), activation)
    return output


def _served(kind: str, input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product of input [..., K] and weight [N, K] transposed."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not _pays(kind, input, weight):
        return False
    # A batch of gradients (`is_grads_batched`) has a hidden dimension, which oneDNN would misread.
    batched = torch._C._functorch.is_legacy_batchedtensor(input)  # pyright: ignore[reportAttributeAccessIssue]
    return not batched and _is_plain(input, weight, None)


def _pays(kind: str, input: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN supports the product and is the faster library."""
    smallest = getattr(limits(), kind)
    if smallest == math.inf or input.dtype != torch.float32 or input.device.type != "cpu":
        return False
    operations, narrowest = 2 * input.numel() * weight.shape[0], min(*weight.shape, input.shape[-1], _rows(input))
    if operations < smallest or narrowest < (NARROWEST if smallest else 1):
        return False
    return requested() != "eager" and torch._C._get_mkldnn_enabled() and _operator() is not None


def _rows(input: Tensor) -> int:
    return input.shape[:-1].numel()


def _matrix(input: Tensor) -> Tensor:
    # `flatten` has no rule for batches of gradients, and -1 would be ambiguous without elements.
    return input.reshape(_rows(input), input.shape[-1])


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether F.linear would only multiply and add: fitting shapes, one dtype and device, and nobody watches."""
    if input.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    for tensor in (weight,) if bias is None else (weight, bias):
        if tensor.dtype != input.dtype or tensor.device != input.device or tensor.layout != torch.strided:
            return False
    watched = torch.is_autocast_enabled(input.device.type) or needs_operator(input, weight, bias)
    return input.layout == torch.strided and not watched


def _onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # It would read a strided bias as if it were contiguous.
    return _operator()(input, weight, None if bias is None else bias.contiguous(), "none", [], "")


@cache
def _operator() -> Any:
    """PyTorch's oneDNN linear layer; None if this PyTorch has none that works as expected."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        if not str(operator._schema).endswith(_SCHEMA):
            return None
        x = torch.arange(12, dtype=torch.float32, device="cpu").view(3, 4)
        w, b = x[:2] + 1, 10 - x[0, :2] * 70
        right = torch.equal(operator(x, w, b, "none", [], ""), F.linear(x, w, b))
    except (AttributeError, RuntimeError):
        return None
    return operator if right else None


@cache
def limits() -> Limits:
    """The limits of this process.

    Raises:
        ValueError: METTA_FASTAGENT_PRODUCTS is not one of CHOICES.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}: got {choice!r}, expected one of {', '.join(CHOICES)}")
    return limits_of(*_processor()) if choice == "auto" else {"blas": NEVER, "onednn": ALWAYS}[choice]


def limits_of(vendor: str, family: int, instructions: str, blas: str) -> Limits:
    """The limits for a processor, given its names in /proc/cpuinfo, PyTorch's CPU capability and its BLAS."""
    if vendor != "AuthenticAMD" or instructions != "AVX512" or blas != "mkl":
        return NEVER
    return LIMITS.get(min(family, max(LIMITS)), NEVER)


def _processor() -> tuple[str, int, str, str]:
    """The arguments of `limits_of` for this machine; empty where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    known = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    family = known.get("cpu family", "")
    blas = "mkl" if torch.backends.mkl.is_available() else ""
    instructions = torch.backends.cpu.get_cpu_capability()
    return known.get("vendor_id", ""), int(family) if family.isdigit() else 0, instructions, blas
