"""The C++ operators alone: direct calls, threads, and the errors of the eager twins; tests/ops checks their results."""

import pytest
import torch
from references import CUM_MAX_PARAMS, PAIRS, assert_close, lstm_inputs, random_tokens

from metta_fastagent import backend, ops, use_backend
from metta_fastagent.ops.lstm.layer import lstm_segment_native
from metta_fastagent.runtime import native as _native

pytestmark = pytest.mark.skipif(not _native.load(), reason=f"native operators: {_native.reason()}")

LOGITS, INDEX = torch.randn(4, 6), torch.arange(4)
LSTM, RESETS = lstm_inputs(2, 3, 4, torch.float32, "some")
PROJECTED, WEIGHT_HH, H, C = LSTM
CELLS, GATES = torch.randn(2, 3, 4), torch.rand(2, 3, 16)
TOKENS, SCALE = torch.zeros(2, 3, 3, dtype=torch.uint8), torch.ones(5)
CONV = (TOKENS, torch.randn(7, 5, 5, 5), torch.randn(7), SCALE)
SUMS = torch.ones(2, 3, 3, 7)
PPO_LOSS = (LOGITS, INDEX, *torch.randn(5, 4), None, None, None, None, 1.0, 0.2, 0.0, 0.5, 0.1)
# gamma, lam, rho_clip, c_clip
NUMBERS = 0.9, 0.8, 1.0, 1.0


@pytest.fixture(autouse=True)
def native():
    torch.manual_seed(5)
    with use_backend("native"):
        yield


def test_the_native_operators_are_chosen():
    assert backend("cpu") == "native"
    with use_backend("auto"):
        assert backend("cpu") == "native"
    with use_backend("eager"):
        assert backend("cpu") == "eager"


def pairs_of(*pairs, dtype=torch.int64):
    return torch.tensor(pairs, dtype=dtype)


# More action types than the logits have columns for.
LONG_TABLE = torch.tensor([0, 1, 1, 3, 3])


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.evaluate_actions(LOGITS, torch.tensor([0, 5, 6, -1]), strict=True),
        lambda: ops.evaluate_actions(LOGITS, torch.tensor([0, -1, 6, 1], dtype=torch.int32), strict=True),
        lambda: ops.evaluate_actions(LOGITS, pairs_of([0, 0], [3, 0], [0, 2], [0, 0]), CUM_MAX_PARAMS, strict=True),
        lambda: ops.evaluate_actions(LOGITS, pairs_of([0, 0], [0, 1], [-1, 0], [9, 9]), CUM_MAX_PARAMS, strict=True),
        lambda: ops.evaluate_actions(
            LOGITS, pairs_of([2, 2], [2, 3], [0, 0], [0, 0], dtype=torch.int16), CUM_MAX_PARAMS, strict=True
        ),
        lambda: ops.evaluate_actions(LOGITS, pairs_of([0, 0], [3, 0], [0, 0], [0, 0]), LONG_TABLE, strict=True),
        # A legal pair without a logit before an illegal pair, which the eager twin tells first.
        lambda: ops.evaluate_actions(LOGITS, pairs_of([0, 0], [3, 0], [7, 0], [0, 0]), LONG_TABLE, strict=True),
        lambda: ops.action_to_logit_index(pairs_of([0, 0], [0, -8], [5, 5]), CUM_MAX_PARAMS),
        lambda: ops.logit_index_to_action(torch.tensor([[0, 1], [2, 99], [-1, 7]]), PAIRS),
        lambda: ops.sample_actions(torch.tensor([[0.0, 1.0], [torch.inf, 0.0], [torch.nan, 0.0]])),
    ],
)
def test_of_several_bad_rows_the_one_of_the_eager_twin_is_named(call):
    caught = []
    for name in ("native", "eager"):
        with use_backend(name), pytest.raises(ValueError, match=r"got|holds") as error:
            call()
        caught.append((error.type, str(error.value)))
    assert caught[0] == caught[1]


def test_a_bad_row_deep_inside_a_large_batch_is_named():
    index = torch.zeros(200_000, dtype=torch.int64)
    index[[150_001, 199_999]] = 7
    with pytest.raises(ValueError, match=r"^actions\[150001\]: got logit index 7, expected 0 to 4$"):
        ops.evaluate_actions(torch.zeros(200_000, 5), index, strict=True)


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large_calls(dtype):
    """Functions of nothing, on many times what one thread takes and an odd number of rows."""
    rows = 40_001
    logits, index = torch.randn(rows, 21, dtype=dtype), torch.randint(21, (rows,))
    pairs, table = torch.stack([torch.zeros_like(index), index], dim=1), torch.tensor([0, 20])
    entries = torch.stack([torch.zeros(21, dtype=torch.long), torch.arange(21)], dim=1)
    upstream = [torch.randn(shape, dtype=dtype) for shape in (rows, rows, (rows, 21))]
    params = [torch.randn(count, dtype=dtype) for count in (100_003, 7, 50_001)]
    initial = [torch.zeros_like(param) for param in params]
    # Several blocks of rows, each with a gradient of its own.
    tokens, scale = random_tokens(1025, 30, 12, 11, 11), torch.rand(12, dtype=dtype) + 0.5
    kernel, sums = torch.randn(9, 12, 5, 5, dtype=dtype), torch.randn(1025, 9, 3, 3, dtype=dtype)
    rewards, values, bootstrap, ratios = (torch.randn(5001, 21, dtype=dtype) for _ in range(4))
    flags, last = torch.rand(5001, 21) < 0.3, torch.randn(5001, dtype=dtype)
    losses = [torch.randn(rows, dtype=dtype) for _ in range(3)]
    operators, plain = torch.ops.metta_fastagent, (None, None, 1.0)

    def sample():
        torch.manual_seed(1)
        return operators.sample_actions(logits, entries, *plain, True, False, 0)

    def clip():
        clipped = [param.clone() for param in params]
        ops.clip_weights_(clipped, [0.5, 0.6, 0.7])
        return clipped

    return [
        lambda: operators.evaluate_actions_forward(logits, pairs, table, *plain, True, 0),
        lambda: operators.evaluate_actions_forward(logits, index, None, *plain, True, 0),
        lambda: operators.evaluate_actions_backward(logits, index, *upstream, *plain),
        lambda: operators.advantages(rewards, values, flags, last, bootstrap, ~flags, ratios, 0.9, 0.8, 1.0, 1.0),
        lambda: operators.ppo_loss_forward(
            logits, pairs, *upstream[:2], *losses, table, index < 15, None, *plain, 0.2, 0.1, 0.5, 0.01, True, 0
        ),
        lambda: operators.ppo_loss_backward(
            logits, upstream[0], losses[0][0], index, torch.stack(upstream[:2]), losses[0][1], *plain, 0.01
        ),
        sample,
        clip,
        lambda: operators.l2_init_loss_forward(params, initial, 0.5),
        lambda: operators.l2_init_loss_backward(params, initial, 0.5, torch.tensor(3.0)),
        lambda: operators.tokens_to_grid(tokens, 12, 11, 11, scale, dtype, False),
        lambda: operators.tokens_conv2d_forward(tokens, kernel, None, scale, 11, 11, 3, True, False),
        lambda: operators.tokens_conv2d_backward(tokens, kernel, scale, None, sums, 11, 11, 3, True, False),
        lambda: operators.tanh(logits),
        lambda: operators.action_to_logit_index(pairs, table, 0),
        lambda: operators.logit_index_to_action(index, entries, 0),
    ]


def lstm_call(dtype, rows, size):
    (projected, weight_hh, h, c), resets = lstm_inputs(5, rows, size, dtype, "some")

    def layer():
        operators = torch.ops.metta_fastagent
        output, *kept = operators.lstm_layer_forward(projected, weight_hh, h, c, resets, True)
        return output, *kept, *operators.lstm_layer_backward(weight_hh, c, resets, *kept, output, h, c)

    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype, with_threads):
    # On both sides of whole vectors, with tiles of all numbers of rows.
    lstm = [lstm_call(dtype, rows, size) for rows, size in ((2401, 24), (601, 64), (65, 129))]
    for call in [*large_calls(dtype), *lstm]:
        with_threads(1)
        alone = call()
        for threads in (2, 3):
            with_threads(threads)
            torch.testing.assert_close(call(), alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_of_an_lstm_layer_does_not_depend_on_the_others(dtype):
    (projected, weight_hh, h, c), resets = lstm_inputs(4, 13, 40, dtype, "some")
    whole = torch.ops.metta_fastagent_native.lstm_layer_forward(projected, weight_hh, h, c, resets, True)
    for rows in (slice(0, 1), slice(5, 7), slice(2, 13)):
        inputs = projected[:, rows].contiguous(), weight_hh, h[rows], c[rows], resets[:, rows].contiguous()
        for part, complete in zip(
            torch.ops.metta_fastagent_native.lstm_layer_forward(*inputs, True), whole, strict=True
        ):
            assert torch.equal(part, complete[:, rows])


def segment_inputs(module, steps, rows, dtype=torch.float32):
    """Arguments of `lstm_segment_` up to the results, for a module of 20 inputs; a third of the rows is reset."""
    weights = [weight.detach().to(dtype) for layer in module.all_weights for weight in layer]
    h, c = torch.randn(2, module.num_layers, rows, module.hidden_size, dtype=dtype)
    return torch.randn(steps, rows, 20, dtype=dtype), weights, h, c, torch.rand(steps, rows) < 0.3


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("layers", "bias", "size", "rows"),
    # The last number of rows is above that of a block.
    [(1, True, 64, 8), (2, True, 24, 13), (2, False, 17, 5), (1, False, 1, 1), (2, True, 18, 101)],
)
def test_a_segment_is_that_of_nn_lstm(layers, bias, size, rows, steps, dtype, in_place):
    torch.manual_seed(size)
    module = torch.nn.LSTM(20, size, layers, bias)
    inputs = segment_inputs(module, steps, rows, dtype)
    xs, _, h, c, resets = inputs
    module, expected, outputs = module.double(), (h.double(), c.double()), []
    with torch.no_grad():
        for x, reset in zip(xs.double().split(1), resets, strict=True):
            kept = (~reset).unsqueeze(1)
            output, expected = module(x, (expected[0] * kept, expected[1] * kept))
            outputs.append(output)
    state = (h, c) if in_place else (torch.full_like(h, torch.nan), torch.full_like(c, torch.nan))
    output = torch.ops.metta_fastagent_native.lstm_segment_(*inputs, *state)
    for got, wanted in zip((output, *state), (torch.cat(outputs), *expected), strict=True):
        assert_close(got, wanted, dtype)


def test_segments_do_not_depend_on_the_number_of_threads(with_threads):
    inputs, results = segment_inputs(torch.nn.LSTM(20, 70, 2), 3, 501), []
    for threads in (1, 2, 3):
        with_threads(threads)
        state = torch.empty_like(inputs[2]), torch.empty_like(inputs[3])
        output = torch.ops.metta_fastagent_native.lstm_segment_(*inputs, *state)
        results.append(torch.cat((output, *state)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_segment_is_bitwise_its_steps():
    xs, weights, h, c, resets = segment_inputs(torch.nn.LSTM(20, 40, 2), 5, 13)
    state, outputs = (h.clone(), c.clone()), []
    for t in range(5):
        now = slice(t, t + 1)
        segment = torch.ops.metta_fastagent_native.lstm_segment_
        outputs.append(segment(xs[now], weights, *state, resets[now], *state))
    output = torch.ops.metta_fastagent_native.lstm_segment_(xs, weights, h, c, resets, h, c)
    for whole, by_steps in zip((output, h, c), (torch.cat(outputs), *state), strict=True):
        assert torch.equal(whole, by_steps)


@pytest.mark.parametrize(
    ("steps", "rows", "size", "expected"),
    [(1, 1, 8, True), (2, 5, 8, False), (2, 6, 8, True), (1, 6, 360, True), (2, 6, 360, False)],
)
def test_which_segments_are_one_call(steps, rows, size, expected):
    x, weights, h, c, resets = segment_inputs(torch.nn.LSTM(20, size), steps, rows)
    assert (lstm_segment_native(x, weights, h, c, [resets], False) is not None) == expected


@pytest.mark.parametrize("wrong", ["input", "steps", "weights", "layers", "h", "next_c", "resets", "dtype"])
def test_a_direct_segment_cannot_leave_the_tensors(wrong):
    input, weights, h, c, resets = segment_inputs(torch.nn.LSTM(20, 6), 2, 4)
    next_h, next_c = torch.empty_like(h), torch.empty_like(c)
    if wrong == "input":
        input = input[:, :3].contiguous()
    elif wrong == "steps":
        input, resets = input[:0], resets[:0]
    elif wrong == "weights":
        weights[1] = weights[1][:, :5].contiguous()
    elif wrong == "layers":
        weights = weights[:3]
    elif wrong == "h":
        h = h[:, :3].contiguous()
    elif wrong == "next_c":
        next_c = next_c[:, :, :5].contiguous()
    elif wrong == "resets":
        resets = resets[:, :3].contiguous()
    else:
        next_h = next_h.double()
    with pytest.raises(RuntimeError, match=r"expected|wrong shape|wrong number"):
        torch.ops.metta_fastagent_native.lstm_segment_(input, weights, h, c, resets, next_h, next_c)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("evaluate_actions_forward", (torch.randn(4, 6).t(), torch.arange(6), None)),
        ("evaluate_actions_forward", (LOGITS, INDEX[:3], None)),
        ("evaluate_actions_forward", (LOGITS.half(), INDEX, None)),
        ("evaluate_actions_backward", (LOGITS, INDEX, torch.randn(3), None, None)),
        ("evaluate_actions_backward", (LOGITS, INDEX, None, None, torch.randn(4, 5))),
        ("ppo_loss_forward", (LOGITS.t(), *PPO_LOSS[1:])),
        ("ppo_loss_forward", (*PPO_LOSS[:2], torch.randn(3), *PPO_LOSS[3:])),
        ("ppo_loss_forward", (*PPO_LOSS[:6], LOGITS[:, 0], *PPO_LOSS[7:])),
        ("ppo_loss_forward", (*PPO_LOSS[:8], INDEX[:3] > 0, *PPO_LOSS[9:])),
        ("ppo_loss_forward", (*PPO_LOSS[:9], torch.ones(2), *PPO_LOSS[10:])),
        ("ppo_loss_backward", (torch.ones(()), LOGITS, INDEX[:3], torch.ones(2, 4), torch.ones(()), None, 1.0, 0.1)),
        ("ppo_loss_backward", (torch.ones(()), LOGITS, INDEX, torch.ones(4), torch.ones(()), None, 1.0, 0.1)),
        ("ppo_loss_backward", (torch.ones(1), LOGITS, INDEX, torch.ones(2, 4), torch.ones(()), None, 1.0, 0.1)),
        ("advantages", (*[LOGITS] * 2, LOGITS > 0, LOGITS[:, 0].contiguous(), LOGITS.t(), None, None, *NUMBERS)),
        ("advantages", (*[LOGITS] * 2, LOGITS > 0, LOGITS[0], LOGITS, None, None, *NUMBERS)),
        ("advantages", (*[LOGITS] * 2, LOGITS, LOGITS[:, 0].contiguous(), LOGITS, None, None, *NUMBERS)),
        ("advantages", (*[LOGITS] * 2, LOGITS > 0, LOGITS[:, 0].contiguous(), LOGITS, INDEX > 0, None, *NUMBERS)),
        ("sample_actions", (LOGITS, torch.rand(3), None)),
        ("sample_actions", (LOGITS, torch.rand(4), PAIRS[:5])),
        ("l2_init_loss_forward", ([torch.randn(4)], [torch.randn(3)], 1.0)),
        ("tokens_to_grid", (TOKENS, 5, 11, 17, SCALE, False)),
        ("tokens_to_grid", (TOKENS, 5, 11, 11, SCALE[:4], False)),
        ("tokens_conv2d_forward", (*CONV[:3], SCALE[:4], 11, 11, 3, True, False)),
        ("tokens_conv2d_forward", (*CONV, 11, 17, 3, True, False)),
        ("tokens_conv2d_forward", (*CONV, 11, 4, 3, True, False)),
        ("tokens_conv2d_forward", (*CONV, 11, 11, 0, True, False)),
        ("tokens_conv2d_forward", (*CONV[:2], torch.ones(6), SCALE, 11, 11, 3, True, False)),
        ("tokens_conv2d_forward", (TOKENS, CONV[1][:, :4], *CONV[2:], 11, 11, 3, True, False)),
        ("tokens_conv2d_backward", (*CONV[:2], SCALE, None, SUMS[..., :6].contiguous(), 11, 11, 3, True, False)),
        ("tokens_conv2d_backward", (*CONV[:2], SCALE, torch.ones(2, 7), SUMS, 11, 11, 3, True, False)),
        ("tanh", (LOGITS.t(),)),
        ("tanh", (LOGITS.half(),)),
        ("activate_", (LOGITS.t(), None, False)),
        ("activate_", (LOGITS, torch.zeros(5), True)),
        ("activate_", (LOGITS, torch.zeros(6, dtype=torch.float64), True)),
        ("logit_index_to_action", (INDEX, PAIRS.float())),
        ("lstm_layer_forward", (PROJECTED, WEIGHT_HH, H, C[:2], None, True)),
        ("lstm_layer_forward", (*LSTM, RESETS.t().contiguous(), True)),
        ("lstm_layer_forward", (PROJECTED.double(), WEIGHT_HH, H, C, None, False)),
        ("lstm_layer_backward", (WEIGHT_HH, C, None, CELLS[..., :3].contiguous(), GATES, None, None, None)),
        ("lstm_layer_backward", (WEIGHT_HH, C, None, CELLS, GATES, H, None, None)),
    ],
)
def test_a_direct_call_cannot_leave_the_tensors(name, arguments):
    with pytest.raises(RuntimeError, match=r"expected|wrong shape"):
        getattr(torch.ops.metta_fastagent_native, name)(*arguments)
