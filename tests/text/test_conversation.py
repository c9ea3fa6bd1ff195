"""``Conversation`` against ``TextGenerator`` over the whole text, and the command ``interactive`` in a terminal."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from tf_gpt2 import cli
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.cli.generate import take_turn
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.text.conversation import Conversation
from tf_gpt2.text.generator import TextGenerator

COMMAND = [sys.executable, "-m", "tf_gpt2", "interactive", "--model_size", "tiny"]


@pytest.fixture(scope="module")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())


@pytest.fixture(autouse=True)
def one_bucket(monkeypatch):
    """Pads all short texts alike, so that the tests share what was compiled."""
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_BUCKET", 64)


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
    for wrong in (5, None, b"To be", ["To be"], np.array("To be"), tf.constant("To be")):
        with pytest.raises(TypeError, match=r"^text must be a str, got"):
            conversation.add(wrong)
    with pytest.raises(ContextLengthError, match=r"n_ctx=256"):
        conversation.add("O " * 300)
    with pytest.raises(ValueError, match=r"^temperature must"):
        conversation.add("O", temperature=-1)
    assert conversation.text == ""
    assert not conversation.undo()


# ---- turns that are left


def stop_in(generator, text, n_tokens, place):
    """A stop string that the completion holds, from some place on."""
    whole = generator.generate(text, max_new_tokens=n_tokens, jit_compile=False)
    return whole[place : place + 3]


@pytest.fixture
def by_token(monkeypatch):
    monkeypatch.setattr("tf_gpt2.generation.generate.PIECE_S", 0)  # one token at a time


@pytest.mark.parametrize("stop", ["d n", "n", "\n", "\n\n", "never said", []])
def test_a_turn_left_at_its_last_piece_is_as_one_that_was_exhausted(generator, stop, monkeypatch):
    monkeypatch.setattr("tf_gpt2.generation.generate.PIECE_S", 1000)  # two pieces, so that the last holds the end
    options = {"stop": stop, "max_new_tokens": 60}
    exhausted = Conversation(generator, jit_compile=False)
    pieces = list(exhausted.add("To be", **options))
    left = Conversation(generator, jit_compile=False)
    turn = left.add("To be", **options)
    assert [next(turn) for _ in pieces] == pieces
    turn.close()
    assert left.text == exhausted.text
    assert left.session.finish_reason == exhausted.session.finish_reason
    assert take(left, " or", max_new_tokens=5) == take(exhausted, " or", max_new_tokens=5)


def test_no_text_behind_a_stop_string_is_remembered(generator):
    exhausted = Conversation(generator, jit_compile=False)
    take(exhausted, "To be", stop="d n", max_new_tokens=60)
    for n_pieces in (1, 2, 3, 4):
        left = Conversation(generator, jit_compile=False)
        for n, _ in enumerate(left.add("To be", stop="d n", max_new_tokens=60), 1):
            if n == n_pieces:
                break
        assert exhausted.text.startswith(left.text)


@pytest.mark.parametrize("how", ["close", "suspended", "interrupt"])
@pytest.mark.parametrize(("n_held", "n_tokens"), [(1, 1), (2, 2), (1, 6)])
def test_what_nobody_saw_is_not_remembered(generator, by_token, monkeypatch, how, n_held, n_tokens):
    """A stop string that almost comes holds back the end of a token."""
    ids = generator.complete("To be", max_new_tokens=30, jit_compile=False).ids
    texts = [generator.encoder.decode(ids[:n]) for n in range(len(ids) + 1)]
    place = [n for n in range(1, len(ids)) if len(texts[n]) - len(texts[n - 1]) > n_held][n_tokens]
    shown, held = texts[place][:-n_held], texts[place][-n_held:]
    conversation = Conversation(generator, jit_compile=False)
    turn, given = conversation.add("To be", stop=held + "\0", max_new_tokens=30), ""
    while len(given) < len(shown):
        given += next(turn)
    assert given == shown
    if how == "close":
        turn.close()
    elif how == "interrupt":
        monkeypatch.setattr(conversation.session._run, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(turn)
        monkeypatch.undo()
    assert conversation.text == "To be" + shown
    anew = Conversation(generator, jit_compile=False)
    anew.session.ids = [*conversation.session.ids]  # with nothing in a cache
    after = take(conversation, " or", max_new_tokens=8)
    assert after == take(anew, " or", max_new_tokens=8)
    assert conversation.text == "To be" + shown + " or" + after


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_half_a_character_that_nobody_saw_is_not_remembered(generator, by_token):
    first, second = "é".encode()
    byte_ids = [generator.encoder.encoder[generator.encoder.byte_encoder[byte]] for byte in (first, second)]
    conversation = Conversation(generator, jit_compile=False)
    options = {"logit_bias": {byte_ids[0]: 1e6}, "no_repeat_ngram_size": 0, "max_new_tokens": 5}
    turn = conversation.add("To be", **options)
    next(turn)  # the first half is replaced when another follows it
    turn.close()
    assert conversation.text == "To be\ufffd"


@pytest.mark.parametrize("end", ["add", "undo", "reset"])
def test_an_old_iterator_changes_nothing(conversation, generator, by_token, end):
    stop = stop_in(generator, "To be", 30, 12)
    for n_pieces in (1, 3):
        conversation.reset()
        old = conversation.add("To be", stop=[stop, "\0"], max_new_tokens=30)
        given = "".join(next(old) for _ in range(n_pieces))
        if end == "add":
            new = take(conversation, " or", max_new_tokens=5)
            wanted = "To be" + given + " or" + new
        else:
            assert conversation.undo() if end == "undo" else conversation.reset() is None
            wanted = ""
        assert conversation.text == wanted
        assert list(old) == []
        assert conversation.text == wanted
        conversation.undo()
        assert conversation.text == ("To be" + given if end == "add" else "")


def test_an_old_iterator_left_at_its_stop_string_changes_nothing(conversation, generator):
    stop = stop_in(generator, "To be", 30, 12)
    old = conversation.add("To be", stop=stop, max_new_tokens=30)
    while conversation.session.finish_reason is None:
        next(old)
    take(conversation, " or", max_new_tokens=5)
    before = conversation.text
    assert list(old) == []
    assert conversation.text == before


@pytest.mark.parametrize("n_turns", [0, 1, 2])
def test_an_interrupted_read_leaves_no_turn_to_undo(conversation, monkeypatch, n_turns):
    texts = [""]
    for turn in range(n_turns):
        take(conversation, f" or{turn}", max_new_tokens=3)
        texts.append(conversation.text)
    with monkeypatch.context() as patch:
        patch.setattr("tf_gpt2.generation.session.GrowingRun", interrupt)
        if n_turns:
            patch.setattr(conversation.session._run, "extend", interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                take(conversation, " not", max_new_tokens=3)
    assert conversation.text == texts[-1]
    for text in texts[-2::-1]:
        assert conversation.undo()
        assert conversation.text == text
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


def test_a_wrong_option_is_a_failure(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"To be\n")))
    assert cli.main(["interactive", "--model_size", "tiny", "--top_p=0"]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("tf-gpt2: top_p must")


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
