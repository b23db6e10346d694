"""The C++ operators in `csrc/`: compiled by `python -m metta_fastagent build`, loaded by the first operation.

Imports and operations never compile. Without a library the operations run in eager PyTorch, and `reason` says why.

Libraries are kept in `METTA_FASTAGENT_CACHE`, else `$XDG_CACHE_HOME/metta_fastagent`, else `~/.cache/metta_fastagent`,
which may be deleted at any time. A library that another user could have written is not loaded. The file name contains a
hash of sources, flags, PyTorch and CPU, so a library built for anything else is not found, and loading needs no
compiler. A library is put in place by renaming, so concurrent builds need no lock.
"""

import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CACHE_VARIABLE = "METTA_FASTAGENT_CACHE"
# Selects the build to load: empty for the default, otherwise a key of SANITIZERS.
SANITIZE_VARIABLE = "METTA_FASTAGENT_SANITIZE"
COMMAND = "python -m metta_fastagent build"
COMPILERS = ("c++", "g++", "clang++")

_PACKAGE = Path(__file__).parents[1]
# A wheel has the sources inside the package, a checkout next to it.
SOURCES = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"

OLDEST_TORCH = "2.10"
# The stable ABI of that version, which later versions keep.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")
OPTIMIZATION = ("-O3",)
# Omitted in a second attempt, because some compilers do not know the processor.
PROCESSOR_FLAG = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
SANITIZERS = {
    "address": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address"),
    "undefined": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"),
}
COMPILE_LIMIT_S = 120  # per file, and for linking
# Ends every library file: loading a truncated one would crash the process.
COMPLETE = b"\nmetta_fastagent: complete\n"

# Whether the library is loaded, and the reason; None before the first attempt.
_outcome: tuple[bool, str] | None = None


class BuildError(RuntimeError):
    """The operators were not built; the first line of the message gives the reason."""


class CannotBuildError(BuildError):
    """This machine lacks a compiler, the sources or Linux."""


def load() -> bool:
    """Load the library built for these sources, flags, PyTorch and CPU, if there is one. Tries once; never raises."""
    global _outcome
    if _outcome is None:
        try:
            _outcome = _try_to_load()
        except Exception as error:
            _outcome = False, str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"
    return _outcome[0]


def loaded() -> bool:
    """Whether the library is loaded; does not try to load it."""
    return _outcome is not None and _outcome[0]


def reason() -> str:
    """Why the library is loaded or not, in one line; tries to load it first."""
    load()
    return _outcome[1] if _outcome is not None else ""


def build(force: bool = False, sanitize: str | None = None) -> Path:
    """Compile `csrc/` into the cache unless the library is already there; return the library's path.

    `force` always compiles. `sanitize` is None, "address" or "undefined"; METTA_FASTAGENT_SANITIZE makes `load` use
    such a build. Raises CannotBuildError (no compiler, no sources, not Linux), BuildError (the compiler fails or
    exceeds COMPILE_LIMIT_S seconds, or the cache cannot be written) or ValueError (an unknown sanitizer).
    """
    global _outcome
    try:
        library = _library(sanitize)
        folder = cache_folder()
        if folder.exists() and (why := untrusted(folder)):
            raise BuildError(why)
        if force or not _is_complete(library) or untrusted(folder, library):
            _compile(find_compiler(), sanitize, library)
    except OSError as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error
    if not loaded():
        _outcome = None
    return library


def cache_folder() -> Path:
    """The folder of the libraries, which may not exist yet."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "metta_fastagent"
    except RuntimeError as error:
        raise BuildError(f"without a cache folder ({error}): set {CACHE_VARIABLE}") from None


def untrusted(folder: Path, library: Path | None = None) -> str:
    """Why another user could have written `library`, `folder`, or a link or folder above them; empty if none could.

    Owners must be this user or root. Folders above may be group-writable, or world-writable with the sticky bit.
    """
    paths = [folder, folder.resolve()]
    if library is not None:
        paths += [library, library.resolve(), library.resolve().parent]
    for each in dict.fromkeys(above for path in paths for above in (path, *path.parents)):
        found = each.lstat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{each} belongs to another user (id {found.st_uid}), who could have written the library"
        writable = found.st_mode & (0o022 if each in paths else 0o002)
        sticky = each not in paths and found.st_mode & stat.S_ISVTX
        if writable and not sticky and not stat.S_ISLNK(found.st_mode):
            return f"other users can write to {each}: run chmod go-w on it, then {COMMAND} --force"
    return ""


def find_compiler() -> list[str]:
    """The C++ compiler command: CXX, which may contain arguments, or the first of COMPILERS on the PATH."""
    chosen = os.environ.get("CXX", "").split()
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(command[0]) is not None:
            return command
    expected = f"CXX names {chosen[0]!r}, which cannot be run" if chosen else f"found none of {', '.join(COMPILERS)}"
    raise CannotBuildError(f"no C++ compiler: {expected}")


def _source_files() -> list[Path]:
    files = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cpp", ".h"))
    if sys.platform != "linux" or not files:
        raise CannotBuildError(f"no C++ sources in {SOURCES}" if not files else f"got {sys.platform}, expected linux")
    if torch.__version__ < OLDEST_TORCH:
        raise CannotBuildError(f"got PyTorch {torch.__version__}, expected {OLDEST_TORCH} or newer")
    return files


def _try_to_load() -> tuple[bool, str]:
    library = _library(os.environ.get(SANITIZE_VARIABLE) or None)
    if not library.exists():
        others = any(cache_folder().glob("*.so"))
        return False, f"not built{' for these sources, PyTorch and CPU' if others else ''}: run {COMMAND}"
    if why := untrusted(cache_folder(), library):
        return False, why
    if not _is_complete(library):
        return False, f"incomplete file {library}: run {COMMAND}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return False, f"cannot be loaded ({' '.join(str(error).split())}): run {COMMAND} --force"
    return True, f"loaded from {library}"


def _library(sanitize: str | None) -> Path:
    """The library's path; its name depends on everything that the library depends on, except the compiler."""
    if sanitize is not None and sanitize not in SANITIZERS:
        raise ValueError(f"sanitize: got {sanitize!r}, expected one of {', '.join(SANITIZERS)} or None")
    sources = [(path.name, path.read_bytes()) for path in _source_files()]
    flags = [FLAGS, OPTIMIZATION, PROCESSOR_FLAG, sanitize and SANITIZERS[sanitize], COMPLETE]
    first_processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    processor = re.findall(r"^(?:model name|flags|Features|CPU implementer|CPU part)\s*:.*", first_processor, re.M)
    versions = [torch.__version__, torch.version.git_version, platform.machine(), platform.libc_ver()]
    digest = hashlib.sha256(repr([sources, flags, processor, versions]).encode()).hexdigest()
    return cache_folder() / f"{digest[:32]}.so"


def _is_complete(library: Path) -> bool:
    return library.is_file() and library.read_bytes().endswith(COMPLETE)


def _compile(compiler: Sequence[str], sanitize: str | None, library: Path) -> None:
    """Compile for this processor or, if that fails, for any."""
    command = [*compiler, *FLAGS, *(SANITIZERS[sanitize] if sanitize else OPTIMIZATION)]
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Inside the cache, because a rename does not cross file systems.
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as name:
        linked = Path(name, library.name)
        try:
            _compile_and_link([*command, PROCESSOR_FLAG], linked)
        except BuildError:
            _compile_and_link(command, linked)
        with linked.open("ab") as file:
            file.write(COMPLETE)
        linked.chmod(linked.stat().st_mode & 0o755)
        os.replace(linked, library)


def _compile_and_link(command: Sequence[str], linked: Path) -> None:
    root = Path(torch.__file__).parent
    # -isystem suppresses warnings from PyTorch's headers.
    compiling = [*command, "-isystem", str(root / "include"), "-c"]
    objects = {str(path): str(linked.with_name(f"{path.stem}.o")) for path in _source_files() if path.suffix == ".cpp"}
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        # After a failure, map starts no more files.
        list(pool.map(lambda source: _run([*compiling, source, "-o", objects[source]]), objects))
    # A sanitizer's own symbols come from the executable or a preloaded library.
    complete = [] if any(flag.startswith("-fsanitize") for flag in command) else ["-Wl,--no-undefined"]
    _run([*command, "-shared", *complete, *objects.values(), f"-L{root / 'lib'}", "-ltorch_cpu", "-o", str(linked)])


def _run(command: Sequence[str]) -> None:
    """Run a command; BuildError if it cannot be started, fails or exceeds the limit."""
    try:
        done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C"}, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} exceeded the limit of {COMPILE_LIMIT_S} s and was killed") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        printed = (done.stdout + done.stderr).decode(errors="replace")
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
        raise BuildError("\n".join([f"{command[0]} failed with status {done.returncode}: {first}", *lines]))
