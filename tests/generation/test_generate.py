"""``generate``: rows that do not disturb each other, ends, settings per row, what compiles, what is refused."""

import dataclasses
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
from counting import count_traces
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError, GPT2Error
from tf_gpt2.generation.compiled import compiled_for
from tf_gpt2.generation.generate import generate
from tf_gpt2.generation.run import GenerationResult
from tf_gpt2.model.gpt2 import GPT2Model

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(20, 36))]
# all in one bucket of prompts and one of results, so that the tests share what was compiled
SIZES = {"max_new_tokens": 14}
SAMPLED = {"temperature": 1.0, "seed": [1, 2, 3]}
MIXED = {"temperature": [1.0, 0.0, 0.7], "top_k": [0, 5, 20], "top_p": [0.9, 0.5, 1.0], "seed": [2**64 - 1, 0, 2**32]}
PROCESSED = {
    "temperature": [0.0, 1.5, 1.0],
    "seed": [0, 1, 2],
    "min_p": [0.0, 0.05, 0.0],
    "typical_p": [1.0, 1.0, 0.9],
    "repetition_penalty": [1.4, 1.0, 1.2],
    "presence_penalty": [0.0, 1.0, 0.0],
    "frequency_penalty": [0.0, 0.5, -0.2],
    "no_repeat_ngram_size": [2, 0, 3],
    "min_new_tokens": [0, 9, 2],
    "logit_bias": {3: 1.0, 50: -2.0},
    "bad_words_ids": [[4], [5, 6], [7, 8, 9]],
    "suppress": [10, 11],
}
each_way = pytest.mark.parametrize(
    "options", [{}, SAMPLED, MIXED, PROCESSED], ids=["greedy", "sampled", "mixed", "processed"]
)


@pytest.fixture(scope="module")
def run(odd_model):
    return lambda prompts=PROMPTS, **options: generate(odd_model, prompts, **{**SIZES, **options})


@pytest.fixture(scope="module")
def greedy(run):
    return run()


def only(options, row):
    return {name: value[row] if has_rows(name, value) else value for name, value in options.items()}


def has_rows(name, value):
    return isinstance(value, list) and name not in ("bad_words_ids", "suppress")


def assert_same(result, other):
    assert (result.ids, result.finish_reasons) == (other.ids, other.finish_reasons)
    for one, two in zip(result.logprobs, other.logprobs, strict=True):
        assert one == pytest.approx(two, abs=1e-4)


# ---- laws


def test_greedy_is_the_argmax_of_the_reference(greedy, odd_params):
    for prompt, ids, logprobs in zip(PROMPTS, greedy.ids, greedy.logprobs, strict=True):
        assert len(set(ids)) > 3  # or the test proves little
        plain = reference.log_softmax(reference.forward(odd_params, prompt + ids, n_head=3))[len(prompt) - 1 : -1]
        assert ids == plain.argmax(axis=1).tolist()
        assert logprobs == pytest.approx(plain.max(axis=1), abs=1e-4)


@each_way
def test_logprobs_are_those_of_the_unmodified_model(options, run, odd_params):
    result = run(**options)
    for prompt, ids, logprobs in zip(PROMPTS, result.ids, result.logprobs, strict=True):
        plain = reference.log_softmax(reference.forward(odd_params, prompt + ids, n_head=3))[len(prompt) - 1 : -1]
        assert logprobs == pytest.approx(plain[np.arange(len(ids)), ids], abs=1e-4)


@each_way
def test_a_row_in_a_batch_equals_that_row_alone(options, run):
    together = run(**options)
    for row, prompt in enumerate(PROMPTS):
        alone = run([prompt], **only(options, row))
        of_row = (part[row] for part in (together.ids, together.logprobs, together.finish_reasons))
        assert_same(alone, GenerationResult(*([part] for part in of_row)))
    backwards = {name: value[::-1] if has_rows(name, value) else value for name, value in options.items()}
    assert run(PROMPTS[::-1], **backwards).ids == together.ids[::-1]


@each_way
def test_plain_graph_gives_what_xla_gives(options, run):
    assert_same(run(**options, jit_compile=False), run(**options))


@each_way
def test_going_on_later_gives_the_same_text(options, run):
    # but for what counts new tokens, which have become prompt
    options = {name: options[name] for name in options.keys() - {"presence_penalty", "frequency_penalty"}}
    first = run(**{**options, "max_new_tokens": 5})
    whole = run(**options)
    rest = run([[*PROMPTS[0], *first.ids[0]], [*PROMPTS[1], *first.ids[1]], PROMPTS[2]], **options)
    for row in (0, 1):
        assert [*first.ids[row], *rest.ids[row]][:14] == whole.ids[row]


def test_a_row_alone_is_multiplied_with_8_bit_weights_as_in_a_batch(odd_config, odd_params):
    model = GPT2Model(odd_config, quantization="int8")
    model.set_weights(odd_params)
    together = generate(model, PROMPTS, **SIZES, **MIXED, jit_compile=False)
    alone = generate(model, PROMPTS[:1], **SIZES, **only(MIXED, 0), jit_compile=False)
    assert_same(alone, GenerationResult(*([part[0]] for part in dataclasses.astuple(together))))


def test_dropout_is_off_and_later_calls_change_nothing(odd_config, odd_params, run, greedy):
    model = GPT2Model(odd_config, dropout=0.5)
    model.set_weights(odd_params)
    assert_same(generate(model, PROMPTS, **SIZES, jit_compile=False), greedy)
    assert_same(run(), greedy)


def test_threads_do_not_disturb_each_other(run, greedy):
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(), range(8)):
            assert_same(result, greedy)


# ---- seeds and settings


def test_equal_rows_and_seeds_give_equal_text_and_other_seeds_other_text(run):
    result = run([PROMPTS[1]] * 3, temperature=1.5, seed=[7, 7, 8])
    assert result.ids[0] == result.ids[1] != result.ids[2]
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1, np.uint64(2**64 - 2), np.int32(5)]
    texts = [run([PROMPTS[1]], temperature=1.5, seed=seed).ids[0] for seed in seeds]
    assert len(set(map(tuple, texts))) == len(seeds)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-40}, {"temperature": 1e-37}])
def test_extreme_settings_are_greedy(options, run, greedy):
    assert run(**{"temperature": 0.3, "seed": 3, **options}).ids == greedy.ids


def test_top_k_and_top_p_hold_at_each_step(run, odd_params):
    result = run(temperature=3.0, top_k=[3, 0, 4], top_p=[1.0, 0.4, 0.8], seed=11)
    for row, (k, p) in enumerate([(3, 1), (0, 0.4), (4, 0.8)]):
        ids = PROMPTS[row] + result.ids[row]
        logits = reference.forward(odd_params, ids, n_head=3) / 3
        for place in range(len(PROMPTS[row]), len(ids)):
            kept = np.array(reference.kept_by_top_k(logits[place - 1], k))
            kept = kept[reference.kept_by_top_p(logits[place - 1][kept], p)]
            assert ids[place] in kept


def test_settings_may_be_arrays(run):
    arrays = {name: np.array(value, np.uint64 if name == "seed" else None) for name, value in MIXED.items()}
    assert_same(run([np.array(p, np.uint8) for p in PROMPTS], **arrays), run(tuple(map(tuple, PROMPTS)), **MIXED))


# ---- penalties and bans


def step_by_step(params, prompt, options):
    """Greedy text of the reference under penalties and bans, 14 tokens, chosen in plain Python."""
    ids = list(prompt)
    for _ in range(14):
        x, new = reference.forward(params, ids, n_head=3)[-1], ids[len(prompt) :]
        for i in set(ids):
            x[i] *= options.get("repetition_penalty", 1) ** (1 if x[i] < 0 else -1)
        for i in set(new):
            x[i] -= options.get("presence_penalty", 0) + options.get("frequency_penalty", 0) * new.count(i)
        n = options.get("no_repeat_ngram_size", 0)
        for i in range(len(ids) - n + 1 if n else 0):
            if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]:
                x[ids[i + n - 1]] = -math.inf
        ids.append(int(x.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 3.0},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -2.0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 0.3, "no_repeat_ngram_size": 3, "presence_penalty": -1.0, "frequency_penalty": 1.0},
    ],
    ids=str,
)
def test_greedy_text_under_penalties_is_that_of_plain_python(options, run, greedy, odd_params):
    result = run(**options)
    assert result.ids == [step_by_step(odd_params, prompt, options) for prompt in PROMPTS]
    assert result.ids != greedy.ids


def test_banned_ids_and_words_are_not_said(run, greedy):
    said = greedy.ids[0]
    for options in ({"suppress": [said[0]]}, {"logit_bias": {said[0]: -math.inf}}, {"bad_words_ids": [[said[0]]]}):
        assert said[0] not in run(**options).ids[0]
    result = run(bad_words_ids=[said[:2], said[3:6]])
    assert result.ids[0][0] == said[0]
    assert result.ids[0][1] != said[1]
    assert run(logit_bias={77: 1e6}).ids == [[77] * 14] * 3


def test_no_row_stops_before_it_has_min_new_tokens(run, greedy):
    stop = greedy.ids[0][0]
    result = run(stop_ids=[stop], min_new_tokens=[3, 0, 2**40], logit_bias={stop: 1e6})
    assert [len(ids) for ids in result.ids] == [3, 0, 14]
    assert result.finish_reasons == ["stop", "stop", "length"]
    assert not any(stop in ids for ids in result.ids)


def test_bans_that_leave_nothing_are_lifted(run, greedy):
    # the first token bans itself, all others are suppressed
    others = [i for i in range(101) if i != greedy.ids[0][0]]
    result = run([PROMPTS[0]], suppress=others, no_repeat_ngram_size=1)
    assert result.ids == [greedy.ids[0]]


# ---- ends


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_stop_id_ends_its_row_and_is_left_out(jit_compile, run, greedy):
    stop = greedy.ids[0][6]
    result = run(stop_ids=[stop], jit_compile=jit_compile)
    for row, ids in enumerate(greedy.ids):
        n = ids.index(stop) if stop in ids else len(ids)
        assert result.ids[row] == ids[:n]
        assert len(result.logprobs[row]) == n
        assert result.finish_reasons[row] == ("stop" if stop in ids else "length")


def test_any_of_many_stop_ids_ends_a_row(run, greedy):
    first = greedy.ids[0][0]
    others = [i for i in range(101) if i not in greedy.ids[0]]
    assert run([PROMPTS[0]], stop_ids=others, jit_compile=False).finish_reasons == ["length"]
    for stop_ids in ([first], [*others[:7], first], [*others[:8], first], [first, first], (first,), {first}):
        wanted = GenerationResult([[]], [[]], ["stop"], [[]], n_truncated=[0])
        assert run([PROMPTS[0]], stop_ids=stop_ids, jit_compile=False) == wanted


def test_a_stop_id_in_the_prompt_does_not_stop(run, greedy):
    assert 20 not in greedy.ids[2]
    assert run(stop_ids=[20]).ids[2] == greedy.ids[2]


def test_the_last_allowed_token_may_stop(run, greedy):
    ids = greedy.ids[1]
    n = next(n for n in range(1, 14) if ids[n] not in ids[:n])
    for max_new_tokens, reason in ((n, "length"), (n + 1, "stop")):
        result = run([PROMPTS[1]], stop_ids=[ids[n]], max_new_tokens=max_new_tokens)
        assert (result.ids, result.finish_reasons) == ([ids[:n]], [reason])


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 13])
def test_as_many_tokens_as_asked_for(max_new_tokens, run, greedy):
    result = run(max_new_tokens=max_new_tokens, jit_compile=False)
    assert result.ids == [ids[:max_new_tokens] for ids in greedy.ids]
    assert [len(row) for row in result.logprobs] == [max_new_tokens] * 3
    assert result.finish_reasons == ["length"] * 3


@pytest.mark.parametrize("max_new_tokens", [30, 40, 10**6, 2**31, sys.maxsize, 2**64])
def test_rows_end_where_the_window_ends(max_new_tokens, run):
    result = run([[5], [1] * 39, [2] * 38], max_new_tokens=max_new_tokens, jit_compile=False)
    assert [len(ids) for ids in result.ids] == [min(max_new_tokens, 39), 1, 2]
    assert result.finish_reasons == ["length" if max_new_tokens == 30 else "context", "context", "context"]


def test_a_full_window_that_was_asked_for_is_a_length(run):
    for n in (0, 1):
        assert run([[1] * 39], max_new_tokens=n, jit_compile=False).finish_reasons == ["length"]


def test_the_result_is_plain_python(greedy):
    assert json.loads(json.dumps(dataclasses.asdict(greedy)))["ids"] == greedy.ids
    assert all(type(i) is int for ids in greedy.ids for i in ids)
    assert all(math.isfinite(x) and x <= 0 for row in greedy.logprobs for x in row)


def test_smallest_models():
    config = GPT2Config(n_vocab=1, n_ctx=2, n_embd=1, n_head=1, n_layer=1)
    model = GPT2Model(config)
    model.set_weights(lively_params(config))
    for options in ({}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
        result = generate(model, [[0]], **options)
        assert result == GenerationResult([[0]], [[pytest.approx(0)]], ["context"], [[]], n_truncated=[0])


# ---- what compiles


def test_knobs_compile_nothing(run, odd_model, greedy):
    longer, n_traces = list(range(2, 10)), count_traces(odd_model, jit_compile=True)
    for options in (
        SAMPLED,
        MIXED,
        {"temperature": 0.5, "seed": 2**50, "top_k": 7},
        {"top_k": 100, "top_p": 0.1, "temperature": [0, 1, 2]},
        PROCESSED,
        {"min_p": 0.2, "typical_p": [0.1, 1.0, 0.3], "temperature": 2},
        {"logit_bias": dict.fromkeys(range(99), -1.0), "suppress": range(50)},
        {"bad_words_ids": [[1], [1, 2, 3, 4], *[[i, 1] for i in range(7)], *[[i] for i in range(60)]]},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 30, "min_new_tokens": 5, "stop_ids": [3]},
        {"stop_ids": [1]},
        {"stop_ids": range(8)},
        {"max_new_tokens": 16},
        {"max_new_tokens": 2},
        {"prompts": [[1] * 16, longer, [2]]},
    ):
        run(**options)
    assert count_traces(odd_model, jit_compile=True) == n_traces


def test_other_buckets_compile_once(odd_config, odd_params):
    model, counts = GPT2Model(odd_config), []
    compiled_for.cache_clear()
    for prompt, n in (([1], 5), ([1, 2], 5), ([1], 20), ([1] * 16, 16), ([1] * 17, 5), ([1] * 20, 9), ([1], 5)):
        generate(model, [prompt], max_new_tokens=n, jit_compile=False)
        counts.append(count_traces(model))
    assert counts == [2, 2, 3, 3, 4, 4, 4]


# ---- what is refused


def test_an_unknown_option_is_refused(run):
    with pytest.raises(TypeError, match="'topk' is no option of generation, did you mean 'top_k'"):
        run(topk=3)


@pytest.mark.parametrize("length", [40, 41, 1000])
def test_a_prompt_that_fills_the_window_is_refused_with_the_numbers(length, run):
    with pytest.raises(ContextLengthError) as caught:
        run([[1], [2] * length])
    for part in ("prompts[1]", f"{length} tokens", "n_ctx=40", "39"):
        assert part in str(caught.value)
    assert isinstance(caught.value, GPT2Error)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"prompts must be a non-empty list of lists of ids, got \[\]"),
        ("text", "prompts must be .* got 'text'"),
        (None, "prompts must be .* got None"),
        (5, "prompts must be .* got 5"),
        ({1: 2}, "prompts must be .* got {1: 2}"),
        ([5], r"prompts\[0\] must be a list of integers, got 5; wrap one list of ids as \[ids\]"),
        (["text"], r"prompts\[0\] must be a list of integers, got 'text'"),
        ([[1], [1.0]], r"prompts\[1\] must be a list of integers"),
        ([[True]], r"prompts\[0\] must be a list of integers"),
        ([[1, None]], r"prompts\[0\] must be a list of integers"),
        ([[1, [2]]], r"prompts\[0\] must be a list of integers"),
        ([[[1, 2]]], r"prompts\[0\] must be a list of integers"),
        ([[1], []], r"prompts\[1\] is empty"),
        ([[1, 101]], r"prompts\[0\] must have ids in \[0, 101\), got 1 to 101"),
        ([[-1, 3]], r"prompts\[0\] must have ids in \[0, 101\), got -1 to 3"),
        ([[2**70]], r"prompts\[0\] must"),
    ],
)
def test_wrong_prompts_are_named(prompts, message, run):
    with pytest.raises((TypeError, ValueError), match=message):
        run(prompts)


WRONG = {
    "max_new_tokens": [-1, 1.5, 2.0, None, "3", True, [1]],
    "temperature": [-0.1, math.nan, math.inf, None, "0.5", "hot", 1j, [1, 2], [[1, 2, 3]], [1, 2, -3], [[1], [1, 2]]],
    "top_k": [-1, 1.5, 2.0, None, "3", 2**70, [1, 2], [1, 2, -3]],
    "top_p": [0, 0.0, -0.1, 1.1, math.nan, None, "0.5", [0.5], [1, 1, 2], 1e-50],
    "seed": [-1, 2**64, 1.0, None, "5", True, [1, 2], [1, 2, -3], []],
    "stop_ids": [5, None, [1.5], ["a"], [101], [-1], [[1]], "5"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_argument_is_named_with_its_value(name, value, run):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must ") as caught:
        run(**{name: value})
    assert repr(value) in str(caught.value)
