"""What one actor query per row saves: Fast against the same network with rows x actions x 512 written out.

    python -m benchmarks.bench_fast_actor [--batch 64] [--time 16] [--actions 22] [--rounds 40]

Both evaluate segments [batch, time] and run the backward, on the CPU, on one thread. They must agree first, in logits
and in all gradients; then they are timed in turn within each round. `pytest benchmarks/bench_fast_actor.py` times each
by itself.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from metta_fastagent import Fast
from metta_fastagent.agents.fast import FastPolicy

TOKENS = 64
WARM_UP_ROUNDS = 3
# fp32 sums of 512 products in another order; relative and absolute.
LOGITS_TOLERANCE = 1e-5
# Gradients are sums over all rows; measured against each one's largest entry.
GRADIENT_TOLERANCE = 1e-4


class ExpandedPolicy(FastPolicy):
    """Fast's policy with its actor applied to each (row, action) pair, the row's features repeated for each action."""

    def decode_actions(self, hidden: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """(logits [batch_size, actions], value [batch_size, 1])."""
        value = self.value_head(torch.tanh(self.critic_1(hidden)))
        actor = torch.relu(self.actor_1(hidden))
        rows, actions, width = actor.shape[0], self.num_active_actions, actor.shape[1]
        embeddings = self.action_embeddings.weight[:actions]
        pair_features = actor.unsqueeze(1).expand(rows, actions, width).reshape(rows * actions, width)
        pair_embeddings = embeddings.unsqueeze(0).expand(rows, actions, -1).reshape(rows * actions, -1)
        query = torch.tanh(torch.einsum("nh,khe->nke", pair_features, self.actor_W))
        scores = torch.einsum("nke,ne->nk", query, pair_embeddings) + self.actor_bias
        return scores.view(rows, actions), value


Step = Callable[[], TensorDict]


class Times(NamedTuple):
    """Seconds in each round: on the clock, and of the processor, which other programs disturb less."""

    wall: list[float]
    cpu: list[float]


def make_agents(actions: int) -> dict[str, Fast]:
    """The two agents, of the same weights."""
    torch.manual_seed(0)
    env, max_actions = SimpleNamespace(), max(actions, 100)
    once = Fast(env, max_actions=max_actions)
    expanded = Fast(env, policy=ExpandedPolicy(env, max_actions=max_actions))
    expanded.load_state_dict(once.state_dict())
    for agent in (once, expanded):
        agent.activate_actions(["act"], [actions - 1])
    return {"once per row": once, "expanded": expanded}


def make_inputs(batch: int, steps: int, actions: int) -> tuple[TensorDict, Tensor]:
    """Segments with random tokens and an episode's start in 3 % of the steps, and actions for them."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, steps, TOKENS)
    x, y, feature, value = (torch.randint(n, shape, generator=generator) for n in (11, 11, 25, 256))
    env_obs = torch.stack((x * 16 + y, feature, value), dim=-1).to(torch.uint8)
    dones = torch.rand(batch, steps, generator=generator) < 0.03
    params = torch.randint(actions, (batch, steps), generator=generator)
    td = TensorDict({"env_obs": env_obs, "dones": dones}, batch_size=[batch, steps])
    return td, torch.stack((torch.zeros_like(params), params), dim=-1)


def make_step(agent: nn.Module, td: TensorDict, action: Tensor) -> Step:
    """A function that runs forward and backward and returns the forward's result."""

    def step() -> TensorDict:
        agent.zero_grad(set_to_none=True)
        out = agent(td, action=action)
        (out["value"].square().mean() - out["act_log_prob"].mean() - 0.01 * out["entropy"].mean()).backward()
        return out

    return step


def require_agreement(agents: dict[str, Fast], steps: dict[str, Step]) -> None:
    """AssertionError where the two differ in logits (as log-probabilities), values or a gradient."""
    expected, actual = (step() for step in steps.values())
    for key in ("full_log_probs", "value", "act_log_prob", "entropy"):
        torch.testing.assert_close(
            actual[key],
            expected[key],
            rtol=LOGITS_TOLERANCE,
            atol=LOGITS_TOLERANCE,
            msg=lambda text, key=key: f"{key}: {text}",
        )
    first, second = (
        {name: param.grad for name, param in agent.named_parameters() if param.grad is not None}
        for agent in agents.values()
    )
    names = {name for name, _ in next(iter(agents.values())).named_parameters()}
    if not first.keys() == second.keys() == names:
        raise AssertionError(f"parameters without a gradient: {names - (first.keys() & second.keys())}")
    # The actor's bias is common to all logits: its gradient is a rounding error about 0.
    for name in names - {"policy.actor_bias"}:
        error, largest = (first[name] - second[name]).abs().max(), first[name].abs().max()
        if not (largest > 0 and error <= GRADIENT_TOLERANCE * largest):
            raise AssertionError(f"gradient of {name}: differs by {error:.3g}, its largest entry is {largest:.3g}")


def interleaved_times(steps: Sequence[Step], rounds: int) -> list[Times]:
    """Seconds of each step in each round; every round runs all of them, in alternating order."""
    times = [Times([], []) for _ in steps]
    for number in range(WARM_UP_ROUNDS + rounds):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for i in order:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[i]()
            if number >= WARM_UP_ROUNDS:
                times[i].wall.append(time.perf_counter() - wall)
                times[i].cpu.append(time.process_time() - cpu)
    return times


def print_row(name: str, values: Sequence[float], unit: str) -> None:
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{name:<14}{median:>10.1f}{low:>10.1f} -{high:>6.1f} {unit}")


def device_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("time", 16), ("actions", 22), ("rounds", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)

    agents = make_agents(args.actions)
    inputs = make_inputs(args.batch, args.time, args.actions)
    steps = {name: make_step(agent, *inputs) for name, agent in agents.items()}
    require_agreement(agents, steps)
    times = dict(zip(steps, interleaved_times(list(steps.values()), args.rounds), strict=True))

    print(f"Fast, forward + backward, [{args.batch}, {args.time}] segments, {args.actions} actions, fp32, one thread")
    print(f"{device_name()}; torch {torch.__version__}, Python {platform.python_version()}; {args.rounds} rounds")
    once, expanded = times.values()
    for clock in Times._fields:
        print(f"{clock + ' time':<14}{'median':>10}{'quartiles':>18}")
        for name, measured in times.items():
            print_row(name, [1e3 * seconds for seconds in getattr(measured, clock)], "ms")
        pairs = zip(getattr(once, clock), getattr(expanded, clock), strict=True)
        print_row("ratio", [100 * a / b for a, b in pairs], "%")


@pytest.mark.parametrize("name", ["once per row", "expanded"])
def test_forward_and_backward(benchmark, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        agents = make_agents(22)
        inputs = make_inputs(64, 16, 22)
        steps = {key: make_step(agent, *inputs) for key, agent in agents.items()}
        require_agreement(agents, steps)
        benchmark.pedantic(steps[name], rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
