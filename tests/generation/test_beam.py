"""Beam search against plain Python over the float64 reference, against all sequences there are, and against greedy."""

import dataclasses
import functools
import gc
import itertools
import json
import math
import weakref

import numpy as np
import pytest
import reference
from counting import count_traces
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.beam import BeamSearchResult, beam_search, decode, prefill
from tf_gpt2.generation.compiled import compiled_for
from tf_gpt2.generation.generate import generate
from tf_gpt2.model.gpt2 import GPT2Model

# few tokens and flat logits, so that sequences stop often and at different lengths
CONFIG = GPT2Config(n_vocab=13, n_ctx=20, n_embd=12, n_head=3, n_layer=2)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12]]
STOP_IDS = [[], [3], [3, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
EARLY = [False, True, "never"]
PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]


def flat_params(config, scale=0.3):
    """Without the last bias, which would make some ids likely everywhere."""
    params = lively_params(config, seed=5)
    return {**params, "ln_f": {"g": scale * params["ln_f"]["g"], "b": 0 * params["ln_f"]["b"]}}


def make_model(config, scale=0.3, **options):
    model = GPT2Model(config, **options)
    model.set_weights(flat_params(config, scale))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def run(model):
    """Without XLA, which would compile for each number of beams."""
    return lambda prompts=PROMPTS, **options: beam_search(
        model, prompts, **{"max_new_tokens": 9, "jit_compile": False, **options}
    )


def logprobs_by(config, params):
    """The reference's log-probabilities after a sequence; remembered, as many searches ask for the same."""

    @functools.cache
    def logprobs(ids):
        return reference.log_softmax(reference.forward(params, list(ids), n_head=config.n_head)[-1]).tolist()

    return logprobs


LOGPROBS = logprobs_by(CONFIG, flat_params(CONFIG))


def plain_search(
    prompt,
    *,
    num_beams=4,
    max_new_tokens=9,
    length_penalty=1.0,
    early_stopping=False,
    num_return_sequences=1,
    stop_ids=(),
    logprobs=LOGPROBS,
    n_ctx=CONFIG.n_ctx,
):
    """One prompt in lists: ``(ids, score, reason)`` of the best."""
    limit = min(max_new_tokens, n_ctx - len(prompt))
    beams, finished = [(0.0, ())], []
    for length in range(1, limit + 1):
        candidates = [
            (total + logprob, (*ids, token))
            for total, ids in beams
            for token, logprob in enumerate(logprobs((*prompt, *ids)))
        ]
        candidates.sort(key=lambda one: -one[0])
        ended = [one for one in candidates[:num_beams] if one[1][-1] in stop_ids or length == limit]
        finished += [(total / length**length_penalty, ids) for total, ids in ended]
        finished = sorted(finished, key=lambda one: -one[0])[:num_beams]
        beams = [one for one in candidates if one[1][-1] not in stop_ids][:num_beams]
        if not beams:
            break
        if len(finished) == num_beams:
            hoped = limit if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or beams[0][0] / hoped**length_penalty <= finished[-1][0]:
                break
    return [described(ids, score, stop_ids, max_new_tokens) for score, ids in finished[:num_return_sequences]]


def described(ids, score, stop_ids, max_new_tokens):
    if ids[-1] in stop_ids:
        return list(ids[:-1]), score, "stop"
    return list(ids), score, "length" if len(ids) == max_new_tokens else "context"


def assert_found(result, wanted):
    """Compares with one list of ``(ids, score, reason)`` per prompt."""
    assert result.ids == [[ids for ids, _, _ in best] for best in wanted]
    assert result.finish_reasons == [[reason for _, _, reason in best] for best in wanted]
    for scores, best in zip(result.scores, wanted, strict=True):
        assert scores == pytest.approx([score for _, score, _ in best], rel=1e-4, abs=1e-4)


def assert_same(result, other):
    assert (result.ids, result.finish_reasons) == (other.ids, other.finish_reasons)
    for one, two in zip(result.scores, other.scores, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)


# ---- the search itself


@pytest.mark.parametrize("stop_ids", STOP_IDS, ids=str)
@pytest.mark.parametrize("num_beams", [1, 2, 5, 16])
def test_sequences_and_scores_are_those_of_plain_python(num_beams, stop_ids, run):
    for length_penalty, early_stopping in itertools.product(PENALTIES, EARLY):
        options = {
            "num_beams": num_beams,
            "num_return_sequences": num_beams,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "stop_ids": stop_ids,
        }
        assert_found(run(**options), [plain_search(prompt, **options) for prompt in PROMPTS])


@pytest.mark.parametrize("penalty", [-0.1, -0.5, -1.0])
def test_never_with_a_negative_penalty(penalty):
    """Peaked logits: a likely beam overtakes unlikely sequences that ended early."""
    model, logprobs = make_model(CONFIG, scale=1.5), logprobs_by(CONFIG, flat_params(CONFIG, scale=1.5))
    for num_beams, stop_ids in itertools.product((4, 5), STOP_IDS[2:]):
        options = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 19}
        options |= {"length_penalty": penalty, "early_stopping": "never", "stop_ids": stop_ids}
        wanted = [plain_search(prompt, **options, logprobs=logprobs) for prompt in PROMPTS]
        assert_found(beam_search(model, PROMPTS, **options, jit_compile=False), wanted)


@pytest.mark.parametrize("seed", range(20))
def test_any_settings_on_any_prompts(seed, run):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 13, rng.integers(1, 17)).tolist() for _ in range(3)]
    options = {
        "num_beams": 5,
        "num_return_sequences": int(rng.integers(1, 6)),
        "max_new_tokens": int(rng.integers(1, 20)),
        "length_penalty": float(rng.uniform(-2, 3)),
        "early_stopping": EARLY[rng.integers(3)],
        "stop_ids": rng.integers(0, 13, rng.integers(0, 5)).tolist(),
    }
    assert_found(run(prompts, **options), [plain_search(prompt, **options) for prompt in prompts])


def test_the_settings_make_a_difference():
    """Or the tests above prove little."""

    def found(**options):
        options = {"num_beams": 5, "num_return_sequences": 5, "stop_ids": [3], **options}
        return [plain_search(prompt, **options) for prompt in PROMPTS]

    assert {reason for best in found() for _, _, reason in best} == {"stop", "length"}
    by_early = [
        [found(num_beams=k, num_return_sequences=k, length_penalty=2.0, early_stopping=early) for k in (2, 5, 16)]
        for early in EARLY
    ]
    assert all(one != other for one, other in itertools.combinations(by_early, 2))
    by_penalty = [str([[ids for ids, _, _ in best] for best in found(length_penalty=p)]) for p in PENALTIES]
    assert len(set(by_penalty)) >= 3


@pytest.mark.parametrize("stop_ids", [[], [2], [2, 0]], ids=str)
def test_beams_enough_for_all_sequences_find_them_all(stop_ids):
    config = GPT2Config(n_vocab=4, n_ctx=6, n_embd=6, n_head=2, n_layer=1)
    model, logprobs, limit = make_model(config), logprobs_by(config, flat_params(config)), 3
    prompt = (3, 1)
    sequences = []
    for length in range(1, limit + 1):
        for ids in itertools.product(range(4), repeat=length):
            if not set(ids[:-1]) & set(stop_ids) and (ids[-1] in stop_ids or length == limit):
                total = sum(logprobs(prompt + ids[:i])[ids[i]] for i in range(length))
                sequences.append((total, ids))
    assert len(sequences) == {0: 64, 1: 40, 2: 22}[len(stop_ids)]
    for penalty in PENALTIES:
        scored = sorted(((total / len(ids) ** penalty, ids) for total, ids in sequences), key=lambda one: -one[0])
        result = beam_search(
            model,
            [prompt],
            num_beams=64,
            num_return_sequences=64,
            max_new_tokens=limit,
            length_penalty=penalty,
            stop_ids=stop_ids,
            jit_compile=False,
        )
        assert_found(result, [[described(ids, score, stop_ids, limit) for score, ids in scored]])


def test_a_search_can_find_what_greedy_does_not(run, model):
    greedy = generate(model, PROMPTS, max_new_tokens=9, jit_compile=False)
    best = run(num_beams=16, length_penalty=0.0)
    gains = [best.scores[row][0] - sum(greedy.logprobs[row]) for row in range(3)]
    assert max(gains) > 0.1


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("stop_ids", STOP_IDS, ids=str)
def test_one_beam_is_greedy(stop_ids, early_stopping, run, model):
    greedy = generate(model, PROMPTS, max_new_tokens=9, stop_ids=stop_ids, jit_compile=False)
    for penalty in PENALTIES:
        result = run(num_beams=1, stop_ids=stop_ids, length_penalty=penalty, early_stopping=early_stopping)
        assert result.ids == [[ids] for ids in greedy.ids]
        assert result.finish_reasons == [[reason] for reason in greedy.finish_reasons]
        for row, reason in enumerate(greedy.finish_reasons):
            if reason != "stop":  # generate does not tell the stop id's logprob
                logprobs = greedy.logprobs[row]
                assert result.scores[row] == pytest.approx([sum(logprobs) / len(logprobs) ** penalty], rel=1e-4)


# ---- rows, XLA, the cache


OPTIONS = {"num_beams": 4, "num_return_sequences": 4, "stop_ids": [3, 10]}


@pytest.mark.parametrize("early_stopping", EARLY)
def test_a_prompt_in_a_batch_equals_that_prompt_alone(early_stopping, run):
    options = {**OPTIONS, "early_stopping": early_stopping}
    together = run(**options)
    for row, prompt in enumerate(PROMPTS):
        alone = BeamSearchResult(*([part[row]] for part in dataclasses.astuple(together)))
        assert_same(run([prompt], **options), alone)
    assert run(PROMPTS[::-1], **options).ids == together.ids[::-1]


@pytest.mark.parametrize("early_stopping", EARLY)
def test_xla_gives_what_plain_python_gives(early_stopping, run):
    for penalty in (0.0, 1.0):
        options = {**OPTIONS, "early_stopping": early_stopping, "length_penalty": penalty}
        assert_found(run(**options, jit_compile=True), [plain_search(prompt, **options) for prompt in PROMPTS])


def test_8_bit_weights():
    model = make_model(CONFIG, quantization="int8")
    logprobs = logprobs_by(CONFIG, model.get_params())
    result = beam_search(model, PROMPTS, **OPTIONS, max_new_tokens=9, jit_compile=False)
    assert_found(result, [plain_search(prompt, **OPTIONS, logprobs=logprobs) for prompt in PROMPTS])


def test_a_growing_cache_changes_nothing(monkeypatch):
    """The shortest prompt alone begins with 3 places, all three begin with 12."""
    model = make_model(CONFIG)
    options = {**OPTIONS, "max_new_tokens": 19, "early_stopping": "never", "length_penalty": 2.0}
    wanted = [plain_search(prompt, **options) for prompt in PROMPTS]
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_BUCKET", 3)
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_GROWING", 3)
    monkeypatch.setattr("tf_gpt2.generation.loop.GROWTH", 2)
    compiled_for.cache_clear()
    for prompts, n_traces in ((PROMPTS[:1], 1 + len([6, 12, 20])), (PROMPTS, 6)):
        result = beam_search(model, prompts, **options, jit_compile=False)
        assert_found(result, wanted[: len(prompts)])
        assert count_traces(model, prefill, decode) == n_traces


def test_knobs_compile_nothing(model, run):
    run(**OPTIONS)
    n_traces = count_traces(model, prefill, decode)
    for options in (
        {"length_penalty": -3},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 0.3},
        {"num_return_sequences": 1},
        {"stop_ids": []},
        {"stop_ids": range(8)},
        {"max_new_tokens": 1},
        {"max_new_tokens": 7},
        {"prompts": [[1] * 16, [2], [3, 4]]},
    ):
        run(**{**OPTIONS, **options})
    assert count_traces(model, prefill, decode) == n_traces
    run(**{**OPTIONS, "num_beams": 6})
    assert count_traces(model, prefill, decode) == n_traces + 2


def test_a_model_that_was_searched_can_be_freed():
    model = make_model(GPT2Config(n_vocab=5, n_ctx=4, n_embd=2, n_head=1, n_layer=1))
    beam_search(model, [[1]], jit_compile=False)
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


# ---- ends


def test_sequences_end_where_the_window_ends(run):
    prompts = [[5], [1] * 19, [2] * 18]
    for max_new_tokens in (12, 19, 20, 10**6, 2**64):
        result = run(prompts, num_beams=2, num_return_sequences=2, max_new_tokens=max_new_tokens)
        wanted = [plain_search(p, num_beams=2, num_return_sequences=2, max_new_tokens=max_new_tokens) for p in prompts]
        assert_found(result, wanted)
        assert result.finish_reasons[0] == ["length" if max_new_tokens <= 19 else "context"] * 2
        assert [len(ids) for ids in result.ids[1] + result.ids[2]] == [1, 1, 2, 2]
        assert result.finish_reasons[1:] == [["context"] * 2] * 2


def test_a_full_window_that_was_asked_for_is_a_length(run):
    assert run([[1] * 19], max_new_tokens=1).finish_reasons == [["length"]]


@pytest.mark.parametrize("num_beams", [1, 3, 16])
def test_where_all_ids_stop_each_is_a_sequence(num_beams, run):
    result = run([[5]], num_beams=num_beams, num_return_sequences=num_beams, stop_ids=range(13))
    n_found = min(num_beams, 13)
    assert result.ids == [[[]] * n_found]
    assert result.finish_reasons == [["stop"] * n_found]
    assert result.scores[0] == pytest.approx(sorted(LOGPROBS((5,)), reverse=True)[:n_found], abs=1e-4)


def test_no_more_sequences_than_there_are(run):
    result = run(num_beams=16, num_return_sequences=16, max_new_tokens=1)
    assert [sorted(best) for best in result.ids] == [[[i] for i in range(13)]] * 3
    assert np.isfinite(result.scores).all()


def test_a_stop_id_in_the_prompt_does_not_stop(run):
    prompt, stop_ids = [3, 5, 3], [3]
    assert_found(run([prompt], stop_ids=stop_ids), [plain_search(prompt, stop_ids=stop_ids)])


def test_smallest_models():
    config = GPT2Config(n_vocab=1, n_ctx=2, n_embd=1, n_head=1, n_layer=1)
    model = GPT2Model(config)
    for jit_compile in (False, True):
        result = beam_search(model, [[0]], num_beams=3, num_return_sequences=3, jit_compile=jit_compile)
        assert result == BeamSearchResult([[[0]]], [[pytest.approx(0)]], [["context"]])


@pytest.mark.parametrize("penalty", [-10, 10, np.float32(-9.5), np.int64(7)])
def test_extreme_penalties(penalty, run):
    options = {**OPTIONS, "length_penalty": penalty}
    result = run(**options)
    assert np.isfinite(result.scores).all()
    wanted = [plain_search(prompt, **{**options, "length_penalty": float(penalty)}) for prompt in PROMPTS]
    assert result.ids == [[ids for ids, _, _ in best] for best in wanted]


def test_the_result_is_plain_python_and_sorted(run):
    result = run(**{name: np.int64(2) for name in ("num_beams", "num_return_sequences", "max_new_tokens")})
    assert json.loads(json.dumps(dataclasses.asdict(result)))["ids"] == result.ids
    assert [type(x) for x in (result.ids[0][0][0], result.scores[0][0])] == [int, float]
    for best, scores in zip(result.ids, result.scores, strict=True):
        assert len(set(map(tuple, best))) == 2
        assert scores == sorted(scores, reverse=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.ids = []


# ---- what is refused


def test_a_prompt_that_fills_the_window_is_refused(run):
    with pytest.raises(ContextLengthError, match=r"prompts\[1\] has 20 tokens.*n_ctx=20"):
        run([[1], [2] * 20])


def test_more_sequences_than_beams_are_refused_with_both_numbers(run):
    with pytest.raises(ValueError, match="num_return_sequences must be at most num_beams=3, got 4; raise num_beams"):
        run(num_beams=3, num_return_sequences=4)


WRONG = {
    "num_beams": [0, -1, 1.5, 2.0, None, "3", True, [4]],
    "max_new_tokens": [0, -1, 1.5, None, "3", True, [1]],
    "num_return_sequences": [0, -1, 1.5, None, "1", True, 5],
    "length_penalty": [math.nan, math.inf, -math.inf, 10.1, -11, None, "1", True, 1j, [1.0], [[1.0]]],
    "early_stopping": [None, "always", "True", "", 1, 0, 1.0, ["never"], "Never"],
    "stop_ids": [5, None, [1.5], [13], [-1], "5"],
    "prompts": [[], "text", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_argument_is_named_with_its_value(name, value, run):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must ") as caught:
        run(**{name: value})
    assert repr(value) in str(caught.value)
