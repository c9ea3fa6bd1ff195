"""Measures the cost of getting a text piece by piece, and the time to the first piece.

``stream`` and ``generate`` continue one text greedily in float32: as ids, with random weights of a size's shapes or
with those of the embedded checkpoint, and with the latter also as text. Their results are compared first. Both take
turns in each repetition, and the ratio of their rates is taken within one; it should be at least 0.9.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --sizes tiny --repetitions 9
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.prompt_lookup import load
from benchmarks.report import start_report, store
from benchmarks.rounds import wait_until_quiet
from tf_gpt2 import TextGenerator, generate
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.config import SIZES
from tf_gpt2.generation.generate import stream

RESULTS = Path(__file__).parent / "results" / "streaming.json"
PROMPT = 32
GOAL = 0.9
"""Least rate of ``stream``, as a share of that of ``generate``."""

Pieces = Callable[[], Iterable[Any]]
"""Yields the ids or the text of one call, in one piece or in several."""


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        **start_report("streaming", arguments, "sizes", "n_tokens", "repetitions"),
        "versions": {"tensorflow": tf.__version__},
        "prompt": PROMPT,
        "cases": [],
    }
    for size in arguments.sizes:
        for name, (whole, pieces) in cases(size, arguments.n_tokens).items():
            found = {"size": size, "of": name, **measure(whole, pieces, arguments)}
            result["cases"].append(found)
            print_case(found, arguments.n_tokens)
    store(result, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=("tiny", *SIZES), default=["tiny", "124M"], help="which models")
    parser.add_argument("--n_tokens", "--n-tokens", type=int, default=200, help="new tokens")
    parser.add_argument("--repetitions", type=int, default=9, help="of each way, after the first")
    parser.add_argument("--patience_s", "--patience-s", type=float, default=30, help="longest wait for a quiet machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def cases(size: str, n_tokens: int) -> dict[str, tuple[Pieces, Pieces]]:
    """Returns both ways of each kind: the ids, and the text where there is a vocabulary."""
    model = load(size, "float32")
    ids = np.random.default_rng(0).integers(model.config.n_vocab, size=PROMPT).tolist()
    found: dict[str, tuple[Pieces, Pieces]] = {
        "ids": (
            lambda: generate(model, [ids], max_new_tokens=n_tokens).ids,
            lambda: stream(model, ids, max_new_tokens=n_tokens),
        )
    }
    if size == "tiny":
        generator = TextGenerator.from_checkpoint(embedded_dir())
        text = generator.encoder.decode(ids)
        found["text"] = (
            lambda: [generator.generate(text, max_new_tokens=n_tokens)],
            lambda: generator.stream(text, max_new_tokens=n_tokens),
        )
    return found


def measure(whole: Pieces, pieces: Pieces, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares the results of both ways, then times them in turn: seconds of all, and until the first piece."""
    if join(whole()) != join(pieces()):
        raise SystemExit("stream gives something else than generate: there is nothing to time")
    times: dict[str, list[float]] = {"generate_s": [], "stream_s": [], "first_piece_s": []}
    wait_until_quiet(arguments.patience_s)
    for _ in range(arguments.repetitions):
        times["generate_s"].append(consume(whole)[1])
        first_s, whole_s = consume(pieces)
        times["first_piece_s"].append(first_s)
        times["stream_s"].append(whole_s)
    ratios = [one / other for one, other in zip(times["generate_s"], times["stream_s"], strict=True)]
    return {"ratio": median(ratios), **times}


def join(pieces: Iterable[Any]) -> Any:
    """Joins texts, or lists of ids."""
    first, *others = pieces
    return sum(others, first) if isinstance(first, list) else "".join((first, *others))


def consume(pieces: Pieces) -> tuple[float, float]:
    """Returns the seconds until the first piece, and until the last."""
    start = time.perf_counter()
    moments = [time.perf_counter() - start for _ in pieces()]
    return moments[0], moments[-1]


def print_case(case: dict[str, Any], n_tokens: int) -> None:
    rates = [n_tokens / median(case[name]) for name in ("generate_s", "stream_s")]
    verdict = "reached" if case["ratio"] >= GOAL else "missed"
    first_ms = 1e3 * median(case["first_piece_s"])
    print(
        f"{case['size']:5} {case['of']:5} generate {rates[0]:8.1f} tokens/s, stream {rates[1]:8.1f}: "
        f"{case['ratio']:.2f} x (goal {GOAL}, {verdict}); first piece after {first_ms:.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
