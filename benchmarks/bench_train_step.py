"""Whole steps of the Fast agent: one rollout step, and one update (forward, loss, backward, SGD, clip).

`upstream` is Fast with upstream's formulas in place of the package's operations: the actor head over all pairs of row
and action, tokens scattered through boolean masks, log_softmax and gathers, `full` for the TensorDict's fields, the
number of segments read back from the device, the L2-init loss and the clip module by module. Both run the package's
LSTM, which resets rows inside a segment. Every provider has an agent of its own, and all begin with the same weights.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

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
from benchmarks.harness import Provider, Shape, Skipped, Suite, package_providers
from metta_fastagent import Fast

ACTIONS, TOKENS = 21, 100
CLIP_RANGE = 0.5
# So small that the repeated updates of a benchmark leave the weights where they are.
LEARNING_RATE = 1e-9
ENTROPY_COST, VALUE_COST, L2_COST = 0.01, 0.5, 1e-4
NAMES = ("upstream", "eager", "triton", "native")


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


def make_agent(kind: type[Fast], policy: type[nn.Module] | None, device: torch.device) -> Fast:
    """An agent with 21 actions, the same weights each time."""
    torch.manual_seed(0)
    env = SimpleNamespace()
    agent = kind(env, policy=policy(env) if policy else None, clip_range=CLIP_RANGE).to(device)
    agent.activate_actions(["noop", "act"], [0, ACTIONS - 2])
    return agent


def make_inputs(size: Mapping[str, int], device: torch.device) -> tuple[TensorDict, Tensor]:
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
    return td, torch.stack((torch.ones_like(param), param), dim=-1).to(device)


def rollout_step(agent: Fast, td: TensorDict) -> Callable[[], Any]:
    """A function that takes one rollout step and returns the TensorDict."""
    return torch.no_grad()(lambda: agent(td.copy()))


def update_step(agent: Fast, td: TensorDict, action: Tensor) -> Callable[[], Any]:
    """A function that makes one update and returns the evaluation and the gradients."""
    optimizer = torch.optim.SGD(agent.parameters(), lr=LEARNING_RATE)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        out = agent(td, action=action)
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
    return {**{key: out[key].flatten() for key in keys}, "gradients": scaled}


def make_providers(
    make_step: Callable[[Fast], Callable[[], Any]], compared: Callable[[Any], Any], device: torch.device
) -> list[Provider | Skipped]:
    """upstream, and the package on each implementation."""

    def package() -> Callable[[], Any]:
        return make_step(make_agent(Fast, None, device))

    providers: list[Provider | Skipped] = [
        Provider("upstream", make_step(make_agent(UpstreamFast, UpstreamPolicy, device)), compared)
    ]
    for entry in package_providers(device, lambda: None, compared=compared):
        providers.append(entry._replace(call=package()) if isinstance(entry, Provider) else entry)
    return providers


def rollout_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """Of one rollout step."""
    td, _ = make_inputs(size, device)
    return make_providers(lambda agent: rollout_step(agent, td), compared_rollout, device)


def update_providers(size: Mapping[str, int], device: torch.device, compiled: bool) -> list[Provider | Skipped]:
    """Of one update."""
    td, action = make_inputs(size, device)
    return make_providers(lambda agent: update_step(agent, td, action), compared_update, device)


SUITES = [
    Suite(
        "rollout step",
        NAMES,
        [
            Shape("quick", {"rows": 64, "time": 0}),
            Shape("full", {"rows": 512, "time": 0}),
            Shape("gpu", {"rows": 8192, "time": 0}),
        ],
        rollout_providers,
        rtol=1e-3,
        atol=1e-4,
    ),
    Suite(
        "update step",
        NAMES,
        [
            Shape("quick", {"rows": 16, "time": 8}),
            Shape("full", {"rows": 64, "time": 16}),
            Shape("gpu", {"rows": 1024, "time": 16}),
        ],
        update_providers,
        rtol=1e-3,
        atol=1e-3,
    ),
]


def test_providers(case, run_case):
    run_case(case)
