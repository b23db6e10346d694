"""Ranks: the processes of one run, started by torchrun. Everything here also works, at no cost, where there is one.

The only module that talks to torch.distributed. Tensors meet over NCCL on CUDA and over gloo on the CPU, everything
else over gloo.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from metta_fastagent import DistributedMettaAgent, MettaAgent

Result = TypeVar("Result")

START = "torchrun --nproc-per-node=N -m metta_fastagent.train"
# seeds are below this; torch's CPU generator looks at 32 bits only
SEEDS = 2**31
# odd, so that a run's ranks never share a seed; large and irregular, so that neighbouring seeds' ranks do not either
SEED_STRIDE = 0x1E3779B1


class LaunchError(ValueError):
    """The variables that torchrun sets are broken, or the ranks did not find each other."""


class RankError(RuntimeError):
    """Something failed on another rank; the message names it and says what."""


class RanksDiffer(RuntimeError):
    """Parameters that must be the same on all ranks are not."""


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this one is; `local` counts on one machine."""

    index: int
    count: int
    local: int


def read_launch(variables: Mapping[str, str]) -> Launch:
    """What torchrun says in the environment; one process where it says nothing. Raises LaunchError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not any(name in variables for name in names[:3]):
        return Launch(0, 1, 0)
    missing = [name for name in names if not variables.get(name)]
    if missing:
        raise LaunchError(f"torchrun's variables are set but for {', '.join(missing)}; use {START}")
    count = _integer(variables, "WORLD_SIZE", 1, 2**31)
    _integer(variables, "MASTER_PORT", 0, 2**16)
    return Launch(_integer(variables, "RANK", 0, count), count, _integer(variables, "LOCAL_RANK", 0, count))


def _integer(variables: Mapping[str, str], name: str, low: int, above: int) -> int:
    text = variables[name]
    if not (text.isascii() and text.isdecimal() and low <= int(text) < above):
        raise LaunchError(f"{name} must be an integer from {low} to {above - 1}, got {text!r}; use {START}")
    return int(text)


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that torchrun's variables tell of, and leave them at the end. Raises LaunchError."""
    launch = read_launch(os.environ)
    if launch.count == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda and launch.local < torch.cuda.device_count():
        torch.cuda.set_device(launch.local)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(f"rank {launch.index} did not find the others at {place} ({first_line(error)})") from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def index() -> int:
    """Which rank this process is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this rank is the one that logs, draws, evaluates and writes."""
    return index() == 0


def device(name: str) -> torch.device:
    """The device called `name`; of several ranks on CUDA, each has the device of its number on its machine.

    Raises ValueError where that device is missing, or `name` has a number.
    """
    named = torch.device(name)
    if count() == 1 or named.type != "cuda":
        return named
    if named.index is not None:
        raise ValueError(f"device must be cuda, without a number, where there are several ranks, got {name!r}")
    local, present = read_launch(os.environ).local, torch.cuda.device_count()
    if local >= present:
        raise ValueError(f"device must be there for every rank; rank {index()} wants cuda:{local}, there are {present}")
    return torch.device("cuda", local)


def seed(first: int) -> int:
    """The seed of this rank, `(first + rank * SEED_STRIDE) % SEEDS`, where rank 0 has `first`.

    It seeds the rank's environment, and on all ranks but rank 0 the draws; those of rank 0 follow the ones of the
    initial weights.
    """
    return (first + index() * SEED_STRIDE) % SEEDS


def mean(values: Tensor) -> Tensor:
    """The average over the ranks of `values`, a float tensor of one shape, bit for bit the same on all of them."""
    if count() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / count()


def moments(values: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance (without correction) over `dim`, which stays as 1, and over the equal shares of all ranks.

    Two passes: the variance does not suffer where the mean is large.
    """
    center = mean(values.mean(dim, keepdim=True))
    return center, mean((values - center).square().mean(dim, keepdim=True))


def gather(value: Any) -> list[Any]:
    """The `value` of each rank, in order, on all of them; it travels as a pickle, tensors in it on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def together(action: Callable[[], Result]) -> Result:
    """`action()` on every rank; an error on any of them is one on all, so that none goes on alone and waits forever.

    A rank raises its own error, else a RankError. `action` must not wait for other ranks itself.
    """
    if count() == 1:
        return action()
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    messages = gather(None if failure is None else first_line(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {rank}: {message}")
    return result  # pyright: ignore[reportReturnType]


def wrap(agent: MettaAgent, device: torch.device) -> MettaAgent | DistributedMettaAgent:
    """What to train: `agent`, or with several ranks one that averages gradients and starts from rank 0's parameters."""
    if count() == 1:
        return agent
    learner = DistributedMettaAgent(agent, device)
    # other machines may have initialised their weights a little differently
    agent.update_l2_init_weight_copy()
    agent.policy.initial_weight_magnitudes = gather(agent.policy.initial_weight_magnitudes)[0]
    return learner


def unsynchronized(learner: MettaAgent | DistributedMettaAgent) -> AbstractContextManager[None]:
    """Inside, a backward adds up gradients on each rank alone."""
    return learner.no_sync() if isinstance(learner, DistributedMettaAgent) else nullcontext()


def check_same(module: nn.Module, when: str) -> None:
    """Compare all parameters bit for bit across ranks; RanksDiffer names the ranks that differ from rank 0.

    Reads the parameters back to the host.
    """
    if count() == 1:
        return
    hashes = gather(parameter_hash(module))
    different = [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]
    if different:
        plural = "ranks" if len(different) > 1 else "rank"
        raise RanksDiffer(f"{when}, the parameters of {plural} {', '.join(different)} differ from those of rank 0")


def parameter_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype};".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of the error's message, else its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
