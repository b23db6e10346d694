"""A drop-in PyTorchAgentMixin for reinforcement-learning agents, its LSTM base class, a host and a reference agent."""

from metta_fastagent.action_space import ActionSpace
from metta_fastagent.agents.fast import Fast
from metta_fastagent.host import DistributedMettaAgent, MettaAgent
from metta_fastagent.mixin import PyTorchAgentMixin
from metta_fastagent.ops import lstm_with_resets as lstm
from metta_fastagent.recurrent import LSTMWrapper
from metta_fastagent.runtime.dispatch import backend, use_backend
from metta_fastagent.runtime.explain import explain

__version__ = "0.1.0"

__all__ = [
    "ActionSpace",
    "DistributedMettaAgent",
    "Fast",
    "LSTMWrapper",
    "MettaAgent",
    "PyTorchAgentMixin",
    "__version__",
    "backend",
    "explain",
    "lstm",
    "use_backend",
]
