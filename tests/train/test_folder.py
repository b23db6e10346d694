"""The folder of a run: nothing that a run has written is lost, and no file outside of it is touched."""

import contextlib
import csv
import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metta_fastagent.train import TrainConfig, cli, train
from metta_fastagent.train import folder as run_folder
from metta_fastagent.train import run as train_run
from metta_fastagent.train.checkpoint import load_checkpoint, save_checkpoint
from metta_fastagent.train.report import Log
from metta_fastagent.train.trainer import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--quiet", "--num-envs", "8", "--segment-length", "6", "--minibatches", "2", "--evaluation-interval", "0"]
UPDATE_STEPS = 48
# all files of a run, each of which makes a folder used
FILES = ("checkpoint.pt", "best.pt", "log.csv", "weight_metrics.jsonl", "learning_curve.png", "tensorboard")


@pytest.fixture(autouse=True)
def short_final_evaluation(monkeypatch):
    played = {name: [torch.ones(2), torch.zeros(2)] for name in ("random", "learned", "scripted")}
    monkeypatch.setattr("metta_fastagent.train.evaluate.play_worlds", lambda *_, **__: played)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_updates") / "run"
    options = ["--steps", str(2 * UPDATE_STEPS), "--analyze-weights-interval", "1", "--out", str(folder)]
    assert cli.main([*SMALL, *options]) == 0
    return folder


@pytest.fixture
def finished(run, two_updates):
    """A run of two updates in the folder `run`, whose best agent is that of the second."""
    folder = Path(shutil.copytree(two_updates, "run"))
    change(folder / "checkpoint.pt", "best.pt", best_return=0.5)
    return folder


def change(path, name=None, **counters):
    """Write the checkpoint again with other counters, as `name` beside it."""
    state = load_checkpoint(path)
    config = {key: counters.pop(key) for key in list(counters) if key in state["config"]}
    state["counters"] |= counters
    state["config"] |= config
    save_checkpoint(path.with_name(name or path.name), state)


def contents(folder):
    """Name -> bytes of the files of a run, without those that were set aside."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def updates_of(path):
    with open(path, newline="") as file:
        return [int(row["update"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_new_run_takes_no_folder_that_has_a_file_of_a_run(run, tmp_path, capsys, name, dangling):
    used = tmp_path / "runs" / "memory-seed1"
    used.mkdir(parents=True)
    (used / name).symlink_to("nowhere") if dangling else (used / name).write_text("precious")
    assert run(*SMALL, "--steps", UPDATE_STEPS, "--out", used) == 2
    err = capsys.readouterr().err
    found = "a checkpoint" if name == "checkpoint.pt" else f"{name} of another run"
    assert f"--out: got {used}, which has {found}" in err and err.count("\n") == 1
    assert run(*SMALL, "--steps", UPDATE_STEPS) == 0
    assert contents(used) == ({} if dangling else {name: b"precious"})
    assert updates_of(tmp_path / "runs" / "memory-seed1-2" / "log.csv") == [1]


def test_a_folder_in_which_a_run_is_writing_is_refused(run, finished, capsys):
    held = run_folder.lock(finished)
    before = contents(finished)
    assert run("--quiet", "--resume", finished / "checkpoint.pt", "--steps", 4 * UPDATE_STEPS) == 2
    err = capsys.readouterr().err
    assert "got run, in which another run is writing" in err and err.count("\n") == 1
    assert contents(finished) == before
    # its files can be read
    assert run("--quiet", "--resume", finished / "checkpoint.pt", "--steps", 3 * UPDATE_STEPS, "--out", "more") == 0
    held.close()
    assert run("--quiet", "--resume", finished / "checkpoint.pt", "--steps", 3 * UPDATE_STEPS) == 0


def test_an_empty_folder_in_use_is_passed_over_and_is_free_after_an_error(run, tmp_path, monkeypatch, capsys):
    first = tmp_path / "runs" / "memory-seed1"
    first.mkdir(parents=True)
    with run_folder.lock(first):
        assert run(*SMALL, "--steps", UPDATE_STEPS, "--out", first) == 2
        assert run(*SMALL, "--steps", UPDATE_STEPS) == 0
    assert not contents(first) and contents(tmp_path / "runs" / "memory-seed1-2")

    def fails(*given):
        raise KeyError("no row was written")

    config = TrainConfig(steps=UPDATE_STEPS, num_envs=8, segment_length=6, minibatches=2)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "run_updates", fails)
        with pytest.raises(KeyError):
            train(config, out=first)
    assert train(config, out=first).folder == first


# what is resumed in the folder: (change of it, words of the refusal)
OTHERS = {
    "an older copy": (
        lambda folder: change(folder / "checkpoint.pt", "copy.pt", updates=1),
        "expected one after update 2",
    ),
    "an older best": (
        lambda folder: change(folder / "checkpoint.pt", "best.pt", updates=1),
        "expected one after update 2",
    ),
    "beside another run": (lambda folder: change(folder / "checkpoint.pt", "copy.pt", lr=0.5), "is of another run"),
    "beside another run's best": (
        lambda folder: (
            change(folder / "checkpoint.pt", "best.pt", seed=9),
            change(folder / "checkpoint.pt", "copy.pt"),
        ),
        "whose best.pt is of another run",
    ),
}


@pytest.mark.parametrize(("prepared", "message"), OTHERS.values(), ids=OTHERS)
def test_resuming_never_overwrites_what_it_does_not_continue(run, finished, capsys, prepared, message):
    prepared(finished)
    before = contents(finished)
    resumed = finished / ("copy.pt" if (finished / "copy.pt").exists() else "best.pt")
    assert run("--quiet", "--resume", resumed, "--steps", 3 * UPDATE_STEPS) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert contents(finished) == before
    assert run("--quiet", "--resume", resumed, "--steps", 3 * UPDATE_STEPS, "--out", "own") == 0
    assert contents(finished) == before


def test_a_copy_of_the_newest_checkpoint_resumes_in_its_folder(run, finished, capsys):
    (finished / "copy.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    assert run("--quiet", "--resume", finished / "copy.pt", "--steps", 3 * UPDATE_STEPS) == 0
    assert "note" not in capsys.readouterr().err
    assert updates_of(finished / "log.csv") == [1, 2, 3]


@pytest.mark.parametrize("out", ["run", "other"])
def test_resuming_keeps_the_best_agent_of_a_killed_run(run, finished, monkeypatch, out):
    change(finished / "checkpoint.pt", "best.pt", best_return=0.75, updates=3)
    change(finished / "checkpoint.pt", best_return=0.25)
    best = (finished / "best.pt").read_bytes()
    returns = iter([0.5, 0.75])
    monkeypatch.setattr(
        train_run,
        "play_worlds",
        lambda *_, **options: {"learned": [torch.tensor([next(returns) if "worlds" in options else 0.0])]},
    )
    resumed = ("--quiet", "--resume", finished / "checkpoint.pt", "--evaluation-interval", 1, "--out", out, "--steps")
    assert run(*resumed, 3 * UPDATE_STEPS) == 0
    assert Path(out, "best.pt").read_bytes() == best
    assert load_checkpoint(Path(out, "checkpoint.pt"))["counters"]["best_return"] == 0.75


def test_rows_that_a_resume_drops_are_set_aside_with_a_word(run, finished, capsys):
    log, metrics = finished / "log.csv", finished / "weight_metrics.jsonl"
    later = log.read_bytes() + log.read_bytes().splitlines(keepends=True)[-1].replace(b"2,96", b"3,144", 1)
    log.write_bytes(later + b"4,192,1.")
    metrics.write_text(metrics.read_text() + '{"update": 3, "metrics": []}\n{"upda')
    assert run("--quiet", "--resume", finished / "checkpoint.pt", "--steps", 3 * UPDATE_STEPS) == 0
    err = capsys.readouterr().err
    assert "note: run/log.csv: 1 rows are later than update 2; kept as run/log.csv.1\n" in err
    assert "note: run/weight_metrics.jsonl: 1 rows are later than update 2" in err and err.count("\n") == 2
    assert (finished / "log.csv.1").read_bytes() == later + b"4,192,1."
    assert updates_of(log) == [1, 2, 3]


# file: (damage, words of the note, updates of the log of which a row is kept)
DAMAGE = {
    "columns": ("log.csv", lambda old: b"date,temperature\n1,2\n", "got the columns date temperature", []),
    "empty": ("log.csv", lambda old: b"", "it is empty", []),
    "bytes": ("log.csv", lambda old: b"\x00\xff\xfe" * 99, "got the columns", []),
    "a row of text": ("log.csv", lambda old: old.replace(b"\n1,48", b"\n1,many", 1), "1 lines cannot be read", [2]),
    "a short row": ("log.csv", lambda old: old.replace(b"\n1,48,", b"\n1,", 1), "the first is line 2", [2]),
    "a row without update": ("log.csv", lambda old: old.replace(b"\n1,48", b"\n,48", 1), "the first is line 2", [2]),
    "half a number": ("log.csv", lambda old: old[:-3], "", [1]),
    "metrics": ("weight_metrics.jsonl", lambda old: b"{]\n" + old, "the first is line 1", [1, 2]),
    "metrics of no update": ("weight_metrics.jsonl", lambda old: b"[1]\n" + old, "the first is line 1", [1, 2]),
    "deep metrics": ("weight_metrics.jsonl", lambda old: b"[" * 99_999 + b"\n", "the first is line 1", [1, 2]),
    "best": ("best.pt", lambda old: old[:999], "got a damaged or foreign file", [1, 2]),
    "checkpoint": ("checkpoint.pt", lambda old: old[:999], "got a damaged or foreign file", [1, 2]),
}


@pytest.mark.parametrize("out", ["run", "other"])
@pytest.mark.parametrize(("name", "damage", "note", "updates"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_names_itself_and_does_not_stop_a_resume(
    run, finished, capsys, name, damage, note, updates, out
):
    path = finished / name
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    resumed = finished / ("best.pt" if name == "checkpoint.pt" else "checkpoint.pt")
    assert run("--quiet", "--resume", resumed, "--steps", 3 * UPDATE_STEPS, "--out", out) == 0
    err = capsys.readouterr().err
    assert (f"note: {path}: " in err and note in err and err.count("\n") == 1) if note else not err
    assert updates_of(Path(out, "log.csv")) == [*updates, 3]
    kept = path if out == "other" else path.with_name(f"{name}.1")
    assert not note or kept.read_bytes() == damaged


@pytest.mark.parametrize("name", [*FILES[:-1], ".lock", *(f".{name}.unfinished" for name in FILES[:-1])])
def test_no_file_is_written_through_a_link(run, finished, tmp_path, name):
    victim = tmp_path / "precious"
    victim.write_bytes((finished / name).read_bytes() if (finished / name).exists() else b"")
    before = victim.read_bytes()
    (finished / name).unlink(missing_ok=True)
    (finished / name).symlink_to(victim)
    resumed = finished / ("best.pt" if "checkpoint.pt" in name else "checkpoint.pt")
    status = run("--quiet", "--resume", resumed, "--steps", 3 * UPDATE_STEPS, "--analyze-weights-interval", 1)
    assert status == (2 if name == ".lock" else 0)
    assert victim.read_bytes() == before


def test_a_link_that_appears_during_the_run_is_refused(tmp_path):
    log = Log(tmp_path, COLUMNS)
    (tmp_path / "log.csv").symlink_to(tmp_path / "precious")
    (tmp_path / "weight_metrics.jsonl").symlink_to(tmp_path / "precious")
    for write in (lambda: log.add(dict.fromkeys(COLUMNS, 1.0)), lambda: log.add_weight_metrics(1, [])):
        with pytest.raises(OSError, match=r"log\.csv|weight_metrics"):
            write()
    assert not (tmp_path / "precious").exists()


def test_events_are_not_written_through_a_link(run, finished, tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="an extra")
    (tmp_path / "elsewhere").mkdir()
    (finished / "tensorboard").symlink_to(tmp_path / "elsewhere")
    resumed = ("--quiet", "--resume", finished / "checkpoint.pt", "--steps", 3 * UPDATE_STEPS, "--tensorboard")
    assert run(*resumed) == 2
    assert "tensorboard: got a link" in capsys.readouterr().err and not list((tmp_path / "elsewhere").iterdir())


def full_disk(path, write, size=100):
    """Run `write` with a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match=path.name) as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_a_full_disk_names_the_file_and_keeps_the_old_one(finished):
    before, log = contents(finished), Log(finished, COLUMNS)
    state = load_checkpoint(finished / "checkpoint.pt")
    for size in (0, 100, 30_000, 100_000):
        full_disk(finished / "best.pt", lambda: save_checkpoint(finished / "best.pt", state), size)
    full_disk(finished / "log.csv", lambda: Log(finished, COLUMNS, finished, after=2))
    full_disk(finished / "log.csv", lambda: log.add(dict.fromkeys(COLUMNS, 1.0)))
    assert contents(finished) == before
    full_disk(finished / "weight_metrics.jsonl", lambda: log.add_weight_metrics(3, [{"name": "layer"}] * 999), 10_000)
    assert not list(finished.glob(".*.unfinished"))


def test_the_command_on_a_full_disk_is_one_line(tmp_path):
    command = [sys.executable, "-m", "metta_fastagent.train", *SMALL, "--steps", "48", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limited)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "checkpoint.pt" in done.stderr, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_that_the_output_cannot_encode_is_escaped_and_not_in_a_command(run, monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(output):
        assert run(*SMALL, "--steps", UPDATE_STEPS, "--out", os.fsdecode(b"caf\xe9")) == 0
    output.flush()
    printed = output.buffer.getvalue().decode()
    assert r"caf\udce9/learning_curve.png" in printed and "the folder's name cannot be printed" in printed
    assert " -m metta_fastagent.train" not in printed
