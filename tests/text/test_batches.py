"""Many texts: in order, as one by one, in few shapes and little memory, whatever the batches; and texts that slide."""

import gc
import itertools

import numpy as np
import pytest
import tensorflow as tf
from counting import count_traces
from hypothesis import given, settings, strategies as st
from reference import lively_params

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.generate import continue_rows
from tf_gpt2.generation.loop import bucket
from tf_gpt2.generation.run import Run
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.text import batches
from tf_gpt2.text.batches import BATCHES_PER_WINDOW, Prompt
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.tokenizer.encoder import Encoder

N_CTX = 40
WORDS = ["To", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "in", "mind", "suffer"]


@pytest.fixture(scope="module")
def generator():
    """The embedded vocabulary and random weights; a short window."""
    encoder = Encoder.from_files(embedded_dir())
    config = GPT2Config(n_vocab=len(encoder), n_ctx=N_CTX, n_embd=12, n_head=3, n_layer=2)
    model = GPT2Model(config)
    model.set_weights(lively_params(config))
    return TextGenerator(model, encoder)


@pytest.fixture(scope="module")
def many(generator):
    return lambda prompts, **options: generator.complete(
        prompts, **{"max_new_tokens": 6, "batch_size": 4, "jit_compile": False, **options}
    )


def texts(n, seed=0, longest=16):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, longest))) for _ in range(n)]


def row_of(options, row):
    return {name: value[row] if isinstance(value, (list, np.ndarray)) else value for name, value in options.items()}


def each_alone(many, prompts, options, **others):
    return [many(prompt, **row_of(options, i), **others) for i, prompt in enumerate(prompts)]


def assert_same(completions, others):
    for one, other in zip(completions, others, strict=True):
        assert (one.text, one.ids, one.finish_reason) == (other.text, other.ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.n_truncated == other.n_truncated


# ---- the law


def test_in_batches_as_one_by_one_and_in_order(many):
    prompts = texts(25)
    options = {
        "temperature": [(i % 4) / 2 for i in range(25)],
        "seed": [2**64 - 1 - i for i in range(25)],
        "top_k": np.arange(25),
        "presence_penalty": 0.5,
    }
    others = {"suppress": [3], "bad_words_ids": [[4, 5]]}
    alone = each_alone(many, prompts, options, **others)
    for batch_size in (1, 4, 100):
        assert_same(many(prompts, batch_size=batch_size, **options, **others), alone)


@settings(max_examples=6, deadline=None)
@given(n=st.integers(4, 20), batch_size=st.sampled_from([1, 4]), seed=st.integers(0, 99), lazily=st.booleans())
def test_however_the_batches_are_cut(many, n, batch_size, seed, lazily):
    """Also rows that end early, at a stop string; the sizes of batches are those of the other tests."""
    prompts = texts(n, seed)
    options = {"temperature": 1.0, "seed": list(range(seed, seed + n)), "stop": ["e", " the"]}
    others = {"stop": options.pop("stop"), "overflow": "slide", "max_new_tokens": 30}
    found = many(iter(prompts) if lazily else prompts, batch_size=batch_size, **options, **others)
    assert_same(found, each_alone(many, prompts, options, **others))


def test_the_same_prompts_and_one_seed_give_one_text(many):
    assert len({one.text for one in many(["To be"] * 10, temperature=1.5, seed=3)}) == 1
    assert len({one.text for one in many(["To be"] * 10, temperature=1.5, seed=range(10))}) > 5


def test_generate_gives_the_texts_of_complete(generator, many, tmp_path):
    prompts = texts(9)
    options = {"max_new_tokens": 6, "batch_size": 4, "jit_compile": False}
    expected = [one.text for one in many(prompts)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    assert generator.generate(tuple(prompts), **options) == expected
    assert generator.generate(np.array(prompts), **options) == expected
    assert generator.generate(dict.fromkeys(prompts).keys(), **options) == expected
    assert [one.text for one in generator.complete_many(iter(prompts), **options)] == expected
    with file.open(encoding="utf-8") as lines:
        assert generator.generate((line.rstrip("\n") for line in lines), **options) == expected


# ---- shapes


def test_few_shapes_compile_however_many_prompts(generator):
    model = GPT2Model(GPT2Config(n_vocab=len(generator.encoder), n_ctx=32, n_embd=4, n_head=1, n_layer=1))
    small = TextGenerator(model, generator.encoder)
    options = {"max_new_tokens": 6, "batch_size": 3, "overflow": "slide", "jit_compile": False}
    n_buckets = len({bucket(n, 32) for n in range(1, 33)})
    small.generate(texts(40, longest=60), **options)
    small.generate(iter(texts(31, seed=2)), **{**options, "max_new_tokens": 50})
    small.generate(texts(50, seed=3, longest=60), **options)
    small.generate(texts(4, longest=60), **options, temperature=1.0, seed=[1, 2, 3, 4], stop="e")
    assert 2 <= count_traces(model) <= 2 * n_buckets


@pytest.fixture
def calls(monkeypatch):
    """Prompts' lengths of each call of the layer below."""
    seen = []

    def record(model, prompts, *arguments):
        seen.append([len(prompt) for prompt in prompts])
        return continue_rows(model, prompts, *arguments)

    monkeypatch.setattr(batches, "continue_rows", record)
    return seen


def test_a_batch_is_full_unless_it_is_the_only_one(many, calls):
    for n, sizes in ((1, [1]), (3, [3]), (4, [4]), (5, [4, 4]), (33, [4] * 9)):
        for prompts in (texts(n), iter(texts(n))):
            calls.clear()
            assert len(many(prompts, max_new_tokens=1)) == n
            assert [len(lengths) for lengths in calls] == sizes


def test_within_a_window_like_lengths_go_together(many, calls):
    window = 4 * BATCHES_PER_WINDOW
    prompts = texts(2 * window + 3)
    many(prompts, max_new_tokens=1)
    lengths = list(itertools.chain(*calls))
    for start in range(0, len(lengths), window):
        assert lengths[start : start + window] == sorted(lengths[start : start + window])
    assert lengths != sorted(lengths)


# ---- lazily, in flat memory


def counted(prompts, read):
    for prompt in prompts:
        read.append(prompt)
        yield prompt


def test_an_iterable_is_read_as_far_as_needed(generator, calls):
    read, options = [], {"max_new_tokens": 1, "batch_size": 2, "jit_compile": False}
    long = itertools.islice(itertools.cycle(texts(7)), 1000)
    completions = generator.complete_many(counted(long, read), **options)
    assert (read, calls) == ([], [])
    window = 2 * BATCHES_PER_WINDOW
    for n in range(1, 3 * window):
        next(completions)
        assert len(read) == window * -(-n // window)
    completions.close()
    assert len(read) == 3 * window


def test_what_is_done_is_let_go(generator):
    def live():
        gc.collect()
        return sum(isinstance(one, Prompt) for one in gc.get_objects())

    long = itertools.islice(itertools.cycle(texts(7)), 1000)
    completions = generator.complete_many(long, max_new_tokens=1, batch_size=2, jit_compile=False)
    window = 2 * BATCHES_PER_WINDOW
    counts = []
    for _ in range(4):
        list(itertools.islice(completions, window))
        counts.append(live())
    assert max(counts) <= window
    assert not any(isinstance(one, Run) for one in gc.get_objects())


def test_a_thousand_prompts_take_the_memory_of_a_few(run_python):
    """As one batch they would take 200 MB."""
    program = """
import resource, sys
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.text.generator import TextGenerator

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

generator = TextGenerator.from_checkpoint(embedded_dir())
prompt = "To be, or not to be, that is the question: " * 2
options = {"max_new_tokens": 2, "jit_compile": False}
generator.generate((prompt for _ in range(48)), **options)
before = peak()
assert len(generator.generate([prompt] * 1000, **options)) == 1000
print(peak() - before, len(generator.encode_prompt(prompt)))
"""
    grown_mb, n_tokens = map(int, run_python(program).split())
    assert n_tokens > 16
    assert grown_mb < 150  # one batch of them all takes more; allocators differ by tens


# ---- the bar


def test_a_bar_on_standard_error_for_more_than_one_batch(many, monkeypatch, capsys):
    monkeypatch.setattr(batches, "BAR_AFTER_S", 0.0)
    for prompts in (texts(9), iter(texts(9))):
        many(prompts)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Generating" in captured.err
        assert ("9" in captured.err and "/9" in captured.err) == isinstance(prompts, list)
        assert captured.err.endswith("\r")  # it is wiped away
    many(texts(9), progress=False)
    many(texts(4))
    many("To be")
    assert capsys.readouterr() == ("", "")


def test_what_is_done_in_a_moment_needs_no_bar(many, capsys):
    many(["To be"] * 5, max_new_tokens=1)
    assert capsys.readouterr() == ("", "")


# ---- interrupted


def test_after_an_interruption_all_is_as_before(many, generator, monkeypatch):
    def interrupted():
        yield from texts(50)
        raise KeyboardInterrupt

    expected = many(texts(9))
    with pytest.raises(KeyboardInterrupt):
        many(interrupted())
    advance, n_calls = Run.advance, itertools.count()

    def interrupt(run, n_steps):
        if next(n_calls) == 1:
            raise KeyboardInterrupt
        advance(run, n_steps)

    monkeypatch.setattr(Run, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        many(texts(9))
    assert_same(many(texts(9)), expected)


# ---- refused


@pytest.mark.parametrize("place", [0, 5, 50])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (7, TypeError, "must be a str, got 7"),
        (None, TypeError, "must be a str, got None"),
        ("To be " * 99, ContextLengthError, "n_ctx=40"),
    ],
)
def test_errors_name_the_prompt(place, wrong, error, message, many, generator, calls):
    prompts = texts(60)
    prompts[place] = wrong
    with pytest.raises(error, match=rf"prompts\[{place}\] .*{message}"):
        many(prompts)
    assert calls == []  # a list is checked before anything is computed
    completions = generator.complete_many(iter(prompts), max_new_tokens=1, batch_size=4, jit_compile=False)
    good = list(itertools.islice(completions, place))
    with pytest.raises(error, match=rf"prompts\[{place}\] .*{message}"):
        next(completions)
    if place:
        assert_same(good, many(prompts[:place], max_new_tokens=1))


@pytest.mark.parametrize("n_good", [0, 1, 4, 37])
def test_what_comes_before_an_error_of_an_iterable_is_given(n_good, generator, many):
    def broken():
        yield from texts(n_good)
        raise OSError("the disk is gone")

    good = []
    with pytest.raises(OSError, match="the disk is gone"):
        for completion in generator.complete_many(broken(), max_new_tokens=6, batch_size=4, jit_compile=False):
            good.append(completion)
    assert len(good) == n_good
    if good:
        assert_same(good, many(texts(n_good)))


def test_what_comes_before_a_missing_value_is_given(generator):
    completions = generator.complete_many(
        iter(texts(50)), seed=list(range(40)), max_new_tokens=1, batch_size=4, jit_compile=False
    )
    assert len(list(itertools.islice(completions, 40))) == 40
    with pytest.raises(ValueError, match="seed must have one value per prompt, and 40 are all that both have"):
        next(completions)


@pytest.mark.parametrize("prompts", [5, None, b"To be", np.array("To be"), np.array(b"x"), tf.constant("To be")])
def test_what_gives_no_texts_is_refused(prompts, many):
    with pytest.raises(TypeError, match="prompts must be str in a list or another iterable"):
        many(prompts)


def test_one_text_is_not_many(generator):
    with pytest.raises(TypeError, match="prompts must be str in a list or another iterable, got 'To be'"):
        generator.complete_many("To be")


def test_no_prompts_are_refused(many):
    for none in ([], iter([])):
        with pytest.raises(ValueError, match="prompts must be a non-empty list of str"):
            many(none)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"overflow": "wrap"}, "overflow must be one of error, truncate, slide, got 'wrap'"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": [1.0] * 8 + [-1.0]}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"seed": [[1]] * 9}, "seed must"),
        ({"seed": [[1], [1, 2]] * 9}, "seed must"),
        ({"seed": np.array(5), "top_p": 0}, "top_p must"),
        ({"stop": ""}, "stop must"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_is_read(options, message, generator):
    read = []
    with pytest.raises((TypeError, ValueError), match=message):
        generator.complete_many(counted(texts(9), read), **options)
    assert read == []


@pytest.mark.parametrize("n", [8, 10, 1, 0])
def test_values_are_as_many_as_prompts(n, many, generator):
    with pytest.raises(ValueError, match="seed must"):
        many(texts(9), seed=list(range(n)))
    with pytest.raises(ValueError, match="seed must have one value per prompt"):
        many(iter(texts(9)), seed=list(range(n)))
    with pytest.raises(ValueError, match="top_k must be a number or have one value per prompt"):
        generator.complete_many(iter(texts(9)), seed=[1, 2], top_k=[1])


def test_values_of_any_kind_go_with_their_prompts(many):
    prompts, temperature = texts(6), [0.0, 2.0] * 3
    expected = many(prompts, temperature=temperature, seed=4)
    for values in (tuple(temperature), np.array(temperature), tf.constant(temperature), tf.Variable(temperature)):
        assert_same(many(prompts, temperature=values, seed=np.uint8(4)), expected)


SMALL_INTEGERS = [
    np.uint8,
    np.int64,
    lambda n: np.array(n, np.uint8),
    lambda n: tf.constant(n, tf.uint8),
    lambda n: tf.constant(n, tf.int8),
]


def test_counts_may_be_integers_of_any_type(many):
    prompts = texts(70)
    counts = {"batch_size": 64, "top_logprobs": 7, "num_samples": 2, "max_new_tokens": 2, "top_k": 0}
    expected = many(prompts, **counts)
    for make in SMALL_INTEGERS:
        found = many(prompts, **{name: make(n) for name, n in counts.items()})
        assert [[one.top_logprobs for one in samples] for samples in found] == [
            [one.top_logprobs for one in samples] for samples in expected
        ]


def test_seeds_may_be_integers_of_any_type(many):
    prompts, options = texts(9), {"temperature": 1.5}
    expected = many(prompts, seed=list(range(9)), **options)
    for make in SMALL_INTEGERS:
        vector = make(np.arange(9))
        for seeds in ([make(i) for i in range(9)], tuple(make(i) for i in range(9)), vector):
            if np.ndim(seeds) == 1:  # np.int64 makes none of several
                assert_same(many(prompts, seed=seeds, **options), expected)
        assert_same(many(iter(prompts), seed=vector, **options), expected)


# ---- overflow


LONG = "To be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows of"


def test_overflow_for_texts(generator, many):
    n = len(generator.encode_prompt(LONG * 2))
    assert n > N_CTX
    with pytest.raises(ContextLengthError, match=r"prompts\[1\]"):
        many(["To be", LONG * 2])
    short, long = many(["To be", LONG * 2], overflow="truncate")
    assert (short.n_truncated, long.n_truncated) == (0, n - N_CTX + 6)
    assert len(long.ids) == 6
    assert_same([short], [many("To be")])
    slid = many([LONG * 2, "To be"], overflow="slide", max_new_tokens=100)
    assert [len(one.ids) for one in slid] == [100, 100]
    assert [one.finish_reason for one in slid] == ["length", "length"]
    assert slid[0].n_truncated == n - (n - N_CTX) % (N_CTX // 2) - N_CTX // 2
    assert many("To be", max_new_tokens=100).finish_reason == "context"


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.sampled_from(["", "To be", LONG, LONG * 3]),
    overflow=st.sampled_from(["truncate", "slide"]),
    seed=st.integers(0, 2**64 - 1),
    place=st.integers(0, 90),
    length=st.integers(1, 12),
)
def test_pieces_joined_are_the_text_and_stops_may_lie_anywhere(generator, prompt, overflow, seed, place, length):
    """A stop string that is half before and half behind the move of a window, too."""
    options = {"max_new_tokens": 70, "temperature": 1.0, "seed": seed, "overflow": overflow, "jit_compile": False}
    whole = generator.generate(prompt, **options)
    assert "".join(generator.stream(prompt, **options)) == whole
    stop = whole[place : place + length]
    if stop:
        cut = generator.generate(prompt, stop=stop, **options)
        assert cut == whole[: whole.index(stop)] == "".join(generator.stream(prompt, stop=stop, **options))
