"""Compares the speed of a SavedModel in TensorFlow Serving's C++ loader with that of ``TextGenerator``.

Continues prompts of one length in batches of several sizes, greedily and by drawing. Ids are compared first. The three
ways, plain signatures, signatures that XLA compiles and ``TextGenerator``, take turns in each repetition; ratios are
taken within it. ``TextGenerator`` does without native kernels, which a stock server does not have.

    python -m benchmarks.serving
    python -m benchmarks.serving --model_dir checkpoints/tiny checkpoints/124M

Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.report import start_report, store
from benchmarks.rounds import wait_until_quiet
from tests.serving.loader import Loader, build
from tf_gpt2 import TextGenerator, export_saved_model, generate
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.runtime import kernels
from tf_gpt2.serving.export import size_bytes
from tf_gpt2.text.generator import DTYPES

RESULTS = Path(__file__).parent / "results" / "serving.json"
BATCHES = (1, 8, 32)
PROMPT = 16
CHOICES: dict[str, dict[str, float]] = {"likeliest": {}, "drawn": {"temperature": 0.8, "top_p": 0.9}}
"""The options of each row, which decide how the next token is chosen."""
GOALS = {"plain of xla": 0.6, "xla of generator": 0.9}
"""The least rate of a way, as a share of another's."""

Timed = Callable[[], tuple[list[list[int]], float]]
"""Makes one request; returns the new ids, and the seconds."""


def main() -> None:
    arguments = parse_arguments()
    os.environ[kernels.ENV_VAR] = "xla"  # like is compared with like
    result: dict[str, Any] = {
        **start_report("serving", arguments, "n_tokens", "repetitions"),
        "versions": {"tensorflow": tf.__version__},
        "prompt": PROMPT,
        "choices": CHOICES,
        "models": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch) / "load")
        for folder in arguments.model_dir:
            for dtype in arguments.dtypes:
                found = measure_model(folder, dtype, program, Path(scratch), arguments)
                result["models"].append(found)
                print_model(found)
    store(result, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model_dir", "--model-dir", nargs="+", type=Path, default=[embedded_dir()], help="checkpoints"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of the weights")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="rows of a request")
    parser.add_argument("--n_tokens", "--n-tokens", type=int, default=40, help="new tokens per row")
    parser.add_argument("--repetitions", type=int, default=7, help="of each way, after the first")
    parser.add_argument("--patience_s", "--patience-s", type=float, default=30, help="longest wait for a quiet machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def measure_model(
    folder: Path, dtype: str, program: Path, scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Exports one model, loads it, and times requests."""
    generator = TextGenerator.from_checkpoint(folder, dtype=dtype)
    start = time.perf_counter()
    exported = export_saved_model(generator, scratch / f"{folder.name}-{dtype}", xla=True)
    export_s = time.perf_counter() - start
    with Loader(program, exported, xla=True) as server:
        return {
            "model": folder.name,
            "dtype": dtype,
            "n_params": generator.model.config.n_params,
            "export_s": export_s,
            "size_bytes": size_bytes(exported),
            "load_s": server.load_s,
            "loaded_rss_bytes": server.rss_bytes(),
            "choices": {
                name: {
                    batch: measure_batch(generator, server, batch, options, arguments) for batch in arguments.batches
                }
                for name, options in CHOICES.items()
            },
            "rss_bytes": server.rss_bytes(),
        }


def measure_batch(
    generator: TextGenerator, server: Loader, batch: int, options: dict[str, float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compares the ways' ids, then times them in turn; returns seconds by way."""
    ids = np.random.default_rng(batch).integers(generator.model.config.n_vocab, size=(batch, PROMPT))
    ways = make_ways(generator, server, ids, arguments.n_tokens, options)
    first = {name: request() for name, request in ways.items()}
    if any(rows != first["generator"][0] for rows, _ in first.values()):
        raise SystemExit("TextGenerator and the server give different ids: there is nothing to time")
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    wait_until_quiet(arguments.patience_s)
    for _ in range(arguments.repetitions):
        for name, request in ways.items():
            times_s[name].append(request()[1])
    n_tokens = sum(map(len, first["generator"][0]))
    return {
        "n_tokens": n_tokens,
        "first_s": {name: seconds for name, (_, seconds) in first.items()},
        "steady_s": times_s,
        "ratios": ratios(times_s),
    }


def make_ways(
    generator: TextGenerator, server: Loader, ids: np.ndarray, n_tokens: int, options: dict[str, float]
) -> dict[str, Timed]:
    """Returns the ways to continue the same ids; a server's time is that of the signature, without the exchange."""
    seeds = list(range(len(ids)))
    of_rows = {name: [value] * len(ids) for name, value in options.items()}
    inputs = {"ids": ids, "lengths": [PROMPT] * len(ids), "max_new_tokens": [n_tokens], "seed": seeds, **of_rows}

    def serve(signature: str) -> tuple[list[list[int]], float]:
        answer = server.ask(signature, **inputs)
        if answer.error:
            raise SystemExit(answer.error)
        counts = answer.outputs["completion_length"]
        return [row[:n].tolist() for row, n in zip(answer.outputs["ids"], counts, strict=True)], answer.run_s

    def in_python() -> tuple[list[list[int]], float]:
        start = time.perf_counter()
        stop_ids = generator.stop_ids(stop_at_end_of_text=True)
        rows = generate(
            generator.model, ids.tolist(), max_new_tokens=n_tokens, stop_ids=stop_ids, seed=seeds, **options
        ).ids
        return rows, time.perf_counter() - start

    return {
        "plain": lambda: serve("generate_ids"),
        "xla": lambda: serve("generate_ids_xla"),
        "generator": in_python,
    }


def ratios(steady_s: dict[str, list[float]]) -> dict[str, float]:
    """Returns each goal's ratio of rates: the median over repetitions."""
    pairs = {goal: goal.split(" of ") for goal in GOALS}
    return {
        goal: statistics.median(b / a for a, b in zip(steady_s[one], steady_s[other], strict=True))
        for goal, (one, other) in pairs.items()
    }


def print_model(found: dict[str, Any]) -> None:
    print(
        f"{found['model']} {found['dtype']}: exported in {found['export_s']:.1f} s, "
        f"{found['size_bytes'] / 1e6:.0f} MB, loaded in {found['load_s']:.1f} s, "
        f"{found['rss_bytes'] / 1e6:.0f} MB in memory"
    )
    for choice, batches in found["choices"].items():
        for batch, one in batches.items():
            print(f"  {choice}, {batch} rows, {one['n_tokens']} new tokens")
            print_batch(one)


def print_batch(one: dict[str, Any]) -> None:
    for name, times_s in one["steady_s"].items():
        median_s = statistics.median(times_s)
        print(
            f"    {name:10} first {one['first_s'][name]:6.2f} s, then {1e3 * median_s:8.1f} ms = "
            f"{1 / median_s:7.2f} requests/s = {one['n_tokens'] / median_s:8.1f} tokens/s"
        )
    for goal, ratio in one["ratios"].items():
        print(f"    {goal:17} {ratio:.2f}, goal {GOALS[goal]}: {'held' if ratio >= GOALS[goal] else 'missed'}")


if __name__ == "__main__":
    main()
