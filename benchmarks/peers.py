"""The README's first table: `python -m benchmarks.peers` compares with other libraries' LSTM agents.

Measures CPU time of one thread, alternating between programs, and takes the best round of each. sb3-contrib and
pufferlib-core take part if they are installed (`pip install sb3-contrib pufferlib-core`). All train the same small
network on CartPole without velocities, with 64 environments, segments of 32 steps, and 4 passes of 4 minibatches;
`examples/ppo_ops.py` has the first two loops.
"""

import contextlib
import io
import platform
import runpy
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

from metta_fastagent import backend, ops
from metta_fastagent.runtime.explain import processor_name

EXAMPLE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "ppo_ops.py")))
ROWS, ACTIONS = 4096, 21
SEGMENTS, STEPS, WIDTH = 64, 64, 128


def best_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of the fastest call of each, after a warm-up call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    return {name: min(each[1:]) for name, each in seconds.items()}


def sb3_contrib() -> Callable[[], Any]:
    """One rollout and its updates by sb3-contrib's RecurrentPPO, with actor and critic sharing one LSTM."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.vec_env import VecEnv

    class Rows(VecEnv):
        """The example's environment in stable-baselines3's interface."""

        def __init__(self) -> None:
            self.rows, self.actions = EXAMPLE.Positions(1), np.zeros(EXAMPLE.N)
            low_to_high = -np.full(2, np.inf, np.float32), np.full(2, np.inf, np.float32)
            space = type(self.rows.envs.single_observation_space)(*low_to_high)
            super().__init__(EXAMPLE.N, space, self.rows.envs.single_action_space)

        def reset(self) -> Any:
            return self.rows.observations.numpy()

        def step_async(self, actions: Any) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            rewards, ended, _ = self.rows.step(torch.from_numpy(self.actions))
            seen = self.rows.observations.numpy()
            infos = [{"terminal_observation": seen[row]} if end else {} for row, end in enumerate(ended.tolist())]
            return seen, rewards.numpy(), ended.numpy(), infos

        def close(self) -> None: ...

        def get_attr(self, attr_name: str, indices: Any = None) -> Any:
            return [None] * EXAMPLE.N

        def set_attr(self, *_: Any, **__: Any) -> None: ...

        def env_method(self, *_: Any, **__: Any) -> Any: ...

        def env_is_wrapped(self, *_: Any, **__: Any) -> Any:
            return [False] * EXAMPLE.N

    policy = {"lstm_hidden_size": EXAMPLE.HIDDEN, "net_arch": [], "shared_lstm": True, "enable_critic_lstm": False}
    steps = EXAMPLE.N * EXAMPLE.T
    agent = RecurrentPPO(
        "MlpLstmPolicy", Rows(), n_steps=EXAMPLE.T, batch_size=steps // EXAMPLE.MINIBATCHES,
        n_epochs=EXAMPLE.EPOCHS, learning_rate=EXAMPLE.LR, gamma=EXAMPLE.GAMMA, gae_lambda=EXAMPLE.LAMBDA,
        policy_kwargs=policy, device="cpu",
    )  # fmt: skip
    return lambda: agent.learn(steps, reset_num_timesteps=False)


def advantages_of_pufferlib(values: Any, rewards: Any, ends: Any, ratio: Any, out: Any, gamma: Any, lam: Any, *_: Any):
    """Advantages [B, T]; in its layout the reward and the end of step t are at t + 1."""
    keep, running = 1 - ends[:, 1:], torch.zeros_like(values[:, 0])
    deltas = rewards[:, 1:] + gamma * keep * values[:, 1:] - values[:, :-1]
    for t in reversed(range(deltas.shape[1])):
        running = out[:, t] = deltas[:, t] + gamma * lam * keep[:, t] * running
    return out


def pufferlib() -> Callable[[], Any]:
    """One rollout and its updates by PufferLib's trainer, whose segments start from zeros and have no resets."""
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        import pufferlib
        import pufferlib.models
        from pufferlib import pufferl
    signal.signal(signal.SIGINT, handler)
    # PufferLib's own is in an extension that needs CUDA libraries
    pufferl.compute_puff_advantage = advantages_of_pufferlib

    class Rows(pufferlib.PufferEnv):
        """The example's environment in PufferLib's interface."""

        def __init__(self) -> None:
            self.rows = EXAMPLE.Positions(1)
            space = type(self.rows.envs.single_observation_space)
            self.single_observation_space = space(-np.inf, np.inf, (2,), np.float32)
            self.single_action_space, self.num_agents = self.rows.envs.single_action_space, EXAMPLE.N
            super().__init__()

        def reset(self, seed: Any = None) -> Any:
            self.observations[:] = self.rows.observations
            return self.observations, []

        def step(self, actions: Any) -> Any:
            rewards, ended, _ = self.rows.step(torch.as_tensor(actions).long())
            self.observations[:], self.rewards[:], self.terminals[:] = self.rows.observations, rewards, ended
            return self.observations, self.rewards, self.terminals, self.truncations, []

        def close(self) -> None: ...

    env, steps = Rows(), EXAMPLE.N * EXAMPLE.T
    env.agents_per_batch = EXAMPLE.N
    policy = pufferlib.models.Default(env, hidden_size=EXAMPLE.HIDDEN)
    config = {
        "seed": 1, "torch_deterministic": False, "device": "cpu", "cpu_offload": False, "use_rnn": True,
        "batch_size": steps, "bptt_horizon": EXAMPLE.T, "minibatch_size": steps // EXAMPLE.MINIBATCHES,
        "max_minibatch_size": steps, "update_epochs": EXAMPLE.EPOCHS, "compile": False, "optimizer": "adam",
        "learning_rate": EXAMPLE.LR, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-5, "anneal_lr": False,
        "total_timesteps": 10**9, "precision": "float32", "gamma": EXAMPLE.GAMMA, "gae_lambda": EXAMPLE.LAMBDA,
        "clip_coef": EXAMPLE.CLIP, "vf_clip_coef": 1e9, "vf_coef": EXAMPLE.VALUE, "ent_coef": EXAMPLE.ENTROPY,
        "max_grad_norm": EXAMPLE.GRAD_NORM, "prio_alpha": 0.0, "prio_beta0": 1.0, "vtrace_rho_clip": 1.0,
        "vtrace_c_clip": 1.0, "checkpoint_interval": 10**9, "data_dir": ".", "env": "cartpole",
    }  # fmt: skip
    wrapped = pufferlib.models.LSTMWrapper(env, policy, EXAMPLE.HIDDEN, EXAMPLE.HIDDEN)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = pufferl.PuffeRL(config, env, wrapped)
    trainer.print_dashboard = lambda *_, **__: None
    # Its thread would keep the process alive.
    trainer.utilization.stop()

    def update() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.evaluate()
            trainer.train()

    return update


def loops(rounds: int = 12) -> dict[str, float]:
    """Environment steps per CPU second of whole training loops."""
    calls = {"metta_fastagent.ops": EXAMPLE.PPO(plain=False).update, "CleanRL's style": EXAMPLE.PPO(plain=True).update}
    for make in (sb3_contrib, pufferlib):
        try:
            calls[make.__name__.replace("_", "-")] = make()
        except ImportError as error:
            print(f"without {make.__name__}: {error}")
    return {name: EXAMPLE.N * EXAMPLE.T / each for name, each in best_seconds(calls, rounds).items()}


def masked_heads(rounds: int = 100) -> dict[str, float]:
    """Milliseconds for log-probability and entropy of masked logits, with their gradient."""
    logits = torch.randn(ROWS, ACTIONS, requires_grad=True)
    mask, actions = torch.rand(ROWS, ACTIONS) < 0.7, torch.zeros(ROWS, dtype=torch.int64)
    mask[:, 0] = True

    def fused() -> None:
        log_prob, entropy, _ = ops.evaluate_actions(logits, actions, mask=mask)
        torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)

    def plain() -> None:
        distribution = Categorical(logits=logits.where(mask, torch.finfo(logits.dtype).min))
        torch.autograd.grad(distribution.log_prob(actions).sum() + distribution.entropy().sum(), logits)

    return {name: 1e3 * each for name, each in best_seconds({"ops": fused, "plain": plain}, rounds).items()}


def lstms(rounds: int = 20) -> dict[str, float]:
    """Milliseconds for an LSTM layer over segments in which 3 % of the steps start an episode, with its gradients."""
    lstm = nn.LSTM(WIDTH, WIDTH)
    hidden, starts = torch.randn(STEPS, SEGMENTS, WIDTH, requires_grad=True), torch.rand(STEPS, SEGMENTS) < 0.03
    state = torch.zeros(1, SEGMENTS, WIDTH), torch.zeros(1, SEGMENTS, WIDTH)
    recur = {"ops": EXAMPLE.Agent.recur, "plain": EXAMPLE.PlainAgent.recur}
    holder: Any = SimpleNamespace(lstm=lstm)
    inputs = (hidden, *lstm.parameters())
    calls = {
        name: lambda call=call: torch.autograd.grad(call(holder, hidden, state, starts)[0].sum(), inputs)
        for name, call in recur.items()
    }
    return {name: 1e3 * each for name, each in best_seconds(calls, rounds).items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor_name()}, PyTorch {torch.__version__}, Python {platform.python_version()}, {backend('cpu')}\n")
    rates = loops()
    ours, theirs = rates.pop("metta_fastagent.ops"), rates.pop("CleanRL's style")
    others = "".join(f"; {name} {rate / 1000:.1f}" for name, rate in rates.items())
    print("| CPU, one thread | plain PyTorch | metta_fastagent | speedup |\n| --- | ---: | ---: | ---: |")
    print(f"| PPO loop, thousand steps/s{others} | {theirs / 1000:.1f} | {ours / 1000:.1f} | {ours / theirs:.1f} |")
    for name, each in (("masked head, ms", masked_heads()), ("LSTM with resets, ms", lstms())):
        print(f"| {name} | {each['plain']:.3g} | {each['ops']:.3g} | {each['plain'] / each['ops']:.1f} |")


if __name__ == "__main__":
    main()
