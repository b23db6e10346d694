"""The host: tables and calls passed on, features renumbered and back, and the host under DistributedDataParallel."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from agents_for_tests import ACTION_NAMES, MAX_PARAMS, PAIRS, make_actions, make_agent, make_env, make_observations
from tensordict import TensorDict
from torch import distributed, nn

from metta_fastagent import ActionSpace, DistributedMettaAgent, Fast, MettaAgent

NORMALIZATIONS = {"wall": 1.0, "altar": 10.0, "agent": 4.0, "mine": 20.0}
ORIGINAL_IDS = {"wall": 0, "altar": 1, "agent": 2, "mine": 4}
RENUMBERED_IDS = {"wall": 2, "altar": 0, "agent": 4, "mine": 1}
# Renumbered id -> original id.
REMAP = {2: 0, 0: 1, 4: 2, 1: 4}
ACTIONS = ACTION_NAMES, MAX_PARAMS


def features(ids, **extra):
    known = {name: {"id": i, "normalization": NORMALIZATIONS[name]} for name, i in ids.items()}
    return known | {name: {"id": i, "normalization": 7.0} for name, i in extra.items()}


def environment():
    return SimpleNamespace(feature_normalizations={i: NORMALIZATIONS[name] for name, i in ORIGINAL_IDS.items()})


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

    def arguments(self, method):
        """The arguments of the only call of a method."""
        (args,) = [args for name, args in self.calls if name == method]
        return args


def recorded(method):
    def call(self, *args):
        self.calls.append((method, args))
        return method

    return call


# Method, arguments, answer of the host if the policy has the method (it answers with its name), and if it does not.
PASSED_ON = [
    ("has_memory", (), True, False),
    ("get_memory", (), "get_memory", {}),
    ("set_memory", ("memory",), None, None),
    ("reset_memory", (), None, None),
    ("reset_env_memory", (3,), None, None),
    ("clip_weights", (), None, None),
    ("l2_init_loss", (), "l2_init_loss", torch.tensor(0.0)),
    ("update_l2_init_weight_copy", (), None, None),
    ("compute_weight_metrics", (0.02,), "compute_weight_metrics", []),
    ("maybe_compute_weight_metrics", (5, 0.02), "maybe_compute_weight_metrics", None),
]
CONVERSIONS = ["_convert_action_to_logit_index", "_convert_logit_index_to_action"]
AT_START = ["activate_action_embeddings", "initialize_to_environment"]
FEATURES = ["_apply_feature_remapping", "update_normalization_factors"]
for name in [*(row[0] for row in PASSED_ON), *CONVERSIONS, *AT_START, *FEATURES]:
    setattr(Recorder, name, recorded(name))


@pytest.fixture
def host():
    """A host of a Fast agent that tells observations apart, which a fresh one hardly does."""
    return fast_host()


def fast_host():
    torch.manual_seed(0)
    host = MettaAgent(environment(), Fast(environment()))
    host.initialize_to_environment(features(ORIGINAL_IDS), *ACTIONS)
    with torch.no_grad():
        host.policy.policy.action_embeddings.weight.mul_(100)
        for name, param in host.lstm.named_parameters():
            param.mul_(0 if "bias" in name else 4)
    return host


@pytest.fixture
def recorder_host():
    return MettaAgent(environment(), Recorder())


def renumbered(host, second, training):
    """The host after the original numbering and `second`; only the calls for the latter are recorded."""
    host.initialize_to_environment(features(ORIGINAL_IDS), *ACTIONS)
    host.policy.calls.clear()
    host.train(training).initialize_to_environment(second, *ACTIONS)
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


# Construction, tables, calls


@pytest.mark.parametrize("policy", [None, "fast", Fast])
def test_a_policy_that_is_no_module_is_refused(policy):
    with pytest.raises(TypeError, match=r"policy: got .* expected an nn\.Module"):
        MettaAgent(environment(), policy)


@pytest.mark.parametrize(("method", "args", "answer", "default"), PASSED_ON)
def test_each_call_reaches_the_policy_or_gives_a_default(recorder_host, method, args, answer, default):
    found = getattr(recorder_host, method)(*args)
    assert recorder_host.policy.calls == [(method, args)]
    assert found == answer
    without = getattr(MettaAgent(environment(), nn.Identity()), method)(*args)
    assert type(without) is type(default)
    assert without == default


def test_conversions_and_forward_reach_the_policy(recorder_host):
    td, state, action = object(), object(), object()
    assert [getattr(recorder_host, method)(action) for method in CONVERSIONS] == CONVERSIONS
    assert recorder_host(td, state, action) == "forward"
    recorder_host(td)
    conversions = [(method, (action,)) for method in CONVERSIONS]
    forwards = [("forward", (td, state, action)), ("forward", (td, None, None))]
    assert recorder_host.policy.calls == [*conversions, *forwards]


def test_attributes_describe_the_policy(host):
    assert host.lstm is host.policy.lstm
    recorder_host = MettaAgent(environment(), Recorder(), device="cpu")
    assert recorder_host.total_params == 6
    assert recorder_host.device == torch.device("cpu")
    assert recorder_host.lstm is None
    tables = recorder_host.action_space, recorder_host.action_index_tensor, recorder_host.cum_action_max_params
    assert tables == (None, None, None)
    assert recorder_host.feature_normalizations == {0: 1.0, 1: 10.0, 2: 4.0, 4: 20.0}


def test_tables_and_names_are_passed_on(recorder_host):
    recorder_host.initialize_to_environment(features(ORIGINAL_IDS), *ACTIONS, "cpu")
    policy = recorder_host.policy
    full_names = ["noop_0", "move_0", "move_1", "move_2", "move_3", "turn_0", "turn_1"]
    assert policy.calls == [(name, (full_names, torch.device("cpu"))) for name in AT_START]
    assert policy.action_index_tensor.tolist() == PAIRS
    assert policy.action_index_tensor.dtype == torch.int32
    assert policy.cum_action_max_params.tolist() == [0, 0, 3, 4]
    assert policy.cum_action_max_params.dtype == torch.int64
    assert recorder_host.action_index_tensor is policy.action_index_tensor
    assert recorder_host.cum_action_max_params is policy.cum_action_max_params
    assert isinstance(recorder_host.action_space, ActionSpace)
    assert recorder_host.action_space.num_actions == 7


def test_tables_can_be_set_again(host):
    host.initialize_to_environment(features(ORIGINAL_IDS), ["noop", "move"], [0, 4])
    assert host.policy.cum_action_max_params.tolist() == [0, 0, 4]
    assert outputs(host, tokens_of(ORIGINAL_IDS))[0].shape == (4, 6)


def test_a_policy_with_nothing_but_forward_will_do():
    host = MettaAgent(SimpleNamespace(), nn.Identity())
    for ids in (ORIGINAL_IDS, RENUMBERED_IDS):
        host.initialize_to_environment(features(ids), *ACTIONS)
    assert host.policy.action_index_tensor.tolist() == PAIRS


# Features


def assert_applied(host, expected):
    (table,) = host.policy.arguments("_apply_feature_remapping")
    assert table.dtype == torch.uint8
    assert table.tolist() == [expected.get(i, 255) for i in range(256)]


# A new feature is unknown, 255, in evaluation, and keeps an id that is free in training.
NUMBERINGS = [
    # ids, new features, training, table that the policy gets, ids that change
    (ORIGINAL_IDS, {}, True, {0: 0, 1: 1, 2: 2, 4: 4}, {}),
    (ORIGINAL_IDS, {}, False, {0: 0, 1: 1, 2: 2, 4: 4}, {}),
    (RENUMBERED_IDS, {}, True, REMAP, REMAP),
    (RENUMBERED_IDS, {}, False, REMAP, REMAP),
    (RENUMBERED_IDS, {"lava": 3}, False, REMAP, REMAP | {3: 255}),
    (RENUMBERED_IDS, {"lava": 3}, True, REMAP | {3: 3}, REMAP),
    (RENUMBERED_IDS, {"lava": 9}, True, REMAP | {9: 9}, REMAP),
]


@pytest.mark.parametrize(("ids", "new", "training", "applied", "changed"), NUMBERINGS)
def test_a_numbering_is_mapped_to_the_original_one(recorder_host, caplog, ids, new, training, applied, changed):
    with caplog.at_level(logging.INFO, logger="metta_fastagent"):
        host = renumbered(recorder_host, features(ids, **new), training)
    assert_applied(host, applied)
    assert host.feature_id_remap == changed
    assert (f"{len(changed)} features renumbered" in caplog.text) == bool(changed)
    mapping = ORIGINAL_IDS | (new if training else {})
    assert host.get_original_feature_mapping() == mapping
    assert host.policy.arguments("update_normalization_factors") == (features(ids, **new), mapping)


def test_new_features_in_training_get_free_ids(recorder_host):
    # Their own ids 0 and 2 belong to wall and agent, which this environment does not have.
    host = renumbered(recorder_host, features({"altar": 1}, lava=0, snow=2), training=True)
    mapping = host.get_original_feature_mapping()
    assert_applied(host, {1: 1, 0: mapping["lava"], 2: mapping["snow"]})
    assert {name: mapping[name] for name in ORIGINAL_IDS} == ORIGINAL_IDS
    assert len(set(mapping.values())) == 6
    assert max(mapping.values()) < 255


def test_a_mapping_moves_to_another_host(recorder_host):
    trained = MettaAgent(environment(), Recorder())
    assert trained.get_original_feature_mapping() is None
    trained.initialize_to_environment(features(ORIGINAL_IDS), *ACTIONS)
    saved = trained.get_original_feature_mapping()
    recorder_host.restore_original_feature_mapping(saved)
    saved["wall"] = 17
    assert trained.get_original_feature_mapping() == recorder_host.get_original_feature_mapping() == ORIGINAL_IDS
    recorder_host.initialize_to_environment(features(RENUMBERED_IDS), *ACTIONS)
    assert_applied(recorder_host, REMAP)


def test_fast_sees_the_same_in_every_numbering(host):
    expected = outputs(host.eval(), tokens_of(ORIGINAL_IDS))
    assert (outputs(host, tokens_of(RENUMBERED_IDS))[0] - expected[0]).abs().max() > 1e-2
    for ids in (RENUMBERED_IDS, ORIGINAL_IDS):
        host.initialize_to_environment(features(ids), *ACTIONS)
        assert_same_outputs(outputs(host, tokens_of(ids)), expected)


def test_fast_with_a_restored_mapping_sees_the_same(host):
    fresh = MettaAgent(environment(), Fast(environment()))
    fresh.restore_original_feature_mapping(host.get_original_feature_mapping())
    fresh.initialize_to_environment(features(RENUMBERED_IDS), *ACTIONS)
    fresh.load_state_dict(host.state_dict())
    assert_same_outputs(outputs(fresh, tokens_of(RENUMBERED_IDS)), outputs(host, tokens_of(ORIGINAL_IDS)))


def test_fast_drops_tokens_of_an_unknown_feature(host):
    ids = {"wall": 2, "altar": 0, "agent": 4, "mine": 3}
    host.eval().initialize_to_environment(features(ids, lava=1), *ACTIONS)
    observations = tokens_of(ids, lava=1)
    lava = observations[..., 1] == 1
    assert lava.any()
    without = observations.masked_fill(lava.unsqueeze(-1), 255)
    assert_same_outputs(outputs(host, observations), outputs(host, without))


def max_vec(host):
    return host.policy.policy.max_vec.flatten().tolist()


def test_normalisation_is_updated_at_the_original_ids(host):
    assert max_vec(host) == [1, 10, 4, 1, 20]
    changed = features(RENUMBERED_IDS)
    changed["altar"]["normalization"] = 50.0
    del changed["mine"]["normalization"]
    host.initialize_to_environment(changed, *ACTIONS)
    assert max_vec(host) == [1, 50, 4, 1, 20]
    assert host.feature_normalizations == {2: 1.0, 0: 50.0, 4: 4.0}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", [1, 3, 200])
def test_a_new_feature_leaves_the_normalisation_of_the_others(host, training, number):
    # Number 1 is the altar's, which this environment does not have.
    host.train(training).initialize_to_environment(features({"wall": 2, "mine": 0}, lava=number), *ACTIONS)
    vector = max_vec(host)
    assert [vector[i] for i in ORIGINAL_IDS.values()] == [1, 10, 4, 20]


# Bad inputs


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


def wall(**properties):
    return {"wall": {"id": 0, "normalization": 2.0} | properties}


OTHER_ACTIONS = ["noop", "jump"], [0, 1]
RENUMBERED = features(RENUMBERED_IDS)
# Features, names and limits of actions, and the start of the message.
BAD_ENVIRONMENTS = {
    "no features": (None, *OTHER_ACTIONS, "features: got None, expected"),
    "list of features": (["wall"], *OTHER_ACTIONS, "features: got "),
    "id only": ({"wall": 0}, *OTHER_ACTIONS, "features['wall']: got id None"),
    "no id": ({"wall": {"normalization": 1.0}}, *OTHER_ACTIONS, "features['wall']: got id None"),
    "id 255": (wall(id=255), *OTHER_ACTIONS, "features['wall']: got id 255"),
    "negative id": (wall(id=-1), *OTHER_ACTIONS, "features['wall']: got id -1"),
    "string id": (wall(id="3"), *OTHER_ACTIONS, "features['wall']: got id '3'"),
    "bool id": (wall(id=True), *OTHER_ACTIONS, "features['wall']: got id True"),
    "float id": (wall(id=1.0), *OTHER_ACTIONS, "features['wall']: got id 1.0"),
    "same id twice": ({**wall(), "altar": {"id": 0}}, *OTHER_ACTIONS, "features['altar']: got id 0, which another"),
    "normalization 0": (wall(normalization=0), *OTHER_ACTIONS, "features['wall']: got normalization 0"),
    "negative one": (wall(normalization=-1.0), *OTHER_ACTIONS, "features['wall']: got normalization -1.0"),
    "nan": (wall(normalization=float("nan")), *OTHER_ACTIONS, "features['wall']: got normalization nan"),
    "infinite": (wall(normalization=float("inf")), *OTHER_ACTIONS, "features['wall']: got normalization inf"),
    "string": (wall(normalization="1"), *OTHER_ACTIONS, "features['wall']: got normalization '1'"),
    "no normalization": (wall(normalization=None), *OTHER_ACTIONS, "features['wall']: got normalization None"),
    "wrong one last": ({**RENUMBERED, "lava": {"id": 300}}, *OTHER_ACTIONS, "features['lava']: got id 300"),
    "more limits than names": (RENUMBERED, ["noop"], [0, 1], "action_max_params: got "),
    "negative limit": (RENUMBERED, ["noop"], [-1], "action_max_params[0]: got -1"),
    "no actions": (RENUMBERED, [], [], "action_names: got "),
    "more than embeddings": (RENUMBERED, ["noop", "move"], [0, 100], "full_action_names: got 102 actions, expected at"),
}


@pytest.mark.parametrize(
    ("given", "names", "limits", "message"), BAD_ENVIRONMENTS.values(), ids=BAD_ENVIRONMENTS.keys()
)
def test_a_bad_environment_is_refused_and_nothing_changes(host, given, names, limits, message):
    before = snapshot(host)
    with pytest.raises((TypeError, ValueError)) as caught:
        host.initialize_to_environment(given, names, limits)
    assert str(caught.value).startswith(message)
    assert ", expected " in str(caught.value)
    assert snapshot(host) == before


@pytest.mark.parametrize("bad", [None, [("wall", 0)], {"wall": 255}, {"wall": "0"}, {"wall": 0, "altar": 0}])
def test_a_bad_mapping_is_refused_and_the_old_one_kept(host, bad):
    with pytest.raises((TypeError, ValueError), match=r"mapping.*got .*expected"):
        host.restore_original_feature_mapping(bad)
    assert host.get_original_feature_mapping() == ORIGINAL_IDS


# DistributedDataParallel


@pytest.fixture
def one_process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def small_host(**kwargs):
    host = MettaAgent(environment(), make_agent(active=False, **kwargs))
    host.initialize_to_environment(features(ORIGINAL_IDS), *ACTIONS)
    return host


def loss_of(agent, observations):
    td = TensorDict({"env_obs": observations}, batch_size=observations.shape[:2])
    out = agent(td, action=make_actions(*observations.shape[:2]))
    return out["act_log_prob"].mean() + out["value"].square().mean()


@pytest.mark.parametrize(
    ("make_host", "observations"),
    [(small_host, make_observations(4, 3)), (fast_host, tokens_of(ORIGINAL_IDS, 12).view(4, 3, 30, 3))],
    ids=["small", "fast"],
)
def test_distributed_forward_and_backward_equal_the_plain_ones(one_process_group, make_host, observations):
    plain, agent = make_host(), DistributedMettaAgent(make_host(), "cpu")
    loss_of(plain, observations).backward()
    loss_of(agent, observations).backward()
    for (name, param), expected in zip(agent.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
    actions = []
    for each in (plain, agent):
        torch.manual_seed(1)
        actions.append(each(TensorDict({"env_obs": observations[:, 0]}, batch_size=[4]))["actions"])
    assert torch.equal(*actions)


def test_distributed_agent_passes_attributes_and_calls_on(one_process_group):
    host = small_host(clip_range=0.01)
    agent = DistributedMettaAgent(host, "cpu")
    assert agent.policy is host.policy
    assert agent.action_space is host.action_space
    assert agent.total_params == sum(param.numel() for param in host.parameters())
    assert agent.has_memory()
    assert agent.lstm is host.policy.lstm
    assert agent.l2_init_loss().item() == 0
    assert host.policy.policy.encoder.weight.abs().max() > 0.01
    agent.clip_weights()
    assert host.policy.policy.encoder.weight.abs().max() <= 0.01
    agent.initialize_to_environment(features(RENUMBERED_IDS), ["noop"], [0])
    assert host.policy.action_index_tensor.tolist() == [[0, 0]]
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = agent.no_such_name


def test_distributed_agent_with_batch_norm_works_on_the_cpu(one_process_group):
    agent = DistributedMettaAgent(MettaAgent(None, nn.BatchNorm1d(2)), "cpu")
    normalized = agent.policy(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert normalized.flatten().tolist() == pytest.approx([-1, 0, 1, 0], abs=1e-4)


def test_distributed_agent_passes_options_on(one_process_group):
    agent = DistributedMettaAgent(small_host(), "cpu", find_unused_parameters=True, gradient_as_bucket_view=True)
    assert agent.find_unused_parameters and agent.gradient_as_bucket_view


def test_the_policys_attributes_are_read_and_written_through_the_host():
    """Every attribute that the host lacks is the policy's, for reading and writing."""
    host = MettaAgent(make_env(), make_agent())
    policy = host.policy
    names = ("temperature", "l2_init_scale", "clip_scale", "clip_range", "validate")
    for name in (*names, "on_nonfinite_logits", "initial_weights", "cum_action_max_params"):
        value = object()
        setattr(host, name, value)
        assert getattr(policy, name) is value and getattr(host, name) is value and name not in vars(host)
    assert host.diagnostics.__self__ is policy and host.greedy.__self__ is policy
    with host.greedy():
        assert policy._greedy
    assert not policy._greedy
    with pytest.raises(AttributeError, match="nothing"):
        _ = host.nothing


def test_the_hosts_own_attributes_stay_its_own():
    host = MettaAgent(make_env(), make_agent())
    policy = host.policy
    policy.action_space = policy.mine = "the policy's"
    host.action_space, host.own = None, 1
    host.eval()
    assert policy.action_space == "the policy's" and not hasattr(policy, "own") and host.mine == "the policy's"
    host.policy = other = make_agent()
    assert host._modules["policy"] is other and host.training is False
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host)), copy.copy(host)):
        assert type(twin) is MettaAgent and twin.own == 1 and twin.temperature == 1.0
    assert copy.deepcopy(host).policy is not other
