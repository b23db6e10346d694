"""The LSTM base class: initial weights, rollout memory, and segments against nn.LSTM run on each episode by itself."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper

INPUT, HIDDEN = 5, 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def make_agent(layers=2, dtype=torch.float32):
    torch.manual_seed(0)
    return LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, layers).to(dtype)


def rollout_td(rows, env_id=None, **entries):
    td = TensorDict(entries, batch_size=[rows])
    if isinstance(env_id, int):
        td.set_non_tensor("training_env_id_start", env_id)
    elif env_id is not None:
        td["training_env_id_start"] = env_id
    return td


def rollout_step(agent, hidden, env_id=None, **entries):
    rows = hidden.shape[0]
    return agent.run_lstm(rollout_td(rows, env_id, **entries), hidden, rows, 1)


def random_states(agent, rows, dtype=torch.float32):
    return tuple(torch.randn(agent.num_layers, rows, HIDDEN, dtype=dtype) for _ in range(2))


def assert_same_memory(actual, expected):
    for now, then in zip(actual, expected, strict=True):
        assert now.keys() == then.keys()
        assert all(torch.equal(now[env_id], then[env_id]) for env_id in then)


def by_episode(lstm, inputs, starts, h, c):
    """Outputs [B, T, hidden] of `lstm` run on each episode piece by itself; a row's first one may start from (h, c)."""
    rows = []
    for b in range(inputs.shape[0]):
        cuts = [0, *(t for t in range(1, inputs.shape[1]) if starts[b, t]), inputs.shape[1]]
        pieces = []
        for begin, end in pairwise(cuts):
            fresh = begin > 0 or bool(starts[b, 0])
            state = tuple(torch.zeros_like(s[:, b : b + 1]) if fresh else s[:, b : b + 1] for s in (h, c))
            pieces.append(lstm(inputs[b, begin:end].unsqueeze(1), state)[0].squeeze(1))
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


# Construction


def test_initial_weights_are_orthogonal_and_biases_one():
    agent = make_agent(layers=3)
    parameters = dict(agent.lstm.named_parameters())
    assert len(parameters) == 12
    for name, param in parameters.items():
        if "bias" in name:
            assert torch.equal(param, torch.ones(4 * HIDDEN))
        else:
            torch.testing.assert_close(param.T @ param, torch.eye(param.shape[1]), rtol=0, atol=1e-6)


def test_initialisation_draws_what_initialising_an_lstm_by_hand_draws():
    torch.manual_seed(7)
    agent = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, 2)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    lstm = nn.LSTM(INPUT, HIDDEN, 2)
    for name, param in lstm.named_parameters():
        if "bias" in name:
            nn.init.ones_(param)
        else:
            nn.init.orthogonal_(param)
    assert torch.equal(torch.get_rng_state(), after)
    for param, expected in zip(agent.lstm.parameters(), lstm.parameters(), strict=True):
        assert torch.equal(param, expected)


@pytest.mark.parametrize("policy", [None, "cnn", nn.Identity])
def test_a_policy_that_is_no_module_is_refused(policy):
    with pytest.raises(TypeError, match=r"policy: got .* expected the nn\.Module"):
        LSTMWrapper(None, policy, INPUT, HIDDEN)


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2", None])
def test_a_size_that_is_no_positive_integer_is_refused(name, size):
    with pytest.raises(ValueError, match=f"{name}: got .* expected a positive integer"):
        LSTMWrapper(None, nn.Identity(), **{name: size})


def test_starts_without_tables_and_with_empty_memory():
    agent = make_agent()
    assert agent.action_index_tensor is None
    assert agent.cum_action_max_params is None
    assert agent.has_memory() is True
    assert agent.get_memory() == ({}, {})
    assert all(key.startswith("lstm.") for key in agent.state_dict())


# Rollout memory


@pytest.mark.parametrize(
    ("env_id", "key"), [(3, 3), (0, 0), (None, 0), (torch.full((2,), 5), 5), (torch.full((2, 1), 6), 6)]
)
def test_memory_is_keyed_by_the_environment_id(env_id, key):
    agent = make_agent()
    rollout_step(agent, torch.randn(2, INPUT), env_id)
    h, c = agent.get_memory()
    assert set(h) == set(c) == {key}
    assert h[key].shape == c[key].shape == (2, 2, HIDDEN)


def test_environments_of_different_sizes_do_not_disturb_each_other():
    agent = make_agent()
    inputs = {0: torch.randn(4, 2, INPUT), 9: torch.randn(4, 3, INPUT)}
    outputs = {0: [], 9: []}
    for t in range(4):
        for env_id in (0, 9):
            outputs[env_id].append(rollout_step(agent, inputs[env_id][t], env_id))
    h, c = agent.get_memory()
    for env_id in (0, 9):
        expected, (last_h, last_c) = agent.lstm(inputs[env_id])
        torch.testing.assert_close(torch.stack(outputs[env_id]), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(h[env_id], last_h, rtol=0, atol=1e-6)
        torch.testing.assert_close(c[env_id], last_c, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("done_rows", "truncated_rows"),
    [([0, 2], None), (None, [0, 2]), ([0], [2]), ([0, 2], []), ([], [0, 2]), ([0, 2], [2])],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_rows_that_start_an_episode_start_from_zeros(done_rows, truncated_rows, dtype, shape):
    agent = make_agent()
    first, second = torch.randn(2, 4, INPUT)
    _, state = agent.lstm(first.unsqueeze(0))
    rollout_step(agent, first)
    flags = {}
    for key, rows in (("dones", done_rows), ("truncateds", truncated_rows)):
        if rows is not None:
            flags[key] = torch.zeros(4, dtype=dtype)
            flags[key][rows] = 1
            flags[key] = flags[key].view(shape)
    output = rollout_step(agent, second, **flags)
    fresh, carried = agent.lstm(second.unsqueeze(0))[0][0], agent.lstm(second.unsqueeze(0), state)[0][0]
    torch.testing.assert_close(output[[0, 2]], fresh[[0, 2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(output[[1, 3]], carried[[1, 3]], rtol=0, atol=1e-6)
    assert (fresh - carried).abs().amax() > 1e-3


def test_memory_is_detached():
    agent = make_agent()
    output = rollout_step(agent, torch.randn(2, INPUT, requires_grad=True))
    assert output.requires_grad
    assert not any(state.requires_grad for memory in (agent.lstm_h, agent.lstm_c) for state in memory.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_state_that_a_caller_kept_does_not_change(mode):
    agent = make_agent()
    with mode():
        rollout_step(agent, torch.randn(2, INPUT))
        kept = agent.lstm_h[0], agent.lstm_c[0]
        before = agent.get_memory()
        rollout_step(agent, torch.randn(2, INPUT), dones=torch.tensor([True, False]))
    for memory, tensor, old in zip((agent.lstm_h, agent.lstm_c), kept, before, strict=True):
        assert torch.equal(tensor, old[0])
        assert (memory[0] - tensor).abs().amin(dim=(0, 2)).gt(0).all()
        assert not memory[0].is_inference() and not memory[0].requires_grad


def test_backward_through_earlier_steps_works_while_the_rollout_goes_on():
    agent = make_agent()
    inputs = torch.randn(3, 2, INPUT)
    outputs = [rollout_step(agent, hidden) for hidden in inputs]
    with torch.no_grad():
        rollout_step(agent, torch.randn(2, INPUT))
    for output in outputs:
        output.square().sum().backward()
    gradient = agent.lstm.weight_hh_l1.grad.clone()

    agent.zero_grad()
    state = None
    for hidden in inputs:
        output, state = agent.lstm(hidden.unsqueeze(0), state)
        state = tuple(s.detach() for s in state)
        output.square().sum().backward()
    torch.testing.assert_close(gradient, agent.lstm.weight_hh_l1.grad)


@pytest.mark.parametrize("later", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_rollout_in_inference_mode_may_go_on_outside_of_it(later):
    agent = make_agent()
    inputs = torch.randn(3, 2, INPUT)
    with torch.inference_mode():
        rollout_step(agent, inputs[0])
    with later():
        outputs = [rollout_step(agent, hidden) for hidden in inputs[1:]]
        expected = agent.lstm(inputs)[0][1:]
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=0, atol=1e-6)


def test_get_and_set_memory_copy():
    agent = make_agent()
    inputs = torch.randn(3, 2, INPUT)
    with torch.no_grad():
        rollout_step(agent, inputs[0], 4)
        saved = agent.get_memory()
        expected = rollout_step(agent, inputs[1], 4)
        rollout_step(agent, inputs[2], 8)
        agent.set_memory(saved)
        assert_same_memory(agent.get_memory(), saved)
        assert torch.equal(rollout_step(agent, inputs[1], 4), expected)
        agent.set_memory(saved)
        # Writing to what was given or what was got does not reach the memory.
        before = agent.get_memory()
        saved[0][4].fill_(7)
        agent.get_memory()[1][4].fill_(7)
        assert_same_memory(agent.get_memory(), before)


def test_reset_memory_and_reset_env_memory():
    agent = make_agent()
    for env_id in (0, 4, 8):
        rollout_step(agent, torch.randn(2, INPUT), env_id)
    agent.reset_env_memory(4)
    agent.reset_env_memory(99)
    assert [set(memory) for memory in agent.get_memory()] == [{0, 8}] * 2
    hidden = torch.randn(2, INPUT)
    torch.testing.assert_close(rollout_step(agent, hidden, 4), agent.lstm(hidden.unsqueeze(0))[0][0])
    agent.reset_memory()
    assert agent.get_memory() == ({}, {})


def good(rows=3):
    return torch.zeros(2, rows, HIDDEN)


@pytest.mark.parametrize(
    "memory",
    [
        None,
        {0: good()},
        ({0: good()},),
        ({0: good()}, {0: good()}, {}),
        (good(), good()),
        ({0: good()}, {1: good()}),
        ({0: good()}, {}),
        ({0: good()}, {0: good(rows=2)}),
        ({0: good()}, {0: None}),
        ({0: good()}, {0: good().numpy()}),
        ({0: good().tolist()}, {0: good()}),
        ({0: good()[0]}, {0: good()[0]}),
        ({0: good()[:1]}, {0: good()[:1]}),
        ({0: good()}, {0: good()[..., :3]}),
    ],
)
def test_set_memory_refuses_what_is_no_memory_and_keeps_the_old_one(memory):
    agent = make_agent()
    rollout_step(agent, torch.randn(2, INPUT), 1)
    before = agent.get_memory()
    with pytest.raises((TypeError, ValueError), match=r"memory: .*expected"):
        agent.set_memory(memory)
    assert_same_memory(agent.get_memory(), before)


def test_another_number_of_rows_is_an_error_that_names_the_environment():
    agent = make_agent()
    rollout_step(agent, torch.randn(6, INPUT), 13)
    before = agent.get_memory()
    with pytest.raises(ValueError, match=r"td: 2 rows for environment id 13, expected 6"):
        rollout_step(agent, torch.randn(2, INPUT), 13)
    assert_same_memory(agent.get_memory(), before)


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16])
def test_memory_follows_the_dtype(target):
    agent = make_agent()
    rollout_step(agent, torch.randn(2, INPUT))
    before = agent.get_memory()
    nn.ModuleDict({"agent": agent}).to(target)
    assert_same_memory(agent.get_memory(), tuple({0: memory[0].to(target)} for memory in before))
    assert rollout_step(agent, torch.randn(2, INPUT, dtype=target)).dtype == target


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_copies_keep_the_memory_and_share_none_of_it(duplicate):
    agent = make_agent()
    hidden = torch.randn(2, INPUT)
    with torch.no_grad():
        rollout_step(agent, hidden, 3)
        before = agent.get_memory()
        other = duplicate(agent)
        assert_same_memory(other.get_memory(), before)
        assert torch.equal(rollout_step(other, hidden, 3), rollout_step(copy.deepcopy(agent), hidden, 3))
    assert_same_memory(agent.get_memory(), before)


# Training


@pytest.mark.parametrize("steps", [1, 4])
def test_training_neither_reads_nor_changes_the_memory(steps):
    agent = make_agent()
    hidden = torch.randn(3 * steps, INPUT)
    td = TensorDict({"env_obs": torch.zeros(3, steps, 2, 3, dtype=torch.uint8)}, batch_size=[3])
    expected = agent.run_lstm(td, hidden, 3, steps)
    # Rows of another number: reading them would be an error.
    rollout_step(agent, torch.randn(7, INPUT))
    before = agent.get_memory()
    assert torch.equal(agent.run_lstm(td, hidden, 3, steps), expected)
    assert_same_memory(agent.get_memory(), before)


def test_manage_and_store_of_a_segment_leave_the_memory_alone():
    agent = make_agent()
    h, c, env_id = agent._manage_lstm_state(rollout_td(3, 5), 3, 4, torch.device("cpu"))
    assert env_id is None
    agent._store_lstm_state(h + 1, c + 1, env_id)
    assert agent.get_memory() == ({}, {})


def test_manage_and_store_of_a_rollout_step_use_the_environment_id():
    agent = make_agent()
    h, c, env_id = agent._manage_lstm_state(rollout_td(3, 5), 3, 1, torch.device("cpu"))
    assert env_id == 5
    assert torch.equal(h, torch.zeros(2, 3, HIDDEN))
    assert torch.equal(c, h)
    agent._store_lstm_state(h + 1, c + 2, env_id)
    assert_same_memory(agent.get_memory(), ({5: h + 1}, {5: c + 2}))


def stored_entries(layout, h, c, B, T):
    """(entries, batch size) with the segments' first states in one of the accepted layouts, NaN where none may look."""
    entries = {}
    for key, state in (("lstm_h", h), ("lstm_c", c)):
        start = state.transpose(0, 1)
        if layout == "expanded":
            entries[key] = start.unsqueeze(1).expand(B, T, *start.shape[1:])
        else:
            steps = torch.full((B, T, *start.shape[1:]), float("nan"), dtype=state.dtype)
            steps[:, 0] = start
            entries[key] = {"per row": start, "per step": steps, "flat": steps.flatten(0, 1)}[layout]
    return entries, {"per row": [B], "flat": [B * T]}.get(layout, [B, T])


@pytest.mark.parametrize("layout", ["per row", "per step", "expanded", "flat"])
def test_a_segment_starts_from_the_stored_state(layout):
    agent = make_agent()
    B, T = 3, 4
    inputs, (h, c) = torch.randn(B, T, INPUT), random_states(agent, B)
    entries, batch_size = stored_entries(layout, h, c, B, T)
    originals = {key: state.clone() for key, state in entries.items()}
    output = agent.run_lstm(TensorDict(entries, batch_size=batch_size), inputs.flatten(0, 1), B, T)
    expected = agent.lstm(inputs.transpose(0, 1), (h, c))[0].transpose(0, 1)
    torch.testing.assert_close(output.view(B, T, HIDDEN), expected, rtol=0, atol=1e-6)
    for key, state in entries.items():
        torch.testing.assert_close(state, originals[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("entries", [{}, {"dones": torch.zeros(3, 4)}, {"truncateds": torch.zeros(3, 4).bool()}])
def test_without_state_and_resets_a_segment_is_one_sequence_from_zeros(layers, entries):
    agent = make_agent(layers)
    inputs = torch.randn(3, 4, INPUT)
    output = agent.run_lstm(TensorDict(entries, batch_size=[3, 4]), inputs.flatten(0, 1), 3, 4)
    expected = agent.lstm(inputs.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(output.view(3, 4, HIDDEN), expected, rtol=0, atol=1e-6)


def test_no_gradient_flows_into_the_stored_state():
    agent = make_agent()
    entries, _ = stored_entries("per row", *random_states(agent, 3), 3, 4)
    stored = {key: state.contiguous().requires_grad_() for key, state in entries.items()}
    output = agent.run_lstm(TensorDict(stored, batch_size=[3]), torch.randn(12, INPUT), 3, 4)
    output.sum().backward()
    assert agent.lstm.weight_hh_l0.grad.abs().sum() > 0
    assert all(state.grad is None for state in stored.values())


@pytest.mark.parametrize(("present", "missing"), [("lstm_h", "lstm_c"), ("lstm_c", "lstm_h")])
def test_half_a_stored_state_is_an_error(present, missing):
    td = TensorDict({present: torch.zeros(3, 2, HIDDEN)}, batch_size=[3])
    with pytest.raises(ValueError, match=f"td: holds {present} without {missing}"):
        make_agent().run_lstm(td, torch.randn(12, INPUT), 3, 4)


@pytest.mark.parametrize("shape", [(3, 1, HIDDEN), (3, 2, HIDDEN + 1), (3, 5, 2, HIDDEN), (3,), (3, 4, HIDDEN, 2)])
@pytest.mark.parametrize("key", ["lstm_h", "lstm_c"])
def test_a_stored_state_of_another_shape_is_an_error(shape, key):
    td = TensorDict({"lstm_h": torch.zeros(3, 2, HIDDEN), "lstm_c": torch.zeros(3, 2, HIDDEN)}, batch_size=[3])
    td[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"{key}.*got shape \[{', '.join(map(str, shape))}\].*\[3, 2, {HIDDEN}\]"):
        make_agent().run_lstm(td, torch.randn(12, INPUT), 3, 4)


@pytest.mark.parametrize("key", ["dones", "truncateds"])
def test_flags_of_another_number_are_an_error(key):
    td = TensorDict({key: torch.zeros(3, 5)}, batch_size=[3])
    with pytest.raises(ValueError, match=rf"{key}.*got .*shape \[3, 5\].*12"):
        make_agent().run_lstm(td, torch.randn(12, INPUT), 3, 4)


def random_flags(B, T, share=0.3):
    """Episode starts of every kind: in the first column, in the last, none in row 0, throughout in row 1."""
    flags = torch.rand(B, T) < share
    flags[0], flags[1], flags[2, 0], flags[3, -1] = False, True, True, True
    return flags


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [True, False])
def test_resets_in_a_segment_equal_an_lstm_on_each_episode(layers, dtype, stored):
    agent = make_agent(layers, dtype)
    B, T = 6, 9
    inputs = torch.randn(B, T, INPUT, dtype=dtype, requires_grad=True)
    upstream = torch.randn(B, T, HIDDEN, dtype=dtype)
    dones, truncateds = random_flags(B, T), torch.rand(B, T) < 0.1
    truncateds[0] = False
    h, c = random_states(agent, B, dtype) if stored else (torch.zeros(layers, B, HIDDEN, dtype=dtype),) * 2
    entries = stored_entries("per step", h, c, B, T)[0] if stored else {}
    td = TensorDict({"dones": dones, "truncateds": truncateds, **entries}, batch_size=[B, T])
    leaves = [inputs, *agent.lstm.parameters()]

    expected = by_episode(agent.lstm, inputs, dones | truncateds, h, c)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    output = agent.run_lstm(td, inputs.reshape(B * T, INPUT), B, T).view(B, T, HIDDEN)
    gradients = torch.autograd.grad(output, leaves, upstream)

    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[dtype])
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_one_step_segment_is_reset_too():
    agent = make_agent()
    inputs, (h, c) = torch.randn(2, INPUT), random_states(agent, 2)
    entries, _ = stored_entries("per row", h, c, 2, 1)
    td = TensorDict({"env_obs": torch.zeros(2, 1, 2, 3), "dones": torch.tensor([[True], [False]]), **entries}, [2])
    output = agent.run_lstm(td, inputs, 2, 1)
    expected = by_episode(agent.lstm, inputs.unsqueeze(1), torch.tensor([[True], [False]]), h, c)
    torch.testing.assert_close(output, expected[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_gradcheck_with_resets(layers):
    torch.manual_seed(1)
    agent = LSTMWrapper(None, nn.Identity(), 2, 2, layers).double()
    dones = torch.tensor([[False, True, False], [True, False, True]])
    h, c = torch.randn(2, 2, layers, 2, dtype=torch.float64)
    td = TensorDict({"dones": dones, "lstm_h": h, "lstm_c": c}, batch_size=[2])
    hidden = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    # gradcheck moves the parameters in place, so the agent sees them without being given them.
    assert torch.autograd.gradcheck(
        lambda hidden, *_: agent.run_lstm(td, hidden, 2, 3), (hidden, *agent.lstm.parameters())
    )


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_training_on_stored_segments_repeats_the_rollout(layers):
    agent = make_agent(layers)
    B, T = 5, 8
    inputs, dones = torch.randn(B, 2 * T, INPUT), random_flags(B, 2 * T)
    truncateds = torch.rand(B, 2 * T) < 0.05
    outputs, starts = [], {}
    with torch.no_grad():
        rollout_step(agent, torch.randn(B, INPUT), 2)
        for t in range(2 * T):
            if t % T == 0:
                starts[t] = agent.get_memory()
            outputs.append(rollout_step(agent, inputs[:, t], 2, dones=dones[:, t], truncateds=truncateds[:, t]))
    outputs = torch.stack(outputs, dim=1)
    for begin, (h, c) in starts.items():
        segment = slice(begin, begin + T)
        entries, _ = stored_entries("per row", h[2], c[2], B, T)
        td = TensorDict({"dones": dones[:, segment], "truncateds": truncateds[:, segment], **entries}, batch_size=[B])
        again = agent.run_lstm(td, inputs[:, segment].reshape(B * T, INPUT), B, T)
        torch.testing.assert_close(again.view(B, T, HIDDEN), outputs[:, segment], rtol=0, atol=1e-5)
