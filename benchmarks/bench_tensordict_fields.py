"""The TensorDict fields `bptt` and `batch`: `set_tensordict_fields` in rollout (time 0) and in training."""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.harness import Case, Size, parametrized, shapes
from metta_fastagent import PyTorchAgentMixin

TOKENS = 8
PROVIDERS = ("upstream", "eager")
SHAPES = shapes("rows time", quick=[(256, 0), (64, 16)], full=[(4096, 0), (1024, 64)])


class Agent(PyTorchAgentMixin, nn.Module):
    """The mixin and nothing else."""


def upstream(td: Any, observations: Tensor) -> Any:
    """The guide's set-up: a reshape in training, two filled tensors."""
    rows, steps = observations.shape[0], observations.shape[1] if observations.dim() == 4 else 1
    if td.batch_dims > 1:
        td = td.reshape(rows * steps)
    for key, value in (("bptt", steps), ("batch", rows)):
        td.set(key, torch.full((rows * steps,), value, dtype=torch.long, device=observations.device))
    return td


def make_case(size: Size, device: torch.device) -> Case:
    batch_size = [size["rows"], size["time"]] if size["time"] else [size["rows"]]
    observations = torch.zeros(*batch_size, TOKENS, 3, dtype=torch.uint8, device=device)
    td, agent = TensorDict({"env_obs": observations}, batch_size=batch_size), Agent()

    def package() -> Any:
        agent.set_tensordict_fields(td, observations)
        return td

    def call_of(provider: str) -> Callable[[], Any]:
        return package if provider == "eager" else lambda: upstream(td, observations)

    # The package keeps [rows, time]; upstream's TensorDict is flat.
    return Case("set_tensordict_fields", call_of, compared=lambda td: [td["bptt"].flatten(), td["batch"].flatten()])


@parametrized(PROVIDERS, SHAPES)
def test_set_tensordict_fields(measure):
    measure(make_case)
