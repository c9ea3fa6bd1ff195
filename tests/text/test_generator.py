"""Text in, text out, on the embedded checkpoint; and OpenAI's own text, where OpenAI's weights are at hand."""

import dataclasses
import importlib
import itertools
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import reference
import tensorflow as tf
from counting import count_traces
from hypothesis import given, settings, strategies as st

from tf_gpt2.checkpoint.download import FILES, VOCABULARY_FILES, embedded_dir
from tf_gpt2.checkpoint.load import load_encoder_hparams_and_params
from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt
from tf_gpt2.config import GPT2Config, read_hparams
from tf_gpt2.errors import CheckpointError, ContextLengthError, ParamsError
from tf_gpt2.explain.explanation import explain
from tf_gpt2.generation.beam import beam_search
from tf_gpt2.generation.run import Run
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.text.conversation import Conversation
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.tokenizer.encoder import Encoder

generate_module = importlib.import_module("tf_gpt2.generation.generate")
PROMPTS = ["To be", "Where art thou", "ROMEO:\n"]


@pytest.fixture(scope="module")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())


@pytest.fixture(autouse=True)
def one_bucket(monkeypatch):
    """Pads all short texts alike, so that the tests share what was compiled."""
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_BUCKET", 64)


@pytest.fixture(scope="module")
def plain(generator):
    """Generates without XLA, which would compile for each number of prompts."""
    return lambda prompts, **options: generator.generate(
        prompts, **{"max_new_tokens": 12, "jit_compile": False, **options}
    )


@pytest.fixture
def small(tmp_path):
    """Writes a checkpoint of random weights beside the embedded vocabulary, and gives its folder and weights."""

    def write(n_vocab=None):
        encoder = Encoder.from_files(embedded_dir())
        config = GPT2Config(n_vocab=n_vocab or len(encoder), n_ctx=20, n_embd=8, n_head=2, n_layer=1)
        params = reference.lively_params(config)
        save_gpt2_params_to_tf_ckpt(params, config.to_hparams(), tmp_path / "small")
        for name in ("encoder.json", "vocab.bpe"):
            shutil.copy(embedded_dir() / name, tmp_path / "small")
        return tmp_path / "small", params

    return write


def always(generator, token_id):
    """A generator whose model puts one token after everything."""
    model = GPT2Model(dataclasses.replace(generator.model.config, n_embd=4, n_head=1, n_layer=1))
    params = model.get_params()
    params["ln_f"] = {"g": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
    params["wte"][token_id] = 10
    model.set_weights(params)
    return TextGenerator(model, generator.encoder)


# ---- loading


def test_the_reference_notebooks_three_things(tmp_path, generator, assert_same_bits):
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", tmp_path)
    assert not list(tmp_path.iterdir())
    assert encoder.encode("To be") == generator.encoder.encode("To be")
    assert hparams == read_hparams(embedded_dir() / "hparams.json") == generator.model.config.to_hparams()
    assert_same_bits(params, generator.model.get_params())


def test_a_folder_of_ones_own_needs_no_network(small, assert_same_bits, monkeypatch):
    monkeypatch.setenv("TF_GPT2_BASE_URL", "http://127.0.0.1:9/nothing")
    folder, expected = small()
    _, hparams, params = load_encoder_hparams_and_params("small", folder.parent)
    assert hparams["n_ctx"] == 20
    assert_same_bits(params, expected)


def test_bfloat16_halves_the_weights(generator):
    half = TextGenerator.from_checkpoint(str(embedded_dir()), dtype="bfloat16")
    assert {weight.dtype for weight in half.model.weights} == {"bfloat16"}
    assert half.generate("To be", max_new_tokens=3, jit_compile=False)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int2", "", None, "mixed_bfloat16"])
def test_other_dtypes_are_refused_with_the_valid_ones(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16") as caught:
        TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype)
    assert repr(dtype) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    for folder in (tmp_path / "nowhere", embedded_dir() / "README.md"):
        with pytest.raises(CheckpointError, match="is not a folder") as caught:
            TextGenerator.from_checkpoint(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FILES if name != "model.ckpt.meta"])
def test_a_missing_file_is_a_checkpoint_error(name, small):
    folder, _ = small()
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint|hparams|encoder|vocab") as caught:
        TextGenerator.from_checkpoint(folder)
    if name in VOCABULARY_FILES:
        assert f"{name} is missing; copy it from" in str(caught.value)


def test_model_and_vocabulary_must_fit(small, generator):
    folder, _ = small(n_vocab=77)
    with pytest.raises(CheckpointError, match=r"encoder has \d+ tokens and model n_vocab=77"):
        TextGenerator.from_checkpoint(folder)
    with pytest.raises(ValueError, match="n_vocab=77"):
        TextGenerator(GPT2Model.from_checkpoint(folder), generator.encoder)


# ---- generating


def test_greedy_text_is_that_of_the_reference(generator):
    params, encoder = generator.model.get_params(), generator.encoder
    ids = encoder.encode("To be")
    n_prompt = len(ids)
    for _ in range(12):
        ids.append(int(reference.forward(params, ids, n_head=generator.model.config.n_head)[-1].argmax()))
    assert generator.generate("To be", max_new_tokens=12) == encoder.decode(ids[n_prompt:])


def test_a_text_for_a_text_and_a_list_for_a_list(plain):
    texts = plain(PROMPTS)
    assert isinstance(texts, list)
    assert texts == [plain(prompt) for prompt in PROMPTS] == plain(tuple(PROMPTS))
    assert plain(PROMPTS[:1]) == texts[:1]


def test_only_the_new_text_comes_back(generator, plain):
    for prompt, text in zip(PROMPTS, plain(PROMPTS), strict=True):
        assert isinstance(text, str)
        assert text
        longer = generator.encoder.encode(prompt + text)
        assert not text.startswith(prompt)
        assert len(longer) <= len(generator.encoder.encode(prompt)) + 12


def test_an_empty_prompt_starts_after_the_end_of_a_text(generator, plain):
    end = generator.encoder.end_of_text
    assert generator.encode_prompt("") == [end]
    assert generator.encode_prompt("To be") == generator.encoder.encode("To be")
    assert plain(["", "To be"]) == [plain(""), plain("To be")]


def test_an_empty_prompt_needs_an_end_of_text(generator, plain, monkeypatch):
    monkeypatch.setattr(Encoder, "end_of_text", None)
    with pytest.raises(ValueError, match="prompts must not be empty"):
        plain("")
    assert plain("To be")


def test_text_ends_at_the_end_of_text_unless_told_otherwise(generator):
    end = generator.encoder.end_of_text
    ending = always(generator, end)
    assert ending.generate(["To be", ""], max_new_tokens=3, jit_compile=False) == ["", ""]
    going_on = ending.generate("To be", max_new_tokens=3, stop_at_end_of_text=False, jit_compile=False)
    assert going_on == 3 * generator.encoder.decode([end])
    letter = generator.encoder.encode("a")[0]
    assert always(generator, letter).generate("To be", max_new_tokens=3, jit_compile=False) == "aaa"


def test_options_reach_the_model(plain):
    greedy = plain("To be")
    assert plain("To be", temperature=2.0, seed=1) != greedy
    assert plain("To be", temperature=2.0, seed=1) == plain("To be", temperature=2.0, seed=1)
    assert plain("To be", temperature=2.0, seed=1) != plain("To be", temperature=2.0, seed=2)
    assert plain("To be", temperature=2.0, top_k=1) == greedy
    assert plain("To be", temperature=2.0, top_p=1e-6) == greedy
    assert plain(["To be"] * 2, temperature=[0, 2.0], seed=[0, 1]) == [greedy, plain("To be", temperature=2.0, seed=1)]
    assert greedy.startswith(plain("To be", max_new_tokens=2))
    for name, value in {"repetition_penalty": 0.01, "presence_penalty": -100, "logit_bias": {40: 1e6}}.items():
        assert plain("To be", **{name: value}) != greedy
    with pytest.raises(TypeError, match="'top' is no option"):
        plain("To be", top=1)


# ---- samples, and what else was likely


def test_samples_stand_in_the_place_of_a_text(generator, plain):
    options = {"temperature": 1.0, "seed": 5}
    alone = [plain(PROMPTS, temperature=1.0, seed=seed) for seed in (5, 6, 7)]
    wanted = [[texts[row] for texts in alone] for row in range(len(PROMPTS))]
    assert len(set(wanted[0])) == 3
    assert plain(PROMPTS, **options, num_samples=3) == wanted
    assert plain(PROMPTS[0], **options, num_samples=3) == wanted[0]
    assert plain(PROMPTS[:1], **options, num_samples=3) == wanted[:1]
    assert plain(PROMPTS[0], **options, num_samples=1) == wanted[0][:1]
    assert plain(PROMPTS, **options, num_samples=1) == [texts[:1] for texts in wanted]
    assert plain(PROMPTS[:2], temperature=1.0, seed=[6, 5], num_samples=2) == [wanted[0][1:], wanted[1][:2]]
    completions = generator.complete(PROMPTS, **options, num_samples=3, max_new_tokens=12, jit_compile=False)
    assert [[one.text for one in samples] for samples in completions] == wanted


def test_each_sample_ends_at_its_own_stop_string(plain):
    options = {"temperature": 1.0, "max_new_tokens": 30, "stop": ["e", "\n"]}
    samples = plain(PROMPTS, **options, num_samples=2)
    assert samples == [[plain(prompt, **options, seed=seed) for seed in (0, 1)] for prompt in PROMPTS]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_samples_is_refused(n, plain):
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        plain("To be", num_samples=n)


def test_the_likeliest_are_told_as_far_as_the_text_goes(generator):
    options = {"max_new_tokens": 30, "jit_compile": False}
    whole = generator.complete("To be", **options, top_logprobs=3)
    completion = generator.complete("To be", **options, top_logprobs=3, stop=whole.text[10:13])
    n = len(completion.ids)
    assert n < len(whole.ids)
    assert [[i for i, _ in top] for top in completion.top_logprobs] == [
        [i for i, _ in top] for top in whole.top_logprobs[:n]
    ]
    assert [top[0] for top in completion.top_logprobs] == list(zip(completion.ids, completion.logprobs, strict=True))
    assert "".join(generator.encoder.decode([top[0][0]]) for top in whole.top_logprobs) == whole.text
    params, config = generator.model.get_params(), generator.model.config
    ids = [*generator.encoder.encode("To be"), *whole.ids]
    plain = reference.log_softmax(reference.forward(params, ids, n_head=config.n_head))[-len(whole.ids) - 1 : -1]
    for top, logprobs in zip(whole.top_logprobs, plain, strict=True):
        assert [value for _, value in top] == pytest.approx(sorted(logprobs)[:-4:-1], abs=1e-4)
        assert [logprobs[i] for i, _ in top] == pytest.approx(sorted(logprobs)[:-4:-1], abs=1e-4)
    assert generator.complete("To be", **options).top_logprobs == []
    samples = generator.complete("To be", **options, temperature=1.0, num_samples=2, top_logprobs=2)
    assert [[len(top) for top in one.top_logprobs] for one in samples] == [[2] * len(one.ids) for one in samples]


def test_any_unicode_goes_in_and_comes_out(plain):
    for text in plain(["naïve 🙂 \x00 \ud83d", "日本語", " " * 50]):
        text.encode("utf-8")


def test_too_long_a_prompt_is_refused(plain):
    with pytest.raises(ContextLengthError, match="n_ctx="):
        plain(["To be", "To be " * 500])


NO_TEXTS = [5, None, [5], [b"To be"], b"To be", [["To be"]], {"To be": 1}, np.array("To be"), tf.constant("To be")]
NO_TEXTS += [[None], [np.array("To be")], [tf.constant("To be")], np.array([b"To be"]), np.array([["To be"]])]


@pytest.mark.parametrize("texts", NO_TEXTS, ids=repr)
def test_what_is_no_text_is_refused(texts, plain, generator):
    message = r"^(prompts|texts)(\[0\])? must be (a )?str.* got .*(To be|5|None)"
    for ask in (plain, generator.complete, generator.beam_search, generator.score):
        with pytest.raises(TypeError, match=message):
            ask(texts)


@pytest.mark.parametrize("text", [5, None, b"To be", ["To be"], np.array("To be"), tf.constant("To be")], ids=repr)
def test_what_is_not_one_text_is_refused(text, generator):
    for ask in (generator.stream, generator.perplexity, lambda text: explain(generator, text)):
        with pytest.raises(TypeError, match=r"^(prompt|text) must be a str, got .*(To be|5|None)"):
            ask(text)


def test_the_sentence_says_how_to_make_a_text(generator):
    for wrong, remedy in ((b"x", "decode it"), (np.array("x"), "take the text out of it"), ([b"x"], "decode it")):
        with pytest.raises(TypeError, match=remedy):
            generator.generate(wrong)
    assert generator.generate(np.array("To be").item(), max_new_tokens=1, jit_compile=False)
    assert generator.generate(np.array(["To be"]), max_new_tokens=1, jit_compile=False)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("max_new_token", "max_new_tokens"), ("stops", "stop"), ("stop_ids", "stop"), ("temprature", "temperature")],
)
def test_an_unknown_option_is_named_with_what_was_meant(wrong, meant, generator):
    for ask in (generator.generate, generator.complete, generator.complete_many, generator.stream):
        with pytest.raises(TypeError, match=f"'{wrong}' is no option of generation, did you mean '{meant}'"):
            ask("To be" if ask != generator.complete_many else ["To be"], **{wrong: 1})


@pytest.mark.parametrize("make", [np.int64, np.array, tf.constant])
def test_a_number_of_tokens_may_be_any_integer(make, generator, plain):
    assert plain("To be", max_new_tokens=make(4)) == plain("To be", max_new_tokens=4)
    assert "".join(generator.stream("To be", max_new_tokens=make(4), jit_compile=False)) == plain(
        "To be", max_new_tokens=4
    )


def test_a_model_that_gives_no_numbers_is_refused(generator):
    """Rather than a text of whatever id stands where there is no largest logit."""
    params = generator.model.get_params()
    params["wpe"][0] = np.nan
    broken = GPT2Model(generator.model.config)
    broken.set_weights(params)
    broken = TextGenerator(broken, generator.encoder)
    asked = [
        lambda: broken.generate(["To be", "x"], jit_compile=False),
        lambda: broken.generate("To be", overflow="slide", jit_compile=False),
        lambda: list(broken.stream("To be", jit_compile=False)),
        lambda: broken.beam_search("To be", jit_compile=False),
        lambda: list(Conversation(broken, jit_compile=False).add("To be")),
    ]
    for ask in asked:
        with pytest.raises(ParamsError, match=r"logits that are not numbers.*isfinite"):
            ask()


def test_no_prompts_are_refused(plain):
    with pytest.raises(ValueError, match="prompts must be a non-empty list"):
        plain([])


# ---- in pieces, and up to a stop string


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.sampled_from(["To be", "", "ROMEO:\n", "é🙂"]),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.8, 1.5, 5.0]),
    stop=st.lists(st.sampled_from(["\n", "e", " the", "\n\n", "nothing"]), max_size=2),
    n=st.integers(0, 40),
)
def test_pieces_joined_are_the_text(generator, prompt, seed, temperature, stop, n):
    options = {"max_new_tokens": n, "temperature": temperature, "seed": seed, "stop": stop, "jit_compile": False}
    whole = generator.generate(prompt, **options)
    assert "".join(generator.stream(prompt, **options)) == whole
    assert not any(one in whole for one in stop)


def test_the_first_piece_comes_first_and_the_rest_in_good_time(generator, monkeypatch):
    steps, advance = [], Run.advance
    clock = itertools.count()  # each look at it is a second later
    monkeypatch.setattr(Run, "advance", lambda run, n: (steps.append(n), advance(run, n)))
    monkeypatch.setattr(generate_module.time, "perf_counter", lambda: float(next(clock)))
    pieces = generator.stream("To be", max_new_tokens=60, jit_compile=False)
    assert steps == []
    first = next(pieces)
    assert steps == [1]
    pieces.close()
    assert steps == [1]
    assert first == generator.generate("To be", max_new_tokens=1, jit_compile=False)
    for piece_s, wanted in {0.5: [1] * 60, 1.0: [1] * 60, 3.0: [1, 3, 9, 27, 81], 1000.0: [1, 1000]}.items():
        monkeypatch.setattr(generate_module, "PIECE_S", piece_s)
        steps.clear()
        list(generator.stream("To be", max_new_tokens=60, jit_compile=False))
        assert steps == wanted


def test_streamed_and_compiled_is_the_same(generator):
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 7}
    assert "".join(generator.stream("To be", **options)) == generator.generate("To be", **options)


def test_a_text_ends_before_its_stop_string(plain, generator):
    text = plain("To be", max_new_tokens=30)
    stop = text[10:13]
    assert plain("To be", max_new_tokens=30, stop=stop) == text[: text.index(stop)]
    both = plain(["To be", "Where art thou"], max_new_tokens=30, stop=[stop])
    assert both == [plain(prompt, max_new_tokens=30, stop=stop) for prompt in ("To be", "Where art thou")]
    completion = generator.complete("To be", max_new_tokens=30, stop=stop, jit_compile=False)
    whole = generator.complete("To be", max_new_tokens=30, jit_compile=False)
    assert completion.finish_reason == "stop"
    assert whole.finish_reason == "length"
    n = len(completion.ids)
    assert completion.ids == whole.ids[:n]
    assert completion.logprobs == pytest.approx(whole.logprobs[:n], abs=1e-4)
    decode = generator.encoder.decode
    assert stop in decode(completion.ids)
    assert stop not in decode(completion.ids[:-1])


def test_rows_stop_at_their_own_place_and_early(generator, monkeypatch):
    """No row runs on to the end when all have their stop string."""
    steps, advance = [], Run.advance
    monkeypatch.setattr(Run, "advance", lambda run, n: (steps.append(n), advance(run, n)))
    completions = generator.complete(["To be", "ROMEO:\n"], max_new_tokens=200, stop="\n", jit_compile=False)
    assert [one.finish_reason for one in completions] == ["stop", "stop"]
    assert sum(steps) < 100


def test_completions_say_how_long_they_took(generator):
    start_s = time.perf_counter()
    timings = generator.complete("To be", max_new_tokens=5, jit_compile=False).timings
    assert timings.prefill_s > 0
    assert timings.decode_s > 0
    assert sum(timings) < time.perf_counter() - start_s


@pytest.mark.parametrize("prompt", [["To be"], 5, None, b"To be"])
def test_only_one_text_is_streamed(prompt, generator):
    with pytest.raises(TypeError, match=r"^prompt must be a str, got"):
        generator.stream(prompt)


def test_wrong_options_of_a_stream_are_refused_at_once(generator):
    with pytest.raises(ValueError, match="temperature"):
        generator.stream("To be", temperature=-1)
    with pytest.raises(ContextLengthError):
        generator.stream("To be " * 500)
    with pytest.raises(TypeError, match="stop must be"):
        generator.stream("To be", stop=5)


# ---- beam search


def test_beam_search_gives_texts_with_their_scores(generator):
    options = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2, "length_penalty": 0.5}
    found = generator.beam_search(PROMPTS, **options, jit_compile=False)
    ids = [generator.encoder.encode(prompt) for prompt in PROMPTS]
    result = beam_search(generator.model, ids, **options, stop_ids=[generator.encoder.end_of_text], jit_compile=False)
    for texts, best, scores in zip(found, result.ids, result.scores, strict=True):
        assert texts == list(zip(map(generator.encoder.decode, best), scores, strict=True))
    [(text, score), _] = generator.beam_search(PROMPTS[0], **options, jit_compile=False)
    assert (text, score) == (found[0][0][0], pytest.approx(found[0][0][1], abs=1e-4))


def test_beams_end_at_the_end_of_text_unless_told_otherwise(generator):
    end = generator.encoder.end_of_text
    ending = always(generator, end)
    options = {"num_beams": 2, "max_new_tokens": 3, "early_stopping": True, "jit_compile": False}
    assert [[text for text, _ in best] for best in ending.beam_search(["To be", ""], **options)] == [[""], [""]]
    [(text, _)] = ending.beam_search("To be", **options, stop_at_end_of_text=False)
    assert text == 3 * generator.encoder.decode([end])
    with pytest.raises(ValueError, match="num_beams must be"):
        ending.beam_search("To be", num_beams=0)


# ---- compiled ahead


def test_after_a_warmup_nothing_is_left_to_compile(generator):
    generator.warmup(prompt_length=5, max_new_tokens=9, n_prompts=2)
    n_traces = count_traces(generator.model, jit_compile=True)
    assert n_traces >= 2
    for options in ({}, {"temperature": 0.8, "top_k": 5}):
        generator.generate(["To be", "or"], max_new_tokens=9, **options)
    assert count_traces(generator.model, jit_compile=True) == n_traces


@pytest.mark.parametrize(
    "sizes",
    [{"prompt_length": 0}, {"n_prompts": 0}, {"prompt_length": 1.5}, {"n_prompts": True}, {"max_new_tokens": -1}],
)
def test_a_warmup_of_no_size_is_refused(sizes, generator):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be"):
        generator.warmup(**sizes)


def test_a_warmup_beyond_the_window_is_refused(generator):
    with pytest.raises(ContextLengthError, match="n_ctx="):
        generator.warmup(prompt_length=generator.model.config.n_ctx)


# ---- OpenAI's weights


@pytest.fixture(scope="module")
def openai_124m():
    folder = Path(os.environ.get("TF_GPT2_MODELS_DIR", "")) / "124M"
    if "TF_GPT2_MODELS_DIR" not in os.environ or not folder.is_dir():
        pytest.skip("needs OpenAI's weights: set TF_GPT2_MODELS_DIR to the folder that holds 124M")
    return TextGenerator.from_checkpoint(folder)


def test_124m_writes_what_it_always_wrote(openai_124m):
    text = openai_124m.generate("Alan Turing theorized that computers would one day become", max_new_tokens=40)
    assert text == (
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex calculations,"
        " and it can perform these calculations in a way that is very similar to the human brain.\n"
    )


def test_124m_gives_the_ids_it_always_gave(openai_124m):
    prompt = "Alan Turing theorized that computers would one day become very powerful, but even he could not imagine"
    text = openai_124m.generate(prompt, max_new_tokens=20)
    ids = [703, 484, 561, 307, 1498, 284, 466, 523, 13, 198, 198, 1, 40, 892, 326, 262, 749, 1593, 1517, 318]
    assert text == openai_124m.encoder.decode(ids)
