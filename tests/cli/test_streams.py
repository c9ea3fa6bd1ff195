"""What the command line reads and writes where: closed streams, byte order marks, messages, TensorFlow's last words."""

import codecs
import http.server
import io
import logging
import os
import shlex
import subprocess
import sys
import threading

import pytest

from tf_gpt2 import cli
from tf_gpt2.cli import streams

TINY = ["--model_size", "tiny"]
GENERATE = ["generate", "To be", *TINY, "--max_new_tokens", "3"]
MARK = codecs.BOM_UTF8


def shell(arguments, redirections, *, text=b"", **variables):
    """Runs ``tf-gpt2`` from a shell, which can close its streams."""
    command = f"{shlex.join([sys.executable, '-m', 'tf_gpt2', *arguments])} {redirections}"
    return subprocess.run(
        ["sh", "-c", command], input=text, capture_output=True, timeout=300, env={**os.environ, **variables}
    )


class Input:
    """Standard input with bytes for a command that is run in this process."""

    def __init__(self, content):
        self.buffer = io.BytesIO(content)

    def isatty(self):
        return False


@pytest.fixture
def run(capfdbinary, monkeypatch):
    """Runs a command in this process; gives its exit code, output and messages."""

    def command(*arguments, text=b""):
        monkeypatch.setattr(sys, "stdin", Input(text))
        code = cli.main(arguments)
        return (code, *capfdbinary.readouterr())

    return command


# ---- closed streams


def test_with_standard_error_closed_the_text_is_printed_and_messages_are_not():
    assert shell(GENERATE, "").stdout == shell(GENERATE, "2>&-").stdout != b""
    failed = shell(["encode", "x", "--model_size", "117M"], "2>&-")
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, b"", b"")
    assert shell(["banana"], "2>&-").returncode == 2


@pytest.mark.parametrize("arguments", [["encode", "To be", *TINY], ["info"], ["--help"], ["encode", "--help"]])
@pytest.mark.parametrize("output", [">&-", ">/dev/full"])
def test_output_that_cannot_be_written_is_a_failure_in_one_line(arguments, output):
    result = shell(arguments, output)
    assert (result.returncode, result.stdout, result.stderr.count(b"\n")) == (1, b"", 1)
    assert result.stderr.startswith(b"tf-gpt2: cannot write to standard output: ")


@pytest.mark.parametrize("arguments", [["encode", "-"], ["decode", "-"], ["perplexity", "-"], ["interactive"]])
def test_input_that_cannot_be_read_is_a_failure_in_one_line(arguments):
    result = shell([*arguments, *TINY], "<&-")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"tf-gpt2: cannot read standard input: Bad file descriptor\n"


def test_closed_streams_that_nobody_needs_are_no_failure(tmp_path):
    assert shell(["encode", "To be", *TINY], "<&-").returncode == 0
    page = tmp_path / "page.html"
    assert shell(["explain", "To be", *TINY, "--out", str(page)], "<&- >&- 2>&-").returncode == 0
    assert page.read_bytes().startswith(b"<!")


# ---- byte order marks


@pytest.mark.parametrize("command", [["encode", "-"], ["generate", "-", "--max_new_tokens", "3"], ["perplexity", "-"]])
def test_a_byte_order_mark_before_standard_input_is_no_text(run, command):
    text = b"To be, or not to be\n"
    code, output, _ = run(*command, *TINY, text=MARK + text)
    assert (code, output) == run(*command, *TINY, text=text)[:2]
    assert code == 0


def test_a_byte_order_mark_before_ids_is_none(run):
    code, ids, _ = run("encode", "To be", *TINY)
    assert run("decode", "-", *TINY, text=MARK + ids) == (code, b"To be\n", b"")


def test_a_byte_order_mark_before_a_file_is_no_text(run, tmp_path):
    text = b"To be, or not to be\n"
    (tmp_path / "marked").write_bytes(MARK + text)
    code, output, _ = run("perplexity", str(tmp_path / "marked"), *TINY)
    assert (code, output) == run("perplexity", "-", *TINY, text=text)[:2]
    assert code == 0


def test_a_byte_order_mark_elsewhere_is_text(run):
    assert run("encode", "-", *TINY, text=b"a" + MARK)[1] != run("encode", "-", *TINY, text=b"a")[1]
    twice = run("encode", "-", *TINY, text=MARK + MARK)[1]
    assert twice == run("encode", "\ufeff", *TINY)[1] != b"\n"


def test_a_byte_order_mark_before_the_first_line_of_a_conversation_is_no_text(run, monkeypatch):
    from tf_gpt2.text.conversation import Conversation

    lines = []
    monkeypatch.setattr(Conversation, "add", lambda self, line, **_: lines.append(line) or [])
    assert run("interactive", *TINY, text=MARK + b"one\n" + MARK + b"two\r\nthree")[0] == 0
    assert lines == ["one", "\ufefftwo", "three"]


def test_the_place_of_a_byte_that_is_not_utf_8_counts_from_the_files_start(run, tmp_path):
    (tmp_path / "text").write_bytes(MARK + b"ab\xff")
    code, _, message = run("perplexity", str(tmp_path / "text"), *TINY)
    assert code == 1
    assert b"0xff at 5" in message


# ---- messages

ESCAPES = "\x1b]0;title\x07\x1b[31mred\x9b2J\r\x00\u202egnp.exe\u2028"


def is_safe(message):
    """Whether a terminal shows these lines, and obeys nothing in them."""
    return all(c.isprintable() or c in "\n\t" for c in message.decode("utf-8"))


def test_printable_text_stays_and_the_rest_is_escaped():
    assert streams.printable("naïve 日本語 🙂\tx\ny") == "naïve 日本語 🙂\tx\ny"
    assert streams.printable("\x1b[31m\x9b\r\u202e\udcff") == r"\x1b[31m\x9b\r\u202e\udcff"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "x", "--model_size", ESCAPES.replace("\x00", "")],
        ["decode", ESCAPES, *TINY],
        ["perplexity", ESCAPES.replace("\x00", ""), *TINY],
        ["download", ESCAPES],
    ],
)
def test_what_a_message_quotes_moves_no_terminal(arguments, debug, run):
    code, output, message = run(*arguments, *debug)
    assert (code, output) == (1, b"")
    assert is_safe(message)
    assert b"31m" in message


def test_the_stack_and_the_log_move_no_terminal_either(run, monkeypatch):
    def fail(_):
        logging.getLogger("tf_gpt2.somewhere").debug("saw %s", ESCAPES)
        raise RuntimeError(ESCAPES)

    monkeypatch.setattr("tf_gpt2.cli.files.run_info", fail)
    code, _, message = run("info", "--debug")
    assert code == 1
    assert message.startswith(b"tf-gpt2: saw ")
    assert b"in fail" in message
    assert is_safe(message)
    code, _, message = run("info")
    assert is_safe(message)
    assert b"saw" not in message
    assert b"RuntimeError" in message


def test_usage_errors_move_no_terminal(capfdbinary):
    for arguments in ([ESCAPES], ["encode", "x", ESCAPES], ["generate", "x", "--seed", ESCAPES], ["info", "a\nb"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
        assert is_safe(capfdbinary.readouterr().err)


def test_a_long_argument_gives_a_short_message(run, capfdbinary):
    long = "x" * 10_000_000
    for arguments in (
        ["decode", long, *TINY],
        ["encode", "x", "--model_size", long],
        ["decode", long, *TINY, "--debug"],
    ):
        code, _, message = run(*arguments)
        assert code == 1
        assert len(message) < 10_000
    for arguments in (["generate", "x", "--top_k", long], [long]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert len(capfdbinary.readouterr().err) < 10_000


def test_what_a_server_says_moves_no_terminal(run, monkeypatch, tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404, "No \x1b[31mred\x9b thing")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TF_GPT2_BASE_URL", f"http://127.0.0.1:{server.server_port}/\x1b[2J")
    code, _, message = run("download", "124M", "--models_dir", str(tmp_path))
    server.shutdown()
    server.server_close()
    assert code == 1
    assert is_safe(message)


def test_a_command_of_a_conversation_is_quoted_safely(run):
    code, _, message = run("interactive", *TINY, text=f"/{ESCAPES}\n/{'x' * 100_000}\n".encode())
    assert code == 0
    assert is_safe(message)
    assert len(message) < 10_000


def test_names_of_files_are_printed_as_they_are_for_a_program_and_safely_for_a_terminal(capfdbinary, monkeypatch):
    streams.write_names("a\x1b[31m\udcff\n")
    assert capfdbinary.readouterr().out == b"a\x1b[31m\xff\n"
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    streams.write_names("a\x1b[31m\udcff\n")
    assert capfdbinary.readouterr().out == rb"a\x1b[31m\udcff" + b"\n"


def test_debug_shows_the_log_and_nothing_else_does(run, monkeypatch):
    def log(_):
        logging.getLogger("tf_gpt2.checkpoint").debug("ignores %s", "global_step")

    monkeypatch.setattr("tf_gpt2.cli.files.run_info", log)
    assert run("info") == (0, b"", b"")
    assert run("info", "--debug") == (0, b"", b"tf-gpt2: ignores global_step\n")
    assert run("info") == (0, b"", b"")


# ---- TensorFlow's notes


def test_a_flag_that_tensorflow_does_not_know_is_named():
    result = shell(GENERATE, "", XLA_FLAGS="--xla_no_such_\x1bflag")
    assert result.returncode != 0
    assert result.stdout == b""
    assert b"--xla_no_such_" in result.stderr
    assert is_safe(result.stderr)


def test_a_file_of_flags_is_read_by_tensorflow(tmp_path):
    (tmp_path / "flags").write_text("--tf_xla_clustering_debug\n")
    result = shell(GENERATE, "", TF_XLA_FLAGS=str(tmp_path / "flags"))
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == shell(GENERATE, "").stdout


PROGRAM = """
import os, sys
from tf_gpt2.cli.streams import quiet_tensorflow
with quiet_tensorflow(show_on_error=False):
    notes = ["I0000 a note", "2026-01-01 00:00:00.000000: W tensorflow/core/x.cc:1] a warning", ""]
    for line in notes + [f"line {i}" for i in range(int(sys.argv[2]))]:
        os.write(2, f"{line}\\n".encode())
    exec(sys.argv[1])
print("went on")
"""


def ended(end, n_lines):
    """Runs a program that ends in the midst of TensorFlow's notes, so many lines of which are more than notes."""
    command = [sys.executable, "-c", PROGRAM, end, str(n_lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


DEATHS = ["os.abort()", "os._exit(3)", "os.kill(os.getpid(), 9)", "import ctypes; ctypes.string_at(0)"]


@pytest.mark.parametrize("end", DEATHS)
def test_the_last_words_are_shown_whatever_ends_the_process(end):
    result = ended(end, 100)
    assert result.returncode != 0
    assert result.stderr.splitlines()[1:] == [f"line {i}" for i in range(80, 100)]


@pytest.mark.parametrize(("end", "n_lines"), [("pass", 9), ("raise SystemExit(0)", 9), *[(end, 0) for end in DEATHS]])
def test_there_are_no_last_words_of_a_process_that_goes_on_or_has_none(end, n_lines):
    result = ended(end, n_lines)
    assert result.stderr == ""
    assert (result.stdout == "went on\n") == (end == "pass")
