"""Runs rounds: the engines do the same job one after the other, each once, while the others are idle.

A machine's speed drifts, so ratios are taken within a round. A round in which other programs took more than a twentieth
of the processor's time is repeated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ceiling import Reader
from benchmarks.peers.protocol import Worker

QUIET = 0.05
"""The largest share of the processor's time that other programs may take."""
MOST_TRIES = 2

Round = dict[str, Any]
"""``replies``: per engine ``[prefill_s, decode_s]``; ``others_share``: per engine the share of others meanwhile;
``ceilings``: before, between and after the engines, the read bandwidth in bytes per second by size of pages."""


def measure(
    workers: dict[str, Worker],
    tasks: dict[str, dict[str, Any]],
    readers: dict[str, Reader],
    *,
    n_rounds: int,
    patience_s: float,
) -> dict[str, list[Round]]:
    """Runs rounds until enough were quiet, at most twice as many; returns the quietest, in order, of each job.

    Args:
        workers: by engine, loaded and warm.
        tasks: by job, for each worker; jobs that are compared with each other are done in one round.
        readers: by size of pages, measure the ceiling around each engine; may be empty.
        n_rounds: how many rounds to return.
        patience_s: how long to wait, before each round, for other programs to be quiet; with 0, no round is repeated.
    """
    rounds: list[dict[str, Round]] = []
    most = n_rounds * (MOST_TRIES if patience_s else 1)
    while len(rounds) < most and sum(most_of_others(*one.values()) < QUIET for one in rounds) < n_rounds:
        wait_until_quiet(patience_s)
        rounds.append(run_round(workers, tasks, readers))
    quietest = sorted(sorted(range(len(rounds)), key=lambda i: most_of_others(*rounds[i].values()))[:n_rounds])
    return {job: [rounds[i][job] for i in quietest] for job in tasks}


def run_round(
    workers: dict[str, Worker], tasks: dict[str, dict[str, Any]], readers: dict[str, Reader]
) -> dict[str, Round]:
    found: dict[str, Round] = {
        job: {"replies": {}, "others_share": {}, "ceilings": list(read(readers))} for job in tasks
    }
    for engine, worker in workers.items():
        for job, task in tasks.items():
            start_s, busy, own = time.perf_counter(), busy_s(), worker.cpu_s()
            reply = worker.ask(**task)
            available_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
            others_s = max(0.0, (busy_s() - busy) - (worker.cpu_s() - own))
            found[job]["replies"][engine] = [reply["prefill_s"], reply["decode_s"]]
            found[job]["others_share"][engine] = others_s / available_s
            found[job]["ceilings"] += read(readers)
    return found


def read(readers: dict[str, Reader]) -> Iterator[dict[str, float]]:
    if readers:
        yield {pages: reader.measure()["bytes_per_s"] for pages, reader in readers.items()}


def most_of_others(*rounds: Round) -> float:
    """Returns the largest share of the processor's time that others took while an engine did a job."""
    return max(share for one_round in rounds for share in one_round["others_share"].values())


def is_quiet(one_round: Round) -> bool:
    return most_of_others(one_round) < QUIET


def count_disturbed(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Returns ``n_rounds`` of all jobs in all groups, and ``n_disturbed``: how many of them were not quiet."""
    found = [one for group in groups for job in group["jobs"].values() for one in job["rounds"]]
    return {"n_rounds": len(found), "n_disturbed": len(found) - sum(map(is_quiet, found))}


def wait_until_quiet(patience_s: float, window_s: float = 0.5) -> None:
    """Waits until no other program uses the processor, at most ``patience_s``."""
    end_s = time.perf_counter() + patience_s
    while time.perf_counter() < end_s:
        busy = busy_s()
        time.sleep(window_s)
        if busy_s() - busy < QUIET * window_s * (os.cpu_count() or 1):
            return


def busy_s() -> float:
    """Returns the processor time of all programs and of other tenants of the machine; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def find_parting(
    worker: Worker, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> dict[str, Any] | None:
    """Finds where greedy ids first differ, and the distance of our logits of the two; ``None`` if all are equal.

    Args:
        worker: ours, which computes the logits.
        prompts: B lists of ids.
        ours: B lists of our new ids.
        theirs: B lists of their new ids, as long as ours.

    Raises:
        ValueError: when the lists differ in number or length: an engine has stopped early or added a token.
    """
    if [len(row) for row in theirs] != [len(row) for row in ours]:
        raise ValueError(f"rows must have {len(ours[0])} new ids each, got {[len(row) for row in theirs]}")
    for row, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        for i, pair in enumerate(zip(a, b, strict=True)):
            if pair[0] != pair[1]:
                logits = worker.logits([prompt + a[:i]])[0, -1]
                return {"row": row, "new_token": i, "ids": pair, "logit_gap": float(abs(np.subtract(*logits[[*pair]])))}
    return None
