"""Measures the gains of huge pages and of a second thread.

The model has 124M's shapes and random weights, and greedily adds 128 tokens to 32. Each way is a process of its own
that is idle while another runs; they take turns in rounds, ids are compared first, and ratios are taken within a round.

    python -m benchmarks.pages_threads
    python -m benchmarks.pages_threads --precisions float32 --repetitions 9
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ceiling import available_cores
from benchmarks.compare import PAGES
from benchmarks.engines import JOBS, OURS
from benchmarks.peers.protocol import Worker
from benchmarks.report import start_report, store
from benchmarks.rounds import Round, is_quiet, measure, wait_until_quiet
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.config import SIZES

RESULTS = Path(__file__).parent / "results" / "pages_threads.json"
SIZE = "124M"
PRECISIONS = ("float32", "bfloat16", "int8")
JOB = JOBS["decode"]
WAYS = {
    "huge pages": {"pages": "huge", "threads": available_cores()},
    "small pages": {"pages": "default", "threads": available_cores()},
    "one thread": {"pages": "huge", "threads": 1},
}
"""The ways to run; the others are compared with the first."""


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported, to write the checkpoint
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        found = {precision: measure_ways(Path(folder), precision, arguments) for precision in arguments.precisions}
    result = {**start_report("pages_threads", arguments, "repetitions", "precisions"), "ways": WAYS, "rounds": found}
    for precision, rounds in found.items():
        print_rounds(precision, rounds)
    store(result, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["float32", "int8"], help="of the weights"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="rounds, after the first call")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine, per round")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def write_checkpoint(folder: Path) -> None:
    import tf_gpt2

    config = SIZES[SIZE]
    tf_gpt2.save_gpt2_params_to_tf_ckpt(random_params(config), config.to_hparams(), folder)


def measure_ways(folder: Path, precision: str, arguments: argparse.Namespace) -> list[Round]:
    """Starts a process for each way, compares their ids, and measures rounds."""
    task = JOB.task(SIZES[SIZE].n_vocab)
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, way in WAYS.items():
            print(f"starting {precision}, {name}", file=sys.stderr)
            wait_until_quiet(arguments.patience)
            workers[name] = stack.enter_context(start(folder, precision, way))
        ids = [worker.ask(**task)["ids"] for worker in workers.values()]
        if any(one != ids[0] for one in ids):
            raise SystemExit("the ways give different ids: there is nothing to time")
        rounds = measure(workers, {"decode": task}, {}, n_rounds=arguments.repetitions, patience_s=arguments.patience)
        return rounds["decode"]


def start(folder: Path, precision: str, way: dict[str, Any]) -> Worker:
    environment = {"GLIBC_TUNABLES": PAGES[way["pages"]]}
    return Worker(
        Path(sys.executable), OURS, folder, precision=precision, n_threads=way["threads"], environment=environment
    )


def print_rounds(precision: str, rounds: list[Round]) -> None:
    """Prints the rates, and the ratios to the first way: medians over rounds."""
    first = next(iter(WAYS))
    for name in WAYS:
        times_s = [one["replies"][name][1] for one in rounds]
        ratio = statistics.median(one["replies"][first][1] / one["replies"][name][1] for one in rounds)
        rate = (JOB.new - 1) / statistics.median(times_s)
        print(f"{precision:8} {name:12} {rate:7.1f} tokens/s  {ratio:5.2f} x {first}")
    print(f"{'':8} {sum(not is_quiet(one) for one in rounds)} of {len(rounds)} rounds were disturbed")


if __name__ == "__main__":
    main()
