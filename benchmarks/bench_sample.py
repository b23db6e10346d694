"""Draw one action per row, with its pair, log-probability and all log-probabilities: the inference handler's work.

Draws differ between implementations. The comparison covers full_log_probs, whether log_prob and pair belong to the
drawn index, and whether the frequencies of the draws match the probabilities. PyTorch computes what a peer does not
return.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import categorical
from benchmarks.bench_evaluate import PROVIDERS
from benchmarks.harness import Case, Size, choose, parametrized
from metta_fastagent import ops

# In standard deviations: no correct sampler deviates this much in the sums below.
FREQUENCY_LIMIT = 6.0
# (index [N], log_prob [N], full_log_probs [N, A], pair [N, 2])
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]


def upstream(logits: Tensor, table: Tensor) -> Drawn:
    """The guide's inference handler: log_softmax, exp, multinomial, gathers."""
    full_log_probs = torch.log_softmax(logits, dim=-1)
    index = torch.multinomial(full_log_probs.exp(), num_samples=1).view(-1)
    log_prob = full_log_probs[torch.arange(index.shape[0], device=index.device), index]
    return index, log_prob, full_log_probs, table[index]


def with_package(logits: Tensor, table: Tensor) -> Drawn:
    """The package's operation."""
    index, log_prob, _, full_log_probs, pair = ops.sample_actions(logits, table)
    return index, log_prob, full_log_probs, pair


def with_distribution(provider: str) -> Callable[[Tensor, Tensor], Drawn]:
    """torch.distributions' or TorchRL's categorical."""
    make = categorical.distribution_of(provider)

    def draw(logits: Tensor, table: Tensor) -> Drawn:
        distribution = make(logits)
        index = distribution.sample()
        return index, distribution.log_prob(index), distribution.logits, table[index]

    return draw


def with_pufferlib(provider: str) -> Callable[[Tensor, Tensor], Drawn]:
    """pufferlib's sampling function."""
    from pufferlib.pytorch import sample_logits

    def draw(logits: Tensor, table: Tensor) -> Drawn:
        index, log_prob, _ = sample_logits(logits)
        index = index.long()
        return index, log_prob, logits.log_softmax(-1), table[index]

    return draw


def comparable(index: Tensor, log_prob: Tensor, full_log_probs: Tensor) -> dict[str, Any]:
    """The properties that all correct samplers share."""
    own = full_log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
    return {
        "full_log_probs": full_log_probs,
        "log_prob - full_log_probs[index]": log_prob - own,
        "frequencies fit": frequencies_fit(index, full_log_probs),
    }


def frequencies_fit(index: Tensor, full_log_probs: Tensor) -> bool:
    """Whether each action was drawn, over all rows, about as often as its probabilities predict."""
    probs = full_log_probs.double().exp()
    counts = torch.bincount(index, minlength=probs.shape[1])
    deviation = (probs * (1 - probs)).sum(0).sqrt().clamp_min(1.0)
    return bool(((counts - probs.sum(0)).abs() <= FREQUENCY_LIMIT * deviation).all())


FORMULAS = {"upstream": upstream, **dict.fromkeys(("torch.distributions", "torchrl"), with_distribution)}
FORMULAS["pufferlib"] = with_pufferlib


def make_case(size: Size, device: torch.device) -> Case:
    inputs = categorical.make_inputs(size, device)
    logits, table = inputs.logits, inputs.action_index_tensor

    def call_of(provider: str) -> Callable[[], Drawn]:
        draw = choose(provider, FORMULAS, with_package)
        return torch.no_grad()(lambda: draw(logits, table))

    def compared(drawn: Drawn) -> dict[str, Any]:
        index, log_prob, full_log_probs, pair = drawn
        return {**comparable(index, log_prob, full_log_probs), "pair - table[index]": pair - table[index]}

    # Logits in, full_log_probs out, 8 bytes each for index, pair, and log_prob with a random number.
    return Case("sample_actions", call_of, compared, moved_bytes=size["rows"] * (8 * size["actions"] + 24))


@parametrized(PROVIDERS, categorical.SHAPES)
def test_sample_actions(measure):
    measure(make_case)
