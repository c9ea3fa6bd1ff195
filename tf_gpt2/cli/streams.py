"""Reads and writes the standard streams, prints messages safely, and keeps TensorFlow quiet.

Imports no TensorFlow. Only results go to stdout; all other output for people goes through ``printable``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

BYTE_ORDER_MARK = "\ufeff"
MESSAGE_START, MESSAGE_END = 700, 300
"""Characters shown of a long message's start and end: it may quote an argument of millions of characters."""
FATAL_LINES = 20
"""Most lines shown of TensorFlow's output before it ended the process."""
LOG_LINE = re.compile(r"[IWE]\d{4} |\d{4}-\d\d-\d\d [\d:.]+: [IWE] |WARNING: All log messages before absl")
"""Matches lines of TensorFlow's log that do not explain the end of the process."""


def open_closed_streams() -> None:
    """Opens the standard streams that the caller has closed, as with ``2>&-``.

    Otherwise the next opened file takes the stream's number, and TensorFlow's C++ writes its log to number 2, whatever
    file that is. Reading or writing a closed stream is still an error, but for messages, which are dropped.

    Source: gnulib, ``stdopen.c``.
    """
    for number, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def read_argument(text: str) -> str:
    """Returns the argument, or standard input for ``-``, read as UTF-8 in any locale."""
    return read_stdin().decode("utf-8", "replace").removeprefix(BYTE_ORDER_MARK) if text == "-" else text


def read_utf8(name: str) -> str:
    """Reads a file, or standard input for ``-``; fails on bytes that are not UTF-8, rather than replace them."""
    content = read_stdin() if name == "-" else Path(name).read_bytes()
    try:
        return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"FILE must be text in UTF-8, and {name} has the byte 0x{content[error.start]:02x} at {error.start}, which "
            f"is not UTF-8; convert it, as with iconv -t UTF-8"
        ) from None


def read_stdin() -> bytes:
    """Reads all of standard input."""
    with named_errors("cannot read standard input"):
        return sys.stdin.buffer.read()


def read_lines() -> Iterator[str]:
    """Yields the lines of standard input without their line ends; shows a prompt in a terminal."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # adds history and arrow keys to ``input``
        with contextlib.suppress(EOFError):
            while True:
                yield input("> ")
        write("\n")
        return
    mark = BYTE_ORDER_MARK  # before the first line only
    while True:
        with named_errors("cannot read standard input"):
            line = sys.stdin.buffer.readline().decode("utf-8", "replace")
        if not line:
            return
        yield line.removeprefix(mark).rstrip("\r\n")
        mark = ""


def write(text: str) -> None:
    """Writes to stdout as UTF-8 in any locale, because a completion may hold any character."""
    with named_errors("cannot write to standard output"):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


def write_names(text: str) -> None:
    """Writes text with names of files to stdout: unchanged for a program, printable for a terminal."""
    if sys.stdout.isatty():
        text = printable_lines(text)
    with named_errors("cannot write to standard output"):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()


def flush_output() -> None:
    """Writes out the buffered output of others, e.g. of ``argparse``."""
    with named_errors("cannot write to standard output"):
        sys.stdout.flush()


def discard_output() -> None:
    """Drops output that could not be written, so that Python does not try again, and complain, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def named_errors(failure: str) -> Iterator[None]:
    """Puts ``failure`` before the message of an OSError; passes on a ``BrokenPipeError``: the reader has ended."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{failure}: {error.strerror}") from error


# ---- messages


def printable(text: str) -> str:
    """Makes a message safe to show: a terminal obeys escape sequences, and some characters reorder the text.

    Args:
        text: the message, which may quote names, addresses and arguments of any content and length.

    Returns:
        The text, cut in the middle, with escapes for unprintable characters except newlines and tabs.
    """
    if len(text) > MESSAGE_START + MESSAGE_END:
        n_left_out = len(text) - MESSAGE_START - MESSAGE_END
        text = f"{text[:MESSAGE_START]} … ({n_left_out} characters) … {text[-MESSAGE_END:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Makes each line of a longer text safe to show."""
    return "\n".join(map(printable, text.split("\n")))


def complain(message: str) -> None:
    """Prints one line on standard error; ignores that it cannot be written."""
    with contextlib.suppress(OSError):
        print(f"tf-gpt2: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def complain_with_stack() -> None:
    """Prints the current exception with its traceback."""
    with contextlib.suppress(OSError):
        print(printable_lines(traceback.format_exc().rstrip()), file=sys.stderr, flush=True)


class Terminal:
    """Standard error as it was before ``quiet_tensorflow`` redirected it.

    Args:
        file: the file to print to.
    """

    def __init__(self, file: TextIO):
        self.file = file

    def tell(self, text: str) -> None:
        """Prints a message that is neither a result nor an error."""
        print(printable(text), file=self.file, flush=True)


@contextlib.contextmanager
def open_terminal() -> Iterator[Terminal]:
    """Opens standard error for messages that people see even inside ``quiet_tensorflow``."""
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as file:
        yield Terminal(file)


class PrintableFormatter(logging.Formatter):
    """Formats log records so that they are safe to show."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record's line, with those of its traceback if it has one."""
        return printable_lines(super().format(record))


@contextlib.contextmanager
def shown_log(*, is_wanted: bool) -> Iterator[None]:
    """Shows the package's log on standard error, from level DEBUG on, if wanted."""
    if not is_wanted:
        yield
        return
    logger = logging.getLogger("tf_gpt2")
    level = logger.level
    with open_terminal() as terminal:
        handler = logging.StreamHandler(terminal.file)
        handler.setFormatter(PrintableFormatter("tf-gpt2: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)


# ---- TensorFlow's log


@contextlib.contextmanager
def quiet_tensorflow(*, show_on_error: bool) -> Iterator[None]:
    """Keeps TensorFlow's log from the terminal; with ``show_on_error``, shows it after an exception.

    C++ writes it straight to file descriptor 2, and some of it in spite of ``TF_CPP_MIN_LOG_LEVEL``. When C++ ends the
    process, which no ``except`` notices, ``last_words`` shows the end of the log.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as notes, last_words(notes.fileno(), terminal):
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except Exception:
            if show_on_error:
                os.write(terminal, printable_lines(read_notes(notes.fileno())).encode("utf-8", "replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


@contextlib.contextmanager
def last_words(notes: int, terminal: int) -> Iterator[None]:
    """Starts a second process that shows the end of the log if this process ends inside, e.g. by ``abort()``.

    The second process waits at a pipe, whose other end the system closes when this process ends. It is forked, which is
    safe only before TensorFlow starts threads: a program that has imported TensorFlow before gets none.

    Args:
        notes: file descriptor of the log that C++ writes.
        terminal: file descriptor to show its end on.
    """
    if not hasattr(os, "fork") or "tensorflow" in sys.modules or threading.active_count() > 1:
        yield
        return
    pipe, alive = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        os.setsid()  # so that Ctrl-C does not end it
        os.close(alive)
        if not os.read(pipe, 1):
            os.write(terminal, fatal_lines(read_notes(notes)).encode("utf-8", "replace"))
        os._exit(0)
    os.close(pipe)
    try:
        yield
    finally:
        os.write(alive, b".")
        os.close(alive)
        os.waitpid(watcher, 0)


def fatal_lines(notes: str) -> str:
    """Returns the last lines that may explain the end, safe to show; "" where there are none, as after a kill."""
    lines = [printable(line) for line in notes.splitlines() if line.strip() and not LOG_LINE.match(line)]
    return "".join(f"{line}\n" for line in ["tf-gpt2: TensorFlow ended the process:", *lines[-FATAL_LINES:]] if lines)


def read_notes(notes: int) -> str:
    """Reads the log that C++ has written."""
    return os.pread(notes, os.fstat(notes).st_size, 0).decode("utf-8", "replace")
