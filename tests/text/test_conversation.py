"""``Conversation`` against ``TextGenerator`` over the whole text, and the command ``interactive`` in a terminal."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.cli.generate import take_turn
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.text.conversation import Conversation
from tf_gpt2.text.generator import TextGenerator

COMMAND = [sys.executable, "-m", "tf_gpt2", "interactive", "--model_size", "tiny"]


@pytest.fixture(scope="module")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())


@pytest.fixture
def conversation(generator):
    return Conversation(generator, jit_compile=False)


def take(conversation, text, **options):
    return "".join(conversation.add(text, **options))


def test_completions_are_those_of_the_whole_text(conversation, generator):
    text, encoder = "", generator.encoder
    for turn, options in [
        ("To be", {}),
        ("\nHAMLET:\n", {"temperature": 0.7, "seed": 3}),
        ("", {}),
        (" What say you?\n", {"stop": "\n"}),
    ]:
        whole = conversation.text + turn
        assert encoder.encode(whole) == conversation.session.ids + encoder.encode(turn)  # or it may differ
        wanted = "".join(generator.stream(whole, max_new_tokens=12, jit_compile=False, **options))
        assert take(conversation, turn, max_new_tokens=12, **options) == wanted
        text += turn + wanted
    assert conversation.text.startswith(text)


def test_a_stop_string_is_remembered_and_not_given(conversation):
    given = take(conversation, "To be", stop=["\n"], max_new_tokens=30)
    assert "\n" not in given
    assert conversation.text.startswith(f"To be{given}\n")
    assert conversation.text.count("\n") <= 2  # one token may hold two
    assert conversation.session.finish_reason == "stop"
    assert len(conversation.session.ids) < 30


def test_undo_and_reset(conversation):
    assert not conversation.undo()
    take(conversation, "To be", max_new_tokens=5)
    before = conversation.text
    take(conversation, " or", max_new_tokens=5)
    next(conversation.add(" not", max_new_tokens=20))  # left in the middle
    assert conversation.undo()
    assert conversation.undo()
    assert conversation.text == before
    take(conversation, " or", max_new_tokens=5)
    conversation.reset()
    assert (conversation.text, conversation.session.ids) == ("", [])
    assert not conversation.undo()
    assert take(conversation, "To be", max_new_tokens=5) == before.removeprefix("To be")


def test_turns_that_were_dropped_are_not_undone(conversation):
    for _ in range(3):
        take(conversation, " the" * 100, max_new_tokens=5)
    assert conversation.session.n_dropped > 0
    assert [conversation.undo() for _ in range(4)].count(True) < 3


def test_what_is_no_text_is_refused(conversation):
    with pytest.raises(TypeError, match=r"^text must be a str, got 5"):
        conversation.add(5)
    with pytest.raises(ContextLengthError, match=r"n_ctx=256"):
        conversation.add("O " * 300)
    with pytest.raises(ValueError, match=r"^temperature must"):
        conversation.add("O", temperature=-1)
    assert conversation.text == ""
    assert not conversation.undo()


# ---- the command


def converse(text, *arguments, **options):
    return subprocess.run([*COMMAND, *arguments], input=text.encode(), capture_output=True, timeout=300, **options)


def test_each_line_of_a_pipe_is_a_turn(generator, tmp_path):
    lines = ["To be\\n", "/undo", "/undo", "To be", "", "/nothing", "//x", "O " * 300, "/reset", "To be", "/help"]
    options = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "max_new_tokens": 7, "seed": 4}
    flags = ["--temperature=0.6", "--top-k=20", "--repetition_penalty=1.1", "--n-tokens-to-generate=7", "--seed=4"]
    result = converse("\n".join(lines), *flags, "--stop=xyz", cwd=tmp_path)
    conversation = Conversation(generator, jit_compile=False)
    turns = ["To be\n", "To be", "", "/x", "To be"]
    wanted = ""
    for i, turn in enumerate(turns):
        wanted += take(conversation, turn, stop="xyz", **options) + "\n"
        if i in (0, 3):
            conversation.reset()
    assert (result.returncode, result.stdout.decode()) == (0, wanted)
    notes = result.stderr.decode()
    assert notes.startswith("there is nothing to undo\nthere is no command /nothing")
    assert "n_ctx=256" in notes
    assert "/undo" in notes.partition("n_ctx=256")[2]
    assert "Traceback" not in notes


def test_a_wrong_option_is_a_failure(tmp_path):
    result = converse("To be\n", "--top_p=0", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().startswith("tf-gpt2: top_p must")


def test_a_full_window_is_said(conversation, capfdbinary):
    notes = []
    for text in ("To be", ""):
        take_turn(conversation, text, notes.append, max_new_tokens=1000)
    assert len(notes) == 3
    assert "is full: the next turn drops the oldest half" in notes[0]
    assert "the oldest 128 were dropped" in notes[1]
    assert capfdbinary.readouterr().out.count(b"\n") >= 2


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments):
        self.file, other = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=other, stdout=other, stderr=other, start_new_session=True, close_fds=True
        )
        os.close(other)
        self.seen = ""

    def wait_for(self, pattern, timeout_s=120):
        """Gives what comes up to a pattern."""
        end = time.monotonic() + timeout_s
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < end, self.seen
            if select.select([self.file], [], [], 1)[0]:
                self.seen += os.read(self.file, 4096).decode("utf-8", "replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text):
        os.write(self.file, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def interrupt_until_it_ends(self, tries=10):
        """Gives the exit code. Python's readline misses a signal between its prompt and its wait for a key."""
        for _ in range(tries):
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(5)
        raise AssertionError(f"goes on after {tries} interrupts: {self.seen}")


@pytest.fixture
def terminal():
    terminal = Terminal("--n_tokens_to_generate=100000", "--temperature=2", "--stop=never said")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.file)


def test_an_interrupt_ends_the_completion_and_then_the_program(terminal):
    terminal.wait_for("/help explains")
    terminal.wait_for("> ")
    terminal.type("To be\n")
    terminal.wait_for(r"To be\r\n[^>]{2,}")
    terminal.interrupt()
    terminal.wait_for("> ")
    terminal.type("/undo\n")
    terminal.wait_for("> ")
    terminal.type("/undo\n")
    terminal.wait_for("nothing to undo")
    terminal.wait_for("> ")
    assert terminal.interrupt_until_it_ends() == 130


def test_the_end_of_input_ends_the_program(terminal):
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
