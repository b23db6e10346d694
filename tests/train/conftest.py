"""What the trainer's tests share: one thread, and processes that are the ranks of one run."""

import sys
from pathlib import Path

import pytest
import torch

# importlib mode puts no test folder on the path, and the ranks import their jobs by name
sys.path.insert(0, str(Path(__file__).parent))

from rank_pool import RankPool, running


@pytest.fixture
def one_thread():
    """As the command and its ranks do: a second thread gains little, waits long, and adds up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pools():
    """One RankPool for each number of ranks, kept as they take seconds to start; a broken one is replaced."""
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
