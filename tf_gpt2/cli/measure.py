"""The commands that measure a given text: ``perplexity`` and ``explain``.

Imports TensorFlow only when a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tf_gpt2.cli.options import (
    Commands,
    add_model_options,
    add_speed_options,
    add_stride_option,
    find_model,
    load_generator,
)
from tf_gpt2.cli.streams import Terminal, open_terminal, quiet_tensorflow, read_argument, read_utf8, write

if TYPE_CHECKING:
    from tf_gpt2.generation.scoring import Progress
    from tf_gpt2.text.perplexity import Perplexity


def add_perplexity(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``perplexity``."""
    command = commands.add_parser(
        "perplexity",
        help="how well a text is predicted",
        description="Measures how well a model predicts the text in FILE, each token once, with a sliding window.",
    )
    command.set_defaults(run=run_perplexity)
    command.add_argument("file", metavar="FILE", help="text in UTF-8; - reads it from standard input")
    add_model_options(command)
    add_stride_option(command)
    add_speed_options(command)
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    return command


def add_explain(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``explain``."""
    command = commands.add_parser(
        "explain",
        help="a picture of the model's expectations",
        description="Shows the probability of each token of TEXT, likelier tokens, and where attention went.",
    )
    command.set_defaults(run=run_explain)
    command.add_argument("text", metavar="TEXT", help="up to 255 tokens; - reads it from standard input")
    command.add_argument(
        "--out", type=Path, required=True, metavar="PAGE", help="page.html or picture.png to write or replace"
    )
    add_model_options(command)
    add_speed_options(command)
    return command


def run_perplexity(options: argparse.Namespace) -> None:
    """Prints the figures and how they were measured; shows a bar meanwhile."""
    text, folder = read_utf8(options.file), find_model(options)
    with (
        open_terminal() as terminal,
        quiet_tensorflow(show_on_error=options.debug),
        progress_bar(terminal) as on_progress,  # last, because tqdm starts a thread, and quiet_tensorflow forks
    ):
        result = load_generator(folder, options).perplexity(
            text, stride=getattr(options, "stride", None), on_progress=on_progress
        )
    write(as_json(result) if options.json else as_lines(result))


def run_explain(options: argparse.Namespace) -> None:
    """Writes the page or the picture."""
    text, folder = read_argument(options.text), find_model(options)
    with quiet_tensorflow(show_on_error=options.debug):
        from tf_gpt2.explain.explanation import explain
        from tf_gpt2.explain.files import check_out, write_explanation

        check_out(options.out)
        write_explanation(explain(load_generator(folder, options), text), options.out)


@contextlib.contextmanager
def progress_bar(terminal: Terminal) -> Iterator[Progress]:
    """Shows a bar on standard error."""
    with tqdm(desc="Scoring", unit=" tokens", file=terminal.file, leave=False) as bar:

        def show(n_done: int, n_total: int) -> None:
            bar.total = n_total
            bar.update(n_done - bar.n)

        yield show


def as_lines(result: Perplexity) -> str:
    """Formats a result for people."""
    return (
        f"perplexity     {result.per_token:.6g} per token, {result.per_word:.6g} per word\n"
        f"bits per byte  {result.bits_per_byte:.4f}\n"
        f"text           {result.n_tokens} tokens ({result.n_scored} scored), {result.n_words} words, "
        f"{result.n_bytes} bytes\n"
        f"log-likelihood {-result.nll:.4f} nats\n"
        f"protocol       window {result.window}, stride {result.stride}\n"
    )


def as_json(result: Perplexity) -> str:
    """Formats a result for a machine; infinity and NaN become null."""
    names = ("per_token", "per_word", "bits_per_byte")
    figures = {**dataclasses.asdict(result), **{name: getattr(result, name) for name in names}}
    return json.dumps({name: value if math.isfinite(value) else None for name, value in figures.items()}) + "\n"
