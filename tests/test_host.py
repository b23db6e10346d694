"""The host: tables and calls passed on, features renumbered and back, and the host under DistributedDataParallel."""

import logging
import os
import runpy
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import distributed, nn

from metta_fastagent import ActionSpace, DistributedMettaAgent, Fast, LSTMWrapper, MettaAgent, PyTorchAgentMixin

NORMALIZATIONS = {"wall": 1.0, "altar": 10.0, "agent": 4.0, "mine": 20.0}
ORIGINAL_IDS = {"wall": 0, "altar": 1, "agent": 2, "mine": 4}
RENUMBERED_IDS = {"wall": 2, "altar": 0, "agent": 4, "mine": 1}
NAMES, MAX_PARAMS = ["noop", "move", "use"], [0, 3, 1]
PAIRS = [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]


def features(ids, **extra):
    known = {name: {"id": i, "normalization": NORMALIZATIONS[name]} for name, i in ids.items()}
    return known | {name: {"id": i, "normalization": 7.0} for name, i in extra.items()}


def environment():
    return SimpleNamespace(feature_normalizations={i: NORMALIZATIONS[name] for name, i in ORIGINAL_IDS.items()})


def fast_host(ids=ORIGINAL_IDS, seed=0):
    torch.manual_seed(seed)
    host = MettaAgent(environment(), Fast(environment()))
    host.initialize_to_environment(features(ids), NAMES, MAX_PARAMS)
    with torch.no_grad():
        # A fresh agent hardly tells observations apart; this one does.
        host.policy.policy.action_embeddings.weight.mul_(100)
        for name, param in host.lstm.named_parameters():
            param.mul_(0 if "bias" in name else 4)
    return host


def tokens_of(ids, rows=4, tokens=30, **extra):
    """Observations [rows, tokens, 3] of named features in the numbering `ids`; the same ones for every numbering."""
    generator = torch.Generator().manual_seed(3)
    xy = torch.randint(11, (2, rows, tokens), generator=generator)
    numbers = torch.tensor([*(ids[name] for name in ORIGINAL_IDS), *extra.values()])
    feature = numbers[torch.randint(len(numbers), (rows, tokens), generator=generator)]
    value = torch.randint(1, 30, (rows, tokens), generator=generator)
    return torch.stack((xy[0] * 16 + xy[1], feature, value), dim=-1).to(torch.uint8)


def outputs(host, observations):
    host.reset_memory()
    td = host(TensorDict({"env_obs": observations}, batch_size=[observations.shape[0]]))
    return td["full_log_probs"], td["values"]


def assert_same_outputs(actual, expected):
    for now, then in zip(actual, expected, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)


# Construction, tables


@pytest.mark.parametrize("policy", [None, "fast", Fast])
def test_a_policy_that_is_no_module_is_refused(policy):
    with pytest.raises(TypeError, match=r"policy: got .* expected an nn\.Module"):
        MettaAgent(environment(), policy)


class Recorder(nn.Module):
    """A policy that remembers the calls it gets; answers with the method's name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.calls = []
        self.action_index_tensor = self.cum_action_max_params = None

    def forward(self, *args):
        self.calls.append(("forward", args))
        return "forward"


def recording(method):
    def call(self, *args):
        self.calls.append((method, args))
        return method

    return call


DELEGATED = [
    # method, arguments, what a policy without it gives
    ("has_memory", (), False),
    ("get_memory", (), {}),
    ("set_memory", ("memory",), None),
    ("reset_memory", (), None),
    ("reset_env_memory", (3,), None),
    ("clip_weights", (), None),
    ("l2_init_loss", (), torch.tensor(0.0)),
    ("update_l2_init_weight_copy", (), None),
    ("compute_weight_metrics", (0.02,), []),
    ("maybe_compute_weight_metrics", (5, 0.02), None),
]
for name in [
    *(method for method, _, _ in DELEGATED),
    "_convert_action_to_logit_index",
    "_convert_logit_index_to_action",
    "activate_action_embeddings",
    "initialize_to_environment",
    "_apply_feature_remapping",
    "update_normalization_factors",
]:
    setattr(Recorder, name, recording(name))


@pytest.mark.parametrize(("method", "args"), [entry[:2] for entry in DELEGATED])
def test_each_call_reaches_the_policy(method, args):
    host = MettaAgent(environment(), Recorder())
    answer = getattr(host, method)(*args)
    assert host.policy.calls == [(method, args)]
    assert answer == (True if method == "has_memory" else method) or method in ANSWERLESS


ANSWERLESS = {"set_memory", "reset_memory", "reset_env_memory", "clip_weights", "update_l2_init_weight_copy"}


@pytest.mark.parametrize("method", ["_convert_action_to_logit_index", "_convert_logit_index_to_action"])
def test_conversions_reach_the_policy(method):
    host, argument = MettaAgent(environment(), Recorder()), torch.zeros(2, 2)
    assert getattr(host, method)(argument) == method
    assert host.policy.calls == [(method, (argument,))]


@pytest.mark.parametrize(("method", "args", "default"), DELEGATED)
def test_a_policy_without_a_method_gets_its_default(method, args, default):
    answer = getattr(MettaAgent(environment(), nn.Identity()), method)(*args)
    assert type(answer) is type(default)
    assert answer == default


def test_forward_hands_everything_to_the_policy():
    host = MettaAgent(environment(), Recorder())
    td, state, action = object(), object(), object()
    assert host(td, state, action) == "forward"
    host(td)
    assert host.policy.calls == [("forward", (td, state, action)), ("forward", (td, None, None))]


def test_attributes_describe_the_policy():
    host = MettaAgent(environment(), Recorder(), device="cpu")
    assert host.total_params == 6
    assert host.device == torch.device("cpu")
    assert host.lstm is None
    assert (host.action_space, host.action_index_tensor, host.cum_action_max_params) == (None, None, None)
    assert host.feature_normalizations == {0: 1.0, 1: 10.0, 2: 4.0, 4: 20.0}
    agent = fast_host()
    assert agent.lstm is agent.policy.lstm


def test_tables_and_names_are_passed_on():
    host = MettaAgent(environment(), Recorder())
    host.initialize_to_environment(features(ORIGINAL_IDS), NAMES, MAX_PARAMS, "cpu")
    full_names = ["noop_0", "move_0", "move_1", "move_2", "move_3", "use_0", "use_1"]
    assert [name for name, _ in host.policy.calls] == ["activate_action_embeddings", "initialize_to_environment"]
    assert all(args == (full_names, torch.device("cpu")) for _, args in host.policy.calls)
    assert host.policy.action_index_tensor.tolist() == PAIRS
    assert host.policy.action_index_tensor.dtype == torch.int32
    assert host.policy.cum_action_max_params.tolist() == [0, 0, 3, 4]
    assert host.policy.cum_action_max_params.dtype == torch.int64
    assert host.action_index_tensor is host.policy.action_index_tensor
    assert host.cum_action_max_params is host.policy.cum_action_max_params
    assert isinstance(host.action_space, ActionSpace)
    assert host.action_space.num_actions == 7


def test_tables_can_be_set_again():
    host = fast_host()
    host.initialize_to_environment(features(ORIGINAL_IDS), ["noop", "move"], [0, 4])
    assert host.policy.cum_action_max_params.tolist() == [0, 0, 4]
    assert outputs(host, tokens_of(ORIGINAL_IDS))[0].shape == (4, 6)


def test_a_policy_with_nothing_but_forward_will_do():
    host = MettaAgent(SimpleNamespace(), nn.Identity())
    for ids in (ORIGINAL_IDS, RENUMBERED_IDS):
        host.initialize_to_environment(features(ids), NAMES, MAX_PARAMS)
    assert host.policy.action_index_tensor.tolist() == PAIRS


# Features


def applied_remap(host):
    calls = [args[0] for name, args in host.policy.calls if name == "_apply_feature_remapping"]
    assert len(calls) == 1
    assert calls[0].dtype == torch.uint8
    assert calls[0].shape == (256,)
    return calls[0].tolist()


def recorder_host(second, training):
    """A host that saw the original numbering first and `second` then; only the calls of the latter are recorded."""
    host = MettaAgent(environment(), Recorder())
    host.initialize_to_environment(features(ORIGINAL_IDS), NAMES, MAX_PARAMS)
    host.policy.calls.clear()
    host.train(training).initialize_to_environment(second, NAMES, MAX_PARAMS)
    return host


def table(entries):
    return [entries.get(i, 255) for i in range(256)]


@pytest.mark.parametrize("training", [True, False])
def test_the_same_numbering_is_the_identity(training):
    host = recorder_host(features(ORIGINAL_IDS), training)
    assert applied_remap(host) == table({0: 0, 1: 1, 2: 2, 4: 4})
    assert host.feature_id_remap == {}


@pytest.mark.parametrize("training", [True, False])
def test_another_numbering_is_mapped_to_the_original_one(training, caplog):
    with caplog.at_level(logging.INFO, logger="metta_fastagent"):
        host = recorder_host(features(RENUMBERED_IDS), training)
    assert applied_remap(host) == table({2: 0, 0: 1, 4: 2, 1: 4})
    assert host.feature_id_remap == {2: 0, 0: 1, 4: 2, 1: 4}
    assert "4 features renumbered" in caplog.text
    assert host.get_original_feature_mapping() == ORIGINAL_IDS
    (factors,) = (args for name, args in host.policy.calls if name == "update_normalization_factors")
    assert factors == (features(RENUMBERED_IDS), ORIGINAL_IDS)


def test_a_new_feature_is_unknown_in_evaluation():
    host = recorder_host(features(RENUMBERED_IDS, lava=3), training=False)
    assert applied_remap(host) == table({2: 0, 0: 1, 4: 2, 1: 4})
    assert host.feature_id_remap[3] == 255
    assert host.get_original_feature_mapping() == ORIGINAL_IDS


@pytest.mark.parametrize(("wanted", "given"), [(9, 9), (3, 3)])
def test_a_new_feature_in_training_keeps_its_id_where_that_is_free(wanted, given):
    host = recorder_host(features(RENUMBERED_IDS, lava=wanted), training=True)
    assert applied_remap(host)[wanted] == given
    assert host.get_original_feature_mapping() == {**ORIGINAL_IDS, "lava": given}


def test_new_features_in_training_get_free_ids():
    # Their own ids 0 and 2 belong to wall and agent, which this environment does not have.
    host = recorder_host(features({"altar": 1}, lava=0, snow=2), training=True)
    mapping = host.get_original_feature_mapping()
    assert applied_remap(host) == table({1: 1, 0: mapping["lava"], 2: mapping["snow"]})
    assert {name: mapping[name] for name in ORIGINAL_IDS} == ORIGINAL_IDS
    assert len(set(mapping.values())) == 6
    assert max(mapping.values()) < 255


def test_a_mapping_moves_to_another_host():
    trained = MettaAgent(environment(), Recorder())
    assert trained.get_original_feature_mapping() is None
    trained.initialize_to_environment(features(ORIGINAL_IDS), NAMES, MAX_PARAMS)
    saved = trained.get_original_feature_mapping()

    fresh = MettaAgent(environment(), Recorder())
    fresh.restore_original_feature_mapping(saved)
    saved["wall"] = 17
    assert trained.get_original_feature_mapping() == fresh.get_original_feature_mapping() == ORIGINAL_IDS
    fresh.initialize_to_environment(features(RENUMBERED_IDS), NAMES, MAX_PARAMS)
    assert applied_remap(fresh) == table({2: 0, 0: 1, 4: 2, 1: 4})


@pytest.mark.parametrize("bad", [None, [("wall", 0)], {"wall": 255}, {"wall": "0"}, {"wall": 0, "altar": 0}])
def test_a_bad_mapping_is_refused_and_the_old_one_kept(bad):
    host = fast_host()
    with pytest.raises((TypeError, ValueError), match=r"mapping.*got .*expected"):
        host.restore_original_feature_mapping(bad)
    assert host.get_original_feature_mapping() == ORIGINAL_IDS


def test_fast_sees_the_same_in_every_numbering():
    host = fast_host().eval()
    expected = outputs(host, tokens_of(ORIGINAL_IDS))
    assert (outputs(host, tokens_of(RENUMBERED_IDS))[0] - expected[0]).abs().max() > 1e-2
    host.initialize_to_environment(features(RENUMBERED_IDS), NAMES, MAX_PARAMS)
    assert_same_outputs(outputs(host, tokens_of(RENUMBERED_IDS)), expected)
    host.initialize_to_environment(features(ORIGINAL_IDS), NAMES, MAX_PARAMS)
    assert_same_outputs(outputs(host, tokens_of(ORIGINAL_IDS)), expected)


def test_fast_with_a_restored_mapping_sees_the_same():
    trained = fast_host()
    fresh = MettaAgent(environment(), Fast(environment()))
    fresh.restore_original_feature_mapping(trained.get_original_feature_mapping())
    fresh.initialize_to_environment(features(RENUMBERED_IDS), NAMES, MAX_PARAMS)
    fresh.load_state_dict(trained.state_dict())
    assert_same_outputs(outputs(fresh, tokens_of(RENUMBERED_IDS)), outputs(trained, tokens_of(ORIGINAL_IDS)))


def test_fast_drops_tokens_of_an_unknown_feature():
    host = fast_host().eval()
    ids = {"wall": 2, "altar": 0, "agent": 4, "mine": 3}
    host.initialize_to_environment(features(ids, lava=1), NAMES, MAX_PARAMS)
    observations = tokens_of(ids, lava=1)
    lava = observations[..., 1] == 1
    assert lava.any()
    without = observations.masked_fill(lava.unsqueeze(-1), 255)
    assert_same_outputs(outputs(host, observations), outputs(host, without))


def max_vec(host):
    return host.policy.policy.max_vec.flatten().tolist()


def test_normalisation_is_updated_at_the_original_ids():
    host = fast_host()
    assert max_vec(host) == [1, 10, 4, 1, 20]
    changed = features(RENUMBERED_IDS)
    changed["altar"]["normalization"] = 50.0
    del changed["mine"]["normalization"]
    host.initialize_to_environment(changed, NAMES, MAX_PARAMS)
    assert max_vec(host) == [1, 50, 4, 1, 20]
    assert host.feature_normalizations == {2: 1.0, 0: 50.0, 4: 4.0}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", [1, 3, 200])
def test_a_new_feature_leaves_the_normalisation_of_the_others(training, number):
    host = fast_host().train(training)
    # Number 1 is the altar's, which this environment does not have.
    host.initialize_to_environment(features({"wall": 2, "mine": 0}, lava=number), NAMES, MAX_PARAMS)
    vector = max_vec(host)
    assert [vector[i] for i in ORIGINAL_IDS.values()] == [1, 10, 4, 20]


def wall(**properties):
    return {"wall": {"id": 0, "normalization": 2.0} | properties}


BAD_FEATURES = {
    "none": None,
    "list": ["wall"],
    "id only": {"wall": 0},
    "no id": {"wall": {"normalization": 1.0}},
    "id 255": wall(id=255),
    "negative id": wall(id=-1),
    "string id": wall(id="3"),
    "bool id": wall(id=True),
    "float id": wall(id=1.0),
    "same id twice": {**wall(), "altar": {"id": 0}},
    "normalization 0": wall(normalization=0),
    "negative normalization": wall(normalization=-1.0),
    "nan normalization": wall(normalization=float("nan")),
    "infinite normalization": wall(normalization=float("inf")),
    "string normalization": wall(normalization="1"),
    "no normalization": wall(normalization=None),
    "wrong one last": {**features(RENUMBERED_IDS), "lava": {"id": 300}},
}


def snapshot(host):
    tables = host.action_index_tensor, host.cum_action_max_params, host.policy.policy.feature_remap
    return [
        [None if t is None else t.tolist() for t in tables],
        host.get_original_feature_mapping(),
        dict(host.feature_normalizations),
        dict(host.feature_id_remap),
        host.action_space,
        host.policy.policy.num_active_actions,
        max_vec(host),
    ]


@pytest.mark.parametrize("bad", BAD_FEATURES.values(), ids=BAD_FEATURES.keys())
def test_bad_features_are_refused_and_nothing_changes(bad):
    host = fast_host()
    before = snapshot(host)
    with pytest.raises((TypeError, ValueError), match=r"^features.*got .*expected"):
        host.initialize_to_environment(bad, ["noop", "jump"], [0, 1])
    assert snapshot(host) == before


@pytest.mark.parametrize(
    ("names", "max_params", "named"),
    [(["noop"], [0, 1], "action_max_params"), (["noop"], [-1], "action_max_params"), ([], [], "action_names")],
)
def test_bad_actions_are_refused_and_nothing_changes(names, max_params, named):
    host = fast_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=rf"^{named}.*got .*expected"):
        host.initialize_to_environment(features(RENUMBERED_IDS), names, max_params)
    assert snapshot(host) == before


def test_more_actions_than_embeddings_change_nothing():
    host = fast_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=r"got 102 actions, expected at most 100"):
        host.initialize_to_environment(features(RENUMBERED_IDS), ["noop", "move"], [0, 100])
    assert snapshot(host) == before


# DistributedDataParallel


@pytest.fixture
def one_process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class TinyAgent(PyTorchAgentMixin, LSTMWrapper):
    """The smallest agent with the mixin: a Linear for each head."""

    def __init__(self, **kwargs):
        mixin_params = self.extract_mixin_params(kwargs)
        heads = nn.ModuleDict({"encoder": nn.Linear(90, 8), "actor": nn.Linear(8, 7), "critic": nn.Linear(8, 1)})
        super().__init__(None, heads, 8, 8, num_layers=1)
        self.init_mixin(**mixin_params)

    def forward(self, td, state=None, action=None):
        observations = td["env_obs"]
        B, TT = self.set_tensordict_fields(td, observations)
        encoded = self.policy["encoder"](observations.reshape(B * TT, -1) / 255)
        hidden = self.run_lstm(td, encoded, B, TT)
        logits, value = self.policy["actor"](hidden), self.policy["critic"](hidden)
        if action is None:
            return self.handle_inference_mode(td, logits, value)
        return self.handle_training_mode(td, action, logits, value)


def tiny_host(**kwargs):
    torch.manual_seed(0)
    host = MettaAgent(environment(), TinyAgent(**kwargs))
    host.initialize_to_environment(features(ORIGINAL_IDS), NAMES, MAX_PARAMS)
    return host


def segments(rows=4, steps=3):
    observations = tokens_of(ORIGINAL_IDS, rows * steps).view(rows, steps, 30, 3)
    actions = torch.tensor(PAIRS)[torch.arange(rows * steps) % 7].view(rows, steps, 2)
    return observations, actions


def loss_of(agent, observations, actions):
    td = TensorDict({"env_obs": observations}, batch_size=observations.shape[:2])
    out = agent(td, action=actions)
    return out["act_log_prob"].mean() + out["value"].square().mean()


@pytest.mark.parametrize("make_host", [tiny_host, fast_host])
def test_distributed_forward_and_backward_equal_the_plain_ones(one_process_group, make_host):
    plain, agent = make_host(), DistributedMettaAgent(make_host(), "cpu")
    loss_of(plain, *segments()).backward()
    loss_of(agent, *segments()).backward()
    for (name, param), expected in zip(agent.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
    observations = segments()[0][:, 0]
    torch.manual_seed(1)
    expected = plain(TensorDict({"env_obs": observations}, batch_size=[4]))["actions"]
    torch.manual_seed(1)
    assert torch.equal(agent(TensorDict({"env_obs": observations}, batch_size=[4]))["actions"], expected)


def test_distributed_agent_passes_attributes_and_calls_on(one_process_group):
    host = tiny_host(clip_range=0.01)
    agent = DistributedMettaAgent(host, "cpu")
    assert agent.policy is host.policy
    assert agent.action_space is host.action_space
    assert agent.total_params == sum(param.numel() for param in host.parameters())
    assert agent.has_memory()
    assert agent.lstm is host.policy.lstm
    assert agent.l2_init_loss().item() == 0
    assert host.policy.policy["encoder"].weight.abs().max() > 0.01
    agent.clip_weights()
    assert host.policy.policy["encoder"].weight.abs().max() <= 0.01
    agent.initialize_to_environment(features(RENUMBERED_IDS), ["noop"], [0])
    assert host.policy.action_index_tensor.tolist() == [[0, 0]]
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = agent.no_such_name


def test_distributed_agent_with_batch_norm_works_on_the_cpu(one_process_group):
    agent = DistributedMettaAgent(MettaAgent(None, nn.BatchNorm1d(2)), "cpu")
    assert agent.policy(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist() == [
        pytest.approx([-1, 0], abs=1e-4),
        pytest.approx([1, 0], abs=1e-4),
    ]


def test_distributed_agent_passes_options_on(one_process_group):
    agent = DistributedMettaAgent(tiny_host(), "cpu", find_unused_parameters=True, gradient_as_bucket_view=True)
    assert agent.find_unused_parameters and agent.gradient_as_bucket_view


WORKER = """
    import sys, torch
    from datetime import timedelta
    from torch import distributed, nn
    from metta_fastagent import DistributedMettaAgent, MettaAgent

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, td, state, action):
            return self.weight * td

    rank, store = int(sys.argv[1]), sys.argv[2]
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        agent = DistributedMettaAgent(MettaAgent(None, Product()), "cpu")
        agent(torch.tensor([1.0, 10.0]) * (1 + 2 * rank)).sum().backward()
        print(agent.policy.weight.grad.tolist())
    finally:
        distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path, monkeypatch, capsys):
    script, store = tmp_path / "worker.py", str(tmp_path / "store")
    script.write_text(textwrap.dedent(WORKER))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, script, "1", store], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        monkeypatch.setattr(sys, "argv", [str(script), "0", store])
        runpy.run_path(str(script))
        printed, _ = other.communicate(timeout=60)
    finally:
        other.kill()
        other.wait()
    # Gradients are (1, 10) and (3, 30).
    assert capsys.readouterr().out.strip() == printed.strip() == "[2.0, 20.0]"
