"""The numbers of the picture against the float64 reference; what the text looks like, whatever is in it."""

import re
import unicodedata

import hypothesis
import numpy as np
import pytest
import reference
from hypothesis import strategies as st

from tf_gpt2.errors import ContextLengthError
from tf_gpt2.explain.explanation import LEAST_PROBABILITY, PALETTE, colour_of, explain, visible
from tf_gpt2.tokenizer.encoder import Encoder

TEXT = "To be, or not to be: that is the question."


def test_probabilities_and_ranks_are_the_references(generator):
    explanation, encoder = explain(generator, TEXT), generator.encoder
    ids = [encoder.end_of_text, *encoder.encode(TEXT)]
    assert [token.id for token in explanation.tokens] == ids
    assert "".join(token.label for token in explanation.tokens[1:]) == TEXT
    probs = reference.softmax(reference.forward(generator.model.get_params(), ids, n_head=5))
    start, *others = explanation.tokens
    assert (start.label, start.probability, start.rank, start.likeliest) == ("<|endoftext|>", None, None, ())
    ranks = []
    for token, given in zip(others, probs[:-1], strict=True):
        order = np.argsort(-given)
        assert token.probability == pytest.approx(given[token.id], rel=1e-3)
        assert abs(token.rank - 1 - order.tolist().index(token.id)) <= 1  # neighbours may be a rounding apart
        assert [candidate.id for candidate in token.likeliest] == order[:5].tolist()
        assert [c.probability for c in token.likeliest] == pytest.approx(given[order[:5]], rel=1e-3)
        assert [c.label for c in token.likeliest] == [encoder.decode([i]) for i in order[:5]]
        ranks.append(token.rank)
    assert min(ranks) == 1
    assert max(ranks) > 100
    assert explanation.attention.shape == (5, 5, len(ids), len(ids))


def test_ranks_of_equals_go_by_id(generator):
    from tf_gpt2.explain.explanation import explain_token

    logprobs = np.log(np.array([0.1, 0.3, 0.3, 0.3], np.float32))
    tokens = [explain_token(generator.encoder, i, logprobs) for i in range(4)]
    assert [token.rank for token in tokens] == [4, 1, 2, 3]
    assert [c.id for c in tokens[0].likeliest] == [1, 2, 3, 0]


def test_ids_that_stand_for_no_token_are_no_candidates(generator):
    from tf_gpt2.explain.explanation import explain_token

    logprobs = np.zeros(1100, np.float32)  # the embedded vocabulary has 1024 tokens
    logprobs[[1030, 7, 1099]] = 2.0, 1.0, 3.0
    token = explain_token(generator.encoder, 7, logprobs)
    assert [candidate.id for candidate in token.likeliest] == [7, 0, 1, 2, 3]


def test_the_first_token_is_context_where_no_end_of_text_is(generator, monkeypatch):
    monkeypatch.setattr(Encoder, "end_of_text", None)
    tokens = explain(generator, TEXT).tokens
    assert [token.id for token in tokens] == generator.encoder.encode(TEXT)
    assert [token.probability is None for token in tokens] == [True] + [False] * (len(tokens) - 1)


def test_the_limits_are_named(generator):
    with pytest.raises(ValueError, match="text must not be empty"):
        explain(generator, "")
    assert len(explain(generator, "!" * 255).tokens) == 256  # the window, with the start
    with pytest.raises(ContextLengthError, match="text has 256 tokens, the most to explain is 255; cut it"):
        explain(generator, "!" * 256)
    with pytest.raises(TypeError, match="text must be a str"):
        explain(generator, b"To be")


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (b" heroes", " heroes"),
        (b"\n\t", "\n\t"),
        (b"\r\x00\x1b\x7f", "\\r\\x00\\x1b\\x7f"),
        ("é🙂日".encode(), "é🙂日"),
        ("🙂".encode()[:2], "\\xf0\\x9f"),
        (b"a\xffb", "a\\xffb"),
        ("\u202e\u200b\xa0\ufeff\ue000".encode(), "\\u202e\\u200b\\xa0\\ufeff\\ue000"),
        (b"<b>&amp;", "<b>&amp;"),
    ],
)
def test_what_has_no_shape_is_escaped(token, label):
    assert visible(token) == label


@hypothesis.given(st.binary(max_size=12))
def test_any_bytes_can_be_shown(token):
    for char in visible(token):
        assert char in " \t\n" or unicodedata.category(char)[0] not in "CZ"


def test_colours_run_through_the_palette():
    assert colour_of(0.0) == colour_of(LEAST_PROBABILITY) == PALETTE[0]
    assert colour_of(LEAST_PROBABILITY**0.5) == PALETTE[2]
    assert colour_of(1.0) == PALETTE[-1]
    for probability in np.geomspace(1e-6, 1, 50):
        assert re.fullmatch("#[0-9a-f]{6}", colour_of(probability))
        channels = [int(colour_of(probability)[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert sum(np.array(channels) ** 2.2 * [0.2126, 0.7152, 0.0722]) > 0.4  # black text on it: 9 to 1
