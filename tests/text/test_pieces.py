"""Text in pieces: what is given is certain, nothing is lost, and it does not matter how many ids come at a time."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings, strategies as st

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.text.options import check_stops
from tf_gpt2.text.pieces import TextPieces, find_stop, has_stop, held_back
from tf_gpt2.tokenizer.encoder import Encoder

ENCODER = Encoder.from_files(embedded_dir())
LETTERS = st.text("abé🙂\n", max_size=12)
STOPS = st.lists(st.text("abé🙂\n", min_size=1, max_size=4), max_size=3)


def cut_at_once(text, stops):
    """The text before the stop string that is complete first, by trying each length."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def feed(ids, sizes, stops=()):
    """The pieces of ids that come so many at a time, over and over."""
    pieces, texts, start = TextPieces(ENCODER, stops), [], 0
    while start < len(ids):
        size = sizes[len(texts) % len(sizes)]
        texts.append(pieces.take(ids[start : start + size]))
        start += size
    return [*texts, pieces.close()], pieces


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_pieces_of_any_bytes_are_the_whole(ids, sizes):
    """The first 256 tokens are single bytes: half characters, lone continuations and all."""
    texts, pieces = feed(ids, sizes)
    assert "".join(texts) == ENCODER.decode(ids)
    assert pieces.n_ids == len(ids)


@settings(max_examples=300, deadline=None)
@given(LETTERS, st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_no_piece_ends_inside_a_character(text, sizes):
    texts, _ = feed(ENCODER.encode(text), sizes)
    assert "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)


@settings(max_examples=1000, deadline=None)
@given(LETTERS, STOPS, st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_stop_string_cuts_at_once_and_takes_nothing_back(text, stops, sizes):
    ids = ENCODER.encode(text)
    texts, pieces = feed(ids, sizes, stops)
    assert ("".join(texts), pieces.is_stopped) == cut_at_once(text, stops)
    assert has_stop(ENCODER, ids, stops) is pieces.is_stopped
    if pieces.is_stopped:  # the id that completes the stop string is the last one taken
        assert has_stop(ENCODER, ids[: pieces.n_ids], stops)
        assert not has_stop(ENCODER, ids[: pieces.n_ids - 1], stops)
        assert pieces.take(ids) == pieces.close() == ""


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=20) | LETTERS.map(ENCODER.encode), STOPS, st.integers(1, 4))
def test_what_was_given_is_the_text_of_whole_ids_and_a_rest(ids, stops, size):
    pieces, given = TextPieces(ENCODER, stops), ""
    for start in range(0, len(ids), size):
        given += pieces.take(ids[start : start + size])
        if pieces.is_stopped:
            return
        n_ids, rest = pieces.given()
        assert ENCODER.decode(ids[:n_ids]) + rest == given
        assert len(rest) < 8 or set(rest) == {"\ufffd"}  # of one token, or of half characters that follow one another
    given += pieces.close()
    n_ids, rest = pieces.given()
    assert ENCODER.decode(ids[:n_ids]) + rest == given


@settings(max_examples=300, deadline=None)
@given(LETTERS, STOPS)
def test_what_is_held_back_is_no_more_than_need_be(text, stops):
    """Of the longest end that may become a stop string there is one that it becomes with other text behind."""
    n = held_back(text, stops)
    assert n == 0 or any(stop.startswith(text[-n:]) and len(stop) > n for stop in stops)
    for longer in range(n + 1, len(text) + 1):
        assert not any(stop.startswith(text[-longer:]) and len(stop) > longer for stop in stops)


@pytest.mark.parametrize(
    ("text", "stops", "start"),
    [
        ("abc", [], None),
        ("abc", ["d"], None),
        ("abc", ["c", "bc"], 1),
        ("abc", ["abcd", "b"], 1),
        ("xabab", ["ab"], 1),
        ("", ["a"], None),
    ],
)
def test_where_a_stop_string_begins(text, stops, start):
    assert find_stop(text, stops) == start


def test_stop_strings_are_checked():
    assert check_stops("a") == ["a"]
    assert check_stops(("a", "\n\n")) == ["a", "\n\n"]
    assert check_stops([]) == []
    assert check_stops(np.array(["a"])) == ["a"]
    for wrong in (5, None, [5], b"a", [b"a"], np.array("a"), np.array(b"a"), tf.constant("a"), {"a": 1}):
        with pytest.raises(TypeError):
            check_stops(wrong)
    for wrong in ("", ["a", ""]):
        with pytest.raises(ValueError, match="stop must have no empty string"):
            check_stops(wrong)
