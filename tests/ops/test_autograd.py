"""First and second derivatives against finite differences, and torch.func: right, or an error that names the limit."""

import pytest
import torch
from references import CUM_MAX_PARAMS, PAIRS, categorical, lstm_inputs, random_tokens
from references import tokens_conv2d as conv2d_reference
from torch.autograd import gradcheck, gradgradcheck

from metta_fastagent import ops

INDEX = torch.tensor([3, 0, 2])
MASK = torch.tensor([[False, True, True, True], [True, False, True, False], [False, False, True, False]])
FORBIDDEN = torch.tensor([0.0, -torch.inf, 0.0, 0.0], dtype=torch.float64)
# The loss is a float32 number and a quadratic: central differences of a wide step are exact but for its rounding.
WIDE_STEP = {"eps": 0.1, "atol": 1e-4, "rtol": 1e-4}


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def functions(device):
    """Name to (a function of float64 leaves, the leaves)."""
    index, mask = INDEX.to(device), MASK.to(device)
    tokens, start = random_tokens(3, 12, 3, 5, 4).to(device), torch.randn(2, 3).to(device)
    leaves = {
        "logits": [leaf(3, 4)],
        "value": [leaf(3)],
        "weight": [leaf(2, 3)],
        "convolution": [leaf(5, 3, 2, 3), leaf(5), (torch.rand(3, dtype=torch.float64) + 1).requires_grad_()],
        "lstm": [tensor.requires_grad_() for tensor in lstm_inputs(3, 2, 3)[0]],
    }
    leaves = {name: [x.detach().to(device).requires_grad_() for x in group] for name, group in leaves.items()}
    resets = torch.tensor([[False, True], [True, False], [False, False]], device=device)

    def masked(x):
        log_prob, entropy, full = ops.evaluate_actions(x, index, mask=mask, temperature=0.6, strict=True)
        # The difference of two infinite log-probabilities is NaN.
        return log_prob, entropy, torch.where(mask, full, 0.0)

    def sampled(x):
        return ops.sample_actions(x, generator=torch.Generator(device).manual_seed(1))[1:4]

    numbers, chosen = torch.randn(4, 3, dtype=torch.float64).to(device), index.clone()
    numbers[0] = -1.5 + 0.1 * numbers[0]

    def lossy(x, value, **options):
        coefficients = {"clip_coef": 0.9, "vf_clip_coef": 0.5, "vf_coef": 0.7, "ent_coef": 0.3}
        return ops.ppo_loss(x, chosen, value, *numbers, **options, **coefficients)[0]

    return {
        "ppo_loss": (lossy, [*leaves["logits"], *leaves["value"]]),
        "ppo_loss with options": (
            lambda x, value: lossy(x, value, mask=mask, temperature=0.6, valid=index != 0),
            [*leaves["logits"], *leaves["value"]],
        ),
        "evaluate_actions": (lambda x: ops.evaluate_actions(x, index, strict=True), leaves["logits"]),
        "evaluate_actions with a mask": (masked, leaves["logits"]),
        "evaluate_actions of infinite logits": (
            lambda x: ops.evaluate_actions(x + FORBIDDEN.to(device), index, strict=True)[:2],
            leaves["logits"],
        ),
        "sample_actions": (sampled, leaves["logits"]),
        "tanh": (ops.tanh, leaves["logits"]),
        "tokens_conv2d": (lambda *x: ops.tokens_conv2d(tokens, *x, 5, 4, 2), leaves["convolution"]),
        "tokens_conv2d with relu": (lambda *x: ops.tokens_conv2d(tokens, *x, 5, 4, 2, True), leaves["convolution"]),
        "tokens_conv2d without bias": (
            lambda weight, scale: ops.tokens_conv2d(tokens, weight, None, scale, 5, 4, 2),
            leaves["convolution"][::2],
        ),
        "lstm_layer": (lambda *x: ops.lstm_layer(*x), leaves["lstm"]),
        "lstm_layer with resets": (lambda *x: ops.lstm_layer(*x, resets), leaves["lstm"]),
        "l2_init_loss": (lambda x: ops.l2_init_loss([x], [start], 0.5).double(), leaves["weight"]),
    }


NAMES = list(functions("cpu"))
TWICE = [name for name in NAMES if not name.startswith(("lstm", "l2"))]


@pytest.mark.parametrize("name", NAMES)
def test_first_derivatives(name, device, nondeterminism):
    function, leaves = functions(device)[name]
    assert gradcheck(function, leaves, nondet_tol=nondeterminism, **(WIDE_STEP if name == "l2_init_loss" else {}))


# The loss is float32, and plain PyTorch draws other actions.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("l2_init_loss", "sample_actions")])
def test_forward_mode(name, device):
    function, leaves = functions(device)[name]
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name, device, nondeterminism):
    function, leaves = functions(device)[name]
    assert gradgradcheck(function, leaves, nondet_tol=nondeterminism)


def test_second_derivatives_of_l2_init_loss(device):
    params = [leaf(2, 3).to(device), leaf(4).to(device)]
    start = [torch.randn_like(param).detach() for param in params]
    task = (params[0] ** 3).sum() + (params[1] ** 3).sum()
    # Twice: the second call has a plan.
    for _ in range(2):
        loss = task + ops.l2_init_loss(params, start, 0.5).double()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), params)
        for param, initial, found in zip(params, start, second, strict=True):
            first = 3 * param**2 + (param - initial)
            torch.testing.assert_close(found, 2 * first * (6 * param + 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", range(4))
def test_a_second_derivative_of_lstm_layer_is_refused(wanted, device):
    function, inputs = functions(device)["lstm_layer with resets"]
    grads = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs, create_graph=True)
    expected = "lstm_layer: got a second derivative, expected first derivatives only; torch.func supports higher ones"
    # One input at a time: autograd evaluates only the nodes on the way to it.
    for grad in grads:
        with pytest.raises(RuntimeError, match=expected):
            torch.autograd.grad(grad.sum(), inputs[wanted], retain_graph=True, allow_unused=True)


def test_a_graph_that_nobody_differentiates_costs_no_error(device):
    function, inputs = functions(device)["lstm_layer"]
    plain, with_graph = (
        torch.autograd.grad(function(*inputs)[0].square().sum(), inputs, create_graph=graph) for graph in (False, True)
    )
    torch.testing.assert_close(plain, with_graph)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sample_actions"])
def test_torch_func_has_the_gradients_of_autograd(name, device):
    function, leaves = functions(device)[name]

    def loss(*leaves):
        outputs = function(*leaves)
        return sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    found = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*(x.detach() for x in leaves))
    # Of float32 the loss alone.
    tolerances = {"rtol": 1e-5, "atol": 1e-5} if name == "l2_init_loss" else {}
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves), **tolerances)


def test_hessian_of_lstm_layer_by_torch_func(device):
    inputs = [tensor.to(device) for tensor in lstm_inputs(2, 1, 1)[0]]

    def loss(h):
        return ops.lstm_layer(inputs[0], inputs[1], h, inputs[3])[0].sum()

    hessian = torch.func.hessian(loss)(inputs[2]).view(())
    step = 1e-4
    high, middle, low = (loss(inputs[2] + delta) for delta in (step, 0.0, -step))
    torch.testing.assert_close(hessian, (high - 2 * middle + low) / step**2, rtol=1e-4, atol=1e-6)


def test_vmap_of_each_operation(device):
    logits, index = torch.randn(2, 3, 4, dtype=torch.float64, device=device), torch.stack([INDEX, INDEX.flip(0)])
    index, table, pairs = index.to(device), CUM_MAX_PARAMS.to(device), PAIRS.to(device)
    found = zip(*torch.vmap(lambda x, i: ops.evaluate_actions(x, i, strict=True))(logits, index), strict=True)
    for x, i, outputs in zip(logits, index, found, strict=True):
        torch.testing.assert_close(outputs, categorical(x, i))
    assert torch.equal(torch.vmap(lambda i: ops.logit_index_to_action(i, pairs))(index), pairs[index])
    assert torch.equal(torch.vmap(lambda p: ops.action_to_logit_index(p, table))(pairs[index]), index)
    drawn = torch.vmap(lambda x: ops.sample_actions(x)[0], randomness="different")(logits)
    assert ((drawn >= 0) & (drawn < 4)).all()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: ops.sample_actions(x)[0])(logits)
    torch.testing.assert_close(torch.vmap(ops.tanh)(logits), logits.tanh())
    tokens, (weight, bias, scale) = random_tokens(3, 12, 3, 5, 4).to(device), functions(device)["tokens_conv2d"][1]
    for factor, each in enumerate(
        torch.vmap(lambda w: ops.tokens_conv2d(tokens, w, bias, scale, 5, 4))(torch.stack([0 * weight, weight]))
    ):
        torch.testing.assert_close(each.cpu(), conv2d_reference(tokens, factor * weight, bias, scale, 5, 4))


def test_an_illegal_action_under_vmap_is_nan(device):
    logits, index = torch.zeros(2, 1, 4, device=device), torch.tensor([[4], [1]], device=device)
    log_prob = torch.vmap(lambda x, i: ops.evaluate_actions(x, i, strict=False)[0])(logits, index)
    assert log_prob.isnan().tolist() == [[True], [False]]
