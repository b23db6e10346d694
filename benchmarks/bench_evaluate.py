"""Log-probability and entropy of given actions: forward, and forward with backward.

All providers start from (type, parameter) pairs and end with log_prob, entropy and full_log_probs, which the handlers
write into the TensorDict; a peer that does not return all of these computes the rest with PyTorch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import categorical
from benchmarks.categorical import Inputs, peer
from benchmarks.harness import Provider, Skipped, Suite, compiled_provider, package_providers
from metta_fastagent import ops

NAMES = ("upstream", "torch.compile", "eager", "triton", "native", "torch.distributions", "torchrl", "pufferlib")
Evaluate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

make_inputs = categorical.make_inputs


def upstream(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The guide's training handler: log_softmax, a gather by advanced indexing, the entropy from its definition."""
    index = categorical.upstream_index(pairs, cum_action_max_params)
    full_log_probs = torch.log_softmax(logits, dim=-1)
    log_prob = full_log_probs[torch.arange(index.shape[0], device=index.device), index]
    return log_prob, categorical.entropy_of(full_log_probs), full_log_probs


def with_distributions(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.distributions.Categorical."""
    index = categorical.upstream_index(pairs, cum_action_max_params)
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    return distribution.log_prob(index), distribution.entropy(), distribution.logits


def with_torchrl(modules: Any) -> Evaluate:
    """TorchRL's categorical with a mask, here one that allows everything."""

    def evaluate(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = categorical.upstream_index(pairs, cum_action_max_params)
        distribution = modules.MaskedCategorical(logits=logits, mask=torch.ones_like(logits, dtype=torch.bool))
        return distribution.log_prob(index), distribution.entropy(), distribution.logits.log_softmax(-1)

    return evaluate


def with_pufferlib(pytorch: Any) -> Evaluate:
    """pufferlib's sampling function, given the action."""

    def evaluate(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = categorical.upstream_index(pairs, cum_action_max_params)
        _, log_prob, entropy = pytorch.sample_logits(logits, action=index)
        return log_prob, entropy, logits.log_softmax(-1)

    return evaluate


def with_backward(evaluate: Evaluate, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs `evaluate` and returns its log_prob, entropy and the gradient of the logits."""
    logits = inputs.logits.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        log_prob, entropy, _ = evaluate(logits, inputs.pairs, inputs.cum_action_max_params)
        upstream_grads = (inputs.grad_log_prob, inputs.grad_entropy)
        return log_prob, entropy, *torch.autograd.grad((log_prob, entropy), (logits,), upstream_grads)

    return run


def forward_only(evaluate: Evaluate, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs `evaluate` without gradients."""
    arguments = (inputs.logits, inputs.pairs, inputs.cum_action_max_params)
    return torch.no_grad()(lambda: evaluate(*arguments))


def make_providers(
    bind: Callable[[Evaluate, Inputs], Callable], size: Mapping[str, int], device: torch.device, compiled: bool
) -> list[Provider | Skipped]:
    """upstream, torch.compile, the package and peers, each bound to the inputs by `bind`."""
    inputs = make_inputs(size, device)
    return [
        Provider("upstream", bind(upstream, inputs)),
        compiled_provider(upstream, lambda f: bind(f, inputs), compiled),
        *package_providers(device, bind(ops.evaluate_actions, inputs)),
        Provider("torch.distributions", bind(with_distributions, inputs)),
        peer("torchrl", "torchrl.modules", lambda m: Provider("torchrl", bind(with_torchrl(m), inputs))),
        peer("pufferlib", "pufferlib.pytorch", lambda m: Provider("pufferlib", bind(with_pufferlib(m), inputs))),
    ]


SUITES = [
    Suite(
        "evaluate_actions forward",
        NAMES,
        categorical.SHAPES,
        lambda size, device, compiled: make_providers(forward_only, size, device, compiled),
        # Logits in, full_log_probs out, 8 of a pair, 8 of log_prob and entropy.
        lambda size: size["rows"] * (8 * size["actions"] + 16),
    ),
    Suite(
        "evaluate_actions forward + backward",
        NAMES,
        categorical.SHAPES,
        lambda size, device, compiled: make_providers(with_backward, size, device, compiled),
        # The forward's, 16 of the index out and in, 8 of two gradients in, logits in again, their gradient out.
        lambda size: size["rows"] * (16 * size["actions"] + 40),
    ),
]


def test_providers(case, run_case):
    run_case(case)
