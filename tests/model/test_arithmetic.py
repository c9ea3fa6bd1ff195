"""Each kind of arithmetic against the textbook one, and that against the reference; for each type of weight."""

import ml_dtypes
import numpy as np
import pytest
import reference
import tensorflow as tf

from tf_gpt2.model.arithmetic import graph, native, plain, xla
from tf_gpt2.model.network import Network, network_of
from tf_gpt2.model.weights import Int4Matrix, Int8Matrix, Matrix, floats_of, quantize, quantize_4
from tf_gpt2.runtime import kernels

FASTER = {"xla": xla, "graph": graph}
if not kernels.why_missing() and not kernels.why_not_registered():
    FASTER["native"] = native
ALL = {"plain": plain, **FASTER}


def numbers(*shape, seed=0, dtype=tf.float32):
    return tf.cast(np.random.default_rng(seed).standard_normal(shape), dtype)


def run(ops, function, *args):
    """Runs as the arithmetic is meant to be run."""
    return tf.function(function, jit_compile=ops.JIT_COMPILE, autograph=False)(*args)


def matrix(kind, n_out, n_in):
    """A matrix of some type, and its values."""
    w = numbers(n_out, n_in, seed=9)
    if kind in ("int8", "int4"):
        quantized = Int8Matrix(*quantize(w)) if kind == "int8" else Int4Matrix(*quantize_4(w))
        return quantized, floats_of(quantized, n_in).numpy()
    if kind == "twin":
        return Matrix(w, transposed=tf.transpose(w)), w.numpy()
    value = tf.cast(w, kind)
    return Matrix(value), tf.cast(value, tf.float32).numpy()


def rounds_rows(ops, kind):
    """Whether a product rounds its rows to 8 bits."""
    return ops is native and kind in ("int8", "int4")


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "twin"])
@pytest.mark.parametrize("shape", [(1, 1, 12), (8, 1, 12), (3, 5, 12), (9, 12)], ids=str)
@pytest.mark.parametrize("n_out", [7, 60_000])
def test_a_product_is_that_of_the_values(n_out, shape, kind, ops):
    x, (w, values) = numbers(*shape), matrix(kind, n_out, 12)
    found = run(ops, lambda x, w: ops.product(x, ops.prepare(w)), x, w)
    wanted = x.numpy().astype(float) @ values.astype(float).T
    assert found.shape == wanted.shape
    bound = 0.01 if rounds_rows(ops, kind) else 1e-5
    np.testing.assert_allclose(found, wanted, atol=bound * np.abs(wanted).max())


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("n_rows", [1, 3, 16])
def test_a_product_in_bfloat16_is_within_its_rounding(n_rows, kind, ops):
    x, (w, values) = numbers(n_rows, 1, 40, dtype=tf.bfloat16), matrix(kind, 30, 40)
    found = run(ops, lambda x, w: ops.product(x, ops.prepare(w)), x, w)
    assert found.dtype == tf.bfloat16
    wanted = np.asarray(x).astype(float) @ values.astype(float).T
    np.testing.assert_allclose(tf.cast(found, tf.float32), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
def test_a_product_of_shapes_that_are_not_known(ops):
    w = numbers(7, 12)
    signature = [tf.TensorSpec((None, None, 12), tf.float32)]
    function = tf.function(lambda x: ops.product(x, Matrix(w)), input_signature=signature, jit_compile=ops.JIT_COMPILE)
    for shape in ((1, 1, 12), (2, 3, 12)):
        x = numbers(*shape)
        np.testing.assert_allclose(function(x), x.numpy() @ w.numpy().T, atol=1e-5)


@pytest.mark.parametrize("ops", [ops for ops in FASTER.values() if ops.JIT_COMPILE])
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_a_row_among_others_is_that_row_alone(kind, ops):
    """Bit for bit with kernels, and with 8-bit weights; otherwise up to rounding."""
    x, (w, _) = numbers(8, 1, 64), matrix(kind, 50, 64)
    together = run(ops, ops.product, x, w).numpy()
    alone = np.concatenate([run(ops, ops.product, x[row : row + 1], w) for row in range(8)])
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())
    assert not (rounds_rows(ops, kind) or kind == "int8") or np.array_equal(together, alone)


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
def test_a_product_keeps_rows_apart(ops):
    x, w = numbers(3, 1, 512).numpy().copy(), Matrix(numbers(graph.LARGE // 512, 512, seed=1))
    alone = run(ops, ops.product, tf.constant(x), w).numpy()
    x[1] = np.nan
    beside = run(ops, ops.product, tf.constant(x), w).numpy()
    assert np.array_equal(beside[[0, 2]], alone[[0, 2]])
    assert np.isnan(beside[1]).all()


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("n_queries", [1, 2])
def test_what_is_masked_has_no_weight_however_large_its_score(n_queries, ops):
    k = tf.reshape(tf.constant([1e30, -3.0, 2.0, 5e29]), (1, 4, 1))
    q = tf.ones((1, n_queries, 1))
    mask = tf.tile(tf.constant([[[False, True, True, False]]]), (1, n_queries, 1))
    weights = run(ops, ops.attention_weights, q, k, mask).numpy()
    np.testing.assert_array_equal(weights[~mask.numpy()], 0.0)
    np.testing.assert_allclose(weights[0, :, 1:3], [reference.softmax(np.array([-3.0, 2.0]))] * n_queries, rtol=1e-6)


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
def test_gelu_is_right_far_out_too(ops):
    x = np.array([-1e4, -100, -12, -6, -1e-30, 0, 1e-30, 5.5, 12, 100, 1e4])
    np.testing.assert_allclose(run(ops, ops.gelu, tf.constant(x, tf.float32)), reference.gelu(x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_norm_and_gelu_are_the_reference_s(dtype, ops):
    x = (numbers(3, 5, 12).numpy() * 20 - 3).astype(dtype)
    g, b = numbers(12, seed=1).numpy(), numbers(12, seed=2).numpy()
    atol = 1e-4 if dtype == np.float32 else 0.3
    found = run(ops, lambda x: ops.norm(x, g, b, 1e-5), x)
    np.testing.assert_allclose(
        tf.cast(found, tf.float32), reference.layer_norm(x.astype(float), {"g": g, "b": b}), atol=atol
    )
    found = run(ops, ops.gelu, x)
    np.testing.assert_allclose(tf.cast(found, tf.float32), reference.gelu(x.astype(float)), atol=atol)
    assert found.dtype == dtype


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("n_queries", [1, 4])
def test_attention_is_a_softmax_over_what_the_mask_shows(n_queries, ops):
    q, k, v = numbers(6, n_queries, 5), numbers(6, 7, 5, seed=1), numbers(6, 7, 5, seed=2)
    mask = tf.range(7) <= tf.reshape(tf.range(6 * n_queries) % 7, (6, n_queries, 1))

    def attend(q, k, v):
        weights = ops.attention_weights(q, k, mask)
        return weights, ops.weighted_sum(weights, v)

    weights, sums = run(ops, attend, q, k, v)
    scores = np.where(mask, q.numpy() @ np.swapaxes(k, 1, 2) / np.sqrt(5), -np.inf)
    np.testing.assert_allclose(weights, reference.softmax(scores), atol=1e-6)
    np.testing.assert_allclose(sums, reference.softmax(scores) @ v.numpy(), atol=1e-5)


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 4, 1, 5), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("is_known", [True, False])
def test_heads_are_transposed(is_known, shape, ops):
    x = numbers(*shape)
    signature = None if is_known else [tf.TensorSpec((None, None, None, shape[-1]))]
    transpose = tf.function(ops.transpose_heads, input_signature=signature, jit_compile=ops.JIT_COMPILE)
    np.testing.assert_array_equal(transpose(x), np.swapaxes(x, 1, 2))


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
def test_rows_are_looked_up_bit_for_bit(ops):
    for dtype in (tf.float32, tf.bfloat16, tf.int8):
        table = tf.cast(numbers(9, 4) * 50, dtype)
        np.testing.assert_array_equal(
            run(ops, ops.gather, table, tf.constant([[3, 0], [8, 3]])), np.asarray(table)[[[3, 0], [8, 3]]]
        )


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
def test_of_equal_values_the_first_is_the_largest(ops):
    x = tf.constant([[1.0, 3.0, 3.0], [-np.inf, -np.inf, -np.inf], [0.0, -0.0, 2.0]])
    assert run(ops, ops.first_largest, x).numpy().tolist() == [1, 0, 2]


def many(x):
    for _ in range(9):
        x = tf.sin(x)
    return x


def traced(ops):
    """A function with a branch of many operations."""

    def choose(is_taken, x):
        return tf.cond(is_taken, ops.branch(lambda: many(x)), lambda: x)

    specs = tf.TensorSpec((), tf.bool), tf.TensorSpec((None,), tf.float32)
    return tf.function(choose, autograph=False).get_concrete_function(*specs)


def test_a_branch_is_one_node_outside_of_xla():
    """Guards a speed that would be lost in silence."""
    definition = traced(graph).graph.as_graph_def()
    library = {one.signature.name: one for one in definition.library.function}
    (node,) = [node for node in definition.node if node.op in ("If", "StatelessIf")]
    nodes = [node for node in library[node.attr["then_branch"].func.name].node_def if node.op != "Identity"]
    assert [node.op.endswith("PartitionedCall") for node in nodes] == [True]
    assert library[nodes[0].attr["f"].func.name].attr["_noinline"].b


@pytest.mark.parametrize(("ops", "is_kept"), [(xla, True), (graph, False)], ids=["xla", "graph"])
def test_a_block_is_one_node_for_xla_alone(ops, is_kept):
    """Guards a speed that would be lost in silence: XLA is given such a function once for all its calls."""

    def blocks(x):
        run = ops.once(many)
        return run(run(x))

    traced = tf.function(blocks, autograph=False).get_concrete_function(tf.TensorSpec((3,), tf.float32))
    definition = traced.graph.as_graph_def()
    called = [node.attr["f"].func.name for node in definition.node if node.op.endswith("PartitionedCall")]
    assert len(called) == 2
    assert len(set(called)) == 1
    library = {one.signature.name: one for one in definition.library.function}
    assert library[called[0]].attr["_noinline"].b == is_kept


@pytest.mark.parametrize("ops", FASTER.values(), ids=FASTER)
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_branch_gives_what_it_gives(is_taken, ops):
    x = tf.constant([0.5, 2.0])
    np.testing.assert_allclose(traced(ops)(tf.constant(is_taken), x), many(x) if is_taken else x, rtol=1e-6)


# ---- the whole network


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_formulas_give_the_reference_s_logits(quantization, ops, odd_config, odd_params):
    from tf_gpt2.model.gpt2 import GPT2Model

    model = GPT2Model(odd_config, quantization=quantization)
    model.set_weights(odd_params)
    ids = np.random.default_rng(0).integers(0, odd_config.n_vocab, (2, 11))
    network = network_of(model, ops)

    def read_then_feed(ids):
        """All but the last four tokens at once, two at a time after them."""
        prepared = Network(ops.prepare(network.weights), odd_config, "float32", ops)
        hidden, cache = prepared.hidden_states(ids[:, :7])
        cache = tf.nest.map_structure(lambda part: ops.owned(tf.pad(part, [[0, 0], [0, 5], [0, 0]])), cache)
        logits = [prepared.logits(hidden)]
        for start in (7, 9):
            positions = tf.tile(tf.range(start, start + 2)[None], (2, 1))
            hidden, cache = prepared.hidden_states(ids[:, start : start + 2], positions, cache)
            logits.append(prepared.logits(hidden))
        return tf.concat(logits, axis=1)

    found = run(ops, read_then_feed, tf.constant(ids, tf.int32))
    for row, one in zip(ids, found, strict=True):
        wanted = reference.forward(model.get_params(), row, n_head=odd_config.n_head)
        bound = 0.05 if rounds_rows(ops, quantization) else 2e-5
        np.testing.assert_allclose(one, wanted, atol=bound * np.abs(wanted).max())
    if not rounds_rows(ops, quantization):
        np.testing.assert_allclose(found, model(ids), atol=1e-3)
