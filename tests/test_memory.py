"""The rollout memory, one for each environment id or preallocated rows: what both promise, then each by itself."""

import copy
from types import SimpleNamespace

import agents_for_tests as small
import pytest
import torch
from agents_for_tests import assert_equal, make_agent, make_fast, pickled, rollout_td
from tensordict import TensorDict
from torch import nn
from torch._subclasses import FakeTensorMode

from metta_fastagent import Fast, LSTMWrapper, _memory
from metta_fastagent.testing import check_agent, compare_agents

INPUT, HIDDEN, LAYERS, ENVS = 5, 4, 2, 6
KEY = r"td\['training_env_id_start'\]"


def make_lstm(num_envs=None):
    torch.manual_seed(0)
    return LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, LAYERS, num_envs=num_envs)


@pytest.fixture(params=[None, ENVS], ids=["by id", "preallocated"])
def agent(request):
    return make_lstm(request.param)


@pytest.fixture
def rows():
    """An agent with a preallocated memory that holds distinct numbers."""
    return filled(make_lstm(ENVS))


def filled(agent):
    with torch.no_grad():
        for _ in range(2):
            step(agent, torch.randn(ENVS, INPUT))
    return agent


def step(agent, hidden, env_id=None, **entries):
    return agent.run_lstm(rollout_td(len(hidden), env_id, **entries), hidden, len(hidden), 1)


def addresses(agent):
    return agent.lstm_h[0].data_ptr(), agent.lstm_c[0].data_ptr()


def zeros(*shape):
    return {0: torch.zeros(*shape)}, {0: torch.zeros(*shape)}


# Both kinds


@pytest.mark.parametrize(
    ("done_rows", "truncated_rows", "dtype", "shape"),
    [
        ([0, 2], None, torch.bool, (4,)),
        (None, [0, 2], torch.float32, (4, 1)),
        ([0], [2], torch.uint8, (4,)),
        ([0, 2], [], torch.bool, (4, 1)),
        ([], [0, 2], torch.uint8, (4, 1)),
        ([0, 2], [2], torch.float32, (4,)),
    ],
)
def test_rows_that_start_an_episode_start_from_zeros(agent, done_rows, truncated_rows, dtype, shape):
    first, second = torch.randn(2, 4, INPUT)
    _, state = agent.lstm(first.unsqueeze(0))
    step(agent, first)
    flags = {}
    for key, flagged in (("dones", done_rows), ("truncateds", truncated_rows)):
        if flagged is not None:
            flags[key] = torch.zeros(4, dtype=dtype)
            flags[key][flagged] = 1
            flags[key] = flags[key].view(shape)
    output = step(agent, second, **flags)
    fresh, carried = agent.lstm(second.unsqueeze(0))[0][0], agent.lstm(second.unsqueeze(0), state)[0][0]
    torch.testing.assert_close(output[[0, 2]], fresh[[0, 2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(output[[1, 3]], carried[[1, 3]], rtol=0, atol=1e-6)
    assert (fresh - carried).abs().amax() > 1e-3


@pytest.mark.parametrize("env_id", [None, 1, torch.tensor(1)], ids=["none", "int", "tensor"])
def test_backward_through_earlier_steps_works_while_the_rollout_goes_on(agent, env_id):
    inputs = torch.randn(3, ENVS if env_id is None else 3, INPUT)
    outputs = [step(agent, hidden, env_id) for hidden in inputs]
    assert not any(state.requires_grad for state in (*agent.lstm_h.values(), *agent.lstm_c.values()))
    with torch.no_grad():
        step(agent, torch.randn_like(inputs[0]), env_id)
    agent.reset_memory()
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
@pytest.mark.parametrize("env_id", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_a_rollout_in_inference_mode_may_go_on_outside_of_it(agent, later, env_id):
    inputs = torch.randn(3, 2, INPUT)
    with torch.inference_mode():
        if agent.num_envs is not None:
            agent.allocate_memory(ENVS)
        step(agent, inputs[0], env_id)
    with later():
        outputs = [step(agent, hidden, env_id) for hidden in inputs[1:]]
        expected = agent.lstm(inputs)[0][1:]
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=0, atol=1e-6)


def test_get_and_set_memory_copy(agent):
    filled(agent)
    saved, hidden = agent.get_memory(), torch.randn(ENVS, INPUT)
    with torch.no_grad():
        expected = step(agent, hidden)
        for _ in range(2):
            agent.set_memory(saved)
            assert_equal(agent.get_memory(), saved)
            assert_equal(step(agent, hidden), expected)
    agent.set_memory(saved)
    before = agent.get_memory()
    # Writing to what was given or what was got does not reach the memory.
    saved[0][0].fill_(7)
    agent.get_memory()[1][0].fill_(7)
    assert_equal(agent.get_memory(), before)


def test_after_a_reset_every_row_starts_from_zeros(agent):
    filled(agent).reset_memory()
    hidden = torch.randn(ENVS, INPUT)
    torch.testing.assert_close(step(agent, hidden), agent.lstm(hidden.unsqueeze(0))[0][0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_keep_the_memory_and_share_none_of_it(agent, copied):
    filled(agent)
    before, hidden = agent.get_memory(), torch.randn(ENVS, INPUT)
    with torch.no_grad():
        twin = copied(agent)
        assert_equal(twin.get_memory(), before)
        assert_equal(step(twin, hidden), step(copy.deepcopy(agent), hidden))
        step(twin, hidden, torch.tensor(0))
    assert_equal(agent.get_memory(), before)


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16])
def test_memory_follows_the_dtype(agent, target):
    before = filled(agent).get_memory()
    nn.ModuleDict({"agent": agent}).to(target)
    assert_equal(agent.get_memory(), tuple({0: memory[0].to(target)} for memory in before))
    with torch.no_grad():
        for env_id in (0, torch.tensor(0)):
            assert step(agent, torch.randn(ENVS, INPUT, dtype=target), env_id).dtype == target
    assert agent.lstm_h[0].dtype == target


@pytest.mark.parametrize("steps", [1, 4])
def test_training_neither_reads_nor_changes_the_memory(agent, steps):
    # Neither kind of memory has rows for this many segments of this id.
    observations = torch.zeros(9, steps, 2, 3, dtype=torch.uint8)
    td = TensorDict({"env_obs": observations}, batch_size=[9]).set_non_tensor("training_env_id_start", 0)
    hidden = torch.randn(9 * steps, INPUT)
    expected = make_lstm().run_lstm(td, hidden, 9, steps)
    before = filled(agent).get_memory()
    assert_equal(agent.run_lstm(td, hidden, 9, steps), expected)
    assert_equal(agent.get_memory(), before)


@pytest.mark.parametrize("env_id", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_manage_returns_the_state_that_store_took(agent, env_id):
    td, device = rollout_td(3, env_id), torch.device("cpu")
    h, c, where = agent._manage_lstm_state(td, 3, 1, device)
    assert_equal([h, c], [torch.zeros(LAYERS, 3, HIDDEN)] * 2)
    agent._store_lstm_state(h + 1, c + 2, where)
    h, c, _ = agent._manage_lstm_state(td, 3, 1, device)
    assert_equal([h, c], [torch.ones(LAYERS, 3, HIDDEN), torch.full((LAYERS, 3, HIDDEN), 2.0)])
    assert h.is_contiguous() and c.is_contiguous()


def test_manage_and_store_of_a_segment_leave_the_memory_alone(agent):
    before = filled(agent).get_memory()
    h, c, where = agent._manage_lstm_state(rollout_td(3, 0), 3, 4, torch.device("cpu"))
    assert where is None
    agent._store_lstm_state(h + 1, c + 1, where)
    assert_equal(agent.get_memory(), before)


@pytest.mark.parametrize(("make", "num_envs"), [(make_agent, None), (make_agent, 2), (make_fast, 2), (make_fast, 16)])
def test_check_agent_leaves_the_memory_alone(make, num_envs):
    agent = make()
    if num_envs is not None:
        agent.allocate_memory(num_envs)
    env = SimpleNamespace(num_tokens=small.TOKENS, action_names=small.ACTION_NAMES, max_action_args=small.MAX_PARAMS)
    before = agent.get_memory()
    report = check_agent(agent, env, updates=3)
    # The guide's printed forward() resets no row inside a segment.
    assert [check.name for check in report.failures] == (["recurrent replay"] if make is make_agent else [])
    assert agent.num_envs == num_envs
    assert_equal(agent.get_memory(), before)


@pytest.mark.parametrize("make", [make_agent, make_fast])
@pytest.mark.parametrize("env_id", [None, torch.full((3,), 2)], ids=["no id", "tensor"])
def test_compare_agents_finds_both_memories_equal(make, env_id):
    preallocated = make()
    preallocated.allocate_memory(8)
    compare_agents(make(), preallocated, rollout_td(3, env_id, env_obs=small.make_observations(3)))


@pytest.mark.parametrize("kind", ["int", "0-dim", "rows", "column", "int32", "uint64", "float"])
def test_a_random_rollout_is_the_same_with_both(kind):
    agent, other = make_lstm(ENVS), make_lstm()
    generator = torch.Generator().manual_seed(1)
    kept = addresses(agent)
    with torch.no_grad():
        for t in range(40):
            if t % 8 == 0:
                # One partition of the environments for eight steps, as ids of the other memory may not overlap.
                ranges = [[(0, 6)], [(0, 2), (2, 3), (5, 1)], [(1, 2), (3, 3)]][t // 8 % 3]
                other.reset_memory()
                agent.reset_memory()
            start, count = ranges[int(torch.randint(len(ranges), (), generator=generator))]
            shape = {"0-dim": (), "column": (count, 1)}.get(kind, (count,))
            dtype = {"int32": torch.int32, "uint64": torch.uint64, "float": torch.float32}.get(kind, torch.int64)
            env_id = start if kind == "int" else torch.full(shape, start, dtype=dtype)
            hidden = torch.randn(count, INPUT, generator=generator)
            flags = {key: torch.rand(count, generator=generator) < 0.2 for key in ("dones", "truncateds")}
            assert_equal(step(agent, hidden, env_id, **flags), step(other, hidden, start, **flags))
    for memory, wanted in zip(agent.get_memory(), other.get_memory(), strict=True):
        for start, state in wanted.items():
            assert_equal(memory[0][:, start : start + state.shape[1]], state)
    assert addresses(agent) == kept


# One memory for each environment id


@pytest.mark.parametrize(
    ("env_id", "key"), [(3, 3), (0, 0), (None, 0), (torch.full((2,), 5), 5), (torch.full((2, 1), 6), 6)]
)
def test_the_key_is_the_environment_id(env_id, key):
    agent = make_lstm()
    step(agent, torch.randn(2, INPUT), env_id)
    h, c = agent.get_memory()
    assert set(h) == set(c) == {key}
    assert h[key].shape == c[key].shape == (LAYERS, 2, HIDDEN)


def test_environments_of_different_sizes_do_not_disturb_each_other():
    agent = make_lstm()
    # Ids that one double-precision number cannot tell apart.
    inputs = {2**60: torch.randn(4, 2, INPUT), 2**60 + 1: torch.randn(4, 3, INPUT)}
    outputs = {env_id: [] for env_id in inputs}
    for t in range(4):
        for env_id in inputs:
            outputs[env_id].append(step(agent, inputs[env_id][t], env_id))
    h, c = agent.get_memory()
    assert h.keys() == inputs.keys()
    for env_id in inputs:
        expected, (last_h, last_c) = agent.lstm(inputs[env_id])
        actual = torch.stack(outputs[env_id]), h[env_id], c[env_id]
        torch.testing.assert_close(actual, (expected, last_h, last_c), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_state_that_a_caller_kept_does_not_change(mode):
    agent = make_lstm()
    with mode():
        step(agent, torch.randn(2, INPUT))
        kept = agent.lstm_h[0], agent.lstm_c[0]
        before = agent.get_memory()
        step(agent, torch.randn(2, INPUT), dones=torch.tensor([True, False]))
    for memory, tensor, old in zip((agent.lstm_h, agent.lstm_c), kept, before, strict=True):
        assert_equal(tensor, old[0])
        assert (memory[0] - tensor).abs().amin(dim=(0, 2)).gt(0).all()
        assert not memory[0].is_inference() and not memory[0].requires_grad


def test_resets_remove_the_keys():
    agent = make_lstm()
    for env_id in (0, 4, 8):
        step(agent, torch.randn(2, INPUT), env_id)
    agent.reset_env_memory(4)
    agent.reset_env_memory(99)
    assert [set(memory) for memory in agent.get_memory()] == [{0, 8}] * 2
    hidden = torch.randn(2, INPUT)
    torch.testing.assert_close(step(agent, hidden, 4), agent.lstm(hidden.unsqueeze(0))[0][0])
    agent.reset_memory()
    assert agent.get_memory() == ({}, {})


# Preallocated rows


def test_rows_start_with_zeros_and_add_nothing_to_the_state_dict_or_to_the_random_stream():
    agent = make_lstm(ENVS)
    after = torch.get_rng_state()
    assert_equal(agent.get_memory(), zeros(LAYERS, ENVS, HIDDEN))
    other = make_lstm()
    assert_equal(torch.get_rng_state(), after)
    assert not list(agent.buffers())
    agent.load_state_dict(other.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("env_id", "first"), [(None, 0), (2, 2), (torch.tensor(2), 2), (torch.tensor([2, 7, 7]), 2), ([3], 3)], ids=str
)
def test_a_step_changes_its_own_rows_only(rows, env_id, first):
    before = rows.get_memory()
    with torch.no_grad():
        step(rows, torch.randn(3, INPUT), env_id)
    for memory, old in zip(rows.get_memory(), before, strict=True):
        changed = (memory[0] != old[0]).any(dim=2).any(dim=0)
        assert changed.nonzero().flatten().tolist() == [first, first + 1, first + 2]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("inference", [False, True])
def test_steps_with_resets_leave_earlier_results_and_other_rows_alone(layers, first, inference):
    torch.manual_seed(0)
    ours = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, layers, num_envs=ENVS)
    theirs = LSTMWrapper(None, nn.Identity(), INPUT, HIDDEN, layers)
    theirs.load_state_dict(ours.state_dict())
    place, count = addresses(ours), ENVS - first
    kept = []
    with torch.inference_mode() if inference else torch.no_grad():
        for _ in range(3):
            hidden, dones = torch.randn(count, INPUT), torch.rand(count) < 0.3
            got, wanted = (step(agent, hidden, first, dones=dones) for agent in (ours, theirs))
            kept.append((got, wanted))
    for got, wanted in kept:
        torch.testing.assert_close(got, wanted)
    for memory, states in ((ours.lstm_h[0], theirs.lstm_h), (ours.lstm_c[0], theirs.lstm_c)):
        torch.testing.assert_close(memory[:, first:], states[first])
        assert not memory[:, :first].any()
    assert addresses(ours) == place


def test_the_whole_memory_is_set_in_place(rows):
    kept, saved = addresses(rows), rows.get_memory()
    rows.reset_memory()
    assert_equal(rows.get_memory(), zeros(LAYERS, ENVS, HIDDEN))
    rows.set_memory(saved)
    assert_equal(rows.get_memory(), saved)
    # An empty pair is a memory of zeros.
    rows.set_memory(({}, {}))
    assert_equal(rows.get_memory(), zeros(LAYERS, ENVS, HIDDEN))
    assert addresses(rows) == kept


def test_an_environment_is_reset_in_place(rows):
    kept, before = addresses(rows), rows.get_memory()
    for unknown in (-1, ENVS, 99, None, "4"):
        rows.reset_env_memory(unknown)
    assert_equal(rows.get_memory(), before)
    rows.reset_env_memory(4)
    for memory, old in zip(rows.get_memory(), before, strict=True):
        assert old[0].ne(0).all()
        assert_equal(memory[0], old[0].index_fill(1, torch.tensor(4), 0))
    assert addresses(rows) == kept


def test_allocate_memory_leaves_a_shallow_copy_alone(rows):
    before = rows.get_memory()
    player = copy.copy(rows)
    player.allocate_memory(9)
    with torch.no_grad():
        step(player, torch.randn(9, INPUT))
    assert player.get_memory()[0][0].shape == (LAYERS, 9, HIDDEN)
    assert player.lstm is rows.lstm
    assert rows.num_envs == ENVS
    assert_equal(rows.get_memory(), before)


def test_a_memory_from_the_meta_device_is_zeros():
    with torch.device("meta"):
        agent = make_lstm(ENVS)
    assert agent.lstm_h[0].is_meta
    agent.to_empty(device="cpu")
    assert_equal(agent.get_memory(), zeros(LAYERS, ENVS, HIDDEN))


# Ids on a device, which are never read


def test_an_id_on_the_cpu_serves_a_memory_elsewhere():
    device = torch.device("meta")
    assert _memory.memory_rows(torch.tensor([3, 9]), 2, ENVS, device) == 3
    with pytest.raises(ValueError, match=rf"{KEY}: got 5 for 2 rows, expected 0 to 4"):
        _memory.memory_rows(torch.tensor([5]), 2, ENVS, device)


@pytest.fixture
def unchecked(monkeypatch):
    """The CPU as a device whose values nobody looks at."""

    def rows(env_id, rows, num_envs):
        return _memory.clamped_rows(env_id[(0,) * env_id.dim()], rows, num_envs)

    monkeypatch.setattr(_memory, "_environment_rows", rows)


@pytest.mark.parametrize("env_id", [-1, 4, 2**40, -(2**62), 1.5, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("entries", [{}, {"dones": torch.ones(3, dtype=torch.bool)}])
@pytest.mark.usefixtures("unchecked")
def test_out_of_range_on_a_device_shows_as_nan_and_leaves_the_memory(rows, env_id, entries):
    before = rows.get_memory()
    with torch.no_grad():
        output = step(rows, torch.randn(3, INPUT), torch.tensor(env_id), **entries)
    assert output.isnan().all()
    assert_equal(rows.get_memory(), before)


@pytest.mark.parametrize("env_id", [0, 3, 2.0])
@pytest.mark.usefixtures("unchecked")
def test_in_range_on_a_device_is_as_on_the_cpu(rows, env_id):
    other, hidden = copy.deepcopy(rows), torch.randn(3, INPUT)
    with torch.no_grad():
        assert_equal(step(rows, hidden, torch.tensor(env_id)), step(other, hidden, int(env_id)))
    assert_equal(rows.get_memory(), other.get_memory())


def test_the_operator_passes_opcheck():
    operator = torch.ops.metta_fastagent.environment_rows.default
    for env_id in (torch.tensor(3), torch.tensor([[2], [9]], dtype=torch.int32)):
        torch.library.opcheck(operator, (env_id, 3, ENVS))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_tensor_is_not_read(shape, grad):
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        agent = make_lstm(ENVS)
        env_id, dones = torch.zeros(shape, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
        assert step(agent, torch.zeros(3, INPUT), env_id, dones=dones).shape == (3, HIDDEN)
        assert agent.lstm_h[0].shape == (LAYERS, ENVS, HIDDEN)


def test_a_rollout_step_of_fast_reads_nothing():
    with FakeTensorMode():
        agent = Fast(SimpleNamespace(), num_envs=ENVS)
        agent.activate_actions(["noop", "move"], [0, 3])
        entries = {"env_obs": torch.zeros(3, 8, 3, dtype=torch.uint8), "dones": torch.zeros(3)}
        with torch.no_grad():
            assert agent(rollout_td(3, torch.zeros(3, dtype=torch.int64), **entries))["actions"].shape == (3, 2)


# State dicts


def test_a_state_dict_holds_the_memory_where_asked_for(agent):
    filled(agent)
    assert not any("memory" in key for key in agent.state_dict())
    agent.memory_in_state_dict = True
    host, other = nn.ModuleDict({"policy": agent}), nn.ModuleDict({"policy": make_lstm(agent.num_envs)})
    saved = host.state_dict()
    assert {key for key in saved if "memory" in key} == {f"policy.rollout_memory.{name}.0" for name in "hc"}
    other.load_state_dict(saved)
    assert_equal(other["policy"].get_memory(), agent.get_memory())
    # What was saved is a copy, and the caller's dict keeps it.
    filled(agent)
    assert_equal(saved["policy.rollout_memory.h.0"], other["policy"].get_memory()[0][0])
    before = agent.get_memory()
    agent.load_state_dict({key: value for key, value in agent.state_dict().items() if "memory" not in key})
    assert_equal(agent.get_memory(), before)


def test_a_memory_that_does_not_fit_is_an_error_of_loading(rows):
    rows.memory_in_state_dict = True
    with pytest.raises(RuntimeError, match=r"memory: h of environment 0 is \[2, 6, 4\], expected a tensor \[2, 7, 4\]"):
        make_lstm(7).load_state_dict(rows.state_dict())
