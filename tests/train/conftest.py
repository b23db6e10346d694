"""Processes that are the ranks of one run, kept from test to test because they take seconds to start."""

import sys
from pathlib import Path

import pytest

# importlib mode puts no test folder on the path, and the ranks import their jobs by name
sys.path.insert(0, str(Path(__file__).parent))

from rank_pool import RankPool, running


@pytest.fixture(scope="session")
def pools():
    """One RankPool for each number of ranks; a broken one is replaced on the next use."""
    started: dict[int, RankPool] = {}
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture
def two_ranks(pools):
    """`two_ranks(job, *arguments)` gives [rank 0's result, rank 1's]."""
    return running(pools, 2).run


@pytest.fixture
def one_rank(pools):
    """The same in one process beside this one."""
    return running(pools, 1).run
