"""A small recurrent PPO trainer on top of the package: `python -m metta_fastagent.train --help`."""

from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.train.cli import train
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments import Step, VectorEnvironment
from metta_fastagent.train.evaluate import load_agent

__all__ = ["Step", "TrainConfig", "VectorAgent", "VectorEnvironment", "load_agent", "train"]
