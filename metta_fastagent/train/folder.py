"""A run's folder: one run at a time, files written atomically, and links replaced, not followed."""

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

CHECKPOINT, BEST, LOG, METRICS = "checkpoint.pt", "best.pt", "log.csv", "weight_metrics.jsonl"
PLOT, EVENTS = "learning_curve.png", "tensorboard"
LOCK = ".lock"


class UsageError(ValueError):
    """An invalid user request, shown as one line."""


def files_of_a_run(folder: Path) -> list[str]:
    """The names in `folder` that a new run would overwrite, dangling links included."""
    return [name for name in (CHECKPOINT, BEST, LOG, METRICS, PLOT, EVENTS) if os.path.lexists(folder / name)]


def lock(folder: Path) -> IO[bytes] | None:
    """An open file that keeps other runs out of `folder` until it is closed; None if a run is using it."""
    file = open(folder / LOCK, "ab", opener=_without_link)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        # some network file systems have no locks
        pass
    return file


def claim_folder(folder: Path, resume: Path | None, numbered: bool) -> tuple[Path, IO[bytes]]:
    """Create and lock `folder` or, if `numbered`, the first of FOLDER, FOLDER-2, ... that no run has used."""
    own, wanted = is_folder_of(folder, resume), folder
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder)
        except OSError as error:
            raise UsageError(f"--out: got {folder} ({error.strerror or error}), expected a writable folder") from None
        used = [] if own else files_of_a_run(folder)
        if held is not None and not used:
            return folder, held
        if held is not None:
            held.close()
        if own or not numbered:
            raise refusal(folder, used)
        folder = wanted.with_name(f"{wanted.name}-{number}")
    raise AssertionError


def refusal(folder: Path, used: list[str]) -> UsageError:
    """The error for a folder that contains these run files, or in which a run is writing."""
    if not used:
        return UsageError(f"--out: got {folder}, in which another run is writing, expected a folder of its own")
    found = "a checkpoint" if CHECKPOINT in used else f"{used[0]} of another run"
    hints = [f"; to continue that run, pass --resume {folder / name}" for name in (CHECKPOINT, BEST) if name in used]
    return UsageError(f"--out: got {folder}, which has {found}, expected a folder without one{''.join(hints[:1])}")


def is_folder_of(folder: Path, file: Path | None) -> bool:
    """Whether `file` is in `folder`."""
    return file is not None and folder.exists() and folder.samefile(file.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` once it is complete and on disk; a crash leaves the old file."""
    # a fixed name, so that the next write removes what a killed process left behind
    unfinished = path.with_name(f".{path.name}.unfinished")
    with _naming(path):
        try:
            unfinished.unlink(missing_ok=True)
            # "x" follows no link
            with open(unfinished, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
    # not all systems can open a folder; the file itself is already on disk
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append(path: Path, text: str) -> None:
    """Add `text` to the end of a file."""
    with _naming(path), open(path, "a", newline="", encoding="utf-8", opener=_without_link) as file:
        file.write(text)


def set_aside(path: Path) -> Path:
    """Rename `path` to the first free name of NAME.1, NAME.2, ..., and return it."""
    candidates = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return path.rename(next(each for each in candidates if not os.path.lexists(each)))


def _without_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Write errors, for example on a full disk, name the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
