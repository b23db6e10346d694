"""Fixtures of the benchmarks' tests."""

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Child processes are not workers of pytest-xdist, under which pytest-benchmark measures nothing."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
