"""The tokenizer in a TensorFlow graph against ``Encoder``, for which other tests answer."""

import itertools
import json
import random
import string
import time

import fuzz_in_graph
import numpy as np
import pytest
import regex
import tensorflow as tf
from fuzz_in_graph import FRAGMENTS, PROBE, toy_encoder
from hypothesis import HealthCheck, given, settings, strategies as st

from tf_gpt2.tokenizer import in_graph_merge
from tf_gpt2.tokenizer.encoder import Encoder, bytes_to_unicode
from tf_gpt2.tokenizer.in_graph import InGraphEncoder, repair_utf8
from tf_gpt2.tokenizer.in_graph_merge import merge, merge_table
from tf_gpt2.tokenizer.in_graph_split import character_classes

COMPARED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | CHARACTERS, max_size=40).map("".join)
RANDOM_LETTERS = "".join(random.Random(0).choices(string.ascii_lowercase, k=20_000))


@pytest.fixture(scope="module")
def in_graph(real_encoder):
    return InGraphEncoder(real_encoder)


@pytest.fixture(scope="module")
def encode(in_graph):
    function = tf.function(in_graph.encode, input_signature=[tf.TensorSpec([None], tf.string)])
    return lambda texts: function(tf.constant(texts, tf.string, [len(texts)])).to_list()


@pytest.fixture(scope="module")
def decode(in_graph):
    function = tf.function(in_graph.decode, input_signature=[tf.RaggedTensorSpec([None, None], tf.int32)])
    return lambda rows: function(ragged(rows)).numpy().tolist()


def ragged(rows):
    return tf.ragged.constant(rows, tf.int32, ragged_rank=1)


# ---- text -> pieces


def test_every_code_point_has_the_class_of_the_pattern():
    table = character_classes()
    first = table.first.numpy()
    classes = np.repeat(table.classes.numpy(), np.diff(first, append=0x110000))
    everything = "".join(map(chr, range(0x110000)))
    for number, pattern in enumerate([r"[^\s\p{L}\p{N}]", r"\p{L}", r"\p{N}", r"\s"]):
        assert np.flatnonzero(classes == number).tolist() == [ord(one) for one in regex.findall(pattern, everything)]


def test_characters_where_the_class_changes_encode_alike(real_encoder, encode):
    first = character_classes().first.numpy().astype(int)
    boundaries = {point + step for point in first for step in (-1, 0)} | {0x10FFFF}
    characters = [chr(point) for point in sorted(boundaries) if point >= 0 and not 0xD800 <= point < 0xE000]
    assert len(characters) > 2500
    texts = [*characters, *map(PROBE.format, characters)]
    assert encode(texts) == real_encoder.encode_batch(texts)


def test_all_short_strings_of_what_the_pattern_names(real_encoder, encode):
    for length in range(6):
        texts = ["".join(parts) for parts in itertools.product("'srel \n1-", repeat=length)]
        assert encode(texts) == real_encoder.encode_batch(texts)


@pytest.mark.parametrize("letters", ["stmdrvel", "STMDRVEL\u017f\u0435"])  # A long s, and an e that is Cyrillic.
def test_contractions_of_two_letters(real_encoder, encode, letters):
    words = ["'" + "".join(pair) for pair in itertools.product(letters, repeat=2)]
    texts = [before + word + after for before in ("", "a", " ", "''") for word in words for after in ("", "'s", "x")]
    assert encode(texts) == real_encoder.encode_batch(texts)


@COMPARED
@given(st.lists(TEXTS, max_size=4))
def test_any_texts_encode_alike(real_encoder, encode, texts):
    assert encode(texts) == real_encoder.encode_batch(texts)


def test_texts_do_not_touch_their_neighbours(real_encoder, encode):
    ends = ["", "'", "'l", "a", "1", "-", " ", "\n", "  ", "s", "ll", "e", "'s", "\u4e2d", "\U0001f600"]
    texts = [text for pair in itertools.product(ends, repeat=2) for text in (*pair, "")]
    assert encode(texts) == real_encoder.encode_batch(texts)
    assert encode([]) == []
    assert encode([""]) == [[]]


def test_text_never_makes_a_special_token(encode):
    assert encode(["<|endoftext|>"]) == [[27, 91, 437, 1659, 5239, 91, 29]]


# ---- bytes that are not UTF-8


def test_every_kind_of_invalid_utf8_is_repaired_as_by_python():
    kinds = b"\0A\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xef\xbb\xf0\xf1\xf4\xf5\xff"
    for length in range(5):
        texts = [bytes(parts) for parts in itertools.product(kinds, repeat=length)]
        assert repair_utf8(tf.constant(texts)).numpy().tolist() == [
            text.decode("utf-8", "replace").encode("utf-8") for text in texts
        ]


@COMPARED
@given(st.lists(st.binary(max_size=30), max_size=4))
def test_any_bytes_encode_as_their_repaired_text(real_encoder, encode, texts):
    assert encode(texts) == real_encoder.encode_batch(text.decode("utf-8", "replace") for text in texts)


# ---- merges


@pytest.mark.parametrize(
    "word",
    [
        *("a" * 20_000, " " * 20_000, "\n" * 20_000, "ab" * 10_000, "\u4e2d" * 20_000, "'" * 20_000, "=-" * 10_000),
        *(RANDOM_LETTERS, "".join(random.Random(1).choices("ab", k=20_000)), "\U0001f468\u200d" * 7_000),
        "".join(random.Random(2).choices([*map(chr, range(0x4E00, 0x9000))], k=20_000)),
        # Pairs of ever lower rank, each of which waits for the next.
        "PBWFHYRDJCVOEFWMGHHPNTFTEPMSSEOLeylucyssogellere" * 400,
    ],
    ids=lambda word: ascii(word[:4]),
)
def test_long_runs_are_no_trap(real_encoder, encode, word):
    texts = [f"{word} x", f" h{word}ello"]
    start = time.perf_counter()
    ids = encode(texts)
    # Takes a tenth of a second; one merge a round takes minutes.
    assert time.perf_counter() - start < 15
    assert ids == real_encoder.encode_batch(texts)


def count_rounds(in_graph, text, monkeypatch):
    rounds = []
    one_round = in_graph_merge._merge_round
    with monkeypatch.context() as patch:
        patch.setattr(in_graph_merge, "_merge_round", lambda *args: rounds.append(1) or one_round(*args))
        in_graph.encode(tf.constant([text]))
    return len(rounds)


def test_rounds_are_few_however_long_the_word(in_graph, monkeypatch):
    assert count_rounds(in_graph, "", monkeypatch) <= 1
    assert count_rounds(in_graph, RANDOM_LETTERS, monkeypatch) < 10
    assert count_rounds(in_graph, "".join(letter * 300 for letter in string.ascii_letters), monkeypatch) < 15


@st.composite
def toy_merges(draw):
    """Merges that are in order, unless two ways lead to one token; or in any order."""
    tokens, merges = ["a", "b", "c"], []
    makes_anew = draw(st.booleans())
    for _ in range(draw(st.integers(0, 14))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        token = "".join(pair)
        if pair not in merges and len(token) <= 12 and (makes_anew or token not in tokens):
            merges.append(pair)
            tokens.append(token)
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


def symbols_of(merges):
    return list(dict.fromkeys(["a", "b", "c", *map("".join, merges)]))


def merge_all(pieces, merges):
    """Merges pieces in the graph's way; gives them as ``Encoder.bpe`` does."""
    symbols = symbols_of(merges)
    numbers = [symbols.index(letter) for piece in pieces for letter in piece]
    owners = [owner for owner, piece in enumerate(pieces) for _ in piece]
    merged = merge(
        tf.constant(numbers, tf.int32),
        tf.constant(owners, tf.int32),
        merge_table(symbols, {pair: rank for rank, pair in enumerate(merges)}),
    )
    result = [[] for _ in pieces]
    for number, owner in zip(*(values.numpy().tolist() for values in merged), strict=True):
        result[owner].append(symbols[number])
    return [" ".join(symbols) for symbols in result]


PIECES = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "ab", "aaa", "abab", "aaaaab"]), min_size=1, max_size=15).map("".join),
    min_size=1,
    max_size=20,
)


@COMPARED
@given(toy_merges(), PIECES)
def test_merges_in_any_order_are_done_as_by_the_encoder(merges, pieces):
    encoder = toy_encoder(merges, random.Random(0))
    assert merge_all(pieces, merges) == [encoder.bpe(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("merges", "piece", "expected"),
    [
        ([("a", "b"), ("ab", "c"), ("c", "d")], "abcd", "abc d"),  # Both a b and c d are lower than their neighbours.
        ([("b", "c"), ("a", "bc"), ("x", "a")], "xabc", "x abc"),
        ([("a", "b"), ("a", "ab"), ("a", "a")], "aaaaab", "aa a aab"),
        ([("b", "a"), ("a", "a")], "baaaaa", "ba aa aa"),
        ([("c", "b"), ("cb", "a"), ("a", "a")], "cbaaaa", "cba aa a"),
        # What takes a before b does, or after it, grows from further off than a threat is followed.
        ([("u", "v"), ("uv", "w"), ("uvw", "z"), ("uvwz", "a"), ("a", "b")], "uvwzab", "uvwza b"),
        ([("v", "u"), ("w", "vu"), ("z", "wvu"), ("a", "zwvu"), ("b", "a")], "bazwvu", "b azwvu"),
        # The first a b is held up for a round, by a uvwza that might be; the other two must not go on without it.
        (
            [("u", "v"), ("uv", "w"), ("uvw", "z"), ("uvwz", "a"), ("a", "b"), ("ab", "ab")],
            "vwzabababuv",
            "v w z abab ab uv",
        ),
        ([("ab", "a"), ("a", "b")], "abab", "ab ab"),  # Not in order: the two a b merge before the new pair does.
    ],
)
def test_where_neighbours_decide(merges, piece, expected):
    encoder = Encoder(vocabulary(merges), merges)
    if expected != encoder.bpe(piece):
        pytest.fail(f"the example is wrong: {encoder.bpe(piece)}")
    module = InGraphEncoder(encoder)
    assert module.encode(tf.constant([piece])).to_list() == [[encoder.encoder[token] for token in expected.split()]]


def vocabulary(merges):
    tokens = dict.fromkeys([*bytes_to_unicode().values(), *map("".join, merges)])
    return {token: token_id for token_id, token in enumerate(tokens)}


@pytest.mark.parametrize(
    ("merges", "is_in_order"),
    [
        ([], True),
        ([("a", "b"), ("c", "ab"), ("ab", "c"), ("b", "c"), ("a", "bc")], True),  # Two ways to abc, which nothing uses.
        ([("a", "b"), ("ab", "c"), ("abc", "a"), ("b", "c"), ("a", "bc")], False),  # One way comes after a use.
        ([("ab", "a"), ("a", "b")], False),
        ([("a", "ba"), ("b", "a")], False),
    ],
)
def test_which_merges_are_in_order(merges, is_in_order):
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert merge_table(symbols_of(merges), ranks).is_in_order == is_in_order


def test_openais_merges_are_in_order(in_graph):
    assert in_graph._merges.is_in_order


def test_merges_of_what_never_occurs_are_idle():
    encoder = Encoder(vocabulary([("a", "b")]) | {"xyz": 900, "xyza": 901}, [("xyz", "a"), ("a", "b")])
    module = InGraphEncoder(encoder)
    assert module.encode(tf.constant(["xyzab"])).to_list() == [encoder.encode("xyzab")]
    assert module.decode(tf.ragged.constant([[900, 901]])).numpy().tolist() == [b"xyzxyza"]


def test_many_random_strings_and_vocabularies(real_encoder):
    fuzz_in_graph.fuzz(real_encoder, 2000, seed=1)


# ---- memory

GROWTH = """
import resource, sys
import tensorflow as tf
from tf_gpt2.tokenizer.encoder import Encoder
from tf_gpt2.tokenizer.in_graph import InGraphEncoder

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

in_graph = InGraphEncoder(Encoder.from_files(sys.argv[1]))
encode = tf.function(in_graph.encode, input_signature=[tf.TensorSpec([None], tf.string)])
decode = tf.function(in_graph.decode, input_signature=[tf.RaggedTensorSpec([None, None], tf.int32)])
even, uneven = ["a " * 12] * 4000, ["a " * 50_000] + ["a"] * 4000
for texts in (even, uneven):  # about as many bytes, and as many rows
    before = peak_mb()
    ids = encode(tf.constant(texts))
    assert decode(ids).numpy().tolist() == [text.encode() for text in texts]
    print(peak_mb() - before)
"""


def test_memory_follows_bytes_and_rows_not_rows_times_the_longest(run_python, vocabulary_dir):
    """One long text among short ones; an array of (rows, longest) took 3 GB here."""
    _, growth_mb = map(float, run_python(GROWTH, vocabulary_dir).split())
    assert growth_mb < 300


# ---- ids -> text


@COMPARED
@given(st.lists(st.lists(st.integers(0, 50256), max_size=20), max_size=4))
def test_any_ids_decode_alike(real_encoder, decode, rows):
    assert decode(rows) == [real_encoder.decode(row).encode("utf-8") for row in rows]


def test_every_id_decodes_alike_alone(real_encoder, decode):
    assert decode([[token_id] for token_id in range(50257)]) == [
        real_encoder.decode([token_id]).encode("utf-8") for token_id in range(50257)
    ]


def test_a_character_may_be_spread_over_ids_but_not_over_rows(real_encoder, decode):
    ids = real_encoder.encode("\U0001f9ff")
    assert len(ids) > 2
    assert decode([ids, ids[:1], ids[1:]]) == [
        "\U0001f9ff".encode(),
        *(real_encoder.decode(part).encode() for part in (ids[:1], ids[1:])),
    ]


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_decode_takes_dense_ids_with_lengths(in_graph, dtype):
    ids = tf.constant([[3673, 477, -1], [0, 99999, 7], [1, 2, 3]], dtype)
    assert in_graph.decode(ids, tf.constant([2, 0, 3])).numpy().tolist() == [b"Not all", b"", b'"#$']
    assert in_graph.decode(ids[2:]).numpy().tolist() == [b'"#$']
    assert in_graph.decode(ids[:0]).numpy().tolist() == []


@pytest.mark.parametrize("token_id", [-1, 50257, 2**31 - 1, -(2**31)])
def test_decode_names_an_unknown_id_and_the_valid_ones(decode, token_id):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        decode([[11], [11, token_id, 12]])
    for said in ("ids has", str(token_id), "50256"):
        assert said in str(raised.value)


def test_ids_in_gaps_and_beyond_int32():
    encoder = toy_encoder([("a", "b")], random.Random(0))
    module = InGraphEncoder(encoder)
    missing = next(token_id for token_id in range(500) if token_id not in encoder.decoder)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{missing}"):
        module.decode(tf.constant([[missing]]))
    wide = vocabulary([]) | {"ab": 2**31}
    with pytest.raises(ValueError, match=r"encoder has ids from 0 to 2147483648; .*int32"):
        InGraphEncoder(Encoder(wide, [("a", "b")]))


# ---- a SavedModel of it

SERVER = """
import json, sys
import tensorflow as tf
sys.modules["tf_gpt2"] = None
model = tf.saved_model.load(sys.argv[1])
serve = model.signatures["serving_default"]
texts = json.loads(sys.argv[2])
for batch in (texts, [], [""]):
    result = serve(texts=tf.constant(batch, tf.string, [len(batch)]))
    print(json.dumps([result["ids"].numpy().tolist(), [text.decode() for text in result["texts"].numpy()]]))
try:
    model.decode(tf.constant([[50257]]), tf.constant([1]))
except tf.errors.InvalidArgumentError:
    print("refused")
"""


class Server(tf.Module):
    """Text -> flat ids and, from them, the text again."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serve(self, texts):
        ids = self.tokenizer.encode(texts)
        return {"ids": ids.flat_values, "texts": self.tokenizer.decode(ids.to_tensor(), ids.row_lengths())}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)])
    def decode(self, ids, lengths):
        return self.tokenizer.decode(ids, lengths)


def test_a_saved_model_needs_tensorflow_alone(in_graph, real_encoder, run_python, tmp_path):
    server = Server(in_graph)
    tf.saved_model.save(server, str(tmp_path), signatures={"serving_default": server.serve})
    texts = [
        "Not all heroes wear capes.",
        "",
        "we'll  see\n\n \u4e2d\u6587 \U0001f468\u200d\U0001f469 \0",
        RANDOM_LETTERS[:999],
    ]
    output = run_python(SERVER, tmp_path, json.dumps(texts)).splitlines()
    ids = [token_id for text in texts for token_id in real_encoder.encode(text)]
    assert [json.loads(line) for line in output[:3]] == [[ids, texts], [[], []], [[], [""]]]
    assert output[3:] == ["refused"]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 6_000_000


def test_only_operations_that_any_server_has(in_graph):
    server = Server(in_graph)
    graph = server.serve.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    operations = {node.op for node in nodes}
    assert "LowerBound" in operations
    assert not [name for name in operations if regex.search("Xla|PyFunc|Regex|Table|Var|Random", name)]
    # Constants are held once, outside of the functions.
    assert graph.ByteSize() < 100_000
