"""What whole steps of the trainer's agents launch: PyTorch operators that are no views, and kernels."""

import functools
import os
from contextlib import nullcontext

import pytest
import torch
from operators_for_tests import FREE, Operators
from torch.nn import functional as F
from torch.nn import utils

from metta_fastagent import use_backend
from metta_fastagent.ops import products
from metta_fastagent.ops.tokens import conv2d
from metta_fastagent.runtime.dispatch import Operator
from metta_fastagent.train import ppo
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.trainer import Trainer

pytestmark = pytest.mark.skipif("EMULATE" not in os.environ, reason="needs EMULATE=sm_90 and a C++ compiler")
SMALL = {"num_envs": 4, "minibatches": 2, "segment_length": 2, "device": "cpu"}
# Of a step of the rollout and of the optimizer.
EXPECTED = {"Fast": (22, 101), "VectorAgent": (10, 56)}


class Recorder(Operators):
    """Operators, a kernel of the package as one, and without a kernel what it is made of."""

    def run(self, operator, *args):
        results = operator._run(*args)
        if operator.cuda is not None:
            self.names.append(operator.name)
        return results


@pytest.fixture
def as_on_cuda(monkeypatch):
    """CPU tensors take the paths of CUDA's: no library for the CPU alone, and one launch for a list of tensors."""

    def convolve(make_grid, given):
        shape = given.weight.shape[1], given.width, given.height
        grid = make_grid(given.tokens, *shape, given.scale, given.weight.dtype, given.x_low)
        return F.relu(F.conv2d(grid, given.weight, given.bias, given.stride))

    monkeypatch.setattr(conv2d, "NATIVE_DTYPES", ())
    monkeypatch.setattr(conv2d, "convolve", convolve)
    monkeypatch.setattr(products, "limits", lambda: products.NEVER)
    monkeypatch.setattr(products, "needs_operator", lambda *args: False)
    monkeypatch.setattr(utils, "clip_grad_norm_", functools.partial(utils.clip_grad_norm_, foreach=True))


def launches(call):
    with pytest.MonkeyPatch.context() as patch, Recorder() as recorder:
        patch.setattr(Operator, "__call__", lambda operator, *args: recorder.run(operator, *args))
        call()
    return [name for name in recorder.names if name not in FREE]


@pytest.mark.parametrize("name", EXPECTED)
def test_launches(name, as_on_cuda):
    env = "memory" if name == "Fast" else "gym:CartPole-v1"
    pytest.importorskip("gymnasium")
    with use_backend("eager"):
        trainer = Trainer(TrainConfig(env=env, **SMALL))
        trainer.collect()
    assert type(trainer.agent.policy).__name__ == name
    given = trainer.learner, trainer.optimizer, trainer.experience, trainer.config, lambda phase: nullcontext()
    optimizer_step = functools.partial(ppo.optimizer_step, *given, torch.arange(2), *torch.zeros(2, 2, 2))
    rollout_step = lambda: trainer._act(trainer.observations, *trainer._episode_starts().values())  # noqa: E731
    found = []
    with use_backend("triton"):
        for step, grad in ((rollout_step, False), (optimizer_step, True)):
            with torch.set_grad_enabled(grad):
                step()
                found.append(launches(step))
    assert tuple(map(len, found)) == EXPECTED[name], "\n".join(map(" ".join, found))
