"""The encoder against tiktoken on the real vocabulary, and against a naive byte-pair encoding on odd small ones."""

import importlib.metadata
import json
import os
import pickle
import random
import re
import subprocess
import sys
import sysconfig
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings, strategies as st

from tf_gpt2.checkpoint.load import get_encoder
from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer import encoder as encoder_module
from tf_gpt2.tokenizer.encoder import ASCII_PATTERN, CHUNK, PATTERN, WHITE_SPACE, Encoder, bytes_to_unicode

# Unassigned code points (Cn) stay out of what is compared: the libraries have different versions of Unicode's tables,
# so what is unassigned to one is a letter to another. Surrogates (Cs) have a test of their own.
ASSIGNED = st.characters(exclude_categories=["Cn", "Cs"])
APOSTROPHES = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "\u2019s", "'", "''"]
BLANKS = ["  ", "\r\n", *" \n\t\x0b\x1c\x1f\x85\xa0\u1680\u180e\u200b\u2028\u202f\u3000\ufeff\0"]
WORDS = ["a", "Z", "word", "\u00e9", "e\u0301", "\u4e2d\u6587", "\u05d0", "\u0e01\u0e34", "\u01c5", "\U00020000"]
OTHERS = ["1", "23", *"\u00b2\u0663\u2167\ufffd\U0001f600_-", "...", "\U0001f468\u200d\U0001f469", "<|endoftext|>"]
FRAGMENTS = st.sampled_from([*APOSTROPHES, *BLANKS, *WORDS, *OTHERS])
MOSTLY_BLANK = st.sampled_from([*BLANKS, "a", "1", "!", "'s"])
TEXTS = (st.lists(FRAGMENTS | ASSIGNED, max_size=40) | st.lists(MOSTLY_BLANK, max_size=40)).map("".join)
COMPARED = settings(deadline=None, max_examples=500)


# ---- the real vocabulary


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Not all heroes wear capes.", [3673, 477, 10281, 5806, 1451, 274, 13]),
        (
            "Alan Turing theorized that computers would one day become",
            [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716],
        ),
        ("", []),
    ],
)
def test_known_ids(real_encoder, text, ids):
    assert real_encoder.encode(text) == ids
    assert real_encoder.decode(ids) == text


def test_public_attributes_are_those_of_the_reference(real_encoder):
    assert len(real_encoder) == len(real_encoder.encoder) == len(real_encoder.decoder) == 50257
    assert real_encoder.decoder[10281] == "Ġheroes"
    assert real_encoder.bpe_ranks["Ġ", "t"] == 0
    assert len(real_encoder.bpe_ranks) == 50000
    assert real_encoder.byte_encoder == bytes_to_unicode()
    assert real_encoder.byte_decoder["Ġ"] == ord(" ")
    assert real_encoder.pat.findall("we'll see") == ["we", "'ll", " see"]
    assert real_encoder.errors == "replace"
    # The first 256 ids are the bytes in the order of the dict.
    assert [real_encoder.encoder[symbol] for symbol in bytes_to_unicode().values()] == list(range(256))


def test_bpe_takes_and_gives_the_visible_form(real_encoder):
    assert real_encoder.bpe("Ġcapes") == "Ġcap es"
    assert real_encoder.bpe("Ġheroes") == "Ġheroes"
    assert real_encoder.bpe("x") == "x"
    assert real_encoder.bpe("") == ""
    with pytest.raises(ValueError, match=r"' '.*bytes_to_unicode"):
        real_encoder.bpe(" heroes")


def test_text_never_makes_a_special_token(real_encoder):
    assert real_encoder.end_of_text == 50256
    assert real_encoder.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert real_encoder.decode([50256]) == "<|endoftext|>"


@COMPARED
@given(TEXTS)
def test_any_text_encodes_as_in_tiktoken(real_encoder, peer, text):
    assert real_encoder.encode(text) == peer.encode_ordinary(text)


@COMPARED
@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_comes_back(real_encoder, text):
    try:
        expected = text.encode("utf-8").decode("utf-8")
    except UnicodeEncodeError:
        expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert real_encoder.decode(real_encoder.encode(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ud83d\ude00", "\U0001f600"),
        ("a\ud83d b", "a\ufffd b"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ufeff\ud800", "\ufeff\ufffd"),
    ],
)
def test_surrogates_are_paired_or_replaced_as_in_tiktoken(real_encoder, peer, text, expected):
    assert real_encoder.decode(real_encoder.encode(text)) == expected
    assert real_encoder.encode(text) == peer.encode_ordinary(text) == real_encoder.encode(expected)


@COMPARED
@given(st.lists(st.integers(0, 50256)))
def test_any_ids_decode_as_in_tiktoken(real_encoder, peer, ids):
    assert real_encoder.decode_bytes(ids) == peer.decode_bytes(ids)
    assert real_encoder.decode(ids) == peer.decode(ids, errors="replace")


def test_characters_have_the_same_class_as_in_tiktoken(real_encoder, peer):
    for code_point in [*range(0x3400), *range(0x3400, 0x110000, 101)]:
        character = chr(code_point)
        if unicodedata.category(character) not in ("Cn", "Cs"):
            text = f"a{character}1{character}-{character} {character}\n"
            assert real_encoder.encode(text) == peer.encode_ordinary(text), hex(code_point)


def test_real_files_encode_as_in_tiktoken(real_encoder, peer):
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in sources]
    texts += [package.read_text("METADATA") or "" for package in importlib.metadata.distributions()]
    assert sum(map(len, texts)) > 1_000_000
    assert real_encoder.encode_batch(texts) == [peer.encode_ordinary(text) for text in texts]


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab", "'", "\u00e9", "\u4e2d", "0", "=-", "\n ", None])
def test_long_runs_are_no_trap(real_encoder, peer, unit):
    run = unit * 100_000 if unit else "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    start = time.perf_counter()
    runs = {run + end: real_encoder.encode(run + end) for end in ("", "x", " x")}
    # Takes well under a second; a quadratic algorithm takes many minutes.
    assert time.perf_counter() - start < 20
    assert all(ids == peer.encode_ordinary(text) for text, ids in runs.items())


# ---- where pieces begin and end


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I'll we've he's", ["I", "'ll", " we", "'ve", " he", "'s"]),
        ("I'LL HE'S", ["I", "'", "LL", " HE", "'", "S"]),
        ("a   b", ["a", "  ", " b"]),
        ("a\n\nb", ["a", "\n", "\n", "b"]),
        ("a \n", ["a", " \n"]),
        ("a\x1cb", ["a", "\x1c", "b"]),
        ("!\x1c", ["!\x1c"]),
        ("a  \x1c\n", ["a", " ", " \x1c", "\n"]),
        ("x12y", ["x", "12", "y"]),
        ("'sun", ["'s", "un"]),
        (" 'sun", [" '", "sun"]),
    ],
)
def test_pieces(real_encoder, text, pieces):
    expected = [token_id for piece in pieces for token_id in real_encoder.encode(piece)]
    assert real_encoder.pat.findall(text) == pieces
    assert real_encoder.encode(text) == expected


@COMPARED
@given(TEXTS)
def test_chunks_cut_only_where_pieces_end(text):
    chunks = CHUNK.findall(text)
    assert "".join(chunks) == text
    assert [piece for chunk in chunks for piece in regex.findall(PATTERN, chunk)] == regex.findall(PATTERN, text)
    # What lets a piece and a chunk share one entry of the cache:
    assert all(regex.findall(PATTERN, piece) == [piece] for piece in regex.findall(PATTERN, text))


@COMPARED
@given(
    st.text(st.characters(max_codepoint=0x7F))
    | st.lists(st.sampled_from([*APOSTROPHES[:9], *" \t\n\x1c\x1fa1!"])).map("".join)
)
def test_ascii_text_is_cut_as_the_pattern_cuts_it(text):
    assert ASCII_PATTERN.findall(text) == regex.findall(PATTERN, text)


def test_white_space_is_what_the_pattern_calls_so():
    characters = "".join(map(chr, range(0x110000)))
    assert re.findall(f"[{WHITE_SPACE}]", characters) == regex.findall(r"\s", characters)


# ---- small vocabularies, merges in any order


def naive_bpe(symbols, merges):
    """As in Sennrich et al. 2016: merge the best pair wherever it stands, and look again; quadratic."""
    while True:
        present = set(pairwise(symbols))
        best = next((pair for pair in merges if pair in present), None)
        if best is None:
            return symbols
        merged, i = [], 0
        while i < len(symbols):
            width = 2 if tuple(symbols[i : i + 2]) == best else 1
            merged.append("".join(symbols[i : i + width]))
            i += width
        symbols = merged


@st.composite
def toy_merges(draw):
    """Merges whose order has nothing to do with the order in which their parts come to be."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 14))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in merges and len("".join(pair)) <= 12:
            merges.append(pair)
            tokens = list(dict.fromkeys([*tokens, "".join(pair)]))
    return draw(st.permutations(merges))


def toy_encoder(merges, seed=0):
    tokens = list(dict.fromkeys([*bytes_to_unicode().values(), *map("".join, merges)]))
    ids = [3 * token_id for token_id in range(len(tokens))]
    random.Random(seed).shuffle(ids)
    return Encoder(dict(zip(tokens, ids, strict=True)), merges)


@settings(deadline=None, max_examples=600)
@given(toy_merges(), st.lists(st.sampled_from(["a", "b", "c", "ab", "aaa", "abab"]), max_size=30).map("".join))
def test_merges_in_any_order_are_done_as_by_the_naive_algorithm(merges, piece):
    encoder = toy_encoder(merges)
    expected = naive_bpe(list(piece), merges)
    assert encoder.bpe(piece) == " ".join(expected)
    assert encoder.encode(piece) == [encoder.encoder[token] for token in expected]
    assert encoder.decode(encoder.encode(piece)) == piece
    for merge in (encoder_module._merge_short, encoder_module._merge_long):
        assert merge(list(piece), encoder.bpe_ranks) == expected


def test_a_round_is_finished_before_what_it_made_is_merged():
    # One at a time from the left would give "aba b": ("ab", "a") is of lower rank than ("a", "b").
    assert toy_encoder([("ab", "a"), ("a", "b")]).bpe("abab") == "ab ab"
    assert toy_encoder([("a", "a")]).bpe("aaaaa") == "aa aa a"
    assert toy_encoder([("a", "a"), ("aa", "a")]).bpe("aaa") == "aaa"


@pytest.mark.parametrize("letters", ["a", "ab", "abcdefghijklmnopqrstuvwxyz"])
def test_work_grows_with_the_length_of_a_run_not_its_square(vocabulary_dir, letters):
    class CountingRanks(dict):
        lookups = 0

        def get(self, *args):
            self.lookups += 1
            return super().get(*args)

    def count_lookups(length):
        encoder = Encoder.from_files(vocabulary_dir)
        encoder.bpe_ranks = CountingRanks(encoder.bpe_ranks)
        encoder.encode("".join(random.Random(0).choices(letters, k=length)))
        return encoder.bpe_ranks.lookups

    assert count_lookups(8000) < 2.2 * count_lookups(4000)


# ---- cache and threads


def test_cache_is_bounded_and_does_not_change_what_is_encoded(vocabulary_dir, real_encoder, monkeypatch):
    monkeypatch.setattr(encoder_module, "MAX_CACHE_ENTRIES", 20)
    encoder = Encoder.from_files(vocabulary_dir)
    for number in range(200):
        text = f"the {number} of{number} " + "z" * (number % 70)
        assert encoder.encode(text) == encoder.encode(text) == real_encoder.encode(text)
        assert 0 < len(encoder.cache) <= 20
        assert all(len(key) <= 64 for key in encoder.cache)


def test_changing_a_result_does_not_change_the_next(real_encoder):
    real_encoder.encode("heroes").clear()
    assert real_encoder.decode(real_encoder.encode("heroes")) == "heroes"


def test_entries_of_the_cache_may_vanish_at_any_moment(vocabulary_dir, real_encoder):
    class VanishingCache(dict):
        def __contains__(self, key):
            return super().__contains__(key) and (self.clear() or True)

        def get(self, key, default=None):
            return self.pop(key, default)

    encoder = Encoder.from_files(vocabulary_dir)
    encoder.cache = VanishingCache()
    text = "to be or not to be, to be"
    assert encoder.encode(text) == encoder.encode(text) == real_encoder.encode(text)


def test_threads_may_share_an_encoder(vocabulary_dir, real_encoder, monkeypatch):
    texts = [f"thread {n} writes caf\u00e9 {n * n} and\n\n  re-reads {n % 7} lines" for n in range(400)] * 5
    expected = real_encoder.encode_batch(texts)
    monkeypatch.setattr(encoder_module, "MAX_CACHE_ENTRIES", 10)
    encoder = Encoder.from_files(vocabulary_dir)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(encoder.encode, texts)) == expected
    finally:
        sys.setswitchinterval(interval)


def test_survives_pickling(real_encoder):
    copy = pickle.loads(pickle.dumps(real_encoder))
    assert copy.encode("Not all heroes") == [3673, 477, 10281]


# ---- arguments, files and what is said about wrong ones


@pytest.mark.parametrize("ids", [np.array([3673, 477]), np.array([3673, 477], np.uint16), iter([3673, 477])])
def test_decode_takes_any_integers(real_encoder, ids):
    assert real_encoder.decode(ids) == "Not all"


@pytest.mark.parametrize("token_id", [-1, 50257, 10**20, np.int64(50257)])
def test_decode_names_an_unknown_id_and_the_valid_ones(real_encoder, token_id):
    with pytest.raises(ValueError, match=rf"ids has {token_id}, .* from 0 to 50256"):
        real_encoder.decode([11, token_id])


@pytest.mark.parametrize("ids", [[1.0], ["a"], [[1, 2]], np.ones((2, 2), int), [None]])
def test_decode_refuses_what_is_not_an_integer(real_encoder, ids):
    with pytest.raises(TypeError, match=r"ids has a .*, not an integer; decode one row"):
        real_encoder.decode(ids)


@pytest.mark.parametrize("ids", [5, None, "ab", b"ab"])
def test_decode_refuses_what_is_not_a_list(real_encoder, ids):
    with pytest.raises(TypeError, match=r"ids must be a list of integers, got .*(5|None|ab)"):
        real_encoder.decode(ids)


def test_errors_says_what_becomes_of_broken_utf8(real_encoder):
    ids = [real_encoder.encoder[symbol] for symbol in "\u00e4\u00b8"]  # E4 B8: a character without its last byte.
    assert real_encoder.decode(ids) == "\ufffd"
    for errors, expected in (("ignore", ""), ("backslashreplace", "\\xe4\\xb8")):
        assert Encoder(real_encoder.encoder, real_encoder.bpe_ranks, errors=errors).decode(ids) == expected
    with pytest.raises(UnicodeDecodeError):
        Encoder(real_encoder.encoder, real_encoder.bpe_ranks, errors="strict").decode(ids)


@pytest.mark.parametrize("text", [b"abc", ["abc"], None, 5])
def test_encode_refuses_what_is_not_text(real_encoder, text):
    with pytest.raises(TypeError, match="text must be a str, got"):
        real_encoder.encode(text)


@pytest.mark.parametrize("texts", ["Not all", b"Not all", None, 5, {"Not": "all"}])
def test_encode_batch_takes_several_texts_only(real_encoder, texts):
    assert real_encoder.encode_batch(["Not all", ""]) == [[3673, 477], []]
    with pytest.raises(TypeError, match=r"texts must be a list of str, got .*(Not|None|5)"):
        real_encoder.encode_batch(texts)


VOCABULARY = {symbol: token_id for token_id, symbol in enumerate([*bytes_to_unicode().values(), "Ġh", "Ġhi"])}
MERGES = "#version: 0.2\nĠ h\nĠh i\n"


def write_files(folder, vocabulary=VOCABULARY, merges=MERGES):
    for name, content in (("encoder.json", vocabulary), ("vocab.bpe", merges)):
        if isinstance(content, dict | list):
            content = json.dumps(content, ensure_ascii=False)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def without(*tokens):
    return {token: token_id for token, token_id in VOCABULARY.items() if token not in tokens}


@pytest.mark.parametrize("merges", [MERGES, MERGES.rstrip("\n"), MERGES.replace("\n", "\r\n")])
def test_get_encoder_reads_a_folder(tmp_path, merges):
    write_files(tmp_path, merges=merges)
    encoder = get_encoder(tmp_path.name, str(tmp_path.parent))
    assert encoder.encode(" hi") == [257]
    assert encoder.end_of_text is None


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"vocabulary": None}, "encoder.json is missing"),
        ({"merges": None}, "vocab.bpe is missing"),
        ({"vocabulary": "<?xml version='1.0'?>\n<Error/>"}, "encoder.json is not JSON"),
        ({"vocabulary": '{"a": 1'}, "encoder.json is not JSON"),
        ({"vocabulary": ["a"]}, "encoder.json is not a vocabulary"),
        ({"vocabulary": {"a": "1"}}, "encoder.json is not a vocabulary"),
        ({"vocabulary": b"\xff\xfe"}, "encoder.json: .*codec"),
        ({"vocabulary": "[" * 100_000}, "encoder.json is not JSON"),
        ({"vocabulary": '{"a":' * 100_000}, "encoder.json is not JSON"),
        ({"vocabulary": '{"a": %s}' % ("9" * 5000)}, "encoder.json is not JSON"),
        ({"vocabulary": '{"a": -%s}' % ("9" * 5000)}, "encoder.json is not JSON"),
        ({"vocabulary": VOCABULARY | {"Ġhi": 10**400}}, "encoder.json has ids outside"),
        ({"vocabulary": VOCABULARY | {"Ġhi": 2**31}}, "encoder.json has ids outside"),
        ({"vocabulary": VOCABULARY | {"Ġhi": -1}}, "encoder.json has ids outside"),
        ({"vocabulary": VOCABULARY | {"Ġhi": 257.0}}, "encoder.json is not a vocabulary"),
        ({"vocabulary": VOCABULARY | {"Ġhi": True}}, "encoder.json is not a vocabulary"),
        ({"merges": "<?xml version='1.0'?>\n<Error/>"}, "vocab.bpe is not a list of merges"),
        ({"merges": ""}, "vocab.bpe is not a list of merges"),
        ({"merges": b"#version: 0.2\n\xff"}, "vocab.bpe: .*codec"),
        ({"merges": "#version: 0.2\nĠ h\nĠh i x\n"}, "vocab.bpe has 'Ġh i x'"),
        ({"merges": "#version: 0.2\nĠ h\nĠh\n"}, "vocab.bpe has 'Ġh '"),
        ({"merges": "#version: 0.2\nĠ h\n i\n"}, "vocab.bpe has ' i'"),
        ({"merges": "#version: 0.2\nĠ h\n"}, "do not fit: no merge makes the token 'Ġhi'"),
        ({"merges": MERGES + "h i\n"}, "do not fit: merging 'h' and 'i' gives a token that the vocabulary lacks"),
        ({"vocabulary": without("Ġhi")}, "do not fit: merging 'Ġh' and 'i'"),
        ({"vocabulary": without("a", "Ā")}, "do not fit: the vocabulary lacks 2 of the 256 bytes.*'a'"),
        ({"vocabulary": VOCABULARY | {"Ġhi": 0}}, "do not fit: the tokens '!' and 'Ġhi' have the same id"),
        ({"vocabulary": VOCABULARY | {"x y": 300}}, "do not fit: .* a token with ' '"),
    ],
)
def test_damaged_files_are_named_with_a_remedy(tmp_path, files, named):
    with pytest.raises(CheckpointError, match=named) as raised:
        Encoder.from_files(write_files(tmp_path, **files))
    assert str(tmp_path) in str(raised.value)
    remedy = "download it with" if "is missing" in named else "download the checkpoint again"
    assert remedy in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "long"])
def test_what_is_no_vocabulary_file_is_not_waited_for(tmp_path, name, kind):
    path = write_files(tmp_path) / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=name):
        Encoder.from_files(tmp_path)


def test_a_cut_list_of_merges_is_noticed(tmp_path, vocabulary_dir):
    merges = (vocabulary_dir / "vocab.bpe").read_text(encoding="utf-8").splitlines(keepends=True)
    vocabulary = (vocabulary_dir / "encoder.json").read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match="no merge makes the token"):
        Encoder.from_files(write_files(tmp_path, vocabulary, "".join(merges[:-1])))


def test_special_tokens_need_no_merge(tmp_path):
    special = {"<|endoftext|>": 258, "<|pad|>": 259, "[MASK]": 260}
    encoder = Encoder.from_files(write_files(tmp_path, VOCABULARY | special))
    assert encoder.end_of_text == 258
    assert encoder.decode([259, 257]) == "<|pad|> hi"


def test_needs_neither_tensorflow_nor_the_platforms_encoding(vocabulary_dir):
    code = (
        "import sys, warnings; from tf_gpt2.tokenizer.encoder import Encoder; "
        "warnings.filterwarnings('error', '', EncodingWarning, 'tf_gpt2'); Encoder.from_files(sys.argv[1]); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-X", "warn_default_encoding", "-c", code, vocabulary_dir], check=True)
