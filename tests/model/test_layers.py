"""Each layer against its formula in float64, as a citizen of Keras, and with its subtree of the parameters."""

import contextlib

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
from tf_gpt2.model.layers import MLP, Block, CausalSelfAttention, LayerNorm, Linear
from tf_gpt2.model.loops import compiled_loop, plain_loop
from tf_gpt2.model.products import (
    LARGE,
    MOST_ROWS_APART,
    gelu,
    masked,
    normalize,
    product,
    small_product,
    softmax,
    swap_middle,
)

C, H = 12, 3
BLOCK = lively_params(GPT2Config(n_vocab=1, n_ctx=1, n_embd=C, n_head=H, n_layer=1))["blocks"][0]
# class, arguments, its part of the parameters, the formula
CASES = {
    "Linear": (Linear, {"n_in": C, "n_out": 4 * C}, BLOCK["mlp"]["c_fc"], reference.linear),
    "LayerNorm": (LayerNorm, {"n_embd": C}, BLOCK["ln_1"], reference.layer_norm),
    "CausalSelfAttention": (
        CausalSelfAttention,
        {"n_embd": C, "n_head": H},
        BLOCK["attn"],
        lambda params, x: reference.attention(params, x, n_head=H),
    ),
    "MLP": (MLP, {"n_embd": C}, BLOCK["mlp"], reference.mlp),
    "Block": (
        Block,
        {"n_embd": C, "n_head": H},
        BLOCK,
        lambda params, x: reference.transform(params, x, n_head=H),
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
    return np.stack([function(subtree, row.astype(np.float64)) for row in x])


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


@pytest.mark.parametrize("n_out", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_one_row_is_multiplied_as_several_are(n_rows, n_out):
    x, w = inputs(n_rows, 5), inputs(n_out, 5, seed=1)
    assert np.asarray(product(x, tf.constant(w))) == pytest.approx(x @ w.T, abs=1e-5)


@pytest.mark.parametrize("n_out", [64, LARGE // 512, LARGE // 512 - 1])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, None])
def test_each_kind_of_loop_multiplies_alike(n_rows, n_out):
    x, w = inputs(n_rows or 3, 512), tf.Variable(inputs(n_out, 512, seed=1))
    x = x[:n_rows]

    def multiply(x):
        return product(x, w)

    for loop in (compiled_loop(), plain_loop([w])):
        with loop:
            found = tf.function(multiply, input_signature=[tf.TensorSpec([n_rows, 512])])(x)
        assert found.numpy() == pytest.approx(x @ w.numpy().T, abs=1e-3)


@pytest.mark.parametrize("n_rows", [2, MOST_ROWS_APART, MOST_ROWS_APART + 1])
def test_a_compiled_loop_multiplies_rows_by_8_bits_as_one_alone(n_rows):
    x, w = inputs(n_rows, 64), tf.Variable(np.random.default_rng(1).integers(-127, 128, (50, 64)).astype(np.int8))
    scale = inputs(50, seed=2)
    with compiled_loop():
        multiply = tf.function(lambda x: product(x, w, scale), jit_compile=True)
        together = multiply(x).numpy()
        alone = np.concatenate([multiply(x[row : row + 1]) for row in range(n_rows)])
    assert together == pytest.approx(x @ (w.numpy() * scale[:, None]).T, rel=1e-4, abs=1e-3)
    assert n_rows > MOST_ROWS_APART or np.array_equal(together, alone)


def test_a_plain_loop_keeps_rows_apart():
    x, w = inputs(3, 512), tf.Variable(inputs(LARGE // 512, 512, seed=1))
    with plain_loop([w]):
        alone = product(x, w).numpy()
        x[1] = np.nan
        beside = product(x, w).numpy()
    assert np.array_equal(beside[[0, 2]], alone[[0, 2]])
    assert np.isnan(beside[1]).all()


def test_a_plain_loop_has_formulas_of_its_own_for_the_same_functions():
    """They take fewer operations; against float64, far out as well."""
    x, g, b = 9 * inputs(4, 1, 30), inputs(30, seed=1), inputs(30, seed=2)
    x[0, 0, :4] = -1e4, 1e4, 60, -60
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    wanted = {
        gelu: wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))),
        softmax: powers / powers.sum(-1, keepdims=True),
        normalize: centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * g + b,
    }
    with plain_loop([]):
        found = {gelu: gelu(x), softmax: softmax(tf.constant(x)), normalize: normalize(x, g, b, eps=1e-5)}
    for function, values in wanted.items():
        np.testing.assert_allclose(found[function], values, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loop", [contextlib.nullcontext, lambda: plain_loop([])], ids=["elsewhere", "plain loop"])
def test_what_is_masked_has_no_weight_however_large_its_score(loop):
    scores = tf.constant([[[1e30, -3.0, 2.0, 5e29]], [[-1e30, 4.0, -1e30, 1e30]]])
    mask = tf.constant([[[False, True, True, False]], [[False, True, False, False]]])
    with loop():
        weights = softmax(masked(scores, mask)).numpy()
    np.testing.assert_array_equal(weights[~mask.numpy()], 0.0)
    np.testing.assert_allclose(weights[0, 0, 1:3], reference.softmax(np.array([-3.0, 2.0])), rtol=1e-6)
    assert weights[1, 0, 1] == 1


@pytest.mark.parametrize("n_out", [50, LARGE // 512])
def test_without_copies_a_plain_loop_multiplies_by_8_bits_too(n_out):
    x, w = inputs(3, 512), tf.Variable(np.random.default_rng(1).integers(-127, 128, (n_out, 512)).astype(np.int8))
    scale = inputs(n_out, seed=2)
    with plain_loop([]):
        found = tf.function(lambda x: product(x, w, scale))(x).numpy()
    assert found == pytest.approx(x @ (w.numpy() * scale[:, None]).T, rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 4, 5), (None, None, 4, 5)])
def test_a_plain_loop_swaps_heads_and_positions_as_elsewhere(shape, dtype):
    x = tf.cast(inputs(*(size if size is not None else 3 for size in shape)), dtype)
    with plain_loop([]):
        found = tf.function(lambda x: swap_middle(x), input_signature=[tf.TensorSpec(shape, dtype)])(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(tf.cast(found, tf.float32), tf.cast(x, tf.float32).numpy().transpose(0, 2, 1, 3))


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_small_products_and_their_gradients(n_rows, transpose_b):
    a = tf.constant(inputs(4, n_rows, 5))
    b = tf.constant(inputs(4, *((6, 5) if transpose_b else (5, 6)), seed=1))

    def with_gradients(multiply):
        with tf.GradientTape() as tape:
            tape.watch((a, b))
            y = multiply(a, b, transpose_b=transpose_b)
            loss = tf.reduce_sum(tf.sin(y))
        return y, *tape.gradient(loss, (a, b))

    for found, wanted in zip(with_gradients(small_product), with_gradients(tf.matmul), strict=True):
        assert found.numpy() == pytest.approx(wanted.numpy(), abs=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2])
def test_softmax_of_masked_and_large_numbers(n_rows):
    x = inputs(2, n_rows, 7, scale=100)
    x[0, :, 3:] = np.finfo(np.float32).min
    assert softmax(tf.constant(x)).numpy() == pytest.approx(reference.softmax(x.astype(np.float64)), abs=1e-6)


GELU_INPUTS = np.array([-1e4, -100, -12, -6, -5.5, -3, -1, -1e-3, -1e-30, 0, 1e-30, 1e-3, 0.5, 2, 5.5, 12, 100, 1e4])


def test_gelu_is_the_tanh_form():
    x = np.concatenate([GELU_INPUTS, np.linspace(-6, 6, 1001)])
    assert np.abs(np.asarray(gelu(tf.constant(x, tf.float32))) - reference.gelu(x)).max() < 1e-6


def test_the_gradient_of_gelu_is_finite_and_right():
    x = tf.constant(GELU_INPUTS, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = gelu(x)
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
    # bfloat16 rounds by up to 2**-9; some rounding errors add up
    assert largest_error(y, expected(name, x)) < (2e-6 if compute == "float32" else 2**-6)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_layer_norm_computes_in_float32(policy):
    """All that bfloat16 may cost is the rounding of the result, and of the weights that are stored so."""
    n_embd = 257
    x = (5 + inputs(2, 7, n_embd)).astype(ml_dtypes.bfloat16)
    layer = LayerNorm(n_embd, dtype=policy)
    layer.set_weights({"g": 1 + inputs(n_embd, seed=1, scale=0.3), "b": inputs(n_embd, seed=2)})
    wanted = reference.layer_norm(layer.get_params(), x.astype(np.float64))
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
