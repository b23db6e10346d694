"""Invariants of learning: the modes of rollout, evaluation and training, steps that do not count, and bad rewards."""

import numpy as np
import pytest
import torch
from torch import nn

from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.train import TrainConfig, load_agent, train
from metta_fastagent.train.environments import ProtocolError, environment_maker, make_environment
from metta_fastagent.train.evaluate import play, play_worlds, random_policy
from metta_fastagent.train.trainer import Trainer

CPU = torch.device("cpu")
SIZES = {"num_envs": 8, "segment_length": 4, "minibatches": 4, "evaluation_interval": 0}
pytestmark = pytest.mark.usefixtures("one_thread")


class Env:
    """Episodes of 4 steps that pay the parameter; `change` edits the results of each step."""

    max_action_args = (1,)

    def __init__(self, num_envs, device):
        self.rows = num_envs

    def observe(self):
        return torch.full((self.rows, 3), float(self.t))

    def reset(self, seed):
        self.t = 0
        return self.observe()

    def step(self, actions):
        self.t = (self.t + 1) % 4
        step = [self.observe(), actions[:, 1].float(), torch.full((self.rows,), self.t == 0), None, None, None]
        self.change(step)
        return tuple(step)

    def change(self, step):
        pass


class Encoder(nn.Sequential):
    """Notes the mode of each call, and counts calls in buffers: one changed in place, one replaced."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.seen = []
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, observations):
        self.seen.append(self.training)
        self.calls += 1
        self.replaced = self.replaced + 1
        return super().forward(observations)


class Agent(VectorAgent):
    def __init__(self, env, **kwargs):
        encoder = Encoder(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5))
        super().__init__(env, encoder, 16, **kwargs)


def test_a_rollout_is_in_evaluation_mode_and_an_update_in_training_mode():
    trainer = Trainer(TrainConfig(**SIZES), Env, Agent)
    encoder = trainer.agent.policy.policy.encoder
    encoder.seen.clear()
    statistics = encoder[1].running_mean.clone()
    trainer.collect()
    assert encoder.seen == [False] * 4 and torch.equal(encoder[1].running_mean, statistics)
    encoder.seen.clear()
    trainer.train_update()
    assert encoder.seen == [False] * 5 + [True] * 8 and not torch.equal(encoder[1].running_mean, statistics)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_changes_nothing(training):
    trainer = Trainer(TrainConfig(**SIZES), Env, Agent)
    trainer.train_update()
    agent = trainer.agent.policy
    agent.train(training)
    agent.policy.encoder[3].train(not training)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    modes, counts = [module.training for module in agent.modules()], agent.diagnostics()["calls"]
    agent.policy.encoder.seen.clear()
    play_worlds(trainer.agent, make_environment(Env, 8, CPU), trainer.config, worlds=1)
    assert agent.policy.encoder.seen and not any(agent.policy.encoder.seen)
    assert [module.training for module in agent.modules()] == modes and agent.diagnostics()["calls"] == counts
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_an_evaluation_of_a_compiled_agent_leaves_its_memory():
    trainer = Trainer(TrainConfig(**SIZES), Env, lambda env: torch.compile(VectorAgent(env), backend="eager"))
    trainer.collect()
    before = [part.clone() for part in trainer.memory()]
    play_worlds(trainer.agent, make_environment(Env, 4, CPU), trainer.config, worlds=1)
    assert all(map(torch.equal, trainer.memory(), before)) and before[0].any()


def valid_only(rows):
    class Some(Env):
        def change(self, step):
            step[5] = torch.zeros(self.rows, dtype=torch.bool).index_fill(
                0, torch.tensor(rows, dtype=torch.int64), True
            )

    return Some


def test_a_minibatch_without_a_valid_step_changes_nothing():
    config = TrainConfig(**SIZES, l2_init_coef=0.1)
    trainer = Trainer(config, valid_only([]), Agent)
    before = {name: value.clone() for name, value in trainer.agent.state_dict().items() if "calls" not in name}
    row = trainer.train_update()
    after = trainer.agent.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "replaced" not in name)
    assert all(np.isfinite(row[name]) for name in ("policy_loss", "entropy", "grad_norm"))
    # momentum moves no weight in a minibatch that has nothing to learn from
    trainer.train_update()
    assert all(not state for state in trainer.optimizer.state.values())


@pytest.mark.parametrize("minibatches", [1, 8])
def test_a_row_without_a_valid_step_changes_nothing(minibatches):
    """The weights do not depend on what such a row holds."""
    after = []
    for noise in (0.0, 7.0):

        class Idle(valid_only(range(1, 8))):
            def change(self, step, noise=noise):
                super().change(step)
                step[1][0] += noise

        trainer = Trainer(TrainConfig(**SIZES | {"minibatches": minibatches}), Idle)
        trainer.train_update()
        after.append(nn.utils.parameters_to_vector(trainer.agent.parameters()))
    assert torch.equal(*after) and after[0].isfinite().all()


def test_micro_batches_with_different_numbers_of_valid_steps_give_the_gradient_of_the_whole():
    after = []
    for accumulate in (1, 2, 4):
        config = TrainConfig(**SIZES | {"minibatches": 1, "accumulate": accumulate})
        trainer = Trainer(config, valid_only([0, 1, 5]))
        trainer.train_update()
        after.append(nn.utils.parameters_to_vector(trainer.agent.parameters()))
    torch.testing.assert_close(after[1], after[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after[2], after[0], rtol=1e-3, atol=1e-5)


def test_a_reward_of_a_step_that_is_not_valid_does_not_count():
    class Paid(valid_only([1])):
        def change(self, step):
            super().change(step)
            step[1] = torch.ones(self.rows)

    env = make_environment(Paid, 2, CPU)
    assert play(env, random_policy(env, torch.Generator()), 0, 16).tolist() == [0, 4]


def with_results(**changes):
    class Changed(Env):
        def change(self, step):
            for name, value in changes.items():
                step[("observations", "rewards").index(name)][2] = value

    return Changed


BAD_RESULTS = [
    (
        {"rewards": float("nan")},
        "step: rewards: got nan in row 2, step 1 of 4 of this rollout, expected finite numbers",
    ),
    ({"rewards": float("inf")}, "step: rewards: got inf in row 2, step 1 of 4"),
    ({"rewards": -1e30}, "step: rewards: got -1.0000000150474662e+30 in row 2, step 1 of 4"),
    ({"observations": float("nan")}, "step: observations: got NaN or infinity in row 2, expected finite numbers"),
    ({"observations": -float("inf")}, "step: observations: got NaN or infinity in row 2, expected finite numbers"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RESULTS)
def test_a_result_that_is_no_number_is_named(changes, message):
    trainer = Trainer(TrainConfig(**SIZES), with_results(**changes))
    before = nn.utils.parameters_to_vector(trainer.agent.parameters()).clone()
    with pytest.raises(ProtocolError) as raised:
        trainer.train_update()
    assert str(raised.value).startswith(message)
    assert torch.equal(nn.utils.parameters_to_vector(trainer.agent.parameters()), before)


def test_a_bad_reward_in_evaluation_is_named():
    env = make_environment(with_results(rewards=float("nan")), 4, CPU)
    with pytest.raises(ProtocolError, match="step: rewards: got a sum of nan in row 2"):
        play(env, random_policy(env, torch.Generator()), 0, 16)


class Endless(Env):
    def change(self, step):
        step[2][1] = False


def test_an_evaluation_that_is_cut_says_so(capsys):
    for make_env, limit, said in (
        (Env, 16, ""),
        (Env, 4, ""),
        (Env, 3, "note: 2 of 2 "),
        (Endless, 32, "note: 1 of 2 "),
    ):
        env = make_environment(make_env, 2, CPU)
        play(env, random_policy(env, torch.Generator()), 0, limit)
        err = capsys.readouterr().err
        assert bool(err) == bool(said) and said in err and err.count("\n") == bool(said)


def settings():
    return {
        "threads": torch.get_num_threads(),
        "subnormal": bool(torch.tensor(1e-40) * 1 != 0),
        "numpy": float(np.float32(1e-40) * np.float32(1)) != 0,
        "tf32": torch.backends.cudnn.allow_tf32,
        "generator": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("make_env", [Env, with_results(rewards=float("nan"))])
def test_a_library_call_leaves_the_process_as_it_found_it(flushed, make_env, tmp_path, capsys):
    torch.set_flush_denormal(flushed)
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = flushed
    try:
        before = settings()
        config = TrainConfig(steps=32, **SIZES)
        try:
            train(config, make_env=make_env, out=tmp_path / "run")
        except ProtocolError:
            assert make_env is not Env
            config = None
        assert settings() == before
        if config:
            load_agent(tmp_path / "run" / "checkpoint.pt", make_env=Env)
            assert settings() == before
    finally:
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["memory", "gym"])
def test_an_agent_of_the_default_dtype_trains(dtype, name, tmp_path, capsys):
    """The trainer's numbers are float32, whatever torch's default dtype is."""
    make_env = None
    if name == "gym":
        pytest.importorskip("gymnasium")
        make_env = environment_maker("gym:CartPole-v1")
    torch.set_default_dtype(dtype)
    try:
        run = train(TrainConfig(steps=64, **SIZES), make_env=make_env, out=tmp_path)
        assert {value.dtype for value in run.agent.parameters()} == {dtype}
        assert run.trainer.experience.values.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
