"""The set-up behind `make`: what it reuses, pins, warns of and installs again, with no network and no installation."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import metta_fastagent

ROOT = Path(__file__).resolve().parent.parent

spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
assert spec is not None
assert spec.loader is not None
setup_env = importlib.util.module_from_spec(spec)
# dataclasses look their module up while they are made.
sys.modules["setup_env"] = setup_env
spec.loader.exec_module(setup_env)

Found, Request, SetupError, Stamp = setup_env.Found, setup_env.Request, setup_env.SetupError, setup_env.Stamp

CONSTRAINTS = """\
# comment
torch==2.13.0
tensordict==0.15.3
triton==3.7.1
sympy==1.14.0

pytest==9.2.0
"""
CUDA_TORCH = (
    "sympy>=1.13.3",
    'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"',
    'triton==3.6.0; sys_platform == "linux"',
)
CPU_TORCH = ("filelock", "sympy>=1.13.3")


@pytest.mark.parametrize(
    ("version", "minimum", "expected"),
    [
        ("2.10.0", "2.10", True),
        ("2.13.0+cpu", "2.10", True),
        ("2.9.1", "2.10", False),
        ("2.10.0rc1", "2.10", False),
        ("2.10.0.dev20260101+cu130", "2.10", False),
        ("2.11.0a0+git1234", "2.10", True),
        ("3.0", "2.10.1", True),
        ("2.10", "2.10.0", True),
    ],
)
def test_at_least_compares_releases(version, minimum, expected):
    assert setup_env.at_least(version, minimum) is expected


def test_unreadable_version_is_named():
    with pytest.raises(SetupError, match="'unknown'"):
        setup_env.at_least("unknown", "2.10")


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("torch>=2.10", "torch"),
        ("Typing_Extensions >=4; python_version < '3.12'", "typing-extensions"),
        ("triton (==3.0.0)", "triton"),
        ("pkg[extra]==1", "pkg"),
        ("# torch==1", ""),
        ("--no-binary :all:", ""),
        ("", ""),
    ],
)
def test_requirement_name(requirement, name):
    assert setup_env.requirement_name(requirement) == name


def test_minimum_version_reads_the_dependency():
    text = '[project]\ndependencies = ["torchvision>=9", "torch>=2.10,<3", "numpy"]\n'
    assert setup_env.minimum_version(text, "torch") == "2.10"
    with pytest.raises(SetupError, match="numpy"):
        setup_env.minimum_version(text, "numpy")


def test_pinned_versions_skip_comments_and_ranges():
    assert setup_env.pinned_versions("# a==1\nb==2.0\nC_d == 3\ne>=4\n") == {"b": "2.0", "c-d": "3"}


def test_constraints_stay_as_they_are_without_a_torch_to_reuse():
    assert setup_env.rewrite_constraints(CONSTRAINTS, Found(), "0.10") == CONSTRAINTS


def test_reused_torch_is_held_to_its_exact_version_and_decides_triton():
    found = Found("2.11.0+cu130", CUDA_TORCH)
    lines = setup_env.rewrite_constraints(CONSTRAINTS, found, "0.10").splitlines()
    assert lines == [
        "# comment",
        "torch==2.11.0+cu130",
        "tensordict<=0.15.3",
        'triton==3.6.0; sys_platform == "linux"',
        "",
        "pytest==9.2.0",
    ]


def test_cpu_build_of_the_pinned_torch_keeps_the_pins():
    pins = setup_env.pinned_versions(setup_env.rewrite_constraints(CONSTRAINTS, Found("2.13.0+cpu", CPU_TORCH), "0.10"))
    assert pins == {"torch": "2.13.0+cpu", "tensordict": "0.15.3", "triton": "3.7.1", "pytest": "9.2.0"}


@pytest.mark.parametrize(("triton", "expected"), [("3.5.1", "3.5.1"), (None, None)])
def test_cpu_build_of_another_torch_takes_the_triton_that_is_there(triton, expected):
    found = Found("2.11.0+cpu", CPU_TORCH, triton=triton)
    pins = setup_env.pinned_versions(setup_env.rewrite_constraints(CONSTRAINTS, found, "0.10"))
    assert pins.get("triton") == expected


@pytest.mark.parametrize(
    ("tensordict", "expected"), [("0.12.0", "tensordict==0.12.0"), ("0.9.1", "tensordict<=0.15.3")]
)
def test_tensordict_found_is_held_where_it_is_new_enough(tensordict, expected):
    found = Found("2.11.0", CUDA_TORCH, tensordict=tensordict)
    assert expected in setup_env.rewrite_constraints(CONSTRAINTS, found, "0.10").splitlines()


def test_too_old_torch_is_refused_with_both_versions():
    with pytest.raises(SetupError) as caught:
        setup_env.check_torch("2.4.1+cu121", "2.10")
    message = str(caught.value)
    assert "2.4.1+cu121" in message
    assert "2.10" in message.replace("2.4.1+cu121", "")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        (CUDA_TORCH, ("triton", "test")),
        (CPU_TORCH, ("triton", "test")),
        (("pytorch-triton-rocm==3.6.0",), ("test",)),
        (("triton-rocm==3.7.0",), ("test",)),
    ],
)
def test_triton_is_left_out_where_torch_brings_another_build_of_it(requires, expected):
    assert setup_env.usable_extras(("triton", "test"), Found("2.13.0", requires)) == expected


def test_find_packages_reads_metadata(monkeypatch):
    versions = {"torch": "2.12.0", "tensordict": "0.14.0", "triton": None}
    monkeypatch.setattr(setup_env, "installed_version", versions.get)
    monkeypatch.setattr(setup_env.importlib.metadata, "requires", lambda name: {"torch": ["sympy"]}[name])
    assert setup_env.find_packages() == Found("2.12.0", ("sympy",), "0.14.0", None)


def test_torch_without_metadata_is_an_error_and_not_replaced(monkeypatch, tmp_path):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SetupError, match="no package metadata"):
        setup_env.find_packages()


def test_no_torch_is_found_on_an_empty_path(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert setup_env.find_packages() == Found()


def report(version, requires):
    return {"install": [{"metadata": {"name": "torch", "version": version, "requires_dist": list(requires)}}]}


def test_cuda_build_warns_with_its_version():
    warning = setup_env.download_warning(report("2.13.0", CUDA_TORCH), "linux")
    assert "WARNING: torch 2.13.0" in warning
    assert "gigabytes" in warning


@pytest.mark.parametrize("probe", [None, {}, {"install": []}, {"install": [{"metadata": {"name": "torch"}}]}])
def test_unknown_build_warns_too(probe):
    assert "WARNING: pip fetches torch now" in setup_env.download_warning(probe, "linux")


def test_cpu_build_and_other_systems_do_not_warn():
    assert setup_env.download_warning(report("2.13.0+cpu", CPU_TORCH), "linux") is None
    assert setup_env.download_warning(report("2.13.0", CUDA_TORCH), "darwin") is None


@pytest.mark.parametrize(
    "outcome",
    [
        subprocess.CalledProcessError(2, "pip"),
        subprocess.TimeoutExpired("pip", 1),
        subprocess.CompletedProcess("pip", 0, stdout="no report"),
    ],
)
def test_failed_probe_is_no_report(monkeypatch, tmp_path, outcome):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(setup_env.subprocess, "run", run)
    assert setup_env.probe_torch(tmp_path, tmp_path / "constraints.txt") is None


STAMP = Stamp("python", "origin", "inputs", ("triton", "test"), ("mettagrid",))


@pytest.mark.parametrize(
    ("stamp", "origin", "inputs", "request_", "expected"),
    [
        (STAMP, "origin", "inputs", Request(("test",)), True),
        (STAMP, "origin", "inputs", Request(("triton", "test"), ("mettagrid",)), True),
        (STAMP, "origin", "inputs", Request(("mettagrid",)), False),
        (STAMP, "origin", "inputs", Request(("lint",)), False),
        (STAMP, "origin", "inputs", Request((), ("train",)), False),
        (STAMP, "other", "inputs", Request(("test",)), False),
        (STAMP, "origin", "other", Request(("test",)), False),
        (Stamp("python", "origin"), "origin", "inputs", Request(), False),
        (None, "origin", "inputs", Request(), False),
    ],
)
def test_is_current(stamp, origin, inputs, request_, expected):
    assert setup_env.is_current(stamp, origin, inputs, request_) is expected


def test_stamp_round_trips(tmp_path):
    setup_env.write_stamp(tmp_path, STAMP)
    assert setup_env.read_stamp(tmp_path) == STAMP


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"extras": [], "missing": [], "future": 1}'])
def test_unreadable_stamp_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / setup_env.STAMP).write_text(text)
    assert setup_env.read_stamp(tmp_path) is None


def make_project(root):
    (root / "tools").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2.10", "tensordict>=0.10"]\n')
    (root / "constraints.txt").write_text(CONSTRAINTS)
    (root / "tools" / "setup_env.py").write_text("")
    return root


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "tools/setup_env.py"])
def test_inputs_key_follows_content_and_not_time(tmp_path, name):
    root = make_project(tmp_path)
    before = setup_env.inputs_key(root)
    (root / name).write_text((root / name).read_text())
    assert setup_env.inputs_key(root) == before
    (root / name).write_text((root / name).read_text() + "\n")
    assert setup_env.inputs_key(root) != before


def test_origin_key_follows_place_python_and_torch(monkeypatch, tmp_path):
    keys = {
        setup_env.origin_key(tmp_path, tmp_path / ".venv", Found()),
        setup_env.origin_key(tmp_path, tmp_path / "other", Found()),
        setup_env.origin_key(tmp_path / "moved", tmp_path / ".venv", Found()),
        setup_env.origin_key(tmp_path, tmp_path / ".venv", Found("2.13.0")),
    }
    monkeypatch.setattr(sys, "prefix", "/another/python")
    keys.add(setup_env.origin_key(tmp_path, tmp_path / ".venv", Found()))
    assert len(keys) == 5


class Machine:
    """Stands in for everything that set_up runs, and records it."""

    def __init__(self, monkeypatch, root):
        self.root, self.venv = make_project(root), root / ".venv"
        self.found = Found()
        self.imports = True
        self.failing = set()
        self.probe = report("2.13.0", CUDA_TORCH)
        self.created, self.installed, self.warned = [], [], []
        self.torch = None
        monkeypatch.setattr(setup_env, "find_packages", lambda: self.found)
        monkeypatch.setattr(setup_env, "imports_torch", lambda _: self.imports)
        monkeypatch.setattr(setup_env, "create_venv", self.create_venv)
        monkeypatch.setattr(setup_env, "update_pip", lambda *_: None)
        monkeypatch.setattr(setup_env, "probe_torch", lambda *_: self.probe)
        monkeypatch.setattr(setup_env, "install", self.install)
        monkeypatch.setattr(setup_env, "venv_version", lambda _, name: self.torch if name == "torch" else None)
        monkeypatch.setattr(setup_env, "say", lambda text: self.warned.append(text) if "WARNING" in text else None)

    def create_venv(self, venv, origin, reuse):
        self.created.append(reuse)
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").write_text("")
        stamp = Stamp("python", origin)
        setup_env.write_stamp(venv, stamp)
        return stamp

    def install(self, venv, root, constraints, extras):
        self.installed.append(set(extras))
        if self.failing & set(extras):
            return False
        self.torch = setup_env.pinned_versions(constraints.read_text())["torch"]
        return True

    def set_up(self, *extras, optional=()):
        setup_env.set_up(self.venv, self.root, Request(extras, tuple(optional)))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def test_second_call_does_nothing(machine):
    machine.set_up("test", optional=["mettagrid"])
    machine.set_up("test", optional=["mettagrid"])
    assert machine.created == [False]
    assert machine.installed == [{"test", "mettagrid"}]


def test_fetching_torch_warns_once(machine):
    machine.set_up("test")
    machine.set_up("lint")
    assert len(machine.warned) == 1
    assert "torch 2.13.0" in machine.warned[0]


def test_fetching_a_cpu_build_does_not_warn(machine):
    machine.probe = report("2.13.0+cpu", CPU_TORCH)
    machine.set_up("test")
    assert machine.warned == []


def test_torch_is_reused_and_pinned(machine):
    machine.found = Found("2.11.0+cu130", CUDA_TORCH)
    machine.set_up("test")
    assert machine.created == [True]
    assert machine.torch == "2.11.0+cu130"
    assert machine.warned == []


def test_replaced_torch_is_an_error(machine, monkeypatch):
    machine.found = Found("2.11.0+cu130", CUDA_TORCH)
    monkeypatch.setattr(setup_env, "venv_version", lambda *_: "2.13.0")
    with pytest.raises(SetupError, match=r"2\.13\.0 where 2\.11\.0\+cu130"):
        machine.set_up("test")
    assert not setup_env.read_stamp(machine.venv).inputs


def test_too_old_torch_stops_before_anything_is_made(machine):
    machine.found = Found("2.9.0", CUDA_TORCH)
    with pytest.raises(SetupError, match="too old"):
        machine.set_up("test")
    assert machine.created == []
    assert not machine.venv.exists()


def test_torch_that_fails_to_import_is_not_reused(machine):
    machine.found, machine.imports = Found("2.11.0", CUDA_TORCH), False
    machine.set_up("test")
    assert machine.created == [False]
    assert machine.torch == "2.13.0"
    assert any("fails to import" in text for text in machine.warned)


def test_more_extras_are_added_to_those_installed(machine):
    machine.set_up("test")
    machine.set_up("lint")
    machine.set_up("test", "lint")
    assert machine.created == [False]
    assert machine.installed == [{"test"}, {"test", "lint"}]


def test_changed_constraints_install_into_the_same_environment(machine):
    machine.set_up("test")
    (machine.root / "constraints.txt").write_text(CONSTRAINTS.replace("9.2.0", "9.3.0"))
    machine.set_up("test")
    assert machine.created == [False]
    assert machine.installed == [{"test"}, {"test"}]
    assert "pytest==9.3.0" in (machine.venv / "constraints.txt").read_text()


def test_another_torch_in_python_makes_the_environment_anew(machine):
    machine.set_up("test")
    machine.found = Found("2.13.0+cpu", CPU_TORCH)
    machine.set_up("test")
    assert machine.created == [False, True]


def test_environment_whose_python_is_gone_is_made_anew(machine):
    machine.set_up("test")
    (machine.venv / "bin" / "python").unlink()
    machine.set_up("test")
    assert machine.created == [False, False]


def test_optional_extra_that_fails_is_left_out_once(machine):
    machine.failing = {"mettagrid"}
    machine.set_up("test", optional=["mettagrid"])
    machine.set_up("test", optional=["mettagrid"])
    assert machine.installed == [{"test", "mettagrid"}, {"test"}]
    assert any("mettagrid" in text for text in machine.warned)
    with pytest.raises(SetupError, match="pip failed"):
        machine.set_up("mettagrid")


def test_failed_installation_is_tried_again(machine):
    machine.failing = {"test"}
    with pytest.raises(SetupError, match="pip failed"):
        machine.set_up("test")
    machine.failing = set()
    machine.set_up("test")
    assert machine.created == [False]
    assert setup_env.read_stamp(machine.venv).extras == ("test",)


def test_extra_that_torch_rules_out_does_not_install_again_each_time(machine):
    machine.found = Found("2.13.0+rocm7", ("pytorch-triton-rocm==3.7.0",))
    machine.set_up("triton", "test")
    machine.set_up("triton", "test")
    assert machine.installed == [{"test"}]


def test_environment_of_someone_else_is_left_alone(machine):
    machine.venv.mkdir()
    (machine.venv / "pyvenv.cfg").write_text("home = /usr/bin\n")
    with pytest.raises(SetupError, match="was not made by this set-up"):
        machine.set_up("test")
    assert [path.name for path in machine.venv.iterdir()] == ["pyvenv.cfg"]


def run_nothing(commands):
    """A subprocess.run that notes its commands and succeeds."""

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_create_venv_asks_for_system_packages_only_to_reuse_torch(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(setup_env.subprocess, "run", run_nothing(commands))
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    for reuse in (False, True):
        stamp = setup_env.create_venv(tmp_path / "venv", "origin", reuse)
        assert ("--system-site-packages" in commands[-1]) is reuse
        assert setup_env.read_stamp(tmp_path / "venv") == stamp == Stamp(sys.executable, "origin")


def test_create_venv_inside_another_sees_that_one_and_its_pip_settings(monkeypatch, tmp_path):
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    outer.mkdir()
    (outer / "pip.conf").write_text("[global]\nfind-links = /wheels\n")
    packages = tmp_path / "site-packages"
    packages.mkdir()

    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, f"{packages}\n", "")

    monkeypatch.setattr(setup_env.subprocess, "run", run)
    monkeypatch.setattr(sys, "prefix", str(outer))
    monkeypatch.setattr(setup_env.site, "getsitepackages", lambda: ["/outer/site-packages"])
    monkeypatch.setattr(setup_env.site, "ENABLE_USER_SITE", False)
    setup_env.create_venv(inner, "origin", True)
    assert (inner / "pip.conf").read_text() == (outer / "pip.conf").read_text()
    (pth,) = packages.glob("*.pth")
    assert pth.read_text() == "import site; site.addsitedir('/outer/site-packages')\n"


def test_failed_venv_names_what_to_install_and_stays_ours(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess("venv", 1, "ensurepip is not available\n", "")
    monkeypatch.setattr(setup_env.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SetupError, match=r"ensurepip is not available.*python3-venv"):
        setup_env.create_venv(tmp_path / "venv", "origin", False)
    assert setup_env.read_stamp(tmp_path / "venv").origin == ""


def test_install_is_editable_constrained_and_leaves_the_index_to_pip(monkeypatch, tmp_path):
    calls = []

    def run(command, env):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(setup_env.subprocess, "run", run)
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    assert setup_env.install(tmp_path / "venv", tmp_path, tmp_path / "constraints.txt", ("test", "lint"))
    command, env = calls[0]
    assert command[-2:] == ["-e", f"{tmp_path}[test,lint]"]
    assert command[command.index("-c") + 1] == str(tmp_path / "constraints.txt")
    assert not any("index" in part or "find-links" in part for part in command)
    assert env["PIP_FIND_LINKS"] == "/wheels"
    assert env["PIP_USER"] == "0"


def test_errors_are_one_line_and_a_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup_env, "find_packages", lambda: Found("1.0", ()))
    assert setup_env.main(["--venv", str(tmp_path / "venv")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("setup: torch 1.0 of ")
    assert captured.err.count("\n") == 1


def test_call_from_inside_the_environment_goes_to_the_python_behind_it(monkeypatch, tmp_path):
    setup_env.write_stamp(tmp_path, Stamp("/usr/bin/python3", "origin"))
    commands = []
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(setup_env.subprocess, "call", lambda command: commands.append(command) or 0)
    arguments = ["--venv", str(tmp_path), "--extras", "test"]
    assert setup_env.main(arguments) == 0
    assert commands == [["/usr/bin/python3", setup_env.__file__, *arguments]]


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = setup_env.pinned_versions((ROOT / "constraints.txt").read_text())


def test_version_is_the_same_in_code_and_metadata():
    assert metta_fastagent.__version__ == PYPROJECT["project"]["version"]


def all_requirements():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [line for name, lines in extras.items() if name != "dev" for line in lines]


@pytest.mark.parametrize("requirement", all_requirements())
def test_ranges_admit_the_pinned_versions(requirement):
    pin = PINS[setup_env.requirement_name(requirement)]
    for operator, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement.partition(";")[0]):
        assert setup_env.at_least(pin, bound) is (operator == ">="), f"{requirement} does not admit {pin}"


def test_dev_extra_is_all_the_others():
    extras = PYPROJECT["project"]["optional-dependencies"]
    (everything,) = extras["dev"]
    name, _, listed = everything.rstrip("]").partition("[")
    assert name == PYPROJECT["project"]["name"]
    assert set(listed.split(",")) == set(extras) - {"dev"}


def test_extras_named_in_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {
        extra for extras in re.findall(r"--(?:extras|optional) ([a-z,]+)", makefile) for extra in extras.split(",")
    }
    assert {"triton", "train", "test", "lint", "mettagrid"} <= named
    assert named <= set(PYPROJECT["project"]["optional-dependencies"])


def test_constraints_hold_versions_without_a_build():
    assert PINS["torch"] == setup_env.public_version(PINS["torch"])
    assert all("+" not in version for version in PINS.values())


def project_files():
    """Files under version control or about to be; where git does not know them, all but what builds and runs leave."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        left = {".venv", ".git", "runs", "build", "dist", "__pycache__"}
        return [path for path in ROOT.rglob("*") if not left & set(path.relative_to(ROOT).parts)]


def test_project_names_no_package_registry():
    hosts = ["py" + "pi.org", "python" + "hosted", "download.py" + "torch", "npm" + "js.org", "ana" + "conda.org"]
    pattern = re.compile("|".join(map(re.escape, [*hosts, "--index" + "-url", "--extra-index" + "-url"])))
    files = [path for path in project_files() if path.is_file()]
    assert ROOT / "constraints.txt" in files
    naming = [str(path) for path in files if pattern.search(path.read_text(errors="ignore"))]
    assert naming == []


@pytest.fixture
def clean_variables(monkeypatch):
    """No variable of a surrounding make or shell reaches the Makefile."""
    names = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON", "VENV", "PYTEST_ARGS")
    for name in (*names, "DEVICE", "SEED", "STEPS", "OUT", "RESUME", "ARGS", "QUICK"):
        monkeypatch.delenv(name, raising=False)


def dry_make(*arguments):
    command = ["make", "-n", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.usefixtures("clean_variables")
def test_make_train_passes_its_variables_on(monkeypatch):
    # Shells set ENV for themselves: it must not choose the environment to train in.
    monkeypatch.setenv("ENV", "/root/.shrc")
    plain = dry_make("train")
    assert plain.splitlines()[-1].split() == ['".venv/bin/python"', "-m", "metta_fastagent.train"]
    assert "mettagrid" not in plain
    output = dry_make("train", "ENV=mettagrid", "DEVICE=cuda", "SEED=3", "OUT=a b", "ARGS=--lr 1")
    assert "--extras triton,train,mettagrid" in output
    flags = re.sub(" +", " ", output.splitlines()[-1].partition("metta_fastagent.train ")[2])
    assert flags == '--env "mettagrid" --device "cuda" --seed "3" --out "a b" --lr 1'


@pytest.mark.usefixtures("clean_variables")
def test_make_test_sets_up_first_and_passes_arguments_on():
    first, second = dry_make("test", "PYTHON=python3.12", "PYTEST_ARGS=-k clip").splitlines()
    assert first.startswith("python3.12 tools/setup_env.py")
    assert '".venv/bin/python" -m pytest ' in second and second.endswith(" -k clip")


@pytest.mark.usefixtures("clean_variables")
def test_make_test_runs_the_cpu_operations_both_ways(tmp_path):
    steps = dry_make("test").replace("\\\n", "").splitlines()[1:]
    chosen = [re.findall(r"METTA_FASTAGENT_BACKEND=\S*?(eager|native)", step) for step in steps]
    assert chosen == [["eager"], [], ["native"]]
    assert "tests/ops" in steps[-1]
    # The last step, with a stand-in for the Python that builds (and fails with this status) and runs the tests.
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\n[ "$3" = build ] && exit "$BUILD_STATUS"\necho "$METTA_FASTAGENT_BACKEND $2"\n')
    stand_in.chmod(0o755)
    outcomes = {}
    for built, ci in (("0", ""), ("3", "true"), ("1", ""), ("1", "true")):
        environment = os.environ | {"BUILD_STATUS": built, "CI": ci}
        command = steps[-1].replace('".venv/bin/python"', str(stand_in))
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
        outcomes[built, ci] = (done.returncode, done.stdout.strip())
    assert outcomes == {
        ("0", ""): (0, "native pytest"),
        ("3", "true"): (0, ""),
        ("1", ""): (0, ""),
        ("1", "true"): (1, ""),
    }


@pytest.mark.usefixtures("clean_variables")
def test_make_bench_passes_its_arguments_on():
    *_, build, run = dry_make("bench", "QUICK=1", "ARGS=--only clip").splitlines()
    assert build == '".venv/bin/python" -m metta_fastagent build --quiet || true'
    assert run == '".venv/bin/python" -m benchmarks run --quick --only clip'


@pytest.mark.usefixtures("clean_variables")
def test_make_gpu_installs_nothing_and_passes_its_arguments_on(tmp_path):
    (plain,) = dry_make("gpu", f"VENV={tmp_path}").splitlines()
    assert plain.split()[:3] == ['PYTHON="python3"', "bash", "tools/gpu.sh"]
    assert "install" not in plain and plain.split()[3].startswith('"runs/gpu-$(date')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("")
    (run,) = dry_make("gpu", f"VENV={tmp_path}", "QUICK=1", "OUT=a b", "ARGS=--only tests").splitlines()
    assert run == f'PYTHON="{tmp_path}/bin/python" bash tools/gpu.sh --quick --only tests "a b"'


@pytest.mark.usefixtures("clean_variables")
def test_make_train_goes_on_where_the_operators_do_not_build():
    build = dry_make("train").splitlines()[-2]
    assert build == '".venv/bin/python" -m metta_fastagent build --quiet || true'


def test_the_wheel_carries_the_sources_of_the_operators():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["metta_fastagent"]
    assert wheel["force-include"] == {"csrc": "metta_fastagent/csrc"}
    assert list((ROOT / "csrc").glob("*.cpp"))


@pytest.mark.usefixtures("clean_variables")
def test_make_alone_lists_every_target():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    assert all(f"make {target}" in listed for target in targets.group(1).split())


def test_ci_script_is_executable_and_calls_make():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert {"make lint", "make test"} <= set(re.findall(r"make \w+", script.read_text()))
