"""Ranks: the processes of one run, started by torchrun. With a single process, all of this is a no-op.

Only this module uses torch.distributed: NCCL for tensors on CUDA, gloo for tensors on the CPU and for objects.
"""

import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from metta_fastagent import DistributedMettaAgent, MettaAgent
from metta_fastagent.runtime.checks import first_line
from metta_fastagent.runtime.output import wrapped

Result = TypeVar("Result")

PROGRAM = "python -m metta_fastagent.train"
TORCHRUN = "torchrun --nproc-per-node=N -m metta_fastagent.train"
# seeds are below this; torch's CPU generator only uses 32 bits
SEED_LIMIT = 2**31
# odd, so that a run's ranks never share a seed; large and irregular, so that runs with adjacent seeds share none either
SEED_STRIDE = 0x1E3779B1


class LaunchError(ValueError):
    """The environment variables of torchrun are invalid, or the ranks could not connect."""


class RankError(RuntimeError):
    """An error on another rank; the message gives the rank and the error's text."""


class RanksDiffer(RuntimeError):
    """Parameters that must be equal on all ranks differ."""


class Launch(NamedTuple):
    """Position of this process in the run; `local_rank` counts on one machine."""

    rank: int
    world_size: int
    local_rank: int


def read_launch(variables: Mapping[str, str]) -> Launch:
    """The launch that torchrun's environment variables describe; one process without them. Raises LaunchError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not any(name in variables for name in names[:3]):
        return Launch(0, 1, 0)
    if missing := [name for name in names if not variables.get(name)]:
        raise LaunchError(f"{', '.join(missing)}: got no value, expected all of torchrun's variables; use {TORCHRUN}")
    world_size = _integer(variables, "WORLD_SIZE", 1, 2**31)
    _integer(variables, "MASTER_PORT", 0, 2**16)
    rank, local_rank = (_integer(variables, name, 0, world_size) for name in ("RANK", "LOCAL_RANK"))
    return Launch(rank, world_size, local_rank)


def _integer(variables: Mapping[str, str], name: str, low: int, above: int) -> int:
    text = variables[name]
    if not (text.isascii() and text.isdecimal() and low <= int(text) < above):
        raise LaunchError(f"{name}: got {text!r}, expected an integer from {low} to {above - 1}; use {TORCHRUN}")
    return int(text)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that torchrun's variables describe, and leave it on exit. Raises LaunchError."""
    launch = read_launch(os.environ)
    if launch.world_size == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = first_line(error)
        raise LaunchError(f"rank {launch.rank} could not join the other ranks at {address} ({reason})") from error
    try:
        yield
    finally:
        # Cycles keep DistributedDataParallel's references to the group, whose threads abort Python if they outlive it.
        gc.collect()
        distributed.destroy_process_group()


def rank() -> int:
    """The rank of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of ranks."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0, which logs, evaluates, plots and writes files."""
    return rank() == 0


def say(message: str) -> None:
    """Print one message for all ranks."""
    if is_first():
        print(wrapped(f"{PROGRAM}: {message}"), file=sys.stderr)


def device(name: str) -> torch.device:
    """The device `name`; with several ranks on CUDA, the device whose index is the local rank.

    Raises ValueError if that device is missing, or if `name` has an index and there are several ranks.
    """
    named = torch.device(name)
    if world_size() == 1 or named.type != "cuda":
        return named
    if named.index is not None:
        raise ValueError(f"device: got {name!r}, expected 'cuda' without an index with several ranks")
    local_rank, present = read_launch(os.environ).local_rank, torch.cuda.device_count()
    if local_rank >= present:
        raise ValueError(f"device: got {name!r} with {present} GPUs, expected cuda:{local_rank} for rank {rank()}")
    return torch.device("cuda", local_rank)


def seed(first: int) -> int:
    """The seed of this rank, `(first + rank * SEED_STRIDE) % SEED_LIMIT`; rank 0 gets `first`.

    It seeds the rank's environment and, except on rank 0, torch's random numbers after the weights are initialised.
    Rank 0 continues the random stream of the initialisation.
    """
    return (first + rank() * SEED_STRIDE) % SEED_LIMIT


def mean(values: Tensor) -> Tensor:
    """Average of `values` (float, same shape on all ranks) over the ranks, bit-identical on all ranks."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


def moments(values: Tensor, dim: tuple[int, ...], valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dim` (kept as size 1) and over the ranks, whose `values` have the same shape.

    Values where `valid` (bool, the same shape) is False do not count; None counts all; both are 0 if none counts.
    Uses two passes, so that the variance is not lost to cancellation when the mean is large.
    """
    if valid is None:
        center = mean(values.mean(dim, keepdim=True))
        return center, mean((values - center).square().mean(dim, keepdim=True))
    share = mean(valid.to(values.dtype).mean(dim, keepdim=True))
    share = share.where(share > 0, 1)
    center = mean(values.where(valid, 0).mean(dim, keepdim=True)) / share
    return center, mean((values - center).square().where(valid, 0).mean(dim, keepdim=True)) / share


def all_gather(value: Any) -> list[Any]:
    """The `value` of each rank, in order of rank, on all ranks; pickled, so tensors must be on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def run_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action()` on every rank. If it fails on one, all ranks raise, so that none waits forever in a collective.

    A rank raises its own error if it has one, otherwise a RankError. `action` must not use collectives itself.
    """
    if world_size() == 1:
        return action()
    try:
        result, failure = action(), None
    except Exception as error:
        result, failure = None, error
    messages = all_gather(None if failure is None else first_line(failure))
    if failure is not None:
        raise failure
    for index, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {index}: {message}")
    return result  # pyright: ignore[reportReturnType]


def wrap_ddp(agent: MettaAgent, device: torch.device) -> MettaAgent | DistributedMettaAgent:
    """The module to train: `agent`, or with several ranks a DistributedDataParallel around it.

    The wrapper averages gradients over the ranks and broadcasts rank 0's parameters.
    """
    if world_size() == 1:
        return agent
    learner = DistributedMettaAgent(agent, device)
    # initial weights may differ slightly between machines
    agent.update_l2_init_weight_copy()
    agent.policy.initial_weight_magnitudes = all_gather(agent.policy.initial_weight_magnitudes)[0]
    return learner


def backward(learner: MettaAgent | DistributedMettaAgent, loss: Tensor) -> None:
    """`loss.backward()`; with several ranks, parameters that `loss` does not use get a zero gradient.

    DistributedDataParallel waits for every parameter's gradient, and ranks may use different parameters.
    """
    if isinstance(learner, DistributedMettaAgent):
        nodes, used = [loss.grad_fn], set()
        for node in nodes:
            new = {each for each, _ in node.next_functions if each is not None} - used if node else set()
            used |= new
            nodes.extend(new)
        reached = {id(node.variable) for node in used if hasattr(node, "variable")}
        unused = [each for each in learner.parameters() if each.requires_grad and id(each) not in reached]
        loss = sum((each.flatten()[:0].sum() for each in unused), start=loss)
    loss.backward()


def check_parameters_equal(module: nn.Module, when: str) -> None:
    """Compare all parameters bit for bit across ranks. Copies them to the host.

    Raises RanksDiffer, naming the ranks that differ from rank 0.
    """
    hashes = all_gather(parameter_hash(module))
    if different := [str(index) for index, found in enumerate(hashes) if found != hashes[0]]:
        plural = "ranks" if len(different) > 1 else "rank"
        raise RanksDiffer(f"{when}, the parameters of {plural} {', '.join(different)} differ from those of rank 0")


def parameter_hash(module: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype};".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
