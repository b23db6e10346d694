"""`compare_agents`: the first difference between an agent before and after its migration."""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from metta_fastagent._layer_index import LayerIndex
from metta_fastagent._shapes import as_segments, is_training
from metta_fastagent.runtime.checks import describe, is_number
from metta_fastagent.runtime.dispatch import use_backend
from metta_fastagent.testing._shared import (
    LOSS_KEYS,
    STATE_KEYS,
    describe_error,
    device_of,
    inner_agent,
    random_actions,
    seeded,
)

# Outputs ordered so that an earlier difference explains later ones; any others follow by name.
OUTPUT_ORDER = ("full_log_probs", "values", "value", "act_log_prob", "entropy", "actions")
# Outputs that depend on the drawn action.
DRAWN = ("actions", "act_log_prob")
Tolerance = tuple[float, float]
Rename = Mapping[str, str] | Callable[[str], str] | None


class AgentsDifferError(AssertionError):
    """Two agents differ.

    Attributes:
        stage: "weights", "inference step 1", "inference step 2", "training", "gradients" or "clipping".
        key: the entry that differs, under its new name; None if there is none.
        index: position of the largest difference in the entry; None if the values were not compared.
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
    rename: Rename = None,
) -> None:
    """Last step of a migration: raise at the first difference between an agent and its rewritten version.

    Compared in this order: the weights (names, shapes, dtypes, exact values); two steps of inference from empty memory
    under one seed; training on the same segments; the gradients of a fixed loss of act_log_prob, entropy and value;
    clip_range, and the weights after clip_weights() (with a range that takes effect if clip_range is 0). The new agent
    must write every entry that the old one writes. Both agents, `td` and the random state do not change.

    Inference runs on the eager backend, where both agents draw the same actions, and again on the current backend,
    without comparing outputs that depend on the draw, because kernels use other random numbers than torch.multinomial.

    Args:
        old, new: the agents, with action tables set; on any devices.
        td: "env_obs" of any dtype and shape, and the other entries that the agents read. Batch size [N] for rollout
            rows, [B, T] for segments; [B] with observations [B, T, ...] counts as segments if the new agent's
            `obs_shape` (or 4 dimensions without one) says so. The other mode's input is derived from it: the first and
            last step of each segment, or segments of length 1.
        action: integer [B, T, 2] or [B * T, 2]; None takes random legal actions from the old agent's table, or the
            actions that the old agent drew in inference if it has no table.
        rtol, atol: a computed value differs if |old - new| > atol + rtol |new|; integers must be equal.
        rename: new names of moved parameters and buffers: a dict from key prefixes in the old state dict to prefixes in
            the new one (the longest match counts; "" matches every key), or a function from old to new key.

    Raises:
        AgentsDifferError: the agents differ; the message has the stage, the entry, the largest difference and its
            place.
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> import copy
        >>> from tensordict import TensorDict
        >>> from metta_fastagent import Fast
        >>> old = Fast(None)
        >>> old.activate_actions(["noop", "move"], [0, 3])
        >>> td = TensorDict({"env_obs": torch.zeros(2, 4, 8, 3, dtype=torch.uint8)}, batch_size=[2, 4])
        >>> compare_agents(old, copy.deepcopy(old), td)
    """
    training = _check_comparison(old, new, td, action, rtol, atol)
    names = _new_names(old, rename)
    tolerance = (float(rtol), float(atol))
    _compare_weights("weights", old, new, names, (0.0, 0.0))
    steps, segments = _both_modes(td, training)
    drawn = _compare_inference(old, new, steps, tolerance)
    if action is None:
        action = _actions_for(old, segments, drawn)
    _compare_training(old, new, segments, action, names, tolerance)
    _compare_clipping(old, new, names, tolerance)


def _check_comparison(old: Any, new: Any, td: Any, action: Any, rtol: Any, atol: Any) -> bool:
    """Whether `td` holds segments, after checking the arguments."""
    for name, agent in (("old", old), ("new", new)):
        if not isinstance(agent, nn.Module):
            raise TypeError(f"{name}: got {type(agent).__name__}, expected a torch.nn.Module")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not is_number(value) or not float(value) >= 0:
            raise ValueError(f"{name}: got {value!r}, expected a number >= 0")
    if not isinstance(td, TensorDictBase):
        raise TypeError(f"td: got {type(td).__name__}, expected a TensorDict")
    if td.batch_dims not in (1, 2):
        raise ValueError(f"td: got batch size {list(td.batch_size)}, expected [N] or [B, T]")
    observations = td.get("env_obs", None)
    if not isinstance(observations, Tensor):
        raise ValueError(f"td['env_obs']: got {describe(observations)}, expected a tensor [N, ...] or [B, T, ...]")
    training = td.batch_dims == 2 or is_training(observations, getattr(inner_agent(new), "obs_shape", None))
    if action is not None:
        rows = tuple(observations.shape[:2]) if training else (observations.shape[0], 1)
        shapes = ((*rows, 2), (math.prod(rows), 2))
        expected = f"an integer tensor {list(shapes[0])} or {list(shapes[1])}"
        if not isinstance(action, Tensor) or action.is_floating_point() or action.is_complex():
            raise TypeError(f"action: got {describe(action)}, expected {expected}")
        if tuple(action.shape) not in shapes:
            raise ValueError(f"action: got shape {list(action.shape)}, expected {expected}")
    return training


def _new_names(old: nn.Module, rename: Rename) -> dict[str, str]:
    """The new name of each entry of the old agent's state dict."""
    keys = list(old.state_dict())
    if rename is None or callable(rename):
        names = {key: rename(key) if rename else key for key in keys}
    elif isinstance(rename, Mapping):
        prefixes = {prefix.rstrip("."): target.rstrip(".") for prefix, target in rename.items()}
        fitting = {key: [p for p in prefixes if not p or f"{key}.".startswith(f"{p}.")] for key in keys}
        unused = prefixes.keys() - {prefix for found in fitting.values() for prefix in found}
        if unused:
            raise ValueError(f"rename: got {sorted(unused)}, expected prefixes of the old agent's keys {keys}")
        names = {key: key for key in keys}
        for key, found in fitting.items():
            if found:
                prefix = max(found, key=len)
                rest = key[len(prefix) :].lstrip(".")
                names[key] = ".".join(filter(None, (prefixes[prefix], rest)))
    else:
        raise TypeError(f"rename: got {describe(rename)}, expected a dict of prefixes or a function")
    if len(set(names.values())) < len(keys):
        raise ValueError(f"rename: got {names}, expected a different new name for each key")
    return names


def _both_modes(td: TensorDictBase, training: bool) -> tuple[list[TensorDictBase], TensorDictBase]:
    """Two inputs [N] for inference and one [B, T] or [B] for training, derived from the given one."""
    # A segment's stored state has no place in inference, which keeps its own memory.
    stripped = td.exclude(*STATE_KEYS)
    if not training:
        return [stripped, stripped], td.unsqueeze(1)
    stripped = as_segments(stripped, (td["env_obs"].shape[0], td["env_obs"].shape[1]))
    return [stripped[:, 0], stripped[:, -1]], td


def _actions_for(old: Any, segments: TensorDictBase, drawn: Tensor | None) -> Tensor:
    rows = segments["env_obs"].shape[:2]
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
    old: nn.Module, new: nn.Module, steps: list[TensorDictBase], tolerance: Tolerance
) -> Tensor | None:
    """Compare two steps, as the second reads the memory that the first stored; returns the old agent's actions."""
    drawn = None
    for eager in (True, False):
        copies, ignored = _copies(old, new), () if eager else DRAWN
        with use_backend("eager") if eager else nullcontext():
            for number, td in enumerate(steps, start=1):
                stage = f"inference step {number}"
                results = _run_both(stage, *copies, td, None)
                _compare_entries(stage, *results, tolerance, ignored)
                drawn = results[0].get("actions", None)
    return drawn


def _compare_training(
    old: nn.Module, new: nn.Module, td: TensorDictBase, action: Tensor, names: dict[str, str], tolerance: Tolerance
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
    olds, news = (dict(agent.named_parameters(remove_duplicate=False)) for agent in copies)
    for name, parameter in olds.items():
        _compare_tensors("gradients", names[name], parameter.grad, news[names[name]].grad, tolerance)


def _fixed_loss(out: TensorDictBase) -> Tensor:
    """A sum of the differentiable outputs with fixed random weights, so that no two of their entries cancel."""
    generator = torch.Generator("cpu").manual_seed(0)
    loss = torch.zeros((), device="cpu")
    for key in LOSS_KEYS:
        value = out.get(key, None)
        if isinstance(value, Tensor):
            weight = torch.randn(value.numel(), generator=generator, device="cpu").to(value)
            loss = loss.to(value.device) + (value.flatten() * weight).mean()
    return loss


def _compare_clipping(old: nn.Module, new: nn.Module, names: dict[str, str], tolerance: Tolerance) -> None:
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
    _compare_weights("clipping", *copies, names, tolerance)


def _biting_range(agent: nn.Module) -> float:
    """Half the largest absolute value among the clipped parameters."""
    clipped = LayerIndex(agent, lambda module: False).clipped
    largest = [float(p.detach().abs().max()) for p in clipped if p.numel() > 0]
    return 0.5 * max(largest, default=1.0) or 0.5


def _compare_weights(stage: str, old: nn.Module, new: nn.Module, names: dict[str, str], tolerance: Tolerance) -> None:
    olds, news = {names[key]: value for key, value in old.state_dict().items()}, new.state_dict()
    for key in sorted(olds.keys() ^ news.keys()):
        side = "old" if key in olds else "new"
        raise AgentsDifferError(stage, key, f"is in the {side} agent's state dict only")
    for key, value in olds.items():
        if isinstance(value, Tensor):
            _compare_tensors(stage, key, value, news[key], tolerance)


def _compare_entries(
    stage: str, old: TensorDictBase, new: TensorDictBase, tolerance: Tolerance, ignored: tuple[str, ...] = ()
) -> None:
    keys = [key for key, value in old.items() if isinstance(value, Tensor) and key not in ignored]
    order = {key: position for position, key in enumerate(OUTPUT_ORDER)}
    for key in sorted(keys, key=lambda key: (order.get(key, len(order)), key)):
        _compare_tensors(stage, key, old[key], new.get(key, None), tolerance)


def _compare_tensors(stage: str, key: str, old: Any, new: Any, tolerance: Tolerance) -> None:
    """Raise if two tensors differ in presence, shape, dtype or by more than the tolerance."""
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
    # NaN or infinity on one side only counts as the largest possible difference.
    distance = (old - new).abs().double().nan_to_num(math.inf, math.inf).where(off, -1.0)
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), old.shape))
    values = f"old {old[index].item():.9g}, new {new[index].item():.9g}"
    count = f"{int(off.sum())} of {off.numel()} entries differ (rtol {rtol:g}, atol {atol:g})"
    gap = f"{distance[index].item():.3g} at index {list(index)}"
    raise AgentsDifferError(stage, key, f"differs: largest difference {gap}: {values}; {count}", index)
