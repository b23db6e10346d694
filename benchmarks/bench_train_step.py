"""Whole steps of the Fast agent: one rollout step, and one update (forward, loss, backward, Adam, clip).

The same with a deep agent: Fast with a long trunk, 200 parameter tensors in all.

`upstream` is Fast with upstream's formulas in place of the package's operations: the actor head over all pairs of row
and action, tokens scattered through boolean masks, log_softmax and gathers, `full` for the TensorDict's fields, the
number of segments read back from the device, the L2-init loss and the clip module by module. Both run the package's
LSTM, which resets rows inside a segment. Every provider has an agent of its own, and all begin with the same weights.

`torch.compile` compiles encoder and heads: the whole agent does not compile, as Dynamo leaves out nn.LSTM. `captured`
replays the whole step from a CUDA graph, after three replays with changing inputs have agreed with a second agent that
runs the same steps without a graph.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks import categorical
from benchmarks.bench_clip import clip_by_module
from benchmarks.bench_fast_actor import ExpandedPolicy
from benchmarks.bench_sample import frequencies_fit
from benchmarks.bench_sample import upstream as draw_upstream
from benchmarks.bench_tensordict_fields import upstream as set_fields_upstream
from benchmarks.bench_tokens_to_grid import upstream as scatter_upstream
from benchmarks.harness import (
    Capturable,
    Entry,
    Provider,
    Shape,
    Skipped,
    Suite,
    captured_provider,
    first_line,
    not_compiled,
    package_providers,
)
from metta_fastagent import Fast
from metta_fastagent.agents.fast import FastPolicy

ACTIONS, TOKENS = 21, 100
CLIP_RANGE = 0.5
# So small that the repeated updates of a benchmark leave the weights where they are.
LEARNING_RATE = 1e-9
ENTROPY_COST, VALUE_COST, L2_COST = 0.01, 0.5, 1e-4
NAMES = ("upstream", "torch.compile", "eager", "triton", "native", "captured")
# Layers of the deep agent's trunk between its first and its last: with Fast's own, 200 parameter tensors.
TRUNK_LAYERS = 86
# Of Fast without a trunk, about.
FAST_PARAMETERS = 550_000
# Of the trunk's widths: what matrix units like.
WIDTH_STEP = 8
RESIDUAL_SCALE = 0.1
ENCODED_SIZE = 128


class Trunk(nn.Module):
    """Residual layers [width, width] between the encoder and what follows, [rows, 128] to [rows, 128]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(ENCODED_SIZE, width, bias=False)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(TRUNK_LAYERS))
        self.last = nn.Linear(width, ENCODED_SIZE)

    def forward(self, features: Tensor) -> Tensor:
        features = self.first(features)
        for layer in self.layers:
            features = features + RESIDUAL_SCALE * torch.relu(layer(features))
        return self.last(features)


class UpstreamPolicy(ExpandedPolicy):
    """Fast's policy with upstream's encoder input and actor head."""

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """As `FastPolicy.encode_observations`."""
        tokens = observations.reshape(-1, *observations.shape[-2:])
        grid = scatter_upstream(tokens, self.max_vec.view(-1))
        features = torch.relu(self.cnn2(torch.relu(self.cnn1(grid)))).flatten(1)
        return torch.relu(self.encoded_obs(torch.relu(self.fc1(features))))


class UpstreamFast(Fast):
    """Fast with upstream's formulas."""

    def set_tensordict_fields(self, td: Any, observations: Tensor) -> tuple[int, int]:
        """Filled tensors, flat in training."""
        fields = set_fields_upstream(td, observations)
        if td.batch_dims < 2:
            td.update({"bptt": fields["bptt"], "batch": fields["batch"]})
        else:
            td.update({key: fields[key].view(td.batch_size) for key in ("bptt", "batch")})
        return observations.shape[0], observations.shape[1] if observations.dim() == 4 else 1

    def handle_inference_mode(self, td: Any, logits_list: Tensor, value: Tensor) -> Any:
        """log_softmax, exp, multinomial and gathers."""
        _, log_prob, full_log_probs, pairs = draw_upstream(logits_list, self._require_table("action_index_tensor"))
        return td.update(
            {"actions": pairs, "act_log_prob": log_prob, "values": value.flatten(), "full_log_probs": full_log_probs}
        )

    def handle_training_mode(self, td: Any, action: Tensor, logits_list: Tensor, value: Tensor) -> Any:
        """log_softmax and gathers on a flat TensorDict, whose segments are read back from its fields."""
        flat = td.reshape(td.batch_size.numel())
        table = self._require_table("cum_action_max_params")
        index = categorical.upstream_index(action.reshape(-1, 2), table)
        full_log_probs = torch.log_softmax(logits_list, dim=-1)
        flat["act_log_prob"] = full_log_probs[torch.arange(index.shape[0], device=index.device), index]
        flat["entropy"] = categorical.entropy_of(full_log_probs)
        flat["full_log_probs"] = full_log_probs
        flat["value"] = value
        return flat.reshape(int(flat["batch"][0].item()), int(flat["bptt"][0].item()))

    def clip_weights(self) -> None:
        """Module by module."""
        clip_by_module(self)

    def l2_init_loss(self) -> Tensor:
        """Module by module."""
        total = torch.zeros((), device=next(self.parameters()).device)
        for name, module in self.named_modules():
            if self._is_regularizable_layer(module) and name in self.initial_weights:
                total = total + ((module.get_parameter("weight") - self.initial_weights[name]) ** 2).sum()
        return total


class DeepPolicy(FastPolicy):
    """Fast's policy with a trunk behind its encoder."""

    trunk: Trunk

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """As `FastPolicy.encode_observations`."""
        return self.trunk(super().encode_observations(observations, state))


class DeepUpstreamPolicy(UpstreamPolicy):
    """Upstream's policy with a trunk behind its encoder."""

    trunk: Trunk

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        """As `FastPolicy.encode_observations`."""
        return self.trunk(super().encode_observations(observations, state))


def make_agent(size: Mapping[str, int], device: torch.device, upstream: bool = False) -> Fast:
    """An agent with 21 actions, the same weights each time; deep where the size names its `parameters`."""
    torch.manual_seed(0)
    env = SimpleNamespace()
    if "parameters" in size:
        policy: FastPolicy = DeepUpstreamPolicy(env) if upstream else DeepPolicy(env)
        width = ((size["parameters"] - FAST_PARAMETERS) / TRUNK_LAYERS) ** 0.5
        policy.trunk = Trunk(WIDTH_STEP * round(width / WIDTH_STEP))
    else:
        policy = UpstreamPolicy(env) if upstream else FastPolicy(env)
    agent = (UpstreamFast if upstream else Fast)(env, policy=policy, clip_range=CLIP_RANGE).to(device)
    agent.activate_actions(["noop", "act"], [0, ACTIONS - 2])
    return agent


class Inputs(NamedTuple):
    """Observations and episode starts, and actions for them."""

    td: TensorDict
    action: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.td.values(), self.action]

    def clone(self) -> "Inputs":
        """The same in memory of its own."""
        return Inputs(self.td.clone(), self.action.clone())


def make_inputs(size: Mapping[str, int], device: torch.device) -> Inputs:
    """Observations of `rows` rows (x `time` steps where that is not 0), episode starts, and actions."""
    shape = (size["rows"], size["time"]) if size["time"] else (size["rows"],)
    generator = torch.Generator().manual_seed(1)
    cells = torch.stack([torch.randperm(121, generator=generator)[:TOKENS] for _ in range(shape[0])])
    cells = cells.view(shape[0], *[1] * (len(shape) - 1), TOKENS).expand(*shape, TOKENS)
    feature = torch.randint(25, (*shape, TOKENS), generator=generator)
    value = torch.randint(256, (*shape, TOKENS), generator=generator)
    env_obs = torch.stack((cells // 11 * 16 + cells % 11, feature, value), dim=-1).to(torch.uint8)
    dones = torch.rand(shape, generator=generator) < 0.03
    param = torch.randint(ACTIONS - 1, shape, generator=generator)
    entries = {"env_obs": env_obs, "dones": dones, "truncateds": torch.zeros_like(dones)}
    td = TensorDict(entries, batch_size=shape).to(device)
    return Inputs(td, torch.stack((torch.ones_like(param), param), dim=-1).to(device))


def rollout_step(agent: Fast, inputs: Inputs, capturable: bool = False) -> Callable[[], Any]:
    """A function that takes one rollout step and returns the TensorDict."""
    return torch.no_grad()(lambda: agent(inputs.td.copy()))


def update_step(agent: Fast, inputs: Inputs, capturable: bool = False) -> Callable[[], Any]:
    """A function that makes one update and returns the evaluation and the gradients."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, fused=True, capturable=capturable)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        out = agent(inputs.td, action=inputs.action)
        loss = VALUE_COST * out["value"].square().mean() - out["act_log_prob"].mean()
        loss = loss - ENTROPY_COST * out["entropy"].mean() + L2_COST * agent.l2_init_loss()
        loss.backward()
        optimizer.step()
        agent.clip_weights()
        return out, [param.grad for param in agent.parameters()]

    return step


def compared_rollout(td: Any) -> dict[str, Any]:
    """What does not hang on the draw, and whether the draws fit their probabilities."""
    log_probs, pairs = td["full_log_probs"], td["actions"].long()
    # Type 0 has one action, type 1 the others.
    index = pairs.sum(1)
    return {
        "full_log_probs": log_probs,
        "values": td["values"],
        "log_prob - full_log_probs[index]": td["act_log_prob"] - log_probs.gather(1, index.unsqueeze(1)).squeeze(1),
        "frequencies fit": frequencies_fit(index, log_probs),
    }


def compared_update(result: Any) -> dict[str, Any]:
    """The evaluation, and each gradient against its largest entry."""
    out, gradients = result
    keys = ("act_log_prob", "entropy", "full_log_probs", "value")
    # The actor's bias is common to all logits: its gradient is a rounding error about 0.
    scaled = [grad / grad.abs().max().clamp_min(1e-6) for grad in gradients if grad is not None and grad.numel() > 1]
    return {**{key: out[key].detach().flatten() for key in keys}, "gradients": scaled}


class Kind(NamedTuple):
    """A kind of step: how it is made of an agent and its inputs, what of its results is compared, and how closely."""

    make_step: Callable[[Fast, Inputs, bool], Callable[[], Any]]
    compared: Callable[[Any], Any]
    rtol: float
    atol: float


ROLLOUT = Kind(rollout_step, compared_rollout, 1e-3, 1e-4)
UPDATE = Kind(update_step, compared_update, 1e-3, 1e-3)


def make_providers(kind: Kind, size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Entry]:
    """upstream, and the package compiled, on each implementation, and captured."""
    inputs = make_inputs(size, device)

    def step_of(agent: Fast) -> Callable[[], Any]:
        return kind.make_step(agent, inputs, False)

    found: list[Entry] = [Provider("upstream", step_of(make_agent(size, device, upstream=True)), kind.compared)]
    found.append(compiled_step(kind, inputs, size, device, compiled))
    for entry in package_providers(device, lambda: None, compared=kind.compared):
        own = isinstance(entry, Provider)
        found.append(entry._replace(call=step_of(make_agent(size, device))) if own else entry)
    tolerance = (kind.rtol, kind.atol)
    found.append(captured_provider("captured", lambda: capturable(kind, inputs, size, device), tolerance, device))
    return found


def compiled_step(
    kind: Kind, inputs: Inputs, size: Mapping[str, int], device: torch.device, wanted: bool, **options: Any
) -> Provider | Skipped:
    """The step of an agent whose encoder and heads are compiled, at its first call; skipped where that fails."""
    if not wanted:
        return not_compiled()
    agent = make_agent(size, device)
    torch._dynamo.reset()
    for name in ("encode_observations", "decode_actions"):
        setattr(agent.policy, name, torch.compile(getattr(agent.policy, name), dynamic=False, **options))
    step = kind.make_step(agent, inputs, False)
    try:
        step()
    except Exception as error:
        return Skipped("torch.compile", f"does not compile: {first_line(error)}")
    return Provider("torch.compile", step, kind.compared, reset=lambda: clear_memory(agent))


def capturable(kind: Kind, inputs: Inputs, size: Mapping[str, int], device: torch.device) -> Capturable:
    """A step of one agent to capture and the same of another, on inputs of their own that rotate among the rows."""
    own = inputs.clone()
    agent, twin = make_agent(size, device), make_agent(size, device)

    def rotate() -> None:
        for tensor in own.tensors():
            tensor.copy_(tensor.roll(1, 0))

    def reset() -> None:
        for tensor, first in zip(own.tensors(), inputs.tensors(), strict=True):
            tensor.copy_(first)
        clear_memory(agent)

    on_cuda = device.type == "cuda"
    step, own_twin = kind.make_step(agent, own, on_cuda), kind.make_step(twin, own, on_cuda)
    return Capturable(step, own_twin, rotate, reset, kind.compared)


def clear_memory(agent: Fast) -> None:
    """Zero the rollout memory where it lies, as a captured graph reads it there."""
    for state in (*agent.lstm_h.values(), *agent.lstm_c.values()):
        state.zero_()


def suite(operation: str, kind: Kind, shapes: list[Shape]) -> Suite:
    """A suite of whole steps."""
    return Suite(
        operation,
        NAMES,
        shapes,
        lambda size, device, compiled: make_providers(kind, size, device, compiled),
        rtol=kind.rtol,
        atol=kind.atol,
    )


DEEP = {"parameters": 30_000_000}
SHALLOW = {"parameters": 1_000_000}
SUITES = [
    suite(
        "rollout step",
        ROLLOUT,
        [
            Shape("quick", {"rows": 64, "time": 0}),
            Shape("full", {"rows": 512, "time": 0}),
            Shape("gpu", {"rows": 4096, "time": 0}),
        ],
    ),
    suite(
        "update step",
        UPDATE,
        [
            Shape("quick", {"rows": 16, "time": 8}),
            Shape("full", {"rows": 64, "time": 16}),
            Shape("gpu", {"rows": 4096, "time": 64}),
        ],
    ),
    suite(
        "rollout step of a deep agent",
        ROLLOUT,
        [Shape("quick", {"rows": 64, "time": 0, **SHALLOW}), Shape("gpu", {"rows": 4096, "time": 0, **DEEP})],
    ),
    suite(
        "update step of a deep agent",
        UPDATE,
        [Shape("quick", {"rows": 16, "time": 4, **SHALLOW}), Shape("gpu", {"rows": 1024, "time": 16, **DEEP})],
    ),
]


def test_providers(case, run_case):
    run_case(case)
