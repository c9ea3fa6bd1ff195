"""What the served functions give, against ``TextGenerator`` and ``GPT2Model``; and what they answer to bad input."""

import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings, strategies as st
from reference import lively_params

from tf_gpt2 import Encoder, GPT2Config, GPT2Model, TextGenerator, generate
from tf_gpt2.serving.graph_loop import power_of_two
from tf_gpt2.serving.prompts import PromptReader
from tf_gpt2.serving.signatures import MOST_IDS, MOST_LOGITS, ServedFunctions
from tf_gpt2.serving.text import unfinished
from tf_gpt2.tokenizer.encoder import bytes_to_unicode

HERE = Path(__file__).parent
PROMPTS = ["To be", "", "ROMEO:\nWhat light through yonder", "é€😀"]
WILD = {
    "temperature": [1.0, 0.7, 1.5, 0.9],
    "top_k": [0, 5, 40, 0],
    "top_p": [1.0, 0.9, 1.0, 0.5],
    "seed": [1, 2, 3, 2**40],
}
PENALTIES = {"repetition_penalty": [1.3], "presence_penalty": [0.5], "frequency_penalty": [-0.3]}
RULES = {"no_repeat_ngram_size": [2], "min_new_tokens": [5], "min_p": [0.01], "typical_p": [0.9]}
DTYPES = {"seed": tf.int64, "top_k": tf.int32, "no_repeat_ngram_size": tf.int32, "min_new_tokens": tf.int32}
DTYPES |= {"max_new_tokens": tf.int32, "n_tokens": tf.int32}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "xla"])
def served(request, generator):
    functions = signatures_of(generator, max_new_tokens=10, xla=request.param)
    return lambda name, **inputs: call(functions[name + "_xla" * request.param], **inputs)


@pytest.fixture(scope="module")
def plain(generator):
    functions = signatures_of(generator, max_new_tokens=10, xla=False)
    return lambda name, **inputs: call(functions[name], **inputs)


@pytest.fixture(scope="module", params=[None, "int8"])
def toy(request):
    """Random weights, a vocabulary without an end of text, 40 positions."""
    vocabulary = {symbol: i for i, symbol in enumerate(bytes_to_unicode().values())} | {"hi": 256, "Ġhi": 257}
    encoder = Encoder(vocabulary, [("h", "i"), ("Ġ", "hi")])
    config = GPT2Config(n_vocab=258, n_ctx=40, n_embd=12, n_head=3, n_layer=2)
    model = GPT2Model(config, quantization=request.param)
    model.set_weights(lively_params(config))
    return TextGenerator(model, encoder)


def signatures_of(generator, **options):
    reader = PromptReader(generator.encoder, generator.model.config.n_ctx)
    return ServedFunctions(generator, reader, **options).signatures()


def call(function, **inputs):
    tensors = {name: tf.constant(value, DTYPES.get(name)) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in function(**tensors).items()}


def texts(outputs):
    return [text.decode() for text in outputs["text"]]


def rows(ids, lengths):
    return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]


def test_text_alone_is_continued_greedily(served, generator):
    assert texts(served("serving_default", text=PROMPTS)) == generator.generate(
        PROMPTS, max_new_tokens=10, jit_compile=False
    )


@pytest.mark.parametrize("options", [{}, WILD, WILD | PENALTIES, PENALTIES | RULES, WILD | RULES])
def test_options_do_what_they_do_in_python(options, served, generator):
    found = served("generate", text=PROMPTS, max_new_tokens=[9], **options)
    spread = {name: values * (4 // len(values)) for name, values in options.items()}
    wanted = generator.complete(PROMPTS, max_new_tokens=9, **spread, jit_compile=False)
    assert texts(found) == [one.text for one in wanted]
    assert rows(found["ids"], found["completion_length"]) == [one.ids for one in wanted]
    assert [reason.decode() for reason in found["finish_reason"]] == [one.finish_reason for one in wanted]
    assert found["prompt_length"].tolist() == [len(generator.encode_prompt(text)) for text in PROMPTS]
    for row, one in zip(found["logprobs"], wanted, strict=True):
        np.testing.assert_allclose(row[: len(one.ids)], one.logprobs, atol=2e-4)
        assert not row[len(one.ids) :].any()


def test_each_row_has_its_own_number_of_tokens(plain, generator):
    numbers = [0, 1, 12, 300]
    found = plain("generate", text=PROMPTS, max_new_tokens=numbers)
    wanted = [
        generator.complete(text, max_new_tokens=n, jit_compile=False) for text, n in zip(PROMPTS, numbers, strict=True)
    ]
    assert rows(found["ids"], found["completion_length"]) == [one.ids for one in wanted]
    assert [reason.decode() for reason in found["finish_reason"]] == [one.finish_reason for one in wanted]
    assert "context" in {one.finish_reason for one in wanted}


def test_ids_are_continued(served, generator):
    prompts = [[5, 6, 7], [8], [9, 10]]
    padded = [[5, 6, 7, 99], [8, 99, 99, 99], [9, 10, 99, 99]]
    found = served("generate_ids", ids=padded, lengths=[3, 1, 2], temperature=[1.0], seed=[4, 5, 6], max_new_tokens=[7])
    end = generator.stop_ids(True)
    wanted = generate(
        generator.model, prompts, max_new_tokens=7, temperature=1.0, seed=[4, 5, 6], stop_ids=end, jit_compile=False
    )
    assert rows(found["ids"], found["completion_length"]) == wanted.ids


def test_the_end_of_text_stops(generator):
    """A model that says little else."""
    model = GPT2Model(generator.model.config)
    params = lively_params(model.config)
    params["ln_f"]["b"] = 30 * params["wte"][generator.encoder.end_of_text]
    params["ln_f"]["g"][:] = 0
    model.set_weights(params)
    functions = signatures_of(TextGenerator(model, generator.encoder), max_new_tokens=10, xla=False)
    found = call(functions["generate"], text=["To be", "or"], min_new_tokens=[0, 3])
    assert found["finish_reason"].tolist() == [b"stop", b"stop"]
    assert found["completion_length"].tolist() == [0, 3]


@pytest.mark.parametrize("options", [{}, WILD | PENALTIES])
def test_chunks_joined_are_the_whole(options, served):
    whole = served("generate", text=PROMPTS, max_new_tokens=[13], **options)
    state, before = {"ids": [[0]] * 4, "lengths": [0] * 4}, [""] * 4
    for n_tokens in (1, 2, 4, 8):
        found = served("next", text=PROMPTS, max_new_tokens=[13], n_tokens=[n_tokens], **state, **options)
        assert all(now.startswith(then) for now, then in zip(texts(found), before, strict=True))
        before, state = texts(found), {name: found[name] for name in ("ids", "lengths")}
        is_last = n_tokens == 8
        assert all((reason != b"") == is_last for reason in found["finish_reason"])
    assert rows(found["ids"], found["lengths"]) == rows(whole["ids"], whole["completion_length"])
    assert texts(found) == texts(whole)
    assert found["finish_reason"].tolist() == whole["finish_reason"].tolist()
    again = served("next", text=PROMPTS, max_new_tokens=[13], n_tokens=[5], **state, **options)
    assert again["finish_reason"].tolist() == whole["finish_reason"].tolist()
    assert texts(again) == texts(whole)


def test_no_half_character_is_given(plain, generator):
    """The continuation is cut inside a character of several tokens."""
    text = "naïve 😀 héé"
    ids = generator.encoder.encode(text)
    for n in range(len(ids)):
        found = plain("next", text=["To"], ids=[ids], lengths=[n], n_tokens=[1], max_new_tokens=[50])
        said = generator.encoder.decode(found["ids"][0][: found["lengths"][0]].tolist())
        certain = texts(found)[0]
        assert said.startswith(certain)
        assert not certain.endswith("�") or said.rstrip("�") != certain.rstrip("�") or len(certain) < len(said)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12))
def test_what_is_held_back_may_become_a_character(encoded):
    n_held = int(unfinished(tf.constant([encoded]))[0])
    assert 0 <= n_held <= 3
    certain = encoded[: len(encoded) - n_held].decode(errors="replace")
    for more in (b"", b"a", b"\x80", b"\x80\x80\x80", "é".encode()):
        assert (encoded + more).decode(errors="replace").startswith(certain)


def test_only_half_characters_are_held_back():
    whole = ["", "a", "é", "€", "😀", "a\u00e9"]
    assert unfinished(tf.constant([text.encode() for text in whole])).numpy().tolist() == [0] * 6
    parts = [
        "é".encode()[:1],
        "€".encode()[:1],
        "€".encode()[:2],
        *("😀".encode()[:n] for n in (1, 2, 3)),
        b"\x80",
        b"\xff",
    ]
    assert unfinished(tf.constant(parts)).numpy().tolist() == [1, 1, 2, 1, 2, 3, 0, 0]
    assert unfinished(tf.constant([b"abc" + part for part in parts])).numpy().tolist() == [1, 1, 2, 1, 2, 3, 0, 0]


def test_scores(served, generator):
    found = served("score", text=PROMPTS)
    wanted = generator.score(PROMPTS)
    assert rows(found["ids"], found["lengths"]) == [one.ids for one in wanted]
    for row, one in zip(found["logprobs"], wanted, strict=True):
        np.testing.assert_allclose(row[: len(one.ids)], one.logprobs, atol=1e-4)
        assert not row[len(one.ids) :].any()
    np.testing.assert_allclose(found["total"], [one.total for one in wanted], atol=1e-3)
    assert found["error"].tolist() == [b""] * 4


def test_many_positions_are_scored_in_pieces(plain, generator):
    text = "All the world's a stage, and all the men and women merely players. " * 7
    found = plain("score", text=[text, "To be", text[:300]])
    wanted = generator.score([text, "To be", text[:300]])
    np.testing.assert_allclose(found["total"], [one.total for one in wanted], rtol=1e-5)


def test_embeddings(served, generator):
    found = served("embed", text=PROMPTS)
    for i, text in enumerate(PROMPTS):
        hidden = generator.model.hidden_states(tf.constant([generator.encode_prompt(text)]))[0]
        np.testing.assert_allclose(found["mean"][i], tf.reduce_mean(hidden, axis=0), atol=1e-4)
        np.testing.assert_allclose(found["last"][i], hidden[-1], atol=1e-4)


def test_logits(served, generator):
    ids = np.array([[1, 2, 3, 4, 5], [6, 7, 99999, -1, 0]], np.int32)
    found = served("logits", ids=ids, lengths=[5, 2])["logits"]
    np.testing.assert_allclose(found[0], generator.model(ids[:1])[0], atol=1e-4)
    np.testing.assert_allclose(found[1, :2], generator.model(ids[1:, :2])[0], atol=1e-4)
    assert not found[1, 2:].any()


def test_tokens(plain, generator):
    found = plain("encode", text=PROMPTS)
    assert rows(found["ids"], found["lengths"]) == [generator.encoder.encode(text) for text in PROMPTS]
    assert texts(plain("decode", ids=found["ids"], lengths=found["lengths"])) == PROMPTS


def test_ids_that_there_are_not_are_decoded_too(plain, generator):
    text = generator.encoder.decode
    found = plain("decode", ids=[[1, 99999, 2, -1], [3, 4, 5, 6], [-(2**31), 7, 2**31 - 1, 8]], lengths=[3, 0, 4])
    assert texts(found) == [text([1]) + "�" + text([2]), "", "�" + text([7]) + "�" + text([8])]
    assert texts(plain("decode", ids=[[1, 2], [3, 4]], lengths=[-1, 9])) == ["", text([3, 4])]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be in (0, 1]"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"typical_p": -0.1}, "typical_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": 101.0}, "frequency_penalty"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_one_rows_mistake_is_its_own(options, sentence, served):
    neutral = {"temperature": 0.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 10}
    given = {name: [neutral.get(name, 0), value, neutral.get(name, 0)] for name, value in options.items()}
    found = served("generate", text=["To be", "or not", "to"], **given)
    alone = served("generate", text=["To be", "or not", "to"])
    assert found["finish_reason"][1].decode().startswith("error: ")
    assert sentence in found["finish_reason"][1].decode()
    assert (found["text"][1], found["completion_length"][1]) == (b"", 0)
    for name in ("text", "completion_length", "finish_reason"):
        assert found[name][[0, 2]].tolist() == alone[name][[0, 2]].tolist()


def test_unusual_values_that_are_right(plain):
    found = plain("generate", text=["To be"], top_k=[2**31 - 1], min_new_tokens=[2**31 - 1], temperature=[3e38])
    assert found["finish_reason"].tolist() == [b"length"]
    huge = plain("generate", text=["To be"], max_new_tokens=[2**31 - 1], no_repeat_ngram_size=[2**31 - 1])
    assert huge["finish_reason"][0] in (b"context", b"stop")


def test_texts_too_long(plain, generator):
    long, n_ctx = "To be, or not to be. " * 150, generator.model.config.n_ctx
    n_tokens = len(generator.encoder.encode(long))
    found = plain("generate", text=["To be", long, "x" * 10**6])
    assert found["finish_reason"][1].decode() == (
        f"error: text has {n_tokens} tokens, at most {n_ctx - 1} are possible; shorten it"
    )
    assert found["finish_reason"][2].startswith(b"error: text has too many tokens")
    assert texts(found)[0] == generator.generate("To be", max_new_tokens=10, jit_compile=False)
    kept = generator.encoder.decode(generator.encoder.encode(long)[-(n_ctx - 10) :])
    assert texts(plain("serving_default", text=["To be", long])) == generator.generate(
        ["To be", kept], max_new_tokens=10, jit_compile=False
    )
    scored = plain("score", text=["To be", long])
    assert scored["total"][1] == 0  # NaN would be no JSON, for the other rows neither
    assert scored["total"][0] == pytest.approx(generator.score("To be").total, rel=1e-5)
    assert scored["error"][1].startswith(b"text has ")
    embedded = plain("embed", text=["To be", long])
    for name in ("mean", "last"):
        assert not embedded[name][1].any()
        assert np.abs(embedded[name][0]).min() > 0
    exact = generator.encoder.decode(generator.encoder.encode(long)[: n_ctx - 1])
    assert plain("generate", text=[exact])["finish_reason"].tolist() == [b"context"]
    assert plain("generate", text=[exact])["completion_length"].tolist() == [1]


def test_ids_that_are_wrong(plain, generator):
    n_vocab, n_ctx = generator.model.config.n_vocab, generator.model.config.n_ctx
    ids = [[1, 2, 3], [1, n_vocab, 3], [1, 2, 3], [1, -1, 3], [1, 2, 3]]
    found = plain("generate_ids", ids=ids, lengths=[3, 2, 0, 3, 4], max_new_tokens=[4])
    wanted = generate(
        generator.model, [[1, 2, 3]], max_new_tokens=4, stop_ids=generator.stop_ids(True), jit_compile=False
    )
    assert rows(found["ids"], found["completion_length"]) == [wanted.ids[0], [], [], [], []]
    reasons = [reason.decode() for reason in found["finish_reason"]]
    assert reasons[0] == "length"
    assert reasons[1] == reasons[3] == f"error: ids must lie in [0, {n_vocab})"
    assert reasons[2] == "error: lengths must lie in [1, 3], got 0"
    assert reasons[4] == "error: lengths must lie in [1, 3], got 4"
    full = plain("generate_ids", ids=[[1] * n_ctx], lengths=[n_ctx])
    assert full["finish_reason"][0].startswith(b"error: lengths")
    logits = plain("logits", ids=ids, lengths=[3, 2, 0, 3, 4])
    assert [bool(row.any()) for row in logits["logits"]] == [True, False, False, False, False]
    assert np.isfinite(logits["logits"]).all()
    assert [bool(error) for error in logits["error"]] == [False, True, False, True, True]
    said = plain("next", text=["To be"] * 3, ids=[[1, 2], [1, n_vocab], [1, 2]], lengths=[1, 2, 3])
    assert [reason.startswith(b"error") for reason in said["finish_reason"]] == [False, True, True]


def test_text_and_ids_longer_than_the_window(served, generator):
    n_ctx = generator.model.config.n_ctx
    state = {"ids": [[5] * n_ctx] * 3, "lengths": [n_ctx, n_ctx - 2, 3]}
    found = served("next", text=["To be"] * 3, max_new_tokens=[n_ctx], n_tokens=[2], **state)
    reasons = [reason.decode() for reason in found["finish_reason"]]
    assert reasons == [f"error: text and ids have {n_ctx + 2} tokens, at most {n_ctx} are possible", "context", ""]
    assert found["lengths"].tolist() == [0, n_ctx - 2, 5]
    alone = served("next", text=["To be"], ids=[[5] * 3], lengths=[3], max_new_tokens=[n_ctx], n_tokens=[2])
    assert found["ids"][2, :5].tolist() == alone["ids"][0].tolist()


@pytest.mark.parametrize("name", ["serving_default", "generate", "score", "embed"])
def test_no_rows(name, served):
    found = served(name, text=np.array([], object))
    assert {value.shape[0] for value in found.values()} == {0}


def test_no_rows_of_ids(served):
    ids, lengths = np.zeros((0, 3), np.int32), np.zeros(0, np.int32)
    assert served("generate_ids", ids=ids, lengths=lengths)["ids"].shape[0] == 0
    assert served("logits", ids=ids, lengths=lengths)["logits"].shape == (0, 3, 1024)
    nothing = np.array([], object)
    assert served("next", text=nothing, ids=ids, lengths=lengths)["ids"].shape[0] == 0


def test_64_rows_of_different_lengths_are_what_they_are_alone(plain, generator):
    text = "Friends, Romans, countrymen, lend me your ears; I come to bury Caesar, not to praise him. "
    prompts = [text[: 1 + i] for i in range(64)]
    found = plain("generate", text=prompts, max_new_tokens=[6])
    assert texts(found) == generator.generate(prompts, max_new_tokens=6, jit_compile=False)


def test_vectors_of_another_length_fail_the_request(plain):
    with pytest.raises(tf.errors.InvalidArgumentError, match="temperature must have one value, or one per row"):
        plain("generate", text=["a", "b", "c"], temperature=[0.5, 0.6])
    with pytest.raises(tf.errors.InvalidArgumentError, match="lengths must have one value per row"):
        plain("generate_ids", ids=[[1, 2], [3, 4]], lengths=[1])


def test_requests_that_would_not_fit_the_memory_fail(plain, generator):
    n_ctx, n_vocab = generator.model.config.n_ctx, generator.model.config.n_vocab
    with pytest.raises(tf.errors.InvalidArgumentError, match="a request must have at most 32768 positions"):
        plain("generate", text=["a"] * (32768 // n_ctx + 1), max_new_tokens=[n_ctx])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"at most 32768 positions, .* got 8388608"):
        plain("generate_ids", ids=[[1]] * 2**15, lengths=[1] * 2**15, max_new_tokens=[2**31 - 1])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"at most 32768 positions, .* got 16777216"):
        plain("generate_ids", ids=np.ones((2**24, 1), np.int32), lengths=np.ones(2**24, np.int32))
    text = "To be, or not to be. " * 10
    n_places = 1001 * len(generator.encoder.encode(text))
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"at most 32768 positions, .* got {n_places}"):
        plain("embed", text=[text] + [""] * 1000)
    with pytest.raises(tf.errors.InvalidArgumentError, match="text has 4194308 bytes in all rows, at most 4194304"):
        plain("encode", text=["abcd" * (2**18 + 1)] + ["abcd" * 2**18] * 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"text gives .* ids, rows times the longest, at most"):
        plain("encode", text=["abcd" * 2**16] + [""] * 1000)
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids must have at most 4194304 places"):
        plain("decode", ids=np.ones((2, 2**22), np.int32), lengths=[1, 1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids must have at most"):
        n_rows = MOST_LOGITS // n_vocab + 1
        plain("logits", ids=np.ones((n_rows, 1), np.int32), lengths=np.ones(n_rows, np.int32))


def test_rows_without_ids_count_as_rows(plain):
    n_rows = MOST_IDS + 1
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"text gives {n_rows} ids, rows times the longest"):
        plain("encode", text=np.full(n_rows, b"", object))
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"ids must have at most {MOST_IDS} places .*got {n_rows}"):
        plain("decode", ids=np.zeros((n_rows, 0), np.int32), lengths=np.zeros(n_rows, np.int32))
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids must have at most"):
        plain("logits", ids=np.zeros((n_rows, 0), np.int32), lengths=np.zeros(n_rows, np.int32))
    for name in ("generate_ids", "next"):
        text = {"text": [b""] * 2**15 + [b""]} if name == "next" else {}
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"at most 32768 positions, .* got 32769"):
            plain(name, ids=np.zeros((2**15 + 1, 0), np.int32), lengths=np.zeros(2**15 + 1, np.int32), **text)


@pytest.mark.parametrize("name", ["generate_ids", "next", "logits", "decode"])
def test_columns_without_rows_count_as_well(name, plain):
    """Such ids are a few bytes in a message of gRPC."""
    text = {"text": np.array([], object)} if name == "next" else {}
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"at most"):
        plain(name, ids=np.zeros((0, 2**30), np.int32), lengths=np.zeros(0, np.int32), **text)


@pytest.mark.parametrize("shape", [(2, 2**20), (1, 2**15 + 1), (2**10, 33)])
def test_ids_are_bounded_by_what_is_sent(shape, plain):
    """Not by ``lengths``: what checks them has their shape."""
    n_rows, n_places = shape[0], shape[0] * shape[1]
    given = {"ids": np.zeros(shape, np.int32), "lengths": np.ones(n_rows, np.int32), "max_new_tokens": [1]}
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"at most 32768 positions, .* got {n_places}"):
        plain("generate_ids", **given)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"at most 32768 positions, .* got {n_places}"):
        plain("next", text=["a"] * n_rows, **given)


def test_ids_up_to_the_limit_are_served(plain):
    found = plain("generate_ids", ids=np.zeros((2**5, 2**10), np.int32), lengths=[1] * 2**5, max_new_tokens=[1])
    assert found["completion_length"].tolist() == [1] * 2**5


GROWTH = """
import resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
from server_double import InvalidArgumentError, ServedModel

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

served = ServedModel(Path(sys.argv[1]))
n_rows, longest_bytes = 30_000, int(sys.argv[3])
texts = {"text": np.array([b"a " * (longest_bytes // 2)] + [b"a"] * (n_rows - 1), object)}
nothing = {"ids": np.zeros((n_rows, 1), np.int32), "lengths": np.zeros(n_rows, np.int32)}
requests = {name: texts for name in ("serving_default", "generate", "score", "embed", "encode")}
requests["next"] = texts | nothing
for name, inputs in requests.items():
    one_token = {"max_new_tokens": np.array([1])} if name in ("generate", "next") else {}
    served.run(name, {key: value[-2:] for key, value in inputs.items()} | one_token)
    before, said = peak_mb(), "served"
    try:
        served.run(name, inputs | one_token)
    except InvalidArgumentError as error:
        said = "at most" if "at most" in str(error) else str(error)
    print(name, round(peak_mb() - before), said, sep=":")
"""


def test_memory_of_every_signature_follows_what_was_sent(exported, generator, run_python):
    """A text of as many bytes as are read, before 30,000 short ones: no array of (rows, longest) is made of them."""
    longest_bytes = PromptReader(generator.encoder, generator.model.config.n_ctx).most_bytes
    lines = [line.split(":", 2) for line in run_python(GROWTH, exported, HERE, longest_bytes).splitlines()]
    growth_mb = {name: int(growth) for name, growth, _ in lines}
    assert growth_mb.keys() == {"serving_default", "generate", "score", "embed", "encode", "next"}
    assert max(growth_mb.values()) < 550, growth_mb
    assert {said for _, _, said in lines} <= {"served", "at most"}
    assert dict(line[::2] for line in lines)["encode"] == "at most"


def test_a_vocabulary_without_end_of_text(toy):
    functions = signatures_of(toy, max_new_tokens=5, xla=False)
    found = call(functions["generate"], text=["hi", "", "hi hi"])
    assert found["finish_reason"][1].decode().startswith("error: text must not be empty")
    assert texts(found)[::2] == toy.generate(["hi", "hi hi"], max_new_tokens=5, jit_compile=False)
    scored = call(functions["score"], text=["hi hi hi"])
    wanted = toy.score("hi hi hi", after_end_of_text=False, jit_compile=False)
    assert scored["logprobs"][0, 0] == 0  # behind nothing
    np.testing.assert_allclose(scored["logprobs"][0, 1:], wanted.logprobs[1:], atol=1e-4)
    assert scored["total"][0] == pytest.approx(wanted.total, abs=1e-3)


def test_another_dtype(toy):
    functions = {}
    for xla in (False, True):
        functions |= signatures_of(toy, max_new_tokens=5, xla=xla)
    prompts = ["hi there", "oh", "hi hi hi"]
    wanted = toy.complete(prompts, max_new_tokens=9, temperature=1.0, seed=[1, 2, 3], jit_compile=False)
    for name in ("generate", "generate_xla"):
        found = call(functions[name], text=prompts, max_new_tokens=[9], temperature=[1.0], seed=[1, 2, 3])
        assert rows(found["ids"], found["completion_length"]) == [one.ids for one in wanted]


def test_numbers_are_rounded_up_to_powers_of_two():
    found = [int(power_of_two(tf.constant(n))) for n in (0, 1, 2, 3, 4, 5, 63, 64, 65, 1024, 1025)]
    assert found == [1, 1, 2, 4, 4, 8, 64, 64, 128, 1024, 2048]
