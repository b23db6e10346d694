"""Launch every Triton kernel, forward and backward, at small odd sizes: the program that a sanitizer watches.

    python -m benchmarks.launch_kernels [--device cuda]
    TRITON_INTERPRET=1 python -m benchmarks.launch_kernels --device cpu

Inputs are made on the host and copied over, so that nearly all kernels that run are the package's own. An operator with
a Triton kernel that no case here covers, and a kernel that was not launched, are errors: the exit status is 1 then.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import metta_fastagent.ops
from metta_fastagent import ActionSpace, _dispatch, ops, use_backend
from metta_fastagent.ops._categorical import MAX_COLUMNS, ROWS_PER_PROGRAM
from metta_fastagent.ops._chunk_table import CHUNK
from metta_fastagent.ops._lstm_layer import BLOCK_B

# The last program of each has rows to spare; actions at neither a power of two nor a multiple of four.
ROWS = ROWS_PER_PROGRAM + 3
FEW_ACTIONS, MANY_ACTIONS, MANY_ACTIONS_ROWS = 9, MAX_COLUMNS + 7, 21
KERNEL_SUFFIX = "_kernel"


class Case(NamedTuple):
    """Operators, by the names that they register under, and a function that runs them on a device."""

    operators: tuple[str, ...]
    run: Callable[[torch.device], Any]


def cases() -> list[Case]:
    """All cases; together they launch every Triton kernel of the package."""
    return [
        Case(("action_to_logit_index",), _to_index),
        Case(("logit_index_to_action",), _to_pair),
        Case(("evaluate_actions_forward", "evaluate_actions_backward"), _evaluate),
        Case(("sample_actions",), _sample),
        Case(("clip_weights_",), _clip),
        Case(("l2_init_loss_forward", "l2_init_loss_backward"), _l2),
        Case(("tokens_to_grid",), _grid),
        Case(("lstm_layer_forward", "lstm_layer_backward"), _lstm),
    ]


def _space(num_actions: int, device: torch.device) -> ActionSpace:
    return ActionSpace(["noop", "act"], [0, num_actions - 2], device)


def _to_index(device: torch.device) -> None:
    space = ActionSpace(["noop", "act"], [0, FEW_ACTIONS - 2])
    pairs = space.action_index_tensor[torch.arange(ROWS) % FEW_ACTIONS].clone()
    pairs[5] = torch.tensor([77, -3], dtype=pairs.dtype)
    _reported(lambda: ops.action_to_logit_index(pairs.to(device), _space(FEW_ACTIONS, device).cum_action_max_params))


def _to_pair(device: torch.device) -> None:
    index = torch.arange(ROWS) % FEW_ACTIONS
    index[5] = FEW_ACTIONS
    _reported(lambda: ops.logit_index_to_action(index.to(device), _space(FEW_ACTIONS, device).action_index_tensor))


def _evaluate(device: torch.device) -> None:
    for actions, rows in ((FEW_ACTIONS, ROWS), (MANY_ACTIONS, MANY_ACTIONS_ROWS)):
        pairs = _space(actions, torch.device("cpu")).action_index_tensor[torch.arange(rows) % actions].clone()
        pairs[5] = torch.tensor([77, -3], dtype=pairs.dtype)
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, actions).to(dtype).to(device).requires_grad_()
            table = _space(actions, device).cum_action_max_params
            outputs = _reported(lambda logits=logits, pairs=pairs, table=table: _evaluated(logits, pairs, table))
            upstream = [torch.randn(output.shape).to(dtype).to(device) for output in outputs]
            # With the gradients that a trainer has, and with all of them.
            torch.autograd.grad(outputs[:2], logits, upstream[:2], retain_graph=True)
            torch.autograd.grad(outputs, logits, upstream)


def _evaluated(logits: Tensor, pairs: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    ops.evaluate_actions(logits, torch.zeros(len(logits), dtype=torch.int64).to(logits.device))
    return ops.evaluate_actions(logits, pairs.to(logits.device), table)


def _sample(device: torch.device) -> None:
    for actions, rows in ((FEW_ACTIONS, ROWS), (MANY_ACTIONS, MANY_ACTIONS_ROWS)):
        logits = torch.randn(rows, actions)
        logits[:, ::3] = -torch.inf
        ops.sample_actions(logits.to(device), _space(actions, device).action_index_tensor)
        ops.sample_actions(logits.to(device))


def _lists(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Whole chunks, parts of one, a single element, and a view on an odd address."""
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
        # Not of the weight: its gradient is a product of cuBLAS.
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
    """The result of a call with an action out of range, which has to be reported and is cleared."""
    result = call()
    try:
        ops.raise_if_reported(synchronize=True)
    except ValueError:
        return result
    raise RuntimeError("an action out of range was not reported")


def modules() -> list[Any]:
    """The modules of the operations."""
    package = metta_fastagent.ops
    return [
        importlib.import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
    ]


def kernel_names() -> set[str]:
    """The names of all Triton kernels of the operations."""
    # What Triton has compiled or interprets keeps its function; plain functions have such names too.
    return {
        name
        for module in modules()
        for name, value in vars(module).items()
        if name.endswith(KERNEL_SUFFIX) and hasattr(value, "fn")
    }


class _Noted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, note: Callable[[], None]) -> None:
        self._kernel, self._note = kernel, note

    def __getitem__(self, grid: Any) -> Any:
        self._note()
        return self._kernel[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextmanager
def noted_launches() -> Iterator[dict[str, int]]:
    """Launches of each kernel, by its name, in the `with` block."""
    launched = dict.fromkeys(sorted(kernel_names()), 0)

    def noting(name: str) -> Callable[[], None]:
        def note() -> None:
            launched[name] += 1

        return note

    replaced = [(module, name, vars(module)[name]) for module in modules() for name in launched if name in vars(module)]
    try:
        for module, name, kernel in replaced:
            setattr(module, name, _Noted(kernel, noting(name)))
        yield launched
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


def uncovered() -> set[str]:
    """Registered operators with a Triton kernel that have no case here."""
    registered = {name for name, kernels in _dispatch._operations.items() if kernels.triton}
    return registered - {operator for case in cases() for operator in case.operators}


def launch_all(device: torch.device) -> dict[str, int]:
    """Run every case on the device; launches of each kernel."""
    torch.manual_seed(0)
    with noted_launches() as launched, use_backend("triton"):
        for case in cases():
            case.run(device)
            print(", ".join(case.operators), flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched


def main(arguments: list[str] | None = None) -> int:
    """0 where every kernel was launched, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 (default: cuda)")
    device = torch.device(parser.parse_args(arguments).device)
    launched = launch_all(device)
    missing = sorted(name for name, count in launched.items() if count == 0)
    print(f"{sum(launched.values())} launches of {len(launched) - len(missing)} kernels on {device}")
    faults = [f"operator without a case: {name}" for name in sorted(uncovered())]
    faults += [f"kernel not launched: {name}" for name in missing]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
