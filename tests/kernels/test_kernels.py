"""The Triton kernels alone: edges of their blocks, addresses, plans and reports. tests/ops checks their results too."""

import importlib

import numpy
import pytest
import torch
from references import (
    ARITHMETIC,
    CUM_MAX_PARAMS,
    DTYPES,
    PAIRS,
    arithmetic,
    assert_close,
    check_categorical,
    check_lstm_layer,
    lstm,
    lstm_inputs,
    poison,
    random_tokens,
    token_grid,
)
from references import l2_init_loss as l2_reference
from tensordict import TensorDict

from metta_fastagent import PyTorchAgentMixin, ops
from metta_fastagent.ops.categorical import kernels as categorical
from metta_fastagent.ops.categorical.layouts import MAX_ACTIONS, MAX_COLUMNS, load_tile, pieces_of, store_tile, tile_of
from metta_fastagent.ops.lstm import kernels as lstm_kernels
from metta_fastagent.ops.tensor_lists import plans
from metta_fastagent.runtime import reports, scratch, triton
from metta_fastagent.runtime.triton import tl

# All layouts at their edges, odd sizes, and the largest that is fused.
SIZES = [
    (1, 3),
    (2, 1),
    (3, 127),
    (9, 130),
    (21, 5),
    (MAX_COLUMNS, 3),
    (MAX_COLUMNS, 129),
    (MAX_COLUMNS + 1, 2),
    (32, 65),
    (33, 66),
    (100, 17),
    (129, 5),
    (1000, 3),
    (MAX_ACTIONS, 1),
    (MAX_ACTIONS + 1, 2),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    torch.manual_seed(7)
    poison(monkeypatch)


@triton.jit
def _copy_pieces(source, out, N, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr, PIECE: tl.constexpr):
    pieces = pieces_of(load_tile(source, N, 0.0, A, ROWS, BLOCK_A), A, ROWS, BLOCK_A, PIECE)
    store_tile(out, tile_of(pieces, A, ROWS, BLOCK_A, PIECE), N, A, ROWS, BLOCK_A)


@pytest.mark.parametrize(("actions", "piece"), [(1, 1), (2, 1), (3, 1), (9, 1), (21, 1), (32, 1), (33, 4), (5, 4)])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_pieces_are_stored_in_order_within_the_rows(device, actions, piece, rows):
    source = torch.arange(rows * actions, dtype=torch.float32, device=device)
    out = torch.full((64 * 33 + 64,), -1.0, device=device)
    block = triton.next_power_of_2(actions)
    _copy_pieces[(triton.cdiv(rows, 16),)](source, out, rows, A=actions, ROWS=16, BLOCK_A=block, PIECE=piece)
    assert torch.equal(out[: rows * actions], source)
    assert (out[rows * actions :] == -1).all()


# bfloat16 takes the way of float16.
@pytest.mark.parametrize(("actions", "rows"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_categorical_distributions(device, actions, rows, dtype):
    logits, index = 3 * torch.randn(rows, actions), torch.randint(actions, (rows,), device=device)
    check_categorical(lambda x: (index, *ops.evaluate_actions(x, index, strict=True)), logits.to(device, dtype))
    table = torch.randint(99, (actions, 2), dtype=torch.int32, device=device)
    drawn, *_, pairs = ops.sample_actions(logits.to(device, dtype), table)
    assert torch.equal(pairs, table[drawn])
    check_categorical(ops.sample_actions, logits.to(device, dtype))


@pytest.mark.parametrize("actions", [9, 70])
def test_upstream_gradients_of_any_stride_are_read_in_place(device, actions, monkeypatch):
    logits = torch.randn(130, actions, device=device)
    index = torch.randint(actions, (130,), device=device)
    strided = torch.randn(130, 3, device=device)[:, 1], torch.tensor(0.3, device=device).expand(130)
    contiguous = [grad.clone() for grad in strided]
    expected = categorical.evaluate_actions_backward_cuda(logits, index, *contiguous, None, None)
    launched, original = [], categorical.launch_with

    def launch_with(constants, kernel, programs, tensors, numbers):
        launched.extend(tensors)
        original(constants, kernel, programs, tensors, numbers)

    monkeypatch.setattr(categorical, "launch_with", launch_with)
    got = categorical.evaluate_actions_backward_cuda(logits, index, *strided, None, None)
    assert torch.equal(got, expected)
    assert all(any(tensor is grad for tensor in launched) for grad in strided)


# A word holds 14 bits of a type or a parameter, 28 of an index.
@pytest.mark.parametrize(
    ("bad", "reported"),
    [
        ([3, 0], "action type 3, parameter 0, expected a type 0 to 2"),
        ([-1, 2], "action type -1, parameter 2, expected a type 0 to 2"),
        ([2**40, -(2**40)], "action type 8191, parameter -8192, expected a type 0 to 2"),
        ([2, 4], "parameter 4 for action type 2, expected 0 to 2"),
        ([0, -5], "parameter -5 for action type 0, expected 0 to 1"),
    ],
)
def test_a_bad_pair_is_reported_once_and_by_each_operation(device, bad, reported):
    table, pairs = CUM_MAX_PARAMS.to(device), torch.tensor([[0, 0], [1, 0], bad, [2, 2]], device=device)
    for name, call in (
        ("evaluate_actions", lambda: ops.evaluate_actions(torch.randn(4, 6, device=device), pairs, table, strict=True)),
        ("action_to_logit_index", lambda: ops.action_to_logit_index(pairs, table)),
    ):
        call()
        with pytest.raises(
            ValueError, match=rf"^{name}: actions\[2\]: got {reported} \(reported by an earlier launch\)"
        ):
            ops.raise_if_reported(table, synchronize=True)
        ops.raise_if_reported(table, synchronize=True)
    call()
    with pytest.raises(
        ValueError, match=r"got action type -?\d+, parameter -?\d+, expected a pair within the action tab"
    ):
        ops.raise_if_reported(synchronize=True)


@pytest.mark.parametrize(("bad", "reported"), [(-1, -1), (9, 9), (10**12, 2**27 - 1), (-(10**12), -(2**27))])
def test_a_bad_index_is_reported_by_each_operation(device, bad, reported):
    index, table = torch.tensor([0, bad, 5], device=device), PAIRS.to(device)
    for where, call in (
        ("evaluate_actions: actions", lambda: ops.evaluate_actions(torch.randn(3, 6, device=device), index)),
        ("logit_index_to_action: index", lambda: ops.logit_index_to_action(index, table)),
    ):
        call()
        with pytest.raises(ValueError, match=rf"^{where}\[1\]: got logit index {reported}, expected one of the act"):
            ops.raise_if_reported(synchronize=True)


@pytest.mark.parametrize("actions", [4, 80])
def test_logits_without_a_distribution_are_reported_by_each_operation(device, actions):
    logits, index = torch.zeros(5, actions, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    logits[3, 1] = torch.nan
    for name, call in (
        ("evaluate_actions", lambda: ops.evaluate_actions(logits, index, strict=True)),
        ("sample_actions", lambda: ops.sample_actions(logits)),
    ):
        call()
        with pytest.raises(ValueError, match=rf"^{name}: logits\[3\]: holds NaN .* \(reported by an earlier launch\)"):
            ops.raise_if_reported(synchronize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_weights_of_any_address(device, dtype):
    sizes = [1, 7, 4096, 10000, 0]
    tensors = [torch.randn(n).to(dtype).to(device) for n in sizes]
    tensors += [torch.randn(9000).to(dtype).to(device)[1:8500], torch.randn(30, 16).to(dtype).to(device).t()]
    tensors += [torch.randn(30, 30).to(dtype).to(device)[:, ::2]]
    tensors[1][2], tensors[2][5], tensors[3][9] = torch.nan, torch.inf, -torch.inf
    bounds = [0.1, 0.25, 0.0, 1.5, 1.0, 0.7, 0.3, 0.4]
    expected = [t.clone().clamp(-b, b) for t, b in zip(tensors, bounds, strict=True)]
    # Parts of a tensor: with single elements, and with whole vectors from a 16-byte address on.
    outside = torch.randn(9000).to(dtype).to(device)
    parts = [outside[10:20], outside[32:64]]
    wanted = outside.clone()
    for part in (wanted[10:20], wanted[32:64]):
        part.clamp_(-0.5, 0.5)
    ops.clip_weights_([*tensors, *parts], [*bounds, 0.5, 0.5])
    for got, want in zip(tensors, expected, strict=True):
        assert torch.equal(got.nan_to_num(99), want.nan_to_num(99))
    assert torch.equal(outside, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_init_loss_of_any_address(device, dtype):
    shapes = [(3,), (70, 90), (1,), (5000,), (5001,), (8, 4, 3, 3)]
    params = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    # Full and odd chunks that start on no 16-byte address.
    params += [torch.randn(8195).to(device, dtype)[1:end].requires_grad_() for end in (8193, 4098, 7)]
    initial = [torch.randn_like(param) for param in params]
    loss = ops.l2_init_loss(params, initial, 0.25)
    expected = l2_reference(params, initial, 0.25)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(2 * expected, params)
    tolerance = {"rtol": 1e-3, "atol": 0} if dtype == torch.float16 else {"rtol": 1e-6, "atol": 1e-7}
    for got, want in zip(torch.autograd.grad(2 * loss, params), wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    assert torch.equal(ops.l2_init_loss(params, initial, 0.25), loss)


# On both sides of the tokens and of the cells that a program takes at a time.
@pytest.mark.parametrize(
    ("features", "width", "height", "count"), [(6, 11, 11, 31), (25, 11, 11, 100), (1, 3, 16, 33), (4, 16, 16, 32)]
)
@pytest.mark.parametrize("coordinates", ["xy", "yx"])
def test_tokens_to_grid(device, features, width, height, count, coordinates):
    tokens, scale = random_tokens(3, count, features, width, height, coordinates), torch.rand(features) * 9 + 1
    grid = ops.tokens_to_grid(tokens.to(device), features, width, height, scale.to(device), coordinates=coordinates)
    assert torch.equal(grid.cpu(), token_grid(tokens, scale, width, height, coordinates).float())


# One block and several, whole and in part, of rows (16, or 32 of many), hidden columns (64) and depth (32, 64 or 128);
# float32 products as they are and, from 3 steps or 17 rows on, of parts.
@pytest.mark.parametrize(
    ("steps", "rows", "size"), [(1, 1, 1), (5, 3, 7), (3, 16, 64), (3, 20, 70), (2, 33, 40), (2, 2, 130), (4, 34, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("resets", ["some", "none"])
def test_lstm_layer(device, steps, rows, size, dtype, resets):
    inputs, flags = lstm_inputs(steps, rows, size, dtype, resets, device)
    check_lstm_layer(ops.lstm_layer, inputs, flags)
    with torch.no_grad():
        # A rollout keeps no gates, and its results are those of training to the last bit.
        rollout = ops.lstm_layer(*inputs, flags)
    assert all(map(torch.equal, rollout, ops.lstm_layer(*(x.requires_grad_() for x in inputs), flags)))


def square_inputs(steps, device):
    """[projected, weight_hh, h, c] of 16 rows and 128 columns, weights as nn.LSTM starts them, and some resets."""
    inputs, resets = lstm_inputs(steps, 16, 128, torch.float32, "some", device)
    inputs[1] = (2 * torch.rand(512, 128, device=device) - 1) / 128**0.5
    return inputs, resets


@pytest.fixture(params=ARITHMETIC)
def exactness(request, device):
    """Largest errors of the hidden state after 64 steps, and of gradients in terms of the largest of them.

    As of float32, or of matrix units that truncate their sums, which NVIDIA's may.
    """
    with arithmetic(request.param):
        yield (2e-6, 1e-5) if device.type == "cuda" or request.param != "exact" else (3e-7, 1e-6)


def test_the_error_of_lstm_layer_in_parts(device, exactness):
    inputs, resets = square_inputs(64, device)
    output = ops.lstm_layer(*inputs, resets)[0]
    assert (output - lstm(*(tensor.double() for tensor in inputs), resets)[0]).abs().max() < exactness[0]


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Products of bfloat16 numbers in Triton's interpreter, which has none, and the kernels that need them there."""
    if not triton.INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, multiply = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        bits = handle.data.astype(numpy.uint32) << 16
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32) if is_bfloat16 else handle

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest))
    monkeypatch.setattr(lstm_kernels, "INTERPRETED", False)


@pytest.mark.parametrize(("steps", "rows", "size"), [(4, 1, 1), (5, 3, 7), (4, 20, 70), (4, 16, 130)])
@pytest.mark.parametrize("resets", ["some", "none"])
def test_lstm_layer_with_gradients_in_parts(device, steps, rows, size, resets, bfloat16_products):
    check_lstm_layer(ops.lstm_layer, *lstm_inputs(steps, rows, size, torch.float32, resets, device))


# As large and as small as float32's exponents allow; float16's do not reach that far.
@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_the_error_of_gradients_in_parts(device, scale, exactness, bfloat16_products):
    inputs, resets = square_inputs(16, device)
    upstream = scale * torch.randn(16, 16, 128, device=device)

    def gradients(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves, resets)[0], leaves, upstream.to(dtype))

    for got, want in zip(gradients(ops.lstm_layer, torch.float32), gradients(lstm, torch.float64), strict=True):
        assert (got - want).abs().max() < exactness[1] * want.abs().max()


# Unscaled, low parts of small numbers would be below float16's range, and high parts of large ones beyond it.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize(
    ("weight_scale", "state_scale"), [(1e-4, 1), (1, 1e-5), (4095, 1e-4), (1e-4, 1024), (1e10, 1e-10), (1e-10, 1e10)]
)
def test_lstm_layer_in_parts_of_small_and_large_numbers(device, weight_scale, state_scale):
    projected, weight_hh, h, c = lstm_inputs(4, 3, 40, torch.float32, device=device)[0]
    inputs = projected, weight_scale * weight_hh.sign(), state_scale * h.sign(), c
    # Later steps multiply large weights with states near 1, whose sums cancel in float32 too.
    output, expected = ops.lstm_layer(*inputs)[0], lstm(*(tensor.cpu().double() for tensor in inputs))[0]
    assert_close(output[0], expected[0], torch.float32)
    assert output.isfinite().all()


@pytest.mark.parametrize(("dtype", "max_hidden"), [(torch.float64, 100), (torch.float32, 6)])
def test_lstm_layer_that_no_kernel_takes_runs_in_eager_pytorch(device, dtype, max_hidden, monkeypatch):
    monkeypatch.setattr(lstm_kernels, "MAX_HIDDEN", max_hidden)
    for name in ("_lstm_layer_fwd_kernel", "_lstm_layer_bwd_kernel"):
        monkeypatch.setattr(lstm_kernels, name, None)
    check_lstm_layer(ops.lstm_layer, *lstm_inputs(3, 4, 7, dtype, "some", device))


def make_agent(device, **kwargs):
    class Agent(PyTorchAgentMixin, torch.nn.Module):
        pass

    agent = Agent()
    agent.init_mixin(**kwargs)
    agent.activate_actions(["noop", "move", "press"], [1, 0, 2], device)
    return agent


def train(agent, pairs):
    logits, value = torch.zeros(len(pairs), 6, device=pairs.device), torch.zeros(len(pairs), 1, device=pairs.device)
    return agent.handle_training_mode(TensorDict({}, batch_size=[len(pairs)]), pairs, logits, value)


@pytest.fixture
def good(device):
    return PAIRS.long().to(device)


@pytest.fixture
def bad(good):
    return good.clone().index_fill_(0, torch.tensor([4], device=good.device), 7)


REPORT = r"actions\[4\]: got action type 7, parameter 7, expected a type 0 to 2"


def test_a_bad_action_is_reported_when_validate_says(device, good, bad):
    deferred, sync, off = (make_agent(device, validate=mode) for mode in ("deferred", "sync", "off"))
    assert train(deferred, bad)["act_log_prob"].isnan().sum() == 1
    torch.cuda.synchronize() if device.type == "cuda" else None
    with pytest.raises(ValueError, match=REPORT):
        train(deferred, good)
    train(deferred, good)
    with pytest.raises(ValueError, match=REPORT):
        train(sync, bad)
    train(off, bad)
    train(off, good)
    with pytest.raises(ValueError, match="parameter 7"):
        ops.raise_if_reported()


@pytest.mark.parametrize("validate", ["deferred", "sync", "off"])
def test_a_report_reaches_the_agent_of_the_call(device, validate, good, bad):
    silent, other = make_agent(device, validate="off"), make_agent(device, validate=validate)
    train(silent, bad)
    ops.action_to_logit_index(bad, other.cum_action_max_params)
    for _ in range(2):
        train(other, good)
    for _ in range(2):
        with pytest.raises(ValueError, match="parameter 7"):
            ops.raise_if_reported(synchronize=True)
    ops.raise_if_reported(synchronize=True)


def test_sync_validation_is_refused_under_capture(monkeypatch):
    reports.words_of(0, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^validate: got 'sync', expected 'deferred' or 'off'"):
        ops.raise_if_reported(synchronize=True)


@pytest.mark.parametrize("change", ["bounds", "address", "member", "dtype", "order"])
def test_a_plan_notices_what_has_changed(device, change):
    tensors = [torch.nn.Parameter(torch.full((n,), 9.0, device=device)) for n in (5, 4100)]
    bounds = [2.0, 3.0]
    for _ in range(2):
        ops.clip_weights_(tensors, bounds)
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(9.0)
    if change == "bounds":
        bounds = [1.0, 4.0]
    elif change == "address":
        tensors[1].data = torch.full((4200,), 9.0, device=device)
    elif change == "member":
        tensors[1] = torch.nn.Parameter(torch.full((70,), 9.0, device=device))
    elif change == "dtype":
        # At the same address.
        for tensor in tensors:
            tensor.data = tensor.data.view(torch.float16).fill_(9.0)
    else:
        tensors.reverse()
    versions = [tensor._version for tensor in tensors]
    ops.clip_weights_(tensors, bounds)
    assert [tensor.unique().tolist() for tensor in tensors] == [[bound] for bound in bounds]
    assert [tensor._version for tensor in tensors] == versions


def test_plans_go_with_their_tensors(device):
    before = len(plans._known)
    tensors = [torch.ones(3, device=device), torch.ones(4, device=device)]
    ops.clip_weights_(tensors, [0.5, 0.5])
    assert len(plans._known) == before + 1
    del tensors[0]
    assert len(plans._known) == before


def test_a_weight_modified_before_the_backward_is_refused(device):
    params = [torch.nn.Parameter(torch.ones(3, 2, device=device)) for _ in range(2)]
    start = [torch.zeros(3, 2, device=device) for _ in range(2)]
    ops.l2_init_loss(params, start, 0.5)
    loss = ops.l2_init_loss(params, start, 0.5)
    assert type(loss.grad_fn).__name__.startswith("_PlannedL2InitLoss")
    # Clipping leaves the version as it is, and the gradient sees the clipped weights.
    ops.clip_weights_(params, [0.25, 0.25])
    assert all(grad.equal(torch.full_like(grad, 0.25)) for grad in torch.autograd.grad(loss, params, retain_graph=True))
    with torch.no_grad():
        params[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_l2_has_scratch_of_its_own_in_each_capture(device, monkeypatch):
    params, start = [torch.full((4100,), 2.0, device=device)], [torch.zeros(4100, device=device)]
    ops.l2_init_loss(params, start)
    before = {key: (id(partials), id(counter)) for key, (partials, counter) in scratch._scratch.items()}
    made = []
    new_scratch = scratch._new_scratch
    monkeypatch.setattr(scratch, "capturing", lambda device: True)
    monkeypatch.setattr(scratch, "_new_scratch", lambda *args: made.append(new_scratch(*args)) or made[-1])
    for _ in range(2):
        assert ops.l2_init_loss(params, start).item() == 4 * 4100
    assert len(made) == 2 and all(counter.item() == 0 for _, counter in made)
    now = {key: (id(partials), id(counter)) for key, (partials, counter) in scratch._scratch.items()}
    assert now == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_list_over_two_devices():
    tensors = [torch.ones(5, device="cuda"), torch.ones(5), torch.ones(5, device="cuda", dtype=torch.float64)]
    for _ in range(2):
        ops.clip_weights_(tensors, [0.5] * 3)
        assert all(tensor.unique().tolist() == [0.5] for tensor in tensors)
