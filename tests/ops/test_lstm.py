"""All layers of an nn.LSTM with resets: against the module itself, and against a loop over its steps in float64."""

import copy
import functools

import pytest
import torch
from references import STATE_TOLERANCES, assert_close, without
from torch import nn
from torch.nn.utils import rnn

from metta_fastagent import lstm
from metta_fastagent.runtime import triton
from metta_fastagent.runtime.dispatch import uses_triton

STEPS, ROWS, INPUT, HIDDEN = 6, 8, 4, 7
# Triton's interpreter is slow.
LAYERS = pytest.mark.parametrize("layers", [2] if triton.INTERPRETED else [1, 2, 3])
BIAS = pytest.mark.parametrize("bias", [True, False])
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def float32_in_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make(layers=2, bias=True, batch_first=False, steps=STEPS, **options):
    """A module, its inputs, its state and resets, float64 on the CPU; row 0 is reset throughout and row 1 never."""
    module = nn.LSTM(INPUT, HIDDEN, layers, bias, batch_first, dtype=torch.float64, **options)
    inputs = torch.randn(steps, ROWS, INPUT, dtype=torch.float64)
    state = tuple(torch.randn(2, layers, ROWS, HIDDEN, dtype=torch.float64))
    resets = torch.rand(steps, ROWS) < 0.3
    resets[:, 0], resets[:, 1] = True, False
    if batch_first:
        inputs, resets = inputs.transpose(0, 1).contiguous(), resets.t().contiguous()
    return module, inputs, state, resets


def loop(module, inputs, state, resets):
    """One call of the module for each step, the state zeroed by hand."""
    time, outputs = int(module.batch_first), []
    for step, fresh in zip(inputs.unbind(time), resets.unbind(time), strict=True):
        state = tuple(torch.where(fresh.view(1, -1, 1), 0.0, part) for part in state)
        output, state = module(step.unsqueeze(time), state)
        outputs.append(output.squeeze(time))
    return torch.stack(outputs, time), state


def moved(module, inputs, state, resets, device, dtype):
    """Copies on `device` in `dtype`, the inputs and the state as leaves."""
    leaf = lambda tensor: tensor.detach().to(device, dtype).requires_grad_()  # noqa: E731
    resets = None if resets is None else resets.to(device)
    return copy.deepcopy(module).to(device, dtype), leaf(inputs), tuple(map(leaf, state)), resets


def compare(given, expected_of, device, dtype, autocast=None):
    """Results, and the gradients of the inputs, the state and the weights for random upstream gradients."""
    module, inputs, state, resets = moved(*given, "cpu", torch.float64)
    wanted, wanted_state = expected_of(module, inputs, state, resets)
    leaves = [inputs, *state, *module.parameters()]
    module, inputs, state, resets = moved(*given, device, dtype)
    tolerance = STATE_TOLERANCES.get(autocast) if autocast else None
    wanted = wanted, *wanted_state
    # Last with gradients, which are compared then.
    for grad in (False, True):
        with torch.autocast(device.type, autocast, enabled=autocast is not None), torch.set_grad_enabled(grad):
            output, new_state = lstm(module, inputs, state, resets)
        results = output, *new_state
        for got, want in zip(results, wanted, strict=True):
            assert_close(got, want, autocast or dtype, tolerance=tolerance)
    upstream = [torch.randn_like(want) for want in wanted]
    grads = torch.autograd.grad(
        results,
        [inputs, *state, *module.parameters()],
        [grad.to(got.device, got.dtype) for grad, got in zip(upstream, results, strict=True)],
    )
    for got, want in zip(grads, torch.autograd.grad(wanted, leaves, upstream), strict=True):
        assert_close(got, want, dtype, of_sums=True, tolerance=tolerance)


@DTYPES
@LAYOUTS
@BIAS
@LAYERS
def test_with_resets_it_is_a_loop_over_the_steps(layers, bias, batch_first, dtype, device):
    compare(make(layers, bias, batch_first), loop, device, dtype)


@pytest.mark.parametrize("resets", ["none", "no flag"])
@DTYPES
@LAYOUTS
@BIAS
@LAYERS
def test_without_resets_it_is_the_module(layers, bias, batch_first, dtype, resets, device):
    module, inputs, state, flags = make(layers, bias, batch_first)
    given = module, inputs, state, None if resets == "none" else torch.zeros_like(flags)
    compare(given, lambda module, inputs, state, _: module(inputs, state), device, dtype)


# Triton's interpreter rounds bfloat16 wrongly.
@without("triton-cpu")
@LAYOUTS
@BIAS
@LAYERS
def test_autocast(layers, bias, batch_first, device):
    compare(make(layers, bias, batch_first), loop, device, torch.float32, torch.bfloat16)


@LAYOUTS
def test_a_single_step(batch_first, device):
    compare(make(2, True, batch_first, steps=1), loop, device, torch.float64)


@pytest.mark.parametrize("steps", [1, STEPS])
@LAYOUTS
def test_no_state_is_a_state_of_zeros(batch_first, steps, device):
    module, inputs, state, resets = moved(*make(2, True, batch_first, steps), device, torch.float64)
    output, new_state = lstm(module, inputs, None, resets)
    expected, expected_state = loop(module, inputs, tuple(map(torch.zeros_like, state)), resets)
    torch.testing.assert_close((output, new_state), (expected, expected_state))


class Doubled(nn.LSTM):
    def forward(self, inputs, state=None):
        return super().forward(2 * inputs, state)


def hooked(module):
    module.register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))
    return module


@pytest.mark.parametrize("state", ["given", "none"])
@LAYOUTS
@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_modules_that_compute_something_else(kind, batch_first, state, device):
    module, inputs, start, resets = moved(*make(2, True, batch_first), device, torch.float64)
    if kind == "subclass":
        other = Doubled(INPUT, HIDDEN, 2, True, batch_first, dtype=torch.float64, device=device)
        other.load_state_dict(module.state_dict())
        module = other
    else:
        module = hooked(module)
    results = lstm(module, inputs, start if state == "given" else None, resets)
    start = start if state == "given" else tuple(map(torch.zeros_like, start))
    torch.testing.assert_close(results, loop(module, inputs, start, resets))


def test_dropout_is_that_of_the_module(device):
    module, inputs, state, resets = moved(*make(3, dropout=0.5), device, torch.float64)
    evaluated = lstm(module.eval(), inputs, state, resets)[0]
    trained = lstm(module.train(), inputs, state, resets)[0]
    torch.testing.assert_close(evaluated, loop(module.eval(), inputs, state, resets)[0])
    assert not torch.equal(trained, evaluated)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"module": 3}, TypeError, r"module: got 3 \(int\), expected nn.LSTM"),
        ({"module": nn.GRU(INPUT, HIDDEN)}, TypeError, "module: got GRU, expected nn.LSTM"),
        (
            {"module": nn.LSTM(INPUT, HIDDEN, bidirectional=True)},
            ValueError,
            "module: got bidirectional=True, expected",
        ),
        ({"module": nn.LSTM(INPUT, HIDDEN, proj_size=3)}, ValueError, "module: got proj_size=3, expected"),
        ({"inputs": rnn.pack_sequence([torch.zeros(2, INPUT)])}, TypeError, "inputs: got a PackedSequence, expected"),
        ({"inputs": [0.0]}, TypeError, "inputs: got a list of length 1, expected a tensor"),
        ({"inputs": torch.zeros(ROWS, INPUT)}, ValueError, r"inputs: got .*\[8, 4\].*expected.*\[T, B, input_size\]"),
        ({"inputs": torch.zeros(0, ROWS, INPUT)}, ValueError, "inputs: got .*expected.*T >= 1"),
        ({"inputs": torch.zeros(STEPS, ROWS, 3)}, ValueError, "inputs: got .*expected 4 features"),
        ({"inputs": torch.zeros(STEPS, ROWS, INPUT).double()}, TypeError, "inputs: got a float64.*expected float32"),
        ({"state": torch.zeros(2, 1, ROWS, HIDDEN)}, TypeError, r"state: got .*expected a pair \(h, c\)"),
        ({"state": (None, None)}, TypeError, r"state: got .*expected a pair \(h, c\)"),
        ({"state": (torch.zeros(2, ROWS, HIDDEN),) * 2}, ValueError, r"state\[0\]: got .*expected shape \[1, 8, 7\]"),
        (
            {"state": (torch.zeros(1, ROWS, HIDDEN), torch.zeros(1, ROWS, 3))},
            ValueError,
            r"state\[1\]: got .*expected shape \[1, 8, 7\]",
        ),
        ({"resets": torch.zeros(STEPS, ROWS)}, TypeError, r"resets: got a float32.*expected a bool .*\[6, 8\]"),
        ({"resets": torch.zeros(ROWS, STEPS).bool()}, ValueError, r"resets: got .*\[8, 6\].*expected .*\[6, 8\]"),
        ({"resets": torch.zeros(STEPS, ROWS, device="meta").bool()}, ValueError, "resets: on meta, expected"),
    ],
)
def test_what_is_refused(wrong, error, message):
    given = {
        "module": nn.LSTM(INPUT, HIDDEN),
        "inputs": torch.zeros(STEPS, ROWS, INPUT),
        "state": None,
        "resets": torch.zeros(STEPS, ROWS, dtype=torch.bool),
    }
    with pytest.raises(error, match=f"^{message}"):
        lstm(**(given | wrong))


@BIAS
def test_an_ensemble_by_vmap(bias, device):
    members = [make(bias=bias)[0].to(device) for _ in range(3)]
    inputs, resets = (each.to(device) for each in make()[1::2])
    shared = copy.deepcopy(members[0])

    class Member(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = shared

        def forward(self, inputs):
            return lstm(self.lstm, inputs, None, resets)[0]

    member = Member()
    params, _ = torch.func.stack_module_state(members)
    named = {f"lstm.{name}": each for name, each in params.items()}
    found = torch.vmap(lambda own: torch.func.functional_call(member, own, (inputs,)))(named)
    wanted = torch.stack([lstm(each, inputs, None, resets)[0] for each in members])
    assert_close(found, wanted, torch.float64)


@LAYOUTS
@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("grad", [False, True])
def test_several_resets_reset_the_rows_of_any(steps, grad, batch_first, device):
    given = make(batch_first=batch_first, steps=steps)
    module, inputs, state, resets = moved(*given, device, torch.float32)
    more = torch.rand(resets.shape, device=device) < 0.3
    with torch.set_grad_enabled(grad):
        for flags in ([resets, more], (more, resets, resets), [more]):
            expected = lstm(module, inputs, state, functools.reduce(torch.logical_or, flags))
            torch.testing.assert_close(lstm(module, inputs, state, flags), expected, rtol=0, atol=0)
        torch.testing.assert_close(lstm(module, inputs, state, []), lstm(module, inputs, state), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"^resets: got a float32 tensor"):
        lstm(module, inputs, state, [resets, more.float()])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("size", [7, 130])
def test_in_place(size, layout, steps, device):
    # More rows than a program of the kernel has, and more hidden columns than it computes at a time.
    module, rows = nn.LSTM(INPUT, size, 2).to(device), 19
    inputs, resets = torch.randn(steps, rows, INPUT, device=device), torch.rand(steps, rows, device=device) < 0.3
    state = [torch.randn(2, rows, size, device=device) for _ in range(2)]
    if layout == "transposed":
        state = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in state]
    copies = [part.clone() for part in state]
    with torch.no_grad():
        output, new_state = lstm(module, inputs, state, resets, in_place=True)
        exact, exact_copies = copy.deepcopy(module).double(), [part.double() for part in copies]
        expected, expected_state = loop(exact, inputs.double(), exact_copies, resets)
    for got, want in zip((output, *new_state), (expected, *expected_state), strict=True):
        assert_close(got, want, torch.float32)
    for given, got, before in zip(state, new_state, copies, strict=True):
        assert given is got or torch.equal(given, before)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_state_in_place_that_a_backward_needs(steps, backend, device):
    module, inputs, state, resets = moved(*make(steps=steps), device, torch.float32)
    state = [part.detach().clone() for part in state]
    output, _ = lstm(module, inputs, state, resets)
    with torch.no_grad():
        _, new_state = lstm(module, inputs, state, resets, in_place=True)
    if new_state[0] is state[0]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    else:
        assert backend != "native"
        output.sum().backward()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["one tensor", "overlapping", "with gradient", "inference", "negated"])
def test_a_state_that_cannot_be_overwritten(kind, steps, device):
    if kind == "negated" and uses_triton(device):
        pytest.skip("a kernel reads the memory of a negated view")
    module, inputs, state, resets = moved(*make(steps=steps), device, torch.float32)
    h, c = (part.detach().clone() for part in state)
    if kind == "one tensor":
        h = c
    elif kind == "overlapping":
        whole = torch.randn(3, *h.shape[1:], device=device)
        h, c = whole[:2], whole[1:]
    elif kind == "with gradient":
        h.requires_grad_()
    elif kind == "inference":
        with torch.inference_mode():
            h, c = h.clone(), c.clone()
    else:
        h, c = torch._neg_view(h), torch._neg_view(c)
    before = h.detach().clone(), c.detach().clone()
    with torch.no_grad():
        expected = lstm(module, inputs, before, resets)
        output, new_state = lstm(module, inputs, (h, c), resets, in_place=True)
    torch.testing.assert_close((output, new_state), expected, rtol=0, atol=0)
    assert torch.equal(h, before[0]) and torch.equal(c, before[1])
    assert not new_state[0].requires_grad and not new_state[0].is_inference()


def test_a_module_whose_weights_do_not_fit(device):
    module, inputs, state, resets = moved(*make(1), device, torch.float32)
    module.weight_hh_l0.data = torch.zeros(4 * HIDDEN, HIDDEN + 1, device=device)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^weight_hh: got .*expected a float32 tensor of shape"):
        lstm(module, inputs, state, resets)


@pytest.mark.filterwarnings("ignore")
def test_export_with_any_number_of_rows(device):
    module, inputs, state, resets = moved(*make(), device, torch.float32)

    class Segment(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = module

        def forward(self, inputs, h, c, resets):
            return lstm(self.lstm, inputs, (h, c), resets)[0]

    with torch.no_grad():
        given = inputs.detach(), *(part.detach() for part in state), resets
        rows = {1: torch.export.Dim("rows")}
        exported = torch.export.export(Segment(), given, dynamic_shapes=(rows,) * 4).module()
        few = tuple(tensor[:, :3] for tensor in given)
        torch.testing.assert_close(exported(*few), lstm(module, few[0], few[1:3], few[3])[0])
