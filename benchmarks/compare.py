"""Compares our speed of generation with other engines on the same weights, and with the memory's bandwidth.

Weights are random, decoding is greedy and never stops early. Each engine is a process of its own that is idle while
another runs. Engines run in groups that fit in memory, with ours in float32, int8 and int4 in each group; ratios are
taken within a round of a group, and their median counts. Greedy ids are compared with ours of float32 before timing.
Prefill ends with the first new token. Conversion to an engine's own format is not timed. The compile cache is a new
folder, so that the first call compiles, and a second process finds the compiled code there. What is fast differs by
kind of processor: ``results/compare`` has a file for each, and a run is compared with that of its own.

    python -m benchmarks.compare
    python -m benchmarks.compare --against benchmarks/results/compare
    python -m benchmarks.compare --size toy --repetitions 1 --patience 0
    python -m benchmarks.compare --engines 'tf_gpt2:*' 'llama_cpp:*' --jobs decode
    python -m benchmarks.compare --engines 'tf_gpt2:int*' 'openvino:*' --output benchmarks/results/compare --add

Peers need environments: 'make bench-peers'. With ``--against``, the exit code is 1 if ours got slower. With ``--add``
the groups that were measured are put beside those in the file, so that one result can be measured in several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ceiling import DTYPES, PAGE_SIZES, Reader, available_cores, bytes_per_token, measure_gemm
from benchmarks.engines import (
    ENGINES,
    IN_ONE_ROUND,
    JOBS,
    OWN_FORMAT,
    REFERENCE,
    adapter_of,
    is_ours,
    label,
    make_groups,
    precision_of,
    python_of,
    why_missing,
)
from benchmarks.goals import check_goals
from benchmarks.peers.protocol import Worker, run_prepare, write_model
from benchmarks.report import add_against, file_of_kind, print_fallen, read_stored, start_report, store
from benchmarks.rounds import count_disturbed, find_parting, measure, wait_until_quiet
from benchmarks.summary import Result, check_alike, find_slower, join, summarize
from benchmarks.tables import print_result
from tf_gpt2.checkpoint.params import count_params, leaves, random_params
from tf_gpt2.config import SIZES, GPT2Config

OUTPUT = Path("build/bench/compare.json")
PAGES = {"huge": "glibc.malloc.hugetlb=1", "default": "glibc.malloc.hugetlb=0"}
"""The value of ``GLIBC_TUNABLES`` for all engines: whether ``malloc`` asks the kernel for huge pages."""
FIRST_NEW = 16
"""New tokens of the first call: few, because it shows the cost of starting, not the speed of decoding."""
SHAPES = {"toy": GPT2Config(n_vocab=1000, n_ctx=1024, n_embd=64, n_head=2, n_layer=2), **SIZES}


def main() -> int:
    arguments = parse_arguments()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported, to write the checkpoint
    stored, earlier = read_alike(arguments), read_earlier(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = Comparison(Path(folder), arguments).run()
    result = join(earlier, result) if earlier else result
    result["summary"] = summarize(result)
    result["goals"] = check_goals(result)
    print_result(result)
    store(result, arguments.output)
    if stored is None:
        return 0
    return print_fallen(find_slower(stored, result, arguments.margin), arguments)


def read_alike(arguments: argparse.Namespace) -> Result | None:
    """Reads the stored result to compare with, if there is one; exits when it was not measured alike."""
    if arguments.against and arguments.against.is_dir():
        arguments.against = file_of_kind(arguments.against)
        if not arguments.against.exists():
            print(f"nothing to compare with: no {arguments.against}; --output {arguments.against.parent} makes one")
            return None
    stored = read_stored(arguments)
    try:
        if stored:
            check_alike(stored, vars(arguments))
    except ValueError as error:
        raise SystemExit(f"--against {arguments.against}: {error}") from error
    return stored


def read_earlier(arguments: argparse.Namespace) -> Result | None:
    """Reads the result to add to, if there is one; exits when it was not measured alike."""
    if not (arguments.add and arguments.output.exists()):
        return None
    earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
    try:
        check_alike(earlier, vars(arguments))
    except ValueError as error:
        raise SystemExit(f"--add to {arguments.output}: {error}") from error
    return earlier


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="124M", help="size of model; 'toy' to try this program")
    parser.add_argument("--engines", nargs="+", default=["*"], metavar="PATTERN", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="jobs to measure")
    parser.add_argument("--pages", choices=PAGES, default="huge", help="of memory, for all engines")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds per job, after the first call")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine, per round")
    parser.add_argument("--threads", type=int, default=available_cores(), help="for each")
    parser.add_argument("--peers_in_memory", "--peers-in-memory", type=int, default=5, help="at a time, beside ours")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="JSON file to write, or folder of one file per kind of processor"
    )
    parser.add_argument("--add", action="store_true", help="put the groups beside those in the output's file")
    add_against(parser)
    arguments = parser.parse_args()
    if min(arguments.repetitions, arguments.threads, arguments.peers_in_memory) < 1:
        parser.error("--repetitions, --threads and --peers_in_memory must be at least 1")
    chosen = [engine for engine in ENGINES if any(fnmatch.fnmatch(engine, p) for p in arguments.engines)]
    arguments.output = file_of_kind(arguments.output)
    arguments.engines = list(dict.fromkeys([REFERENCE, *chosen]))  # its ids and logits are needed in any case
    return arguments


def in_turn(jobs: list[str]) -> list[list[str]]:
    """Returns lists of jobs; those in one list are done in one round."""
    together = [job for job in jobs if job in IN_ONE_ROUND]
    return [[job] for job in jobs if job not in IN_ONE_ROUND] + ([together] if together else [])


class Comparison:
    """One run.

    Args:
        folder: empty; gets the weights in all formats, and the compile cache.
        arguments: from the command line.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        self.folder = folder
        self.arguments = arguments
        self.config = SHAPES[arguments.size]
        self.start_s = time.perf_counter()
        self.skipped: dict[str, str] = {}
        self.engines: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Measures everything; returns the result to store, but for the summary."""
        arguments = self.arguments
        self.say(f"{arguments.size}, {arguments.threads} threads, {arguments.pages} pages, weights in {self.folder}")
        n_params = self.write_weights()
        ready = [engine for engine in arguments.engines if self.prepare(engine)]
        gemm = measure_gemm()
        n_bytes = bytes_per_token(self.config)
        self.readers = {
            pages: Reader(n_bytes, huge_pages=pages == "huge", n_threads=arguments.threads) for pages in PAGE_SIZES
        }
        groups = make_groups(ready, arguments.peers_in_memory)
        measured = [self.run_group(group, is_first=group is groups[0]) for group in groups]
        for engine in filter(is_ours, self.engines):
            if "warm" not in self.engines[engine]:
                with self.start(engine) as worker:
                    self.first_call(engine, worker)
        return {
            **start_report("compare", arguments, "size", "pages", "threads", "repetitions"),
            "jobs": {job: JOBS[job]._asdict() for job in arguments.jobs},
            "bytes_per_token": n_bytes,
            "bytes_per_token_of": {dtype: bytes_per_token(self.config, dtype) for dtype in DTYPES},
            "weight_bytes": 4 * n_params,
            "gemm_flop_per_s": gemm,
            "duration_s": time.perf_counter() - self.start_s,
            "labels": {engine: label(engine) for engine in arguments.engines},
            "skipped": self.skipped,
            "engines": self.engines,
            "groups": measured,
            **count_disturbed(measured),
        }

    def write_weights(self) -> int:
        """Writes one set of weights twice: as OpenAI's checkpoint, for ours, and in the form that the peers read."""
        import tf_gpt2

        params = random_params(self.config)
        # The tied embedding makes a token predict itself. With gains of both signs and little bias the text varies.
        params["ln_f"]["g"] -= 1
        params["ln_f"]["b"] *= np.float32(0.1)
        tf_gpt2.save_gpt2_params_to_tf_ckpt(params, self.config.to_hparams(), self.folder)
        write_model(self.folder, self.config.to_hparams(), dict(leaves(params)))
        return count_params(params)

    def prepare(self, engine: str) -> bool:
        """Lets an engine write its own format; returns whether it can take part."""
        reason = why_missing(engine)
        if reason is None and adapter_of(engine) in OWN_FORMAT:
            self.say(f"preparing {engine}")
            try:
                run_prepare(python_of(engine), adapter_of(engine), self.folder, precision_of(engine))
            except RuntimeError as error:
                reason = str(error)
        if reason is not None:
            self.skip(engine, reason)
        return reason is None

    def skip(self, engine: str, reason: str) -> None:
        """Drops an engine, and prints why."""
        self.skipped[engine] = reason
        self.say(f"without {engine}: {reason}")

    def start(self, engine: str) -> Worker:
        """Starts an engine's process, and lets it load the weights."""
        environment = {
            "GLIBC_TUNABLES": PAGES[self.arguments.pages],
            "TF_GPT2_COMPILE_CACHE": str(self.folder / "compiled"),
        }
        wait_until_quiet(self.arguments.patience)
        return Worker(
            python_of(engine),
            adapter_of(engine),
            self.folder,
            precision=precision_of(engine),
            n_threads=self.arguments.threads,
            environment=environment,
        )

    def run_group(self, engines: list[str], *, is_first: bool) -> dict[str, Any]:
        """Starts engines, does each job with all of them in turn, and ends them."""
        with contextlib.ExitStack() as stack:
            workers = {}
            for engine in engines:
                self.say(f"starting {engine}")
                try:
                    worker = stack.enter_context(self.start(engine))
                    self.first_call(engine, worker)
                    workers[engine] = worker
                except RuntimeError as error:
                    if engine == REFERENCE:
                        raise
                    self.skip(engine, str(error))
            jobs = {}
            for together in in_turn(self.arguments.jobs):
                ours_only = JOBS[together[0]].ours_only
                asked = {e: w for e, w in workers.items() if is_ours(e) or not ours_only}
                if is_first or not ours_only:
                    jobs |= self.run_jobs(together, asked)
        return {"engines": list(workers), "jobs": jobs}

    def first_call(self, engine: str, worker: Worker) -> None:
        """Records an engine's time to its first result; for ours, also that of a process that finds compiled code."""
        reply = worker.ask(**self.task("decode") | {"max_new_tokens": FIRST_NEW})
        times = {"ready_s": worker.loaded["ready_s"], "first_call_s": reply["prefill_s"] + reply["decode_s"]}
        if engine not in self.engines:
            facts = {name: worker.loaded[name] for name in ("versions", "load_s")}
            memory = {name: reply[name] for name in ("peak_bytes", "huge_page_bytes")}
            self.engines[engine] = {**facts, **times, **memory}
        elif is_ours(engine):
            self.engines[engine]["warm"] = times

    def greedy_ids(self, job: str, workers: dict[str, Worker]) -> dict[str, list[list[int]]]:
        """Does a job once with each engine; drops those that fail, so that the others' results are not lost."""
        ids = {}
        for engine, worker in workers.items():
            try:
                ids[engine] = worker.ask(**self.task(job))["ids"]
            except RuntimeError as error:
                if engine == REFERENCE:
                    raise
                self.skip(engine, f"{job}: {error}")
        return ids

    def run_jobs(self, jobs: list[str], workers: dict[str, Worker]) -> dict[str, Any]:
        """Compares the ids of each job, then measures rounds of all."""
        partings: dict[str, Any] = {}
        for job in jobs:
            self.say(f"{job}: comparing ids")
            ids = self.greedy_ids(job, workers)
            workers = {engine: workers[engine] for engine in ids}
            prompts = self.task(job)["prompts"]
            partings[job] = {
                engine: find_parting(workers[REFERENCE], prompts, ids[REFERENCE], ids[engine])
                for engine in workers
                if engine != REFERENCE
            }
        self.say(f"{', '.join(jobs)}: {self.arguments.repetitions} rounds of {len(workers)} engines")
        rounds = measure(
            workers,
            {job: self.task(job) for job in jobs},
            self.readers if "decode" in jobs else {},
            n_rounds=self.arguments.repetitions,
            patience_s=self.arguments.patience,
        )
        return {job: {"parting": partings[job], "rounds": rounds[job]} for job in jobs}

    def task(self, job: str) -> dict[str, Any]:
        """Returns the request that all engines get."""
        return JOBS[job].task(self.config.n_vocab)

    def say(self, line: str) -> None:
        """Prints the progress on standard error."""
        print(f"{time.perf_counter() - self.start_s:6.0f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
