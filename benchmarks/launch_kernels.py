"""Launch every Triton kernel, forward and backward, at small odd sizes, for a sanitizer to watch.

    python -m benchmarks.launch_kernels [--device cuda]
    TRITON_INTERPRET=1 python -m benchmarks.launch_kernels --device cpu

Inputs are created on the host and copied over, so that nearly all kernels that run are the package's own. The exit
status is 1 if a kernel was not launched.
"""

import argparse
import importlib
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import metta_fastagent.ops
from metta_fastagent import ActionSpace, ops, use_backend
from metta_fastagent.ops.categorical.layouts import MAX_COLUMNS, ROWS_PER_PROGRAM
from metta_fastagent.ops.lstm.kernels import BLOCK_B
from metta_fastagent.ops.ppo.kernels import ADVANTAGES_ELEMENTS, ADVANTAGES_STEPS
from metta_fastagent.ops.tensor_lists.kernels import CHUNK

# The last program of each is only partly filled; the number of actions is neither a power of two nor a multiple of
# four.
ROWS = ROWS_PER_PROGRAM + 3
FEW_ACTIONS, MANY_ACTIONS, MANY_ACTIONS_ROWS = 9, MAX_COLUMNS + 7, 21


def _space(num_actions: int, device: torch.device) -> ActionSpace:
    return ActionSpace(["noop", "act"], [0, num_actions - 2], device)


def _pairs(rows: int, num_actions: int) -> Tensor:
    """Pairs [rows, 2], one of them out of range."""
    pairs = _space(num_actions, torch.device("cpu")).action_index_tensor[torch.arange(rows) % num_actions].clone()
    pairs[5] = torch.tensor([77, -3], dtype=pairs.dtype)
    return pairs


def _to_index(device: torch.device) -> None:
    pairs = _pairs(ROWS, FEW_ACTIONS)
    _reported(lambda: ops.action_to_logit_index(pairs.to(device), _space(FEW_ACTIONS, device).cum_action_max_params))


def _to_pair(device: torch.device) -> None:
    index = torch.arange(ROWS) % FEW_ACTIONS
    index[5] = FEW_ACTIONS
    _reported(lambda: ops.logit_index_to_action(index.to(device), _space(FEW_ACTIONS, device).action_index_tensor))


def _evaluate(device: torch.device) -> None:
    for actions, rows in ((FEW_ACTIONS, ROWS), (MANY_ACTIONS, MANY_ACTIONS_ROWS)):
        pairs = _pairs(rows, actions)
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, actions).to(dtype).to(device).requires_grad_()
            table = _space(actions, device).cum_action_max_params
            outputs = _reported(lambda logits=logits, pairs=pairs, table=table: _evaluated(logits, pairs, table))
            upstream = [torch.randn(output.shape).to(dtype).to(device) for output in outputs]
            # Once with the gradients that a trainer uses, once with all of them.
            torch.autograd.grad(outputs[:2], logits, upstream[:2], retain_graph=True)
            torch.autograd.grad(outputs, logits, upstream)


def _evaluated(logits: Tensor, pairs: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    ops.evaluate_actions(logits, torch.zeros(len(logits), dtype=torch.int64).to(logits.device))
    return ops.evaluate_actions(logits, pairs.to(logits.device), table)


def _advantages(device: torch.device) -> None:
    # More rows than one program takes, and more steps.
    for rows, steps in ((ADVANTAGES_ELEMENTS // 16 + 3, 13), (3, ADVANTAGES_STEPS + 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            rewards, values, bootstrap, ratios = (torch.randn(rows, steps).to(dtype).to(device) for _ in range(4))
            ends, valid = ((torch.rand(rows, steps) < share).to(device) for share in (0.2, 0.8))
            given = rewards, values, ends, values[:, 0].clone(), bootstrap, 0.9, 0.8
            ops.advantages(*given)
            ops.advantages(*given, valid=valid, ratios=ratios)


def _ppo_loss(device: torch.device) -> None:
    coefficients = {"clip_coef": 0.2, "vf_clip_coef": 0.2, "vf_coef": 0.5, "ent_coef": 0.01}
    for actions, rows in ((FEW_ACTIONS, ROWS), (MANY_ACTIONS, MANY_ACTIONS_ROWS)):
        pairs, table = _pairs(rows, actions).to(device), _space(actions, device).cum_action_max_params
        for dtype in (torch.float32, torch.bfloat16):
            logits, *numbers = (torch.randn(shape).to(dtype).to(device) for shape in ((rows, actions), *[(rows,)] * 5))
            inputs = [logits.requires_grad_(), numbers[0].requires_grad_()]
            options = {"valid": (torch.rand(rows) < 0.7).to(device), "count": torch.tensor(float(rows)).to(device)}
            for given in ({}, options):
                loss, _ = _reported(
                    lambda logits=logits, numbers=numbers, given=given, pairs=pairs, table=table: ops.ppo_loss(
                        logits, pairs, *numbers, table, **given, **coefficients
                    )
                )
                torch.autograd.grad(loss, inputs, torch.ones(()).to(device))


def _sample(device: torch.device) -> None:
    for actions, rows in ((FEW_ACTIONS, ROWS), (MANY_ACTIONS, MANY_ACTIONS_ROWS)):
        logits = torch.randn(rows, actions)
        logits[:, ::3] = -torch.inf
        ops.sample_actions(logits.to(device), _space(actions, device).action_index_tensor)
        ops.sample_actions(logits.to(device))


def _lists(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Whole chunks, partial chunks, a single element, and a view at an odd address."""
    lengths = (1, 7, CHUNK, 2 * CHUNK + 37)
    tensors = [torch.randn(length).to(dtype).to(device) for length in lengths]
    return [*tensors, torch.randn(CHUNK + 9).to(dtype).to(device)[1:]]


def _clip(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = _lists(device, dtype)
        # The second call finds nothing out of range.
        for _ in range(2):
            ops.clip_weights_(tensors, [0.5] * len(tensors))


def _l2(device: torch.device) -> None:
    params = [tensor.requires_grad_() for tensor in _lists(device, torch.float32)]
    loss = ops.l2_init_loss(params, _lists(device, torch.float32), 0.5)
    torch.autograd.grad(loss, params, torch.ones(()).to(device))


def _lstm(device: torch.device) -> None:
    steps, rows, size = 3, BLOCK_B + 5, 24
    resets = (torch.arange(steps * rows).view(steps, rows) % 4 == 0).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = ((steps, rows, 4 * size), (4 * size, size), (rows, size), (rows, size))
        projected, weight, *state = [(0.1 * torch.randn(shape)).to(dtype).to(device) for shape in shapes]
        # Not the weight: cuBLAS computes its gradient.
        inputs = [tensor.requires_grad_() for tensor in (projected, *state)]
        for given in (resets, None):
            outputs = ops.lstm_layer(projected, weight, *state, given)
            torch.autograd.grad(outputs, inputs, [torch.ones(output.shape).to(dtype).to(device) for output in outputs])


def _grid(device: torch.device) -> None:
    tokens = torch.randint(0, 256, (5, 37, 3), dtype=torch.uint8)
    tokens[..., 0] = torch.randint(0, 12, (5, 37)) * 16 + torch.randint(0, 12, (5, 37))
    tokens[:, :, 1] %= 8
    for dtype in (torch.float32, torch.bfloat16):
        ops.tokens_to_grid(tokens.to(device), 7, 11, 11, torch.ones(7).to(device), dtype)


def _reported(call: Callable[[], Any]) -> Any:
    """The result of a call with an action out of range, whose report must exist and is cleared."""
    result = call()
    try:
        ops.raise_if_reported(synchronize=True)
    except ValueError:
        return result
    raise RuntimeError("an action out of range was not reported")


CASES = (_to_index, _to_pair, _evaluate, _advantages, _ppo_loss, _sample, _clip, _l2, _grid, _lstm)


def kernels() -> dict[str, list[Any]]:
    """Name of each of the operations' Triton kernels -> the modules that hold it."""
    package, found = metta_fastagent.ops, defaultdict(list)
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(each.name)
        for name, value in vars(module).items():
            # Only kernels have `fn`, the function that Triton compiles or interprets.
            if name.endswith("_kernel") and hasattr(value, "fn"):
                found[name].append(module)
    return dict(found)


@contextmanager
def counted() -> Iterator[dict[str, mock.MagicMock]]:
    """Each kernel by name: a stand-in that counts indexing, which starts every launch."""
    found = {}
    with ExitStack() as stack:
        for name, modules in sorted(kernels().items()):
            kernel = getattr(modules[0], name)
            found[name] = mock.MagicMock(wraps=kernel)
            found[name].__getitem__.side_effect = kernel.__getitem__
            for module in modules:
                stack.enter_context(mock.patch.object(module, name, found[name]))
        yield found


def launch_all(device: torch.device) -> dict[str, int]:
    """Run every case on the device; return the number of launches per kernel."""
    torch.manual_seed(0)
    with counted() as found, use_backend("triton"):
        for case in CASES:
            print(case.__name__.removeprefix("_"), flush=True)
            case(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: kernel.__getitem__.call_count for name, kernel in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if every kernel was launched, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 (default: cuda)")
    device = torch.device(parser.parse_args(arguments).device)
    launched = launch_all(device)
    missing = [name for name, count in launched.items() if count == 0]
    print(f"{sum(launched.values())} launches of {len(launched) - len(missing)} kernels on {device}")
    for name in missing:
        print(f"kernel not launched: {name}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
