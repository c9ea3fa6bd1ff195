"""Weights of the model as a parameter tree: bit for bit there and back, checked whole, sharing no memory."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2.checkpoint.params import leaves, map_leaves
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ParamsError
from tf_gpt2.model.gpt2 import GPT2Model

SHAPES = [
    GPT2Config(n_vocab=101, n_ctx=40, n_embd=12, n_head=3, n_layer=2),
    GPT2Config(n_vocab=37, n_ctx=9, n_embd=10, n_head=5, n_layer=3),
    GPT2Config(n_vocab=5, n_ctx=3, n_embd=1, n_head=1, n_layer=2),
    GPT2Config(n_vocab=1, n_ctx=1, n_embd=4, n_head=4, n_layer=1),
]


def with_weights(config, params):
    model = GPT2Model(config)
    model.set_weights(params)
    return model


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_the_tree_comes_back_bit_for_bit(config, assert_same_bits):
    rng = np.random.default_rng(0)
    for params in (
        lively_params(config),
        map_leaves(lambda _, x: rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32), lively_params(config)),
    ):
        model = with_weights(config, params)
        assert_same_bits(model.get_params(), params)
        assert model.count_params() == config.n_params


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_the_tree_shares_no_memory_with_the_model(config, assert_same_bits):
    params = lively_params(config)
    model = with_weights(config, map_leaves(lambda _, x: x.copy(), params))
    mine = map_leaves(lambda _, x: x.copy(), params)
    model.set_weights(mine)
    for _, leaf in leaves(mine):
        leaf.fill(7)
    assert_same_bits(model.get_params(), params)
    given = model.get_params()
    for weight in model.weights:
        weight.assign_add(tf.ones(weight.shape))
    assert_same_bits(given, params)
    for _, leaf in leaves(given):
        assert leaf.flags.writeable


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floats_are_cast(dtype, odd_config, odd_params, assert_same_bits):
    other = map_leaves(lambda _, x: x.astype(dtype), odd_params)
    model = with_weights(odd_config, other)
    assert_same_bits(model.get_params(), map_leaves(lambda _, x: x.astype(np.float32), other))


def test_leaves_may_be_tensors_and_variables(odd_config, odd_params, assert_same_bits):
    for wrap in (tf.constant, tf.Variable, keras.Variable, np.asfortranarray):
        model = with_weights(odd_config, map_leaves(lambda _, x, wrap=wrap: wrap(x), odd_params))
        assert_same_bits(model.get_params(), odd_params)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("blocks", 1, "attn", "c_attn", "w"), "blocks/1/attn/c_attn/w: expected (12, 36), got (36, 12)"),
        (("blocks", 0, "mlp", "c_proj", "w"), "blocks/0/mlp/c_proj/w: expected (48, 12), got (12, 48)"),
        (("wte",), "wte: expected (101, 12), got (12, 101)"),
        (("wpe",), "wpe: expected (40, 12), got (12, 40)"),
    ],
)
def test_a_wrong_tree_is_refused_whole(path, message, odd_config, odd_params, assert_same_bits):
    model = with_weights(odd_config, odd_params)
    wrong = map_leaves(lambda _, x: x + 1, odd_params)
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = place[path[-1]].T
    with pytest.raises(ParamsError) as caught:
        model.set_weights(wrong)
    assert str(caught.value) == f"wrong parameter tree: {message}"
    assert_same_bits(model.get_params(), odd_params)


def test_a_flat_list_keeps_the_meaning_it_has_in_keras(odd_model, odd_config, odd_params, assert_same_bits):
    other = GPT2Model(odd_config)
    other.set_weights(odd_model.get_weights())
    assert_same_bits(other.get_params(), odd_params)
    assert [weight.shape for weight in other.weights] == [array.shape for array in odd_model.get_weights()]
