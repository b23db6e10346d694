"""Conversion of (action type, parameter) pairs to logit indices, and back.

The package's operations also refuse what is out of range: on the CPU that is an extra pass over the values.
"""

from collections.abc import Mapping

import torch

from benchmarks import categorical
from benchmarks.harness import Provider, Shape, Skipped, Suite, compiled_provider, package_providers
from metta_fastagent import ops

ACTIONS = 21
NAMES = ("upstream", "torch.compile", "eager", "triton", "native")
SHAPES = [
    Shape("quick", {"rows": 256}),
    Shape("quick", {"rows": 4096}),
    Shape("full", {"rows": 65536}),
    Shape("gpu", {"rows": 1_048_576}),
]


def make_inputs(size: Mapping[str, int], device: torch.device) -> categorical.Inputs:
    """Pairs of 21 actions."""
    return categorical.make_inputs({"rows": size["rows"], "actions": ACTIONS}, device)


def to_index_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """Pairs to indices: upstream, torch.compile and the package."""
    inputs = make_inputs(size, device)
    arguments = (inputs.pairs, inputs.cum_action_max_params)
    return [
        Provider("upstream", lambda: categorical.upstream_index(*arguments)),
        compiled_provider(categorical.upstream_index, lambda f: lambda: f(*arguments), compiled),
        *package_providers(device, lambda: ops.action_to_logit_index(*arguments)),
    ]


def to_pair_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """Indices to pairs: upstream, torch.compile and the package."""
    inputs = make_inputs(size, device)
    table = inputs.action_index_tensor
    index = categorical.upstream_index(inputs.pairs, inputs.cum_action_max_params)
    return [
        Provider("upstream", lambda: table[index]),
        compiled_provider(lambda table, index: table[index], lambda f: lambda: f(table, index), compiled),
        *package_providers(device, lambda: ops.logit_index_to_action(index, table)),
    ]


SUITES = [
    # 8 bytes of a pair and 8 of an index.
    Suite("action_to_logit_index", NAMES, SHAPES, to_index_providers, lambda size: 16 * size["rows"]),
    Suite("logit_index_to_action", NAMES, SHAPES, to_pair_providers, lambda size: 16 * size["rows"]),
]


def test_providers(case, run_case):
    run_case(case)
