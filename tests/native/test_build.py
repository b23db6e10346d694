"""The build of the native operators: what goes wrong there leaves eager PyTorch and a reason, never a wrong library.

Most tests use a fake compiler, a shell script; those at the end compile a source of one operator.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from metta_fastagent import __main__ as command_line
from metta_fastagent import _native

PACKAGE = Path(_native.__file__).parent
SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {
torch::stable::Tensor add_one_(torch::stable::Tensor x) {
  auto* values = static_cast<float*>(x.mutable_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) values[i] += 1.0f;
  return x;
}
}  // namespace

STABLE_TORCH_LIBRARY(build_test, m) { m.def("add_one_(Tensor(a!) x) -> Tensor(a!)"); }
STABLE_TORCH_LIBRARY_IMPL(build_test, CPU, m) { m.impl("add_one_", TORCH_BOX(&add_one_)); }
"""

# Appends its arguments to LOG, then does BODY; by default it writes a file that is no library.
FAKE = """#!/bin/sh
case "$*" in *--version*) echo "fake VERSION"; exit 0;; esac
echo "$*" >> LOG
BODY
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo "no library" > "$2"; fi
  shift
done
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
    monkeypatch.setenv(_native.CACHE_VARIABLE, str(tmp_path / "cache"))
    for name in ("CXX", _native.SANITIZE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Makes CXX a shell script; returns the log of its compilations."""

    def install(body="", version="1.0"):
        log, script = tmp_path / "log", tmp_path / "fake-c++"
        script.write_text(FAKE.replace("LOG", str(log)).replace("BODY", body).replace("VERSION", version))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return install


def forget():
    """As a fresh process would see it."""
    _native._outcome = None


def calls(log):
    return log.read_text().splitlines() if log.exists() else []


def assert_not_loaded(*parts):
    forget()
    assert not _native.load()
    assert not _native.loaded()
    for part in parts:
        assert part in _native.reason()
    assert "\n" not in _native.reason()


def test_without_a_build_nothing_is_compiled_or_written(fake_compiler, monkeypatch):
    log = fake_compiler()
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started a process"))
    assert_not_loaded("not built: run python -m metta_fastagent build")
    assert not _native.cache_folder().exists()
    assert not calls(log)


@pytest.mark.parametrize("cxx", ["/nonexistent", "/nonexistent -m64", "'unclosed"])
def test_a_compiler_that_is_not_there(cxx, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(_native.CannotBuildError, match="no C\\+\\+ compiler: CXX"):
        _native.build()
    assert_not_loaded("not built; no C++ compiler")
    assert not _native.cache_folder().exists()


def test_an_empty_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_native.CannotBuildError, match="none of c\\+\\+, g\\+\\+, clang\\+\\+ is on the PATH"):
        _native.build()
    assert_not_loaded("not built; no C++ compiler")


def test_no_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "SOURCES", tmp_path / "nowhere")
    with pytest.raises(_native.CannotBuildError, match="no C\\+\\+ sources"):
        _native.build()
    assert_not_loaded("no C++ sources in", "nowhere")


def test_an_unsupported_platform(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(_native.CannotBuildError, match="unsupported platform plan9"):
        _native.build()
    assert_not_loaded("unsupported platform plan9")


def test_a_compiler_that_fails(fake_compiler):
    fake_compiler("echo 'first line'; echo 'fatal error: out of luck' >&2; exit 1")
    with pytest.raises(_native.BuildError) as caught:
        _native.build()
    assert not isinstance(caught.value, _native.CannotBuildError)
    assert str(caught.value).splitlines()[0].endswith("fake-c++ failed with status 1: fatal error: out of luck")
    assert "first line" in str(caught.value)
    assert_not_loaded("the last build failed", "out of luck")
    fake_compiler()
    _native.build()
    assert_not_loaded("cannot be loaded")


def test_a_compiler_that_cannot_be_executed(tmp_path, monkeypatch):
    script = tmp_path / "not-a-program"
    script.write_bytes(b"\x7fELF nonsense")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(_native.BuildError, match=r"not-a-program cannot be run"):
        _native.build()


def test_a_compiler_that_writes_garbage(fake_compiler):
    fake_compiler()
    assert _native.build().read_text() == "no library\n"
    assert_not_loaded("cannot be loaded", "run python -m metta_fastagent build --force")


def test_a_compiler_that_writes_nothing(fake_compiler):
    fake_compiler("exit 0")
    with pytest.raises(_native.BuildError, match="reported success and wrote no library"):
        _native.build()
    assert_not_loaded("the last build failed")


def test_a_compiler_that_does_not_know_the_processor(fake_compiler):
    log = fake_compiler('case "$*" in *=native*) exit 1;; esac')
    _native.build()
    assert "-march=native" in calls(log)[0]
    assert "=native" not in calls(log)[-1]


def test_a_compiler_that_hangs_is_ended_with_all_its_processes(fake_compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "COMPILE_LIMIT_S", 0.3)
    fake_compiler(f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(_native.BuildError, match="did not end in time"):
        _native.build()
    status = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/status")
    until = time.monotonic() + 10
    while is_running(status) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(status)


def is_running(status):
    """Whether the process is there and not one that ended and waits for its parent."""
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


def test_a_failed_build_keeps_the_one_before(fake_compiler):
    fake_compiler()
    library = _native.build()
    fake_compiler("exit 1", version="2.0")
    with pytest.raises(_native.BuildError):
        _native.build()
    assert_not_loaded(str(library))


def test_a_library_outlives_its_compiler(fake_compiler, monkeypatch):
    fake_compiler()
    library = _native.build()
    monkeypatch.setenv("CXX", "/nonexistent")
    assert _native.build() == library
    with pytest.raises(_native.CannotBuildError):
        _native.build(force=True)


def test_a_second_build_does_not_compile_again(fake_compiler):
    log = fake_compiler()
    library = _native.build()
    compiled = len(calls(log))
    assert compiled == 2
    assert _native.build() == library
    assert len(calls(log)) == compiled
    _native.build(force=True)
    assert len(calls(log)) == 2 * compiled


def test_another_compiler_builds_again(fake_compiler):
    fake_compiler(version="1.0")
    _native.build()
    log = fake_compiler(version="1.1")
    compiled = len(calls(log))
    _native.build()
    assert len(calls(log)) == 2 * compiled


def change_source():
    (_native.SOURCES / "add_one.cpp").write_text(SOURCE + "\n// changed\n")


def change_header():
    (_native.SOURCES / "shared.h").write_text("// changed\n")


@pytest.mark.parametrize(
    "change",
    [
        change_source,
        change_header,
        lambda: (_native.SOURCES / "second.cpp").write_text(""),
        lambda: setattr(torch, "__version__", "9.9.9"),
        lambda: setattr(_native, "_processor", lambda: ["model name: another"]),
        lambda: setattr(_native, "FLAGS", (*_native.FLAGS, "-Wall")),
    ],
    ids=["source", "header", "new source", "torch version", "processor", "flags"],
)
def test_what_is_built_for_something_else_is_ignored(change, fake_compiler, monkeypatch):
    # Remembered by the fixture, which puts them back.
    for owner, name in ((torch, "__version__"), (_native, "_processor"), (_native, "FLAGS")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    log = fake_compiler()
    _native.build()
    compiled = len(calls(log))
    assert_not_loaded("cannot be loaded")
    change()
    assert_not_loaded("not built", "for another version, PyTorch or CPU")
    _native.build()
    assert len(calls(log)) > compiled


def shorten(library):
    library.write_bytes(library.read_bytes()[:-3])


def empty(library):
    library.write_bytes(b"")


def alter(library):
    library.write_bytes(library.read_bytes().replace(b"no", b"on"))


@pytest.mark.parametrize("damage", [shorten, empty, alter, Path.unlink])
def test_a_damaged_library_is_not_loaded_and_is_built_again(damage, fake_compiler):
    fake_compiler()
    library = _native.build()
    sound = library.read_bytes()
    damage(library)
    assert_not_loaded("damaged or missing file", str(library), "run python -m metta_fastagent build")
    assert _native.build() == library
    assert library.read_bytes() == sound


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"library": "../../etc/passwd"}', '{"library": 3}', "\0\udcff"])
def test_a_damaged_record_counts_as_none(text, fake_compiler):
    fake_compiler()
    _native.build()
    (record,) = _native.cache_folder().glob("*.json")
    record.write_text(text, errors="surrogateescape")
    assert_not_loaded("not built")
    library = _native.build()
    assert_not_loaded("cannot be loaded", str(library))


def test_a_file_where_the_cache_should_be(fake_compiler):
    fake_compiler()
    _native.cache_folder().write_text("in the way")
    with pytest.raises(_native.BuildError, match="Error: "):
        _native.build()
    assert_not_loaded("not built")
    assert _native.cache_folder().read_text() == "in the way"


def test_nothing_raises_out_of_load(monkeypatch):
    def fail(sanitize):
        raise MemoryError("none left")

    monkeypatch.setattr(_native, "_key", fail)
    assert_not_loaded("MemoryError: none left")


def test_the_cache_folder(monkeypatch, tmp_path):
    assert _native.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(_native.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _native.cache_folder() == tmp_path / "xdg" / "metta_fastagent"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _native.cache_folder() == tmp_path / "home" / ".cache" / "metta_fastagent"


def test_sanitizers_have_builds_of_their_own(fake_compiler, monkeypatch):
    log = fake_compiler()
    _native.build()
    assert "-fsanitize" not in log.read_text()
    _native.build(sanitize="address")
    assert "-fsanitize=address" in calls(log)[-1]
    monkeypatch.setenv(_native.SANITIZE_VARIABLE, "undefined")
    assert_not_loaded("not built")
    monkeypatch.setenv(_native.SANITIZE_VARIABLE, "adress")
    assert_not_loaded("METTA_FASTAGENT_SANITIZE: got 'adress', expected one of address, undefined")
    with pytest.raises(ValueError, match="sanitize: got 'adress', expected one of address, undefined or None"):
        _native.build(sanitize="adress")


def test_builds_at_once_in_one_process(fake_compiler):
    fake_compiler()
    built = []
    threads = [threading.Thread(target=lambda: built.append(_native.build(force=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4 and len(set(built)) == 1
    assert sorted(path.suffix for path in _native.cache_folder().iterdir()) == [".json", ".so"]


@pytest.mark.parametrize(("body", "status"), [("exit 1", 1), ("", 1), (None, command_line.CANNOT_BUILD)])
def test_the_command_says_in_one_line_why_not(body, status, fake_compiler, monkeypatch, capsys):
    if body is None:
        monkeypatch.setenv("CXX", "/nonexistent")
    else:
        fake_compiler(body)
    assert command_line.main(["build", "--quiet"]) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("metta_fastagent: native CPU operators not")
    assert output.err.count("\n") == 1


def test_the_command_without_arguments_explains(capsys):
    assert command_line.main([]) == 0
    assert f"PyTorch {torch.__version__}" in capsys.readouterr().out


@pytest.fixture
def start(tmp_path):
    """Starts a Python on a checkout of the test's own: the package with the sources beside it."""
    (tmp_path / "metta_fastagent").symlink_to(PACKAGE)
    started = []

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment.pop("METTA_FASTAGENT_BACKEND", None)
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.skipif(not any(map(_native.shutil.which, _native.COMPILERS)), reason="no C++ compiler")
def test_two_processes_build_at_once_and_a_third_loads(start):
    builds = [start("-m", "metta_fastagent", "build") for _ in range(2)]
    for process in builds:
        output = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, output
        assert output.startswith("native CPU operators ready in ")
    assert sorted(path.suffix for path in _native.cache_folder().iterdir()) == [".json", ".so"]
    code = (
        "import torch; from metta_fastagent import _native;"
        "assert not _native.loaded() and not hasattr(torch.ops.build_test, 'add_one_');"
        "assert _native.load() and _native.loaded(), _native.reason();"
        "print(torch.ops.build_test.add_one_(torch.zeros(3)).tolist(), _native.reason())"
    )
    loads = start("-c", code)
    output = loads.communicate(timeout=300)[0].decode()
    assert output.startswith("[1.0, 1.0, 1.0] built with "), output


def test_a_killed_build_leaves_nothing_that_is_loaded(start, fake_compiler, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    fake_compiler(f'for last; do :; done; echo half > "$last"; echo $$ > {pid}; sleep 1000')
    process = start("-m", "metta_fastagent", "build")
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    (left,) = _native.cache_folder().iterdir()
    assert left.name.startswith("build-") and (left / "add_one.o").read_text() == "half\n"
    assert_not_loaded("not built")
    # What it left goes once it is old.
    fake_compiler()
    monkeypatch.setattr(_native, "ABANDONED_S", -1)
    library = _native.build()
    assert sorted(path.suffix for path in _native.cache_folder().iterdir()) == [".json", ".so"]
    assert_not_loaded(str(library))
