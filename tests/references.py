"""Float64 references, one table of tolerances, and helpers for the tests of the operations and of their kernels."""

import os
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from metta_fastagent import backend
from metta_fastagent.ops import raise_if_reported
from metta_fastagent.runtime import triton
from metta_fastagent.runtime.dispatch import requested

# (backend, device) of each implementation that this run of pytest asks for; METTA_FASTAGENT_BACKEND chooses among them.
on_gpu = pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu)
if triton.INTERPRETED:
    IMPLEMENTATIONS = [pytest.param(("triton", "cpu"), id="triton-cpu")]
else:
    chosen = ["eager", "native"] if requested() == "auto" else [requested()]
    IMPLEMENTATIONS = [pytest.param((name, "cpu"), id=name) for name in chosen if name != "triton"]
    IMPLEMENTATIONS += [on_gpu] if requested() != "native" else []


def without(name):
    """Mark tests that one of the implementations does not run."""
    others = [each for each in IMPLEMENTATIONS if each.id != name]
    return pytest.mark.parametrize("implementation", others, indirect=True)


# (rtol, atol): arithmetic is in float32 (float64 for float64) and rounds once; atol is for values near zero.
TOLERANCES = {
    torch.float64: (1e-11, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (2.0**-8, 2e-6),
    torch.float16: (2.0**-10, 2e-6),
}
# A GPU approximates exponentials and logarithms of float32.
KERNEL_TOLERANCE = 2e-5
# A recurrent state of these dtypes is rounded after each step, and the errors of several steps add up.
STATE_TOLERANCES = {torch.bfloat16: 4e-2, torch.float16: 5e-3}

# Kernels run in the emulator, which counts as interpreted, or in Triton's interpreter, which rounds bfloat16 wrongly.
EMULATED = "EMULATE" in os.environ
# How the emulator's instructions may err: not at all, at random by what is documented, or, with some bits more than of
# float32 at hand, as matrix units that truncate their sums.
ARITHMETIC = ["exact", "approximate", "truncated", "truncated, 2 bits more"] if EMULATED else ["exact"]
DTYPES = [dtype for dtype in TOLERANCES if EMULATED or not (triton.INTERPRETED and dtype == torch.bfloat16)]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]

# Three action types with largest parameters 1, 0 and 2.
CUM_MAX_PARAMS = torch.tensor([0, 1, 1, 3])
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]], dtype=torch.int32)

# Of a tensor [N, A].
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "odd address": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@contextmanager
def arithmetic(name):
    """The block computes as this one of ARITHMETIC."""
    if name == "exact":
        yield
        return
    import emulator

    options = {"approximate": 1} if name == "approximate" else {"truncate": 1, "extra_bits": 2 if "2" in name else 0}
    with emulator.option(**options):
        yield


def poison(monkeypatch):
    """Fill fresh memory with NaN (or a wrong integer), so that an output that is written in part only is caught.

    The emulator fills it itself, and sees a kernel read it.
    """
    if EMULATED:
        return

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(-7 if tensor.dtype.is_signed else 1)

        return make_poisoned

    # PyTorch keeps its list of factories from the first use of a device context, which must not see the poisoned ones.
    with torch.device("cpu"):
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@contextmanager
def refuses(message, table=None):
    """The block raises this ValueError, or its kernels have reported it; `table` names the limits of action types."""
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        yield
        raise_if_reported(table, synchronize=True)


def assert_close(actual, expected, dtype, of_sums=False, tolerance=None):
    """`actual` has this dtype and equals the float64 tensor `expected`, rounded to it, within the dtype's tolerance.

    Of sums of many terms the tolerance is relative to the largest one. `tolerance` is both rtol and atol.
    """
    assert (actual.dtype, actual.shape, expected.dtype) == (dtype, expected.shape, torch.float64)
    rtol, atol = TOLERANCES[dtype] if tolerance is None else (tolerance, tolerance)
    if dtype != torch.float64 and backend(actual.device) == "triton":
        rtol, atol = max(rtol, KERNEL_TOLERANCE), max(atol, KERNEL_TOLERANCE)
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu()
    if of_sums:
        rtol, atol = 0.0, rtol * expected.abs().max().clamp(min=1.0).item() if expected.numel() > 0 else 0.0
    rounded = expected.to(dtype).double()
    expected = torch.where(rounded.isinf(), rounded, expected)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def categorical(logits, index, mask=None, temperature=1.0, dtype=torch.float64):
    """(log_prob, entropy, full_log_probs) of float64 logits; a term with p = 0 counts 0.

    `dtype` is that of the operation's logits, whose quotients are rounded as its arithmetic does.
    """
    z = logits / float(temperature)
    if dtype != torch.float64:
        rounded = (logits.detach().float() / torch.tensor(float(temperature))).double()
        z = torch.where(z.isfinite(), z + (rounded - z.detach()), z)
    if mask is not None:
        z = torch.where(mask, z, -torch.inf)
    shifted = z - z.detach().max(dim=-1, keepdim=True).values
    full_log_probs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    information = full_log_probs.masked_fill(full_log_probs == -torch.inf, 0.0)
    entropy = -(full_log_probs.exp() * information).sum(-1)
    return full_log_probs.gather(1, index.unsqueeze(1)).squeeze(1), entropy, full_log_probs


def check_categorical(function, logits, subset=(0, 1, 2), mask=None, temperature=1.0):
    """Compare (index, log_prob, entropy, full_log_probs) of a function of the logits with the reference.

    Then the gradient of the logits, for random upstream gradients of the outputs that `subset` names.
    """
    dtype, device = logits.dtype, logits.device
    exact = logits.detach().cpu().double().requires_grad_()
    logits = logits.detach().requires_grad_()
    index, *outputs = function(logits)
    mask, temperature = (value.cpu() if isinstance(value, torch.Tensor) else value for value in (mask, temperature))
    expected = categorical(exact, index.cpu(), mask, temperature, dtype)
    for output, value in zip(outputs, expected, strict=True):
        assert_close(output, value, dtype)
    upstream = [torch.randn(outputs[i].shape, dtype=torch.float64).to(dtype) for i in subset]
    (grad,) = torch.autograd.grad([outputs[i] for i in subset], logits, [g.to(device) for g in upstream])
    (wanted,) = torch.autograd.grad([expected[i] for i in subset], exact, [g.double() for g in upstream])
    assert_close(grad, wanted, dtype)
    return index, grad


def lstm(projected, weight_hh, h, c, resets=None):
    """(output, last h, last c) of one LSTM layer by the formula of nn.LSTM, step by step; the inputs are float64."""
    outputs = []
    for step, inputs in enumerate(projected):
        if resets is not None:
            h, c = (torch.where(resets[step].unsqueeze(1), 0.0, state) for state in (h, c))
        gate_i, gate_f, gate_g, gate_o = (inputs + h @ weight_hh.t()).chunk(4, dim=1)
        c = gate_f.sigmoid() * c + gate_i.sigmoid() * gate_g.tanh()
        h = gate_o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def lstm_inputs(steps, rows, size, dtype=torch.float64, resets="none", device="cpu"):
    """[projected, weight_hh, h, c] and resets: "none", "no flag", "some" (all of one row), "first" step or "all"."""
    shapes = (steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size)
    scales = (1.0, size**-0.5, 1.0, 1.0)
    inputs = [
        (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    if resets == "none":
        return inputs, None
    flags = torch.full((steps, rows), resets == "all", device=device)
    if resets == "some":
        flags = torch.rand(steps, rows, device=device) < 0.3
        flags[:, :1] = True
    elif resets == "first":
        flags[0] = True
    return inputs, flags


def check_lstm_layer(function, inputs, resets, subset=(0, 1, 2)):
    """Compare `function`'s results, and the gradients for random upstream gradients of those that `subset` names."""
    dtype, device = inputs[0].dtype, inputs[0].device
    tolerance = STATE_TOLERANCES.get(dtype)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    outputs = function(*inputs, resets)
    expected = lstm(*leaves, None if resets is None else resets.cpu())
    for output, value in zip(outputs, expected, strict=True):
        assert_close(output, value, dtype, tolerance=tolerance)
    upstream = [torch.randn(outputs[i].shape).to(dtype) for i in subset]
    grads = torch.autograd.grad([outputs[i] for i in subset], inputs, [g.to(device) for g in upstream])
    wanted = torch.autograd.grad([expected[i] for i in subset], leaves, [g.double() for g in upstream])
    for grad, value in zip(grads, wanted, strict=True):
        assert_close(grad, value, dtype, of_sums=True, tolerance=tolerance)


def random_tokens(rows, count, features, width, height, coordinates="xy"):
    """Most tokens lie in the window and crowd on few cells; the others are any three bytes, or empty."""
    x, y = torch.randint(width, (rows, count)), torch.randint(height, (rows, count))
    inside = torch.stack(
        [
            x * 16 + y if coordinates == "xy" else y * 16 + x,
            torch.randint(min(features, 3), (rows, count)),
            torch.randint(256, (rows, count)),
        ],
        dim=-1,
    )
    kind, anything = torch.rand(rows, count, 1), torch.randint(256, (rows, count, 3))
    return torch.where(kind < 0.6, inside, torch.where(kind < 0.9, anything, 255)).to(torch.uint8)


def token_grid(tokens, scale, width, height, coordinates="xy"):
    """The grid of the tokens, one after the other, in float64; differentiable with respect to `scale`.

    `coordinates` names the axis of a coordinate's high four bits first.
    """
    values = torch.zeros(len(tokens), len(scale), width, height, dtype=torch.float64)
    for row, row_tokens in enumerate(tokens.tolist()):
        for coordinate, feature, value in row_tokens:
            x, y = divmod(coordinate, 16) if coordinates == "xy" else divmod(coordinate, 16)[::-1]
            if coordinate != 255 and x < width and y < height and feature < len(scale):
                values[row, feature, x, y] = value
    return values / scale.cpu().double().view(1, -1, 1, 1)


def tokens_conv2d(tokens, weight, bias, scale, width, height, stride=1, coordinates="xy"):
    """The convolution of the tokens' grid in float64."""
    weight, bias = (None if tensor is None else tensor.cpu().double() for tensor in (weight, bias))
    return F.conv2d(token_grid(tokens, scale, width, height, coordinates), weight, bias, stride)


def l2_init_loss(params, initial, scale):
    """The loss in float64."""
    return scale * sum(((p.double() - start.double()) ** 2).sum() for p, start in zip(params, initial, strict=True))
