"""Answers equal what a direct call gives, whatever the neighbours, the order and the size of batches."""

import math
import random

import numpy as np
import pytest

from tf_gpt2.jobs import answers
from tf_gpt2.jobs.kinds import Generate
from tf_gpt2.jobs.records import seed_of
from tf_gpt2.reference import as_float64, block, layer_norm

TEXTS = ["To be", "O", "My lord, what news?", "KING HENRY:\nOnce more unto", "Never, never, never", "é", "A horse! A"]


def records_of(texts):
    return [{"id": f"r{i}", "text": text} for i, text in enumerate(texts)]


def without_numbers(found):
    return [{name: value for name, value in one.items() if name != "logprob"} for one in found]


@pytest.fixture(scope="module")
def drawn(generator):
    return list(answers.generate(generator, records_of(TEXTS), temperature=0.9, seed=3, max_new_tokens=9, batch_size=4))


def test_generated_texts_are_those_of_a_direct_call_with_the_records_seed(generator, drawn):
    for i, (text, found) in enumerate(zip(TEXTS, drawn, strict=True)):
        expected = generator.complete(text, temperature=0.9, seed=seed_of(3, f"r{i}"), max_new_tokens=9)
        assert found["id"] == f"r{i}"
        assert (found["text"], found["ids"]) == (expected.text, expected.ids)
        assert (found["finish_reason"], found["error"]) == (expected.finish_reason, None)
        np.testing.assert_allclose(found["logprob"], sum(expected.logprobs), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_neighbours_order_and_batches_change_no_text(generator, drawn, batch_size):
    shuffled = [*records_of(TEXTS), {"id": "bad", "text": ""}, {"id": "long", "text": "x" * 3000}]
    random.Random(0).shuffle(shuffled)
    options = {"temperature": 0.9, "seed": 3, "max_new_tokens": 9, "batch_size": batch_size}
    found = {one["id"]: one for one in answers.generate(generator, shuffled, **options)}
    assert without_numbers(found[one["id"]] for one in drawn) == without_numbers(drawn)
    assert found["bad"]["error"]["code"] == "empty_text"
    assert found["long"]["error"]["code"] == "context_length_exceeded"


def test_a_records_own_options_are_those_of_a_direct_call(generator):
    options = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 0},
        {"temperature": 1.5, "seed": 5, "top_k": 9},
        {"stop": "e"},
        {"stop": ["\n", " "], "max_new_tokens": 4},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_p": 0.5, "min_p": 0.01, "typical_p": 0.9},
        {"presence_penalty": 1, "frequency_penalty": 0.5, "min_new_tokens": 2, "max_new_tokens": 12},
    ]
    records = [{"id": i, "text": "To be", **own} for i, own in enumerate(options)]
    for own, found in zip(options, answers.generate(generator, records, max_new_tokens=8, batch_size=4), strict=True):
        expected = generator.complete("To be", **{"max_new_tokens": 8, **own})
        names = ("text", "ids", "finish_reason")
        assert [found[name] for name in names] == [getattr(expected, name) for name in names], own


def test_a_longer_neighbour_does_not_change_why_a_text_ends(generator):
    """The direct call for one token less than it takes to meet the stop, for as many, and for more."""
    text = generator.generate("To be", max_new_tokens=12)
    stop = text[5:8]
    records = [{"id": n, "text": "To be", "max_new_tokens": n, "stop": stop} for n in range(13)]
    for n, found in enumerate(answers.generate(generator, records, batch_size=4)):
        expected = generator.complete("To be", max_new_tokens=n, stop=stop)
        assert (found["text"], found["finish_reason"]) == (expected.text, expected.finish_reason), n
    assert {one["finish_reason"] for one in answers.generate(generator, records)} == {"length", "stop"}


@pytest.mark.parametrize("overflow", ["error", "truncate", "slide"])
def test_a_long_text_is_treated_as_a_direct_call_does(generator, overflow):
    long = "To be, or not to be. " * 30
    nearly = generator.encoder.decode(generator.encoder.encode(long)[:250])
    records = [
        {"id": 0, "text": long},
        {"id": 1, "text": nearly, "max_new_tokens": 12},
        {"id": 2, "text": nearly, "max_new_tokens": 4},
    ]
    found = list(answers.generate(generator, records, overflow=overflow, max_new_tokens=5, batch_size=4))
    for record, one in zip(records, found, strict=True):
        if overflow == "error" and record["id"] == 0:
            assert one["error"]["code"] == "context_length_exceeded"
            continue
        n = record.get("max_new_tokens", 5)
        expected = generator.complete(record["text"], overflow=overflow, max_new_tokens=n)
        assert (one["text"], one["finish_reason"]) == (expected.text, expected.finish_reason)


@pytest.mark.parametrize(
    ("own", "code", "words"),
    [
        ({"topk": 3}, "unknown_option", "'top_k'"),
        ({"stop_at_end_of_text": False}, "unknown_option", "stop_at_end_of_text"),
        ({"top_p": 2}, "invalid_option", "top_p"),
        ({"top_k": [3]}, "invalid_option", "top_k"),
        ({"temperature": "hot"}, "invalid_option", "temperature"),
        ({"max_new_tokens": -1}, "invalid_option", "max_new_tokens"),
        ({"seed": 2**64}, "invalid_option", "seed"),
        ({"stop": ""}, "invalid_option", "stop"),
        ({"text": 5}, "invalid_type", "text"),
    ],
)
def test_a_bad_record_is_answered_in_its_place_and_disturbs_nobody(generator, own, code, words):
    records = [{"id": 0, "text": "To be"}, {"id": 1, "text": "To be", **own}, {"id": 2, "text": "To be"}]
    one, bad, two = answers.generate(generator, records, max_new_tokens=2, batch_size=4)
    assert bad["id"] == 1
    assert bad["error"]["code"] == code
    assert words in bad["error"]["message"]
    assert bad["text"] is bad["ids"] is None
    assert one["text"] == two["text"] == generator.generate("To be", max_new_tokens=2)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"overflow": "wrap"}, {"max_new_tokens": -1}, {"stop": [""]}]
)
def test_a_wrong_option_of_the_job_is_an_error_at_once(generator, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        answers.generate(generator, [], **options)
    with pytest.raises(TypeError, match="tempe"):
        Generate(tempe=1)


def test_records_are_read_as_answers_are_asked_for(generator):
    n_read = 0

    def endless():
        nonlocal n_read
        while True:
            n_read += 1
            yield {"id": n_read, "text": ""}

    found = answers.generate(generator, endless())
    assert next(found)["id"] == 1
    assert n_read == answers.RECORDS_PER_WINDOW


def test_scores_are_those_of_a_direct_call(generator):
    for after in (True, False):
        found = list(answers.score(generator, records_of(TEXTS), after_end_of_text=after))
        for text, one in zip(TEXTS, found, strict=True):
            expected = generator.score(text, after_end_of_text=after)
            assert one["ids"] == expected.ids
            logprobs = [math.nan if x is None else x for x in one["logprobs"]]
            np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-4)
            np.testing.assert_allclose(one["logprob"], expected.total, atol=1e-4)
    too_long, unknown = answers.score(generator, [{"text": "x" * 3000}, {"text": "x", "top_k": 1}])
    assert too_long["error"]["code"] == "context_length_exceeded"
    assert unknown["error"]["code"] == "unknown_option"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_reference_models_hidden_states(generator, pooling):
    params, n_head = generator.model.get_params(), generator.model.config.n_head
    for text, one in zip(TEXTS, answers.embed(generator, records_of(TEXTS), pooling=pooling), strict=True):
        ids = generator.encoder.encode(text)
        hidden = as_float64(params["wte"])[ids] + as_float64(params["wpe"])[: len(ids)]
        for weights in params["blocks"]:
            hidden = block(hidden, weights, n_head)
        hidden = layer_norm(hidden, params["ln_f"])
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert one["n_tokens"] == len(ids)
        np.testing.assert_allclose(one["embedding"], expected, atol=2e-4)
    with pytest.raises(ValueError, match="pooling"):
        answers.embed(generator, [], pooling="max")


def test_perplexities_are_those_of_a_direct_call(generator):
    texts = [*TEXTS[2:5], "To be, or not to be. " * 40]
    records = [{"id": i, "text": text, **({"stride": 100} if i % 2 else {})} for i, text in enumerate(texts)]
    found = list(answers.perplexity(generator, [*records, {"id": 9, "text": "O"}, {"id": 8, "text": "x", "stride": 0}]))
    for record, one in zip(records, found[:-2], strict=True):
        expected = generator.perplexity(record["text"], stride=record.get("stride"))
        names = ("n_tokens", "n_scored", "n_words", "n_bytes")
        assert [one[name] for name in names] == [getattr(expected, name) for name in names]
        measured = [one[name] for name in ("nll", "perplexity", "perplexity_per_word", "bits_per_byte")]
        wanted = [expected.nll, expected.per_token, expected.per_word, expected.bits_per_byte]
        np.testing.assert_allclose(measured, wanted, rtol=1e-4)
    assert [one["error"]["code"] for one in found[-2:]] == ["too_short", "invalid_option"]
