"""Before the first update the importance ratio of every stored action is 1, on each backend."""

import pytest
import torch
from references import ARITHMETIC, arithmetic

from metta_fastagent import backend, use_backend
from metta_fastagent.ops.lstm import kernels as lstm_kernels
from metta_fastagent.runtime import native as _native
from metta_fastagent.runtime import triton as _triton
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.trainer import Trainer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
built = pytest.mark.skipif(not _native.load(), reason=f"native: {_native.reason()}")
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
# Backend and device.
RUNS = [
    pytest.param(("eager", "cpu"), id="eager on cpu"),
    pytest.param(("native", "cpu"), id="native on cpu", marks=built),
    pytest.param(("triton", "cpu"), id="triton on cpu", marks=interpreted),
    pytest.param(("eager", "cuda"), id="eager on cuda", marks=[pytest.mark.gpu, on_gpu]),
    pytest.param(("triton", "cuda"), id="triton on cuda", marks=[pytest.mark.gpu, on_gpu]),
]


# By the number of multiprocessors, the LSTM kernel takes a batch in blocks of 16 rows or of 32, whose steps multiply as
# those of segments do; in blocks of 16 they multiply otherwise.
@pytest.fixture(params=[1, 132], ids="{} multiprocessors".format)
def multiprocessors(request, monkeypatch):
    monkeypatch.setattr(lstm_kernels, "_multiprocessors", lambda device: request.param)
    return request.param


@pytest.fixture
def blocks(monkeypatch):
    """Rows of a block and steps, of each launch of the LSTM kernel on the whole batch."""
    found, launch_with = [], lstm_kernels.launch_with

    def record(constants, kernel, programs, tensors, numbers):
        steps, rows, _ = numbers
        if rows == 32:
            found.append((constants.values["BLOCK_B"], steps))
        launch_with(constants, kernel, programs, tensors, numbers)

    monkeypatch.setattr(lstm_kernels, "launch_with", record)
    return found


@pytest.fixture(params=ARITHMETIC[:3])
def instructions(request):
    with arithmetic(request.param):
        yield


@pytest.fixture(params=RUNS)
def trainer(request, multiprocessors, monkeypatch):
    """A trainer after its second rollout, whose segments start in the middle of episodes, some of which end."""
    name, device = request.param
    if name != "triton" and multiprocessors > 1:
        pytest.skip("only the kernels depend on the number of multiprocessors")
    # By a batch's size cuDNN may take a convolution that rounds to TF32, or one that does not.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with use_backend(name):
        torch.manual_seed(0)
        config = TrainConfig.for_environment("memory", device=device, num_envs=32, segment_length=12, minibatches=1)
        trainer = Trainer(config)
        # With weights as they start, the state hardly moves the logits.
        with torch.no_grad():
            for parameter in trainer.agent.parameters():
                parameter.mul_(2)
        trainer.collect()
        trainer.collect()
        starts = trainer.experience.dones | trainer.experience.truncateds
        assert starts[:, 1:].any() and not starts[:, 0].all() and trainer.experience.lstm_h.abs().max() > 0.01
        yield trainer


def ratios(trainer, *dropped):
    """exp(new - stored) of the log-probs of every step; `dropped` are entries that the agent does not see."""
    rows = torch.arange(trainer.config.num_envs, device=trainer.device)
    segments = trainer.experience.segments(rows).exclude(*dropped)
    out = trainer.agent(segments, action=trainer.experience.actions)
    return (out["act_log_prob"].detach() - trainer.experience.log_probs).exp()


def test_ratio_is_one_before_the_first_update(instructions, blocks, trainer, multiprocessors):
    assert (ratios(trainer) - 1).abs().max().item() <= 1e-5
    rows = 32 if multiprocessors == 1 else 16
    assert set(blocks) == ({(rows, 1), (rows, 12)} if backend(trainer.device) == "triton" else set())


@pytest.mark.parametrize("dropped", [("lstm_h", "lstm_c"), ("dones", "truncateds")], ids=["zero state", "no resets"])
def test_ratio_is_not_one_without_stored_state_or_without_resets(trainer, dropped):
    assert (ratios(trainer, *dropped) - 1).abs().max().item() > 1e-3
