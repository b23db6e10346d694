"""Shared by the tests of the operations: one table of tolerances, compilation, and the form of an error message."""

import re

import pytest
import torch

# The result is computed in float32 (float64 for float64) and rounded once; the absolute part is for values near zero.
TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 2e-6},
}


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """`actual` has this dtype and is, within its tolerance, the float64 tensor `expected` rounded to it."""
    assert actual.dtype == dtype
    assert expected.dtype == torch.float64
    rounded = expected.to(dtype).double()
    expected = torch.where(rounded.isinf(), rounded, expected)
    torch.testing.assert_close(actual.double(), expected, equal_nan=True, **TOLERANCES[dtype])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


@pytest.fixture
def assert_close():
    return _assert_close


def _categorical(logits: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shifted = logits - logits.detach().max(dim=-1, keepdim=True).values
    full_log_probs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    information = full_log_probs.masked_fill(full_log_probs == -torch.inf, 0.0)
    entropy = -(full_log_probs.exp() * information).sum(-1)
    return full_log_probs[torch.arange(len(index)), index], entropy, full_log_probs


@pytest.fixture
def categorical():
    """(log_prob, entropy, full_log_probs) of float64 logits, differentiable by autograd; a term with p = 0 counts 0."""
    return _categorical


@pytest.fixture
def check_categorical():
    """Compares (index, log_prob, entropy, full_log_probs) of a function of logits with the reference.

    So too the gradient of the logits, for random upstream gradients on the outputs that `subset` names (0: log_prob).
    """

    def check(function, logits, subset=(0, 1, 2)):
        dtype = logits.dtype
        logits, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
        index, *outputs = function(logits)
        expected = _categorical(exact, index)
        for output, value in zip(outputs, expected, strict=True):
            _assert_close(output, value.detach(), dtype)
        upstream = [torch.randn(outputs[i].shape, dtype=torch.float64).to(dtype) for i in subset]
        (grad,) = torch.autograd.grad([outputs[i] for i in subset], logits, upstream)
        (wanted,) = torch.autograd.grad([expected[i] for i in subset], exact, [g.double() for g in upstream])
        _assert_close(grad, wanted, dtype)

    return check


@pytest.fixture
def compile_fullgraph():
    """torch.compile into one graph, forward and backward, with PyTorch's own operators behind it."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def refuses():
    """A context that expects an error which names the argument, then what came, then what was expected."""

    def context(error: type[Exception], argument: str, came: str, expected: str):
        return pytest.raises(
            error, match=rf"^{re.escape(argument)}: .*{re.escape(came)}.*expected.*{re.escape(expected)}"
        )

    return context
