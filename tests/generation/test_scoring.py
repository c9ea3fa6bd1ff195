"""Scores against float64 forward passes, one row at a time; windows against the recipe they come from."""

import gc
import math
import weakref

import hypothesis
import numpy as np
import pytest
import reference
from counting import count_traces
from hypothesis import strategies as st

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation import scoring
from tf_gpt2.generation.compiled import Compiled, compiled_for
from tf_gpt2.generation.scoring import score, sliding_logprobs, target_logprobs, windows
from tf_gpt2.model.gpt2 import GPT2Model

TOLERANCE = 1e-4
"""Of a log-probability; rounding makes 1e-5."""

rows_of_any_length = st.lists(st.lists(st.integers(0, 100), min_size=0, max_size=40), min_size=1, max_size=7)


def expected_logprobs(params, ids, *, n_head):
    """Of each id but the first, in float64."""
    if len(ids) < 2:
        return []
    log_probs = reference.log_softmax(reference.forward(params, ids[:-1], n_head=n_head))
    return log_probs[np.arange(len(ids) - 1), ids[1:]].tolist()


def rows_of(config, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.n_vocab, length).tolist() for length in lengths]


def naive_windows(n_tokens, n_ctx, stride):
    """Hugging Face's recipe to the letter: labels of -100 for context, shifted by one inside the loss."""
    scored = []
    prev_end_loc = 0
    for begin_loc in range(0, n_tokens, stride):
        end_loc = min(begin_loc + n_ctx, n_tokens)
        trg_len = end_loc - prev_end_loc
        target_ids = list(range(begin_loc, end_loc))
        target_ids[:-trg_len] = [-100] * len(target_ids[:-trg_len])
        scored.append((begin_loc, end_loc, [i for i in target_ids[1:] if i != -100]))
        prev_end_loc = end_loc
        if end_loc == n_tokens:
            break
    return scored


# ---- rows


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(rows=rows_of_any_length, start_id=st.one_of(st.none(), st.integers(0, 100)))
def test_scores_are_those_of_a_forward_pass_over_each_row_alone(rows, start_id, odd_model, odd_params):
    scores = score(odd_model, rows, start_id=start_id, jit_compile=False)
    assert [one.ids for one in scores] == rows
    for one in scores:
        known = one.ids if start_id is None else [start_id, *one.ids]
        expected = expected_logprobs(odd_params, known, n_head=3)
        unscored = len(one.ids) - len(expected)
        assert all(map(math.isnan, one.logprobs[:unscored]))
        assert unscored == (start_id is None and len(one.ids) > 0)
        np.testing.assert_allclose(one.logprobs[unscored:], expected, atol=TOLERANCE)
        assert one.total == pytest.approx(sum(expected), abs=40 * TOLERANCE)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_row_in_a_batch_is_that_row_alone(odd_model, jit_compile):
    rows = rows_of(odd_model.config, [40, 1, 17, 16, 2, 33])
    together = score(odd_model, rows, start_id=5, jit_compile=jit_compile)
    for row, one in zip(rows, together, strict=True):
        alone = score(odd_model, [row], start_id=5, jit_compile=False)[0]
        assert alone.ids == one.ids
        np.testing.assert_allclose(one.logprobs, alone.logprobs, atol=TOLERANCE)


def test_what_lies_past_a_row_does_not_matter(odd_model, monkeypatch):
    rows = rows_of(odd_model.config, [3, 9, 14])
    clean = score(odd_model, rows, start_id=0, jit_compile=False)

    def with_noise(rows, length):
        padded = np.random.default_rng(9).integers(0, 101, (len(rows), length)).astype(np.int32)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded

    monkeypatch.setattr(scoring, "pad_rows", with_noise)
    assert score(odd_model, rows, start_id=0, jit_compile=False) == clean


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_integers_are_scored_with_the_rounded_weights(quantization, odd_config, odd_params):
    """What XLA compiles rounds activations as well."""
    model = GPT2Model(odd_config, quantization=quantization)
    model.set_weights(odd_params)
    rows = rows_of(odd_config, [40, 7, 1])
    for jit_compile, mean, largest in ((False, TOLERANCE, TOLERANCE), (True, 0.05, 0.5)):
        for one in score(model, rows, start_id=3, jit_compile=jit_compile):
            expected = expected_logprobs(model.get_params(), [3, *one.ids], n_head=3)
            difference = np.abs(np.array(one.logprobs) - expected)
            assert difference.mean() < mean
            assert difference.max() < largest


def test_bfloat16_is_scored_up_to_its_rounding(odd_config, odd_params):
    model = GPT2Model(odd_config, dtype="bfloat16")
    model.set_weights(odd_params)
    rows = rows_of(odd_config, [40, 7, 1])
    for jit_compile in (False, True):
        for one in score(model, rows, start_id=3, jit_compile=jit_compile):
            expected = expected_logprobs(model.get_params(), [3, *one.ids], n_head=3)
            difference = np.abs(np.array(one.logprobs) - expected)
            assert difference.mean() < 0.05
            assert difference.max() < 0.5


def test_last_targets_only(odd_model, odd_params):
    rows = [np.array(row, np.int32) for row in rows_of(odd_model.config, [41, 20, 20, 2])]
    n_targets = [5, 0, 19, 1]
    found = target_logprobs(odd_model, rows, n_targets, jit_compile=False)
    for row, n, logprobs in zip(rows, n_targets, found, strict=True):
        expected = expected_logprobs(odd_params, row, n_head=3)
        np.testing.assert_allclose(logprobs, expected[len(expected) - n :], atol=TOLERANCE)


def test_no_rows_have_no_scores(odd_model):
    assert score(odd_model, []) == []
    assert score(odd_model, [[]], start_id=1)[0].total == 0.0


# ---- pieces


def test_memory_and_compilations_are_bounded(odd_params, odd_config, monkeypatch, caplog):
    model = GPT2Model(odd_config)
    model.set_weights(odd_params)
    monkeypatch.setattr(scoring, "POSITIONS_PER_PIECE", 128)
    monkeypatch.setattr(scoring, "TARGETS_PER_PIECE", 32)
    compiled_for.cache_clear()
    functions, seen, call = (scoring.hidden_rows, scoring.chosen_logprobs), [], Compiled.__call__

    def spy(function, weights, *tensors):
        seen.append(tensors[0].shape)
        return call(function, weights, *tensors)

    monkeypatch.setattr(Compiled, "__call__", spy)
    rows = rows_of(odd_config, [*range(41), *[40] * 5, *[3] * 30])
    first = score(model, rows, start_id=0, jit_compile=False)
    shapes = {tuple(shape) for shape in seen}
    of_ids, of_hidden = shapes - {s for s in shapes if s[1] == 12}, {s for s in shapes if s[1] == 12}
    assert max(n_rows * length for n_rows, length in of_ids) <= 128
    assert {length for _, length in of_ids} == {16, 32, 40}
    assert max(n for n, _ in of_hidden) <= 32
    n_traces = count_traces(model, *functions)
    assert n_traces == len(shapes) <= 3 * 4 + 2
    assert score(model, rows, start_id=0, jit_compile=False) == first
    assert count_traces(model, *functions) == n_traces
    assert not caplog.records  # such as TensorFlow's warning of frequent tracing
    for one in first:
        np.testing.assert_allclose(one.logprobs, expected_logprobs(odd_params, [0, *one.ids], n_head=3), atol=TOLERANCE)


def test_a_model_that_was_scored_can_be_freed():
    model = GPT2Model(GPT2Config(n_vocab=16, n_ctx=8, n_embd=4, n_head=1, n_layer=1))
    score(model, [[1, 2]], jit_compile=False)
    reference_to_it = weakref.ref(model)
    del model
    gc.collect()
    assert reference_to_it() is None


# ---- sliding windows


@hypothesis.given(st.integers(1, 80), st.integers(1, 20), st.data())
def test_windows_are_hugging_faces(n_tokens, n_ctx, data):
    stride = data.draw(st.integers(1, n_ctx))
    ours = [(w.start, w.end, list(range(w.end - w.n_targets, w.end))) for w in windows(n_tokens, n_ctx, stride)]
    assert ours == naive_windows(n_tokens, n_ctx, stride)
    scored = [i for _, _, targets in ours for i in targets]
    assert len(set(scored)) == len(scored)
    if stride < n_ctx:
        assert scored == list(range(1, n_tokens))


@pytest.mark.parametrize(("n_tokens", "stride"), [(2, 1), (2, 40), (40, 13), (41, 39), (41, 40), (97, 1), (97, 20)])
def test_a_long_sequence_is_scored_as_by_a_plain_loop(odd_model, odd_params, stride, n_tokens):
    [ids] = rows_of(odd_model.config, [n_tokens])
    expected = []
    for begin, end, targets in naive_windows(n_tokens, 40, stride):
        logits = reference.forward(odd_params, ids[begin:end], n_head=3)
        expected += [reference.log_softmax(logits)[i - begin - 1, ids[i]] for i in targets]
    found = sliding_logprobs(odd_model, ids, stride=stride, jit_compile=False)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_progress_reaches_the_end(odd_model):
    seen = []
    ids = np.arange(400) % 101
    sliding_logprobs(odd_model, ids, stride=3, jit_compile=False, on_progress=lambda *pair: seen.append(pair))
    assert len(seen) > 2
    assert seen[-1] == (399, 399)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {399}


# ---- what is refused


def test_too_long_a_row_is_refused(odd_model):
    with pytest.raises(ContextLengthError, match="sequence 1 has 41 tokens, the window is n_ctx=40"):
        score(odd_model, [[1], [1] * 41])
    assert len(score(odd_model, [[1] * 40], start_id=1, jit_compile=False)[0].logprobs) == 40


@pytest.mark.parametrize(
    ("rows", "start_id", "message"),
    [
        ([[1, 101]], None, r"rows\[0\] must have ids in \[0, 101\), got 1 to 101"),
        ([[1], [-1]], None, r"rows\[1\] must have ids in \[0, 101\)"),
        ([[1]], 101, "start_id must have ids in"),
        ([[1]], -1, "start_id must have ids in"),
        ([[1.0]], None, r"rows\[0\] must be a list of integers"),
        ([["a"]], None, r"rows\[0\] must be a list of integers"),
        (["text"], None, r"rows\[0\] must be a list of integers"),
        ([[True]], None, r"rows\[0\] must be a list of integers"),
        (5, None, "rows must be a list of lists of ids, got 5"),
        ({}, None, "rows must be a list of lists of ids, got {}"),
        ([5], None, r"rows\[0\] must be a list of integers, got 5; wrap one list"),
        ([[[1], [2, 3]]], None, r"rows\[0\] must be a list of integers"),
    ],
)
def test_wrong_rows_are_named(odd_model, rows, start_id, message):
    with pytest.raises((TypeError, ValueError), match=message):
        score(odd_model, rows, start_id=start_id)


@pytest.mark.parametrize("stride", [0, -1, 41, 1.5, True, "3", None])
def test_wrong_strides_are_named(odd_model, stride):
    with pytest.raises(ValueError, match=r"stride must be an integer in \[1, n_ctx=40\], got ") as caught:
        sliding_logprobs(odd_model, [1, 2, 3], stride=stride)
    assert repr(stride) in str(caught.value)


@pytest.mark.parametrize("ids", [[], [1]])
def test_less_than_two_tokens_are_refused(odd_model, ids):
    with pytest.raises(ValueError, match=f"at least 2 tokens, got {len(ids)}"):
        sliding_logprobs(odd_model, ids, stride=2)
