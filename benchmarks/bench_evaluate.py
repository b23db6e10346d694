"""Log-probability and entropy of given actions: forward, and forward with backward.

All providers start from (type, parameter) pairs and return log_prob, entropy and full_log_probs, which the handlers
write into the TensorDict; PyTorch computes what a peer does not return.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import categorical
from benchmarks.harness import Case, Size, choose, parametrized
from metta_fastagent import ops

PROVIDERS = (
    *("upstream", "torch.compile", "eager", "native", "triton"),
    *("torch.distributions", "torchrl", "pufferlib"),
)
MODES = ("forward", "forward + backward")
# (logits, pairs, cum_action_max_params) -> (log_prob, entropy, full_log_probs)
Evaluate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def upstream(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The guide's training handler: log_softmax, a gather by advanced indexing, the entropy from its definition."""
    index = categorical.upstream_index(pairs, cum_action_max_params)
    full_log_probs = torch.log_softmax(logits, dim=-1)
    log_prob = full_log_probs[torch.arange(index.shape[0], device=index.device), index]
    return log_prob, categorical.entropy_of(full_log_probs), full_log_probs


def with_distribution(provider: str) -> Evaluate:
    """torch.distributions' or TorchRL's categorical."""
    make = categorical.distribution_of(provider)

    def evaluate(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = categorical.upstream_index(pairs, cum_action_max_params)
        distribution = make(logits)
        return distribution.log_prob(index), distribution.entropy(), distribution.logits

    return evaluate


def with_pufferlib(provider: str) -> Evaluate:
    """pufferlib's sampling function, given the action."""
    from pufferlib.pytorch import sample_logits

    def evaluate(logits: Tensor, pairs: Tensor, cum_action_max_params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = categorical.upstream_index(pairs, cum_action_max_params)
        return *sample_logits(logits, action=index)[1:], logits.log_softmax(-1)

    return evaluate


FORMULAS = {"upstream": upstream, **dict.fromkeys(("torch.distributions", "torchrl"), with_distribution)}
FORMULAS["pufferlib"] = with_pufferlib


def make_case(mode: str, size: Size, device: torch.device) -> Case:
    inputs = categorical.make_inputs(size, device)
    pairs, table = inputs.pairs, inputs.cum_action_max_params
    logits = inputs.logits.requires_grad_(mode != "forward")

    def call_of(provider: str) -> Callable[[], Any]:
        evaluate = choose(provider, FORMULAS, ops.evaluate_actions)

        def with_backward() -> tuple[Tensor, ...]:
            log_prob, entropy, _ = evaluate(logits, pairs, table)
            grads = torch.autograd.grad((log_prob, entropy), logits, (inputs.grad_log_prob, inputs.grad_entropy))
            return log_prob, entropy, *grads

        return with_backward if mode != "forward" else torch.no_grad()(lambda: evaluate(logits, pairs, table))

    # Bytes forward: logits in, full_log_probs out, 8 for a pair, 8 for log_prob and entropy. Backward: 16 for the index
    # out and in, 8 for two gradients in, logits in again, their gradient out.
    per_row = 8 * size["actions"] + 16 if mode == "forward" else 16 * size["actions"] + 40
    return Case(f"evaluate_actions {mode}", call_of, moved_bytes=size["rows"] * per_row)


@pytest.mark.parametrize("mode", MODES)
@parametrized(PROVIDERS, categorical.SHAPES)
def test_evaluate_actions(measure, mode):
    measure(functools.partial(make_case, mode))
