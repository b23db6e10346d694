"""Environments and agents of one's own: the protocol's defaults, resume, and one line for each mistake."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from metta_fastagent import LSTMWrapper
from metta_fastagent.agents.vector import VectorAgent
from metta_fastagent.testing import AgentCheckError
from metta_fastagent.train import TrainConfig, cli, load_agent, train
from metta_fastagent.train.checkpoint import load_checkpoint
from metta_fastagent.train.environments import Environment, ProtocolError, make_environment
from metta_fastagent.train.trainer import Trainer

SIZES = {"num_envs": 8, "segment_length": 4, "minibatches": 2}
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class Cue:
    """Shows a cue of three at the first of three steps; naming it at the last pays 1."""

    max_action_args = (2,)

    def __init__(self, num_envs, device):
        self.rows, self.device = num_envs, device
        self.generator = torch.Generator(device)

    def observe(self):
        shown = self.cue if self.time == 0 else torch.full_like(self.cue, 3)
        return nn.functional.one_hot(shown, 4).float()

    def restart(self):
        self.time, self.cue = 0, torch.randint(3, (self.rows,), generator=self.generator)
        return self.observe()

    def reset(self, seed):
        self.generator.manual_seed(seed)
        return self.restart()

    def step(self, actions):
        self.time += 1
        ends = self.time == 3
        rewards = ends * (actions[:, 1] == self.cue).float()
        return self.restart() if ends else self.observe(), rewards, torch.full((self.rows,), ends)


class SavedCue(Cue):
    def state_dict(self):
        return {"time": self.time, "cue": self.cue.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.time, self.cue = state["time"], state["cue"].clone()
        self.generator.set_state(state["generator"])


class Agent(VectorAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, nn.Sequential(nn.Linear(4, 16), nn.ReLU()), 16, **kwargs)


def config(**changes):
    return TrainConfig(**{**SIZES, "steps": 6 * 32, "checkpoint_interval": 3, **changes})


def test_an_own_environment_and_agent_train_and_act(tmp_path, capsys):
    run = train(config(), make_env=Cue, make_agent=Agent, out=tmp_path / "run")
    assert type(run.agent) is Agent and run.evaluation.scripted is None
    assert re.search(
        rf"best +mean return 0.*, 0.* when it was chosen: {tmp_path}/run/best.pt\n", capsys.readouterr().out
    )
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["config"]["env"].endswith("test_own:Cue") and state["config"]["agent"].endswith("test_own:Agent")
    agent, env, _ = load_agent(tmp_path / "run" / "checkpoint.pt", 2, make_env=Cue, make_agent=Agent)
    assert (env.num_envs, agent.policy.num_envs, agent.training) == (2, 2, False)
    for name, value in run.agent.state_dict().items():
        assert torch.equal(agent.policy.state_dict()[name], value), name


def test_names_are_imported_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    sizes = ["--num-envs", "8", "--segment-length", "4", "--minibatches", "2", "--steps", "64"]
    out = ["--quiet", "--out", str(tmp_path / "run")]
    assert cli.main(["--env", "mine:Cue", "--agent", "mine:Agent", *sizes, *out]) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["config"]["agent"] == "mine:Agent"
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run" / "best.pt")]) == 0
    assert capsys.readouterr().out.endswith(" 512 episodes\n")


@pytest.mark.parametrize("quiet", [False, True])
def test_python_prints_progress_unless_it_is_quiet(tmp_path, capsys, quiet):
    run = train(config(steps=32), make_env=Cue, make_agent=Agent, out=tmp_path, **({"quiet": True} if quiet else {}))
    assert capsys.readouterr().out.startswith("100 %, ") != quiet
    (row,) = run.log.rows
    # a segment of four steps ends one episode of three in each row
    assert (row["episodes"], row["mean_length"]) == (8, 3.0)


def test_what_is_left_out_has_defaults():
    env = make_environment(Cue, 4, CPU)
    assert env.action_names == ["action_0"] and env.features == {}
    assert (env.single_observation_space.shape, env.single_observation_space.dtype) == ((4,), torch.float32)
    env.reset(1)
    step = env.step(torch.zeros(4, 2, dtype=torch.int32))
    assert not step.truncations.any() and step.final_observations is None and step.valid is None
    assert env.state_dict() is None and not hasattr(env, "scripted_actions")
    env.close()


def test_a_truncation_without_final_observations_is_worth_nothing():
    class Cut(Cue):
        def step(self, actions):
            observations, rewards, ends = super().step(actions)
            return observations, rewards, torch.zeros_like(ends), ends

    trainer = Trainer(config(), Cut, Agent)
    trainer.collect()
    assert trainer.experience.truncations.any() and not trainer.experience.bootstrap_values.any()


def test_a_resumed_run_of_an_own_environment_equals_the_whole_run(tmp_path):
    own = {"make_env": SavedCue, "make_agent": Agent}
    whole = train(config(), **own, out=tmp_path / "whole")
    train(config(steps=3 * 32), **own, out=tmp_path / "half")
    resumed = train(config(), **own, resume=tmp_path / "half" / "checkpoint.pt")
    assert resumed.trainer.updates == whole.trainer.updates == 6
    for name, value in whole.agent.state_dict().items():
        assert torch.equal(resumed.agent.state_dict()[name], value), name


def test_without_state_dict_a_resumed_run_starts_new_episodes(tmp_path):
    train(config(steps=3 * 32), make_env=Cue, make_agent=Agent, out=tmp_path)
    resumed = train(config(), make_env=Cue, make_agent=Agent, resume=tmp_path / "checkpoint.pt")
    assert resumed.trainer.updates == 6


def test_observations_keep_their_dtype_and_shape():
    class Images(Cue):
        def observe(self):
            return torch.zeros(self.rows, 2, 2, 3, dtype=torch.int16)

    trainer = Trainer(config(), Images)
    assert type(trainer.agent.policy) is VectorAgent
    trainer.train_update()
    assert trainer.experience.observations.dtype == torch.int16
    assert trainer.experience.observations.shape == (8, 4, 2, 2, 3)


@pytest.mark.parametrize("value", [np.zeros(2), np.float64(1), {1, 2}], ids=["array", "number", "set"])
def test_a_state_that_no_checkpoint_can_hold_is_refused_before_training(value):
    class Other(SavedCue):
        def state_dict(self):
            return {"rows": [super().state_dict(), {"kept": value}]}

    with pytest.raises(
        ProtocolError, match=r"state_dict\(\)\['rows'\]\[1\]\['kept'\]: got .*, expected tensors and plain"
    ):
        make_environment(Other, 2, CPU)


class NoReset:
    max_action_args, step = (1,), Cue.step


class NoActions:
    reset, step = Cue.reset, Cue.step


def changed(**members):
    """Cue with other members; functions take (self, value of Cue's method)."""

    def override(name, function):
        return lambda self, *arguments: function(self, getattr(Cue, name)(self, *arguments))

    own = {name: override(name, value) if callable(value) else value for name, value in members.items()}
    return type("Wrong", (Cue,), own)


WRONG_ENVIRONMENTS = {
    "no reset": (NoReset, "environment: got NoReset without reset, expected a method reset(seed) that returns"),
    "no actions": (NoActions, "environment: got NoActions without max_action_args, expected a list with the largest"),
    "no seed": (
        type("NoSeed", (Cue,), {"reset": lambda self: self.restart()}),
        "reset: got <lambda>() (too many positional arguments), expected a method reset(seed)",
    ),
    "float actions": (changed(max_action_args=[0.5]), "max_action_args[0]: got 0.5 (float), expected an integer >= 0"),
    "a pair from reset": (
        changed(reset=lambda self, first: (first, {})),
        "reset: got a tuple of length 2, expected the observations, a tensor [8, ...] on cpu",
    ),
    "other rows": (changed(reset=lambda self, first: first[1:]), "reset: got a float32 tensor of shape [7, 4] on cpu"),
    "one value": (changed(reset=lambda self, first: first[:, 0]), "reset: got a float32 tensor of shape [8] on cpu"),
    "a batch that changes": (
        changed(step=lambda self, step: (step[0][1:], *step[1:])),
        "step: observations: got a float32 tensor of shape [7, 4] on cpu, expected a float32 tensor of shape [8, 4]",
    ),
    "another dtype": (
        changed(step=lambda self, step: (step[0].double(), *step[1:])),
        "step: observations: got a float64 tensor of shape [8, 4] on cpu, expected a float32 tensor of shape [8, 4]",
    ),
    "no tuple": (
        changed(step=lambda self, step: step[0]),
        "step: got a float32 tensor of shape [8, 4] on cpu, expected a",
    ),
    "a pair": (
        changed(step=lambda self, step: step[:2]),
        "step: got a tuple of length 2, expected a tuple of the first 3",
    ),
    "wide rewards": (
        changed(step=lambda self, step: (step[0], step[1].unsqueeze(1), step[2])),
        "step: rewards: got a float32 tensor of shape [8, 1] on cpu, expected a float32 tensor of shape [8] on cpu",
    ),
    "float terminals": (
        changed(step=lambda self, step: (*step[:2], step[2].float())),
        "step: terminals: got a float32 tensor of shape [8] on cpu, expected a bool tensor of shape [8]",
    ),
    "other final observations": (
        changed(step=lambda self, step: (*step, step[2], step[0][:, :2])),
        "step: final_observations: got a float32 tensor of shape [8, 2] on cpu",
    ),
}


@pytest.mark.parametrize(("make_env", "message"), WRONG_ENVIRONMENTS.values(), ids=WRONG_ENVIRONMENTS)
def test_a_wrong_environment_is_one_line(make_env, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", type(sys)("mine"))
    sys.modules["mine"].make_env = lambda num_envs, device: (
        object.__new__(make_env) if make_env in (NoReset, NoActions) else make_env(num_envs, device)
    )
    assert cli.main(["--env", "mine:make_env", "--num-envs", "8", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"python -m metta_fastagent.train: error: {message}"), err
    assert err.count("\n") == 1


class Plain(nn.Module):
    """No mixin."""

    def __init__(self, env):
        super().__init__()


class NoMixin(LSTMWrapper):
    def __init__(self, env):
        super().__init__(env, nn.Linear(1, 1), 4, 4)


class Wide(Agent):
    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        self.policy.actor = nn.Linear(16, 7)


class OtherInput(VectorAgent):
    def __init__(self, env, **kwargs):
        super().__init__(env, nn.Linear(9, 64), **kwargs)


WRONG_AGENTS = {
    "no mixin": (Plain, "agent: got Plain without clip_weights, expected a subclass of PyTorchAgentMixin"),
    "no clip_weights": (NoMixin, "agent: got NoMixin without clip_weights, expected a subclass of PyTorchAgentMixin"),
    "no module": (lambda env: [], "agent: got a list of length 0 from <lambda>(env), expected a torch.nn.Module"),
    "no argument": (lambda: None, "agent: got <lambda>() (too many positional arguments), expected one that takes <la"),
    "actions as indices": (
        lambda env: VectorAgent(env, action_format="index"),
        "agent: got action_format='index', expected 'pair'",
    ),
    "wide logits": (
        Wide,
        "agent: got an error from Wide for a float32 tensor of shape [8, 1, 4] on cpu with an action, expected what "
        "handle_training_mode returns: logits_list: got a float32 tensor of shape [8, 7] on cpu, expected 3 columns",
    ),
    "frozen": (
        lambda env: VectorAgent(env).requires_grad_(False),
        "agent: got VectorAgent without a parameter to train, expected at least one",
    ),
    "other input": (
        OtherInput,
        "agent: got an error from OtherInput for a float32 tensor of shape [8, 1, 4] on cpu with an action",
    ),
}


@pytest.mark.parametrize(("agent", "message"), WRONG_AGENTS.values(), ids=WRONG_AGENTS)
def test_a_wrong_agent_is_one_line(agent, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", type(sys)("mine"))
    sys.modules["mine"].Cue, sys.modules["mine"].agent = Cue, agent
    assert cli.main(["--env", "mine:Cue", "--agent", "mine:agent", "--num-envs", "8", "--quiet"]) == 2
    err = capsys.readouterr().err
    line, *places = err.splitlines()
    assert line.startswith(f"python -m metta_fastagent.train: error: {message}"), err
    assert all(place.startswith("  ") and __file__ in place for place in places) and len(places) <= 1


class Mixed(VectorAgent):
    """Segments whose rows and steps are mixed up."""

    def run_lstm(self, td, hidden, B, TT, training=None):
        return super().run_lstm(td, hidden.view(TT, B, -1).transpose(0, 1).flatten(0, 1), B, TT, training)


def test_the_check_of_the_first_update_sees_the_updates_rows(tmp_path):
    def make_agent(env):
        return Mixed(env, check_first_update=True)

    with pytest.raises(AgentCheckError, match="FAIL  recurrent replay"):
        train(TrainConfig(steps=64, **SIZES), make_env=Cue, make_agent=make_agent, out=tmp_path, quiet=True)


MISTAKEN = {
    "an agent": ({"make_agent": nn.Linear(1, 1)}, TypeError, "agent: got a Linear, expected a class or function that"),
    "a class without rows": (
        {"make_env": Plain},
        TypeError,
        r"env: got Plain\(env\) \(.*\), expected make_env\(num_envs, device\), which makes all rows at once",
    ),
    "one row": (
        {"make_env": lambda rows, device: pytest.importorskip("gymnasium").make("CartPole-v1")},
        ProtocolError,
        r"environment: got one .*, a gymnasium.Env, expected 8 rows, such as gymnasium.vector.SyncVectorEnv",
    ),
}


@pytest.mark.parametrize(("given", "kind", "message"), MISTAKEN.values(), ids=MISTAKEN)
def test_other_objects_than_functions_that_make_them(given, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        train(TrainConfig(steps=64, **SIZES), **{"make_env": Cue, **given}, out=tmp_path)


def test_observations_of_another_layout_are_refused():
    space = SimpleNamespace(shape=(6, 5, 3))
    agent = VectorAgent(SimpleNamespace(single_observation_space=space, max_action_args=[1]))
    agent.activate_actions(["act"], [1])
    with pytest.raises(ValueError, match=r"^env_obs: got .* \[1, 3, 6, 5\] on cpu, expected \[..., 6, 5, 3\] as env"):
        agent(TensorDict({"env_obs": torch.zeros(1, 3, 6, 5)}, batch_size=[1]))


def test_observations_may_be_single_numbers():
    space = SimpleNamespace(shape=())
    agent = VectorAgent(SimpleNamespace(single_observation_space=space, max_action_args=[1]))
    agent.activate_actions(["act"], [1])
    assert agent(TensorDict({"env_obs": torch.zeros(3)}, batch_size=[3]))["actions"].shape == (3, 2)


class Broken(VectorAgent):
    """Fails at `where`, inside the standard library or a library's error handling."""

    where = ""

    def __init__(self, env, **kwargs):
        super().__init__(env, **kwargs)
        if self.where == "construction":
            json.loads("{")

    def forward(self, td, state=None, action=None):
        if self.where == "forward":
            td["nothing"]
        return super().forward(td, state, action)


@pytest.mark.parametrize(("where", "kind"), {"construction": "JSONDecodeError", "forward": "KeyError"}.items())
def test_an_error_of_the_users_code_keeps_its_place(where, kind, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    monkeypatch.setattr(Broken, "where", where)
    assert cli.main(["--env", "mine:Cue", "--agent", "mine:Broken", "--num-envs", "8", "--quiet"]) == 2
    line, place = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m metta_fastagent.train: error: ")
    function = "__init__" if where == "construction" else "forward"
    file, _, rest = place.removeprefix(f"  {kind} at ").rpartition(":")
    assert file == __file__ and rest.endswith(f", in {function}")
    source = Path(__file__).read_text().splitlines()[int(rest.partition(",")[0]) - 1]
    assert ("json.loads" if where == "construction" else 'td["nothing"]') in source


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--env",
            "nowhere:make_env",
            "env: got 'nowhere:make_env' (No module named 'nowhere'), expected package",
        ),
        ("--env", "math:nothing", "env: got 'math:nothing' (module 'math' has no attribute 'nothing'), expected"),
        ("--env", "math:pi", "env: got 'math:pi', which is 3.14"),
        ("--agent", "MyAgent", "agent: got 'MyAgent', expected auto or package.module:MyAgent"),
    ],
)
def test_a_wrong_name_is_one_line(option, value, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([option, value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"python -m metta_fastagent.train: error: {message}") and err.count("\n") == 1, err


def test_other_members_are_the_environments_own():
    env = make_environment(Cue, 4, CPU)
    assert isinstance(env, Environment) and env.rows == 4
    with pytest.raises(AttributeError, match="walls"):
        _ = env.walls


def test_ablations_work_and_are_not_in_the_help():
    text = cli.make_parser().format_help()
    assert "--segment-length" in text and "--zero-segment-state" not in text and "every-step" not in text
    assert cli.make_parser().parse_args(["--zero-segment-state"]).zero_segment_state


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
@pytest.mark.parametrize("shape", [(4,), (5, 6), (3, 5, 6)])
@pytest.mark.parametrize("own", [True, False])
def test_an_encoder_gets_observations_of_their_shape_and_images_from_0_to_1(dtype, shape, own):
    seen = []

    class Image(Cue):
        def observe(self):
            return torch.full((self.rows, *shape), 204).to(dtype)

    class Watched(VectorAgent):
        def __init__(self, env, **kwargs):
            super().__init__(env, nn.Sequential(nn.Flatten(), nn.LazyLinear(16)) if own else None, 16, **kwargs)
            self.policy.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    trainer = Trainer(config(), Image, Watched)
    trainer.train_update()
    rows = {len(observations) for observations in seen}
    assert rows == {8, 4 * 4}
    assert {tuple(observations.shape[1:]) for observations in seen} == {shape if own else (math.prod(shape),)}
    scaled = dtype == torch.uint8 and len(shape) > 1
    # the check of a new agent shows it zeros
    assert all(torch.equal(each, torch.full_like(each, 0.8 if scaled else 204)) for each in seen[1:])
