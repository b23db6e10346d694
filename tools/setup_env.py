"""Makes the virtual environment behind `make train`, `make test` and `make lint`, and keeps it up to date.

The Python that runs this script is the one that the environment is made from. A torch that this Python can import is
reused: the environment sees it, pip is held to exactly its version, and its own requirements decide Triton's version.
Otherwise pip fetches torch under constraints.txt with the index settings that it finds, after a warning where that
means the CUDA packages. A stamp in the environment records what it was made from, so that a second call does nothing.
"""

import sys

# Before anything that an older Python fails on, so that it gets this line and not a traceback.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"setup: Python >= 3.11 is needed, this is {sys.version.split()[0]}: pass PYTHON=/path/to/another/python")

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAMP = "setup-stamp.json"
# A dry run reads metadata only; an index too slow for this gets the cautious warning.
PROBE_TIMEOUT_S = 60


class SetupError(Exception):
    """What stops the set-up; its message is one line that says what to do."""


@dataclass(frozen=True)
class Found:
    """What the Python behind the environment can import; None where it cannot."""

    torch: str | None = None
    torch_requires: tuple[str, ...] = ()
    tensordict: str | None = None
    triton: str | None = None


@dataclass(frozen=True)
class Stamp:
    """What an environment was made from (`python`, `origin`) and holds (`inputs`, `extras`; `missing` failed)."""

    python: str
    origin: str = ""
    inputs: str = ""
    extras: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """The extras to install; those in `optional` may fail."""

    extras: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def canonical(name: str) -> str:
    """The form under which package names are compared: lower case, runs of `-_.` as one `-`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The canonical name at the start of a requirement, "" where there is none (an option, a comment, a blank line)."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return canonical(match.group(1)) if match else ""


def public_version(version: str) -> str:
    """A version without its local part: 2.13.0 for 2.13.0+cpu."""
    return version.partition("+")[0]


def at_least(version: str, minimum: str) -> bool:
    """Whether `version` is `minimum` or newer; a pre-release of the minimum itself is older."""

    def release(text: str) -> tuple[tuple[int, ...], bool]:
        match = re.match(r"v?(\d+(?:\.\d+)*)(.*)", public_version(text))
        if match is None:
            raise SetupError(f"cannot read the version {text!r}")
        numbers = [int(part) for part in match.group(1).split(".")]
        while numbers and numbers[-1] == 0:
            numbers.pop()
        return tuple(numbers), re.match(r"[._-]?(a|b|rc|dev)", match.group(2)) is None

    return release(version) >= release(minimum)


def minimum_version(pyproject: str, package: str) -> str:
    """The version after `>=` in pyproject.toml's dependency on `package`."""
    for requirement in tomllib.loads(pyproject)["project"]["dependencies"]:
        if requirement_name(requirement) == package:
            match = re.search(r">=\s*([0-9][\w.]*)", requirement)
            if match:
                return match.group(1)
    raise SetupError(f"pyproject.toml states no lowest version of {package}")


def pinned_versions(constraints: str) -> dict[str, str]:
    """Canonical name -> version for every `name==version` line."""
    pins = {}
    for line in constraints.splitlines():
        match = re.match(r"\s*([\w.-]+)\s*==\s*([\w.+!-]+)", line)
        if match:
            pins[canonical(match.group(1))] = match.group(2)
    return pins


def installed_version(package: str) -> str | None:
    """The version of a package that this Python would import, None where it finds none."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_packages() -> Found:
    """What this Python has, read off its metadata: nothing is imported."""
    torch = installed_version("torch")
    if torch is None:
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            raise SetupError(f"{spec.origin} has no package metadata, so pip cannot reuse it: install it, or hide it")
        return Found()
    requires = tuple(importlib.metadata.requires("torch") or ())
    return Found(torch, requires, installed_version("tensordict"), installed_version("triton"))


def imports_torch(python: str) -> bool:
    """Whether `python` really imports torch: a broken one is not reused."""
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def check_torch(version: str, minimum: str) -> None:
    """SetupError where the torch to reuse is older than `minimum`."""
    if not at_least(version, minimum):
        raise SetupError(
            f"torch {version} of {sys.executable} is too old, {minimum} is the lowest that works: "
            "upgrade it there, or pass PYTHON=/path/to/another/python"
        )


def rewrite_constraints(constraints: str, found: Found, lowest_tensordict: str) -> str:
    """constraints.txt for an environment that reuses `found.torch`; unchanged where there is none to reuse.

    torch is held to the version found. What torch itself requires is not held: what is installed with it suits it.
    triton follows torch's own requirement; tensordict stays at the version found, or may be older than the pin where
    the pin was made for another torch.
    """
    if found.torch is None:
        return constraints
    pins = pinned_versions(constraints)
    same_torch = public_version(found.torch) == pins.get("torch")
    torch_requires = {requirement_name(requirement): requirement for requirement in found.torch_requires}

    def rewrite(line: str) -> str | None:
        name = requirement_name(line)
        if name == "torch":
            return f"torch=={found.torch}"
        if name == "triton" and name not in torch_requires:
            return line if same_torch else found.triton and f"triton=={found.triton}"
        if name == "triton":
            return torch_requires[name]
        if name == "tensordict":
            if found.tensordict is not None and at_least(found.tensordict, lowest_tensordict):
                return f"tensordict=={found.tensordict}"
            return line if same_torch else f"tensordict<={pins[name]}"
        return None if name in torch_requires else line

    lines = [rewrite(line) for line in constraints.splitlines()]
    return "".join(f"{line}\n" for line in lines if line is not None)


def usable_extras(extras: Iterable[str], found: Found) -> tuple[str, ...]:
    """`extras` without `triton` where torch brings a Triton under another name (ROCm, XPU): two would overwrite it."""
    names = {requirement_name(requirement) for requirement in found.torch_requires}
    has_own_triton = any("triton" in name and name != "triton" for name in names)
    return tuple(extra for extra in extras if not (extra == "triton" and has_own_triton))


def download_warning(report: dict[str, Any] | None, platform: str = sys.platform) -> str | None:
    """What to say before pip fetches torch, None where the build that it takes needs no CUDA packages.

    `report` is that of `pip install --dry-run --no-deps --report - torch`, None where there was none.
    """
    if platform != "linux":
        return None
    advice = (
        "To avoid it, stop here (Ctrl-C) and pass a PYTHON that has torch, or let pip's own settings "
        "(PIP_FIND_LINKS, PIP_INDEX_URL, pip.conf) lead to a CPU build."
    )
    try:
        items = [item["metadata"] for item in (report or {})["install"]]
        metadata = next(item for item in items if requirement_name(item["name"]) == "torch")
        version, requires = metadata["version"], metadata.get("requires_dist", ())
    except (KeyError, StopIteration, TypeError):
        return f"WARNING: pip fetches torch now, which can mean several gigabytes with its GPU packages. {advice}"
    gpu_package = re.compile(r"nvidia|cuda|rocm|(pytorch-)?triton")
    if not any(gpu_package.match(requirement_name(requirement)) for requirement in requires):
        return None
    return f"WARNING: torch {version} and its GPU packages follow, several gigabytes to download. {advice}"


def digest(parts: Iterable[str | bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def origin_key(root: Path, venv: Path, found: Found) -> str:
    """Changes where the environment has to be made anew: another Python, another torch in it, another place."""
    return digest([str(root), str(venv), sys.prefix, sys.version, repr(found)])


def inputs_key(root: Path) -> str:
    """Changes where the environment's packages have to be looked at again."""
    names = ("pyproject.toml", "constraints.txt", "tools/setup_env.py")
    return digest((root / name).read_bytes() for name in names)


def read_stamp(venv: Path) -> Stamp | None:
    """The stamp of an environment, None where it has none or one that cannot be read."""
    try:
        values = json.loads((venv / STAMP).read_text())
        values.update({name: tuple(values[name]) for name in ("extras", "missing")})
        return Stamp(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_stamp(venv: Path, stamp: Stamp) -> None:
    (venv / STAMP).write_text(json.dumps(vars(stamp), indent=2) + "\n")


def is_current(stamp: Stamp | None, origin: str, inputs: str, request: Request) -> bool:
    """Whether the environment behind `stamp` has all of `request`; an optional extra that failed is not tried again."""
    return (
        stamp is not None
        and stamp.origin == origin
        and stamp.inputs == inputs
        and set(request.extras) <= set(stamp.extras)
        and set(request.optional) <= {*stamp.extras, *stamp.missing}
    )


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


def create_venv(venv: Path, origin: str, reuse: bool) -> Stamp:
    """A fresh environment at `venv`, in place of an older one; with `reuse` it sees the running Python's packages."""
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True)
    # Written first, so that an environment that was interrupted half-way is known as ours.
    write_stamp(venv, Stamp(sys.executable))
    is_nested = sys.prefix != sys.base_prefix
    flags = ["--system-site-packages"] if reuse and not is_nested else []
    made = subprocess.run([sys.executable, "-m", "venv", *flags, str(venv)], capture_output=True, text=True)
    if made.returncode != 0:
        reason = (made.stdout + made.stderr).strip().splitlines() or [f"status {made.returncode}"]
        raise SetupError(
            f"{sys.executable} -m venv failed ({reason[-1].strip()}): install Python's venv module "
            "(python3-venv on Debian and Ubuntu), or pass PYTHON=/path/to/another/python"
        )
    if is_nested:
        inherit_environment(venv, reuse)
    stamp = Stamp(sys.executable, origin)
    write_stamp(venv, stamp)
    return stamp


def inherit_environment(venv: Path, reuse: bool) -> None:
    """Passes on pip's settings and, with `reuse`, the packages of the virtual environment that runs this script.

    A new environment goes back to the base Python by itself, past the one that made it.
    """
    settings = Path(sys.prefix, "pip.conf")
    if settings.exists():
        shutil.copy(settings, venv)
    if reuse:
        command = [str(venv_python(venv)), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (packages / "reused_environment.pth").write_text("".join(lines))


def pip(venv: Path, *arguments: str) -> list[str]:
    return [str(venv_python(venv)), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def pip_environment() -> dict[str, str]:
    """The caller's environment, but for a `--user` setting, which would install past the virtual environment."""
    return {**os.environ, "PIP_USER": "0"}


def probe_torch(venv: Path, constraints: Path) -> dict[str, Any] | None:
    """pip's report on the torch that it would fetch, None where there is none. Nothing is installed."""
    # fast-deps reads a wheel's metadata by range requests; without it, some indexes make a dry run fetch the wheel.
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--use-feature=fast-deps", "--report", "-"]
    command = pip(venv, "install", *options, "-c", str(constraints), "torch")
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env=pip_environment(), check=True
        )
        return json.loads(result.stdout)
    except (subprocess.SubprocessError, ValueError):
        return None


def venv_version(venv: Path, package: str) -> str | None:
    """The version of a package that the environment holds or sees, None where there is none."""
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    result = subprocess.run([str(venv_python(venv)), "-c", code, package], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def install(venv: Path, root: Path, constraints: Path, extras: Sequence[str]) -> bool:
    """Installs the package, editable, with `extras`; whether pip succeeded."""
    target = f"{root}[{','.join(extras)}]" if extras else str(root)
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--progress-bar", "off"]
    # mettagrid's source distribution needs a build system of its own: a wheel or nothing.
    options = [*quiet, "--only-binary", "mettagrid", "-c", str(constraints)]
    return subprocess.run(pip(venv, "install", *options, "-e", target), env=pip_environment()).returncode == 0


def install_request(venv: Path, root: Path, constraints: Path, request: Request) -> tuple[str, ...]:
    """Installs what is asked for, and leaves out the optional extras where pip fails with them.

    Returns the extras that are installed.
    """
    extras = tuple(dict.fromkeys([*request.extras, *request.optional]))
    if install(venv, root, constraints, extras):
        return extras
    optional = [extra for extra in request.optional if extra not in request.extras]
    if optional and install(venv, root, constraints, request.extras):
        say(f"WARNING: went on without {', '.join(optional)}, which did not install (see above)")
        return request.extras
    raise SetupError("pip failed, see above; the next call tries again")


def update_pip(venv: Path, constraints: Path) -> None:
    """The pip of constraints.txt: an old one fetches whole wheels in a dry run."""
    command = pip(venv, "install", "--quiet", "-c", str(constraints), "pip")
    if subprocess.run(command, env=pip_environment()).returncode != 0:
        say("WARNING: pip could not be updated; going on with the one that came with Python")


def warn_of_download(venv: Path, constraints: Path) -> None:
    """Says so before pip fetches a torch with GPU packages."""
    if public_version(venv_version(venv, "torch") or "") == pinned_versions(constraints.read_text()).get("torch"):
        return
    warning = download_warning(probe_torch(venv, constraints))
    if warning is not None:
        say(warning)


def install_all(venv: Path, root: Path, stamp: Stamp, request: Request, found: Found) -> Stamp:
    """Installs `request` into an environment whose constraints are written; the stamp of what it holds then."""
    constraints = venv / "constraints.txt"
    update_pip(venv, constraints)
    if found.torch is None:
        warn_of_download(venv, constraints)
    # What an earlier call installed stays installed, so it is kept up to date as well.
    required = tuple(dict.fromkeys([*request.extras, *stamp.extras]))
    wanted = Request(usable_extras(required, found), request.optional)
    say(f"installing metta_fastagent with {', '.join([*wanted.extras, *wanted.optional]) or 'no extras'}")
    installed = install_request(venv, root, constraints, wanted)

    torch = venv_version(venv, "torch")
    if found.torch is not None and torch != found.torch:
        raise SetupError(f"{venv} has torch {torch} where {found.torch} should be reused: remove it and try again")
    say(f"ready: torch {torch}, tensordict {venv_version(venv, 'tensordict')}, triton {venv_version(venv, 'triton')}")
    # An extra that usable_extras left out counts as there, or every call would install again.
    extras = tuple(dict.fromkeys([*installed, *required]))
    missing = tuple(extra for extra in request.optional if extra not in installed)
    return Stamp(stamp.python, stamp.origin, inputs_key(root), extras, missing)


def set_up(venv: Path, root: Path, request: Request) -> None:
    """Makes or updates the environment at `venv`, so that it holds the package at `root` with the extras asked for.

    SetupError, whose message says what to do, where that fails.
    """
    found = find_packages()
    pyproject = (root / "pyproject.toml").read_text()
    if found.torch is not None:
        check_torch(found.torch, minimum_version(pyproject, "torch"))
    origin, stamp = origin_key(root, venv, found), read_stamp(venv)
    if is_current(stamp, origin, inputs_key(root), request) and venv_python(venv).exists():
        return
    if stamp is None and venv.exists() and not (venv.is_dir() and not any(venv.iterdir())):
        raise SetupError(f"{venv} was not made by this set-up: remove it, or pass VENV=/path/to/another/folder")

    if found.torch is not None and not imports_torch(sys.executable):
        say(f"WARNING: {sys.executable} has torch {found.torch} but fails to import it, so it is not reused")
        found = Found()
    if stamp is None or stamp.origin != origin or not venv_python(venv).exists():
        say(f"{venv} is made from {sys.executable}" + (f", reusing torch {found.torch}" if found.torch else ""))
        stamp = create_venv(venv, origin, reuse=found.torch is not None)
    text = (root / "constraints.txt").read_text()
    rewritten = rewrite_constraints(text, found, minimum_version(pyproject, "tensordict"))
    (venv / "constraints.txt").write_text(rewritten)
    write_stamp(venv, install_all(venv, root, stamp, request, found))


def split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes the virtual environment of this project, or updates it.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where it goes (default: %(default)s)")
    parser.add_argument("--extras", type=split, default=(), help="extras of the package, separated by commas")
    parser.add_argument("--optional", type=split, default=(), help="extras that are left out where they do not install")
    options = parser.parse_args(arguments)
    venv = options.venv.resolve()
    if Path(sys.prefix).resolve() == venv:
        # Called from within the activated environment: the Python that it was made from does the work.
        stamp = read_stamp(venv)
        if stamp is None:
            sys.exit(f"setup: {venv} was not made by this set-up: leave it, or pass VENV=/path/to/another/folder")
        return subprocess.call([stamp.python, __file__, *(sys.argv[1:] if arguments is None else arguments)])
    try:
        set_up(venv, ROOT, Request(options.extras, options.optional))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
