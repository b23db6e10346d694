"""Checkpoint files: written atomically, and read without executing code from the file."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.runtime.checks import first_line
from metta_fastagent.train.folder import replacing

# identifies the files of this trainer
FORMAT = "metta_fastagent.train.checkpoint"
VERSION = 4
REQUIRED = (
    *("config", "counters", "model", "optimizer", "return_moments", "initial_weights", "initial_weight_magnitudes"),
    *("action_names", "max_action_args", "feature_mapping"),
    # per rank: memory, environment, rollout and random
    "ranks",
    *("package_version", "torch_version", "backend"),
)


class CheckpointError(ValueError):
    """A file is missing, damaged or not a checkpoint of this trainer, or belongs to a different run."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values, with all keys in REQUIRED) to `path` atomically, see `replacing`."""
    if missing := [key for key in REQUIRED if key not in state]:
        raise ValueError(f"state: got no {', '.join(missing)}, expected all keys of REQUIRED")
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except RuntimeError as error:
            # PyTorch reports a failed write, for example on a full disk, as an error about its archive
            raise _write_error(error) or error from None


def _write_error(error: BaseException) -> OSError | None:
    """The OSError during whose handling `error` was raised, if there is one."""
    cause = error.__cause__ or error.__context__
    return cause if cause is None or isinstance(cause, OSError) else _write_error(cause)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, with tensors on `device`. Raises CheckpointError."""
    _check_archive(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message is a page on how to load the file anyway
        raise _unusable(path, "a file with other objects than tensors and plain values") from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _unusable(path, f"a file that torch cannot load ({first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _unusable(path, f"a file without the format {FORMAT!r}")
    if state.get("version") != VERSION:
        raise _unusable(path, f"version {state.get('version')!r}", f"version {VERSION}")
    if missing := [key for key in REQUIRED if key not in state]:
        raise _unusable(path, f"a file without {', '.join(missing)}")
    return state


def _unusable(path: Path, came: str, expected: str = "a checkpoint of this trainer") -> CheckpointError:
    return CheckpointError(f"{path}: got {came}, expected {expected}")


def _check_archive(path: Path) -> None:
    """Check the archive's checksums, which torch ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise _unusable(path, "no such file") from None
    except IsADirectoryError:
        raise _unusable(path, "a folder", "a checkpoint file such as checkpoint.pt inside it") from None
    except OSError as error:
        raise _unusable(path, f"an unreadable file ({error.strerror or error})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise _unusable(path, f"a damaged or foreign file ({first_line(error)})") from None
    if damaged is not None:
        raise _unusable(path, f"a damaged file (checksum of {damaged})")


def layout(values: dict[str, Any]) -> dict[str, Any]:
    """Name -> type of a number, or shape and dtype of a tensor."""
    return {name: (each.shape, each.dtype) if isinstance(each, Tensor) else type(each) for name, each in values.items()}


def on_cpu(state: Any) -> Any:
    """`state` (nested dicts and tuples) with every tensor on the CPU."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(on_cpu, state))
    return state.cpu() if isinstance(state, Tensor) else state


def random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    # a checkpoint of a CPU run has no CUDA state
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
