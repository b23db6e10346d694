"""The TensorDict fields, the two handlers and the action conversions."""

import copy

import pytest
import torch
from agents_for_tests import (
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

from metta_fastagent import use_backend

B, T = 3, 4
TRAINING_KEYS = {"act_log_prob", "entropy", "full_log_probs", "value"}
INFERENCE_KEYS = {"actions", "act_log_prob", "values", "full_log_probs"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

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


def run_training(net, td, observations, action, logits, value, name="handle_training_mode"):
    net.set_tensordict_fields(td, observations)
    return getattr(net, name)(td, action, logits, value)


def train(net, td, action=None, logits=None, value=None, **kwargs):
    """A training call with its fields set; the same actions, logits and values each time unless given."""
    usual_logits, usual_value = head_outputs()
    action = make_actions(B, T) if action is None else action
    logits, value = usual_logits if logits is None else logits, usual_value if value is None else value
    return run_training(net, td, make_observations(B, T), action, logits, value, **kwargs)


# Fields


@pytest.mark.parametrize(
    ("batch_size", "observations", "returned", "shape"),
    [
        ([B, T], [B, T, 4, 3], (B, T), [B, T]),
        ([B], [B, T, 4, 3], (B, T), [B, T]),
        ([B * T], [B, T, 4, 3], (B, T), [B * T]),
        ([], [B, T, 4, 3], (B, T), [B * T]),
        ([B, 1], [B, 1, 4, 3], (B, 1), [B, 1]),
        ([B], [B, 1, 4, 3], (B, 1), [B, 1]),
        ([B], [B, 4, 3], (B, 1), [B]),
        ([], [B, 4, 3], (B, 1), [B]),
        ([1], [1, 4, 3], (1, 1), [1]),
        # Observations of other than four dimensions mean inference.
        ([B], [B], (B, 1), [B]),
        ([B], [B, 7], (B, 1), [B]),
        ([B], [B, 7, 3, 2, 2], (B, 1), [B]),
    ],
)
def test_fields(net, batch_size, observations, returned, shape):
    td = TensorDict({}, batch_size=batch_size)
    result = net.set_tensordict_fields(td, torch.zeros(observations))
    assert result == returned
    assert [type(number) for number in result] == [int, int]
    assert_equal(td["batch"], torch.full(shape, returned[0]))
    assert_equal(td["bptt"], torch.full(shape, returned[1]))


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


@pytest.mark.parametrize(
    ("name", "batch_size", "action_shape", "value_shape", "dtype"),
    [
        ("handle_training_mode", [B, T], (B, T), (B * T, 1), torch.float32),
        ("handle_training_mode", [B], (B * T,), (B * T,), torch.float64),
        ("handle_training_mode", [B * T], (B, T), (B * T,), torch.bfloat16),
        ("handle_training_mode", [B, T], (B * T,), (B * T,), torch.float16),
        ("forward_training", [B], (B, T), (B * T, 1), torch.float32),
        ("forward_training", [B * T], (B * T,), (B * T, 1), torch.float32),
    ],
    ids=str,
)
def test_training_values_and_gradients(net, name, batch_size, action_shape, value_shape, dtype):
    logits, value = head_outputs(dtype=dtype)
    action = make_actions(*action_shape)
    out = train(net, make_td(batch_size), action, logits, value.view(value_shape), name=name)

    exact_logits = logits.detach().double().requires_grad_()
    expected = upstream_training(action, exact_logits, value.detach().double())
    del expected["value"]
    assert out.batch_size == (B, T)
    assert {key: out[key].dtype for key in TRAINING_KEYS} == dict.fromkeys(TRAINING_KEYS, dtype)
    for key, reference in expected.items():
        assert_close(out[key].flatten(0, 1).double(), reference.detach(), dtype)
    weights = [torch.randn(reference.shape, dtype=torch.float64) for reference in expected.values()]
    outputs = [out[key] for key in expected]
    (actual_grad,) = torch.autograd.grad(outputs, logits, segment_weights(weights, dtype))
    (expected_grad,) = torch.autograd.grad(list(expected.values()), exact_logits, weights)
    assert_close(actual_grad.double(), expected_grad, dtype if dtype.itemsize >= 4 else torch.bfloat16)
    # The value is passed on as it was given.
    assert_equal(out["value"], value.view(B, T, *value_shape[1:]))
    assert "values" not in set(out.keys())
    (grad,) = torch.autograd.grad(out["value"].sum(), value)
    assert_equal(grad, torch.ones(B * T, 1, dtype=dtype))


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
        out = train(net, make_td(batch_size), given, logits, value)
        assert_close(out["act_log_prob"].flatten(), upstream_training(rows, logits, value)["act_log_prob"])


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


@pytest.mark.parametrize("setter", ["mixin", "caller", "caller after the mixin", "another agent"])
@pytest.mark.parametrize("action_shape", [(B, T), (B * T,)], ids=str)
def test_a_flat_tensordict_becomes_segments_whoever_set_the_fields(net, setter, action_shape):
    logits, value = head_outputs()
    td = make_td([B * T])
    if setter in ("caller after the mixin", "another agent"):
        # An earlier call for another shape must not decide.
        net.set_tensordict_fields(td if setter != "another agent" else make_td([B * T]), make_observations(T, B))
    if setter in ("mixin", "another agent"):
        (net if setter == "mixin" else Net()).set_tensordict_fields(td, make_observations(B, T))
    else:
        td["bptt"], td["batch"] = torch.full((B * T,), T), torch.full((B * T,), B)
    out = net.handle_training_mode(td, make_actions(*action_shape), logits, value)
    assert out.batch_size == (B, T)
    expected = upstream_training(make_actions(*action_shape), logits, value)
    assert_close({key: out[key].flatten(0, 1) for key in expected}, expected)
    # The flat one receives the results too.
    assert td.batch_size == (B * T,)
    assert {*TRAINING_KEYS, "env_obs"} <= set(td.keys())
    assert_equal(td["act_log_prob"].view(B, T), out["act_log_prob"])


@training_layouts
def test_entries_survive_training(net, batch_size):
    td = make_td(batch_size)
    td.set_non_tensor("note", "kept")
    td["extra"] = torch.arange(B * T).view(*td["env_obs"].shape[: -2 if batch_size != [B * T] else 1])
    td["nested"] = TensorDict({"deep": td["extra"] * 2}, batch_size=batch_size)
    out = train(net, td)
    assert_equal(out["env_obs"], make_observations(B, T))
    assert out["note"] == "kept"
    assert_equal(out["extra"], torch.arange(B * T).view(B, T))
    assert_equal(out["nested", "deep"], torch.arange(B * T).view(B, T) * 2)


def test_entries_of_one_row_per_segment_hold_for_all_its_steps(net):
    td = make_td([B], state=torch.randn(B, 2, 5), level=torch.arange(B), map=NonTensorStack("cave", "hill", "lake"))
    td["nested"] = TensorDict({"score": torch.arange(B)}, batch_size=[B])
    out = train(net, td)
    assert_equal(out["state"], torch.stack([td["state"]] * T, dim=1))
    assert_equal(out["level"], torch.arange(B).view(B, 1).expand(B, T))
    assert_equal(out["nested", "score"], out["level"])
    maps = [[out[row, step]["map"] for step in range(T)] for row in range(B)]
    assert maps == [["cave"] * T, ["hill"] * T, ["lake"] * T]


@pytest.mark.parametrize("batch_size", [[B, T], [B]])
def test_training_leaves_a_tensordict_of_segments_as_it_was(net, batch_size):
    td = make_td(batch_size)
    net.set_tensordict_fields(td, make_observations(B, T))
    entries = dict(td.items())
    net.handle_training_mode(td, make_actions(B, T), *head_outputs())
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


@pytest.mark.parametrize(
    ("name", "value_shape", "dtype"),
    [
        ("handle_inference_mode", (B, 1), torch.float32),
        ("handle_inference_mode", (B,), torch.float64),
        ("forward_inference", (B, 1), torch.float32),
    ],
    ids=str,
)
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


@use_backend("eager")
def test_draws_are_those_of_multinomial(net):
    logits, value = head_outputs(1500)
    torch.manual_seed(5)
    expected = upstream_inference(logits, value)["actions"]
    torch.manual_seed(5)
    td = net.handle_inference_mode(TensorDict({}, batch_size=[1500]), logits, value)
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


def test_tables_may_be_set_again(net):
    net.cum_action_max_params = torch.tensor([0, 1, 1])
    net.action_index_tensor = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.int32)
    assert net._convert_action_to_logit_index(torch.tensor([[1, 0]])).tolist() == [2]
    assert net._convert_logit_index_to_action(torch.tensor([1])).tolist() == [[0, 1]]


# Tracing


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
def test_logits_are_returned_where_they_are_asked_for(net, batch_size):
    logits, value = head_outputs()
    mask = torch.rand(B, T, logits.shape[1]) < 2
    td = make_td(batch_size)
    if len(batch_size) == 2:
        td["action_mask"] = mask
    td.set_non_tensor("return_logits", True)
    out = run_training(net, td, make_observations(B, T), make_actions(B, T), logits, value)
    assert out.batch_size == (B, T)
    assert torch.equal(out["logits"], logits.view(B, T, -1)) and torch.equal(out["value"], value.view(B, T, -1))
    assert not {"act_log_prob", "entropy", "full_log_probs"} & set(out.keys())
    assert len(batch_size) != 2 or torch.equal(out["action_mask"], mask)
    assert net.diagnostics()["rows"]["training"] == B * T and "training" not in net.diagnostics()["mean_entropy"]


def test_an_agent_of_its_own_ways_evaluates_instead_of_returning_logits(net):
    cases = [set_tables(ReversedLogits()), *(copy.deepcopy(net) for _ in range(2))]
    cases[1].temperature, cases[2].on_nonfinite_logits = 0.7, "count"
    logits, value = head_outputs()
    for each in cases:
        plain, asked = make_td([B, T]), make_td([B, T])
        asked.set_non_tensor("return_logits", True)
        expected, out = (
            run_training(each, td, make_observations(B, T), make_actions(B, T, seed=1), logits, value)
            for td in (plain, asked)
        )
        assert "logits" not in out.keys()
        assert torch.equal(out["act_log_prob"], expected["act_log_prob"])


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
