"""Every Triton kernel against float64 references in plain PyTorch, torch.distributions and literal tables."""

import importlib

import numpy
import pytest
import torch
from tensordict import TensorDict

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin, _triton, ops
from metta_fastagent._triton import tl
from metta_fastagent.ops import (
    _bad_action,
    _chunk_table,
    _evaluate_actions,
    _l2_init_loss,
    _lstm_layer,
    _sample_actions,
)
from metta_fastagent.ops._categorical import MAX_ACTIONS, MAX_COLUMNS, load_columns, store_columns

CUM = [0, 0, 3, 6]
PAIRS = [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1], [2, 2], [2, 3]]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Both layouts at their edges, odd sizes, and the largest that is fused.
SIZES = [
    (1, 3),
    (2, 1),
    (3, 127),
    (9, 130),
    (21, 5),
    (31, 128),
    (MAX_COLUMNS, 3),
    (MAX_COLUMNS, 129),
    (MAX_COLUMNS + 1, 65),
    (100, 40),
    (1000, 3),
    (MAX_ACTIONS, 1),
]
# bfloat16 arithmetic and rounding are wrong in the interpreter.
FLOATS = [torch.float32, torch.float64, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN (or -7), so that a kernel that leaves a part of its output unwritten is caught."""

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _original=original, **kwargs: poison(_original(*args, **kwargs)))
    original_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(original_new(*args, **kwargs)))


def close(got, expected, dtype):
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True
    )


def make_logits(rows, actions, device, dtype=torch.float32, masked=False):
    logits = 3 * torch.randn(rows, actions, dtype=torch.float64)
    if masked:
        logits[:, ::3] = -torch.inf
        logits[:, 1] = 0.0
    return logits.to(dtype).to(device)


def reference(logits, index):
    """log_prob, entropy and full log-probabilities in float64; p log p of a masked action counts 0."""
    full = logits.double().log_softmax(-1)
    entropy = -(full.exp() * full.masked_fill(full == -torch.inf, 0)).sum(-1)
    return full.gather(1, index.unsqueeze(1)).squeeze(1), entropy, full


@_triton.jit
def _copy_columns(source, out, N, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    store_columns(out, load_columns(source, row, row < N, A, tl.float32), N, A, ROWS, BLOCK_A)


@pytest.mark.parametrize("actions", [1, 2, 3, 9, 21, 31, 32, 33])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_columns_are_stored_in_order_within_the_rows(device, actions, rows):
    source = torch.arange(rows * actions, dtype=torch.float32, device=device)
    out = torch.full((64 * 33 + 64,), -1.0, device=device)
    block = _triton.next_power_of_2(actions)
    _copy_columns[(_triton.cdiv(rows, 16),)](source, out, rows, A=actions, ROWS=16, BLOCK_A=block)
    assert torch.equal(out[: rows * actions], source)
    assert (out[rows * actions :] == -1).all()


@pytest.mark.parametrize(("actions", "rows"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_evaluate_actions(device, actions, rows, dtype):
    logits = make_logits(rows, actions, device, dtype)
    index = torch.randint(actions, (rows,), device=device)
    for got, expected in zip(ops.evaluate_actions(logits, index), reference(logits, index), strict=True):
        assert got.dtype == dtype
        close(got, expected, dtype)


@pytest.mark.parametrize(("actions", "rows"), [(9, 130), (31, 127), (32, 129), (33, 3), (100, 5)])
@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
def test_evaluate_actions_gradients(device, actions, rows, used):
    logits = make_logits(rows, actions, device, torch.float64).requires_grad_()
    index = torch.randint(actions, (rows,), device=device)
    upstream = [torch.randn_like(output) for output in reference(logits, index)]

    def gradient(outputs):
        chosen = [(o, g) for o, g, use in zip(outputs, upstream, used, strict=True) if use]
        return torch.autograd.grad([o for o, _ in chosen], logits, [g for _, g in chosen])[0]

    close(gradient(ops.evaluate_actions(logits, index)), gradient(reference(logits, index)), torch.float64)


@pytest.mark.parametrize("actions", [9, 70])
def test_upstream_gradients_of_any_stride_are_read_in_place(device, actions, monkeypatch):
    logits = make_logits(130, actions, device)
    index = torch.randint(actions, (130,), device=device)
    strided = torch.randn(130, 3, device=device)[:, 1], torch.tensor(0.3, device=device).expand(130)
    expected = _evaluate_actions._evaluate_actions_backward_cuda(logits, index, *(g.clone() for g in strided), None)
    launched = []

    def launch_rows(*args, **kwargs):
        launched.extend(args[4])
        return original(*args, **kwargs)

    original = _evaluate_actions.launch_rows
    monkeypatch.setattr(_evaluate_actions, "launch_rows", launch_rows)
    got = _evaluate_actions._evaluate_actions_backward_cuda(logits, index, *strided, None)
    assert torch.equal(got, expected)
    assert all(any(tensor is grad for tensor in launched) for grad in strided)


@pytest.mark.parametrize("actions", [5, 70])
def test_evaluate_actions_gradcheck(device, actions):
    logits = make_logits(3, actions, device, torch.float64).requires_grad_()
    index = torch.randint(actions, (3,), device=device)
    assert torch.autograd.gradcheck(lambda x: ops.evaluate_actions(x, index), (logits,))


@pytest.mark.parametrize("actions", [10, 80])
def test_masked_logits_make_no_nan(device, actions):
    logits = make_logits(7, actions, device, masked=True).requires_grad_()
    index = torch.ones(7, dtype=torch.int64, device=device)
    log_prob, entropy, _ = ops.evaluate_actions(logits, index)
    expected = reference(logits, index)
    close(log_prob, expected[0], torch.float32)
    close(entropy, expected[1], torch.float32)
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, ::3] == 0).all()


@pytest.mark.parametrize("actions", [4, 80])
def test_nan_stays_in_its_row(device, actions):
    logits = make_logits(5, actions, device)
    logits[2, 1] = torch.nan
    log_prob, entropy, full = ops.evaluate_actions(logits, torch.zeros(5, dtype=torch.int64, device=device))
    for output in (log_prob, entropy, full.sum(-1)):
        assert output.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_pairs_of_any_integer_dtype(device, integer):
    table = torch.tensor(CUM, device=device)
    pairs = torch.tensor(PAIRS, dtype=integer, device=device)
    assert ops.action_to_logit_index(pairs, table).tolist() == list(range(9))
    logits = make_logits(9, 9, device)
    by_pair, by_index = (
        ops.evaluate_actions(logits, pairs, table),
        ops.evaluate_actions(logits, pairs.new_tensor(range(9))),
    )
    assert all(torch.equal(a, b) for a, b in zip(by_pair, by_index, strict=True))


def test_strided_pairs(device):
    wide = torch.tensor([[t, 9, p] for t, p in PAIRS], device=device)[:, ::2]
    assert ops.action_to_logit_index(wide, torch.tensor(CUM, device=device)).tolist() == list(range(9))
    assert ops.action_to_logit_index(wide.view(3, 3, 2), torch.tensor(CUM, device=device)).shape == (3, 3)


def test_indices_to_pairs(device):
    table = torch.tensor(PAIRS, dtype=torch.int32, device=device)
    index = torch.tensor([[8, 0, 3], [1, 5, 2]], dtype=torch.int16, device=device)
    pairs = ops.logit_index_to_action(index, table)
    assert pairs.dtype == torch.int32
    assert pairs.tolist() == [[[2, 3], [0, 0], [1, 2]], [[1, 0], [2, 0], [1, 1]]]


@pytest.mark.parametrize(
    ("bad", "reported"),
    [
        ([3, 0], "action type 3, parameter 0, expected a type 0 to 2"),
        ([-1, 2], "action type -1, parameter 2, expected a type 0 to 2"),
        ([1, 4], "parameter 4 for action type 1, expected 0 to 3"),
        ([2, -5], "parameter -5 for action type 2, expected 0 to 3"),
    ],
)
def test_a_bad_pair_is_reported_and_harms_nothing(device, bad, reported):
    table = torch.tensor(CUM, device=device)
    pairs = torch.tensor([[0, 0], [1, 1], bad, [2, 2]], device=device)
    logits = make_logits(4, 9, device).requires_grad_()
    log_prob, entropy, _ = ops.evaluate_actions(logits, pairs, table)
    assert log_prob.isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(log_prob.nansum() + entropy.sum(), logits)
    assert (gradient[2] == 0).all()
    assert gradient[[0, 1, 3]].abs().sum() > 0
    with pytest.raises(ValueError, match=r"evaluate_actions: actions\[2\]") as error:
        ops.raise_if_reported(table, synchronize=True)
    assert reported in str(error.value)
    ops.raise_if_reported(table, synchronize=True)
    assert ops.action_to_logit_index(pairs, table).tolist() == [0, 2, -1, 7]
    with pytest.raises(ValueError, match=r"action_to_logit_index: actions\[2\]"):
        ops.raise_if_reported(table, synchronize=True)


@pytest.mark.parametrize("bad", [-1, 9, 10**12])
def test_a_bad_index_is_told_and_harms_nothing(device, bad):
    table = torch.tensor(PAIRS, dtype=torch.int32, device=device)
    index = torch.tensor([0, bad, 8], device=device)
    assert ops.logit_index_to_action(index, table).tolist() == [[0, 0], [-1, -1], [2, 3]]
    with pytest.raises(ValueError, match=r"logit_index_to_action: actions\[1\]: got logit index"):
        ops.raise_if_reported(synchronize=True)
    log_prob, _, _ = ops.evaluate_actions(make_logits(3, 9, device), index)
    assert log_prob.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"evaluate_actions: actions\[1\]: got logit index"):
        ops.raise_if_reported(synchronize=True)


@pytest.mark.parametrize(("actions", "rows"), SIZES)
def test_sample_actions(device, actions, rows):
    logits = make_logits(rows, actions, device)
    table = torch.randint(99, (actions, 2), dtype=torch.int32, device=device)
    index, log_prob, entropy, full, pair = ops.sample_actions(logits, table)
    assert ((index >= 0) & (index < actions)).all()
    assert torch.equal(pair, table[index])
    for got, expected in zip((log_prob, entropy, full), reference(logits, index), strict=True):
        close(got, expected, torch.float32)


@pytest.mark.parametrize("actions", [9, 100])
def test_draws_invert_the_cumulative_distribution(device, actions):
    logits = make_logits(200, actions, device, torch.float64)
    uniform = torch.rand(200, dtype=torch.float64, device=device)
    index = _sample_actions._draw_cuda(logits, None, uniform)[0]
    expected = (logits.softmax(-1).cumsum(-1) > uniform.unsqueeze(1)).int().argmax(-1)
    assert torch.equal(index, expected)


@pytest.mark.parametrize("actions", [3, 9, MAX_COLUMNS, 100, 1000])
@pytest.mark.parametrize("u", [0.0, 1e-38, 1 - 2**-24])
@pytest.mark.parametrize("allowed", ["first", "last", "middle", "some"])
def test_a_forbidden_action_is_never_drawn(device, actions, u, allowed):
    keep = {"first": slice(0, 1), "last": slice(-1, None), "middle": slice(1, 2), "some": slice(1, -1, 2)}[allowed]
    logits = torch.full((130 if actions < 100 else 4, actions), -torch.inf, device=device)
    logits[:, keep] = 20 * torch.randn_like(logits[:, keep])
    index = _sample_actions._draw_cuda(logits, None, torch.full((len(logits),), u, device=device))[0]
    assert logits.gather(1, index.unsqueeze(1)).isfinite().all()


@pytest.mark.parametrize("actions", [5, 70])
def test_draws_follow_the_probabilities(device, actions):
    torch.manual_seed(1)
    logits = torch.randn(actions, device=device)
    index = ops.sample_actions(logits.expand(20000, actions))[0]
    expected = logits.double().softmax(-1) * 20000
    chi_squared = ((index.bincount(minlength=actions) - expected).square() / expected).sum().item()
    # 99.99 % quantile of chi-squared with actions - 1 degrees of freedom, 4 and 69.
    assert chi_squared < {5: 23.5, 70: 123.5}[actions]


def test_same_seed_same_draws(device):
    logits = make_logits(300, 9, device)

    def draw(**kwargs):
        return ops.sample_actions(logits, **kwargs)[0]

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    generator = torch.Generator(device).manual_seed(3)
    assert torch.equal(draw(generator=generator), draw(generator=generator.manual_seed(3)))


def test_gradients_of_draws(device):
    logits = make_logits(20, 9, device, torch.float64).requires_grad_()
    index, log_prob, entropy, _ = ops.sample_actions(logits)
    expected = reference(logits, index)
    (got,) = torch.autograd.grad(log_prob.sum() + 2 * entropy.sum(), logits)
    close(got, torch.autograd.grad(expected[0].sum() + 2 * expected[1].sum(), logits)[0], torch.float64)


@pytest.mark.parametrize("actions", [4, 80])
def test_a_row_without_distribution_is_nan(device, actions):
    logits = make_logits(4, actions, device)
    logits[1] = -torch.inf
    logits[2, 0] = torch.nan
    index, log_prob, _, _ = ops.sample_actions(logits)
    assert log_prob.isnan().tolist() == [False, True, True, False]
    assert ((index >= 0) & (index < actions)).all()
    with pytest.raises(ValueError, match=r"sample_actions: logits\[[12]\]"):
        ops.raise_if_reported(synchronize=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_clip_weights(device, dtype):
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


def test_clip_follows_moved_data_and_changed_bounds(device):
    weight = torch.nn.Parameter(torch.randn(5000, device=device))
    ops.clip_weights_([weight], [1.0])
    version = weight._version
    weight.data = 3 * torch.randn(5000, device=device)
    ops.clip_weights_([weight], [1.0])
    assert weight.abs().max() == 1.0
    ops.clip_weights_([weight], [0.5])
    assert weight.abs().max() == 0.5
    assert weight._version == version


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_init_loss(device, dtype):
    shapes = [(3,), (70, 90), (1,), (5000,), (5001,), (8, 4, 3, 3)]
    params = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    # A full chunk that starts on no 16-byte address.
    params.append(torch.randn(8195, dtype=dtype, device=device)[1:8193].requires_grad_())
    initial = [torch.randn_like(param) for param in params]
    loss = ops.l2_init_loss(params, initial, 0.25)
    expected = 0.25 * sum((p.double() - q.double()).square().sum() for p, q in zip(params, initial, strict=True))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(2 * loss, params), torch.autograd.grad(2 * expected, params), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert torch.equal(ops.l2_init_loss(params, initial, 0.25), loss)


@pytest.mark.parametrize(
    ("features", "width", "height", "tokens"), [(6, 11, 11, 40), (25, 11, 11, 100), (1, 3, 16, 33)]
)
def test_tokens_to_grid(device, features, width, height, tokens):
    rows = 3
    made = torch.randint(0, 256, (rows, tokens, 3), dtype=torch.uint8)
    made[..., 0] = torch.randint(0, min(width + 1, 16), (rows, tokens)) * 16 + torch.randint(0, height, (rows, tokens))
    made[..., 1] = torch.randint(0, features + 1, (rows, tokens))
    made[:, ::7] = 255
    scale = torch.rand(features) * 9 + 1
    expected = torch.zeros(rows, features, width, height)
    for row in range(rows):
        for coordinate, feature, value in made[row].tolist():
            x, y = coordinate >> 4, coordinate & 15
            if coordinate != 255 and x < width and y < height and feature < features:
                expected[row, feature, x, y] = torch.tensor(float(value)) / scale[feature]
    grid = ops.tokens_to_grid(made.to(device), features, width, height, scale.to(device))
    assert torch.equal(grid.cpu(), expected)


def test_tokens_conv2d(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tokens = torch.randint(0, 12, (5, 40, 3), dtype=torch.uint8)
    tokens[..., 0] *= 17
    weight, scale = torch.randn(7, 12, 3, 3, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 1
    leaves = [tensor.float().to(device).requires_grad_() for tensor in (weight, scale)]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    output = ops.tokens_conv2d(tokens.to(device), leaves[0], None, leaves[1], 11, 11, 2, relu=True)
    grid = torch.zeros(5, 12, 11, 11, dtype=torch.float64)
    for row in range(5):
        for coordinate, feature, value in tokens[row].tolist():
            if coordinate % 16 < 11:
                grid[row, feature, coordinate // 16, coordinate % 16] = value
    expected = torch.nn.functional.conv2d(grid / exact[1].view(1, -1, 1, 1), exact[0], None, 2).relu()
    close(output.cpu(), expected, torch.float32)
    gradients = torch.autograd.grad(output.square().mean(), leaves)
    for got, want in zip(gradients, torch.autograd.grad(expected.square().mean(), exact), strict=True):
        close(got.cpu(), want, torch.float32)


def lstm_reference(projected, weight_hh, h, c, resets):
    """Outputs of one LSTM layer in float64, by nn.LSTMCell's formula one step at a time; autograd goes through it."""
    outputs = []
    for t in range(len(projected)):
        if resets is not None:
            h, c = (torch.where(resets[t].unsqueeze(1), 0.0, state) for state in (h, c))
        gate_i, gate_f, gate_g, gate_o = (projected[t] + h @ weight_hh.t()).chunk(4, dim=1)
        c = gate_f.sigmoid() * c + gate_i.sigmoid() * gate_g.tanh()
        h = gate_o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c


def check_lstm_layer(inputs, resets, subset=(0, 1, 2)):
    """Values, and gradients for random upstream gradients of the outputs that `subset` names."""
    dtype = inputs[0].dtype
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs, expected = ops.lstm_layer(*inputs, resets), lstm_reference(*leaves, resets)
    with torch.no_grad():
        # A rollout keeps no gates, and its results are those of training to the last bit.
        assert all(map(torch.equal, ops.lstm_layer(*inputs, resets), outputs))
    for got, want in zip(outputs, expected, strict=True):
        assert got.dtype == dtype
        close(got, want, dtype)
    upstream = [torch.randn(outputs[i].shape, device=inputs[0].device).to(dtype) for i in subset]
    grads = torch.autograd.grad([outputs[i] for i in subset], inputs, upstream)
    wanted = torch.autograd.grad([expected[i] for i in subset], leaves, [grad.double() for grad in upstream])
    for got, want in zip(grads, wanted, strict=True):
        assert got.dtype == dtype
        scale = want.abs().amax().clamp(min=1)
        close(got / scale, want / scale, dtype)


def lstm_inputs(steps, rows, size, device, dtype=torch.float32):
    """projected, weight_hh, h, c, and resets in about a third of the places, one row of them throughout."""
    shapes = (steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size)
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs[1] = inputs[1] / size**0.5
    resets = torch.rand(steps, rows, device=device) < 0.3
    resets[:, 0] = True
    return inputs, resets


# One block and several, whole and in part, of rows (16, or 32 of many), hidden columns (64) and depth (32, 64 or 128);
# float32 products as they are and, from 4 steps or 17 rows on, of parts.
@pytest.mark.parametrize(
    ("steps", "rows", "size"), [(1, 1, 1), (5, 3, 7), (3, 16, 64), (3, 20, 70), (2, 33, 40), (2, 2, 130), (4, 34, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_resets", [True, False])
def test_lstm_layer(device, steps, rows, size, dtype, with_resets):
    inputs, resets = lstm_inputs(steps, rows, size, device, dtype)
    check_lstm_layer(inputs, resets if with_resets else None)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (1, 2)], ids=["output", "last_h", "last_c", "both states"])
def test_lstm_layer_without_some_upstream_gradient(device, subset):
    check_lstm_layer(*lstm_inputs(4, 5, 7, device), subset=subset)


def test_lstm_layer_non_contiguous(device):
    (projected, weight_hh, h, c), resets = lstm_inputs(3, 5, 8, device)
    strided = [projected.transpose(0, 1).contiguous().transpose(0, 1), weight_hh.t().contiguous().t()]
    strided += list(torch.stack((h, c), dim=-1).unbind(-1))
    check_lstm_layer(strided, resets.t().contiguous().t())


def test_lstm_layer_reset_hides_the_state_before_it_even_nan(device):
    (projected, weight_hh, h, c), resets = lstm_inputs(4, 3, 7, device)
    resets[2] = True
    expected = ops.lstm_layer(projected, weight_hh, h, c, resets)[0]
    projected[:2], h[:], c[:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(ops.lstm_layer(projected, weight_hh, h, c, resets)[0][2:], expected[2:])


# NumPy, behind the interpreter, warns of an exponential that is infinite; the gate is 0 there.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_lstm_layer_saturated_gates(device):
    (projected, weight_hh, h, c), resets = lstm_inputs(3, 4, 7, device)
    check_lstm_layer([300 * projected, weight_hh, h, c], resets)


def test_lstm_layer_in_parts_is_as_exact_as_float32(device):
    torch.manual_seed(0)
    inputs, resets = lstm_inputs(64, 16, 128, device)
    inputs[1] = (2 * torch.rand(512, 128, device=device) - 1) / 128**0.5
    output = ops.lstm_layer(*inputs, resets)[0]
    assert (output - lstm_reference(*(tensor.double() for tensor in inputs), resets)[0]).abs().max() < 3e-7


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Products of bfloat16 numbers in Triton's interpreter, which has none, and the kernels that need them there."""
    if not _triton.INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, multiply = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        bits = handle.data.astype(numpy.uint32) << 16
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32) if is_bfloat16 else handle

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest))
    monkeypatch.setattr(_lstm_layer, "INTERPRETED", False)


@pytest.mark.parametrize(("steps", "rows", "size"), [(4, 1, 1), (5, 3, 7), (4, 20, 70), (4, 16, 130)])
@pytest.mark.parametrize("with_resets", [True, False])
def test_lstm_layer_with_gradients_in_parts(device, steps, rows, size, with_resets, bfloat16_products):
    inputs, resets = lstm_inputs(steps, rows, size, device)
    check_lstm_layer(inputs, resets if with_resets else None)


# As large and as small as float32's exponents allow; float16's do not reach that far.
@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_lstm_layer_with_gradients_in_parts_is_as_exact_as_float32(device, scale, bfloat16_products):
    torch.manual_seed(0)
    inputs, resets = lstm_inputs(16, 16, 128, device)
    inputs[1] = (2 * torch.rand(512, 128, device=device) - 1) / 128**0.5
    upstream = scale * torch.randn(16, 16, 128, device=device)

    def gradients(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves, resets)[0], leaves, upstream.to(dtype))

    for got, want in zip(
        gradients(ops.lstm_layer, torch.float32), gradients(lstm_reference, torch.float64), strict=True
    ):
        assert (got - want).abs().max() < 1e-6 * want.abs().max()


# Low parts of small numbers would be below float16's smallest, and high parts of large ones beyond its largest.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize(("weight_scale", "state_scale"), [(1e-4, 1), (1, 1e-5), (4000, 1e-4), (1e-4, 1000)])
def test_lstm_layer_in_parts_of_small_and_large_numbers(device, weight_scale, state_scale):
    projected, *state = lstm_inputs(4, 3, 40, device)[0]
    weight_hh, h, c = weight_scale * state[0].sign(), state_scale * state[1].sign(), state[2]
    output = ops.lstm_layer(projected, weight_hh, h, c)[0]
    expected = lstm_reference(*(tensor.double() for tensor in (projected, weight_hh, h, c)), None)[0]
    # Later steps multiply large weights with states near 1, whose sums cancel in float32 too.
    close(output[0], expected[0], torch.float32)


@pytest.mark.parametrize(("dtype", "max_hidden"), [(torch.float64, 100), (torch.float32, 6)])
def test_lstm_layer_that_no_kernel_takes_runs_in_eager_pytorch(device, dtype, max_hidden, monkeypatch):
    monkeypatch.setattr(_lstm_layer, "MAX_HIDDEN", max_hidden)
    for name in ("_lstm_layer_fwd_kernel", "_lstm_layer_bwd_kernel"):
        monkeypatch.setattr(_lstm_layer, name, None)
    inputs, resets = lstm_inputs(3, 4, 7, device, dtype)
    check_lstm_layer(inputs, resets)


def test_a_segment_repeats_its_rollout(device):
    rows, steps, size = 5, 6, 8
    agent = LSTMWrapper(None, torch.nn.Identity(), size, size, 2).to(device)
    inputs, dones = torch.randn(rows, steps, size, device=device), torch.rand(rows, steps, device=device) < 0.3
    with torch.no_grad():
        start = TensorDict({}, batch_size=[rows])
        agent.run_lstm(start, torch.randn(rows, size, device=device), rows, 1)
        h, c = (memory[0].transpose(0, 1) for memory in agent.get_memory())
        tds = [TensorDict({"dones": flags}, batch_size=[rows]) for flags in dones.unbind(1)]
        expected = [agent.run_lstm(td, x, rows, 1) for td, x in zip(tds, inputs.unbind(1), strict=True)]
    td = TensorDict({"dones": dones, "lstm_h": h, "lstm_c": c}, batch_size=[rows])
    output = agent.run_lstm(td, inputs.flatten(0, 1), rows, steps).view(rows, steps, size)
    torch.testing.assert_close(output, torch.stack(expected, dim=1), rtol=0, atol=1e-5)


def test_no_rows(device):
    logits = torch.empty(0, 9, device=device).requires_grad_()
    log_prob, entropy, full = ops.evaluate_actions(logits, torch.empty(0, dtype=torch.int64, device=device))
    assert (log_prob.shape, entropy.shape, full.shape) == ((0,), (0,), (0, 9))
    assert torch.autograd.grad(log_prob.sum(), logits)[0].shape == (0, 9)
    assert ops.sample_actions(logits)[0].shape == (0,)
    pairs = torch.empty(0, 2, dtype=torch.int32, device=device)
    assert ops.action_to_logit_index(pairs, torch.tensor(CUM, device=device)).shape == (0,)
    tokens = torch.empty(0, 4, 3, dtype=torch.uint8, device=device)
    assert ops.tokens_to_grid(tokens, 2, 11, 11, torch.ones(2, device=device)).shape == (0, 2, 11, 11)
    inputs, resets = lstm_inputs(3, 1, 7, device)
    projected, weight_hh, h, c = (tensor.requires_grad_() for tensor in inputs)
    output = ops.lstm_layer(projected[:, :0], weight_hh, h[:0], c[:0], resets[:, :0])[0]
    assert output.shape == (3, 0, 7)
    assert not torch.autograd.grad(output.sum(), weight_hh)[0].any()


def make_agent(device, **kwargs):
    class Agent(PyTorchAgentMixin, torch.nn.Module):
        pass

    agent = Agent()
    agent.init_mixin(**kwargs)
    agent.activate_actions(["noop", "move", "press"], [0, 3, 3], device)
    return agent


def train(agent, pairs):
    logits, value = torch.zeros(len(pairs), 9, device=pairs.device), torch.zeros(len(pairs), 1, device=pairs.device)
    return agent.handle_training_mode(TensorDict({}, batch_size=[len(pairs)]), pairs, logits, value)


def test_a_bad_action_is_reported_when_validate_says(device):
    good = torch.tensor(PAIRS, device=device)
    bad = good.clone()
    bad[4, 1] = 7
    deferred, sync, off = (make_agent(device, validate=mode) for mode in ("deferred", "sync", "off"))
    assert train(deferred, bad)["act_log_prob"].isnan().sum() == 1
    torch.cuda.synchronize() if device.type == "cuda" else None
    with pytest.raises(ValueError, match=r"actions\[4\]: got parameter 7 for action type 1, expected 0 to 3"):
        train(deferred, good)
    train(deferred, good)
    with pytest.raises(ValueError, match=r"actions\[4\]: got parameter 7 for action type 1, expected 0 to 3"):
        train(sync, bad)
    train(off, bad)
    train(off, good)
    with pytest.raises(ValueError, match="parameter 7"):
        ops.raise_if_reported()


@pytest.mark.parametrize("validate", ["deferred", "sync", "off"])
def test_a_report_reaches_the_agent_of_the_call(device, validate):
    good = torch.tensor(PAIRS, device=device)
    bad = good.clone()
    bad[4, 1] = 7
    silent, other = make_agent(device, validate="off"), make_agent(device, validate=validate)
    train(silent, bad)
    ops.action_to_logit_index(bad, other.cum_action_max_params)
    for _ in range(2):
        train(other, good)
    with pytest.raises(ValueError, match="parameter 7"):
        ops.raise_if_reported(synchronize=True)
    with pytest.raises(ValueError, match="parameter 7"):
        ops.raise_if_reported(synchronize=True)
    ops.raise_if_reported(synchronize=True)


def test_a_table_with_strides(device):
    table = torch.tensor([[value, -100] for value in CUM], device=device)[:, 0]
    pairs = torch.tensor(PAIRS, device=device)
    index = torch.arange(len(PAIRS), device=device)
    assert ops.action_to_logit_index(pairs, table).equal(index)
    logits = make_logits(len(PAIRS), len(PAIRS), device)
    close(ops.evaluate_actions(logits, pairs, table)[0], reference(logits, index)[0], torch.float32)


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
        tensors[0].data = tensors[0].data.double()
        tensors[1].data = tensors[1].data.double()
    else:
        tensors.reverse()
    ops.clip_weights_(tensors, bounds)
    for tensor, bound in zip(tensors, bounds, strict=True):
        assert tensor.unique().tolist() == [bound]


def test_plans_go_with_their_tensors(device):
    before = len(_chunk_table._plans)
    tensors = [torch.ones(3, device=device), torch.ones(4, device=device)]
    ops.clip_weights_(tensors, [0.5, 0.5])
    assert len(_chunk_table._plans) == before + 1
    del tensors[0]
    assert len(_chunk_table._plans) == before


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


def test_sync_validation_is_refused_under_capture(monkeypatch):
    _bad_action.word(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^validate: got 'sync', expected 'deferred' or 'off'"):
        ops.raise_if_reported(synchronize=True)


def test_l2_has_scratch_of_its_own_in_each_capture(device, monkeypatch):
    params, start = [torch.full((4100,), 2.0, device=device)], [torch.zeros(4100, device=device)]
    ops.l2_init_loss(params, start)
    before = {key: (id(partials), id(counter)) for key, (partials, counter) in _l2_init_loss._scratch.items()}
    made = []
    new_scratch = _l2_init_loss._new_scratch
    monkeypatch.setattr(_l2_init_loss, "capturing", lambda device: True)
    monkeypatch.setattr(_l2_init_loss, "_new_scratch", lambda *args: made.append(new_scratch(*args)) or made[-1])
    for _ in range(2):
        assert ops.l2_init_loss(params, start).item() == 4 * 4100
    assert len(made) == 2 and all(counter.item() == 0 for _, counter in made)
    now = {key: (id(partials), id(counter)) for key, (partials, counter) in _l2_init_loss._scratch.items()}
    assert now == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_list_over_two_devices():
    tensors = [torch.ones(5, device="cuda"), torch.ones(5), torch.ones(5, device="cuda", dtype=torch.float64)]
    for _ in range(2):
        ops.clip_weights_(tensors, [0.5] * 3)
        assert all(tensor.unique().tolist() == [0.5] for tensor in tensors)
