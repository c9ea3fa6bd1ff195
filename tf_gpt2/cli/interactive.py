"""The command ``interactive``: a conversation in the terminal.

Imports TensorFlow where it is needed, as ``cli`` does. Only the model's text goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tf_gpt2.cli.options import (
    add_generation_options,
    add_model_options,
    add_speed_options,
    find_model,
    generation_settings,
    load_generator,
    open_stderr,
    quiet_tensorflow,
    write,
)
from tf_gpt2.errors import ContextLengthError

if TYPE_CHECKING:
    from tf_gpt2.text.conversation import Conversation

Notify = Callable[[str], None]
"""Says something to the user that is no text of the model's."""

HELP = r"""Each line is added to the text, which the model then continues; an empty line only continues it.
\n stands for a new line; begin with // for a text that begins with /.
/undo    forget the last line and its continuation
/reset   forget all
/help    this
Ctrl-C stops a continuation, and at the prompt ends the program, as Ctrl-D does."""


def add_interactive(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``interactive``."""
    command = commands.add_parser(
        "interactive",
        help="continue a text turn by turn",
        description="Reads lines from standard input, adds each to the text so far, and continues it.",
    )
    command.set_defaults(run=run_interactive)
    add_model_options(command)
    add_generation_options(command)
    add_speed_options(command)
    return command


def run_interactive(options: argparse.Namespace) -> None:
    """Takes turns until the input ends."""
    folder, settings = find_model(options), generation_settings(options)
    with (
        open_stderr() as stderr,
        quiet_tensorflow(show_on_error=options.debug),
    ):

        def notify(text: str) -> None:
            print(text, file=stderr, flush=True)

        generator = load_generator(folder, options)
        from tf_gpt2.text.conversation import Conversation

        conversation = Conversation(generator)
        if sys.stdin.isatty():
            notify("/help explains. The first continuation takes some seconds more than the others.")
        while (line := read_line()) is not None:
            answer(conversation, line, notify, seed=options.seed, **settings)


def read_line() -> str | None:
    """Gives the next line without its end, or ``None`` when there is none; asks for it in a terminal."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # gives ``input`` a memory and its arrow keys
        try:
            return input("> ")
        except EOFError:
            write("\n")
            return None
    line = sys.stdin.buffer.readline().decode("utf-8", "replace")
    return line.rstrip("\r\n") if line else None


def answer(conversation: Conversation, line: str, notify: Notify, **settings: Any) -> None:
    """Does what a line asks for: a command, or a turn."""
    if line.startswith("/") and not line.startswith("//"):
        obey(conversation, line.strip(), notify)
        return
    try:
        take_turn(conversation, line.removeprefix("/").replace(r"\n", "\n"), notify, **settings)
    except ContextLengthError as error:
        notify(f"{error}")


def obey(conversation: Conversation, command: str, notify: Notify) -> None:
    """Runs a command."""
    if command == "/reset":
        conversation.reset()
    elif command == "/undo":
        if not conversation.undo():
            notify("there is nothing to undo")
    elif command == "/help":
        notify(HELP)
    else:
        notify(f"there is no command {command}; /help lists them, // begins a text with /")


def take_turn(conversation: Conversation, text: str, notify: Notify, **settings: Any) -> None:
    """Prints a continuation as it comes; Ctrl-C ends it, and not the conversation."""
    session = conversation.session
    n_dropped, window = session.n_dropped, conversation.generator.model.config.n_ctx
    pieces = conversation.add(text, **settings)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            write(piece)
    write("\n")
    if session.n_dropped > n_dropped:
        notify(f"the window of {window} tokens was full: the oldest {session.n_dropped - n_dropped} were dropped")
    if session.finish_reason == "context":
        notify(f"the window of {window} tokens is full: the next turn drops the oldest half; /reset starts anew")
