"""Conversion of (action type, parameter) pairs to logit indices, and back.

The package's operations also reject values out of range: on the CPU that is an extra pass over them.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import categorical
from benchmarks.harness import Case, Size, choose, parametrized, shapes
from metta_fastagent import ops

ACTIONS = 21
PROVIDERS = ("upstream", "torch.compile", "eager", "native", "triton")
OPERATIONS = ("action_to_logit_index", "logit_index_to_action")
SHAPES = shapes("rows", quick=[(256,), (4096,)], full=[(1,), (65536,)], gpu=[(1_048_576,)])


def make_case(operation: str, size: Size, device: torch.device) -> Case:
    inputs = categorical.make_inputs({"rows": size["rows"], "actions": ACTIONS}, device)
    if operation == "action_to_logit_index":
        upstream, package = categorical.upstream_index, ops.action_to_logit_index
        arguments = (inputs.pairs, inputs.cum_action_max_params)
    else:
        upstream, package = (lambda index, table: table[index]), ops.logit_index_to_action
        index = categorical.upstream_index(inputs.pairs, inputs.cum_action_max_params)
        arguments = (index, inputs.action_index_tensor)

    def call_of(provider: str) -> Callable[[], Any]:
        return functools.partial(choose(provider, {"upstream": upstream}, package), *arguments)

    # 8 bytes per pair and 8 per index.
    return Case(operation, call_of, moved_bytes=16 * size["rows"])


@pytest.mark.parametrize("operation", OPERATIONS)
@parametrized(PROVIDERS, SHAPES)
def test_conversions(measure, operation):
    measure(functools.partial(make_case, operation))
