"""What all operations share, by one table of calls: compilers, fake tensors, memory layouts, empty inputs."""

import pytest
import torch
from references import CUM_MAX_PARAMS, PAIRS, lstm_inputs, random_tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from metta_fastagent import explain, ops, use_backend


def clip(*weights):
    clipped = [weight.detach().clone() for weight in weights]
    ops.clip_weights_(clipped, [0.5, 0.25])
    return clipped


def lstm_step(*given):
    """The operator of a rollout, which writes the next state where it is told to."""
    next_h, next_c = torch.zeros_like(given[2]), torch.zeros_like(given[3])
    return torch.ops.metta_fastagent.lstm_step_(*given, next_h, next_c), next_h, next_c


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def calls(rows):
    """Name to (function, tensors)."""
    torch.manual_seed(rows)
    index = torch.arange(rows) % 6
    mask = (torch.rand(rows, 6) < 0.6) | (torch.arange(6) == index.unsqueeze(1))
    types, params = torch.ones(rows, 3, dtype=torch.bool), torch.rand(rows, 3) < 2
    tokens, scale, kernel = random_tokens(rows, 20, 5, 7, 7), torch.rand(5) + 1, leaf(6, 5, 3, 3)
    temperature = torch.tensor(0.7)
    (projected, *state), resets = lstm_inputs(4, rows, 5, torch.float32, "some")
    lstm = [projected.requires_grad_(), *(tensor.requires_grad_() for tensor in state)]
    step = [tensor.detach() for tensor in (projected[:1], *state)]
    numbers = [
        torch.randn(rows, 5),
        torch.randn(rows, 5),
        torch.rand(rows, 5) < 0.3,
        torch.randn(rows),
        torch.ones(rows, 5),
    ]
    return {
        "advantages": (lambda *rollout: ops.advantages(*rollout, 0.9, 0.8), numbers),
        "advantages with options": (
            lambda *given: ops.advantages(*given[:5], 0.9, 0.8, valid=given[5], ratios=given[6], rho_clip=1.2),
            [*numbers, torch.rand(rows, 5) < 0.7, torch.rand(rows, 5) * 2],
        ),
        "ppo_loss of pairs": (
            lambda x, value, pairs, table, *numbers: ops.ppo_loss(
                x, pairs, value, *numbers, table, clip_coef=0.2, vf_clip_coef=0.0, vf_coef=0.5, ent_coef=0.01
            ),
            [leaf(rows, 6), leaf(rows), PAIRS[index], CUM_MAX_PARAMS, *torch.randn(4, rows)],
        ),
        "ppo_loss of indices with options": (
            lambda x, value, index, valid, count, mask, temperature, *numbers: ops.ppo_loss(
                x,
                index,
                value,
                *numbers,
                valid=valid,
                count=count,
                mask=mask,
                temperature=temperature,
                clip_coef=0.2,
                vf_clip_coef=0.1,
                vf_coef=0.5,
                ent_coef=0.01,
            ),
            [
                *(leaf(rows, 6), leaf(rows, 1), index.short(), torch.rand(rows) < 0.7, torch.tensor(rows / 2)),
                *(mask, temperature, *torch.randn(4, rows)),
            ],
        ),
        "evaluate_actions of pairs": (
            lambda x, pairs, table, *masks: ops.evaluate_actions(x, pairs, table, masks, strict=True),
            [leaf(rows, 6), PAIRS[index], CUM_MAX_PARAMS, types, params],
        ),
        "evaluate_actions of indices": (
            lambda x, index, *options: ops.evaluate_actions(x, index, None, *options, strict=True),
            [leaf(rows, 6), index.short(), mask, temperature],
        ),
        "sample_actions": (ops.sample_actions, [leaf(rows, 6), PAIRS]),
        "sample_actions greedily": (
            lambda x, *options: ops.sample_actions(x, None, None, *options, greedy=True),
            [leaf(rows, 6), mask, temperature],
        ),
        "action_to_logit_index": (ops.action_to_logit_index, [PAIRS[index], CUM_MAX_PARAMS]),
        "logit_index_to_action": (ops.logit_index_to_action, [index, PAIRS]),
        "clip_weights_": (clip, [torch.randn(rows, 5), torch.randn(rows, 3).bfloat16()]),
        "l2_init_loss": (
            lambda *weights: ops.l2_init_loss(weights[:2], weights[2:], 0.5),
            [leaf(rows, 5), leaf(rows, 3), torch.randn(rows, 5), torch.randn(rows, 3)],
        ),
        "lstm_layer": (ops.lstm_layer, [*lstm, resets]),
        "lstm_layer without resets": (ops.lstm_layer, lstm),
        "lstm_layer without gradients": (ops.lstm_layer, [*(tensor.detach() for tensor in lstm), resets]),
        "lstm_step_": (lstm_step, [*step, resets[:1], resets[1:2], torch.randn(step[1].shape[0])]),
        "tanh": (ops.tanh, [leaf(rows, 6)]),
        "tokens_to_grid": (lambda tokens, scale: ops.tokens_to_grid(tokens, 5, 3, 7, scale), [tokens, scale]),
        "tokens_to_grid with x low": (
            lambda tokens, scale: ops.tokens_to_grid(tokens, 5, 3, 7, scale, coordinates="yx"),
            [tokens, scale],
        ),
        "tokens_conv2d": (
            lambda tokens, weight, bias, scale: ops.tokens_conv2d(tokens, weight, bias, scale, 7, 7, 2, True),
            [tokens, kernel, leaf(6), scale.clone().requires_grad_()],
        ),
        "tokens_conv2d without bias": (
            lambda tokens, weight, scale: ops.tokens_conv2d(tokens, weight, None, scale, 7, 6, coordinates="yx"),
            [tokens, kernel, scale],
        ),
    }


every_call = pytest.mark.parametrize("name", calls(1))


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def call(name, rows, device):
    function, tensors = calls(rows)[name]
    return function, [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in tensors]


def outputs_of(function, tensors):
    torch.manual_seed(3)
    outputs = function(*tensors)
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def gradients(outputs, tensors, **options):
    """Of the tensors that require one, for upstream gradients that are all different."""
    outputs, leaves = ([each for each in group if each.requires_grad] for group in (outputs, tensors))
    upstream = [
        torch.arange(each.numel(), dtype=each.dtype, device=each.device).cos().view(each.shape) for each in outputs
    ]
    return list(torch.autograd.grad(outputs, leaves, upstream, **options)) if leaves else []


def run(function, tensors):
    outputs = outputs_of(function, tensors)
    grads = gradients(outputs, tensors)
    return [output.detach() for output in outputs] + grads


def strided(tensor):
    """The same values with gaps between them."""
    with_gaps = torch.stack([tensor.detach()] * 2, dim=-1)[..., 0]
    return with_gaps.requires_grad_(tensor.requires_grad)


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "metta_fastagent":
            self.calls.append((operator, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return operator(*args, **(kwargs or {}))


def operators_of(function, tensors):
    with Recorder() as recorder:
        run(function, tensors)
    return recorder.calls


@every_call
def test_opcheck(name, backend, device):
    function, tensors = call(name, 3, device)
    quick = ["test_schema", "test_faketensor"]
    # Tracing by AOTAutograd takes most of the time.
    for inputs, checks in (
        (tensors, [*quick, "test_autograd_registration", "test_aot_dispatch_dynamic"]),
        (list(map(strided, tensors)), quick),
        (call(name, 0, device)[1], quick),
    ):
        for operator, args in operators_of(function, inputs):
            # The gradients that its kernel writes are parts of one tensor.
            parts = backend == "triton" and operator._opname == "l2_init_loss_backward"
            torch.library.opcheck(operator, args, test_utils=[x for x in checks if not (parts and x == quick[1])])


def test_every_operator_has_a_call_here(device):
    called = {operator._opname for name in calls(1) for operator, _ in operators_of(*call(name, 3, device))}
    (operators,) = (line.split(": ")[1] for line in explain().splitlines() if line.startswith("operations: "))
    assert called == set(operators.split(", ")) - {"environment_rows", "each_environment_row"}


@every_call
def test_compiled_into_one_graph(name, compile_fullgraph, device):
    function, _ = call(name, 1, device)
    compiled = compile_fullgraph(lambda *tensors: function(*tensors))
    for rows in (4, 7):
        tensors = call(name, rows, device)[1]
        for got, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
            torch.testing.assert_close(got, expected)


@every_call
@pytest.mark.parametrize("rows", [5, 0])
def test_fake_tensors_have_the_shapes_of_real_ones(name, rows, device):
    function, tensors = call(name, rows, device)
    results = run(function, tensors)
    mode = FakeTensorMode()
    tensors = [mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad) for tensor in tensors]
    with mode:
        fakes = run(function, tensors)
    assert [(x.shape, x.dtype, x.device) for x in fakes] == [(x.shape, x.dtype, x.device) for x in results]
    assert rows or not any(result.any() for result in results)


@every_call
def test_tensors_with_gaps(name, device):
    function, tensors = call(name, 5, device)
    with_gaps = list(map(strided, tensors))
    for got, expected in zip(run(function, with_gaps), run(function, tensors), strict=True):
        torch.testing.assert_close(got, expected)


@every_call
def test_inputs_stay_as_they_are(name, device):
    function, tensors = call(name, 5, device)
    before = [tensor.detach().clone() for tensor in tensors]
    run(function, tensors)
    assert all(map(torch.equal, tensors, before))


@every_call
def test_a_backward_runs_on_the_backend_of_its_forward(name, backend, device):
    function, tensors = call(name, 5, device)
    outputs = outputs_of(function, tensors)
    inside = gradients(outputs, tensors, retain_graph=True)
    with use_backend("auto" if backend == "eager" else "eager"):
        assert all(map(torch.equal, gradients(outputs, tensors), inside))
