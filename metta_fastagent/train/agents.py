"""The trainer's agents: selection by name, and the check that an agent fits its environment."""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from metta_fastagent import Fast, MettaAgent
from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.runtime.checks import describe, first_line, require_call
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Environment, import_object
from metta_fastagent.train.environments.memory import MemoryEnvironment

# Methods that the trainer uses, and the class that provides each.
METHODS = {
    "clip_weights": "PyTorchAgentMixin",
    "l2_init_loss": "PyTorchAgentMixin",
    "initial_weights": "PyTorchAgentMixin, set by init_mixin()",
    "allocate_memory": "LSTMWrapper",
}


def fast_without_biases(env: Environment, **options: Any) -> Fast:
    """Fast with LSTM biases of 0: with its own 1 + 1, saturated gates nearly hide a cue from the second layer."""
    agent = Fast(env, **options)
    for name, parameter in agent.lstm.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    return agent


def agent_maker(name: str, env: Environment) -> Callable[..., Any]:
    """The class or function named by `TrainConfig.agent`; "auto" is Fast for tokens, VectorAgent for the rest."""
    if name != "auto":
        return import_object("agent", name)
    if isinstance(env.source, MemoryEnvironment):
        return fast_without_biases
    space = env.single_observation_space
    tokens = space.dtype == torch.uint8 and len(space.shape) == 2 and space.shape[1] == 3
    return Fast if tokens else VectorAgent


def make_agent(config: TrainConfig, env: Environment, make: Callable[..., Any] | None = None) -> MettaAgent:
    """A MettaAgent around `make(env)`, or the agent that `config` names, initialized to `env` and checked.

    Passes only mixin parameters that differ from TrainConfig's defaults. Raises TypeError or ValueError, which says
    what the agent lacks.
    """
    make = make or agent_maker(config.agent, env)
    names, default = ("clip_range", "clip_mode", "analyze_weights_interval"), TrainConfig()
    options = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    if isinstance(make, nn.Module):
        raise TypeError(f"agent: got a {type(make).__name__}, expected a class or function that makes one of `env`")
    called = f"{getattr(make, '__name__', make)}({', '.join(['env', *options])})"
    require_call("agent", make, f"one that takes {called}; **kwargs go to extract_mixin_params", env, **options)
    policy = make(env, **options)
    if not isinstance(policy, nn.Module):
        raise TypeError(f"agent: got {describe(policy)} from {called}, expected a torch.nn.Module")
    for name, source in METHODS.items():
        if not hasattr(policy, name):
            raise TypeError(f"agent: got {type(policy).__name__} without {name}, expected a subclass of {source}")
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(f"agent: got {type(policy).__name__} without a parameter to train, expected at least one")
    if getattr(policy, "action_format", "pair") != "pair":
        raise ValueError(
            f"agent: got action_format={policy.action_format!r}, expected 'pair', as environments take them"
        )
    agent = MettaAgent(env, policy, env.device)
    agent.initialize_to_environment(env.features, env.action_names, env.max_action_args, env.device)
    agent.policy.allocate_memory(env.num_envs)
    if getattr(policy, "obs_shape", ()) is None:
        policy.obs_shape = env.single_observation_space.shape
    _check_outputs(agent, env)
    return agent


def _check_outputs(agent: MettaAgent, env: Environment) -> None:
    """Evaluate an action on zero observations; draws no random numbers and leaves the memory unchanged."""
    space, rows, kind = env.single_observation_space, env.num_envs, type(agent.policy).__name__
    observations = torch.zeros(rows, *space.shape, dtype=space.dtype, device=env.device)
    start = torch.zeros(rows, dtype=torch.bool, device=env.device)
    memory = (agent.policy.lstm_h[0], agent.policy.lstm_c[0])
    td = one_step_segments(observations, memory, {"dones": start, "truncateds": start})
    agent.eval()
    try:
        with torch.no_grad():
            out = agent(td, action=torch.zeros(rows, 1, 2, dtype=torch.int32, device=env.device))
        sizes = {name: out[name].numel() for name in ("act_log_prob", "entropy", "value")}
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"agent: got an error from {kind} for {describe(td['env_obs'])} with an action, expected what "
            f"handle_training_mode returns: {first_line(error)}"
        ) from error
    agent.train()
    if set(sizes.values()) != {rows}:
        raise ValueError(f"agent: got {sizes} elements from {kind} for {rows} steps, expected one each per step")


def one_step_segments(observations: Tensor, memory: tuple[Tensor, Tensor], starts: dict[str, Tensor]) -> TensorDict:
    """The agent's training inputs for segments of one step: observations [b, ...] and the LSTM state before them."""
    entries = {name: value.unsqueeze(1) for name, value in {"env_obs": observations, **starts}.items()}
    h, c = (part.transpose(0, 1) for part in memory)
    return TensorDict({**entries, "lstm_h": h, "lstm_c": c}, batch_size=observations.shape[:1])


def interface(agent: MettaAgent, env: Environment) -> dict[str, Any]:
    """The actions and features recorded in a checkpoint."""
    return {
        "action_names": list(env.action_names),
        "max_action_args": list(env.max_action_args),
        "feature_mapping": agent.get_original_feature_mapping(),
    }
