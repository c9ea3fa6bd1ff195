"""Each layer against its formula in float64, as a citizen of Keras, and with its subtree of the parameters."""

import keras
import ml_dtypes
import numpy as np
import pytest
import reference
import tensorflow as tf
from reference import lively_params

from tf_gpt2.checkpoint.params import leaves, map_leaves
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ParamsError
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.layers import MLP, Block, CausalSelfAttention, LayerNorm, Linear
from tf_gpt2.reference import attention, block, linear, mlp

C, H = 12, 3
BLOCK = lively_params(GPT2Config(n_vocab=1, n_ctx=1, n_embd=C, n_head=H, n_layer=1))["blocks"][0]
# class, arguments, its part of the parameters, the formula
CASES = {
    "Linear": (Linear, {"n_in": C, "n_out": 4 * C}, BLOCK["mlp"]["c_fc"], linear),
    "LayerNorm": (LayerNorm, {"n_embd": C}, BLOCK["ln_1"], reference.layer_norm),
    "CausalSelfAttention": (
        CausalSelfAttention,
        {"n_embd": C, "n_head": H},
        BLOCK["attn"],
        lambda x, params: attention(x, params, H),
    ),
    "MLP": (MLP, {"n_embd": C}, BLOCK["mlp"], mlp),
    "Block": (
        Block,
        {"n_embd": C, "n_head": H},
        BLOCK,
        lambda x, params: block(x, params, H),
    ),
}
every_layer = pytest.mark.parametrize("name", CASES)
with_dropout = pytest.mark.parametrize("name", ["CausalSelfAttention", "MLP", "Block"])


def make(kind, *, weights=True, **options):
    layer_class, arguments, subtree, _ = CASES[kind]
    layer = layer_class(**arguments, **options)
    if weights:
        layer.set_weights(subtree)
    return layer


def inputs(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def expected(name, x):
    """What the reference gives for (B, T, C), row by row."""
    _, _, subtree, function = CASES[name]
    return np.stack([function(row.astype(np.float64), subtree) for row in x])


def largest_error(found, wanted):
    """Relative to the largest magnitude."""
    found = np.asarray(found).astype(np.float64)
    return np.abs(found - wanted).max() / np.abs(wanted).max()


# ---- numbers


@every_layer
@pytest.mark.parametrize("shape", [(2, 7, C), (1, 7, C), (3, 1, C), (1, 1, C)])
def test_equals_the_formula(name, shape):
    x = inputs(*shape)
    assert largest_error(make(name)(x), expected(name, x)) < 2e-6


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 1e4])
def test_layer_norm_adds_the_right_epsilon(scale):
    x = inputs(2, 7, C, scale=scale)
    assert largest_error(make("LayerNorm")(x), expected("LayerNorm", x)) < 2e-6


def test_layer_norm_of_constants_is_the_bias():
    for value in (0.0, 3.0, -1e6):
        assert np.asarray(make("LayerNorm")(np.full((1, 1, C), value, np.float32)))[0, 0] == pytest.approx(
            BLOCK["ln_1"]["b"], abs=1e-6
        )


GELU_INPUTS = np.array([-1e4, -100, -12, -6, -5.5, -3, -1, -1e-3, -1e-30, 0, 1e-30, 1e-3, 0.5, 2, 5.5, 12, 100, 1e4])


def test_gelu_is_the_tanh_form():
    x = np.concatenate([GELU_INPUTS, np.linspace(-6, 6, 1001)])
    assert np.abs(np.asarray(plain.gelu(tf.constant(x, tf.float32))) - reference.gelu(x)).max() < 1e-6


def test_the_gradient_of_gelu_is_finite_and_right():
    x = tf.constant(GELU_INPUTS, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = plain.gelu(x)
    step = 1e-6 * np.maximum(np.abs(GELU_INPUTS), 1)
    slope = (reference.gelu(GELU_INPUTS + step) - reference.gelu(GELU_INPUTS - step)) / (2 * step)
    assert tape.gradient(y, x).numpy() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("name", ["CausalSelfAttention", "Block"])
def test_later_positions_change_nothing(name):
    layer, x = make(name), inputs(2, 7, C)
    changed = np.concatenate([x[:, :4], 100 * inputs(2, 3, C, seed=1)], axis=1)
    np.testing.assert_array_equal(layer(x)[:, :4], layer(changed)[:, :4])
    assert not np.allclose(layer(x)[:, 4:], layer(changed)[:, 4:])


# ---- precision


@every_layer
@pytest.mark.parametrize(
    ("policy", "variables", "compute"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_bfloat16", "float32", "bfloat16"),
    ],
)
def test_a_policy_is_honoured(name, policy, variables, compute):
    layer = make(name, dtype=policy)
    x = inputs(2, 7, C)
    y = layer(x)
    assert y.dtype == compute
    assert {weight.dtype for weight in layer.weights} == {variables}
    # bfloat16 rounds by up to 2**-9; some rounding errors add up, more of them on a processor without bfloat16 units
    assert largest_error(y, expected(name, x)) < (2e-6 if compute == "float32" else 2**-5)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_layer_norm_computes_in_float32(policy):
    """All that bfloat16 may cost is the rounding of the result, and of the weights that are stored so."""
    n_embd = 257
    x = (5 + inputs(2, 7, n_embd)).astype(ml_dtypes.bfloat16)
    layer = LayerNorm(n_embd, dtype=policy)
    layer.set_weights({"g": 1 + inputs(n_embd, seed=1, scale=0.3), "b": inputs(n_embd, seed=2)})
    wanted = reference.layer_norm(x.astype(np.float64), layer.get_params())
    found = np.asarray(layer(x)).astype(np.float64)
    np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-4)


def test_softmax_computes_in_float32(monkeypatch):
    seen, softmax = [], tf.nn.softmax
    monkeypatch.setattr(tf.nn, "softmax", lambda x, *rest, **named: seen.append(x.dtype) or softmax(x, *rest, **named))
    make("CausalSelfAttention", dtype="bfloat16")(inputs(1, 3, C))
    assert seen == [tf.float32]


# ---- dropout


@with_dropout
def test_dropout_is_active_in_training_only(name):
    x = inputs(2, 7, C)
    layer = make(name, dropout=0.5)
    for silent in (layer(x), layer(x, training=False), make(name)(x, training=True)):
        np.testing.assert_array_equal(silent, make(name)(x))
    first, second = layer(x, training=True), layer(x, training=True)
    assert not np.allclose(first, make(name)(x))
    assert not np.allclose(first, second)


def test_dropout_in_attention_is_on_weights_and_on_the_output():
    # v is one for each position, so without dropout on the weights each position's output is the same
    params = map_leaves(lambda _, leaf: np.zeros_like(leaf), BLOCK["attn"])
    params["c_attn"]["b"][2 * C :] = 1
    params["c_proj"]["w"] = np.eye(C, dtype=np.float32)
    layer = CausalSelfAttention(C, H, 0.5)
    layer.set_weights(params)
    y = np.asarray(layer(np.zeros((1, 40, C), np.float32), training=True))
    assert 0.3 < np.mean(y == 0) < 0.7
    assert len(np.unique(y)) > 10
    assert y.mean() == pytest.approx(1, abs=0.2)


# ---- weights


@every_layer
@pytest.mark.parametrize("built", [False, True])
def test_the_subtree_comes_back_bit_for_bit(name, built, assert_same_bits):
    layer = make(name, weights=False)
    if built:
        layer(inputs(1, 2, C))
    layer.set_weights(CASES[name][2])
    assert_same_bits(layer.get_params(), CASES[name][2])


@every_layer
def test_a_flat_list_keeps_the_meaning_it_has_in_keras(name, assert_same_bits):
    source, target = make(name), make(name, weights=False)
    target.build((None, None, C))
    flat = source.get_weights()
    assert [array.shape for array in flat] == [tuple(weight.shape) for weight in source.weights]
    target.set_weights(flat)
    assert_same_bits(target.get_params(), CASES[name][2])
    with pytest.raises(ValueError, match=r"(?i)weights"):
        target.set_weights(flat[:-1])


@every_layer
def test_wrong_trees_are_refused_and_change_nothing(name, assert_same_bits):
    layer = make(name)
    subtree = map_leaves(lambda _, leaf: leaf + 1, CASES[name][2])
    flat = dict(leaves(subtree))
    last = list(flat)[-1]
    wrong = map_leaves(lambda path, leaf: leaf[:-1] if path == last else leaf, subtree)
    shape = flat[last].shape
    found = (shape[0] - 1, *shape[1:])
    with pytest.raises(ParamsError) as caught:
        layer.set_weights(wrong)
    assert str(caught.value) == f"wrong parameter tree: {last}: expected {shape}, got {found}"
    with pytest.raises(ParamsError, match="surplus: unexpected"):
        layer.set_weights({**subtree, "surplus": np.zeros(3, np.float32)})
    with pytest.raises(ParamsError, match="missing"):
        layer.set_weights(dict(list(subtree.items())[1:]))
    assert_same_bits(layer.get_params(), CASES[name][2])


# ---- Keras


@every_layer
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_keras_accepts_it_as_a_layer(name):
    testing = pytest.importorskip("keras.src.testing")
    case = testing.TestCase()
    case.setUp()
    layer_class, arguments, subtree, _ = CASES[name]
    case.run_layer_test(
        layer_class,
        init_kwargs=arguments,
        input_shape=(2, 5, C),
        expected_output_shape=(2, 5, arguments.get("n_out", C)),
        expected_num_trainable_weights=len(dict(leaves(subtree))),
        expected_num_non_trainable_weights=0,
        expected_num_losses=0,
    )


@every_layer
def test_a_config_makes_the_layer_again(name):
    options = {"dropout": 0.25} if name in ("CausalSelfAttention", "MLP", "Block") else {}
    layer = make(name, weights=False, dtype="mixed_bfloat16", name="mine", trainable=False, **options)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    for key, value in {**CASES[name][1], **options, "name": "mine", "trainable": False}.items():
        assert getattr(again, key) == layer.get_config()[key] == value
    assert again.dtype_policy.name == "mixed_bfloat16"


@every_layer
def test_a_symbolic_call_tells_the_true_shape_and_dtype(name):
    for policy in ("float32", "mixed_bfloat16"):
        layer = make(name, dtype=policy)
        symbol = keras.Input((None, C))
        model = keras.Model(symbol, layer(symbol))
        x = inputs(2, 5, C)
        y = model(x)
        assert (model.output.shape[2], model.output.dtype) == (y.shape[2], y.dtype.name)
        np.testing.assert_array_equal(y, layer(x))


def test_heads_must_divide_the_width():
    for layer_class in (CausalSelfAttention, Block):
        with pytest.raises(ValueError, match="n_head must divide n_embd, got n_head=5 and n_embd=12"):
            layer_class(C, 5)
