"""The TensorDict fields, the two handlers and the action conversions."""

import pytest
import torch
from agents_for_tests import (
    CUM_ACTION_MAX_PARAMS,
    NUM_ACTIONS,
    PAIRS,
    Net,
    assert_equal,
    make_actions,
    make_observations,
    set_tables,
    upstream_inference,
    upstream_training,
)
from functorch.compile import make_boxed_func
from tensordict import NonTensorStack, TensorDict
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin, use_backend

B, T = 3, 4
TRAINING_KEYS = {"act_log_prob", "entropy", "full_log_probs", "value"}
INFERENCE_KEYS = {"actions", "act_log_prob", "values", "full_log_probs"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

both_training_names = pytest.mark.parametrize("name", ["handle_training_mode", "forward_training"])
both_inference_names = pytest.mark.parametrize("name", ["handle_inference_mode", "forward_inference"])
training_layouts = pytest.mark.parametrize("batch_size", [[B, T], [B], [B * T]], ids=str)


@pytest.fixture
def net():
    return set_tables(Net())


def make_td(batch_size, **entries):
    """A TensorDict of the given batch size that holds observations [B, T, ...], or [B * T, ...] where it is flat."""
    observations = make_observations(B, T)
    if batch_size == [B * T]:
        observations = observations.flatten(0, 1)
    return TensorDict({"env_obs": observations, **entries}, batch_size=batch_size)


def head_outputs(rows=B * T, dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, NUM_ACTIONS, generator=generator, dtype=torch.float64).to(dtype) * 2
    value = torch.randn(rows, 1, generator=generator, dtype=torch.float64).to(dtype)
    return logits.requires_grad_(), value.requires_grad_()


def assert_close(actual, expected, dtype=torch.float32):
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# Fields


@pytest.mark.parametrize(
    ("batch_size", "observations", "returned", "shape"),
    [
        ([B, T], [B, T], (B, T), [B, T]),
        ([B], [B, T], (B, T), [B, T]),
        ([B * T], [B, T], (B, T), [B * T]),
        ([], [B, T], (B, T), [B * T]),
        ([B, 1], [B, 1], (B, 1), [B, 1]),
        ([B], [B, 1], (B, 1), [B, 1]),
        ([B], [B], (B, 1), [B]),
        ([], [B], (B, 1), [B]),
        ([1], [1], (1, 1), [1]),
    ],
)
def test_fields(net, batch_size, observations, returned, shape):
    td = TensorDict({}, batch_size=batch_size)
    result = net.set_tensordict_fields(td, make_observations(*observations))
    assert result == returned
    assert [type(number) for number in result] == [int, int]
    assert_equal(td["batch"], torch.full(shape, returned[0]))
    assert_equal(td["bptt"], torch.full(shape, returned[1]))


@pytest.mark.parametrize("shape", [(B, 7), (B,), (B, 7, 3, 2, 2)])
def test_observations_of_other_than_four_dimensions_mean_inference(net, shape):
    td = TensorDict({}, batch_size=[B])
    assert net.set_tensordict_fields(td, torch.zeros(shape)) == (B, 1)


@pytest.mark.parametrize("batch_size", [[B, T], [B]])
def test_fields_are_fresh_each_call(net, batch_size):
    observations = make_observations(B, T)
    first, second = (TensorDict({}, batch_size=batch_size) for _ in range(2))
    net.set_tensordict_fields(first, observations)
    first["bptt"].fill_(-1)
    first["batch"].fill_(-1)
    net.set_tensordict_fields(second, observations)
    assert_equal(second["bptt"], torch.full((B, T), T))
    assert_equal(second["batch"], torch.full((B, T), B))
    storages = {td[key].data_ptr() for td in (first, second) for key in ("bptt", "batch")}
    assert len(storages) == 4


# Training


@both_training_names
@training_layouts
@pytest.mark.parametrize("action_shape", [(B, T), (B * T,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_training_values_and_gradients(net, name, batch_size, action_shape, dtype):
    logits, value = head_outputs(dtype=dtype)
    action = make_actions(*action_shape)
    td = make_td(batch_size)
    net.set_tensordict_fields(td, make_observations(B, T))
    out = getattr(net, name)(td, action, logits, value)

    exact_logits = logits.detach().double().requires_grad_()
    expected = upstream_training(action, exact_logits, value.detach().double())
    assert out.batch_size == (B, T)
    assert {key: out[key].dtype for key in TRAINING_KEYS} == dict.fromkeys(TRAINING_KEYS, dtype)
    for key, reference in expected.items():
        assert_close(out[key].flatten(0, 1).double(), reference.detach(), dtype)
    assert out["value"].shape == (B, T, 1)

    computed = ["act_log_prob", "entropy", "full_log_probs"]
    weights = [torch.randn(expected[key].shape, dtype=torch.float64) for key in computed]
    (actual_grad,) = torch.autograd.grad([out[key] for key in computed], logits, segment_weights(weights, dtype))
    (expected_grad,) = torch.autograd.grad([expected[key] for key in computed], exact_logits, weights)
    assert_close(actual_grad.double(), expected_grad, dtype if dtype.itemsize >= 4 else torch.bfloat16)


def segment_weights(weights, dtype):
    return [weight.to(dtype).reshape(B, T, *weight.shape[1:]) for weight in weights]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_actions_of_any_integer_dtype(net, dtype):
    logits, value = head_outputs()
    out = net.handle_training_mode(make_td([B, T]), make_actions(B, T, dtype=dtype), logits, value)
    expected = upstream_training(make_actions(B, T), logits, value)
    assert_close(out["act_log_prob"], expected["act_log_prob"])


@training_layouts
def test_actions_need_not_be_contiguous(net, batch_size):
    logits, value = head_outputs()
    action = make_actions(T, B).transpose(0, 1)
    strided = torch.stack([make_actions(B * T), make_actions(B * T, seed=8)], dim=2)[:, :, 0]
    assert not action.is_contiguous()
    assert not strided.is_contiguous()
    for given, rows in ((action, action.reshape(-1, 2)), (strided, make_actions(B * T))):
        td = make_td(batch_size)
        net.set_tensordict_fields(td, make_observations(B, T))
        out = net.handle_training_mode(td, given, logits, value)
        assert_close(out["act_log_prob"].flatten(), upstream_training(rows, logits, value)["act_log_prob"])


@training_layouts
@pytest.mark.parametrize("value_shape", [(B * T, 1), (B * T,)], ids=str)
def test_value_is_passed_on_as_it_was_given(net, batch_size, value_shape):
    logits, value = head_outputs()
    td = make_td(batch_size)
    net.set_tensordict_fields(td, make_observations(B, T))
    out = net.handle_training_mode(td, make_actions(B, T), logits, value.view(value_shape))
    assert "values" not in set(out.keys())
    assert_equal(out["value"], value.view(B, T, *value_shape[1:]))
    (grad,) = torch.autograd.grad(out["value"].sum(), value)
    assert_equal(grad, torch.ones(B * T, 1))


@pytest.mark.parametrize("action_shape", [(B, T), (B * T,)], ids=str)
@pytest.mark.parametrize("missing", ["both", "bptt", "batch"])
def test_without_the_fields_the_result_stays_flat(net, action_shape, missing):
    logits, value = head_outputs()
    td = make_td([B * T])
    net.set_tensordict_fields(td, make_observations(B, T))
    td = td.exclude(*(["bptt", "batch"] if missing == "both" else [missing]))
    out = net.handle_training_mode(td, make_actions(*action_shape), logits, value)
    assert out.batch_size == (B * T,)
    expected = upstream_training(make_actions(*action_shape), logits, value)
    assert_close({key: out[key] for key in expected}, expected)


@pytest.mark.parametrize("setter", ["mixin", "caller", "caller after the mixin"])
@pytest.mark.parametrize("action_shape", [(B, T), (B * T,)], ids=str)
def test_a_flat_tensordict_becomes_segments_whoever_set_the_fields(net, setter, action_shape):
    logits, value = head_outputs()
    td = make_td([B * T])
    if setter != "caller":
        # In the last case an earlier call for another shape must not decide.
        rows, steps = (B, T) if setter == "mixin" else (T, B)
        net.set_tensordict_fields(td, make_observations(rows, steps))
    if setter != "mixin":
        td["bptt"], td["batch"] = torch.full((B * T,), T), torch.full((B * T,), B)
    out = net.handle_training_mode(td, make_actions(*action_shape), logits, value)
    assert out.batch_size == (B, T)
    expected = upstream_training(make_actions(*action_shape), logits, value)
    assert_close({key: out[key].flatten(0, 1) for key in expected}, expected)


def test_a_flat_tensordict_receives_the_results_too(net):
    logits, value = head_outputs()
    td = make_td([B * T])
    net.set_tensordict_fields(td, make_observations(B, T))
    out = net.handle_training_mode(td, make_actions(B, T), logits, value)
    assert td.batch_size == (B * T,)
    assert {*TRAINING_KEYS, "env_obs"} <= set(td.keys())
    assert_equal(td["act_log_prob"].view(B, T), out["act_log_prob"])


def test_fields_that_another_agent_set_are_understood(net):
    logits, value = head_outputs()
    td = make_td([B * T])
    Net().set_tensordict_fields(td, make_observations(B, T))
    net.set_tensordict_fields(make_td([B * T]), make_observations(T, B))
    assert net.handle_training_mode(td, make_actions(B * T), logits, value).batch_size == (B, T)


@training_layouts
def test_entries_survive_training(net, batch_size):
    logits, value = head_outputs()
    td = make_td(batch_size)
    td.set_non_tensor("note", "kept")
    td["extra"] = torch.arange(B * T).view(*td["env_obs"].shape[: -2 if batch_size != [B * T] else 1])
    td["nested"] = TensorDict({"deep": td["extra"] * 2}, batch_size=batch_size)
    net.set_tensordict_fields(td, make_observations(B, T))
    out = net.handle_training_mode(td, make_actions(B, T), logits, value)
    assert_equal(out["env_obs"], make_observations(B, T))
    assert out["note"] == "kept"
    assert_equal(out["extra"], torch.arange(B * T).view(B, T))
    assert_equal(out["nested", "deep"], torch.arange(B * T).view(B, T) * 2)


def test_entries_of_one_row_per_segment_hold_for_all_its_steps(net):
    logits, value = head_outputs()
    state = torch.randn(B, 2, 5)
    nested = TensorDict({"score": torch.arange(B)}, batch_size=[B])
    td = make_td([B], lstm_h=state, level=torch.arange(B), nested=nested)
    net.set_tensordict_fields(td, make_observations(B, T))
    out = net.handle_training_mode(td, make_actions(B, T), logits, value)
    assert_equal(out["lstm_h"], torch.stack([state] * T, dim=1))
    assert_equal(out["level"], torch.arange(B).view(B, 1).expand(B, T))
    assert_equal(out["nested", "score"], torch.arange(B).view(B, 1).expand(B, T))


def test_non_tensor_entries_of_one_value_per_segment_hold_for_all_its_steps(net):
    logits, value = head_outputs()
    td = make_td([B])
    td["map"] = NonTensorStack("cave", "hill", "lake")
    net.set_tensordict_fields(td, make_observations(B, T))
    out = net.handle_training_mode(td, make_actions(B, T), logits, value)
    assert [[out[row, step]["map"] for step in range(T)] for row in range(B)] == [
        ["cave"] * T,
        ["hill"] * T,
        ["lake"] * T,
    ]


@pytest.mark.parametrize("batch_size", [[B, T], [B]])
def test_training_leaves_a_tensordict_of_segments_as_it_was(net, batch_size):
    logits, value = head_outputs()
    td = make_td(batch_size)
    net.set_tensordict_fields(td, make_observations(B, T))
    entries = dict(td.items())
    net.handle_training_mode(td, make_actions(B, T), logits, value)
    assert dict(td.items()).keys() == entries.keys()
    assert all(td[key] is entries[key] for key in entries)


def test_masked_logits_give_finite_entropy_and_gradients(net):
    logits, value = head_outputs()
    masked = torch.zeros(B * T, NUM_ACTIONS, dtype=torch.bool)
    masked[:, 4] = True
    action = torch.tensor([1, 0]).expand(B, T, 2)
    out = net.handle_training_mode(make_td([B, T]), action, logits.masked_fill(masked, -torch.inf), value)
    (grad,) = torch.autograd.grad(out["entropy"].sum() + out["act_log_prob"].sum(), logits)
    exact = torch.distributions.Categorical(logits=logits[:, [0, 1, 2, 3, 5, 6]])
    (expected,) = torch.autograd.grad(exact.entropy().sum() + exact.logits[:, 1].sum(), logits)
    assert_close(out["entropy"].flatten(), exact.entropy())
    assert_close(grad, expected)


# Inference


@both_inference_names
@pytest.mark.parametrize("value_shape", [(B, 1), (B,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@use_backend("eager")
def test_inference_writes_into_the_given_tensordict(net, name, value_shape, dtype):
    logits, value = head_outputs(B, dtype)
    td = TensorDict({"env_obs": make_observations(B)}, batch_size=[B])
    td.set_non_tensor("note", "kept")
    torch.manual_seed(5)
    expected = upstream_inference(logits, value)
    torch.manual_seed(5)
    assert getattr(net, name)(td, logits, value.view(value_shape)) is td
    assert set(td.keys()) == INFERENCE_KEYS | {"env_obs", "note"}
    assert td["note"] == "kept"
    for key, reference in expected.items():
        assert (td[key].dtype, td[key].shape) == (reference.dtype, reference.shape)
        assert_close(td[key], reference, dtype)
    assert_equal(td["actions"], expected["actions"])


@pytest.mark.parametrize("seed", range(3))
@use_backend("eager")
def test_draws_are_those_of_multinomial(net, seed):
    logits, value = head_outputs(500, seed=seed)
    torch.manual_seed(seed)
    expected = upstream_inference(logits, value)["actions"]
    torch.manual_seed(seed)
    td = net.handle_inference_mode(TensorDict({}, batch_size=[500]), logits, value)
    assert_equal(td["actions"], expected)
    assert len(td["actions"].unique(dim=0)) == NUM_ACTIONS


def test_inference_is_differentiable(net):
    logits, value = head_outputs(B)
    td = net.handle_inference_mode(TensorDict({}, batch_size=[B]), logits, value)
    full_log_probs = torch.log_softmax(logits, dim=-1)
    index = [PAIRS.index(pair) for pair in td["actions"].tolist()]
    for actual, expected in (
        (td["act_log_prob"], full_log_probs[range(B), index]),
        (td["full_log_probs"], full_log_probs),
    ):
        upstream = torch.randn(actual.shape)
        grads = [torch.autograd.grad(out, logits, upstream, retain_graph=True)[0] for out in (actual, expected)]
        assert_close(*grads)


# Conversions


def test_every_pair_converts_to_its_logit_and_back(net):
    index = net._convert_action_to_logit_index(torch.tensor(PAIRS))
    assert_equal(index, torch.arange(NUM_ACTIONS))
    pairs = net._convert_logit_index_to_action(torch.arange(NUM_ACTIONS))
    assert_equal(pairs, torch.tensor(PAIRS, dtype=torch.int32))


def test_the_base_formula_is_right_for_the_first_type_only(net):
    pairs = torch.tensor(PAIRS)
    without_type = torch.tensor(CUM_ACTION_MAX_PARAMS)[pairs[:, 0]] + pairs[:, 1]
    same = net._convert_action_to_logit_index(pairs) == without_type
    assert_equal(same, pairs[:, 0] == 0)


class ReversedLogits(Net):
    """Lays its logits out in the opposite order."""

    def _convert_action_to_logit_index(self, flattened_action):
        return NUM_ACTIONS - 1 - super()._convert_action_to_logit_index(flattened_action)

    def _convert_logit_index_to_action(self, action_logit_index):
        return super()._convert_logit_index_to_action(NUM_ACTIONS - 1 - action_logit_index).long()


@pytest.mark.parametrize("cls", [ReversedLogits, type("Deeper", (ReversedLogits,), {})])
@use_backend("eager")
def test_overridden_conversions_are_honoured(cls):
    net = set_tables(cls())
    logits, value = head_outputs()
    action = make_actions(B * T)
    out = net.handle_training_mode(make_td([B * T]), action, logits, value)
    assert_close(out["act_log_prob"], upstream_training(action, logits.flip(1), value)["act_log_prob"])
    torch.manual_seed(0)
    index = torch.multinomial(logits.softmax(-1), 1).view(-1)
    torch.manual_seed(0)
    td = net.handle_inference_mode(make_td([B * T]), logits, value)
    assert_equal(td["actions"], torch.tensor(PAIRS, dtype=torch.int32).flip(0)[index])


def test_conversions_set_on_the_agent_itself_are_honoured(net):
    logits, value = head_outputs()
    net._convert_action_to_logit_index = lambda pairs: torch.zeros(len(pairs), dtype=torch.int64)
    out = net.handle_training_mode(make_td([B * T]), make_actions(B * T), logits, value)
    assert_close(out["act_log_prob"], logits.log_softmax(-1)[:, 0])


# Tables


@pytest.mark.parametrize("state", ["missing", "None"])
@pytest.mark.parametrize("base", [Net, LSTMWrapper])
@pytest.mark.parametrize(
    ("table", "use"),
    [
        ("cum_action_max_params", lambda net: net._convert_action_to_logit_index(make_actions(2))),
        ("action_index_tensor", lambda net: net._convert_logit_index_to_action(torch.tensor([0]))),
        (
            "cum_action_max_params",
            lambda net: net.handle_training_mode(make_td([B, T]), make_actions(B, T), *head_outputs()),
        ),
        ("action_index_tensor", lambda net: net.handle_inference_mode(make_td([B * T]), *head_outputs())),
    ],
)
def test_tables_that_are_not_set(state, base, table, use):
    if base is Net:
        net = Net()
        if state == "None":
            net.cum_action_max_params = net.action_index_tensor = None
    elif state == "None":
        # LSTMWrapper starts them as None.
        net = type("Agent", (PyTorchAgentMixin, LSTMWrapper), {})(None, torch.nn.Linear(1, 1), 2, 2, 1)
    else:
        net = type("Agent", (PyTorchAgentMixin, LSTMWrapper), {})(None, torch.nn.Linear(1, 1), 2, 2, 1)
        del net.cum_action_max_params, net.action_index_tensor
    with pytest.raises(RuntimeError, match=rf"{table} not set\. MettaAgent"):
        use(net)


def test_tables_may_be_set_again(net):
    net.cum_action_max_params = torch.tensor([0, 1, 1])
    net.action_index_tensor = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.int32)
    assert net._convert_action_to_logit_index(torch.tensor([[1, 0]])).tolist() == [2]
    assert net._convert_logit_index_to_action(torch.tensor([1])).tolist() == [[0, 1]]


# Tracing


def run_training(net, td, observations, action, logits, value):
    net.set_tensordict_fields(td, observations)
    return net.handle_training_mode(td, action, logits, value)


@training_layouts
@pytest.mark.parametrize("action_shape", [(B, T), (B * T,)], ids=str)
@pytest.mark.parametrize("cls", [Net, ReversedLogits])
def test_training_reads_no_value(batch_size, action_shape, cls):
    with FakeTensorMode():
        net = set_tables(cls())
        td = TensorDict({}, batch_size=batch_size)
        observations = torch.zeros(B, T, 4, 3, dtype=torch.uint8)
        action = torch.zeros(*action_shape, 2, dtype=torch.int32)
        logits, value = torch.zeros(B * T, NUM_ACTIONS, requires_grad=True), torch.zeros(B * T, 1)
        out = run_training(net, td, observations, action, logits, value)
        (grad,) = torch.autograd.grad(out["act_log_prob"].sum() + out["entropy"].sum(), logits)
        assert (out["act_log_prob"].shape, grad.shape) == ((B, T), (B * T, NUM_ACTIONS))


@pytest.mark.parametrize("cls", [Net, ReversedLogits])
def test_inference_reads_no_value(cls):
    with FakeTensorMode():
        net = set_tables(cls())
        td = TensorDict({"env_obs": torch.zeros(B, 4, 3, dtype=torch.uint8)}, batch_size=[B])
        net.set_tensordict_fields(td, td["env_obs"])
        td = net.handle_inference_mode(td, torch.zeros(B, NUM_ACTIONS), torch.zeros(B, 1))
        assert (td["actions"].shape, td["actions"].dtype) == ((B, 2), torch.int32)


@pytest.fixture
def operators():
    """A compiler backend, and the names of this package's operators in the graphs that it was given."""
    names = []

    def record(graph, _inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names.extend(target.split(".")[1] for target in targets if target.startswith("metta_fastagent."))
        return make_boxed_func(graph)

    torch.compiler.reset()
    yield aot_autograd(fw_compiler=record), names
    torch.compiler.reset()


@training_layouts
@pytest.mark.filterwarnings("error:.*custom operator.*:UserWarning")
def test_training_compiles_to_one_operator(net, operators, batch_size):
    backend, names = operators
    logits, value = head_outputs()
    action = make_actions(B, T)
    compiled = torch.compile(run_training, fullgraph=True, backend=backend)
    out = compiled(net, make_td(batch_size), make_observations(B, T), action, logits, value)
    expected = upstream_training(action, logits, value)
    assert out.batch_size == (B, T)
    assert_close({key: out[key].flatten(0, 1) for key in expected}, expected)
    weights = torch.randn(B, T)
    (grad,) = torch.autograd.grad(out["entropy"], logits, weights)
    (expected_grad,) = torch.autograd.grad(expected["entropy"], logits, weights.flatten())
    assert_close(grad, expected_grad)
    assert names == ["evaluate_actions_forward", "evaluate_actions_backward"]


@pytest.mark.filterwarnings("error:.*custom operator.*:UserWarning")
def test_overridden_conversions_compile(operators):
    backend, _ = operators
    net = set_tables(ReversedLogits())
    logits, value = head_outputs()
    action = make_actions(B, T)
    compiled = torch.compile(run_training, fullgraph=True, backend=backend)
    out = compiled(net, make_td([B, T]), make_observations(B, T), action, logits, value)
    expected = upstream_training(action, logits.flip(1), value)["act_log_prob"]
    assert_close(out["act_log_prob"].flatten(), expected)


@pytest.mark.filterwarnings("error:.*custom operator.*:UserWarning")
@use_backend("eager")
def test_inference_compiles_to_one_operator(net, operators):
    backend, names = operators
    logits, value = head_outputs(B)

    @torch.compile(fullgraph=True, backend=backend)
    def step(td, logits, value):
        net.set_tensordict_fields(td, td["env_obs"])
        return net.handle_inference_mode(td, logits, value)

    td = TensorDict({"env_obs": make_observations(B)}, batch_size=[B])
    torch.manual_seed(3)
    out = step(td, logits.detach(), value.detach())
    torch.manual_seed(3)
    expected = upstream_inference(logits.detach(), value.detach())
    assert_equal(out["actions"], expected["actions"])
    assert_close(out["act_log_prob"], expected["act_log_prob"])
    assert names == ["sample_actions"]
