"""`check_agent`'s check of recurrent state: a rollout across episode ends, replayed as training segments."""

import dataclasses
import itertools
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from metta_fastagent.testing._shared import ROWS, STATE_KEYS, CheckResult, Subject, T

RATIO_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Episode starts (row, step) in a warm-up and two segments. None is at the first or last step of the first segment, so
# that shifting by one step keeps them inside it.
STARTS = {
    "dones": [(0, T + 1), (2, T + 3), (3, 2 * T), (1, 2 * T + 3)],
    "truncateds": [(1, T + 2), (3, T + 3), (4, 2 * T), (0, 2 * T + 2)],
}
RUN_LSTM = "self.run_lstm(td, hidden, B, T) of LSTMWrapper handles state and resets in both modes"


def check_replay(subject: Subject, result: CheckResult) -> None:
    agent = subject.fresh_copy().eval()
    for parameter in agent.parameters():
        if parameter.is_floating_point():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    tolerance = max((RATIO_TOLERANCE.get(parameter.dtype, 1e-5) for parameter in agent.parameters()), default=1e-5)
    subject = dataclasses.replace(subject, agent=agent)
    td = subject.draw(ROWS, 3 * T)
    _check_rollout(subject, td, tolerance, result)
    if result.passed:
        for key, starts in STARTS.items():
            for row, step in starts:
                td[key][row, step] = True
        _check_segments(subject, td, tolerance, result)
    result.summary = f"importance ratio 1 within {tolerance:g} over ends of episodes, from stored state"


def _roll_out(agent: Any, td: TensorDictBase) -> TensorDictBase:
    """Results of rollout steps td [ROWS, steps]."""
    with torch.no_grad():
        outs = [agent(td[:, t].clone()) for t in range(td.shape[1])]
    return TensorDict.stack([out.select("actions", "act_log_prob", "full_log_probs") for out in outs], dim=1)


def _check_rollout(subject: Subject, td: TensorDictBase, tolerance: float, result: CheckResult) -> None:
    """Compare two steps with and without a history: they must be equal after an episode's end, different otherwise."""

    def probabilities(history: int, flag: str | None = None, training: bool = False) -> Tensor:
        steps = td[:, T - history : T + 2].clone()
        if flag:
            steps[flag][:, history] = True
        agent = subject.fresh_copy()
        out = agent(steps, action=subject.actions(*steps.shape)) if training else _roll_out(agent, steps)
        return out["full_log_probs"][:, -2:].detach().double().exp()

    if torch.equal(probabilities(0), probabilities(T)):
        problem = "carries no state: the results of a step do not depend on earlier steps"
        gap = (probabilities(0, training=True) - probabilities(T, training=True)).abs().max()
        if gap > tolerance:
            problem = "the rollout drops its state: a step does not depend on earlier ones, though it does in a segment"
        result.expect(False, f"{problem}; {RUN_LSTM}")
        return
    for flag in STARTS:
        # Equal to the last bit, because both start from zeros.
        at, after = ((probabilities(0, flag) != probabilities(T, flag))[:, step].any() for step in (0, 1))
        how = "ignores" if after else "resets one step late at"
        problem = f"the rollout {how} {flag}: state from before td[{flag!r}] reaches the results of that step"
        result.expect(not at, f"{problem}; {RUN_LSTM}")


def _check_segments(subject: Subject, td: TensorDictBase, tolerance: float, result: CheckResult) -> None:
    """Replay two segments of a rollout, which follow a warm-up, and compare the importance ratio with 1."""
    agent, parts, states = subject.fresh_copy(), [], []
    for steps in td.split(T, dim=1):
        parts.append(_roll_out(agent, steps))
        memory = agent.get_memory() if callable(getattr(agent, "get_memory", None)) else ({}, {})
        problem = "get_memory() gives no state to store with a segment; derive the agent from LSTMWrapper"
        if not result.expect(all(memory), problem):
            return
        states.append([next(iter(part.values()))[:, :ROWS].transpose(0, 1).clone() for part in memory])
    old = TensorDict.cat(parts[1:])
    stored = {key: torch.cat([state[i] for state in states[:2]]) for i, key in enumerate(STATE_KEYS)}
    segments = TensorDict({**dict(TensorDict.cat(td.split(T, dim=1)[1:]).items()), **stored}, batch_size=[2 * ROWS])
    out = subject.fresh_copy()(segments, action=old["actions"])
    ratio = (out["act_log_prob"].detach().double() - old["act_log_prob"].double()).exp()
    if not bool(((ratio - 1).abs() <= tolerance).all()):
        worst = float(ratio.flatten()[(ratio - 1).abs().argmax()])
        cause = _cause(subject, td, out["full_log_probs"][:ROWS].detach().double().exp(), tolerance)
        problem = f"training {cause}: the importance ratio of a replayed rollout is {worst:.6g} in the worst case,"
        result.expect(False, f"{problem} expected 1 within {tolerance:g}; {RUN_LSTM}")


def _cause(subject: Subject, td: TensorDictBase, trained: Tensor, tolerance: float) -> str:
    """The change to the flags that makes a rollout compute what training computed for the first segment."""
    variants = {}
    for key in STARTS:
        flags = td[key][:, T : 2 * T]
        late, early = f"resets one step late at {key}", f"resets one step early at {key}"
        variants[key] = {"": flags, f"ignores {key}": torch.zeros_like(flags)}
        variants[key] |= {late: flags.roll(1, 1), early: flags.roll(-1, 1)}
    variants["dones"]["drops its state between the steps of a segment"] = torch.ones_like(variants["dones"][""])
    best, cause = tolerance, "differs from the rollout, and neither by its flags nor by the start of its segments"
    for dones, truncateds, start in itertools.product(*variants.values(), ("", "starts segments from zeros")):
        changed = td[:, : 2 * T].clone()
        changed["dones"][:, T:] = variants["dones"][dones]
        changed["truncateds"][:, T:] = variants["truncateds"][truncateds]
        if start:
            changed["dones"][:, T] = True
        gap = float((_roll_out(subject.fresh_copy(), changed)["full_log_probs"][:, T:].exp() - trained).abs().max())
        if gap < best:
            best, cause = gap, " and ".join(filter(None, (start, dones, truncateds)))
    return cause or "does not reset the stored state of a segment whose first step starts an episode"
