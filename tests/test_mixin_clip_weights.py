"""Weight clipping: which parameters, to which bounds, and after every kind of change to the agent."""

import copy

import pytest
import torch
from agents_for_tests import Doubled, Net, assert_equal, on_copies, on_gpu, parameters_of, pickled
from torch import nn
from torch.nn.utils import parametrizations, parametrize

CLIP = 0.5


def make_net(**kwargs):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Linear(4, 5, bias=False), nn.GRU(4, 5)]
    return Net(layers, **({"clip_range": CLIP} | kwargs))


def fill_large(*modules):
    """Random values of which nearly all lie outside the clip range, the same on each call."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in modules:
            for param in module.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 10)


def clipped_names(net):
    """Names of the parameters that must be clipped, by a plain loop over all modules."""
    names = set()
    for prefix, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            names |= {f"{prefix}.{kind}" for kind in ("weight", "bias") if module._parameters.get(kind) is not None}
    return names


def named_parameters(net):
    return dict(net.named_parameters(remove_duplicate=False))


def assert_clips(net, bound=CLIP):
    """One call changes exactly what the plain loop would, and each parameter stays the same object."""
    before = named_parameters(net)
    names = clipped_names(net)
    assert names
    expected = {name: p.detach().clone().clamp(-bound, bound) for name, p in before.items() if name in names}
    expected |= {name: p.detach().clone() for name, p in before.items() if name not in names}
    # Without a value out of range the comparison below would prove nothing.
    assert all(before[name].abs().max() > bound for name in before)
    net.clip_weights()
    after = named_parameters(net)
    assert all(after[name] is before[name] for name in before)
    assert_equal({name: p.detach() for name, p in after.items()}, expected)


def swap_on_conversion(net):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def unparametrize(net):
    parametrize.register_parametrization(net.layers[0], "weight", Doubled())
    net.clip_weights()
    parametrize.remove_parametrizations(net.layers[0], "weight")


def swap_modules(net):
    net.layers[0], net.layers[3] = net.layers[3], net.layers[0]


def empty_state(net):
    return {key: torch.empty_like(value) for key, value in net.state_dict().items()}


CHANGES = {
    "replaced parameter": lambda net: setattr(net.layers[0], "weight", nn.Parameter(torch.empty(5, 4))),
    "replaced in the parameters' dict": lambda net: net.layers[2]._parameters.update(bias=nn.Parameter(torch.empty(3))),
    "removed bias": lambda net: setattr(net.layers[0], "bias", None),
    "moved": lambda net: net.to("meta").to_empty(device="cpu"),
    "cast": lambda net: net.bfloat16(),
    "cast of one layer": lambda net: net.layers[1].to(torch.float64),
    "swapped on conversion": swap_on_conversion,
    "assigned data": lambda net: setattr(net.layers[0].weight, "data", torch.empty(5, 4)),
    "assigned data of another shape": lambda net: setattr(net.layers[0].weight, "data", torch.empty(7, 9)),
    "loaded with assign": lambda net: net.load_state_dict(empty_state(net), assign=True),
    "added module": lambda net: setattr(net, "late", nn.Linear(3, 3)),
    "appended to a list": lambda net: net.layers.append(nn.Conv1d(1, 1, 1)),
    "added below a clipped layer": lambda net: setattr(net.layers[0], "adapter", nn.Linear(3, 3)),
    "added below another layer": lambda net: setattr(net.layers[4], "adapter", nn.Linear(3, 3)),
    "replaced module": lambda net: net.layers.__setitem__(3, nn.Linear(6, 2)),
    "swapped modules": swap_modules,
    "shared memory": lambda net: net.share_memory(),
    "frozen": lambda net: net.requires_grad_(False),
    "tied weights": lambda net: setattr(net.layers[3], "weight", net.layers[0].weight),
    "tied modules": lambda net: setattr(net, "again", net.layers[0]),
    "parametrized": lambda net: parametrize.register_parametrization(net.layers[0], "weight", Doubled()),
    "no longer parametrized": unparametrize,
    "weight_norm": lambda net: parametrizations.weight_norm(net.layers[2]),
    "on the GPU": pytest.param(lambda net: net.to("cuda"), marks=[pytest.mark.gpu, on_gpu]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_first_call_is_noticed(change):
    net = make_net()
    fill_large(net)
    assert_clips(net)
    change(net)
    for _ in range(2):
        fill_large(net)
        assert_clips(net)


def test_a_removed_module_is_left_alone():
    net = make_net()
    fill_large(net)
    net.clip_weights()
    removed = net.layers[0]
    del net.layers[0]
    fill_large(net, removed)
    before = removed.weight.detach().clone()
    assert_clips(net)
    assert_equal(removed.weight.detach(), before)


@on_copies
def test_clipping_a_copy_leaves_the_original_alone(copied):
    net = make_net()
    fill_large(net)
    net.clip_weights()
    twin = copied(net)
    fill_large(net, twin)
    untouched = parameters_of(net)
    assert_clips(twin)
    assert_equal(parameters_of(net), untouched)
    assert_clips(net)


def test_which_layers_are_clipped():
    taken = {
        "linear": nn.Linear(2, 3),
        "conv1d": nn.Conv1d(2, 3, 1),
        "conv2d": nn.Conv2d(2, 3, 1),
        "bilinear_subclass": type("MyLinear", (nn.Linear,), {})(2, 3),
    }
    left = {
        "conv3d": nn.Conv3d(2, 3, 1),
        "transpose1d": nn.ConvTranspose1d(2, 3, 1),
        "transpose2d": nn.ConvTranspose2d(2, 3, 1),
        "transpose3d": nn.ConvTranspose3d(2, 3, 1),
        "bilinear": nn.Bilinear(2, 2, 3),
        "lstm": nn.LSTM(2, 3),
        "gru": nn.GRU(2, 3),
        "cell": nn.LSTMCell(2, 3),
        "embedding": nn.Embedding(4, 3),
        "layer_norm": nn.LayerNorm(3),
        "batch_norm": nn.BatchNorm2d(3),
        "prelu": nn.PReLU(3),
    }
    net = Net(clip_range=CLIP)
    for name, layer in {**taken, **left}.items():
        net.add_module(name, layer)
    net.bare = nn.Parameter(torch.empty(3))
    net.attention = nn.MultiheadAttention(4, 2)
    fill_large(net)
    net.clip_weights()
    inside = {name for name, param in net.named_parameters() if param.abs().max() <= CLIP}
    expected = {f"{layer}.{kind}" for layer in taken for kind in ("weight", "bias")}
    assert inside == expected | {"attention.out_proj.weight", "attention.out_proj.bias"}


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv1d(3, 1), lambda: nn.LazyConv2d(3, 1)])
def test_lazy_modules_are_clipped_once_they_have_a_shape(lazy):
    net = Net([nn.Linear(2, 2), lazy()], clip_range=CLIP)
    fill_large(net.layers[0])
    net.clip_weights()
    assert net.layers[0].weight.abs().max() <= CLIP
    dimensions = {"LazyLinear": 2, "LazyConv1d": 3, "LazyConv2d": 4}[type(net.layers[1]).__name__]
    net.layers[1](torch.ones([2] * dimensions))
    fill_large(net)
    assert_clips(net)


def test_values_at_the_edges():
    net = Net([nn.Linear(7, 1, bias=False)], clip_range=CLIP)
    inf, nan = torch.inf, torch.nan
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[nan, inf, -inf, 0.5, -0.5000001, 0.25, -0.0]]))
    net.clip_weights()
    assert_equal(net.layers[0].weight.detach(), torch.tensor([[nan, 0.5, -0.5, 0.5, -0.5, 0.25, -0.0]]))


@pytest.mark.parametrize("clip_range", [0, 0.0, -1])
@pytest.mark.parametrize("clip_mode", ["absolute", "init_scaled"])
def test_no_positive_range_means_no_clipping(clip_range, clip_mode):
    net = make_net(clip_mode=clip_mode)
    net.clip_range = clip_range
    fill_large(net)
    before = parameters_of(net)
    net.clip_weights()
    assert_equal(parameters_of(net), before)


def test_the_range_may_change_after_init():
    net = make_net(clip_range=0)
    fill_large(net)
    net.clip_weights()
    for bound in (3.0, 1, 0.25):
        net.clip_range = bound
        fill_large(net)
        assert_clips(net, bound)


def test_clipping_between_forward_and_backward_is_legal():
    net = Net([nn.Linear(3, 4), nn.Linear(4, 2)], clip_range=CLIP)
    fill_large(net)
    versions = [param._version for param in net.parameters()]
    loss = net.layers[1](net.layers[0](torch.ones(2, 3)).tanh()).sum()
    net.clip_weights()
    assert [param._version for param in net.parameters()] == versions
    loss.backward()
    assert all(param.grad is not None and param.is_leaf and param.requires_grad for param in net.parameters())


def test_later_calls_do_not_walk_the_module_tree(monkeypatch):
    net = make_net()
    fill_large(net)
    net.clip_weights()
    walks = []
    for name in ("named_modules", "modules", "named_children", "children", "named_parameters", "parameters"):
        original = getattr(nn.Module, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            walks.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, counted)
    net.clip_weights()
    net.clip_weights()
    assert walks == []
    net.late = nn.Linear(1, 1)
    net.clip_weights()
    # The counter does see a walk where there is one.
    assert walks


def init_scaled_net(**kwargs):
    net = make_net(clip_mode="init_scaled", **kwargs)
    initial = parameters_of(net)
    fill_large(net)
    return net, initial


def expected_init_scaled(net, initial, factor):
    weights = {name for name in clipped_names(net) if name.endswith(".weight")}
    return {
        name: param.detach().clamp(-factor * initial[name].abs().max(), factor * initial[name].abs().max())
        if name in weights
        else param.detach().clone()
        for name, param in net.named_parameters()
    }


@pytest.mark.parametrize(("clip_range", "clip_scale"), [(1, 1), (0.5, 1), (2.0, 0.25), (0.5, 0)])
def test_init_scaled_bounds_each_weight_by_its_largest_initial_value(clip_range, clip_scale):
    net, initial = init_scaled_net(clip_range=clip_range)
    net.clip_scale = clip_scale
    expected = expected_init_scaled(net, initial, clip_range * clip_scale)
    net.clip_weights()
    torch.testing.assert_close(parameters_of(net), expected)


def refresh_l2_start(net):
    net.update_l2_init_weight_copy()
    return net


def load_other_weights(net):
    net.load_state_dict({key: value * 3 for key, value in net.state_dict().items()}, assign=True)
    return net


@pytest.mark.parametrize("change", [copy.deepcopy, pickled, refresh_l2_start, load_other_weights])
def test_init_scaled_bounds_stay_those_of_the_first_weights(change):
    net, initial = init_scaled_net(clip_range=0.5)
    net.clip_weights()
    fill_large(net)
    net = change(net)
    expected = expected_init_scaled(net, initial, 0.5)
    net.clip_weights()
    torch.testing.assert_close(parameters_of(net), expected)


def test_init_scaled_leaves_layers_that_came_later_alone():
    net, initial = init_scaled_net(clip_range=0.5)
    net.late = nn.Linear(3, 3)
    fill_large(net)
    late = {f"late.{kind}": param.detach().clone() for kind, param in net.late.named_parameters()}
    expected = expected_init_scaled(net, initial | late, 0.5) | late
    net.clip_weights()
    torch.testing.assert_close(parameters_of(net), expected)
