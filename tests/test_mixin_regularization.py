"""L2-init loss, stored initial weights, weight metrics and action heads."""

import copy

import pytest
import torch
from agents_for_tests import Doubled, Net, assert_equal, make_agent, make_env, parameters_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from metta_fastagent import PyTorchAgentMixin

REGULARIZED = {
    "linear": lambda: nn.Linear(3, 4),
    "conv1d": lambda: nn.Conv1d(2, 3, 2),
    "conv2d": lambda: nn.Conv2d(2, 3, 2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(2, 3, 2),
}
OTHERS = {
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(2, 3, 2),
    "embedding": lambda: nn.Embedding(3, 4),
    "lstm": lambda: nn.LSTM(2, 3),
    "layer_norm": lambda: nn.LayerNorm(3),
}


def make_net(**kwargs):
    torch.manual_seed(0)
    return Net([make() for make in (REGULARIZED | OTHERS).values()], **kwargs)


def shift(net, amount=0.25):
    """Move every parameter by random amounts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param) * amount)


def reference_loss(net, initial, scale=1.0):
    """The sum in float64 over the layers by name, `initial` a copy of the agent from the start."""
    starts = dict(initial.named_modules())
    loss = torch.zeros((), dtype=torch.float64)
    for name, layer in net.named_modules():
        if type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d):
            loss = loss + (layer.weight.double() - starts[name].weight.detach().double()).square().sum()
    return scale * loss


@pytest.mark.parametrize("name", [*REGULARIZED, *OTHERS])
def test_which_layers_are_regularized(name):
    layer = (REGULARIZED | OTHERS)[name]()
    assert Net()._is_regularizable_layer(layer) is (name in REGULARIZED)
    net = Net([layer])
    assert list(net.initial_weights) == (["layers.0"] if name in REGULARIZED else [])


def test_initial_weights_are_detached_copies():
    net = make_net()
    initial = copy.deepcopy(net)
    shift(net)
    assert list(net.initial_weights) == ["layers.0", "layers.1", "layers.2", "layers.3"]
    for name, weight in net.initial_weights.items():
        assert_equal(weight, initial.get_submodule(name).weight.detach())
        assert not weight.requires_grad


@pytest.mark.parametrize(
    ("scale", "dtype", "tolerance"),
    [
        (1, torch.float32, 1e-5),
        (0.5, torch.float32, 1e-5),
        (0, torch.float32, 1e-5),
        (30.0, torch.float64, 1e-6),
        (1, torch.bfloat16, 2e-2),
        (1, torch.float16, 2e-3),
    ],
)
def test_the_loss_is_float32_and_its_gradients_have_the_weights_dtype(scale, dtype, tolerance):
    net = make_net().to(dtype)
    initial = copy.deepcopy(net)
    shift(net)
    net.l2_init_scale = scale
    loss, expected = net.l2_init_loss(), reference_loss(net, initial, scale)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    params = list(net.parameters())
    actual = torch.autograd.grad(loss * 1.5, params, allow_unused=True)
    wanted = torch.autograd.grad(expected * 1.5, params, allow_unused=True)
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=1e-7)
    assert [grad is not None for grad in actual].count(True) == len(REGULARIZED)


def test_loss_of_unchanged_weights_is_zero_with_a_graph():
    net = make_net()
    loss = net.l2_init_loss()
    assert loss.item() == 0
    loss.backward()
    assert_equal(net.layers[0].weight.grad, torch.zeros(4, 3))
    assert net.layers[0].bias.grad is None


def test_layers_without_a_stored_weight_are_skipped():
    net = make_net()
    initial = copy.deepcopy(net)
    net.late = nn.Linear(2, 2)
    shift(net)
    del net.initial_weights["layers.0"]
    initial.layers[0] = nn.Identity()
    kept = copy.deepcopy(net)
    kept.layers[0] = kept.late = nn.Identity()
    torch.testing.assert_close(net.l2_init_loss().double(), reference_loss(kept, initial), rtol=1e-6, atol=0)


def test_without_initial_weights_the_loss_is_a_plain_zero():
    net = make_net()
    net.initial_weights = {}
    losses = [net.l2_init_loss()]
    del net.initial_weights
    losses.append(net.l2_init_loss())
    for loss in losses:
        assert (loss.item(), loss.dtype, loss.shape, loss.requires_grad) == (0.0, torch.float32, (), False)


def test_update_makes_the_present_weights_the_start():
    net = make_net()
    shift(net)
    assert net.l2_init_loss() > 0
    net.update_l2_init_weight_copy()
    assert net.l2_init_loss() == 0
    initial = copy.deepcopy(net)
    shift(net, 0.5)
    torch.testing.assert_close(net.l2_init_loss().double(), reference_loss(net, initial), rtol=1e-6, atol=0)


def test_a_module_that_is_itself_a_layer_is_called_root():
    class Agent(PyTorchAgentMixin, nn.Linear):
        pass

    agent = Agent(2, 3)
    agent.init_mixin(clip_range=0.125)
    assert list(agent.initial_weights) == ["root"]
    nn.init.ones_(agent.weight)
    expected = (1 - agent.initial_weights["root"].double()).square().sum().item()
    assert agent.l2_init_loss().item() == pytest.approx(expected)
    assert [record["name"] for record in agent.compute_weight_metrics()] == ["root"]
    agent.clip_weights()
    assert_equal(agent.weight.detach(), torch.full((3, 2), 0.125))


def test_replaced_and_parametrized_layers_use_their_present_weight():
    net = Net([nn.Linear(2, 2), nn.Linear(2, 2)])
    start = [layer.weight.detach().clone() for layer in net.layers]
    net.l2_init_loss()
    net.layers[0] = nn.Linear(2, 2)
    parametrize.register_parametrization(net.layers[1], "weight", Doubled())
    expected = (net.layers[0].weight - start[0]).square().sum() + (2 * start[1] - start[1]).square().sum()
    torch.testing.assert_close(net.l2_init_loss(), expected)


def test_lazy_layers_have_no_start_until_it_is_refreshed():
    net = Net([nn.LazyLinear(3)])
    assert net.initial_weights == {}
    assert net.l2_init_loss() == 0
    net.layers[0](torch.ones(1, 2))
    net.update_l2_init_weight_copy()
    shift(net)
    assert net.l2_init_loss() > 0


# Weight metrics


def test_metrics_cover_the_linear_layers_only():
    net = make_net()
    net.wide = nn.Linear(12, 8)
    records = {record["name"]: record for record in net.compute_weight_metrics()}
    assert list(records) == ["layers.0", "wide"]
    for name, record in records.items():
        weight = net.get_submodule(name).weight.detach().double()
        assert record["weight_norm"] == pytest.approx(torch.linalg.matrix_norm(weight).item())
        assert record["largest_sv"] == pytest.approx(torch.linalg.matrix_norm(weight, ord=2).item())
    assert "sv_loglog_r2" in records["wide"]
    assert "sv_loglog_r2" not in records["layers.0"]


def test_metrics_take_delta():
    net = Net([nn.Linear(4, 4)])
    nn.init.eye_(net.layers[0].weight)
    assert [net.compute_weight_metrics(delta)[0]["effective_rank"] for delta in (0.0, 0.3, 0.6)] == [4, 3, 2]


def test_metrics_change_no_weight_and_draw_no_random_number():
    net = make_net()
    before = parameters_of(net)
    state = torch.get_rng_state()
    net.compute_weight_metrics()
    assert_equal(torch.get_rng_state(), state)
    assert_equal(parameters_of(net), before)


@pytest.mark.parametrize(("interval", "epochs"), [(3, [0, 3, 6]), (1, list(range(8))), (0, [])])
def test_metrics_are_computed_on_their_interval(interval, epochs):
    net = make_net(analyze_weights_interval=interval)
    results = [net.maybe_compute_weight_metrics(epoch) for epoch in range(8)]
    assert [epoch for epoch, records in enumerate(results) if records is not None] == epochs
    assert all([record["name"] for record in results[epoch]] == ["layers.0"] for epoch in epochs)


# Action heads


@pytest.mark.parametrize(
    ("max_action_args", "kwargs", "width", "logits"), [([0, 3, 1], {}, 528, 7), ([2, 5], {"input_size": 20}, 20, 9)]
)
def test_action_heads_are_made_for_an_unrelated_module(max_action_args, kwargs, width, logits):
    heads = PyTorchAgentMixin.create_action_heads(nn.Identity(), make_env(max_action_args=max_action_args), **kwargs)
    assert isinstance(heads, nn.ModuleList)
    (head,) = heads
    assert (head.in_features, head.out_features) == (width, logits)
    gram = head.weight.detach().double() @ head.weight.detach().double().T
    torch.testing.assert_close(gram, torch.eye(logits).double() * 1e-4, rtol=1e-5, atol=1e-9)
    assert_equal(head.bias.detach(), torch.zeros(logits))


class Sharded(nn.Module):
    """Holds a module as FSDP does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def wrap_policy(agent, wrap):
    agent.policy = wrap(agent.policy)


def wrap_layer(agent, wrap):
    agent.policy.actor = wrap(agent.policy.actor)


WRAPS = [torch.compile, checkpoint_wrapper, Sharded, lambda module: torch.compile(checkpoint_wrapper(Sharded(module)))]


@pytest.mark.parametrize("wrap", WRAPS, ids=["compile", "checkpoint", "fsdp", "all"])
@pytest.mark.parametrize("place", [wrap_policy, wrap_layer])
def test_a_wrapped_agent_keeps_its_loss_its_bounds_and_its_names(wrap, place):
    """The same layers have the same names, whether they are wrapped or not."""
    found = []
    for before, after in ((None, None), (None, place), (place, None)):
        agent = make_agent(clip_range=1.0, clip_mode="init_scaled")
        weights = list(agent.parameters())
        if before:
            before(agent, wrap)
            agent.init_mixin(clip_range=1.0, clip_mode="init_scaled")
        if after:
            after(agent, wrap)
        with torch.no_grad():
            for weight in weights:
                weight += 1
            loss = agent.l2_init_loss().item()
            for weight in weights:
                weight *= 100
        agent.clip_weights()
        names = [metrics["name"] for metrics in agent.compute_weight_metrics()]
        largest = [weight.abs().max().item() for weight in weights]
        found.append((loss, largest, names, list(agent.initial_weights), agent.diagnostics()["clipped"]))
    assert found[0] == found[1] == found[2] and found[0][0] > 0
