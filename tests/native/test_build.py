"""The build of the C++ operators: every failure leaves eager PyTorch and a reason, never a wrong library.

Most tests use a fake compiler, a shell script; the last compiles a source with one operator.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from metta_fastagent import __main__ as command_line
from metta_fastagent.runtime import native as _native

OLDEST_TORCH = _native.OLDEST_TORCH
PACKAGE = Path(_native.__file__).parents[1]
SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
torch::stable::Tensor add_one_(torch::stable::Tensor x) {
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<float*>(x.mutable_data_ptr())[i] += 1.0f;
  return x;
}
STABLE_TORCH_LIBRARY(build_test, m) { m.def("add_one_(Tensor(a!) x) -> Tensor(a!)"); }
STABLE_TORCH_LIBRARY_IMPL(build_test, CPU, m) { m.impl("add_one_", TORCH_BOX(&add_one_)); }
"""
# Appends its arguments to LOG, runs BODY, and writes a file that is not a library.
FAKE = """#!/bin/sh
echo "$*" >> LOG
BODY
for last; do :; done
echo "no library" > "$last"
"""


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Sources and a cache of the test's own, and nothing loaded yet."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "add_one.cpp").write_text(SOURCE)
    (sources / "shared.h").write_text("// nothing\n")
    monkeypatch.setattr(_native, "SOURCES", sources)
    monkeypatch.setattr(_native, "_outcome", None)
    # A fake compiler needs no particular PyTorch.
    monkeypatch.setattr(_native, "OLDEST_TORCH", "2.0")
    monkeypatch.setenv(_native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(_native.SANITIZE_VARIABLE, raising=False)


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Makes CXX a shell script; returns a function that lists its calls."""

    def install(body=""):
        log, script = tmp_path / "log", tmp_path / "fake-c++"
        script.write_text(FAKE.replace("LOG", str(log)).replace("BODY", body))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: log.read_text().splitlines() if log.exists() else []

    return install


def assert_not_loaded(*parts):
    """In what stands for a new process."""
    _native._outcome = None
    assert not _native.load()
    assert not _native.loaded()
    assert all(part in _native.reason() for part in parts), _native.reason()
    assert "\n" not in _native.reason()


def test_loading_compiles_and_writes_nothing(fake_compiler, monkeypatch, tmp_path):
    calls = fake_compiler()
    assert_not_loaded("not built: run python -m metta_fastagent build")
    assert not _native.cache_folder().exists() and calls() == []
    monkeypatch.setattr(_native, "SOURCES", tmp_path / "nowhere")
    assert_not_loaded("no C++ sources in", "nowhere")


def no_compiler(patch, compiler):
    patch.delenv("CXX")
    patch.setenv("PATH", "/nonexistent")


def hang(patch, compiler):
    patch.setattr(_native, "COMPILE_LIMIT_S", 0.3)
    compiler("exec sleep 1000")


BREAKS = "echo first line; echo fatal error: it broke >&2; exit 1"
CANNOT, FAILED = _native.CannotBuildError, _native.BuildError
FAILURES = [
    (CANNOT, r"got PyTorch .*, expected 99", lambda patch, _: patch.setattr(_native, "OLDEST_TORCH", "99.0")),
    (CANNOT, "no C.. compiler: CXX names '/nonexistent'", lambda patch, _: patch.setenv("CXX", "/nonexistent -m64")),
    (CANNOT, "no C.. compiler: found none of c.., g.., clang..", no_compiler),
    (FAILED, ".*fake-c.. failed with status 1: fatal error: it broke\nfirst", lambda _, compiler: compiler(BREAKS)),
    (FAILED, r".*fake-c.. exceeded the limit of 0\.3 s and was killed", hang),
    (FAILED, "FileExistsError: .*cache", lambda *_: _native.cache_folder().write_text("a file, not a folder")),
]


@pytest.mark.parametrize(("error", "message", "fault"), FAILURES)
def test_a_failed_build_gives_the_reason_and_leaves_nothing(fake_compiler, monkeypatch, error, message, fault):
    fake_compiler()
    fault(monkeypatch, fake_compiler)
    with pytest.raises(_native.BuildError) as caught:
        _native.build()
    assert type(caught.value) is error
    assert re.match(message, str(caught.value))
    assert_not_loaded(str(caught.value) if "PyTorch" in message else "not built")
    assert list(_native.cache_folder().glob("*")) == []


def test_compiler_with_arguments_and_without_the_processor_flag(fake_compiler, monkeypatch):
    calls = fake_compiler('case "$*" in *=native*) exit 1;; esac')
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -m64 -Wextra")
    assert _native.build().exists()
    assert all(call.startswith("-m64 -Wextra -std=") for call in calls())
    assert [f"{_native.PROCESSOR_FLAG} " in call for call in calls()] == [True, False, False]


def test_build_is_kept_and_needs_no_compiler(fake_compiler, monkeypatch):
    calls = fake_compiler()
    library = _native.build()
    assert _native.build() == library and len(calls()) == 2
    assert _native.build(force=True) == library and len(calls()) == 4
    monkeypatch.setenv("CXX", "/nonexistent")
    assert _native.build() == library
    with pytest.raises(_native.CannotBuildError):
        _native.build(force=True)


CHANGES = {
    "source": lambda patch: (_native.SOURCES / "add_one.cpp").write_text("// changed\n"),
    "header": lambda patch: (_native.SOURCES / "shared.h").write_text("// changed\n"),
    "new source": lambda patch: (_native.SOURCES / "second.cpp").write_text(""),
    "torch version": lambda patch: patch.setattr(torch, "__version__", "9.9.9"),
    "flags": lambda patch: patch.setattr(_native, "FLAGS", (*_native.FLAGS, "-Wall")),
    "processor": lambda patch: patch.setattr(_native.re, "findall", lambda *arguments: ["model name: another"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_build_for_something_else_is_ignored(change, fake_compiler, monkeypatch):
    fake_compiler()
    first = _native.build()
    assert_not_loaded("cannot be loaded", "run python -m metta_fastagent build --force")
    change(monkeypatch)
    assert_not_loaded("not built for these sources, PyTorch and CPU")
    assert _native.build() != first


def test_truncated_library(fake_compiler):
    calls = fake_compiler()
    library = _native.build()
    complete = library.read_bytes()
    for damaged in (complete[:-3], b""):
        library.write_bytes(damaged)
        assert_not_loaded("incomplete file", str(library), "run python -m metta_fastagent build")
        assert _native.build().read_bytes() == complete
    assert len(calls()) == 6


def test_sanitizers_have_separate_builds(fake_compiler, monkeypatch):
    calls = fake_compiler()
    libraries = {_native.build(sanitize=sanitize) for sanitize in (None, "address", "undefined")}
    assert len(libraries) == 3
    assert ["-fsanitize=address" in call for call in calls()] == [False, False, True, True, False, False]
    for sanitize in ("address", "undefined"):
        monkeypatch.setenv(_native.SANITIZE_VARIABLE, sanitize)
        assert_not_loaded("cannot be loaded", str(_native.build(sanitize=sanitize)))
    monkeypatch.setenv(_native.SANITIZE_VARIABLE, "adress")
    assert_not_loaded("sanitize: got 'adress', expected one of address, undefined")
    with pytest.raises(ValueError, match="sanitize: got 'adress', expected one of address, undefined or None"):
        _native.build(sanitize="adress")


@pytest.mark.parametrize(("body", "status"), [("exit 1", 1), ("", 1), (None, command_line.CANNOT_BUILD)])
def test_command_gives_the_reason_in_one_line(body, status, fake_compiler, monkeypatch, capsys):
    if body is None:
        monkeypatch.setenv("CXX", "/nonexistent")
    else:
        fake_compiler(body)
    assert command_line.main(["build", "--quiet"]) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch("metta_fastagent: native CPU operators not .*\n", output.err)


def make_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


# name: (change of the library and its folder, whether `build` repairs it)
UNTRUSTED = {
    "a library that others can write": (lambda library: library.chmod(0o666), True),
    "a library that a group can write": (lambda library: library.chmod(0o620), True),
    "a library of another user": (lambda library: os.chown(library, 4321, -1), True),
    "a link to such a library": (lambda library: (library.chmod(0o666), make_link(library)), True),
    "a link of another user": (lambda library: (make_link(library), os.lchown(library, 4321, -1)), True),
    "a folder that others can write": (lambda library: library.parent.chmod(0o777), False),
    "a folder that a group can write": (lambda library: library.parent.chmod(0o770), False),
    "a sticky folder that others can write": (lambda library: library.parent.chmod(0o1777), False),
    "a folder of another user": (lambda library: os.chown(library.parent, 4321, -1), False),
    "a link to such a folder": (lambda library: (library.parent.chmod(0o777), make_link(library.parent)), False),
    "a parent folder that others can write": (lambda library: library.parents[1].chmod(0o777), False),
}


@pytest.mark.parametrize(("change", "repaired"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_what_another_user_could_have_written_is_not_loaded(change, repaired, fake_compiler, monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    fake_compiler()
    library = _native.build()
    assert _native.load()
    try:
        change(library)
    except PermissionError:
        pytest.skip("only root can give files to others")
    assert_not_loaded()
    assert re.search(r"belongs to another user|other users can write", _native.reason())
    if repaired:
        assert _native.build() == library and _native.load(), _native.reason()
    else:
        with pytest.raises(_native.BuildError, match=r"another user|other users"):
            _native.build(force=True)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_the_cache_is_private(umask, fake_compiler):
    fake_compiler()
    before = os.umask(umask)
    try:
        library = _native.build()
    finally:
        os.umask(before)
    assert library.parent.stat().st_mode & 0o777 == 0o700 and not library.stat().st_mode & 0o022
    assert not _native.untrusted(library.parent, library)


def test_no_home_folder_is_one_line(monkeypatch, capsys):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    for name in (_native.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert_not_loaded("Could not determine home directory", "set METTA_FASTAGENT_CACHE")
    assert command_line.main(["build"]) == 1
    err = capsys.readouterr().err
    assert "set METTA_FASTAGENT_CACHE" in err and err.count("\n") == 1


def test_a_path_that_the_output_cannot_encode_is_escaped(fake_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    fake_compiler()
    monkeypatch.setenv(_native.CACHE_VARIABLE, os.fsdecode(bytes(tmp_path) + b"/caf\xe9 \xc3\xa9"))
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert command_line.main(["build"]) == command_line.main([]) == 0
    output.flush()
    assert rb"/caf\udce9 \xe9/" in output.buffer.getvalue()


@pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason=f"operators need PyTorch {OLDEST_TORCH} or newer")
@pytest.mark.skipif(not any(map(shutil.which, _native.COMPILERS)), reason="no C++ compiler")
def test_concurrent_builds_and_a_process_that_loads(tmp_path):
    (tmp_path / "metta_fastagent").symlink_to(PACKAGE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "METTA_FASTAGENT_BACKEND": "auto"}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        builds = list(pool.map(lambda _: run("-m", "metta_fastagent", "build"), range(2)))
    assert all(done.stdout.startswith("native CPU operators ready in ") for done in builds), builds
    assert len(list(_native.cache_folder().iterdir())) == 1
    code = (
        "import torch; from metta_fastagent.runtime import native;"
        "print(native.loaded(), native.load(), native.reason());"
    )
    done = run("-c", code + "print(torch.ops.build_test.add_one_(torch.zeros(3)).tolist())")
    assert done.stdout.startswith("False True loaded from ") and done.stdout.endswith("\n[1.0, 1.0, 1.0]\n"), done
