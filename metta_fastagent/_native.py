"""The C++ operators of `csrc/`: compiled by `python -m metta_fastagent build`, loaded at the first use, where built.

Nothing is ever compiled by an import or by a first use, and what is not built is no error: the operations then run in
eager PyTorch, and `reason` says why.

The cache folder is `METTA_FASTAGENT_CACHE`, else `$XDG_CACHE_HOME/metta_fastagent`, else `~/.cache/metta_fastagent`. It
may be deleted at any time. A library's file name is the SHA-256 of its bytes. A record, named by a key over sources,
flags, PyTorch and CPU, says which library is the one and which compiler made it: loading needs no compiler, and `build`
notices another one. Both files appear by rename, complete, and the bytes are compared with the name before they are
loaded. So there is nothing to lock: of two builds at once the last record counts, and both libraries are right.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import torch

CACHE_VARIABLE = "METTA_FASTAGENT_CACHE"
# Which of the builds to load: empty for the ordinary one, else a key of SANITIZERS.
SANITIZE_VARIABLE = "METTA_FASTAGENT_SANITIZE"
COMMAND = "python -m metta_fastagent build"
COMPILERS = ("c++", "g++", "clang++")

_PACKAGE = Path(__file__).parent
# In the wheel the sources lie inside the package, in a checkout and in the sdist beside it.
SOURCES = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"

# The stable ABI of PyTorch 2.10, which every later PyTorch keeps.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")
OPTIMIZATION = ("-O3",)
# Tried in this order: not every compiler knows every processor, nor every assembler what its compiler writes.
PROCESSOR_FLAGS = (("-march=native" if platform.machine() == "x86_64" else "-mcpu=native",), ())
SANITIZERS = {
    "address": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address"),
    "undefined": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"),
}

COMPILE_LIMIT_S = 300
VERSION_LIMIT_S = 30
# A build's folder that is older than this was left by one that was killed.
ABANDONED_S = 3600


class BuildError(RuntimeError):
    """The operators were not built; the first line of the message says why."""


class CannotBuildError(BuildError):
    """This machine has nothing to build them with."""


class _Record(NamedTuple):
    """What a build left: its library, or why it failed."""

    library: Path | None = None
    # The version text of the compiler, and the part of the flags that depends on it.
    compiler: str = ""
    flags: str = ""
    error: str = ""


class _Outcome(NamedTuple):
    loaded: bool
    reason: str


_outcome: _Outcome | None = None


def load() -> bool:
    """Load the library that was built for these sources, flags, PyTorch and CPU, where there is one; tried once.

    Compiles nothing and raises nothing.
    """
    global _outcome
    if _outcome is None:
        try:
            _outcome = _try_to_load()
        except Exception as error:
            _outcome = _Outcome(False, f"{type(error).__name__}: {error}")
    return _outcome.loaded


def loaded() -> bool:
    """Whether the library is in this process; does not try to load it."""
    return _outcome is not None and _outcome.loaded


def reason() -> str:
    """Why the library is loaded or is not, in one line; tries to load it first."""
    load()
    return _outcome.reason if _outcome is not None else ""


def build(force: bool = False, sanitize: str | None = None) -> Path:
    """Compile `csrc/` into the cache, unless that was done before, and return the library's path.

    Args:
        force: compile in any case.
        sanitize: "address" or "undefined" for a build with that sanitizer, which METTA_FASTAGENT_SANITIZE makes
            `load` take.

    Raises:
        CannotBuildError: no compiler, no sources, or a platform other than Linux.
        BuildError: the compiler fails or takes too long, or the cache cannot be written.
        ValueError: `sanitize` is neither of these.
    """
    global _outcome
    if sanitize is not None and sanitize not in SANITIZERS:
        raise ValueError(f"sanitize: got {sanitize!r}, expected one of {', '.join(SANITIZERS)} or None")
    obstacle = _platform_obstacle() or _sources_obstacle()
    if obstacle:
        raise CannotBuildError(obstacle)
    try:
        library = _build(force, sanitize)
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:
        # RuntimeError: no home folder.
        raise BuildError(f"{type(error).__name__}: {error}") from error
    if not loaded():
        _outcome = None
    return library


def _build(force: bool, sanitize: str | None) -> Path:
    key, cache = _key(sanitize), cache_folder()
    record = _read_record(cache, key)
    present = record.library if record.library is not None and _is_intact(record.library) else None
    try:
        compiler = find_compiler()
    except CannotBuildError:
        if present is None or force:
            raise
        return present
    version = _run([[*compiler, "--version"]], time.monotonic() + VERSION_LIMIT_S)[0].strip()
    if present is not None and record.compiler == version and not force:
        return present
    return _build_into(cache, key, compiler, version, sanitize, keeps_record=present is not None)


def cache_folder() -> Path:
    """Where libraries are kept; not made by this."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "metta_fastagent"


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, which may hold arguments, else the first of COMPILERS on the PATH.

    Raises:
        CannotBuildError: there is none.
    """
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotBuildError(f"no C++ compiler: CXX cannot be read: {error}") from error
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise CannotBuildError(f"no C++ compiler: CXX names {chosen[0]!r}, which cannot be run")
        return chosen
    for name in COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise CannotBuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH, and CXX is not set")


def _platform_obstacle() -> str:
    return "" if sys.platform == "linux" else f"unsupported platform {sys.platform}, expected linux"


def _sources_obstacle() -> str:
    return "" if _source_files() else f"no C++ sources in {SOURCES}"


def _source_files() -> list[Path]:
    return sorted(path for path in SOURCES.glob("*") if path.suffix in (".cpp", ".h"))


def _try_to_load() -> _Outcome:
    sanitize = os.environ.get(SANITIZE_VARIABLE) or None
    if sanitize is not None and sanitize not in SANITIZERS:
        return _Outcome(False, f"{SANITIZE_VARIABLE}: got {sanitize!r}, expected one of {', '.join(SANITIZERS)}")
    obstacle = _platform_obstacle() or _sources_obstacle()
    if obstacle:
        return _Outcome(False, obstacle)
    record = _read_record(cache_folder(), _key(sanitize))
    if record.library is None:
        return _Outcome(False, f"the last build failed: {record.error}" if record.error else _why_not_built())
    if not _is_intact(record.library):
        return _Outcome(False, f"damaged or missing file {record.library}: run {COMMAND}")
    try:
        torch.ops.load_library(record.library)
    except OSError as error:
        return _Outcome(False, f"cannot be loaded ({error}): run {COMMAND} --force")
    compiler = next(iter(record.compiler.splitlines()), "an unnamed compiler")
    return _Outcome(True, f"built with {compiler} {record.flags}, {record.library}")


def _why_not_built() -> str:
    try:
        find_compiler()
    except CannotBuildError as error:
        return f"not built; {error}"
    other = any(cache_folder().glob("*.json"))
    hint = " (what was built is for another version, PyTorch or CPU)" if other else ""
    return f"not built: run {COMMAND}{hint}"


def _key(sanitize: str | None) -> str:
    """Of all that the library depends on and that is known without a compiler."""
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _source_files()}
    flags = [FLAGS, OPTIMIZATION, PROCESSOR_FLAGS, sanitize and SANITIZERS[sanitize]]
    made_for = [torch.__version__, torch.version.git_version, platform.machine(), platform.libc_ver(), _processor()]
    return hashlib.sha256(json.dumps([sources, flags, made_for]).encode()).hexdigest()[:32]


def _processor() -> list[str]:
    """What the kernel tells of the first processor's kind and instructions."""
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return []
    return [line for line in first.splitlines() if line.split(":")[0].strip() in names]


def _read_record(cache: Path, key: str) -> _Record:
    """An empty one where there is none that can be read."""
    try:
        values = json.loads((cache / f"{key}.json").read_text())
        digest = values["library"]
        library = None if digest is None else cache / f"{int(digest, 16):064x}.so"
        return _Record(library, str(values["compiler"]), str(values["flags"]), str(values["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _Record()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_intact(library: Path) -> bool:
    try:
        return _digest(library) == library.stem
    except OSError:
        return False


def _build_into(
    cache: Path, key: str, compiler: Sequence[str], version: str, sanitize: str | None, keeps_record: bool
) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache, ignore_cleanup_errors=True) as name:
        folder = Path(name)

        def write_record(library: str | None, flags: str, error: str) -> None:
            values = {"library": library, "compiler": version, "flags": flags, "error": error}
            (folder / "record").write_text(json.dumps(values, indent=2) + "\n")
            os.replace(folder / "record", cache / f"{key}.json")

        try:
            flags = _compile_as_possible(compiler, sanitize, folder)
        except BuildError as error:
            if not keeps_record:
                write_record(None, "", str(error).splitlines()[0])
            raise
        digest = _digest(folder / "native.so")
        library = cache / f"{digest}.so"
        os.replace(folder / "native.so", library)
        write_record(digest, flags, "")
    return library


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob("build-*"):
        try:
            abandoned = time.time() - folder.stat().st_mtime > ABANDONED_S
        except OSError:
            continue
        if abandoned:
            shutil.rmtree(folder, ignore_errors=True)


def _compile_as_possible(compiler: Sequence[str], sanitize: str | None, folder: Path) -> str:
    """Compile for this processor, else as the compiler can; returns the flags that it took."""
    until = time.monotonic() + COMPILE_LIMIT_S
    failure: BuildError | None = None
    for processor in PROCESSOR_FLAGS:
        extra = (*processor, *(SANITIZERS[sanitize] if sanitize else OPTIMIZATION))
        try:
            _compile(compiler, extra, folder, until)
            return " ".join(extra)
        except BuildError as error:
            # The first failure tells more than one about a flag that was a second choice.
            failure = failure or error
    raise failure or BuildError("nothing was compiled")


def _compile(compiler: Sequence[str], extra: Sequence[str], folder: Path, until: float) -> None:
    """Compile every source into `folder/native.so`."""
    root = Path(torch.__file__).parent
    flags = [*FLAGS, *extra]
    sources = [path for path in _source_files() if path.suffix == ".cpp"]
    # Headers of PyTorch as the system's: no warnings from them.
    headers = ["-isystem", str(root / "include")]
    compiles = [
        [*compiler, *flags, *headers, "-c", str(path), "-o", str(folder / f"{path.stem}.o")] for path in sources
    ]
    _run(compiles, until)
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    # A sanitizer's own symbols come from the executable or a preloaded library.
    complete = [] if any(flag.startswith("-fsanitize") for flag in flags) else ["-Wl,--no-undefined"]
    target = ["-shared", *complete, *objects, f"-L{root / 'lib'}", "-ltorch_cpu", "-o", str(folder / "native.so")]
    _run([[*compiler, *flags, *target]], until)
    if not (folder / "native.so").is_file():
        raise BuildError(f"{compiler[0]} reported success and wrote no library")


def _run(commands: Sequence[Sequence[str]], until: float) -> list[str]:
    """Run the commands, a few at once, and return what each printed.

    BuildError where one cannot be started, fails, or still runs when the clock says `until`; nothing is left running.
    """
    jobs = min(4, len(os.sched_getaffinity(0)))
    waiting, running, printed = list(range(len(commands))), dict[int, subprocess.Popen](), [""] * len(commands)
    with ExitStack() as stack:
        # Files, not pipes, which a process that outlives its parent would keep open.
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        stack.callback(_kill, running)
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop(0)
                running[index] = _start(commands[index], outputs[index])
            time.sleep(0.005)
            for index in [index for index, process in running.items() if process.poll() is not None]:
                outputs[index].seek(0)
                printed[index] = outputs[index].read().decode(errors="replace")
                status = running.pop(index).returncode
                if status != 0:
                    raise BuildError(_failure(commands[index][0], status, printed[index]))
            if time.monotonic() > until:
                raise BuildError(f"{commands[0][0]} did not end in time and was stopped")
    return printed


def _failure(command: str, status: int, printed: str) -> str:
    """The line that says most, then all that was printed."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
    return "\n".join([f"{command} failed with status {status}: {first}", *lines])


def _start(command: Sequence[str], output: IO[bytes]) -> subprocess.Popen:
    """A group of its own, so that the compiler's own processes can be ended with it."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error


def _kill(running: dict[int, subprocess.Popen]) -> None:
    for process in running.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
