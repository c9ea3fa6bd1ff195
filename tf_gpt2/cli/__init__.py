"""The command line ``tf-gpt2``: parses the arguments, calls the package, prints the results.

Only results go to stdout. Only commands that need TensorFlow import it, so that ``--help`` and ``encode`` answer at
once.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence

from tf_gpt2._version import package_version
from tf_gpt2.cli.batch import add_batch
from tf_gpt2.cli.convert import add_convert
from tf_gpt2.cli.export import add_export
from tf_gpt2.cli.files import add_decode, add_download, add_encode, add_info
from tf_gpt2.cli.finetune import add_finetune
from tf_gpt2.cli.generate import add_generate, add_interactive
from tf_gpt2.cli.measure import add_explain, add_perplexity
from tf_gpt2.cli.options import Parser
from tf_gpt2.cli.streams import (
    complain,
    complain_with_stack,
    discard_output,
    flush_output,
    open_closed_streams,
    shown_log,
)
from tf_gpt2.errors import GPT2Error
from tf_gpt2.runtime.memory import collect_seldom

FAILURE, INTERRUPTED = 1, 130
UNFORESEEN_LENGTH = 300
"""Most characters shown of an error whose message is not the package's own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: of the command; by default those of the process, which then runs only this command.

    Returns:
        The exit code: 0, 1 for a failure, 130 after Ctrl-C. Wrong usage exits with 2.
    """
    open_closed_streams()
    options = argparse.Namespace(debug=False)
    try:
        try:
            words = with_underscores(sys.argv[1:] if arguments is None else arguments)
            make_parser().parse_args(words, namespace=options)
            if arguments is None and getattr(options, "computes", False):
                collect_seldom()
            with shown_log(is_wanted=options.debug):
                options.run(options)
        finally:
            flush_output()
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has ended, as in "tf-gpt2 … | head -1"
        discard_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        if isinstance(error, OSError):
            discard_unwritten()
        if options.debug:
            complain_with_stack()
        else:
            complain(describe(error))
        return FAILURE
    return 0


def describe(error: Exception) -> str:
    """Returns an error's message; an unforeseen error also gets its type's name, and is cut."""
    if isinstance(error, (GPT2Error, ValueError, TypeError, OSError, ImportError)):
        return str(error)
    reason = " ".join(str(error).split())[:UNFORESEEN_LENGTH]
    return f"{type(error).__name__}: {reason} (--debug shows where)"


def discard_unwritten() -> None:
    """Drops output that standard output does not accept, e.g. because the disk is full."""
    try:
        flush_output()
    except OSError:
        discard_output()


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Replaces ``--top-k`` by ``--top_k``, up to a bare ``--``, which only text follows."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [
        "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument
        for argument in arguments[:end]
        for name, equals, value in [argument.partition("=")]
    ]
    return options + list(arguments[end:])


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser; each command stores the function that runs it as ``run``."""
    parser = Parser(prog="tf-gpt2", description="GPT-2 in TensorFlow and Keras.")
    parser.add_argument("--version", action="version", version=f"tf-gpt2 {package_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_generate,
        add_interactive,
        add_perplexity,
        add_explain,
        add_batch,
        add_export,
        add_convert,
        add_finetune,
        add_download,
        add_encode,
        add_decode,
        add_info,
    ):
        for command in leaf_commands(add(commands)):
            command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
            command.add_argument(
                "--debug", action="store_true", help="show an error's traceback, and the package's log"
            )
    return parser


def leaf_commands(command: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields a command's own commands, or the command if it has none."""
    choices = [action.choices for action in command._actions if isinstance(action.choices, dict)]
    for one in choices[0].values() if choices else ():
        yield from leaf_commands(one)
    if not choices:
        yield command
