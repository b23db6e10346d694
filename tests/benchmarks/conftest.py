"""What the tests of the benchmarks share."""

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Processes that a test starts are no workers of pytest-xdist, in which pytest-benchmark measures nothing."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
