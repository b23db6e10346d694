"""Derivatives of derivatives and torch.func: right, or an error that names the limit."""

import pytest
import torch
from torch.autograd import gradgradcheck

from metta_fastagent import ops, use_backend

BACKENDS = ["eager", "auto"]
INDEX = torch.tensor([3, 0, 2])


@pytest.fixture(params=BACKENDS, autouse=True)
def chosen(request):
    torch.manual_seed(0)
    with use_backend(request.param):
        yield


def formula(logits, index):
    full = torch.log_softmax(logits, -1)
    return full.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(full.exp() * full).sum(-1), full


def lstm_inputs(steps=3, rows=2, size=3):
    shapes = (steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_second_derivatives_of_evaluate_actions():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: ops.evaluate_actions(x, INDEX), (logits,))


def test_second_derivatives_of_a_masked_distribution_are_finite():
    logits = torch.randn(3, 4, dtype=torch.float64)
    logits[:, 1] = -torch.inf
    logits.requires_grad_()
    log_prob, entropy, _ = ops.evaluate_actions(logits, INDEX)
    (grad,) = torch.autograd.grad(log_prob.sum() + entropy.square().sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    assert second.isfinite().all()
    assert (second[:, 1] == 0).all()
    allowed = logits.detach()[:, [0, 2, 3]].requires_grad_()
    log_prob, entropy, _ = formula(allowed, torch.tensor([2, 0, 1]))
    (grad,) = torch.autograd.grad(log_prob.sum() + entropy.square().sum(), allowed, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), allowed)
    torch.testing.assert_close(second[:, [0, 2, 3]], expected)


def test_second_derivatives_of_sample_actions():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def draw(x):
        return ops.sample_actions(x, generator=torch.Generator().manual_seed(1))[1:4]

    assert gradgradcheck(draw, (logits,))


def test_second_derivatives_of_l2_init_loss():
    params = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, requires_grad=True).double()]
    start = [torch.randn_like(param).detach() for param in params]
    task = (params[0] ** 3).sum() + (params[1] ** 3).sum()
    loss = task + ops.l2_init_loss(params, start, 0.5).double()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), params)
    for param, initial, found in zip(params, start, second, strict=True):
        first = 3 * param**2 + (param - initial)
        torch.testing.assert_close(found, 2 * first * (6 * param + 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wanted", range(4))
def test_a_second_derivative_of_lstm_layer_is_refused(wanted):
    inputs = lstm_inputs()
    resets = torch.tensor([[False, True], [True, False], [False, False]])
    grads = torch.autograd.grad(ops.lstm_layer(*inputs, resets)[0].square().sum(), inputs, create_graph=True)
    expected = "lstm_layer: got a second derivative, expected first derivatives only; torch.func supports higher ones"
    # One input at a time: autograd evaluates only the nodes on the way to it.
    for grad in grads:
        with pytest.raises(RuntimeError, match=expected):
            torch.autograd.grad(grad.sum(), inputs[wanted], retain_graph=True, allow_unused=True)


def test_a_graph_that_nobody_differentiates_costs_no_error():
    inputs = lstm_inputs()
    plain = torch.autograd.grad(ops.lstm_layer(*inputs)[0].square().sum(), inputs)
    with_graph = torch.autograd.grad(ops.lstm_layer(*inputs)[0].square().sum(), inputs, create_graph=True)
    for one, other in zip(plain, with_graph, strict=True):
        torch.testing.assert_close(one, other)


def test_torch_func_grad_of_each_operation():
    logits = torch.randn(3, 4, dtype=torch.float64)
    grad = torch.func.grad(lambda x: sum(each.sum() for each in ops.evaluate_actions(x, INDEX)))(logits)
    torch.testing.assert_close(grad, torch.func.grad(lambda x: sum(e.sum() for e in formula(x, INDEX)))(logits))
    weight, start = torch.randn(5), torch.zeros(5)
    torch.testing.assert_close(torch.func.grad(lambda w: ops.l2_init_loss([w], [start], 0.5))(weight), weight)
    inputs = [tensor.detach() for tensor in lstm_inputs()]
    resets = torch.tensor([[False, True], [True, False], [False, False]])
    found = torch.func.grad(lambda *x: ops.lstm_layer(*x, resets)[0].square().sum(), argnums=(0, 1, 2, 3))(*inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(ops.lstm_layer(*leaves, resets)[0].square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_hessian_of_lstm_layer_by_torch_func():
    inputs = [tensor.detach() for tensor in lstm_inputs(2, 1, 1)]

    def loss(h):
        return ops.lstm_layer(inputs[0], inputs[1], h, inputs[3])[0].sum()

    hessian = torch.func.hessian(loss)(inputs[2]).view(())
    step = 1e-4
    high, middle, low = (loss(inputs[2] + delta) for delta in (step, 0.0, -step))
    torch.testing.assert_close(hessian, (high - 2 * middle + low) / step**2, rtol=1e-4, atol=1e-6)


def test_vmap_of_each_operation():
    logits, index = torch.randn(2, 3, 4), torch.stack([INDEX, INDEX.flip(0)])
    found = torch.vmap(ops.evaluate_actions)(logits, index)
    for one, expected in zip(found, formula(logits, index), strict=True):
        torch.testing.assert_close(one, expected)
    table = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2]], dtype=torch.int32)
    cumulative = torch.tensor([0, 0, 2])
    pairs = torch.vmap(lambda i: ops.logit_index_to_action(i, table))(index)
    assert torch.equal(pairs, table[index])
    assert torch.equal(torch.vmap(lambda p: ops.action_to_logit_index(p, cumulative))(pairs), index)
    drawn = torch.vmap(lambda x: ops.sample_actions(x)[0], randomness="different")(logits)
    assert ((drawn >= 0) & (drawn < 4)).all()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: ops.sample_actions(x)[0])(logits)


def test_an_illegal_action_under_vmap_is_nan():
    log_prob = torch.vmap(lambda x, i: ops.evaluate_actions(x, i)[0])(torch.zeros(2, 1, 4), torch.tensor([[4], [1]]))
    assert log_prob.isnan().tolist() == [[True], [False]]
