"""Draw of an action per row, with its pair, log-probability and all log-probabilities: the inference handler's work.

Draws differ between implementations. What is compared: full_log_probs, that log_prob and pair belong to the drawn
index, and that the draws' frequencies fit the probabilities. A peer's missing results are computed with PyTorch.
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
# Standard deviations: no right sampler comes so far in the sums below.
FREQUENCY_LIMIT = 6.0
# (index [N], log_prob [N], full_log_probs [N, A], pair [N, 2])
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]

make_inputs = categorical.make_inputs


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


def with_distributions(logits: Tensor, table: Tensor) -> Drawn:
    """torch.distributions.Categorical."""
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    index = distribution.sample()
    return index, distribution.log_prob(index), distribution.logits, table[index]


def with_torchrl(modules: Any) -> Callable[[Tensor, Tensor], Drawn]:
    """TorchRL's categorical with a mask, here one that allows everything."""

    def draw(logits: Tensor, table: Tensor) -> Drawn:
        distribution = modules.MaskedCategorical(logits=logits, mask=torch.ones_like(logits, dtype=torch.bool))
        index = distribution.sample()
        return index, distribution.log_prob(index), distribution.logits.log_softmax(-1), table[index]

    return draw


def with_pufferlib(pytorch: Any) -> Callable[[Tensor, Tensor], Drawn]:
    """pufferlib's sampling function."""

    def draw(logits: Tensor, table: Tensor) -> Drawn:
        index, log_prob, _ = pytorch.sample_logits(logits)
        index = index.long()
        return index, log_prob, logits.log_softmax(-1), table[index]

    return draw


def comparable(drawn: Drawn, table: Tensor) -> dict[str, Any]:
    """What all right samplers have in common, whatever they drew."""
    index, log_prob, full_log_probs, pair = drawn
    own = full_log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
    return {
        "full_log_probs": full_log_probs,
        "log_prob - full_log_probs[index]": log_prob - own,
        "pair - table[index]": (pair - table[index]).float(),
        "frequencies fit": frequencies_fit(index, full_log_probs),
    }


def frequencies_fit(index: Tensor, full_log_probs: Tensor) -> bool:
    """Whether each action was drawn about as often, over all rows, as its probabilities say."""
    probs = full_log_probs.double().exp()
    counts = torch.bincount(index, minlength=probs.shape[1])
    deviation = (probs * (1 - probs)).sum(0).sqrt().clamp_min(1.0)
    return bool(((counts - probs.sum(0)).abs() <= FREQUENCY_LIMIT * deviation).all())


def make_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """upstream, torch.compile, the package and peers."""
    inputs: Inputs = make_inputs(size, device)
    arguments = (inputs.logits, inputs.action_index_tensor)
    shared: dict[str, Any] = {"compared": lambda drawn: comparable(drawn, inputs.action_index_tensor)}

    def bind(draw: Callable[[Tensor, Tensor], Drawn]) -> Callable[[], Drawn]:
        return torch.no_grad()(lambda: draw(*arguments))

    def from_peer(name: str, draw: Callable[[Tensor, Tensor], Drawn]) -> Provider:
        return Provider(name, bind(draw), **shared)

    return [
        Provider("upstream", bind(upstream), **shared),
        compiled_provider(upstream, bind, compiled, **shared),
        *package_providers(device, bind(with_package), **shared),
        from_peer("torch.distributions", with_distributions),
        peer("torchrl", "torchrl.modules", lambda module: from_peer("torchrl", with_torchrl(module))),
        peer("pufferlib", "pufferlib.pytorch", lambda module: from_peer("pufferlib", with_pufferlib(module))),
    ]


SUITES = [
    Suite(
        "sample_actions",
        NAMES,
        categorical.SHAPES,
        make_providers,
        # Logits in, full_log_probs out, 8 each of index, pair, and log_prob with a random number.
        lambda size: size["rows"] * (8 * size["actions"] + 24),
    )
]


def test_providers(case, run_case):
    run_case(case)
