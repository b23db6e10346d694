"""`--cuda-graphs`: a run whose steps are replayed equals one without graphs.

A recorder stands in for CUDA: a capture notes every operator with its arguments and leaves no other trace, and a replay
runs these operators on the same memory. So a number, a branch or a tensor that changes after the capture shows.
"""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metta_fastagent.train import graphs, ranks
from metta_fastagent.train.checkpoint import save_checkpoint
from metta_fastagent.train.config import TrainConfig
from metta_fastagent.train.environments.memory import MemoryEnvironment
from metta_fastagent.train.evaluate import load_agent
from metta_fastagent.train.graphs import WARM_UPS, Captured
from metta_fastagent.train.run import resumed_config
from metta_fastagent.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
# learning rates that float32 holds exactly
SMALL = {"num_envs": 8, "segment_length": 6, "minibatches": 2, "steps": 8 * 6 * 8, "lr": 2**-11, "anneal_lr": 1.0}


def tensors(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def place(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name.split("::")[1]
        assert name not in READS, f"{name}: reads the device"
        assert name != "index" or not any(each.dtype == torch.bool for each in tensors(args[1]))
        for each in tensors(args, kwargs):
            if place(each) not in self.made:
                memory = each.untyped_storage()
                if place(each) not in self.before:
                    self.before[place(each)] = memory, memory.clone()
        results = operator(*args, **kwargs)
        known = {place(each) for each in tensors(args, kwargs)}
        fresh = [each if place(each) not in known else None for each in tensors(results)]
        self.made |= {place(each) for each in fresh if each is not None}
        self.record.append((operator, args, kwargs, fresh))
        return results

    @contextmanager
    def capture(self):
        self.record, self.made, self.before, random = [], set(), {}, torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(random)
        with torch.no_grad():
            for memory, bytes_before in self.before.values():
                memory.copy_(bytes_before)
            # a capture computes nothing
            for made in tensors([fresh for *_, fresh in self.record]):
                made.fill_(77)

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, fresh in self.record:
            for kept, value in zip(fresh, tensors(operator(*args, **kwargs)), strict=True):
                if kept is not None:
                    kept.copy_(value)


@pytest.fixture
def captures(monkeypatch):
    """torch.cuda as graphs.py uses it; the list of the captured graphs."""
    made = []

    def graph(recorder, stream):
        made.append(recorder)
        return recorder.capture()

    stream = SimpleNamespace(device=None, wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        CUDAGraph=Recorder,
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=nullcontext,
        graph=graph,
    )
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda, empty_like=torch.empty_like, clone=torch.clone))
    return made


class SometimesValid(MemoryEnvironment):
    """Leaves steps out of the update, from the third rollout on."""

    count = 0

    def step(self, actions):
        step = super().step(actions)
        self.count += 1
        return step if self.count <= 12 else step._replace(valid=torch.arange(len(actions)) % 3 > 0)


class AsOnCuda(Trainer):
    """Evaluates the last observations of all rows, as on devices whose values are not read."""

    def _bootstrap_values(self, step):
        device, self.device = self.device, torch.device("meta")
        try:
            return super()._bootstrap_values(step)
        finally:
            self.device = device


def trainer(cuda_graphs: bool, make_env=None, **changes) -> Trainer:
    config = TrainConfig.for_environment("memory", **{**SMALL, **changes})
    # the config refuses it on the CPU
    object.__setattr__(config, "cuda_graphs", cuda_graphs)
    return AsOnCuda(config, make_env or partial(MemoryEnvironment, room_size=2, delay=1, time_limit=4))


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "second" not in name}


def assert_same(ours: Trainer, theirs: Trainer) -> None:
    expected = theirs.agent.state_dict()
    for name, value in ours.agent.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for ours_part, theirs_part in zip(ours.memory(), theirs.memory(), strict=True):
        assert torch.equal(ours_part, theirs_part)
    assert torch.equal(ours.experience.actions, theirs.experience.actions)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_range": 0.05, "l2_init_coef": 0.1, "accumulate": 2},
        {"target_kl": 1e-6, "epochs": 3},
        {"make_env": SometimesValid},
    ],
    ids=str,
)
def test_a_replayed_run_equals_one_without_graphs(captures, changes):
    rows, made = [], []
    for cuda_graphs in (False, True):
        made.append(trainer(cuda_graphs, **changes))
        made[-1].run(rows.append)
    plain, replayed = rows[:8], rows[8:]
    for ours, theirs in zip(replayed, plain, strict=True):
        assert without_times(ours) == pytest.approx(without_times(theirs), rel=0, abs=0, nan_ok=True)
        assert ours["learning_seconds"] > 0
    assert_same(*made)
    assert len(captures) == (4 if "make_env" in changes else 3)


def test_a_resumed_run_captures_again_and_equals_the_whole_run(captures):
    whole = trainer(False)
    whole.run(lambda row: None)
    first = trainer(True)
    for _ in range(4):
        first.train_update()
    state = copy.deepcopy(first.state_dict())
    first.train_update()
    for resumed in (first, trainer(True)):
        resumed.load_state_dict(copy.deepcopy(state))
        resumed.run(lambda row: None)
        assert_same(resumed, whole)
    assert len(captures) == 3 * 3


def test_a_checkpoint_with_graphs_resumes_without_them_and_the_other_way(captures):
    states = []
    for cuda_graphs in (True, False):
        made = trainer(cuda_graphs)
        made.train_update()
        states.append(made.state_dict())
    made = [trainer(cuda_graphs) for cuda_graphs in (False, True)]
    for each, state in zip(made, states, strict=True):
        each.load_state_dict(state)
        each.run(lambda row: None)
        assert each.optimizer.param_groups[0]["capturable"] == each.config.cuda_graphs
    assert_same(*made)


def test_each_call_does_the_work_once_and_returns_new_tensors(captures):
    total, calls = torch.zeros(3), []

    def add(values, factor):
        calls.append(values)
        total.add_(values * factor)
        return total * 2, total + 1

    step, results = Captured(add), []
    for number in range(WARM_UPS + 4):
        results.append(step(torch.full((3,), 2.0**number), torch.tensor(3.0)))
        assert torch.equal(total, torch.full((3,), 3.0 * (2 ** (number + 1) - 1)))
    for number, (doubled, increased) in enumerate(results):
        expected = 3.0 * (2 ** (number + 1) - 1)
        assert (doubled == 2 * expected).all() and (increased == expected + 1).all()
    assert len(calls) == WARM_UPS + 1 and len(captures) == 1


def test_a_read_of_the_device_is_found(captures):
    step = Captured(lambda values: values * values.sum().item())
    for _ in range(WARM_UPS):
        step(torch.ones(2))
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        step(torch.ones(2))


def test_graphs_need_cuda_and_one_process(monkeypatch):
    with pytest.raises(ValueError, match="cuda_graphs: got True with device cpu, expected a CUDA device"):
        TrainConfig(cuda_graphs=True)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="cuda_graphs: got True with 2 ranks, expected a single process"):
        trainer(True)


def test_a_resumed_run_may_turn_graphs_off_with_the_device():
    saved = TrainConfig().to_dict() | {"device": "cuda", "cuda_graphs": True}
    assert not resumed_config(saved, {"device": "cpu", "cuda_graphs": False}).cuda_graphs


def test_the_agent_of_a_run_with_graphs_acts_on_the_cpu(tmp_path):
    state = trainer(False, MemoryEnvironment).state_dict()
    state["config"] |= {"device": "cuda", "cuda_graphs": True}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    _, env, config = load_agent(tmp_path / "checkpoint.pt")
    assert (env.device.type, config.device, config.cuda_graphs) == ("cpu", "cpu", False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [{}, {"clip_range": 0.05, "l2_init_coef": 0.1, "accumulate": 2}], ids=str)
def test_a_run_on_cuda_equals_one_without_graphs(monkeypatch, changes):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    made = [trainer(cuda_graphs, device="cuda", **changes) for cuda_graphs in (True, False)]
    for _ in range(2):
        ours, theirs = (without_times(each.train_update()) for each in made)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)
    ours, theirs = (dict(each.agent.named_parameters()) for each in made)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
