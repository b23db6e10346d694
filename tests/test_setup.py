"""The set-up behind `make`, without network: most tests run tools/setup.sh with a stand-in for Python, venv and pip."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import metta_fastagent

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

# `-m venv` copies it, with a file beside it for each package; pip fails on the extras in PIP_FAILS.
PYTHON = """#!/usr/bin/env bash
here="$(dirname "$0")"
case "$1 $2" in
  "-m venv") [ -z "$VENV_FAILS" ] || { echo "$VENV_FAILS"; exit 1; }
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"
    cp "$0" "$3/bin/python"; touch "$3/bin/pip"; [ -z "$TORCH" ] || touch "$3/bin/torch" ;;
  "-m pip") [ "$3" = show ] && { echo "Requires: filelock, sympy"; exit; }
    echo "$*" >> LOG; [[ -z "$PIP_FAILS" || "$*" != *"$PIP_FAILS"* ]] || exit 1; touch "$here/torch" ;;
  *find_spec*) module="${2##*find_spec(\\'}"; [ -e "$here/${module%%\\'*}" ] ;;
  *version_info*) [ -z "$TOO_OLD" ] && echo "$0" ;;
  *"m.version"*) echo "$TORCH" ;;
  *torch*) [ -z "$TORCH" ] || echo /folder/of/torch ;;
esac
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what the set-up reads, and a function that runs it: exit status, messages and pip's new calls."""
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    log = tmp_path / "log"
    log.touch()
    (tmp_path / "python").write_text(PYTHON.replace("LOG", str(log)))
    (tmp_path / "python").chmod(0o755)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)

    def set_up(extras="triton,train", optional="", python=tmp_path / "python", **variables):
        before = len(log.read_text().splitlines())
        command = ["bash", str(tmp_path / "tools" / "setup.sh"), str(python), ".venv", extras, optional]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        calls = log.read_text().splitlines()[before:]
        return done.returncode, done.stderr, [call.rpartition(" -e ")[2] for call in calls]

    return tmp_path, set_up


def test_second_call_does_nothing(project):
    _, set_up = project
    status, messages, installed = set_up(optional="mettagrid")
    assert (status, installed) == (0, [".[train,triton,mettagrid]"])
    assert messages.count("WARNING: pip may fetch torch with CUDA now, several gigabytes") == 1
    assert set_up(optional="mettagrid") == (0, "", [])


def test_more_extras_are_added_to_those_installed(project):
    _, set_up = project
    set_up("triton,train")
    status, messages, installed = set_up("triton,train,test", "mettagrid")
    assert (status, installed) == (0, [".[test,train,triton,mettagrid]"])
    assert "making" not in messages and "WARNING" not in messages
    assert set_up("train") == set_up("test,triton", "mettagrid") == (0, "", [])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again(project, name):
    folder, set_up = project
    set_up("triton,test")
    (folder / name).write_text((folder / name).read_text() + "# changed\n")
    status, messages, installed = set_up("triton")
    assert (status, installed) == (0, [".[test,triton]"]) and "making" not in messages
    assert set_up("triton,test") == (0, "", [])


@pytest.mark.parametrize("missing", ["python", "pip"])
def test_broken_environment_is_made_again(project, missing):
    folder, set_up = project
    set_up()
    (folder / ".venv" / "bin" / missing).unlink()
    (folder / ".venv" / "left-over").touch()
    status, messages, installed = set_up()
    assert (status, installed) == (0, [".[train,triton]"]) and "making .venv" in messages
    assert not (folder / ".venv" / "left-over").exists()


def test_failing_pip_is_tried_again(project):
    folder, set_up = project
    status, messages, _ = set_up(PIP_FAILS="train")
    assert status == 1 and messages.endswith("setup: pip failed, see above: remove the cause and run make again\n")
    assert (folder / ".venv" / "setup-stamp").read_text().startswith("made\n")
    status, messages, installed = set_up()
    assert (status, installed) == (0, [".[train,triton]"]) and "making" not in messages


def test_optional_extra_that_fails_is_left_out_once(project):
    _, set_up = project
    status, messages, installed = set_up("test", "mettagrid", PIP_FAILS="mettagrid]")
    assert (status, installed) == (0, [".[test,mettagrid]", ".[test]"])
    assert "WARNING: mettagrid did not install" in messages
    assert set_up("test", "mettagrid") == (0, "", [])
    status, messages, _ = set_up("mettagrid", PIP_FAILS="mettagrid")
    assert status == 1 and "pip failed" in messages


@pytest.mark.parametrize(
    ("python", "variables", "expected"),
    [
        (None, {"TOO_OLD": "1"}, "Python >= 3.11 is needed, .* is older or does not run: pass PYTHON="),
        ("no-such-python", {}, "Python >= 3.11 is needed, 'no-such-python' is older or does not run: pass PYTHON="),
        (None, {"VENV_FAILS": "first\nno ensurepip"}, r"venv failed \(no ensurepip\): install it \(python3-venv"),
    ],
)
def test_unusable_python_is_named_in_one_line(project, python, variables, expected):
    folder, set_up = project
    status, messages, installed = set_up(python=python or folder / "python", **variables)
    assert (status, installed) == (1, [])
    assert re.search(expected, messages.splitlines()[-1])
    assert set_up()[0] == 0


def test_folder_of_someone_else_is_left_alone(project):
    folder, set_up = project
    (folder / ".venv").mkdir()
    (folder / ".venv" / "pyvenv.cfg").touch()
    status, messages, installed = set_up()
    assert (status, installed) == (1, []) and ".venv was not made by make: remove it, or pass VENV=" in messages
    assert os.listdir(folder / ".venv") == ["pyvenv.cfg"]


@pytest.mark.parametrize("version", [PINS["torch"] + "+cu130", "9.1.0"])
def test_torch_is_reused(project, version):
    folder, set_up = project
    status, messages, _ = set_up(TORCH=version)
    assert status == 0 and "reusing torch of /folder/of/torch" in messages and "WARNING" not in messages
    (pth,) = (folder / ".venv").rglob("*.pth")
    assert pth.read_text() == "/folder/of/torch\n"
    used = re.search(r"-c (\S+) ", (folder / "log").read_text())
    assert used is not None
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (folder / used.group(1)).read_text(), re.MULTILINE))
    if version == "9.1.0":
        for name in ("triton", "filelock", "sympy"):
            assert name in PINS and name not in pins
        assert pins == {name: PINS[name] for name in pins} | {"torch": version}
    else:
        assert pins == PINS


def test_real_environment_sees_the_torch_of_a_virtual_environment_and_pip_fails(project, monkeypatch):
    folder, set_up = project
    packages = folder / "packages"
    (packages / "torch-9.1.0.dist-info").mkdir(parents=True)
    (packages / "torch-9.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.1.0\n")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("__version__ = '9.1.0'\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "outer"], check=True)
    (site_packages,) = (folder / "outer").glob("lib/python*/site-packages")
    for path in packages.iterdir():
        path.rename(site_packages / path.name)
    status, messages, _ = set_up(
        python=folder / "outer" / "bin" / "python", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull
    )
    assert status == 1 and messages.endswith("setup: pip failed, see above: remove the cause and run make again\n")
    assert f"reusing torch of {site_packages}" in messages
    seen = subprocess.run(
        [folder / ".venv/bin/python", "-c", "import torch; print(torch.__file__)"], capture_output=True
    )
    assert seen.stdout.decode().startswith(str(site_packages))
    assert "torch==9.1.0" in (folder / ".venv" / "constraints.txt").read_text()


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


RUN = '".venv/bin/python" -m'
BUILD = f"{RUN} metta_fastagent build --quiet || true"


def test_make_train(make):
    assert make("train", "PYTHON=python3.12") == [
        'bash tools/setup.sh "python3.12" ".venv" triton,train',
        BUILD,
        f"{RUN} metta_fastagent.train",
    ]
    setup, _, train = make("train", "ENV=mettagrid", "DEVICE=cuda", "SEED=3", "OUT=a b", "ARGS=--lr 1")
    assert setup.endswith(" triton,train,mettagrid")
    assert train == f'{RUN} metta_fastagent.train --env "mettagrid" --device "cuda" --seed "3" --out "a b" --lr 1'


def test_make_bench_and_gpu(make, tmp_path):
    assert make("bench", "QUICK=1", "OUT=a b", "ARGS=--only clip")[1:] == [
        BUILD,
        f'{RUN} benchmarks --quick --out "a b" --only clip',
    ]
    (gpu,) = make("gpu", f"VENV={tmp_path}")
    assert re.fullmatch(r'PYTHON="python3" bash tools/gpu.sh "runs/gpu-[\d-]+"', gpu)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (gpu,) = make("gpu", f"VENV={tmp_path}", "QUICK=1", "OUT=a b", "ARGS=--only tests")
    assert gpu == f'PYTHON="{tmp_path}/bin/python" bash tools/gpu.sh --quick --only tests "a b"'


def test_make_test(make, tmp_path):
    setup, chosen = make("test", "PYTEST_ARGS=-k clip")
    assert setup == 'bash tools/setup.sh "python3" ".venv" triton,train,test,lint mettagrid'
    assert f"{RUN} pytest " in chosen and chosen.endswith(" -k clip")
    *_, kernels, native = make("test")
    assert "TRITON_INTERPRET=1" in kernels and "METTA_FASTAGENT_BACKEND=native" in native and "tests/ops" in native
    # The last step, with a stand-in for the Python that builds (and ends with this status) and runs the tests.
    (tmp_path / "python").write_text(
        '#!/bin/sh\n[ "$3" = build ] && exit "$STATUS"\necho "$METTA_FASTAGENT_BACKEND $2"\n'
    )
    (tmp_path / "python").chmod(0o755)
    outcomes = {}
    for status, ci in (("0", ""), ("3", "true"), ("1", ""), ("1", "true")):
        command = ["sh", "-c", native.replace(".venv/bin/python", str(tmp_path / "python"))]
        done = subprocess.run(command, env=os.environ | {"STATUS": status, "CI": ci}, capture_output=True, text=True)
        outcomes[status, ci] = (done.returncode, done.stdout.strip())
    assert outcomes == {
        ("0", ""): (0, "native pytest"),
        ("3", "true"): (0, ""),
        ("1", ""): (0, ""),
        ("1", "true"): (1, ""),
    }


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
