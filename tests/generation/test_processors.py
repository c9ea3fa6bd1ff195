"""Bias, penalties and bans against plain Python that reads the definitions, in each way of running them."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from asking import make_sampling
from hypothesis import given, settings, strategies as st

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation import processors
from tf_gpt2.generation.processors import EXCLUDED, History
from tf_gpt2.model.arithmetic import graph, xla

INF, NEVER = float("inf"), float(EXCLUDED)
N_VOCAB, N_PLACES = 7, 12
CONFIG = GPT2Config(n_vocab=N_VOCAB, n_ctx=N_PLACES, n_embd=1, n_head=1, n_layer=1)
STOP_IDS = [1, 6]

# few ids, so that there are many repetitions
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=N_PLACES)
ROWS = st.lists(st.tuples(TEXTS, st.integers(1, N_PLACES)), min_size=1, max_size=3)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 100.0]),
        "presence_penalty": st.sampled_from([-1.5, 0.0, 2.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 1.0]),
        "no_repeat_ngram_size": st.sampled_from([0, 1, 2, 3, 4, 11, 12, 2**40]),
        "min_new_tokens": st.sampled_from([0, 1, 4, 2**40]),
        "logit_bias": st.dictionaries(st.integers(0, 6), st.sampled_from([-3.0, 0.0, 2.5, -INF]), max_size=2),
        "bad_words_ids": st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=8),
        "suppress": st.lists(st.integers(0, 6), max_size=1),
    },
)


def processed_by_hand(logits, text, n_prompt, options):
    """One row, in plain Python."""
    x, new = [float(value) for value in logits], text[n_prompt:]
    banned = set(options.get("suppress", ()))
    for i, bias in options.get("logit_bias", {}).items():
        x[i] += bias
    for i in set(text):
        penalty = options.get("repetition_penalty", 1.0)
        x[i] = x[i] * penalty if x[i] < 0 else x[i] / penalty
    for i in set(new):
        x[i] -= options.get("frequency_penalty", 0.0) * new.count(i) + options.get("presence_penalty", 0.0)
    n = options.get("no_repeat_ngram_size", 0)
    if 0 < n <= len(text):
        ngrams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        banned |= {i for i in range(N_VOCAB) if (*text[len(text) - n + 1 :], i) in ngrams}
    for *first, last in options.get("bad_words_ids", ()):
        if len(first) <= len(text) and text[len(text) - len(first) :] == first:
            banned.add(last)
    if len(new) < options.get("min_new_tokens", 0):
        banned |= set(STOP_IDS)
    result = [NEVER if i in banned or value == -INF else value for i, value in enumerate(x)]
    return list(logits) if max(result) == NEVER else result


def process(*arguments, ops=xla):
    return processors.process(*arguments, ops)


def process_rows(logits, texts, n_prompts, options, *, junk=0, run=process):
    """All rows at once; what lies past a row's length is ``junk``."""
    ids = np.full((len(texts), N_PLACES + 1), junk, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    history = History(*(tf.constant(x, tf.int32) for x in (ids, [len(text) for text in texts], n_prompts)))
    sampling = make_sampling(len(texts), CONFIG, **options)
    stop_ids = tf.constant([*STOP_IDS, -1, -1])
    return run(tf.constant(logits, tf.float32), sampling.processing, history, stop_ids).numpy()


def one(text, n_prompt=1, logits=(1.0, 2.0, -1.0, -2.0, 0.0, 0.5, -0.5), **options):
    return process_rows([logits], [text], [n_prompt], options)[0].tolist()


def banned(text, n_prompt=1, **options):
    return [i for i, value in enumerate(one(text, n_prompt, **options)) if value == NEVER]


compiled = tf.function(process, jit_compile=True, autograph=False)
plain = tf.function(functools.partial(process, ops=graph), autograph=False)


@pytest.mark.parametrize("run", [plain, compiled], ids=["plain", "compiled"])
@settings(deadline=None, max_examples=200)
@given(rows=ROWS, options=OPTIONS, seed=st.integers(0, 99), junk=st.sampled_from([0, 3, 6, -7, 10**6]))
def test_rows_are_what_plain_python_makes_of_them(run, rows, options, seed, junk):
    rows = [*rows, *[([0, 1, 0, 1], 2)] * (3 - len(rows))]  # one shape
    logits = np.random.default_rng(seed).choice([-2.0, -0.5, 0.0, 1.0, 3.0], (3, N_VOCAB))
    texts, n_prompts = [text for text, _ in rows], [min(n, len(text)) for text, n in rows]
    found = process_rows(logits, texts, n_prompts, options, junk=junk, run=run)
    wanted = [processed_by_hand(*row, options) for row in zip(logits, texts, n_prompts, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_each_row_has_settings_of_its_own(jit_compile):
    options = {
        "repetition_penalty": [1.0, 2.0, 1.0, 0.5],
        "presence_penalty": [0.0, 1.0, 0.0, -1.0],
        "frequency_penalty": [0.0, 0.0, 2.0, 1.0],
        "no_repeat_ngram_size": [0, 2, 3, 1],
        "min_new_tokens": [0, 9, 0, 3],
    }
    shared = {"logit_bias": {2: 1.5}, "bad_words_ids": [[1, 0]], "suppress": [4]}
    texts, n_prompts = [[0, 1], [0, 1, 2, 0], [3, 3, 3, 3, 3], [5]], [1, 2, 2, 1]
    logits = np.random.default_rng(0).normal(size=(4, N_VOCAB))
    run = process if jit_compile is None else tf.function(process, jit_compile=jit_compile, autograph=False)
    found = process_rows(logits, texts, n_prompts, options | shared, run=run)
    for row in range(4):
        alone = {name: values[row] for name, values in options.items()} | shared
        wanted = processed_by_hand(logits[row], texts[row], n_prompts[row], alone)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-6)


def test_nothing_asked_changes_no_bit():
    logits = np.float32([[1e38, -0.0, NEVER, 1e-30, 3.0, -3e38, 0.1]])
    found = process_rows(logits, [[1, 1, 2]], [1], {})
    assert found.tobytes() == logits.tobytes()
    # nor in the rows beside one that asks
    options = {"repetition_penalty": [2.0, 1.0], "presence_penalty": [1.0, 0.0], "no_repeat_ngram_size": [2, 0]}
    found = process_rows(np.repeat(logits, 2, 0), [[1, 1, 2]] * 2, [1, 1], options)
    np.testing.assert_array_equal(found[1], logits[0])


# ---- one by one


def test_repetition_penalty_counts_the_prompt_and_each_id_once():
    assert one([1, 1, 3], 3, repetition_penalty=2.0) == [1, 1, -1, -4, 0, 0.5, -0.5]
    assert one([1, 1, 3], 1, repetition_penalty=0.5) == [1, 4, -1, -1, 0, 0.5, -0.5]


def test_presence_and_frequency_count_the_new_tokens_only():
    assert one([1, 1, 3], 3, presence_penalty=5.0, frequency_penalty=5.0) == [1, 2, -1, -2, 0, 0.5, -0.5]
    assert one([0, 1, 3, 1, 1], 2, frequency_penalty=0.5) == [1, 1, -1, -2.5, 0, 0.5, -0.5]
    assert one([0, 1, 3, 1, 1], 2, presence_penalty=0.5) == [1, 1.5, -1, -2.5, 0, 0.5, -0.5]
    assert one([0, 1], 1, presence_penalty=-1.0, frequency_penalty=-0.5) == [1, 3.5, -1, -2, 0, 0.5, -0.5]


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_others():
    # (1 - 3) * 2 - 1
    options = {"logit_bias": {0: -3.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0}
    assert one([5, 0], 1, **options)[0] == -5


@pytest.mark.parametrize(
    ("text", "n", "ids"),
    [
        ([0, 1, 0], 2, [1]),
        ([0, 1, 0, 2, 0], 2, [1, 2]),
        ([0, 1, 2], 2, []),
        ([0, 1, 0], 1, [0, 1]),
        ([0], 1, [0]),
        ([0], 2, []),
        ([0, 0], 2, [0]),
        ([0, 0], 3, []),
        ([0, 0, 0], 3, [0]),
        ([1, 2, 3, 1, 2], 3, [3]),
        ([4, 2, 3, 1, 2], 3, []),
        ([1, 2, 3, 1, 2], 4, []),
        ([1, 2, 3, 1, 2], 5, []),
        ([0] * 12, 12, [0]),
        ([0] * 11, 12, []),
        ([0] * 12, 13, []),
        ([0, 1, 0], 0, []),
    ],
)
def test_ngrams_on_known_texts(text, n, ids):
    assert banned(text, no_repeat_ngram_size=n) == ids


@pytest.mark.parametrize(
    ("text", "words", "ids"),
    [
        ([0, 1], [[1, 2]], [2]),
        ([0, 1], [[0, 1, 2]], [2]),
        ([0, 1], [[1, 0, 2]], []),
        ([0, 1], [[0, 2]], []),
        ([0, 1], [[3]], [3]),
        ([0, 1], [[3], [1, 3], [1, 2], [0, 1, 5], [4, 0, 1, 6]], [2, 3, 5]),
        ([0], [[1, 0, 3], [0, 0, 3]], []),
        ([0, 0], [[0, 0, 0, 3]], []),
        ([0] * 12, [[0] * 12 + [3]], [3]),
        ([0] * 12, [[0] * 13 + [3], [0] * 40 + [3]], []),
        ([1], [[0, 2]] * 8 + [[1, 4]], [4]),
        ([0, 1], [], []),
    ],
)
def test_bad_words_on_known_texts(text, words, ids):
    assert banned(text, bad_words_ids=words) == ids


def test_min_new_tokens_bans_the_stop_ids_until_there_are_so_many():
    for n_new, wanted in ((0, STOP_IDS), (1, STOP_IDS), (2, []), (3, [])):
        assert banned([0] * (3 + n_new), 3, min_new_tokens=2) == wanted


def test_a_row_that_is_left_with_nothing_keeps_what_it_had():
    logits = [NEVER, NEVER, 1.0, 2.0, NEVER, NEVER, NEVER]
    assert one([2, 3], logits=logits, no_repeat_ngram_size=1, repetition_penalty=2.0) == logits
    assert one([0], logits=logits, suppress=[2, 3]) == logits
    assert one([0], logits=logits, suppress=[2]) == [NEVER] * 3 + [2.0] + [NEVER] * 3


def test_what_is_banned_stays_so_through_penalties():
    options = {"logit_bias": {1: -INF}, "repetition_penalty": 0.01, "presence_penalty": -100, "frequency_penalty": -100}
    assert one([1, 1, 1], 1, **options)[1] == NEVER
