"""The set-up behind `make`: a real environment without network, the metadata and pins, and the targets' commands."""

import contextlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import tensordict
import torch

import metta_fastagent
from metta_fastagent.runtime import install

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"^([\w.-]+)==(\S+)$", re.MULTILINE)
PINS = dict(PIN.findall((ROOT / "constraints.txt").read_text()))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
TORCH_FOLDER = Path(torch.__file__).parents[1]
PIP_FAILED = "setup: pip failed, see above: remove the cause and run make again"

# Stands for hatchling, which pip would download: an editable install with the requirements of pyproject.toml.
BUILD_BACKEND = """
import pathlib, tomllib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {needed}" for needed in project["dependencies"]]
    for extra, requirements in project["optional-dependencies"].items():
        joined = [f"{needed}{' and' if ';' in needed else ';'} extra == '{extra}'" for needed in requirements]
        lines += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {needed}" for needed in joined)]
    name = f"metta_fastagent-{project['version']}"
    with zipfile.ZipFile(f"{folder}/{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("editable.pth", str(pathlib.Path.cwd()))
        wheel.writestr(f"{name}.dist-info/METADATA", "\\n".join(lines))
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return f"{name}-py3-none-any.whl"
"""


def installed_pins():
    """The pins of constraints.txt with the versions installed here, of which pip has nothing to download."""
    for name in PINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n"


def wheel_of(name, folder):
    """A wheel of an installed package: a new environment of Python 3.11 has an older setuptools than torch needs."""
    package = importlib.metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{package.version}-py3-none-any.whl", "w") as wheel:
        for file in package.files or []:
            if ".." not in file.parts:
                wheel.write(file.locate(), str(file))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project, and a function that sets it up without network: exit status and messages."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "wheels").mkdir()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel_of("setuptools", tmp_path / "wheels")
    # Where torch is that of another environment, the other packages are not beside it.
    beside = Path(tensordict.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", "" if beside == TORCH_FOLDER else str(beside))
    for name in ("tools", "metta_fastagent"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "backend.py").write_text(BUILD_BACKEND)
    (tmp_path / "constraints.txt").write_text("".join(installed_pins()))
    _, _, metadata = (ROOT / "pyproject.toml").read_text().partition("[project]")
    metadata = metadata.replace(
        "[project.optional-dependencies]", "[project.optional-dependencies]\nabsent = ['absent']"
    )
    backend = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n\n[project]"
    (tmp_path / "pyproject.toml").write_text(backend + metadata)

    def set_up(extras, optional="", python=sys.executable):
        command = ["bash", str(tmp_path / "tools" / "setup.sh"), str(python), ".venv", extras, optional]
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}
        done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
        return done.returncode, done.stderr

    return tmp_path, set_up


def test_an_environment_is_made_repaired_and_kept(project):
    folder, set_up = project
    venv, pins = folder / ".venv", folder / "constraints.txt"
    right_pins = pins.read_text()

    # A failure ends with a line that names the remedy, and the next call goes on from there.
    pins.write_text("numpy==0.0\n")
    status, messages = set_up("train")
    assert (status, messages.splitlines()[-1]) == (1, PIP_FAILED)
    assert f"making .venv with {sys.executable}, reusing torch of {TORCH_FOLDER}" in messages
    pins.write_text(right_pins)
    status, messages = set_up("train")
    assert status == 0, messages
    assert "making" not in messages and "WARNING" not in messages

    code = "import metta_fastagent, torch; print(metta_fastagent.__file__, torch.__file__)"
    seen = subprocess.run([venv / "bin" / "python", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert seen.stdout.split() == [str(folder / "metta_fastagent" / "__init__.py"), torch.__file__]
    written = (venv / "setup-stamp").stat().st_mtime_ns
    assert set_up("train") == (0, "")
    assert (venv / "setup-stamp").stat().st_mtime_ns == written

    # Changed requirements install all extras so far again. Next to a torch without a pin, its own requirements decide.
    pins.write_text(re.sub("^torch==.*", "torch==0.1", right_pins, flags=re.MULTILINE))
    status, messages = set_up("test")
    assert status == 0, messages
    assert "installing metta_fastagent with test,train\n" in messages and "making" not in messages
    used = dict(PIN.findall((venv / "constraints.txt").read_text()))
    assert used.pop("torch") == importlib.metadata.version("torch")
    own = {"torch", "triton", "filelock", "sympy"}
    assert own <= PINS.keys() and not own & used.keys()
    assert used.items() <= dict(PIN.findall(right_pins)).items() and "numpy" in used
    assert set_up("train,test") == (0, "")

    # An extra that may be missing is tried once.
    status, messages = set_up("test", "absent")
    assert status == 0 and "WARNING: absent did not install, see above; continuing without it" in messages
    assert set_up("test", "absent") == (0, "")

    # Without a torch, pip would download one: a warning comes first.
    (reused,) = venv.rglob("reused-torch.pth")
    reused.rename(folder / "reused-torch.pth")
    status, messages = set_up("train")
    assert status == 1 and "WARNING: pip may fetch torch with CUDA now, several gigabytes" in messages
    (folder / "reused-torch.pth").rename(reused)

    # A broken environment is made again from nothing.
    (venv / "bin" / "python").unlink()
    (venv / "left-over").touch()
    status, messages = set_up("train")
    assert status == 0, messages
    assert "making .venv" in messages and "with test,train\n" in messages
    assert not (venv / "left-over").exists()
    assert set_up("train") == (0, "")


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_unusable_python_is_named_in_one_line(project, python):
    folder, set_up = project
    expected = (
        f"setup: Python >= 3.11 is needed, '{python}' is older or does not run: pass PYTHON=/path/to/another/python"
    )
    assert set_up("train", python=python) == (1, f"{expected}\n")
    assert not (folder / ".venv").exists()


def test_a_python_without_venv_is_named_in_one_line(project):
    folder, set_up = project
    (folder / "venv.py").write_text("raise SystemExit('first\\nno ensurepip')")
    status, messages = set_up("train", python=sys._base_executable)
    assert status == 1
    assert "venv failed (no ensurepip): install it (python3-venv" in messages.splitlines()[-1]


def test_folder_of_someone_else_is_left_alone(project):
    folder, set_up = project
    (folder / ".venv").mkdir()
    (folder / ".venv" / "pyvenv.cfg").touch()
    status, messages = set_up("train")
    assert status == 1 and ".venv was not made by make: remove it, or pass VENV=" in messages
    assert os.listdir(folder / ".venv") == ["pyvenv.cfg"]


def test_metadata_agrees_with_the_code_and_the_pins():
    assert metta_fastagent.__version__ == PYPROJECT["project"]["version"]
    assert set(EXTRAS["dev"][0].rstrip("]").partition("[")[2].split(",")) == set(EXTRAS) - {"dev"}
    lists = [PYPROJECT["project"]["dependencies"], *(EXTRAS[name] for name in set(EXTRAS) - {"dev"})]
    for requirement in [requirement for requirements in lists for requirement in requirements]:
        pin = re.findall(r"\d+", PINS[re.split(r"[^\w.-]", requirement)[0]])
        for operator, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement.partition(";")[0]):
            assert (list(map(int, pin)) >= list(map(int, bound.split(".")))) is (operator == ">="), requirement


def test_wheel_carries_the_sources_of_the_operators():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["metta_fastagent"], "force-include": {"csrc": "metta_fastagent/csrc"}}


def test_project_names_no_package_registry():
    hosts = ["py" + "pi.org", "python" + "hosted", "download.py" + "torch", "npm" + "js.org", "ana" + "conda.org"]
    pattern = "|".join(map(re.escape, [*hosts, "--index" + "-url", "--extra-index" + "-url"]))
    command = ["git", "grep", "--untracked", "-lE", "-e", pattern]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1:
        pytest.skip("not a git checkout")
    assert done.stdout == ""


@pytest.fixture
def make(monkeypatch):
    """A dry run of make, without the variables of a surrounding make; returns the commands."""
    makes = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL")
    for name in (*makes, "PYTHON", "VENV", "PYTEST_ARGS", "DEVICE", "SEED", "STEPS", "OUT", "RESUME", "ARGS", "QUICK"):
        monkeypatch.delenv(name, raising=False)
    # Shells set ENV for themselves: it must not select the environment to train in.
    monkeypatch.setenv("ENV", "/root/.shrc")

    def dry_run(*arguments):
        result = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return [re.sub(" +", " ", line).strip() for line in result.stdout.replace("\\\n", "").splitlines()]

    return dry_run


RUN = "'.venv/bin/python' -m"
BUILD = f"{RUN} metta_fastagent build --quiet || true"


def test_make_train(make):
    assert make("train", "PYTHON=python3.12") == [
        "bash tools/setup.sh 'python3.12' '.venv' triton,train",
        BUILD,
        f"{RUN} metta_fastagent.train",
    ]
    setup, _, train = make("train", "ENV=mettagrid", "DEVICE=cuda", "SEED=3", "OUT=a b", "ARGS=--lr 1")
    assert setup.endswith(" triton,train,mettagrid")
    for arguments, extras in (("ENV=gym:CartPole-v1",), "gymnasium"), (("ARGS=--tensorboard",), "tensorboard"):
        setup, *_ = make("train", *arguments)
        assert setup.endswith(f" triton,train,{extras}")
    assert train == f"{RUN} metta_fastagent.train --env 'mettagrid' --device 'cuda' --seed '3' --out 'a b' --lr 1"


def test_make_bench_and_gpu(make, tmp_path):
    assert make("bench", "QUICK=1", "OUT=a b", "ARGS=--only clip")[1:] == [
        BUILD,
        f"{RUN} benchmarks --quick --out 'a b' --only clip",
    ]
    (gpu,) = make("gpu", f"VENV={tmp_path}")
    python, out = words_of(gpu, "tools/gpu.sh")
    assert python == "python3" and re.fullmatch(r"runs/gpu-[\d-]+", out)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (gpu,) = make("gpu", f"VENV={tmp_path}", "QUICK=1", "OUT=a b", "ARGS=--only tests")
    assert words_of(gpu, "tools/gpu.sh") == [f"{tmp_path}/bin/python", "--quick", "--only", "tests", "a b"]


# Without "/", as they are names in a folder.
NAMES = [
    "a b",
    'say "hi"',
    "it's",
    "`echo run`",
    "$(echo run)",
    "$HOME",
    "a;b",
    "back\\slash",
    "-x",
    "*",
    "é&|<>(){}[]!~#",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["train", "bench", "gpu"])
def test_a_name_reaches_the_command_as_it_is(make, target, name, tmp_path):
    venv = tmp_path / name
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    commands = make(target, f"OUT={name}", f"PYTHON={name}", f"VENV={venv}")
    module = {"train": "metta_fastagent.train", "bench": "benchmarks", "gpu": "tools/gpu.sh"}[target]
    python, *_, out = words_of(commands[-1], module)
    assert (python, out) == (f"{venv}/bin/python", name)
    if target != "gpu":
        assert words_of(commands[0], "tools/setup.sh")[1:3] == [name, str(venv)]


def words_of(command, program):
    """The Python and the words after `program` that the shell makes of `command`."""
    python, words = command.split(program, 1)
    python = python.removesuffix(" -m ").removesuffix("bash ")
    python = python.removesuffix('PYTHON="$python" ') + "\n" if "$python" in python else f"python={python or '-'}\n"
    script = f"""{python}printf '%s\\0' "$python" {words}"""
    done = subprocess.run(["bash", "-c", script], cwd=ROOT / "docs", capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_make_test_runs_what_was_chosen_or_all_backends(make):
    setup, chosen = make("test", "PYTEST_ARGS=-k clip")
    assert setup == "bash tools/setup.sh 'python3' '.venv' triton,train,test,lint mettagrid"
    assert f"{RUN} pytest " in chosen and chosen.endswith(" -k clip")
    *_, kernels, native = make("test")
    assert "TRITON_INTERPRET=1" in kernels and "METTA_FASTAGENT_BACKEND=native" in native and "tests/ops" in native


# Status of the build (3: no compiler), CI, and the status of make's last step and the tests that it runs.
@pytest.mark.parametrize(
    ("built", "ci", "expected"),
    [(0, "", (0, "native pytest")), (3, "true", (0, "")), (1, "", (0, "")), (1, "true", (1, ""))],
)
def test_a_failed_build_of_the_operators_fails_the_tests_in_ci_only(make, tmp_path, built, ci, expected):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$3" = build ] && exit {built}\necho "$METTA_FASTAGENT_BACKEND $2"\n')
    python.chmod(0o755)
    command = ["sh", "-c", make("test")[-1].replace(".venv/bin/python", str(python))]
    done = subprocess.run(command, env=os.environ | {"CI": ci}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == expected


def test_make_alone_lists_every_target():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    assert all(f"make {target}" in listed for target in targets.group(1).split())


def test_ci_script_is_executable_and_tests_last():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    targets = re.findall(r"^ *make (\S+)", script.read_text(), re.MULTILINE)
    assert targets == ["lint", "sanitize", "test-oldest-triton", "test"]


def test_the_printed_commands_install_what_the_extras_ask_for():
    extras = {requirement.partition(";")[0] for requirements in EXTRAS.values() for requirement in requirements}
    assert set(install.REQUIREMENTS.values()) <= extras


def test_an_install_command_is_one_that_pip_takes(capfd):
    command = [*shlex.split(install.how_to_install("matplotlib")), "--dry-run", "--no-index", "--no-deps"]
    assert command[:4] == [install.this_python(), "-m", "pip", "install"]
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(command, check=True)
    out, err = capfd.readouterr()
    assert "matplotlib" in out + err and "Invalid requirement" not in err


def test_without_pip_the_install_command_is_uvs(monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install.how_to_install("gymnasium").startswith("uv pip install --python ")


def test_the_workflow_tests_the_versions_of_the_table():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tested = set(re.findall(r'torch: "([\d.]+)"', workflow))
    table = set(re.findall(r"^\| (\d[\d.]+) \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE))
    assert tested == table
