"""The TensorDict fields `bptt` and `batch`: `set_tensordict_fields` in rollout (time 0) and in training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.harness import Provider, Shape, Skipped, Suite, package_providers
from metta_fastagent import PyTorchAgentMixin

TOKENS = 8


class Agent(PyTorchAgentMixin, nn.Module):
    """The mixin and nothing else."""


class Inputs(NamedTuple):
    """A TensorDict of batch size [rows] in rollout, [rows, time] in training, and its observations."""

    td: TensorDict
    observations: Tensor


def make_inputs(size: Mapping[str, int], device: torch.device) -> Inputs:
    """Empty observations."""
    batch_size = [size["rows"], size["time"]] if size["time"] else [size["rows"]]
    observations = torch.zeros(*batch_size, TOKENS, 3, dtype=torch.uint8, device=device)
    return Inputs(TensorDict({"env_obs": observations}, batch_size=batch_size), observations)


def upstream(td: Any, observations: Tensor) -> Any:
    """The guide's set-up: a reshape in training, two filled tensors."""
    rows, steps = observations.shape[0], observations.shape[1] if observations.dim() == 4 else 1
    if td.batch_dims > 1:
        td = td.reshape(rows * steps)
    for key, value in (("bptt", steps), ("batch", rows)):
        td.set(key, torch.full((rows * steps,), value, dtype=torch.long, device=observations.device))
    return td


def make_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """upstream and the package."""
    inputs, agent = make_inputs(size, device), Agent()

    def package() -> Any:
        agent.set_tensordict_fields(inputs.td, inputs.observations)
        return inputs.td

    # The package keeps [rows, time] where upstream's TensorDict is flat.
    shared: dict[str, Any] = {"compared": lambda td: [td["bptt"].flatten(), td["batch"].flatten()]}
    return [
        Provider("upstream", lambda: upstream(*inputs), **shared),
        *package_providers(device, package, **shared),
    ]


SUITES = [
    Suite(
        "set_tensordict_fields",
        ("upstream", "eager", "triton", "native"),
        [
            Shape("quick", {"rows": 256, "time": 0}),
            Shape("quick", {"rows": 64, "time": 16}),
            Shape("full", {"rows": 4096, "time": 0}),
            Shape("full", {"rows": 1024, "time": 64}),
        ],
        make_providers,
    )
]


def test_providers(case, run_case):
    run_case(case)
