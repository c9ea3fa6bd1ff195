"""Texts longer than the window: against a slow loop over plain forward passes, and the laws that hold within it too."""

import dataclasses
import itertools

import numpy as np
import pytest
import reference
from counting import count_traces
from hypothesis import given, settings, strategies as st
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.generate import generate, stream
from tf_gpt2.generation.options import window_start
from tf_gpt2.model.gpt2 import GPT2Model

CONFIGS = [
    GPT2Config(n_vocab=53, n_ctx=12, n_embd=12, n_head=3, n_layer=2),
    GPT2Config(n_vocab=31, n_ctx=7, n_embd=10, n_head=5, n_layer=1),
    GPT2Config(n_vocab=17, n_ctx=2, n_embd=8, n_head=2, n_layer=1),
]
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(11)), list(range(16, 1, -1))]
SAMPLED = {"temperature": [1.0, 0.0, 0.7, 2.0], "top_k": [0, 5, 9, 0], "seed": [2**64 - 1, 0, 2**32, 3]}
PENALIZED = {
    "repetition_penalty": [1.3, 1.0, 1.1, 1.0],
    "presence_penalty": [0.0, 1.0, 0.5, -0.5],
    "frequency_penalty": [0.5, 0.0, -0.3, 0.2],
    "no_repeat_ngram_size": [0, 2, 3, 0],
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: f"n_ctx={config.n_ctx}")
def model(request):
    model = GPT2Model(request.param)
    model.set_weights(lively_params(request.param))
    return model


@pytest.fixture(scope="module")
def small():
    """The first of them, for laws that need no more."""
    model = GPT2Model(CONFIGS[0])
    model.set_weights(lively_params(CONFIGS[0]))
    return model


def slide(model, prompts=PROMPTS, **options):
    return generate(model, prompts, **{"max_new_tokens": 40, "overflow": "slide", "jit_compile": False, **options})


def row_of(options, row):
    return {name: value[row] if isinstance(value, list) else value for name, value in options.items()}


def read_again(model, prompt, n_new, *, penalties=None, min_new_tokens=0, stop=None):
    """The ids, their log-probabilities and the windows by a loop that knows nothing but plain forward passes.

    A full window is left for its second half; a prompt is read as if it had been written token by token.
    """
    params, config, p = model.get_params(), model.config, penalties or {}
    window, n_prompt = [], 0

    def write(token_id):
        nonlocal window
        window.append(token_id)
        if len(window) == config.n_ctx:
            window = window[len(window) - config.n_ctx // 2 :]

    for token_id in prompt:
        write(token_id)
    new, logprobs = [], []
    while len(new) < n_new:
        logits = reference.forward(params, window, n_head=config.n_head)[-1]
        logprob = reference.log_softmax(logits)
        n_prompt = max(0, len(window) - len(new))  # what is left of the prompt
        for i in set(window):
            logits[i] *= p.get("repetition_penalty", 1) ** (1 if logits[i] < 0 else -1)
        for i in set(window[n_prompt:]):
            n_said = window[n_prompt:].count(i)
            logits[i] -= p.get("presence_penalty", 0) + p.get("frequency_penalty", 0) * n_said
        n = p.get("no_repeat_ngram_size", 0)
        for i in range(len(window) - n + 1 if n else 0):
            if window[i : i + n - 1] == window[len(window) - n + 1 :]:
                logits[window[i + n - 1]] = -np.inf
        if len(new) < min_new_tokens:
            logits[stop] = -np.inf
        chosen = int(logits.argmax())
        if chosen == stop:
            return new, logprobs
        new.append(chosen)
        logprobs.append(logprob[chosen])
        write(chosen)
    return new, logprobs


# ---- slide


def test_greedy_ids_are_those_of_plain_forward_passes(model):
    result = slide(model)
    for prompt, ids, logprobs in zip(PROMPTS, result.ids, result.logprobs, strict=True):
        expected = read_again(model, prompt, 40)
        assert ids == expected[0]
        assert logprobs == pytest.approx(expected[1], abs=1e-4)
    assert result.finish_reasons == ["length"] * 4
    assert len({tuple(ids[20:]) for ids in result.ids}) > 1 or model.config.n_ctx < 12


def test_other_random_models_agree_too():
    config = CONFIGS[0]
    for seed in range(1, 6):
        model = GPT2Model(config)
        model.set_weights(lively_params(config, seed=seed))
        assert slide(model, PROMPTS[2:3]).ids[0] == read_again(model, PROMPTS[2], 40)[0]


def test_penalties_and_bans_look_at_the_window(small):
    result = slide(small, **PENALIZED)
    expected = [read_again(small, prompt, 40, penalties=row_of(PENALIZED, i))[0] for i, prompt in enumerate(PROMPTS)]
    assert result.ids == expected
    assert result.ids != slide(small).ids


def test_min_new_tokens_counts_all_new_tokens(small):
    stop = slide(small, PROMPTS[:1]).ids[0][30]
    for n in (3, 20, 35):
        result = slide(small, PROMPTS[:1], stop_ids=[stop], min_new_tokens=n)
        expected, _ = read_again(small, PROMPTS[0], 40, min_new_tokens=n, stop=stop)
        assert result.ids == [expected]
        assert len(expected) >= n
        assert result.finish_reasons == ["stop" if len(expected) < 40 else "length"]


def test_a_row_that_has_stopped_stays_so_while_others_slide(small):
    whole = slide(small)
    for row, place in ((0, 4), (1, 2), (2, 30)):
        stop = whole.ids[row][place]
        ends = [ids.index(stop) if stop in ids else 40 for ids in whole.ids]
        result = slide(small, stop_ids=[stop])
        assert result.ids == [ids[:end] for ids, end in zip(whole.ids, ends, strict=True)]
        assert result.finish_reasons == ["stop" if end < 40 else "length" for end in ends]
        assert max(ends) > 12  # another row goes on


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=2), n=st.integers(0, 45), seed=st.integers(0, 9))
def test_a_row_in_a_batch_is_that_row_alone(small, lengths, n, seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, small.config.n_vocab, length).tolist() for length in lengths]
    options = {"temperature": 1.0, "seed": [seed, seed + 1], "presence_penalty": 0.5, "max_new_tokens": n}
    together = slide(small, prompts, stop_ids=[3, 4], **options)
    for i, prompt in enumerate(prompts):
        alone = slide(small, [prompt], stop_ids=[3, 4], **row_of(options, i))
        assert (alone.ids[0], alone.finish_reasons[0]) == (together.ids[i], together.finish_reasons[i])
        assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=1e-4)
        assert alone.n_truncated[0] == together.n_truncated[i]
        assert len(alone.ids[0]) == len(alone.logprobs[0]) == n or alone.finish_reasons == ["stop"]


@pytest.mark.parametrize("options", [{}, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
def test_streamed_and_compiled_are_the_same(options, small):
    result = slide(small, **options)
    assert slide(small, **options, jit_compile=True).ids == result.ids
    for i, prompt in enumerate(PROMPTS):
        pieces = stream(small, prompt, max_new_tokens=40, overflow="slide", jit_compile=False, **row_of(options, i))
        assert list(itertools.chain(*pieces)) == result.ids[i]


@pytest.mark.parametrize("n", [1, 5, 11, 12, 13, 25])
def test_going_on_later_gives_the_same_text(n, small):
    whole = slide(small, **SAMPLED)
    first = slide(small, **SAMPLED, max_new_tokens=n)
    rest = slide(small, [p + ids for p, ids in zip(PROMPTS, first.ids, strict=True)], **SAMPLED, max_new_tokens=40 - n)
    assert [a + b for a, b in zip(first.ids, rest.ids, strict=True)] == whole.ids


def test_no_window_draws_the_numbers_of_another():
    """A model that finds all tokens equally likely shows the numbers themselves."""
    config = GPT2Config(n_vocab=997, n_ctx=8, n_embd=2, n_head=1, n_layer=1)
    model = GPT2Model(config)
    params = model.get_params()
    params["ln_f"] = {"g": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    model.set_weights(params)
    [ids] = slide(model, [[1]], max_new_tokens=200, temperature=1.0, seed=5).ids
    assert len(set(ids)) > 150
    # the draw for a place is the one that a model with a longer window makes
    wide = GPT2Model(dataclasses.replace(config, n_ctx=256))
    params["wpe"] = wide.get_params()["wpe"]
    wide.set_weights(params)
    assert generate(wide, [[1]], max_new_tokens=200, temperature=1.0, seed=5, jit_compile=False).ids == [ids]


def test_what_fits_does_not_slide(small):
    options = {"max_new_tokens": 4, "jit_compile": False, **row_of(SAMPLED, 3)}
    results = [
        generate(small, PROMPTS[:2], overflow=overflow, **options) for overflow in ("error", "truncate", "slide")
    ]
    assert results[0].ids == results[1].ids == results[2].ids
    assert all(result.n_truncated == [0, 0] for result in results)


def test_shapes_do_not_multiply(odd_config, odd_params):
    """Any lengths, any numbers of windows: one more prefill, and the caches that there are buckets for."""
    model = GPT2Model(odd_config)
    model.set_weights(odd_params)
    slide(model, [[1], [2] * 39], max_new_tokens=100)
    n_traces = count_traces(model)
    for lengths, n in (((1, 3), 77), ((9, 2), 300), ((39, 39), 55), ((5, 1), 121)):
        slide(model, [[7] * length for length in lengths], max_new_tokens=n, stop_ids=[3])
    assert count_traces(model) <= n_traces + 3  # a prefill of 16, a cache of 32


def test_rows_may_be_told_to_end_at_any_time(small):
    whole = slide(small)
    wanted = [3, 14, 27, 40]
    result = slide(
        small, is_complete=lambda ids: any(ids[:n] == row[:n] for row, n in zip(whole.ids, wanted, strict=True))
    )
    for ids, row, n in zip(result.ids, whole.ids, wanted, strict=True):
        assert ids == row[: len(ids)]
        assert len(ids) >= n


@pytest.mark.parametrize("n_ctx", [2, 3, 7, 12])
def test_the_window_moves_by_half_and_always_has_room(n_ctx):
    start = 0
    for length in range(1, 100):
        if length - start == n_ctx:
            start = length - n_ctx // 2
        assert window_start(length, n_ctx) == start


# ---- truncate


@pytest.mark.parametrize(("n", "kept"), [(0, 11), (1, 11), (2, 10), (8, 4), (11, 1), (12, 1), (10**9, 1), (2**70, 1)])
def test_truncation_keeps_the_end_of_the_prompt(n, kept, small):
    prompts, options = PROMPTS[1:], {"max_new_tokens": n, "temperature": 1.0, "seed": 4, "jit_compile": False}
    result = generate(small, prompts, overflow="truncate", **options)
    by_hand = generate(small, [prompt[-kept:] for prompt in prompts], **options)
    assert (result.ids, result.finish_reasons) == (by_hand.ids, by_hand.finish_reasons)
    assert result.n_truncated == [max(0, len(prompt) - kept) for prompt in prompts]
    if n < 12:
        assert result.finish_reasons == ["length"] * 3
    pieces = stream(small, prompts[2], overflow="truncate", **options)
    assert list(itertools.chain(*pieces)) == result.ids[2]


def test_a_slid_prompt_says_what_was_not_read(small):
    assert slide(small, max_new_tokens=1).n_truncated == [0, 0, 0, 6]
    assert slide(small, [[1] * 12, [1] * 17, [1] * 18], max_new_tokens=0).n_truncated == [6, 6, 12]


# ---- refused


def test_error_is_what_holds_without_a_word(small):
    with pytest.raises(ContextLengthError, match=r"prompts\[3\] has 15 tokens.*overflow='truncate' or 'slide'"):
        generate(small, PROMPTS)
    result = generate(small, PROMPTS[:3], jit_compile=False)
    assert result.finish_reasons == ["context"] * 3
    assert result.n_truncated == [0, 0, 0]


@pytest.mark.parametrize("overflow", ["Slide", "", None, "ignore", 1])
def test_another_word_is_refused(overflow, small):
    with pytest.raises(ValueError, match="overflow must be one of error, truncate, slide, got") as caught:
        generate(small, PROMPTS, overflow=overflow)
    assert repr(overflow) in str(caught.value)
    with pytest.raises(ValueError, match="overflow must be"):
        stream(small, PROMPTS[0], overflow=overflow)


def test_a_window_of_one_has_no_room_for_anything():
    model = GPT2Model(GPT2Config(n_vocab=5, n_ctx=1, n_embd=2, n_head=1, n_layer=1))
    for overflow in ("error", "truncate", "slide"):
        with pytest.raises(ContextLengthError, match="n_ctx=1"):
            generate(model, [[1]], overflow=overflow)
