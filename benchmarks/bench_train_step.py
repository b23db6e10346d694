"""Whole steps of the Fast agent: a rollout step and a PPO optimizer step.

The latter consists of the forward, the PPO loss and the L2-init loss, the backward, gradient-norm clipping, Adam and
weight clipping.

Both also run with a deep agent: Fast with a long trunk, 200 parameter tensors in all.

`upstream` is Fast with upstream's formulas in place of the package's operations: the actor head over all pairs of row
and action, tokens scattered through boolean masks, log_softmax and gathers, `full` for the TensorDict's fields, the
number of segments read back from the device, the PPO loss one tensor operation after the other, the L2-init loss and
clipping module by module. It runs the package's LSTM, which resets rows inside a segment. `upstream, Fast's head`
differs from it only in the actor head, which queries each row once. Every provider has its own agent, and all start
with the same weights.

`torch.compile` compiles encoder and heads, because Dynamo does not support nn.LSTM. `captured` replays the whole step
from a CUDA graph, after three replays with changing inputs have agreed with a second agent that runs the same steps
without a graph.
"""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks import (
    bench_clip,
    bench_ppo_loss,
    bench_sample,
    bench_tensordict_fields,
    bench_tokens_to_grid,
    categorical,
    harness,
)
from benchmarks.harness import Case, Size, parametrized, shapes
from metta_fastagent import Fast, ops
from metta_fastagent.agents.fast import FastPolicy

ACTIONS, TOKENS = 21, 100
CLIP_RANGE = 0.5
# So small that the repeated updates of a benchmark leave the weights unchanged.
LEARNING_RATE = 1e-9
L2_COST, LARGEST_NORM = 1e-4, 0.5
FAST_HEAD = "upstream, Fast's head"
PROVIDERS = ("upstream", FAST_HEAD, "torch.compile", "eager", "native", "triton", "captured")
# Layers between the first and the last one: 200 parameter tensors including Fast's own.
TRUNK_LAYERS = 86
RESIDUAL_SCALE = 0.1
ENCODED_SIZE = 128
# A third number makes the agent deep and is the width of its trunk: 1 and 30 million parameters.
ROLLOUTS = shapes(
    "rows time trunk",
    quick=[(64, 0)],
    full=[(512, 0), (64, 0, 72)],
    gpu=[(4096, 0), (4096, 0, 584)],
)
OPTIMIZER_STEPS = shapes(
    "rows time trunk",
    quick=[(16, 8)],
    full=[(64, 16), (16, 4, 72)],
    gpu=[(4096, 64), (1024, 16, 584)],
)


class Trunk(nn.Module):
    """Residual layers [width, width] between the encoder and the LSTM, [rows, 128] to [rows, 128]."""

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


class Policy(FastPolicy):
    """Fast's policy with a trunk after its encoder."""

    trunk: nn.Module

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        return self.trunk(super().encode_observations(observations, state))


class FastHeadPolicy(Policy):
    """Upstream's encoder input and Fast's actor head."""

    def encode_observations(self, observations: Tensor, state: Any = None) -> Tensor:
        tokens = observations.reshape(-1, *observations.shape[-2:])
        grid = bench_tokens_to_grid.upstream(tokens, self.max_vec.view(-1))
        features = torch.relu(self.cnn2(torch.relu(self.cnn1(grid)))).flatten(1)
        return self.trunk(torch.relu(self.encoded_obs(torch.relu(self.fc1(features)))))


class UpstreamPolicy(FastHeadPolicy):
    """Upstream's encoder input, and its actor head over all pairs of row and action."""

    def decode_actions(self, hidden: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        value = self.value_head(torch.tanh(self.critic_1(hidden)))
        actor = torch.relu(self.actor_1(hidden))
        rows, actions, width = actor.shape[0], self.num_active_actions, actor.shape[1]
        embeddings = self.action_embeddings.weight[:actions]
        pair_features = actor.unsqueeze(1).expand(rows, actions, width).reshape(rows * actions, width)
        pair_embeddings = embeddings.unsqueeze(0).expand(rows, actions, -1).reshape(rows * actions, -1)
        query = torch.tanh(torch.einsum("nh,khe->nke", pair_features, self.actor_W))
        scores = torch.einsum("nke,ne->nk", query, pair_embeddings) + self.actor_bias
        return scores.view(rows, actions), value


class UpstreamFast(Fast):
    """Fast with upstream's formulas."""

    def set_tensordict_fields(self, td: Any, observations: Tensor) -> tuple[int, int]:
        """Filled tensors, flat in training."""
        fields = bench_tensordict_fields.upstream(td, observations)
        td.update({key: fields[key].view(td.batch_size) for key in ("bptt", "batch")})
        return observations.shape[0], observations.shape[1] if observations.dim() == 4 else 1

    def handle_inference_mode(self, td: Any, logits_list: Tensor, value: Tensor) -> Any:
        """log_softmax, exp, multinomial and gathers."""
        _, log_prob, full_log_probs, pairs = bench_sample.upstream(logits_list, self.action_index_tensor)
        return td.update(
            {"actions": pairs, "act_log_prob": log_prob, "values": value.flatten(), "full_log_probs": full_log_probs}
        )

    def handle_training_mode(self, td: Any, action: Tensor, logits_list: Tensor, value: Tensor) -> Any:
        """log_softmax and gathers on a flat TensorDict, whose segments are read back from its fields."""
        flat = td.reshape(td.batch_size.numel())
        index = categorical.upstream_index(action.reshape(-1, 2), self.cum_action_max_params)
        full_log_probs = torch.log_softmax(logits_list, dim=-1)
        flat["act_log_prob"] = full_log_probs[torch.arange(index.shape[0], device=index.device), index]
        flat["entropy"] = categorical.entropy_of(full_log_probs)
        flat["full_log_probs"] = full_log_probs
        flat["value"] = value
        return flat.reshape(int(flat["batch"][0].item()), int(flat["bptt"][0].item()))

    def clip_weights(self) -> None:
        bench_clip.clip_by_module(self)

    def l2_init_loss(self) -> Tensor:
        """Module by module."""
        total = torch.zeros((), device=next(self.parameters()).device)
        for name, module in self.named_modules():
            if self._is_regularizable_layer(module) and name in self.initial_weights:
                total = total + ((module.get_parameter("weight") - self.initial_weights[name]) ** 2).sum()
        return total


def make_agent(size: Size, device: torch.device, provider: str = "eager") -> Fast:
    """A provider's agent with 21 actions, always with the same weights; deep if the size names a `trunk`."""
    torch.manual_seed(0)
    env = SimpleNamespace()
    policy = {"upstream": UpstreamPolicy, FAST_HEAD: FastHeadPolicy}.get(provider, Policy)(env)
    policy.trunk = Trunk(size["trunk"]) if "trunk" in size else nn.Identity()
    kind = UpstreamFast if provider in ("upstream", FAST_HEAD) else Fast
    agent = kind(env, policy=policy, clip_range=CLIP_RANGE).to(device)
    agent.activate_actions(["noop", "act"], [0, ACTIONS - 2])
    if provider == "torch.compile":
        for name in ("encode_observations", "decode_actions"):
            setattr(policy, name, torch.compile(getattr(policy, name), dynamic=False))
    return agent


def make_inputs(size: Size, device: torch.device) -> TensorDict:
    """Observations for `rows` rows (x `time` steps unless that is 0), episode starts, pairs and a rollout's numbers."""
    shape = (size["rows"], size["time"]) if size["time"] else (size["rows"],)
    tokens, _ = bench_tokens_to_grid.make_inputs({"rows": math.prod(shape), "tokens": TOKENS}, device)
    generator = torch.Generator().manual_seed(1)
    dones = torch.rand(shape, generator=generator) < 0.03
    param = torch.randint(ACTIONS - 1, shape, generator=generator)
    pairs = torch.stack((torch.ones_like(param), param), dim=-1)
    entries = {"env_obs": tokens.view(*shape, TOKENS, 3), "dones": dones, "pairs": pairs}
    for name in bench_ppo_loss.Batch._fields[4:]:
        entries[name] = torch.randn(shape, generator=generator)
    # Ratios within and beyond the clip, because the initial policy is nearly uniform.
    entries["old_log_prob"] = 0.2 * entries["old_log_prob"] - math.log(ACTIONS)
    return TensorDict(entries, batch_size=shape).to(device)


def rollout_step(agent: Fast, td: TensorDict) -> Callable[[], Any]:
    """A function that takes one rollout step and returns the TensorDict."""
    return torch.no_grad()(lambda: agent(td.copy()))


def optimizer_step(agent: Fast, td: TensorDict) -> Callable[[], Any]:
    """A function that takes one optimizer step and returns the loss, the evaluation and the gradients."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, fused=True, capturable=td["dones"].is_cuda)
    if not isinstance(agent, UpstreamFast):
        td = td.copy().set_non_tensor("return_logits", True)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        out = agent(td, action=td["pairs"])
        loss = ppo_loss(agent, out, td)
        (loss + L2_COST * agent.l2_init_loss()).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), LARGEST_NORM)
        optimizer.step()
        agent.clip_weights()
        return loss, out, [param.grad for param in agent.parameters()]

    return step


def ppo_loss(agent: Fast, out: Any, td: TensorDict) -> Tensor:
    """The PPO loss of the agent's outputs."""
    old = (td[name] for name in bench_ppo_loss.Batch._fields[4:])
    if isinstance(agent, UpstreamFast):
        batch = bench_ppo_loss.Batch(
            out["full_log_probs"], td["pairs"], agent.cum_action_max_params, out["value"].squeeze(-1), *old
        )
        return bench_ppo_loss.surrogate_and_value(batch, out["act_log_prob"], out["entropy"])[0]
    table = agent.cum_action_max_params
    return ops.ppo_loss(
        out["logits"].flatten(0, 1), td["pairs"], out["value"], *old, table, **bench_ppo_loss.COEFFICIENTS
    )[0]


def compared_rollout(td: Any) -> dict[str, Any]:
    """Everything that does not depend on the draw, and whether the draws match their probabilities."""
    # Type 0 has one action, type 1 the others.
    index = td["actions"].long().sum(1)
    return {"values": td["values"], **bench_sample.comparable(index, td["act_log_prob"], td["full_log_probs"])}


def compared_optimizer(result: Any) -> dict[str, Any]:
    """Loss and evaluation, and each gradient relative to its largest entry."""
    loss, out, gradients = result
    # The actor's bias is common to all logits, so its gradient is rounding error around 0.
    scaled = [grad / grad.abs().max().clamp_min(1e-6) for grad in gradients if grad is not None and grad.numel() > 1]
    head = out["full_log_probs"] if "full_log_probs" in out.keys() else out["logits"].log_softmax(-1)
    return {"loss": loss.detach(), "head": head.detach(), "value": out["value"].detach().flatten(), "gradients": scaled}


def make_case(kind: str, size: Size, device: torch.device) -> Case:
    td = make_inputs(size, device)
    make_step, compared, atol = (
        (rollout_step, compared_rollout, 1e-4) if kind == "rollout" else (optimizer_step, compared_optimizer, 1e-3)
    )

    def call_of(provider: str) -> Callable[[], Any]:
        if provider == "captured":
            return captured_step()
        return make_step(make_agent(size, device, provider), td)

    def captured_step() -> Callable[[], Any]:
        own = td.clone()

        def rotate() -> None:
            for tensor in own.values():
                tensor.copy_(tensor.roll(1, 0))

        step, twin = (make_step(make_agent(size, device), own) for _ in range(2))
        return harness.captured(step, twin, rotate, case, device)

    name = f"{kind} step" + (" of a deep agent" if "trunk" in size else "")
    # A captured step is compared with its twin.
    case = Case(name, call_of, compared, uncompared=("captured",), rtol=1e-3, atol=atol)
    return case


@parametrized(PROVIDERS, ROLLOUTS)
def test_rollout_step(measure):
    measure(functools.partial(make_case, "rollout"))


@parametrized(PROVIDERS, OPTIMIZER_STEPS)
def test_optimizer_step(measure):
    measure(functools.partial(make_case, "optimizer"))
