"""Layouts of rollout steps and of training calls: each gives what a loop over the steps gives, or is refused."""

from types import SimpleNamespace

import pytest
import torch
from agents_for_tests import HIDDEN, PAIRS, TOKENS, SmallPolicy, assert_equal, make_observations, set_tables
from tensordict import TensorDict
from torch._subclasses import FakeTensorMode

from metta_fastagent import LSTMWrapper, PyTorchAgentMixin

ENVS, STEPS, LAYERS = 6, 5, 2


class Agent(PyTorchAgentMixin, LSTMWrapper):
    def __init__(self, env=None, num_envs=None, **kwargs):
        params = self.extract_mixin_params(kwargs)
        super().__init__(env, SmallPolicy(), HIDDEN, HIDDEN, LAYERS, num_envs=num_envs)
        self.init_mixin(**params)

    def forward(self, td, state=None, action=None):
        B, TT = self.set_tensordict_fields(td, td["env_obs"])
        hidden = self.run_lstm(td, self.policy.encode_observations(td["env_obs"]), B, TT)
        logits, value = self.policy.decode_actions(hidden, B * TT)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def make(**kwargs):
    torch.manual_seed(1)
    agent = set_tables(Agent(**kwargs))
    with torch.no_grad():
        agent.policy.actor.weight.mul_(20)
    return agent


def episode_data():
    torch.manual_seed(2)
    return make_observations(ENVS, STEPS), torch.rand(ENVS, STEPS) < 0.2, torch.randint(len(PAIRS), (ENVS, STEPS))


def by_hand(agent, observations, dones):
    """(full log-probs [ENVS, STEPS, A], values [ENVS, STEPS]): nn.LSTM step by step, rows zeroed at each start."""
    state = tuple(torch.zeros(2, LAYERS, ENVS, HIDDEN))
    outputs = []
    for step, fresh in zip(observations.unbind(1), dones.unbind(1), strict=True):
        state = tuple(part * ~fresh.unsqueeze(-1) for part in state)
        output, state = agent.lstm(agent.policy.encode_observations(step).unsqueeze(0), state)
        outputs.append(output[0])
    hidden = torch.stack(outputs, 1)
    return agent.policy.actor(hidden).log_softmax(-1), agent.policy.value_head(hidden).squeeze(-1)


def close(got, expected):
    torch.testing.assert_close(got, expected.view(got.shape), rtol=1e-5, atol=1e-5)


# Rollouts

NAMED = {
    "ids [B, 1]": lambda rows: ("training_env_ids", rows.unsqueeze(1)),
    "ids [B]": lambda rows: ("training_env_ids", rows),
    "int32 ids": lambda rows: ("training_env_ids", rows.int()),
    "a list of ids": lambda rows: ("training_env_ids", rows.tolist()),
    "a first id": lambda rows: ("training_env_id_start", int(rows[0])),
    "a tensor with the first id": lambda rows: ("training_env_id_start", rows[:1]),
}
PARTS = {
    "two slices": [[0, 1, 2], [3, 4, 5]],
    "any order": [[4, 0, 2], [5, 1, 3]],
    "other sizes": [[5], [3, 1, 0, 2], [4]],
    "all at once": [[0, 1, 2, 3, 4, 5]],
}


def named_td(name, rows, **entries):
    key, value = NAMED[name](rows)
    td = TensorDict(entries, batch_size=[len(rows)])
    if isinstance(value, (list, int)):
        td.set_non_tensor(key, value)
    elif value.shape[:1] == (len(rows),):
        td[key] = value
    else:
        td.set_non_tensor(key, value)
    return td


@pytest.mark.parametrize("num_envs", [None, ENVS, ENVS + 3])
@pytest.mark.parametrize(
    ("name", "parts"),
    # A first id names rows that follow each other.
    [
        (name, parts)
        for name in NAMED
        for parts in PARTS
        if "first" not in name or parts in ("two slices", "all at once")
    ],
)
def test_a_rollout_in_parts(name, parts, num_envs):
    agent, (observations, dones, _) = make(num_envs=num_envs), episode_data()
    log_probs, values = torch.zeros(ENVS, STEPS, len(PAIRS)), torch.zeros(ENVS, STEPS)
    with torch.no_grad():
        for t in range(STEPS):
            for rows in map(torch.tensor, PARTS[parts]):
                td = agent(named_td(name, rows, env_obs=observations[rows, t], dones=dones[rows, t]))
                log_probs[rows, t], values[rows, t] = td["full_log_probs"], td["values"]
        expected = by_hand(agent, observations, dones)
    close(log_probs, expected[0])
    close(values, expected[1])


def test_environments_that_come_later_and_one_that_is_reset():
    agent = make()
    observations = make_observations(3, 1)[:, 0]
    td = lambda rows: named_td("ids [B]", torch.tensor(rows), env_obs=observations[: len(rows)])  # noqa: E731
    with torch.no_grad():
        first = agent(td([7, 2]))["values"]
        second = agent(td([7, 2, 9]))["values"]
        assert sorted(agent.lstm_h) == [2, 7, 9]
        assert {state.shape for state in agent.lstm_h.values()} == {(LAYERS, 1, HIDDEN)}
        agent.reset_env_memory(7)
        third = agent(td([7, 2]))["values"]
    assert_equal(third[0], first[0])
    assert not torch.equal(third[1], first[1]) and not torch.equal(second[0], first[0])


@pytest.mark.parametrize(
    ("num_envs", "ids", "message"),
    [
        (None, torch.tensor([1, 2, 1]), "got 1 more than once, expected each environment once"),
        (8, torch.tensor([1, 2, 1]), "got 1 more than once, expected each environment once"),
        (8, torch.tensor([1, 2, 8]), "got 8, expected 0 to 7, as the memory has num_envs=8 rows"),
        (8, torch.tensor([-1, 2, 3]), "got -1, expected 0 to 7"),
        (None, torch.tensor([1.0, 2.0, 3.0]), "got a float32 tensor .*expected 3 integers, one for each row"),
        (8, torch.zeros(3, 2, dtype=torch.int64), r"got an int64 tensor of shape \[3, 2\].*expected 3 integers"),
        (None, torch.ones(3, dtype=torch.bool), "got a bool tensor .*expected 3 integers"),
        (8, torch.zeros(3, dtype=torch.int64, device="meta"), "got .*on meta, expected integers on cpu"),
    ],
)
def test_ids_that_are_refused(num_envs, ids, message):
    agent, observations = make(num_envs=num_envs), make_observations(3, 1)[:, 0]
    td = TensorDict({"env_obs": observations, "training_env_ids": ids}, batch_size=[3])
    before = agent.get_memory()
    with pytest.raises(ValueError, match=rf"^td\['training_env_ids'\]: {message}"):
        agent(td)
    assert_equal(agent.get_memory(), before)


def test_ids_on_a_device_are_not_read():
    agent = make(num_envs=8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(torch.tensor([3, 1]))
        where = agent._memory.locate_each(ids, 2)
    assert (where.index.shape, where.valid.shape) == ((2,), ())


def test_a_device_id_out_of_range_changes_no_memory():
    # The rows as a kernel's device sees them: clamped, and marked.
    agent = make(num_envs=4)
    index, valid = torch.tensor([1, 3]), torch.tensor(False)
    where = type(agent._memory.locate_each(torch.tensor([0]), 1))(index, valid)
    before = agent.get_memory()
    agent._memory.write(where, torch.ones(LAYERS, 2, HIDDEN), torch.ones(LAYERS, 2, HIDDEN), torch.float32)
    assert_equal(agent.get_memory(), before)


@pytest.mark.parametrize("num_envs", [None, ENVS])
def test_a_rollout_stores_its_state_where_asked_for(num_envs):
    agent, (observations, dones, index) = make(num_envs=num_envs), episode_data()
    agent.writes_state = True
    agent(TensorDict({"env_obs": observations[:, 0]}, batch_size=[ENVS]))
    spec = agent.get_agent_experience_spec()
    steps = []
    with torch.no_grad():
        for t in range(STEPS):
            entries = {"env_obs": observations[:, t], "dones": dones[:, t], "truncateds": torch.zeros(ENVS).bool()}
            steps.append(agent(TensorDict(entries, batch_size=[ENVS])))
        stored = torch.stack([step.select("env_obs", *spec.keys()) for step in steps], 1)
        later = agent(stored[:, 2:], action=index[:, 2:])
    expected = torch.stack([step["full_log_probs"] for step in steps[2:]], 1)
    close(later["full_log_probs"], expected)


def test_the_experience_spec():
    space = SimpleNamespace(shape=(TOKENS, 3), dtype="uint8")
    spec = make(env=SimpleNamespace(single_observation_space=space)).get_agent_experience_spec()
    assert {key: (tuple(entry.shape), entry.dtype) for key, entry in spec.items()} == {
        "env_obs": ((TOKENS, 3), torch.uint8),
        "dones": ((), torch.bool),
        "truncateds": ((), torch.bool),
        "lstm_h": ((LAYERS, HIDDEN), torch.float32),
        "lstm_c": ((LAYERS, HIDDEN), torch.float32),
    }
    buffer = spec.expand(3, 4).clone()
    buffer["dones"][0, 0] = True
    assert buffer["dones"].sum() == 1 and not buffer["lstm_h"].any()
    assert "lstm_h" not in make()(TensorDict({"env_obs": make_observations(2, 1)[:, 0]}, batch_size=[2])).keys()


# Training

rows_of = lambda tensor: tensor.flatten(0, 1)  # noqa: E731


def flat_td(observations, dones, dtype=torch.int64, batch=ENVS, bptt=STEPS, shape=(ENVS * STEPS,)):
    td = TensorDict({"env_obs": rows_of(observations), "dones": dones.flatten()}, batch_size=[ENVS * STEPS])
    td["batch"], td["bptt"] = torch.full(shape, batch, dtype=dtype), torch.full(shape, bptt, dtype=dtype)
    return td


TRAINING = {
    "[B, T]": lambda o, d: TensorDict({"env_obs": o, "dones": d}, batch_size=[ENVS, STEPS]),
    "[B]": lambda o, d: TensorDict({"env_obs": o, "dones": d}, batch_size=[ENVS]),
    "flat with fields": flat_td,
    "flat with int32 fields": lambda o, d: flat_td(o, d, torch.int32),
    "flat with fields [B * T, 1]": lambda o, d: flat_td(o, d, shape=(ENVS * STEPS, 1)),
}
ACTIONS = {
    "pairs [B, T, 2]": lambda index: torch.tensor(PAIRS)[index],
    "pairs [B * T, 2]": lambda index: torch.tensor(PAIRS, dtype=torch.int32)[index.flatten()],
    "int64 indices [B, T]": lambda index: index,
    "int32 indices [B, T]": lambda index: index.int(),
    "int64 indices [B * T]": torch.flatten,
    "int32 indices [B * T]": lambda index: index.int().flatten(),
}


@pytest.mark.parametrize("num_envs", [None, ENVS])
@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("layout", TRAINING)
def test_training(layout, actions, num_envs):
    agent, (observations, dones, index) = make(num_envs=num_envs), episode_data()
    td, before = TRAINING[layout](observations, dones), agent.get_memory()
    full, values = by_hand(agent, observations, dones)
    # A second update of the same rows finds the fields of the first.
    for _ in range(2):
        result = agent(td, action=ACTIONS[actions](index))
        assert tuple(result.batch_size) == (ENVS, STEPS)
        close(result["full_log_probs"], full)
        close(result["act_log_prob"], full.gather(-1, index.unsqueeze(-1)))
        close(result["value"], values.unsqueeze(-1))
    assert_equal(agent.get_memory(), before)


def test_flat_rows_of_vectors():
    class Vectors(Agent):
        def forward(self, td, state=None, action=None):
            B, TT = self.set_tensordict_fields(td, td["env_obs"], training=True)
            return B, TT

    agent = set_tables(Vectors())
    vectors = torch.randn(ENVS, STEPS, 3)
    assert agent(flat_td(vectors, torch.zeros(ENVS, STEPS))) == (ENVS, STEPS)
    assert agent(TensorDict({"env_obs": vectors}, batch_size=[ENVS])) == (ENVS, STEPS)
    # Fields of segments beside observations of segments.
    td = TensorDict({"env_obs": vectors}, batch_size=[ENVS])
    td["batch"], td["bptt"] = torch.full((ENVS,), ENVS), torch.full((ENVS,), STEPS)
    assert agent(td) == (ENVS, STEPS)


def test_fields_of_single_steps_are_a_rollout():
    agent, (observations, dones, _) = make(), episode_data()
    td = TensorDict({"env_obs": observations[:, 0], "dones": dones[:, 0]}, batch_size=[ENVS])
    td["batch"], td["bptt"] = torch.full((ENVS,), ENVS), torch.ones(ENVS, dtype=torch.int64)
    assert agent.set_tensordict_fields(td, td["env_obs"]) == (ENVS, 1)
    agent(td)
    assert list(agent.lstm_h) == [0]


@pytest.mark.parametrize(("batch", "bptt"), [(ENVS * STEPS, STEPS), (ENVS, STEPS + 1), (1, STEPS)])
def test_fields_that_do_not_fit_are_refused(batch, bptt):
    agent, (observations, dones, index) = make(), episode_data()
    td = flat_td(observations, dones, batch=batch, bptt=bptt)
    with pytest.raises(ValueError, match=rf"^td: holds batch x bptt = {batch} x {bptt}, expected 30 rows"):
        agent(td, action=index)
    assert "act_log_prob" not in td.keys() and agent.get_memory() == ({}, {})
    # Said to be single steps, they are.
    assert agent.set_tensordict_fields(td, td["env_obs"], training=False) == (ENVS * STEPS, 1)


@pytest.mark.parametrize("layout", TRAINING)
def test_segments_without_actions_are_refused(layout):
    agent, (observations, dones, _) = make(), episode_data()
    with pytest.raises(ValueError, match=r"^action: got None, expected pairs \[6, 5, 2\] for segments$"):
        agent(TRAINING[layout](observations, dones))
    assert agent.get_memory() == ({}, {})


def test_values_beside_value_where_asked_for():
    observations, dones, index = episode_data()
    for layout in TRAINING:
        assert "values" not in make()(TRAINING[layout](observations, dones), action=index).keys()
        result = make(training_values=True)(TRAINING[layout](observations, dones), action=index)
        assert result["value"].shape == (ENVS, STEPS, 1)
        assert_equal(result["values"], result["value"].squeeze(-1))


@pytest.mark.parametrize(
    ("action_format", "dtype", "shape"),
    [("pair", torch.int32, (ENVS, 2)), ("index", torch.int64, (ENVS,)), ("index32", torch.int32, (ENVS,))],
)
def test_actions_as_pairs_or_indices(action_format, dtype, shape):
    agent, observations = make(action_format=action_format), make_observations(ENVS, 1)[:, 0]
    torch.manual_seed(5)
    td = agent(TensorDict({"env_obs": observations}, batch_size=[ENVS]))
    assert (td["actions"].dtype, tuple(td["actions"].shape)) == (dtype, shape)
    index = [PAIRS.index(pair) for pair in td["actions"].tolist()] if action_format == "pair" else td["actions"]
    expected = td["full_log_probs"].gather(1, torch.as_tensor(index).long().unsqueeze(1)).squeeze(1)
    assert_equal(td["act_log_prob"], expected)
