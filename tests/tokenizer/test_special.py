"""Special tokens: only where they are allowed, the first and longest, in Python and in the graph."""

import random
import time

import pytest
import tensorflow as tf

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer.encoder import Encoder, SpecialToken
from tf_gpt2.tokenizer.in_graph import InGraphEncoder
from tf_gpt2.tokenizer.refusing import RefusingEncoder

TOKENS = {"<|endoftext|>": 1023, "[PAD]": 1024, "<|user|>": 1025, "<|": 1026, "é ü": 1030, "]": 1031, "PAD": 1032}


@pytest.fixture(scope="module")
def plain():
    return Encoder.from_files(embedded_dir())


@pytest.fixture(scope="module")
def encoder(plain):
    return Encoder(plain.encoder, plain.bpe_ranks, special_tokens=TOKENS)


def by_hand(encoder, text, names):
    """Looks at each place for the longest name."""
    ids, plain_part, at = [], "", 0
    while at < len(text):
        found = max((name for name in names if text.startswith(name, at)), key=len, default=None)
        if found is None:
            plain_part += text[at]
            at += 1
            continue
        ids += [*encoder.encode(plain_part), encoder.special_tokens[found].id]
        plain_part, at = "", at + len(found)
    return ids + encoder.encode(plain_part)


def random_texts(n):
    rng = random.Random(5)
    parts = [*TOKENS, " ", "  ", "To be", "\n", "é", "<", "|>", "[PAD", "<|end", "user", "'s", "🙂", "1"]
    return ["".join(rng.choices(parts, k=rng.randrange(9))) for _ in range(n)]


def test_user_text_never_makes_one(encoder, plain):
    for text in (*TOKENS, "a<|endoftext|>b"):
        assert encoder.encode(text) == plain.encode(text)
        assert encoder.decode(encoder.encode(text)) == text


@pytest.mark.parametrize(
    "allowed", ["all", {"[PAD]", "<|"}, ["<|endoftext|>"], ()], ids=["all", "a set", "a list", "none"]
)
def test_the_first_and_longest_counts(encoder, allowed):
    names = list(TOKENS) if allowed == "all" else list(allowed)
    for text in random_texts(300):
        ids = encoder.encode(text, allowed_special=allowed)
        assert ids == by_hand(encoder, text, names)
        assert encoder.decode(ids) == text


@pytest.mark.parametrize("allowed", ["all", {"[PAD]", "<|"}, ()], ids=["all", "a set", "none"])
def test_the_graph_finds_the_same(encoder, allowed):
    in_graph, texts = InGraphEncoder(encoder), random_texts(300)
    encode = tf.function(lambda texts: in_graph.encode(texts, allowed_special=allowed))
    assert encode(tf.constant(texts)).to_list() == encoder.encode_batch(texts, allowed_special=allowed)
    assert encode(tf.constant([""])).to_list() == [[]]
    assert encode(tf.zeros((0,), tf.string)).to_list() == []
    ids = tf.ragged.constant(encoder.encode_batch(texts, allowed_special=allowed), dtype=tf.int32)
    assert [text.decode() for text in in_graph.decode(ids).numpy()] == texts


def test_white_space_and_words_count_as_asked(plain):
    tokens = {
        "[L]": SpecialToken(2000, lstrip=True),
        "[R]": SpecialToken(2001, rstrip=True),
        "word": SpecialToken(2002, single_word=True),
        "late": SpecialToken(2003, first=False),
        "[latex]": SpecialToken(2004),
    }
    encoder = Encoder(plain.encoder, plain.bpe_ranks, special_tokens=tokens)

    def encode(text):
        return encoder.encode(text, allowed_special="all")

    assert encode("a \n [L] b") == [*plain.encode("a"), 2000, *plain.encode(" b")]
    assert encode("a [R] \n b") == [*plain.encode("a "), 2001, *plain.encode("b")]
    assert encode("word words") == [2002, *plain.encode(" words")]
    assert encode("[latex] late") == [2004, *plain.encode(" "), 2003]
    with pytest.raises(ValueError, match="allowed_special has tokens that"):
        InGraphEncoder(encoder).encode(tf.constant(["a"]), allowed_special="all")


def test_names_may_be_any_iterable(encoder):
    assert encoder.encode("[PAD]", allowed_special=iter(["[PAD]"])) == [1024]


def test_the_work_grows_with_the_length(plain):
    encoder = Encoder(
        plain.encoder, plain.bpe_ranks, special_tokens={"#": SpecialToken(2000, lstrip=True, rstrip=True)}
    )
    started = time.monotonic()
    assert len(encoder.encode("ab # " * 40_000, allowed_special="all")) >= 80_000
    assert time.monotonic() - started < 5


def test_unknown_names_are_named(encoder):
    for wrong in ({"[MASK]"}, "[PAD]"):
        with pytest.raises(ValueError, match="allowed_special"):
            encoder.encode("a", allowed_special=wrong)


def test_special_tokens_by_default_are_those_that_no_merge_makes(plain):
    assert plain.special_tokens == {"<|endoftext|>": SpecialToken(1023)}
    assert plain.encode("a<|endoftext|>", allowed_special="all")[-1] == plain.end_of_text == 1023
    assert len(plain) == 1024


def test_ids_of_special_tokens_are_checked(plain):
    with pytest.raises(ValueError, match="have the same id"):
        Encoder(plain.encoder, plain.bpe_ranks, special_tokens={"[PAD]": 5})
    with pytest.raises(ValueError, match="special_tokens must have ids"):
        Encoder(plain.encoder, plain.bpe_ranks, special_tokens={"[PAD]": -1})


def test_another_token_may_end_texts(plain):
    encoder = Encoder(plain.encoder, plain.bpe_ranks, special_tokens={"</s>": 1024}, end_of_text="</s>")
    assert encoder.end_of_text == 1024


def test_a_refusing_encoder_says_why():
    encoder = RefusingEncoder("no tokenizer here")
    assert len(encoder) == 0
    for ask in (encoder.encode, encoder.encode_batch, encoder.bpe):
        with pytest.raises(CheckpointError, match="no tokenizer here"):
            ask("a")
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        encoder.decode([1])
