"""`compare_agents`: the first difference between an agent before and after its migration."""

import copy
import math
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent.ops._checks import is_number
from metta_fastagent.testing._shared import (
    LOSS_KEYS,
    clipped_parameters,
    describe_error,
    device_of,
    random_actions,
    seeded,
)

# Outputs in the order in which a difference explains the later ones; any others follow by name.
OUTPUT_ORDER = ("full_log_probs", "values", "value", "act_log_prob", "entropy", "actions")
STATE_KEYS = ("lstm_h", "lstm_c")


class AgentsDifferError(AssertionError):
    """Two agents differ.

    Attributes:
        stage: where: "weights", "inference step 1", "inference step 2", "training", "gradients" or "clipping".
        key: the entry that differs, None where there is none.
        index: position of the largest difference in the entry, None where the values were not compared.
    """

    def __init__(self, stage: str, key: str | None, problem: str, index: tuple[int, ...] | None = None) -> None:
        super().__init__(f"{stage}: {problem}" if key is None else f"{stage}: {key!r} {problem}")
        self.stage, self.key, self.index = stage, key, index


def compare_agents(
    old: nn.Module,
    new: nn.Module,
    td: TensorDictBase,
    action: Tensor | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Last step of a migration: raise at the first difference between an agent and its rewritten self.

    Compared in this order: the weights (state dict keys, shapes, dtypes, exact values); two steps of inference from
    empty memory under one seed; training on the same segments; the gradients of a fixed loss of act_log_prob, entropy
    and value; clip_range, and the weights after clip_weights() (with a range that bites where clip_range is 0).
    Whatever the old agent writes, the new one must; it may write more. Both agents, `td` and the random numbers stay as
    they were.

    Args:
        old, new: the agents, their action tables set; on any devices.
        td: "env_obs" [N, M, 3] for inference or [B, T, M, 3] for training, and what else the agents read. The other
            mode's input is made of it: the first step of each segment, or segments of length 1.
        action: integer [B, T, 2] or [B * T, 2]; None takes random legal ones from the old agent's table, or what the
            old agent drew in inference where it has no table.
        rtol, atol: a computed value differs where |old - new| > atol + rtol |new|; integers must be equal.

    Raises:
        AgentsDifferError: they differ; the message has the stage, the entry, the largest difference and where it is.
        TypeError, ValueError: an argument does not fit.
    """
    _check_comparison(old, new, td, action, rtol, atol)
    tolerance = (float(rtol), float(atol))
    _compare_weights("weights", old, new, (0.0, 0.0))
    inference_td, training_td = _both_modes(td)
    drawn = _compare_inference(old, new, inference_td, tolerance)
    if action is None:
        action = _actions_for(old, training_td, drawn)
    _compare_training(old, new, training_td, action, tolerance)
    _compare_clipping(old, new, tolerance)


def _check_comparison(old: object, new: object, td: object, action: object, rtol: object, atol: object) -> None:
    for name, agent in (("old", old), ("new", new)):
        if not isinstance(agent, nn.Module):
            raise TypeError(f"{name}: got {type(agent).__name__}, expected a torch.nn.Module")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not is_number(value) or not float(value) >= 0:
            raise ValueError(f"{name}: got {value!r}, expected a number >= 0")
    if not isinstance(td, TensorDictBase):
        raise TypeError(f"td: got {type(td).__name__}, expected a TensorDict")
    observations = td.get("env_obs", None)
    if not isinstance(observations, Tensor) or observations.dim() not in (3, 4):
        found = list(observations.shape) if isinstance(observations, Tensor) else "no such entry"
        raise ValueError(f"td['env_obs']: got {found}, expected [N, M, 3] or [B, T, M, 3]")
    if action is None:
        return
    rows = tuple(observations.shape[:-2])
    expected = f"an integer tensor {[*rows, 2]} or {[math.prod(rows), 2]}"
    if not isinstance(action, Tensor) or action.is_floating_point() or action.is_complex():
        raise TypeError(f"action: got {getattr(action, 'dtype', type(action).__name__)}, expected {expected}")
    if tuple(action.shape) not in ((*rows, 2), (math.prod(rows), 2)):
        raise ValueError(f"action: got shape {list(action.shape)}, expected {expected}")


def _both_modes(td: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
    """Inputs [N] for inference and [B, T] or [B] for training, made of the one that was given."""
    if td["env_obs"].dim() == 3:
        return td.exclude(*STATE_KEYS), td.unsqueeze(1)
    # A segment's stored state has no place in inference, which keeps its own memory.
    stripped = td.exclude(*STATE_KEYS)
    if td.batch_dims == 2:
        return stripped[:, 0], td
    steps = td["env_obs"].shape[1]
    first = stripped.clone(recurse=False)
    for key, value in stripped.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == steps:
            first[key] = value[:, 0]
    return first, td


def _actions_for(old: Any, td: TensorDictBase, drawn: Tensor | None) -> Tensor:
    rows = td["env_obs"].shape[:2]
    if getattr(old, "action_index_tensor", None) is not None:
        with seeded(0):
            return random_actions(old.action_index_tensor, rows)
    if drawn is None:
        raise ValueError("action: got None, expected actions, for the old agent has no action table and draws none")
    return drawn[:, None].expand(*rows, 2)


def _copies(old: nn.Module, new: nn.Module) -> tuple[Any, Any]:
    """Deep copies with empty memory."""
    copies: tuple[Any, Any] = copy.deepcopy(old), copy.deepcopy(new)
    for agent in copies:
        if callable(getattr(agent, "reset_memory", None)):
            agent.reset_memory()
    return copies


def _run_both(
    stage: str, old: Any, new: Any, td: TensorDictBase, action: Tensor | None
) -> tuple[TensorDictBase, TensorDictBase]:
    """Results of both agents on clones of the input, under one seed."""
    results = []
    for name, agent in (("old", old), ("new", new)):
        device = device_of(agent)
        arguments = {} if action is None else {"action": action.clone().to(device)}
        try:
            with seeded(0, agent), torch.set_grad_enabled(action is not None):
                out = agent(td.clone().to(device), **arguments)
        except Exception as error:
            if name == "old":
                error.add_note(f"raised by the old agent in {stage}, before there was anything to compare")
                raise
            problem = f"the new agent raised {describe_error(error)}, the old one did not"
            raise AgentsDifferError(stage, None, problem) from error
        if not isinstance(out, TensorDictBase):
            raise AgentsDifferError(stage, None, f"the {name} agent returned {type(out).__name__}, no TensorDict")
        results.append(out)
    return results[0], results[1]


def _compare_inference(
    old: nn.Module, new: nn.Module, td: TensorDictBase, tolerance: tuple[float, float]
) -> Tensor | None:
    """Two steps, because the second one reads the memory that the first one stored; returns the old agent's actions."""
    copies = _copies(old, new)
    drawn = None
    for step in (1, 2):
        stage = f"inference step {step}"
        results = _run_both(stage, *copies, td, None)
        _compare_entries(stage, *results, tolerance)
        drawn = results[0].get("actions", None)
    return drawn


def _compare_training(
    old: nn.Module, new: nn.Module, td: TensorDictBase, action: Tensor, tolerance: tuple[float, float]
) -> None:
    copies = _copies(old, new)
    for agent in copies:
        agent.train()
        agent.zero_grad()
    results = _run_both("training", *copies, td, action)
    _compare_entries("training", *results, tolerance)
    for result in results:
        loss = _fixed_loss(result)
        if loss.requires_grad:
            loss.backward()
    gradients = [{name: parameter.grad for name, parameter in agent.named_parameters()} for agent in copies]
    for name, gradient in gradients[0].items():
        _compare_tensors("gradients", name, gradient, gradients[1][name], tolerance)


def _fixed_loss(out: TensorDictBase) -> Tensor:
    """A sum of the differentiable outputs with fixed random weights, so that no two of their entries cancel."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for key in LOSS_KEYS:
        value = out.get(key, None)
        if isinstance(value, Tensor):
            weight = torch.randn(value.numel(), generator=generator).to(value.device)
            loss = loss.to(value.device) + (value.flatten() * weight).mean()
    return loss


def _compare_clipping(old: nn.Module, new: nn.Module, tolerance: tuple[float, float]) -> None:
    copies = _copies(old, new)
    able = [callable(getattr(agent, "clip_weights", None)) for agent in copies]
    if not able[0]:
        return
    if not able[1]:
        raise AgentsDifferError("clipping", None, "the new agent has no clip_weights(), the old one has")
    ranges = [getattr(agent, "clip_range", None) for agent in copies]
    if ranges[0] != ranges[1]:
        raise AgentsDifferError("clipping", None, f"clip_range: old {ranges[0]!r}, new {ranges[1]!r}")
    biting = _biting_range(copies[0])
    for agent in copies:
        if ranges[0] == 0:
            agent.clip_range = biting
        agent.clip_weights()
    _compare_weights("clipping", *copies, tolerance)


def _biting_range(agent: nn.Module) -> float:
    """Half the largest absolute value of the parameters that are clipped."""
    largest = [float(p.detach().abs().max()) for p in clipped_parameters(agent).values() if p.numel() > 0]
    return 0.5 * max(largest, default=1.0) or 0.5


def _compare_weights(stage: str, old: nn.Module, new: nn.Module, tolerance: tuple[float, float]) -> None:
    olds, news = old.state_dict(), new.state_dict()
    for key in sorted(olds.keys() ^ news.keys()):
        where = "old" if key in olds else "new"
        raise AgentsDifferError(stage, key, f"is in the {where} agent's state dict only")
    for key, value in olds.items():
        if isinstance(value, Tensor):
            _compare_tensors(stage, key, value, news[key], tolerance)


def _compare_entries(stage: str, old: TensorDictBase, new: TensorDictBase, tolerance: tuple[float, float]) -> None:
    keys = [key for key, value in old.items() if isinstance(value, Tensor)]
    order = {key: position for position, key in enumerate(OUTPUT_ORDER)}
    for key in sorted(keys, key=lambda key: (order.get(key, len(order)), key)):
        _compare_tensors(stage, key, old[key], new.get(key, None), tolerance)


def _compare_tensors(stage: str, key: str, old: Any, new: Any, tolerance: tuple[float, float]) -> None:
    """Raise where two tensors differ in presence, shape, dtype or by more than the tolerance."""
    found = [f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "none" for value in (old, new)]
    if found[0] != found[1]:
        raise AgentsDifferError(stage, key, f"differs in kind: old {found[0]}, new {found[1]}")
    if old is None or old.numel() == 0:
        return
    exact = not old.is_floating_point()
    rtol, atol = (0.0, 0.0) if exact else tolerance
    old, new = (value.detach().cpu().to(torch.int64 if exact else torch.float64) for value in (old, new))
    off = ~torch.isclose(old, new, rtol=rtol, atol=atol, equal_nan=True)
    if not bool(off.any()):
        return
    # NaN or infinity on one side only counts as the largest difference there is.
    distance = (old - new).abs().double().nan_to_num(math.inf, math.inf).where(off, -1.0)
    largest = int(distance.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(largest), old.shape))
    values = f"old {old[index].item():.9g}, new {new[index].item():.9g}"
    count = f"{int(off.sum())} of {off.numel()} entries differ (rtol {rtol:g}, atol {atol:g})"
    gap = f"{distance.flatten()[largest].item():.3g} at index {list(index)}"
    raise AgentsDifferError(stage, key, f"differs: largest difference {gap}: {values}; {count}", index)
