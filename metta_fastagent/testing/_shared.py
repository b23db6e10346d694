"""Shared by the checks: their results, the agent under test, and random numbers without side effects."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.runtime.origin import origin_of

LOSS_KEYS = ("act_log_prob", "entropy", "value")
STATE_KEYS = ("lstm_h", "lstm_c")
# Rows of a rollout step, steps of a segment.
ROWS, T = 6, 5


@dataclass
class CheckResult:
    """Result of one check: problems make it fail, warnings do not; `summary` is its message if it passes.

    Example:
        >>> CheckResult("action conversion", problems=["index 3 gives no pair"]).passed
        False
    """

    name: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: str = ""

    @property
    def passed(self) -> bool:
        """Whether there was no problem."""
        return not self.problems

    @property
    def message(self) -> str:
        """The problems with advice, one per line, or the summary."""
        return "\n".join(self.problems) or self.summary

    def expect(self, condition: bool, problem: str) -> bool:
        """Record the problem unless the condition holds; returns the condition."""
        if not condition:
            self.problems.append(problem)
        return condition


@dataclass
class Subject:
    """The agent under test with its environment, actions, and input rows [N] to draw from."""

    agent: nn.Module
    env: Any
    space: ActionSpace
    samples: TensorDictBase
    updates: int

    def fresh_copy(self) -> Any:
        """A copy of the agent with empty memory and its action tables set; the environment is shared, not copied."""
        agent: Any = copy.deepcopy(self.agent, {} if self.env is None else {id(self.env): self.env})
        if callable(getattr(agent, "reset_memory", None)):
            agent.reset_memory()
        if getattr(agent, "check_first_update", False):
            # The copies' calls already are the check.
            agent.check_first_update = False
        if (getattr(agent, "num_envs", None) or ROWS) < ROWS:
            agent.allocate_memory(ROWS)
        if not has_tables(agent):
            agent.activate_actions(self.space.action_names, self.space.action_max_params, device_of(agent))
        return agent

    def draw(self, *rows: int) -> TensorDictBase:
        """Random input of batch size `rows` in which no episode starts."""
        td = self.samples[torch.randint(len(self.samples), rows, device="cpu").to(self.samples.device or "cpu")]
        flags = torch.zeros(rows, dtype=torch.bool, device="cpu")
        return td.update({"dones": flags, "truncateds": flags.clone()}).to(device_of(self.agent))

    def actions(self, *rows: int) -> Tensor:
        return random_actions(self.space.action_index_tensor, rows).to(device_of(self.agent))


def has_tables(agent: object) -> bool:
    return all(getattr(agent, name, None) is not None for name in ("cum_action_max_params", "action_index_tensor"))


def inner_agent(agent: nn.Module) -> nn.Module:
    """The mixin agent inside hosts and wrappers, or else the agent itself."""
    inner: Any = agent
    # looks at the class, because a host exposes the agent's attributes
    while not hasattr(type(inner), "init_mixin"):
        inner = getattr(inner, "module", None) or getattr(inner, "policy", None)
        if not isinstance(inner, nn.Module):
            return agent
    return inner


def random_actions(action_index_tensor: Tensor, rows: Iterable[int]) -> Tensor:
    """Legal pairs int64 [*rows, 2] on the CPU."""
    index = torch.randint(action_index_tensor.shape[0], tuple(rows), device="cpu")
    return action_index_tensor.cpu().long()[index]


def device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def seeded(seed: int, *modules: nn.Module) -> Iterator[None]:
    """Seed the CPU's generator and those of the modules' CUDA devices; put their states back afterwards."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    indices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=indices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def describe_error(error: Exception) -> str:
    """Type, message, and the place in the user's code that raised it."""
    _, place = origin_of(error)
    return f"{type(error).__name__}: {error}" + f" ({place})" * bool(place)
