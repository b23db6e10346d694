"""Fixtures of the trainer's tests: one thread, and processes that are the ranks of a run."""

import sys
from pathlib import Path

import pytest
import torch

# importlib mode puts no test folder on the path, and the ranks import their jobs by name
sys.path.insert(0, str(Path(__file__).parent))

from rank_pool import RankPool, running


@pytest.fixture
def one_thread():
    """One thread of torch, as in the command: with more, sums are in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def pools():
    """A RankPool for each number of ranks, shared by all tests because it takes seconds to start."""
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
