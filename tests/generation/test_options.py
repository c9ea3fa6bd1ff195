"""What is refused, and in which words; what is taken."""

import math

import numpy as np
import pytest
import tensorflow as tf
from asking import make_limits, make_sampling

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.options import (
    RULES,
    SamplingOptions,
    check_counts,
    check_max_new_tokens,
    check_prompts,
    check_row,
    check_sampling,
    check_stride,
    check_top,
    pad_words,
)
from tf_gpt2.generation.processors import EXCLUDED

INF, NAN = math.inf, math.nan
NEVER = float(EXCLUDED)
CONFIG = GPT2Config(n_vocab=9, n_ctx=12, n_embd=1, n_head=1, n_layer=1)

NO_NUMBER = [
    None,
    "0.5",
    1j,
    NAN,
    True,
    [1, True, 2],
    [1, 2],
    [[1, 2, 3]],
    [],
    {},
    [None] * 3,
    [1, "a", 2],
    [[1], [1, 2]],
]
NO_COUNT = [*NO_NUMBER, 1.5, 2.0, -1, [1, 2, -3], 2**70]
WRONG = {
    "temperature": [*NO_NUMBER, -0.1, INF, [1, 2, -3], 1e39],
    "top_k": NO_COUNT,
    "top_p": [*NO_NUMBER, 0, -0.1, 1.1, 1e-50, [1, 1, 2]],
    "min_p": [*NO_NUMBER, -0.1, 1.1, INF, [1, 1, 2]],
    "typical_p": [*NO_NUMBER, 0, -0.1, 1.1, 1e-50, [1, 1, 2]],
    "repetition_penalty": [*NO_NUMBER, 0, -1, 0.009, 101, INF, [1, 1, 0]],
    "presence_penalty": [*NO_NUMBER, 101, -101, INF, -INF, [1, 1, 200]],
    "frequency_penalty": [*NO_NUMBER, 101, -101, INF, -INF, [1, 1, 200]],
    "seed": [*NO_NUMBER, -1, 2**64, 1.0, [1, 2, -3]],
    "no_repeat_ngram_size": NO_COUNT,
    "min_new_tokens": NO_COUNT,
}
WRONG_FOR_ALL = {
    "logit_bias": [
        None, [1], "5", {9: 1.0}, {-1: 1.0}, {1.0: 1.0}, {"1": 1.0}, {True: 1.0}, {1: None}, {1: "2"}, {1: True},
        {1: NAN}, {1: INF}, {1: 1e7}, {1: -1e9}, {1: [1.0]}, {1: 1j},
    ],
    "bad_words_ids": [None, 5, "ab", [1], [[]], [[1], []], [[9]], [[1, -1]], ["a"], [[1.0]], [[True]], {1: 2}, [[[1]]]],
    "suppress": [None, 5, "5", b"5", [9], [-1], [1.0], [True], [[1]], ["a"], list(range(9)), np.array([[1]])],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
        make_sampling(3, CONFIG, **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_FOR_ALL.items() for value in values]
)
def test_a_wrong_list_is_named(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[\d+\])?.* must "):
        make_sampling(3, CONFIG, **{name: value})


def test_each_option_is_tested_above():
    assert set(WRONG) == set(RULES)
    assert set(WRONG) | set(WRONG_FOR_ALL) == set(SamplingOptions.__annotations__)
    for name in SamplingOptions.__annotations__:
        assert f"\n        {name}: " in SamplingOptions.__doc__


def test_unknown_names_are_refused_with_what_was_meant():
    with pytest.raises(TypeError, match="'temprature' is no option of generation, did you mean 'temperature'; there"):
        make_sampling(1, CONFIG, temprature=1.0)
    with pytest.raises(TypeError, match="'qqqq' is no option of generation; there are temperature, top_k"):
        make_sampling(1, CONFIG, qqqq=1)


def test_some_prompts_have_their_own_values():
    """As a batch takes them: in any order, one several times to fill the batch."""
    asked = {
        "temperature": [0.0, 0.5, 1.0, 1.5],
        "seed": (2**64 - 9, 5, 2**33, 7),
        "top_k": 3,
        "min_new_tokens": range(4),
    }
    places = [3, 0, 2, 2]
    picked = {"temperature": [1.5, 0.0, 1.0, 1.0], "seed": [7, 2**64 - 9, 2**33, 2**33], "min_new_tokens": [3, 0, 2, 2]}
    found = check_sampling(4, CONFIG, **asked).of_prompts(places).spread(4, 2)
    wanted = make_sampling(4, CONFIG, 2, **{**asked, **picked})
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        assert one.dtype == other.dtype
        assert one.numpy().tolist() == other.numpy().tolist()
    assert found.seeds.numpy()[:3].tolist() == [[7, 0], [8, 0], [2**32 - 9, 2**32 - 1]]


def test_one_value_does_for_any_number_of_prompts():
    sampling = check_sampling(None, CONFIG, temperature=0.5, seed=3)
    assert sampling.n_values is None
    for n_prompts in (1, 5):
        assert sampling.of_prompts(range(n_prompts)).spread(n_prompts).temperature.numpy().tolist() == [0.5] * n_prompts
    assert check_sampling(None, CONFIG, top_p=[0.5, 1.0, 0.1]).n_values == 3


def test_all_ids_may_not_be_banned_in_several_ways_together():
    options = {"suppress": [0, 1, 2], "logit_bias": {3: -INF, 4: -INF}, "bad_words_ids": [[5], [6], [7]]}
    make_sampling(1, CONFIG, **options)
    with pytest.raises(ValueError, match="must leave one id of 9"):
        make_sampling(1, CONFIG, **{**options, "suppress": [0, 1, 2, 8]})


def test_the_bias_holds_all_that_is_for_one_id():
    options = {"suppress": (1, 1), "logit_bias": {np.int64(0): 2, 1: 3.0, 5: np.float32(-1), 6: -INF}}
    processing = make_sampling(2, CONFIG, bad_words_ids=[np.array([7]), (5, 6)], **options).processing
    assert processing.bias.numpy().tolist() == [2, NEVER, 0, 0, 0, -1, NEVER, NEVER, 0]
    assert processing.bad_words.numpy()[:2].tolist() == [[-1, -1, 5, 6], [-1] * 4]
    assert make_sampling(1, CONFIG, suppress=iter([2])).processing.bias.numpy()[2] == NEVER


def test_settings_may_be_of_any_type_of_number():
    for value in (2, 2.0, np.float64(2), np.int8(2), [2, 2.0, 2], np.full(3, 2, np.uint8), (2, 2, 2)):
        sampling = make_sampling(3, CONFIG, repetition_penalty=value, temperature=value, presence_penalty=value)
        for found in (
            sampling.processing.repetition_penalty,
            sampling.temperature,
            sampling.processing.presence_penalty,
        ):
            assert found.numpy().tolist() == [2, 2, 2]
    for value in (2**31, 2**62, np.int64(2**40), [2**31] * 3):
        sampling = make_sampling(3, CONFIG, top_k=value, min_new_tokens=value, no_repeat_ngram_size=value)
        for found in (sampling.top_k, sampling.processing.min_new_tokens, sampling.processing.no_repeat_ngram_size):
            assert found.numpy().tolist() == [2**31 - 1] * 3


INTEGERS = [
    (1, 2, 3),
    [np.int8(1), np.uint64(2), np.int64(3)],
    [tf.constant(1, tf.int8), tf.constant(2, tf.uint64), 3],
    [np.array(1), np.array(2), tf.Variable(3)],
    np.array([1, 2, 3], np.uint8),
    np.array([1, 2, 3], np.uint64),
    tf.constant([1, 2, 3], tf.int8),
    tf.constant([1, 2, 3], tf.uint16),
    tf.Variable([1, 2, 3]),
    range(1, 4),
]


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.dtype is not np.float32])
@pytest.mark.parametrize("values", INTEGERS, ids=lambda values: str(type(values)))
def test_integers_may_be_of_any_type(name, values):
    sampling = make_sampling(3, CONFIG, **{name: values})
    found = {"seed": sampling.seeds[:, 0], **sampling._asdict(), **sampling.processing._asdict()}[name]
    assert found.numpy().tolist() == [1, 2, 3]
    for value in values:
        found = make_sampling(2, CONFIG, **{name: value})
        found = {"seed": found.seeds[:, 0], **found._asdict(), **found.processing._asdict()}[name]
        assert len(set(found.numpy().tolist())) == 1


@pytest.mark.parametrize("dtype", [tf.uint64, np.uint64, None])
def test_the_largest_seed_may_be_of_any_type_that_holds_it(dtype):
    seeds = [2**64 - 1, 2**63, 2**32]
    if dtype is not None:
        seeds = [tf.constant(s, dtype) if dtype is tf.uint64 else dtype(s) for s in seeds]
    found = make_sampling(3, CONFIG, seed=seeds).seeds.numpy()
    assert found.tolist() == [[2**32 - 1, 2**32 - 1], [0, 2**31], [0, 1]]


@pytest.mark.parametrize("ids", INTEGERS, ids=lambda ids: str(type(ids)))
def test_ids_may_be_of_any_type(ids):
    if isinstance(ids, tf.Variable):
        ids = [*ids.numpy()]
    sampling = make_sampling(1, CONFIG, suppress=ids, bad_words_ids=[ids], logit_bias={0: np.array(2)})
    assert sampling.processing.bias.numpy().tolist() == [2, NEVER, NEVER, NEVER, 0, 0, 0, 0, 0]
    assert sampling.processing.bad_words.numpy()[0].tolist() == [-1, 1, 2, 3]
    assert make_limits([], 1, ids, CONFIG).stop_ids.numpy()[:4].tolist() == [1, 2, 3, -1]
    assert check_row("ids", ids, CONFIG).tolist() == [1, 2, 3]


def test_counts_may_be_of_any_type():
    for make in (int, np.uint8, np.int64, np.array, lambda n: tf.constant(n, tf.int8), tf.Variable):
        counts = [
            *check_counts(n=make(5), m=make(100)),
            check_top(make(7), CONFIG),
            check_max_new_tokens(make(0)),
            check_stride(make(12), CONFIG),
        ]
        assert counts == [5, 100, 7, 0, 12]
        assert {type(n) for n in counts} == {int}


NO_INTEGER = [
    None,
    True,
    np.True_,
    tf.constant(True),
    1.0,
    np.float32(1),
    tf.constant(1.0),
    "1",
    b"1",
    [1],
    np.ones(1, int),
]


@pytest.mark.parametrize("value", NO_INTEGER, ids=repr)
def test_what_is_no_integer_is_no_count(value):
    for check in (
        lambda: check_counts(n=value),
        lambda: check_top(value, CONFIG),
        lambda: check_max_new_tokens(value),
        lambda: check_stride(value, CONFIG),
    ):
        with pytest.raises((TypeError, ValueError), match=r"must be an integer.*got"):
            check()


SCALARS = [None, 5, "To be", b"To be", np.array("To be"), np.array(5), tf.constant("To be"), tf.constant(5), 1.5]


@pytest.mark.parametrize("value", SCALARS, ids=repr)
def test_what_is_no_list_gets_a_sentence(value):
    for name, check in {
        "prompts": lambda: check_prompts(value, CONFIG),
        r"prompts\[0\]": lambda: check_prompts([value], CONFIG),
        "ids": lambda: check_row("ids", value, CONFIG),
        "stop_ids": lambda: make_limits([], 1, value, CONFIG),
        "suppress": lambda: make_sampling(1, CONFIG, suppress=value),
        "bad_words_ids": lambda: make_sampling(1, CONFIG, bad_words_ids=value),
        r"bad_words_ids\[0\]": lambda: make_sampling(1, CONFIG, bad_words_ids=[value]),
        "logit_bias": lambda: make_sampling(1, CONFIG, logit_bias=value),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*, got") as caught:
            check()
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0.01, 100, np.float32(0.01)])
def test_bounds_are_taken(value):
    make_sampling(1, CONFIG, repetition_penalty=value, logit_bias={1: -1e6, 2: 1e6}, frequency_penalty=-100, min_p=1)


def test_shapes_come_in_few_sizes():
    def shape(*lengths):
        return pad_words([[1] * n for n in lengths]).shape

    assert shape() == shape(1, 1) == shape(*[2] * 8) == shape(*[1] * 50) == shape(4) == (8, 4)
    assert shape(*[2] * 9) == shape(*[2] * 16) == (16, 4)
    assert shape(5) == shape(8) == (8, 8)
    assert make_limits([np.ones(1)], 1, [], CONFIG).stop_ids.shape == (8,)
    assert make_limits([np.ones(1)], 1, range(9), CONFIG).stop_ids.shape == (16,)
