"""Fast: its parameters, its network written out in plain torch, and what its forward leaves alone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from agents_for_tests import Doubled
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F

from metta_fastagent import Fast, ops, use_backend

NAMES, MAX_PARAMS = ["noop", "move", "use", "say"], [0, 3, 1, 14]
ACTIONS = 22

# Names and shapes in Metta's own Fast, for 25 features in an 11 x 11 window.
SHAPES = {
    "policy.max_vec": (1, 25, 1, 1),
    "policy.cnn1.weight": (64, 25, 5, 5),
    "policy.cnn1.bias": (64,),
    "policy.cnn2.weight": (64, 64, 3, 3),
    "policy.cnn2.bias": (64,),
    "policy.fc1.weight": (128, 64),
    "policy.fc1.bias": (128,),
    "policy.encoded_obs.weight": (128, 128),
    "policy.encoded_obs.bias": (128,),
    "policy.critic_1.weight": (1024, 128),
    "policy.critic_1.bias": (1024,),
    "policy.value_head.weight": (1, 1024),
    "policy.value_head.bias": (1,),
    "policy.actor_1.weight": (512, 128),
    "policy.actor_1.bias": (512,),
    "policy.action_embeddings.weight": (100, 16),
    "policy.actor_W": (1, 512, 16),
    "policy.actor_bias": (1,),
    **{f"lstm.weight_{kind}": (512, 128) for kind in ("ih_l0", "hh_l0", "ih_l1", "hh_l1")},
    **{f"lstm.bias_{kind}": (512,) for kind in ("ih_l0", "hh_l0", "ih_l1", "hh_l1")},
}
BUFFERS = {"policy.max_vec"}
GAINS = {"critic_1": math.sqrt(2), **dict.fromkeys(["cnn1", "cnn2", "fc1", "encoded_obs", "value_head", "actor_1"], 1)}


def make_fast(env=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Fast(SimpleNamespace() if env is None else env, **kwargs)


def checkpoint(seed=5):
    """A state dict of Metta's Fast with weights that tell observations apart."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in SHAPES.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
        state[name] = torch.randn(shape, generator=generator) * 1.7 * fan_in**-0.5
    state["policy.max_vec"] = torch.rand(1, 25, 1, 1, generator=generator) * 20 + 1
    return state


def trained_fast(dtype=torch.float32, **kwargs):
    agent = make_fast(**kwargs)
    agent.load_state_dict(checkpoint())
    agent.activate_actions(NAMES, MAX_PARAMS)
    return agent.to(dtype)


def observations(*batch, tokens=40, seed=1, width=11, height=11):
    """Tokens inside the window, of known features; the last ones are empty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(width, (*batch, tokens), generator=generator)
    y = torch.randint(height, (*batch, tokens), generator=generator)
    feature = torch.randint(25, (*batch, tokens), generator=generator)
    value = torch.randint(1, 255, (*batch, tokens), generator=generator)
    env_obs = torch.stack((x * 16 + y, feature, value), dim=-1).to(torch.uint8)
    env_obs[..., -8:, :] = 255
    return env_obs


def action_pairs(agent, *batch):
    index = torch.randint(len(agent.action_index_tensor), batch, generator=torch.Generator().manual_seed(2))
    return agent.action_index_tensor[index]


def infer(agent, env_obs):
    agent.reset_memory()
    return agent(TensorDict({"env_obs": env_obs}, batch_size=[env_obs.shape[0]]))


def outputs(agent, env_obs):
    td = infer(agent, env_obs)
    return torch.cat((td["full_log_probs"], td["values"].unsqueeze(1)), dim=1)


def grid_of(env_obs, width, height):
    """The grid, token by token."""
    grid = torch.zeros(len(env_obs), 25, width, height)
    for row, tokens in enumerate(env_obs.tolist()):
        for coordinate, feature, value in tokens:
            x, y = divmod(coordinate, 16)
            if x < width and y < height and feature < 25:
                grid[row, feature, x, y] = value
    return grid


def written_out(state, grid, actions):
    """(logits, value) of one rollout step from zero memory, from the parameters alone."""
    p = {name.removeprefix("policy."): tensor for name, tensor in state.items()}
    x = F.relu(F.conv2d(grid / p["max_vec"], p["cnn1.weight"], p["cnn1.bias"], stride=3))
    x = F.relu(F.conv2d(x, p["cnn2.weight"], p["cnn2.bias"])).flatten(1)
    for layer in ("fc1", "encoded_obs"):
        x = F.relu(F.linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"]))
    lstm = nn.LSTM(128, 128, 2).to(x.dtype)
    lstm.load_state_dict({name.removeprefix("lstm."): t for name, t in state.items() if name.startswith("lstm.")})
    x = lstm(x.unsqueeze(0))[0][0]
    value = F.linear(
        F.linear(x, p["critic_1.weight"], p["critic_1.bias"]).tanh(), p["value_head.weight"], p["value_head.bias"]
    )
    actor = F.relu(F.linear(x, p["actor_1.weight"], p["actor_1.bias"]))
    return expanded_logits(actor, p["action_embeddings.weight"][:actions], p["actor_W"], p["actor_bias"]), value


def expanded_logits(actor, embeddings, weight, bias):
    """Every pair of a row and an action by itself: tanh(actor . W) . embedding + bias."""
    rows, actions = len(actor), len(embeddings)
    actor = actor.unsqueeze(1).expand(rows, actions, 512).reshape(rows * actions, 512)
    embeddings = embeddings.unsqueeze(0).expand(rows, actions, 16).reshape(rows * actions, 16)
    query = torch.einsum("n h, k h e -> n k e", actor, weight).tanh()
    return (torch.einsum("n k e, n e -> n k", query, embeddings) + bias).view(rows, actions)


# Parameters


def test_parameters_have_the_names_shapes_and_dtypes_of_mettas_fast():
    agent = make_fast()
    state = agent.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SHAPES
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert {name for name, _ in agent.named_parameters()} == SHAPES.keys() - BUFFERS


def test_state_dict_keeps_its_keys_in_use():
    agent = trained_fast()
    infer(agent, observations(2))
    agent._apply_feature_remapping(torch.arange(256, dtype=torch.uint8))
    assert list(agent.state_dict()) == list(make_fast().state_dict())
    assert set(copy.deepcopy(agent).state_dict()) == SHAPES.keys()
    agent.load_state_dict(checkpoint(), strict=True)


@pytest.mark.parametrize(("layer", "gain"), GAINS.items())
def test_layers_start_orthogonal_with_zero_bias(layer, gain):
    module = getattr(make_fast().policy, layer)
    weight = module.weight.detach().flatten(1)
    product = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=0, atol=1e-5)
    assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_embeddings_start_orthogonal_with_largest_value_a_tenth():
    weight = make_fast().policy.action_embeddings.weight.detach()
    assert weight.abs().max().item() == pytest.approx(0.1)
    product = weight.T @ weight
    torch.testing.assert_close(product, product[0, 0] * torch.eye(16), rtol=0, atol=1e-6)


def test_actor_starts_uniform():
    policy, bound = make_fast().policy, 1 / math.sqrt(512)
    weight = policy.actor_W.detach()
    assert weight.abs().max() <= bound
    # 8192 draws from a uniform distribution: standard deviation bound / sqrt(3), and the ends are all but reached.
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert weight.min() < -0.99 * bound
    assert weight.max() > 0.99 * bound
    biases = torch.cat([make_fast(seed=seed).policy.actor_bias.detach() for seed in range(8)])
    assert biases.abs().max() <= bound
    assert biases.unique().numel() == 8


def test_max_vec_holds_the_normalisation_of_each_feature():
    agent = make_fast(SimpleNamespace(feature_normalizations={0: 1.0, 3: 30.0, 6: 255.0, 4: 0.0}))
    assert agent.policy.max_vec.shape == (1, 7, 1, 1)
    assert agent.policy.max_vec.flatten().tolist() == [1, 1, 1, 30, 1, 1, 255]
    assert agent.policy.cnn1.in_channels == 7


@pytest.mark.parametrize("env", [SimpleNamespace(), SimpleNamespace(feature_normalizations={}), None])
def test_an_environment_that_does_not_say_gets_25_features(env):
    assert torch.equal(make_fast(env).policy.max_vec, torch.ones(1, 25, 1, 1))


# The actor


@pytest.mark.parametrize(
    ("actions", "dtype", "atol"),
    [(1, torch.float32, 1e-5), (ACTIONS, torch.float64, 1e-12), (100, torch.float32, 1e-5)],
)
def test_logits_and_gradients_equal_the_expansion(actions, dtype, atol):
    agent = trained_fast(dtype)
    agent.activate_actions(["act"], [actions - 1])
    policy = agent.policy
    hidden = torch.randn(7, 128, dtype=dtype, requires_grad=True)
    used = (policy.actor_1.weight, policy.actor_1.bias, policy.action_embeddings.weight, policy.actor_W)
    leaves = [hidden, *used, policy.actor_bias]
    upstream = torch.randn(7, actions, dtype=dtype)

    logits, value = policy.decode_actions(hidden, 7)
    actor = F.relu(policy.actor_1(hidden))
    expected = expanded_logits(actor, policy.action_embeddings.weight[:actions], policy.actor_W, policy.actor_bias)
    assert value.shape == (7, 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    gradients = torch.autograd.grad(logits, leaves, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e3 * atol / 10, atol=10 * atol)


def test_max_actions_raises_the_limit():
    agent = make_fast(max_actions=101)
    assert agent.policy.action_embeddings.weight.shape == (101, 16)
    agent.activate_actions(["noop", "say"], [0, 99])
    assert infer(agent, observations(2))["full_log_probs"].shape == (2, 101)


# Observations


@pytest.mark.parametrize(
    "junk",
    [(254, 3, 9), (255, 3, 9), (11 << 4, 3, 9), (11, 3, 9), ((5 << 4) | 15, 3, 9), (0x55, 25, 9), (0x55, 255, 9)],
)
def test_tokens_that_are_no_place_or_no_known_feature_change_nothing(junk):
    agent, env_obs = trained_fast(), observations(3)
    other = env_obs.clone()
    other[:, -8:] = torch.tensor(junk, dtype=torch.uint8)
    assert torch.equal(outputs(agent, other), outputs(agent, env_obs))


def test_of_two_tokens_for_one_cell_the_later_wins():
    agent, env_obs = trained_fast(), observations(3)
    once, twice, reversed_order = env_obs.clone(), env_obs.clone(), env_obs.clone()
    once[:, -1] = twice[:, -1] = torch.tensor([0x34, 7, 200])
    twice[:, -2] = torch.tensor([0x34, 7, 20])
    reversed_order[:, -2], reversed_order[:, -1] = twice[:, -1], twice[:, -2]
    assert torch.equal(outputs(agent, twice), outputs(agent, once))
    assert not torch.equal(outputs(agent, reversed_order), outputs(agent, once))


@pytest.mark.parametrize("remapped", [False, True])
def test_env_obs_is_not_modified(remapped):
    agent = trained_fast()
    if remapped:
        agent._apply_feature_remapping(torch.arange(255, -1, -1, dtype=torch.uint8))
    env_obs = observations(3, 4)
    before = env_obs.clone()
    infer(agent, env_obs[:, 0])
    out = agent(TensorDict({"env_obs": env_obs}, batch_size=[3, 4]), action=action_pairs(agent, 3, 4))
    assert torch.equal(env_obs, before)
    assert torch.equal(out["env_obs"], before)


@pytest.mark.parametrize(
    ("width", "height", "flat"), [(11, 11, 64), (13, 13, 64), (14, 11, 128), (11, 16, 128), (16, 16, 256)]
)
def test_a_checkpoint_gives_the_network_written_out(width, height, flat):
    agent = make_fast(SimpleNamespace(obs_width=width, obs_height=height))
    assert agent.policy.fc1.in_features == flat
    wider = {"policy.fc1.weight": torch.randn(128, flat) * flat**-0.5} if flat != 64 else {}
    agent.load_state_dict({**checkpoint(), **wider}, strict=True)
    agent.activate_actions(NAMES, MAX_PARAMS)
    env_obs = observations(3, width=width, height=height)
    logits, value = written_out(agent.state_dict(), grid_of(env_obs, width, height), ACTIONS)
    expected = torch.cat((logits.log_softmax(-1), value), dim=1)
    torch.testing.assert_close(outputs(agent, env_obs), expected, rtol=1e-4, atol=1e-4)
    assert value.std() > 0.01
    assert expected.std(dim=0).max() > 0.01


# The first layers


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnTensor(torch.Tensor):
    """A tensor subclass that PyTorch's own operators compute with."""


def doubled_forward(conv):
    plain = conv.forward
    conv.forward = lambda x: 2 * plain(x)


def replaced(policy, name, kind=nn.Conv2d, **changes):
    conv = getattr(policy, name)
    sizes = {"in_channels": conv.in_channels, "out_channels": 64, "kernel_size": conv.kernel_size}
    new = kind(**sizes | {"stride": conv.stride, **changes})
    setattr(policy, name, new)
    if new.weight.shape == conv.weight.shape:
        new.load_state_dict(conv.state_dict(), strict=False)


LAYER_CHANGES = {
    "nothing": lambda policy, name: None,
    "forward hook": lambda policy, name: getattr(policy, name).register_forward_hook(lambda m, args, out: 2 * out),
    "forward pre-hook": lambda policy, name: getattr(policy, name).register_forward_pre_hook(
        lambda m, args: (2 * args[0],)
    ),
    "parametrization": lambda policy, name: nn.utils.parametrize.register_parametrization(
        getattr(policy, name), "weight", Doubled()
    ),
    "subclass": lambda policy, name: replaced(policy, name, DoubledConv),
    "own forward": lambda policy, name: doubled_forward(getattr(policy, name)),
    "tensor subclass": lambda policy, name: setattr(
        getattr(policy, name), "weight", nn.Parameter(getattr(policy, name).weight.detach().as_subclass(OwnTensor))
    ),
    "no bias": lambda policy, name: replaced(policy, name, bias=False),
    "strides of its own": lambda policy, name: replaced(policy, name, stride=(3, 2)),
    "circular padding": lambda policy, name: replaced(policy, name, padding=1, padding_mode="circular"),
    "dilation": lambda policy, name: replaced(policy, name, kernel_size={"cnn1": 3, "cnn2": 2}[name], dilation=2),
    "groups of cnn2": lambda policy, name: replaced(policy, "cnn2", groups=4),
}


@pytest.mark.parametrize("name", ["cnn1", "cnn2"])
@pytest.mark.parametrize("change", LAYER_CHANGES)
def test_layers_compute_what_their_modules_do(name, change):
    agent, env_obs = trained_fast(), observations(5)
    policy = agent.policy
    with torch.no_grad():
        LAYER_CHANGES[change](policy, name)
        features = policy.cnn2(F.relu(policy.cnn1(grid_of(env_obs, 11, 11) / policy.max_vec))).relu().flatten(1)
        if features.shape[1] != 64:
            policy.fc1 = nn.Linear(features.shape[1], 128)
        expected = policy.encoded_obs(policy.fc1(features).relu()).relu()
        torch.testing.assert_close(policy.encode_observations(env_obs), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=str)
def test_a_checkpoint_gives_what_dense_layers_give(dtype, atol, backend):
    agent, dense, env_obs = trained_fast(dtype), trained_fast(dtype), observations(6, 3, tokens=200)
    for layer in (dense.policy.cnn1, dense.policy.cnn2):
        # Any hook makes a layer take its input as a module.
        layer.register_forward_hook(lambda module, args, out: None)
    actions, results = action_pairs(agent, 6, 3), []
    for each in (agent, dense):
        with use_backend(backend):
            out = each(TensorDict({"env_obs": env_obs}, batch_size=[6, 3]), action=actions)
            (out["act_log_prob"].mean() + out["value"].square().mean()).backward()
        results.append((out["full_log_probs"], out["value"], [param.grad for param in each.parameters()]))
    (logits, value, grads), (wanted_logits, wanted_value, wanted_grads) = results
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=atol)
    torch.testing.assert_close(value, wanted_value, rtol=0, atol=atol)
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        # Sums of many terms of either sign.
        torch.testing.assert_close(grad, wanted, rtol=0, atol=10 * atol * max(1.0, wanted.abs().max().item()))


def test_a_grid_is_made_only_if_a_layer_needs_it(monkeypatch):
    made = []
    grid = ops.tokens_to_grid
    monkeypatch.setattr(ops, "tokens_to_grid", lambda *args: made.append(args) or grid(*args))
    agent = trained_fast()
    outputs(agent, observations(3))
    assert not made
    agent.policy.cnn1.register_forward_hook(lambda module, args, out: None)
    outputs(agent, observations(3))
    assert len(made) == 1


def test_encoder_compiles_into_one_graph():
    torch._dynamo.reset()
    policy, env_obs = trained_fast().policy, observations(3)
    compiled = torch.compile(policy.encode_observations, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(env_obs), policy.encode_observations(env_obs))
    torch._dynamo.reset()


# Forward


def test_inference_writes_its_fields_into_the_given_tensordict():
    agent = trained_fast()
    td = TensorDict({"env_obs": observations(5)}, batch_size=[5])
    assert agent(td) is td
    written = {key: (tuple(td[key].shape), td[key].dtype) for key in set(td.keys()) - {"env_obs"}}
    assert written == {
        "actions": ((5, 2), torch.int32),
        "act_log_prob": ((5,), torch.float32),
        "values": ((5,), torch.float32),
        "full_log_probs": ((5, ACTIONS), torch.float32),
        "bptt": ((5,), torch.int64),
        "batch": ((5,), torch.int64),
    }
    assert td["bptt"].tolist() == [1] * 5
    assert td["batch"].tolist() == [5] * 5


@pytest.mark.parametrize("batch_size", [[3], [3, 4]])
@pytest.mark.parametrize("flat_actions", [False, True])
def test_training_returns_segments_and_leaves_the_given_tensordict(batch_size, flat_actions):
    agent, env_obs = trained_fast(), observations(3, 4)
    actions = action_pairs(agent, 3, 4)
    td = TensorDict({"env_obs": env_obs, "dones": torch.zeros(3, 4)}, batch_size=batch_size)
    out = agent(td, action=actions.flatten(0, 1) if flat_actions else actions)
    # The fields may come to the given one, but no result.
    assert set(td.keys()) - {"bptt", "batch"} == {"env_obs", "dones"}
    assert out.batch_size == (3, 4)
    shapes = {"act_log_prob": (3, 4), "entropy": (3, 4), "value": (3, 4, 1), "full_log_probs": (3, 4, ACTIONS)}
    assert {key: tuple(out[key].shape) for key in shapes} == shapes
    assert not {"values", "actions"} & set(out.keys())
    assert out["bptt"].unique().tolist() == [4]
    assert out["batch"].unique().tolist() == [3]
    index = agent._convert_action_to_logit_index(actions).unsqueeze(-1)
    assert torch.equal(out["act_log_prob"], out["full_log_probs"].gather(-1, index).squeeze(-1))
    entropy = torch.distributions.Categorical(logits=out["full_log_probs"]).entropy()
    torch.testing.assert_close(out["entropy"], entropy, rtol=1e-5, atol=1e-5)


def test_training_on_what_the_rollout_stored_gives_ratios_of_one():
    agent, B, T = trained_fast(), 4, 6
    env_obs = observations(B, T)
    dones = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.3
    with torch.no_grad():
        infer(agent, observations(B, seed=9))
        h, c = agent.get_memory()
        steps = [agent(TensorDict({"env_obs": env_obs[:, t], "dones": dones[:, t]}, batch_size=[B])) for t in range(T)]
    stored = {"lstm_h": h[0].transpose(0, 1), "lstm_c": c[0].transpose(0, 1)}
    actions = torch.stack([td["actions"] for td in steps], dim=1)
    out = agent(TensorDict({"env_obs": env_obs, "dones": dones, **stored}, batch_size=[B]), action=actions)
    old = torch.stack([td["act_log_prob"] for td in steps], dim=1)
    torch.testing.assert_close((out["act_log_prob"] - old).exp(), torch.ones(B, T), rtol=0, atol=1e-5)
    values = torch.stack([td["values"] for td in steps], dim=1)
    torch.testing.assert_close(out["value"].squeeze(-1), values, rtol=1e-5, atol=1e-5)
    # The check means something: without the stored state the ratios are others.
    cold = agent(TensorDict({"env_obs": env_obs, "dones": dones}, batch_size=[B]), action=actions)
    assert ((cold["act_log_prob"] - old).exp() - 1).abs().max() > 1e-3


@use_backend("eager")
def test_draws_equal_those_of_multinomial_under_the_same_seed():
    agent, env_obs = trained_fast(), observations(64)
    logits, _ = written_out(agent.state_dict(), grid_of(env_obs, 11, 11), ACTIONS)
    torch.manual_seed(11)
    td = infer(agent, env_obs)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    index = torch.multinomial(torch.log_softmax(logits, dim=-1).exp(), num_samples=1).flatten()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(td["actions"], agent.action_index_tensor[index])
    assert index.unique().numel() > 5


def test_one_training_step_changes_every_parameter_and_stays_finite():
    agent = make_fast(clip_range=0.5)
    agent.activate_actions(NAMES, MAX_PARAMS)
    before = copy.deepcopy(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    td = TensorDict({"env_obs": observations(4, 6)}, batch_size=[4, 6])
    out = agent(td, action=action_pairs(agent, 4, 6))
    advantages = torch.randn(4, 6)
    loss = (
        -(out["act_log_prob"] * advantages).mean() + (out["value"] - 3).square().mean() - 0.01 * out["entropy"].mean()
    )
    loss.backward()
    # All logits share the actor's bias, so the distribution does not depend on it.
    assert agent.policy.actor_bias.grad.abs().item() < 1e-6
    optimizer.step()
    agent.clip_weights()
    for name, param in agent.named_parameters():
        assert param.isfinite().all(), name
        assert name == "policy.actor_bias" or not torch.equal(param, before[name]), name
    assert torch.equal(agent.policy.max_vec, before["policy.max_vec"])
    again = agent(td, action=action_pairs(agent, 4, 6))
    assert again["act_log_prob"].isfinite().all()
