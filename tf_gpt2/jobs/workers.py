"""The engine of one machine: computes parts in this process, or in several of its own.

A worker that dies, for want of memory or by a kill, is replaced, and its part given to another. ``python -m
tf_gpt2.jobs.workers FD`` is a worker: it gets a task and then parts over the connection FD, and answers with what
became of each. Imports TensorFlow only where parts are computed.
"""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_gpt2.errors import GPT2Error
from tf_gpt2.jobs.inputs import Part
from tf_gpt2.jobs.parts import PartDone, Task, do_part

if TYPE_CHECKING:
    from tf_gpt2.jobs.answers import OnBatch

MOST_DEATHS = 3
"""Workers that may die with the same part; the next one would, too."""
PATIENCE_S = 10.0
"""Longest wait for a worker without work to end by itself, so that it notes what it compiled for the next process."""
BATCH, DONE, FAILED = "batch", "done", "failed"
"""What a worker tells."""


class JobError(GPT2Error):
    """A job cannot go on: the same part ends each worker, or a worker cannot compute at all."""


def run_here(task: Task, parts: Sequence[Part], on_batch: OnBatch) -> Iterator[PartDone]:
    """Computes parts one after the other in this process."""
    for part in parts:
        yield do_part(task, part, on_batch)


def run_workers(task: Task, parts: Sequence[Part], on_batch: OnBatch, n_workers: int) -> Iterator[PartDone]:
    """Computes parts in several processes, as each is free; yields them as they are done.

    Args:
        task: the job.
        parts: which to compute.
        on_batch: told of each batch of any worker; batches of a worker that dies are told again.
        n_workers: how many processes.

    Raises:
        JobError: when a part fails.
    """
    todo = collections.deque(parts)
    deaths: collections.Counter[int] = collections.Counter()
    workers: dict[Any, Worker] = {}
    idle: list[Worker] = []
    try:
        while todo or workers:
            while todo and len(workers) < n_workers:
                worker = Worker(task)
                workers[worker.connection] = worker
                worker.give(todo.popleft())
            for connection in wait([*workers]):
                worker = workers[connection]
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    del workers[connection]
                    deaths[worker.part.index] += 1
                    refuse_more_deaths(worker, deaths[worker.part.index])
                    todo.appendleft(worker.part)
                    continue
                if kind == FAILED:
                    raise JobError(f"part {worker.part.index}: {value}")
                if kind == BATCH:
                    on_batch(*value)
                    continue
                if todo:
                    worker.give(todo.popleft())
                else:
                    idle.append(workers.pop(connection))
                    idle[-1].dismiss()
                yield value
    finally:
        for worker in workers.values():
            worker.kill()
        for worker in idle:
            worker.end()


def refuse_more_deaths(worker: Worker, n_deaths: int) -> None:
    """Raises JobError when a part has ended too many workers."""
    status, part = worker.end(), worker.part
    if n_deaths == MOST_DEATHS:
        reason = f"signal {-status}" if status < 0 else f"exit code {status}"
        raise JobError(
            f"part {part.index} ({part.file.name}, from line {part.first + 1}) ended {n_deaths} workers, the last one "
            f"with {reason}; if memory is short, take fewer --workers or a smaller --batch_size"
        )


class Worker:
    """A process that computes one part after the other.

    Args:
        task: the job.

    Attributes:
        connection: to the process.
        part: what it computes now.
    """

    part: Part

    def __init__(self, task: Task):
        ours, theirs = socket.socketpair()
        with theirs:
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tf_gpt2.jobs.workers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        self._send(task)

    def give(self, part: Part) -> None:
        """Lets the process compute a part."""
        self.part = part
        self._send(part)

    def _send(self, value: Any) -> None:
        """Sends a value; of a process that has died the caller reads that it has."""
        try:
            self.connection.send(value)
        except OSError:
            return

    def dismiss(self) -> None:
        """Lets the process end by itself."""
        self.connection.close()

    def kill(self) -> None:
        """Ends the process at once, whatever it does."""
        self._process.kill()
        self.end()

    def end(self) -> int:
        """Waits for the end of the process, but not long; returns its exit code."""
        self.dismiss()
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def serve(connection: Any) -> None:
    """Computes parts until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the first one ends the others
    try:
        task = connection.recv()
        while True:
            part = connection.recv()
            try:
                done = do_part(task, part, lambda *counts: connection.send((BATCH, counts)))
            except (EOFError, ConnectionError):
                raise
            except Exception as error:  # whatever it is, the first process reports it
                connection.send((FAILED, str(error) or type(error).__name__))
                return
            connection.send((DONE, done))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    from tf_gpt2.jobs import workers  # under its own name, by which pickle knows the classes

    workers.serve(Connection(int(sys.argv[1])))
