"""The options that commands share, and what they ask for.

Imports no TensorFlow, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from tf_gpt2.cli.streams import printable, write
from tf_gpt2.config import SIZES

if TYPE_CHECKING:
    from tf_gpt2.text.generator import TextGenerator

SAMPLING_FLAGS = {
    "min_p": (float, 0.0, "P", "draw from what is P times as likely as the likeliest; 0 for all"),
    "typical_p": (float, 1.0, "P", "draw from the most typical of mass P"),
    "repetition_penalty": (float, 1.0, "X", "above 1: less of what was said, prompt included"),
    "presence_penalty": (float, 0.0, "X", "above 0: less of what the new text has"),
    "frequency_penalty": (float, 0.0, "X", "above 0: tokens get less likely the more often they occur in the new text"),
    "no_repeat_ngram_size": (int, 0, "N", "say no N tokens in a row twice; 0 allows all"),
    "min_new_tokens": (int, 0, "N", "fewest new tokens"),
}
"""Type, default, name of the value and help of options that go to ``generate`` as they are."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are safe to show, and whose help is output like any other."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2; the message may quote arguments of any content and length."""
        super().error(printable(" ".join(message.split())))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Prints help; ``argparse`` itself ignores that standard output does not take it."""
        if file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What commands are added to; ``argparse`` has no public name for it."""


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Adds what says which model is meant."""
    command.add_argument(
        "--model_size", default="124M", metavar="SIZE", help=f"{', '.join(SIZES)}, tiny (embedded), or a folder's name"
    )
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="where the models' folders are")


def add_generation_options(command: argparse.ArgumentParser) -> None:
    """Adds what decides how a text goes on, and where it ends."""
    command.add_argument(
        "--n_tokens_to_generate", "--max_new_tokens", type=natural, default=40, metavar="N", help="most new tokens"
    )
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token")
    command.add_argument("--top_k", type=natural, default=0, metavar="K", help="draw from the K likeliest; 0 for all")
    command.add_argument("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest of mass P")
    for name, (kind, default, value, text) in SAMPLING_FLAGS.items():
        command.add_argument(f"--{name}", type=kind, default=default, metavar=value, help=text)
    command.add_argument("--seed", type=natural, default=0, metavar="S", help="the same seed gives the same text")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"end before TEXT; \n is a new line; repeatable"
    )


def generation_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what ``add_generation_options`` has read, apart from the seed, as ``TextGenerator.generate`` takes it."""
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", *SAMPLING_FLAGS)}
    stops = [text.replace(r"\n", "\n") for text in options.stop]
    return {**settings, "max_new_tokens": options.n_tokens_to_generate, "stop": stops}


def add_speed_options(command: argparse.ArgumentParser) -> None:
    """Adds what decides how fast a model runs."""
    command.set_defaults(computes=True)
    command.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="of the weights")
    command.add_argument("--threads", type=positive, metavar="N", help="cores to compute on; all by default")


def find_model(options: argparse.Namespace) -> Path:
    """Returns the folder of the model that the options name; downloads it when it is not there."""
    from tf_gpt2.checkpoint.download import resolve_checkpoint

    return resolve_checkpoint(options.model_size, options.models_dir)


def load_generator(folder: Path, options: argparse.Namespace) -> TextGenerator:
    """Starts TensorFlow and loads a model."""
    from tf_gpt2.model import require_tensorflow_backend

    require_tensorflow_backend()  # before TensorFlow's own import, which fails at a backend unknown to Keras
    import tensorflow as tf

    from tf_gpt2.runtime import prepare_process
    from tf_gpt2.text.generator import TextGenerator

    prepare_process()
    if options.threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    return TextGenerator.from_checkpoint(folder, dtype=options.dtype)


def natural(text: str) -> int:
    """Reads an integer from 0 on."""
    return bounded_int(text, 0)


def positive(text: str) -> int:
    """Reads an integer from 1 on."""
    return bounded_int(text, 1)


def bounded_int(text: str, least: int) -> int:
    """Reads an integer from ``least`` on."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value
