"""The commands that continue a text: ``generate``, and ``interactive``, a conversation in the terminal.

Imports TensorFlow only when a command runs. Only the model's text goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tf_gpt2.cli.options import (
    Commands,
    add_generation_options,
    add_model_options,
    add_speed_options,
    find_model,
    generation_settings,
    load_generator,
    positive,
)
from tf_gpt2.cli.streams import open_terminal, quiet_tensorflow, read_argument, read_lines, write
from tf_gpt2.errors import ContextLengthError

if TYPE_CHECKING:
    from tf_gpt2.text.conversation import Conversation

Notify = Callable[[str], None]
"""Shows a message to the user, apart from the model's text."""

HELP = r"""Each line is added to the text, which the model then continues; an empty line only continues it.
\n stands for a new line; begin with // for a text that begins with /.
/undo    forget the last line and its continuation
/reset   forget the whole text
/help    show this help
Ctrl-C stops a continuation, and at the prompt ends the program, as Ctrl-D does."""


def add_generate(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``generate``."""
    command = commands.add_parser("generate", help="continue a text", description="Continues PROMPT.")
    command.set_defaults(run=run_generate)
    command.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from standard input")
    add_model_options(command)
    add_generation_options(command)
    command.add_argument(
        "--num_samples", type=positive, default=1, metavar="N", help="texts to print, with seeds S, S+1, …"
    )
    command.add_argument(
        "--overflow",
        choices=("error", "truncate", "slide"),
        default="error",
        help="when the window is full: refuse or end; drop the prompt's beginning; forget the older half and continue",
    )
    command.add_argument("--stream", action="store_true", help="print the text as it comes")
    command.add_argument(
        "--prompt_lookup", action="store_true", help="guess from the text so far: faster where it repeats itself"
    )
    add_speed_options(command)
    return command


def add_interactive(commands: Commands) -> argparse.ArgumentParser:
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


def run_generate(options: argparse.Namespace) -> None:
    """Prints completions, with a line ``=== sample 1 ===`` before each if there are several."""
    prompt, folder = read_argument(options.prompt), find_model(options)
    settings = {
        **generation_settings(options),
        "prompt_lookup": options.prompt_lookup,
        "overflow": options.overflow,
    }
    with quiet_tensorflow(show_on_error=options.debug):
        generator = load_generator(folder, options)
        samples: list[Iterable[str]]
        if options.stream:
            seeds = range(options.seed, options.seed + options.num_samples)
            samples = [generator.stream(prompt, seed=seed, **settings) for seed in seeds]
        else:
            texts = generator.generate(prompt, num_samples=options.num_samples, seed=options.seed, **settings)
            samples = [[text] for text in texts]
        for i, pieces in enumerate(samples):
            if len(samples) > 1:
                write(f"=== sample {i + 1} ===\n")
            for piece in pieces:
                write(piece)
            write("\n")


def run_interactive(options: argparse.Namespace) -> None:
    """Takes turns until the input ends."""
    folder, settings = find_model(options), generation_settings(options)
    with open_terminal() as terminal, quiet_tensorflow(show_on_error=options.debug):
        generator = load_generator(folder, options)
        from tf_gpt2.text.conversation import Conversation

        conversation = Conversation(generator)
        if sys.stdin.isatty():
            terminal.tell("/help explains. The first continuation takes some seconds more than the others.")
        for line in read_lines():
            answer(conversation, line, terminal.tell, seed=options.seed, **settings)


def answer(conversation: Conversation, line: str, notify: Notify, **settings: Any) -> None:
    """Runs the command in a line that starts with /, or else takes a turn with the line as text."""
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
