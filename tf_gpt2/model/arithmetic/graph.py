"""The arithmetic that is fast in TensorFlow without XLA: few operations, and small ones without oneDNN.

The values are those of ``plain``, up to rounding. A oneDNN kernel takes some 50 microseconds to start, so small work is
done by operations that oneDNN has no kernel of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gpt2.model.arithmetic import plain, xla
from tf_gpt2.model.arithmetic.shapes import reshape_target, shape_of
from tf_gpt2.model.weights import Int4Matrix, Int8Matrix, LoraMatrix, Matrix, dequantize, dequantize_4
from tf_gpt2.runtime.tf_internals import not_inlined, owned_copy, write_in_place

JIT_COMPILE = False
SORTS = True

LARGE = 2**19
"""Weights with at least this many elements go on the left of the product, where oneDNN is faster.

Measured: ``python -m benchmarks.serving``, Intel Sapphire Rapids, 2026-11.
"""

gather, norm, owned, branch = plain.gather, plain.norm, owned_copy, not_inlined
first_largest, needs_twins = plain.first_largest, plain.needs_twins


def prepare(weights: Any) -> Any:
    """Converts 8-bit and 4-bit matrices to float32 ones, once before a loop instead of at each of its steps."""
    if isinstance(weights, Int8Matrix):
        return Matrix(dequantize(weights.value, weights.scale))
    if isinstance(weights, Int4Matrix):
        return Matrix(dequantize_4(weights.value, weights.scale))
    if isinstance(weights, LoraMatrix):
        return weights._replace(base=prepare(weights.base))
    if isinstance(weights, dict):
        return {name: prepare(part) for name, part in weights.items()}
    return [prepare(part) for part in weights] if isinstance(weights, list) else weights


def product(x: tf.Tensor, w: Matrix) -> tf.Tensor:
    """Computes ``x @ w.T``.

    oneDNN is up to 2.5 times as fast with a large matrix on the left. With a small one, transposing the result takes
    longer than the product.
    """
    rows, value = tf.reshape(x, (-1, x.shape[-1])), tf.cast(w.value, x.dtype)
    if value.shape[1] > rows.shape[1]:  # the zeros that fill a 4-bit matrix's last group
        value = value[:, : rows.shape[1]]
    if rows.shape[0] == 1 or value.shape.num_elements() < LARGE:
        y = tf.matmul(rows, value, transpose_b=True)
    else:
        y = tf.transpose(tf.matmul(value, rows, transpose_b=True))
    return tf.reshape(y, (*reshape_target(x)[:-1], value.shape[0]))


def gelu(x: tf.Tensor) -> tf.Tensor:
    """Computes gelu's tanh form as the equal ``x * sigmoid(2 u)``, which takes fewer operations."""
    wide = tf.cast(x, tf.float32)
    slope = math.sqrt(2 / math.pi)
    return tf.cast(wide * tf.sigmoid(wide * (2 * slope + 2 * slope * 0.044715 * tf.square(wide))), x.dtype)


def transpose_heads(x: tf.Tensor) -> tf.Tensor:
    """Transposes (B, T, H, D) to (B, H, T, D) by ``space_to_batch``, which has no oneDNN kernel to start."""
    n_rows, n_first, n_second, width = shape_of(x)
    if 1 in (x.shape[1], x.shape[2]):  # an axis of size 1: the numbers keep their order
        return tf.reshape(x, (-1, n_second, n_first, width))
    one_batch = tf.reshape(x, (1, n_rows, n_first * n_second, width))
    blocks = tf.space_to_batch(one_batch, [tf.maximum(n_rows, 1), n_second], tf.zeros((2, 2), tf.int32))
    return tf.reshape(blocks, (n_rows, n_second, n_first, width))


def attention_weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes softmax(q k' / sqrt(D)).

    The mask is added as 0 or the lowest float: that term depends on the mask alone, so it is computed once for all
    layers.
    """
    scores = attention_matmul(tf.cast(q, k.dtype), k, transpose_b=True)
    scores = tf.cast(scores, tf.float32) / math.sqrt(q.shape[-1]) + tf.where(mask, 0.0, tf.float32.min)
    return tf.nn.softmax(scores) if q.shape[-2] != 1 else tf.exp(tf.nn.log_softmax(scores))


def weighted_sum(weights: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    """Sums values (N, S, D) by their weights (N, T, S)."""
    return attention_matmul(tf.cast(weights, v.dtype), v)


def attention_matmul(a: tf.Tensor, b: tf.Tensor, *, transpose_b: bool = False) -> tf.Tensor:
    """Computes ``tf.matmul``; for one row, (..., 1, n), by ``BatchMatMulV3``, which has no oneDNN kernel to start."""
    if a.shape[-2] != 1:
        return tf.matmul(a, b, transpose_b=transpose_b)
    return tf.raw_ops.BatchMatMulV3(x=a, y=b, Tout=a.dtype, adj_x=False, adj_y=transpose_b)


def places(positions: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Returns the place of each entry in the cache, seen as a list of N*S entries: int32 (N, T) -> int32 (N*T,).

    Positions are clipped to S - 1: the entry behind a row's last one is the next row's first.
    """
    n_rows, n_slots, _ = shape_of(like)
    firsts = tf.expand_dims(tf.range(n_rows) * n_slots, 1)  # (N, 1)
    return tf.reshape(firsts + tf.minimum(positions, n_slots - 1), [-1])


def write(part: tf.Tensor, new: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Writes entries (N, T, D) into the memory of keys or values (N, S, D), which ``owned`` must have returned."""
    entries, new = (tf.reshape(x, (-1, part.shape[-1])) for x in (part, tf.cast(new, part.dtype)))
    written = tf.reshape(write_in_place(entries, places, new), tf.shape(part))
    written.set_shape(part.shape)
    return written


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a block's function so that it is traced once; TensorFlow inlines its graph into each block."""
    return function if tf.executing_eagerly() else xla.with_tensors(tf.function(function, autograph=False))
