"""Runs a command as several workers, and starts all of them again when one dies.

    python -m tf_gpt2.training.supervisor --workers 2 -- tf-gpt2 finetune --text book.txt --out checkpoints/mine

Each worker gets the variable ``TF_CONFIG``, from which ``tf-gpt2 finetune`` knows that it is one of several. A worker
that dies leaves the others without an answer; so all are ended, and the command, started again, goes on from its last
checkpoint. Imports no TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

WAIT_S = 0.2
"""Seconds between two looks at the workers."""


def supervise(
    command: Sequence[str], addresses: Sequence[str], *, own: Sequence[int] | None = None, restarts: int = 10
) -> int:
    """Runs a command as workers until all end well.

    Args:
        command: of each worker.
        addresses: ``host:port`` of all workers; the first writes the checkpoints, in a folder that all see.
        own: the places in ``addresses`` of the workers to start here; all by default.
        restarts: how often to start again at most.

    Returns:
        0, or the exit code of the worker that died when there were no restarts left.
    """
    own = range(len(addresses)) if own is None else own
    for left in range(restarts, -1, -1):
        workers = [start(command, addresses, index) for index in own]
        try:
            code = first_failure(workers)
        finally:
            end(workers)
        if not code:
            return 0
        print(f"supervisor: a worker ended with {code}; {left} restarts left", file=sys.stderr, flush=True)
    return code


def start(command: Sequence[str], addresses: Sequence[str], index: int) -> subprocess.Popen[bytes]:
    """Starts one worker."""
    cluster = {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}
    return subprocess.Popen(list(command), env={**os.environ, "TF_CONFIG": json.dumps(cluster)})


def first_failure(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all workers have ended well, or one has not; returns its exit code, or 0."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(WAIT_S)


def end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the workers that still run: they wait for one that will not answer."""
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


def free_addresses(n: int) -> list[str]:
    """Returns addresses on this machine that nobody listens on."""
    listeners = [socket.socket() for _ in range(n)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="supervisor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers on this machine")
    parser.add_argument("--addresses", nargs="+", metavar="HOST:PORT", help="of all workers, on several machines")
    parser.add_argument("--own", type=int, nargs="+", metavar="I", help="which of the addresses to start here, from 0")
    parser.add_argument("--restarts", type=int, default=10, metavar="N", help="how often to start again at most")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each worker runs, behind --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("name the command of the workers behind --")
    addresses = options.addresses or free_addresses(options.workers)
    try:
        return supervise(command, addresses, own=options.own, restarts=options.restarts)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
