"""Ctrl-C and SIGTERM: a checkpoint, the plot and one line, whatever the signal has ended before; resume commands."""

import functools
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metta_fastagent.train import TrainConfig, VectorAgent, cli, load_agent, resume, train
from metta_fastagent.train import run as train_run
from metta_fastagent.train.checkpoint import load_checkpoint
from metta_fastagent.train.environments import make_environment
from metta_fastagent.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = TrainConfig(steps=32 * 4, num_envs=4, segment_length=8, minibatches=2, evaluation_interval=0)
OPTIONS = ["--num-envs", "4", "--segment-length", "8", "--minibatches", "2"]
OPTIONS += ["--evaluation-interval", "0", "--checkpoint-interval", "0"]


class Env:
    """Calls `hook(step)` in each step of training."""

    max_action_args = (1,)
    hook = staticmethod(lambda step: None)

    def __init__(self, num_envs, device, length=4):
        self.rows, self.length, self.steps = num_envs, length, 0

    def reset(self, seed):
        return torch.zeros(self.rows, 1)

    def step(self, actions):
        self.steps += 1
        if self.rows == SMALL.num_envs:
            Env.hook(self.steps)
        ends = torch.full((self.rows,), self.steps % self.length == 0)
        return torch.zeros(self.rows, 1), torch.ones(self.rows), ends

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on Env in an empty folder, with the handlers of a new process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own_env", sys.modules[__name__])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield lambda *more: cli.main(["--env", "own_env:Env", "--steps", "128", "--out", "run", *OPTIONS, *more])
    Env.hook = staticmethod(lambda step: None)
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled_in(step, number, error=None):
    """A hook that gets the signal in this step, in which the environment then fails with `error`."""

    def hook(now):
        if now == step:
            signal.raise_signal(number)
            if error is not None:
                raise error

    return staticmethod(hook)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "error", [None, EOFError(), BrokenPipeError(), KeyboardInterrupt(), RuntimeError("worker 3")], ids=repr
)
def test_a_signal_saves_the_updates_that_are_done(run, capfd, number, status, error):
    Env.hook = signalled_in(20, number, error)
    assert run() == status
    err = capfd.readouterr().err
    state = load_checkpoint(Path("run/checkpoint.pt"))
    # the third update of 8 steps is finished if the environment is not gone
    assert state["counters"]["updates"] == (3 if error is None else 2)
    assert (state["ranks"][0]["environment"] is None) == (error is not None)
    assert Path("run/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert err.splitlines()[-2].endswith("python -m metta_fastagent.train: interrupted; resume with:")
    assert ("without the environment's state" in err) == (error is not None) and "Traceback" not in err
    assert run("--resume", "run/checkpoint.pt") == 0
    assert load_checkpoint(Path("run/checkpoint.pt"))["counters"]["updates"] == 4
    for handled, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        assert signal.getsignal(handled) == default


def test_the_signal_may_come_after_the_failure_that_it_causes(run):
    def hook(step):
        if step == 20:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise BrokenPipeError

    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        Env.hook = staticmethod(hook)
        assert run() == 143
    finally:
        signal.signal(signal.SIGALRM, before)
    assert load_checkpoint(Path("run/checkpoint.pt"))["counters"]["updates"] == 2


def test_an_error_without_a_signal_is_itself(run, capsys):
    def hook(step):
        if step == 20:
            raise EOFError("the simulator is gone")

    Env.hook = staticmethod(hook)
    with pytest.raises(EOFError, match="the simulator is gone"):
        run()
    assert not Path("run/checkpoint.pt").exists()


def test_half_an_update_is_not_saved(run, capfd, monkeypatch):
    def failing(*arguments):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("the loss failed")

    monkeypatch.setattr("metta_fastagent.train.ppo.update", failing)
    assert run() == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert "the last update is not saved (RuntimeError in the last update: the loss failed)" in last
    assert last.endswith("no checkpoint saved") and not Path("run/checkpoint.pt").exists()


def test_a_signal_on_a_full_disk_says_so(run, capfd, monkeypatch):
    def full(path, state):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(train_run, "save_checkpoint", full)
    Env.hook = signalled_in(20, signal.SIGTERM, EOFError())
    assert run() == 143
    assert "not saved ([Errno 28] No space left on device: 'run/checkpoint.pt')" in capfd.readouterr().err


def test_the_last_message_has_a_line_of_its_own_on_a_terminal(run, capfd, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    Env.hook = signalled_in(20, signal.SIGINT)
    assert run() == 130
    assert capfd.readouterr().out.endswith("\n")


def test_processes_of_the_environment_do_not_get_ctrl_c():
    context = multiprocessing.get_context("fork")

    def make_env(num_envs, device):
        ours, theirs = context.Pipe()
        process = context.Process(target=blocked_signals, args=(theirs,))
        process.start()
        made = Env(num_envs, device)
        made.blocked = ours.recv()
        process.join()
        return made

    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    blocked = make_environment(make_env, 2, torch.device("cpu")).blocked
    assert signal.SIGINT in blocked and signal.SIGTERM not in blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before


def blocked_signals(connection):
    connection.send(signal.pthread_sigmask(signal.SIG_BLOCK, set()))


WORKERS = """
import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
def make_env(num_envs, device):
    makers = [lambda: gymnasium.make("CartPole-v1")] * num_envs
    return AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_a_checkpoint(tmp_path, number):
    pytest.importorskip("gymnasium", reason="an extra")
    (tmp_path / "workers.py").write_text(WORKERS)
    command = [sys.executable, "-m", "metta_fastagent.train", "--env", "workers:make_env", *OPTIONS]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [*command, "--steps", str(10**9), "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = tmp_path / "run" / "log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        signal.sigtimedwait([], 0.05)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-2].endswith("interrupted; resume with:"), err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["counters"]["updates"] >= 2


class Maker:
    def __call__(self, num_envs, device):
        return Env(num_envs, device)

    def method(self, num_envs, device):
        return Env(num_envs, device)


def local_class():
    class Local(Env):
        pass

    return Local


class Agent(VectorAgent):
    pass


# what the environment is made by, and whether the command can import it, as this file is in no importable package
MADE = {
    "class": Env,
    "lambda": lambda num_envs, device: Env(num_envs, device),
    "partial": functools.partial(Env, length=3),
    "callable object": Maker(),
    "bound method": Maker().method,
    "local class": local_class(),
}


@pytest.mark.parametrize("importable", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_a_resume_command_is_printed_only_if_it_works(run, tmp_path, capfd, monkeypatch, kind, importable):
    monkeypatch.setattr(Env, "__module__", "own_env")
    if importable:
        root = Path(__file__).parents[2]
        monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{tmp_path}")
        (tmp_path / "own_env.py").write_text(Path(__file__).read_text())
        monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / "own_env.py"))
    train(SMALL, make_env=MADE[kind], out="run", quiet=True)
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("resume "))
    if not (kind == "class" and importable):
        assert " -m " not in line and "train(..., resume='run/checkpoint.pt'): env '" in line
        return
    command = line.split(maxsplit=1)[1]
    done = subprocess.run([*shlex.split(command), "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(Path("run/checkpoint.pt"))["counters"]["updates"] == 8


def test_objects_of_the_main_program_have_no_resume_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, made in (("__main__:Env", Env), ("metta_fastagent.train:VectorAgent", Agent)):
        assert "which the command cannot import" in resume.not_importable("env", path, made)
    assert resume.not_importable("agent", "metta_fastagent.train:VectorAgent", VectorAgent) == ""


@pytest.mark.parametrize("name", ["memory", "gym:CartPole-v1", "gym:CartPole", "metta_fastagent.train:VectorAgent"])
def test_names_that_a_new_process_knows(name):
    assert resume.not_importable("env", name) == ""


def test_an_environment_that_only_this_process_has_registered():
    gymnasium = pytest.importorskip("gymnasium", reason="an extra")
    gymnasium.register("OnlyHere-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    assert "cannot be imported" in resume.not_importable("env", "gym:OnlyHere-v0")


def test_a_name_that_looks_like_an_option_resumes():
    command = shlex.split(resume.resume_command(Path("-run/checkpoint.pt")))
    assert cli.make_parser().parse_args(command[3:]).resume == Path("-run/checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["counters"].update(env="x"), r"other counters \(env\)"),
        (lambda state: state["counters"].update(train_update=1), r"other counters \(train_update\)"),
        (lambda state: state["counters"].update(updates="1"), r"other counters \(updates\)"),
        (lambda state: state["counters"].pop("steps"), r"other counters \(steps\)"),
        (lambda state: state["ranks"][0]["rollout"].update(agent=torch.zeros(1)), r"other rollout \(agent\)"),
        (lambda state: state["ranks"][0]["rollout"].update(dones=torch.zeros(9)), r"other rollout \(dones\)"),
        (lambda state: state["initial_weights"].update(forward=torch.zeros(1)), r"other initial_weights \(forward\)"),
        (lambda state: state["initial_weight_magnitudes"].update(x=1.0), r"other initial_weight_magnitudes \(x\)"),
        (lambda state: state.update(counters=[1]), "got an incompatible state"),
        (lambda state: state["ranks"][0].clear(), "got an incompatible state"),
    ],
)
def test_a_checkpoint_sets_nothing_but_its_own_entries(change, message):
    made, resumed = Trainer(SMALL, Env), Trainer(SMALL, Env)
    made.train_update()
    state = made.state_dict()
    change(state)
    before = {name: vars(resumed)[name] for name in ("updates", "steps", "env", "agent", "dones")}
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(state)
    assert all(vars(resumed)[name] is value for name, value in before.items()) and "train_update" not in vars(resumed)


def test_what_is_given_is_not_imported(tmp_path, monkeypatch):
    train(SMALL, make_env=Env, make_agent=Agent, out=tmp_path / "run")
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    load_agent(tmp_path / "run" / "checkpoint.pt", make_env=Env, make_agent=Agent)
