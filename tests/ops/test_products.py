"""Linear layers by both libraries, against products in float64."""

import pytest
import torch
from references import assert_close, without
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from metta_fastagent import use_backend
from metta_fastagent.ops import linear, linear_layer, products
from metta_fastagent.ops.products import ALWAYS, LIMITS, NEVER, weight_gradient
from metta_fastagent.runtime import native

# The libraries are PyTorch's own, and the kernels in the interpreter use neither.
pytestmark = without("triton-cpu")
SHAPES = [(1, 1, 1), (3, 0, 2), (3, 2, 0), (0, 2, 3), (3, 1, 2), (2, 5, 1), (7, 9, 17), (64, 128, 33), (129, 65, 16)]
has_operator = pytest.mark.skipif(products._operator() is None, reason="PyTorch without oneDNN's linear layer")


@pytest.fixture(params=["blas", pytest.param("onednn", marks=has_operator), "as on CUDA"])
def library(request, monkeypatch):
    """The library that makes every product, and the list of those that oneDNN made."""
    monkeypatch.setattr(products, "limits", lambda: ALWAYS if request.param == "onednn" else NEVER)
    monkeypatch.setattr(products, "FEWEST_RESULTS", {"relu": 0, "tanh": 0})
    if request.param == "as on CUDA":
        # The operator whose relu costs no launch there exists on the CPU too.
        monkeypatch.setattr(products, "uses_triton", lambda device: True)
    made, operator = [], products._operator()
    monkeypatch.setattr(products, "_operator", lambda: lambda *args: made.append(args) or operator(*args))
    return request.param, made


@pytest.fixture
def onednn(monkeypatch, library):
    if library[0] != "onednn":
        pytest.skip("of oneDNN")
    return library[1]


def tensors(rows, inputs, outputs, device="cpu"):
    torch.manual_seed(rows + inputs)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape).to(device).requires_grad_() for shape in shapes]


ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "tanh": torch.tanh}


def check(function, given, upstream, activation="none"):
    """Values and gradients of `function(*given)` against products in float64."""
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    exact = ACTIVATIONS[activation](leaves[0] @ leaves[1].t() + (leaves[2] if len(leaves) > 2 else 0))
    output = function(*given)
    assert_close(output, exact, torch.float32, of_sums=True)
    grads = torch.autograd.grad(output, given, upstream.to(output.device))
    for grad, wanted in zip(grads, torch.autograd.grad(exact, leaves, upstream.double()), strict=True):
        assert_close(grad, wanted, torch.float32, of_sums=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onednn_without_the_cpp_operators(onednn, activation, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(products, "activate_", None)  # another test may have loaded them
    with use_backend("auto"):
        check(lambda x, w, b: linear(x, w, b, activation), tensors(64, 128, 33), torch.randn(64, 33), activation)
    assert len(onednn) > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, activation, library, backend, device):
    given = tensors(*shape, device)
    upstream = torch.randn(shape[0], shape[2])
    check(lambda x, w, b: linear(x, w, b, activation), given, upstream, activation)
    check(lambda x, w: linear(x, w, None, activation), given[:2], upstream, activation)
    served = library[0] == "onednn" and backend != "eager" and device.type == "cpu" and min(shape) > 0
    # Forward and both gradients, with the bias and without.
    assert len(library[1]) == (6 if served else 0)


def test_without_gradients_there_is_no_graph(library, device):
    given = [tensor.detach() for tensor in tensors(20, 30, 40, device)]
    exact = given[0].cpu().double() @ given[1].cpu().double().t() + given[2].cpu().double()
    assert_close(linear(*given), exact, torch.float32, of_sums=True)
    assert not linear(*given).requires_grad
    given[2].requires_grad_()
    linear(*given).sum().backward()
    assert_close(given[2].grad, torch.full((40,), 20.0, dtype=torch.float64), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_more_dimensions_and_other_layouts(activation, library, device):
    x, w, b = tensors(24, 10, 6, device)
    sequence, upstream = x.view(4, 6, 10), torch.randn(24, 6)
    activated = lambda x, w, b: linear(x, w, b, activation)  # noqa: E731
    check(lambda x, w, b: activated(x.view(4, 6, 10), w, b).flatten(0, 1), (x, w, b), upstream, activation)
    swapped = lambda x, w, b: activated(x.view(4, 6, 10).transpose(0, 1), w, b).transpose(0, 1)  # noqa: E731
    check(lambda *given: swapped(*given).flatten(0, 1), (x, w, b), upstream, activation)
    strided = [tensor.detach().t().contiguous().t().requires_grad_() for tensor in (x, w)]
    every_other = torch.stack((b, b), 1).detach()[:, 0].requires_grad_()
    check(activated, (*strided, every_other), upstream.t().contiguous().t(), activation)
    check(activated, (x, w, b), torch.ones(1, 1).expand(24, 6), activation)
    check(activated, (x, w, b[:1].detach().requires_grad_()), upstream, activation)
    assert activated(sequence[:, :0], w, b).shape == (4, 0, 6)
    without_inputs = activated(x[:, :0], w[:, :0], b)
    assert_close(without_inputs, ACTIVATIONS[activation](b.double()).cpu().expand(24, 6), torch.float32)
    assert activated(x[0], w, b).shape == (6,)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_and_nan_pass_through(activation, library, device):
    bias = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 2.0], dtype=torch.float64)
    given = torch.zeros(3, 2), torch.zeros(5, 2), bias.float()
    got = linear(*(tensor.to(device) for tensor in given), activation)
    assert_close(got, ACTIVATIONS[activation](bias).expand(3, 5), torch.float32)


def test_another_activation_is_refused():
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    for call in (lambda *given: linear(*given, hooked.weight, None, "gelu"), lambda x: linear_layer(hooked, x, "gelu")):
        with pytest.raises(ValueError, match=r"^activation: got 'gelu', expected one of none, relu, tanh$"):
            call(torch.ones(2, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_errors_are_those_of_pytorch(activation, library, device):
    x, w, b = (tensor.detach() for tensor in tensors(4, 3, 5, device))
    for given in ((x, w, b.to("meta")), (x, w[:, :2], b), (x, w, b[:2]), (x, w.double(), b)):
        with pytest.raises(RuntimeError) as expected:
            torch.nn.functional.linear(*given)
        with pytest.raises(RuntimeError) as got:
            linear(*given, activation)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode(activation, library, device):
    x, w, b = (tensor.detach() for tensor in tensors(6, 3, 5, device))
    tangent = torch.randn(6, 3).to(device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found = forward_ad.unpack_dual(linear(dual, w, b, activation)).tangent
    expected = torch.func.jvp(lambda x: ACTIVATIONS[activation](F.linear(x, w, b)), (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_backward_keeps_only_what_it_needs(activation, library, device):
    x, w, b = tensors(6, 3, 5, device)
    # The input's gradient needs the weight alone, the weight's the input alone.
    for frozen, changed in ((w, x), (x, w)):
        frozen.requires_grad_(False)
        output = linear(x, w, b, activation)
        with torch.no_grad():
            changed.mul_(2)
        output.sum().backward()
        frozen.requires_grad_(True)


def test_second_derivatives(library, device):
    torch.manual_seed(0)
    given = [tensor.detach().double().requires_grad_() for tensor in tensors(5, 4, 3, device)]
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *x, name=activation: linear(*x, name), given)
        assert torch.autograd.gradgradcheck(lambda *x, name=activation: linear(*x, name), given)
    # In float32, which oneDNN serves, the derivative of the gradient's square.
    x, w, b = tensors(9, 8, 7, device)
    (grad,) = torch.autograd.grad(linear(x, w, b, "tanh").pow(3).sum(), x, create_graph=True)
    grads = torch.autograd.grad(grad.square().sum(), (x, w, b))
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in (x, w, b)]
    (exact,) = torch.autograd.grad(
        (leaves[0] @ leaves[1].t() + leaves[2]).tanh().pow(3).sum(), leaves[0], create_graph=True
    )
    for got, wanted in zip(grads, torch.autograd.grad(exact.square().sum(), leaves), strict=True):
        assert_close(got, wanted, torch.float32, of_sums=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batches_of_gradients(activation, library, device):
    given = tensors(24, 32, 16, device)
    upstream = torch.randn(3, 24, 16, device=device)
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    exact = ACTIVATIONS[activation](F.linear(*leaves))
    batched = torch.autograd.grad(linear(*given, activation), given, upstream, is_grads_batched=True)
    for index, each in enumerate(upstream.cpu().double()):
        for grad, wanted in zip(batched, torch.autograd.grad(exact, leaves, each, retain_graph=True), strict=True):
            assert_close(grad[index], wanted, torch.float32, of_sums=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_onednn_does_not_serve(onednn, compile_fullgraph, device):
    x, w, b = (tensor.detach() for tensor in tensors(32, 32, 32, device))
    compile_fullgraph(lambda *given: linear(*given, "relu"))(x, w, b)
    torch.func.vmap(linear, (0, None, None))(x, w, b)
    torch.func.grad(lambda x: linear(x, w, b).sum())(x)
    torch.jit.trace(lambda x: linear(x, w, b), x, check_trace=False)
    with torch.autocast(device.type, torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
        assert weight_gradient(x, x).dtype == torch.float32
    assert linear(x.double(), w.double(), b.double()).dtype == torch.float64
    assert linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, w, b)
    with use_backend("eager"):
        linear(x, w, b)
    assert onednn == []


def test_layers_that_compute_something_else_are_called(library, device):
    x = torch.randn(20, 16).to(device)
    layer = nn.Linear(16, 18).to(device)
    assert_close(linear_layer(layer, x), layer.double()(x.double()).cpu(), torch.float32)
    layer.float().register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(linear_layer(layer, x, "relu"), F.relu(layer(x)))
    shifted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 18)).to(device)
    assert torch.equal(linear_layer(shifted, x), shifted(x))
    layer = nn.Linear(16, 18).to(device)
    layer.forward = lambda x: x
    assert linear_layer(layer, x) is x


def test_weight_gradient(library, device):
    grad, x = torch.randn(50, 7).to(device), torch.randn(50, 9).to(device)
    assert_close(weight_gradient(grad, x), grad.double().t().cpu() @ x.double().cpu(), torch.float32, of_sums=True)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (("AuthenticAMD", 25, "AVX512", "mkl"), LIMITS[25]),
        (("AuthenticAMD", 26, "AVX512", "mkl"), LIMITS[26]),
        (("AuthenticAMD", 27, "AVX512", "mkl"), LIMITS[26]),
        (("AuthenticAMD", 23, "AVX512", "mkl"), NEVER),
        (("AuthenticAMD", 25, "AVX2", "mkl"), NEVER),
        (("AuthenticAMD", 26, "AVX512", ""), NEVER),
        (("GenuineIntel", 6, "AVX512", "mkl"), NEVER),
        (("", 0, "DEFAULT", ""), NEVER),
    ],
)
def test_the_rule(processor, expected):
    assert products.limits_of(*processor) == expected


def test_the_size_decides(monkeypatch, backend):
    made = []
    monkeypatch.setattr(products, "_operator", lambda: lambda x, w, *_: made.append(len(x)) or x @ w.t())
    monkeypatch.setattr(products, "limits", lambda: products.Limits(2 * 64 * 32 * 16, 2 * 64 * 32 * 16))
    for rows, inputs, outputs in ((64, 32, 16), (63, 32, 16), (2000, 32, 15), (2000, 15, 32), (15, 2000, 32)):
        linear(torch.randn(rows, inputs), torch.randn(outputs, inputs))
        weight_gradient(torch.randn(inputs, outputs), torch.randn(inputs, rows))
    assert made == ([] if backend == "eager" else [64, 16])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_small_results_take_the_separate_passes(activation, monkeypatch, backend, device):
    monkeypatch.setattr(products, "limits", lambda: NEVER)
    monkeypatch.setattr(products, "FEWEST_RESULTS", {"relu": 24, "tanh": 24})
    x, w, b = (tensor.detach() for tensor in tensors(6, 3, 4, device))
    assert (products._library(x, w, b, activation) == "blas") == (backend == "native")
    assert products._library(x[:5], w, b, activation) in (None, "cublas")


@pytest.mark.parametrize("choice", ["auto", "blas", "onednn"])
def test_the_variable(choice, monkeypatch):
    monkeypatch.setenv(products.VARIABLE, choice)
    own = products.limits_of(*products._processor())
    assert products.limits.__wrapped__() == {"auto": own, "blas": NEVER, "onednn": ALWAYS}[choice]
    monkeypatch.setenv(products.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="METTA_FASTAGENT_PRODUCTS: got 'mkl', expected one of auto, blas, onednn"):
        products.limits.__wrapped__()


@pytest.mark.parametrize("missing", ["operator", "schema", "results"])
def test_without_a_usable_operator_the_blas_serves(missing, monkeypatch, backend, device):
    class Operator:
        _schema = "mkldnn::_linear_pointwise(Tensor X) -> Tensor" if missing == "schema" else products._SCHEMA

        def __call__(self, x, w, b, *_):
            return x @ w.t() - b

    fake = {} if missing == "operator" else {"_linear_pointwise": type("Packet", (), {"default": Operator()})}
    monkeypatch.setattr(torch.ops, "mkldnn", type("Namespace", (), fake))
    operator = products._operator.__wrapped__()
    assert operator is None
    monkeypatch.setattr(products, "_operator", lambda: operator)
    monkeypatch.setattr(products, "limits", lambda: ALWAYS)
    check(linear, tensors(20, 20, 20, device), torch.randn(20, 20))
