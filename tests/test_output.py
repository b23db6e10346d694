"""What the commands print: lines that fit 80 columns, commands that a shell takes, and a quiet end without a reader."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metta_fastagent.runtime.output import shell_command, wrapped

LONG = "/" + "x" * 90


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_pipe_gets_whole_lines():
    assert wrapped("word " * 40) == "word " * 40
    assert shell_command(["printf", *("a b",) * 40]) == "printf" + " 'a b'" * 40


def test_lines_fit_80_columns_and_a_longer_path_stands_alone(terminal):
    text = f"error: --out: got {LONG}, expected " + "words " * 40
    lines = wrapped(text).splitlines()
    assert lines[:2] == ["error: --out: got", f"    {LONG},"] and max(map(len, lines[2:])) <= 79
    assert all(line.startswith("    ") for line in lines[1:]) and "".join(lines).split() == text.split()
    quoted = "resume with 'a folder of " + "x " * 30 + "/checkpoint.pt'"
    assert wrapped(quoted).splitlines()[1].strip() == quoted.removeprefix("resume with ")
    assert wrapped("first\nsecond", indent=2) == "first\n  second"


@pytest.mark.parametrize("path", ["run/checkpoint.pt", LONG, f"it's {LONG}", "a " * 50 + "/b"])
def test_a_shell_takes_the_lines_of_a_command(path, terminal):
    words = ["printf", "%s|", "--resume", path, "--steps", "96", *"abcdefghijklmnop" * 4]
    command = wrapped(shell_command(words))
    assert all(len(line) < 80 or line.strip().removesuffix(" \\") == shlex.quote(path) for line in command.splitlines())
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stdout.split("|")[:-1] == words[2:]


@pytest.mark.parametrize("command", ["metta_fastagent", "metta_fastagent.train --steps 1 --out run"])
def test_without_a_reader_the_end_is_quiet(command, tmp_path):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    python = [sys.executable, "-m", *command.split()]
    done = subprocess.run(python, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
