"""Helpers of both checks: layers that are clipped, legal actions, and random numbers that leave no trace."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metta_fastagent._layer_index import CLIPPED_LAYERS

LOSS_KEYS = ("act_log_prob", "entropy", "value")
STATE_KEYS = ("lstm_h", "lstm_c")


def inner_agent(agent: nn.Module) -> nn.Module:
    """The mixin agent inside hosts and wrappers, else the agent itself."""
    inner: Any = agent
    while not hasattr(inner, "init_mixin"):
        inner = getattr(inner, "module", None) or getattr(inner, "policy", None)
        if not isinstance(inner, nn.Module):
            return agent
    return inner


def clipped_parameters(agent: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases that clip_weights() clips, by name, without the computed weights of a parametrization."""
    found = {}
    for prefix, module in agent.named_modules():
        if isinstance(module, CLIPPED_LAYERS):
            for name in ("weight", "bias"):
                parameter = module._parameters.get(name)
                if parameter is not None:
                    found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


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
    """Type, message, and the innermost place in the code where it was raised."""
    trace = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    place = f" (in {trace[-1].function}, line {trace[-1].lineno} of {trace[-1].filename})" if trace else ""
    return f"{type(error).__name__}: {error}{place}"
