"""RankPool: processes joined by gloo on this machine, which run jobs until they are closed."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from metta_fastagent.train import ranks

# seconds; far above the time of any job, so that only a deadlock reaches it
TIME_LIMIT = 120


class RankPool:
    """`count` processes, each a rank as torchrun would have started it."""

    def __init__(self, count: int) -> None:
        port = str(_free_port())
        context = multiprocessing.get_context("spawn")
        self.alive, self._processes, self._connections = True, [], []
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(index, count, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of `job(*arguments)`, one per rank. Raises AssertionError if it fails on any."""
        self._send(job, arguments)
        answers = [self._answer(connection) for connection in self._connections]
        failures = [text for succeeded, text in answers if not succeeded]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def run_to_death(self, job: Callable[..., Any], *arguments: Any) -> list[int]:
        """The exit codes of the ranks; `job` must end all of them."""
        self._send(job, arguments)
        for process in self._processes:
            process.join(TIME_LIMIT)
        codes = [process.exitcode for process in self._processes]
        self.close()
        return codes

    def close(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join()

    def _send(self, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        # plain pickle: multiprocessing's own would share the memory of tensors
        message = pickle.dumps((job, arguments))
        for connection in self._connections:
            connection.send_bytes(message)

    def _answer(self, connection: Any) -> tuple[bool, Any]:
        try:
            if connection.poll(TIME_LIMIT):
                return pickle.loads(connection.recv_bytes())
            return False, f"no answer in {TIME_LIMIT} s"
        except EOFError:
            return False, "the process died"


def running(pools: dict[int, RankPool], count: int) -> RankPool:
    """The pool of `count` ranks, started if it does not exist or is broken."""
    if count not in pools or not pools[count].alive:
        pools[count] = RankPool(count)
    return pools[count]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(index: int, count: int, port: str, connection: Any) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count), **address)
    torch.set_num_threads(1)
    with ranks.process_group():
        while True:
            job, arguments = pickle.loads(connection.recv_bytes())
            try:
                answer = True, job(*arguments)
            except Exception:
                answer = False, f"rank {index}: {traceback.format_exc()}"
            connection.send_bytes(pickle.dumps(answer))
