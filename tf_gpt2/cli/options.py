"""The options that commands share, and the loading of the model that they name.

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
    "min_p": (float, 0.0, "P", "draw from tokens at least P times as likely as the likeliest; 0 for all"),
    "typical_p": (float, 1.0, "P", "draw from the most typical tokens of mass P"),
    "repetition_penalty": (float, 1.0, "X", "above 1: tokens of the text so far, prompt included, get less likely"),
    "presence_penalty": (float, 0.0, "X", "above 0: tokens that occur in the new text get less likely"),
    "frequency_penalty": (float, 0.0, "X", "above 0: tokens get less likely the more often they occur in the new text"),
    "no_repeat_ngram_size": (int, 0, "N", "repeat no N tokens in a row; 0 allows all"),
    "min_new_tokens": (int, 0, "N", "fewest new tokens"),
}
"""Type, default, name of the value and help of the options that ``generate`` takes under the same name."""


class Parser(argparse.ArgumentParser):
    """A parser that prints its errors safely, and its help like any other output."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2; the message may quote arguments of any content and length."""
        super().error(printable(" ".join(message.split())))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Prints help; unlike ``argparse``, fails when standard output does not accept it."""
        if file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The object that commands are added to; ``argparse`` has no public name for its type."""


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that name the model."""
    command.add_argument(
        "--model_size",
        default="124M",
        metavar="SIZE",
        help=f"{', '.join(SIZES)}, tiny (embedded), or a folder of any format",
    )
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="folder of the models' folders")


def add_generation_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that decide how a text continues, and where it ends."""
    command.add_argument(
        "--n_tokens_to_generate", "--max_new_tokens", type=natural, default=40, metavar="N", help="most new tokens"
    )
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 chooses the likeliest token")
    command.add_argument(
        "--top_k", type=natural, default=0, metavar="K", help="draw from the K likeliest tokens; 0 for all"
    )
    command.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of mass P"
    )
    for name, (kind, default, value, text) in SAMPLING_FLAGS.items():
        command.add_argument(f"--{name}", type=kind, default=default, metavar=value, help=text)
    command.add_argument("--seed", type=natural, default=0, metavar="S", help="the same seed gives the same text")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"end before TEXT; \n is a new line; repeatable"
    )


def generation_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of ``add_generation_options``, but for the seed, as ``TextGenerator.generate`` takes them."""
    settings = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", *SAMPLING_FLAGS)}
    stops = [text.replace(r"\n", "\n") for text in options.stop]
    return {**settings, "max_new_tokens": options.n_tokens_to_generate, "stop": stops}


def add_stride_option(command: argparse.ArgumentParser) -> None:
    """Adds the option of what measures perplexity."""
    command.add_argument(
        "--stride",
        type=positive,
        default=argparse.SUPPRESS,
        metavar="N",
        help="by how many tokens the window moves on (default: half the window)",
    )


def add_speed_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that decide how fast a model runs."""
    command.set_defaults(computes=True)
    dtypes = ("float32", "bfloat16", "int8", "int4")
    command.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights")
    command.add_argument("--adapter", type=Path, metavar="DIR", help="folder of a LoRA adapter, PEFT's too")
    command.add_argument("--threads", type=positive, metavar="N", help="cores to compute on; all by default")


def find_model(options: argparse.Namespace) -> Path:
    """Returns the folder or file of the model that the options name; downloads it when it is not there."""
    from tf_gpt2.checkpoint.formats import recognize
    from tf_gpt2.checkpoint.load import find_folder

    path = find_folder(options.model_size, options.models_dir)
    recognize(path)  # says which of several formats is taken, before standard error is TensorFlow's
    return path


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
    return TextGenerator.from_checkpoint(folder, dtype=options.dtype, adapter=options.adapter)


def natural(text: str) -> int:
    """Reads an integer of at least 0."""
    return bounded_int(text, 0)


def positive(text: str) -> int:
    """Reads an integer of at least 1."""
    return bounded_int(text, 1)


def bounded_int(text: str, least: int) -> int:
    """Reads an integer of at least ``least``."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value
