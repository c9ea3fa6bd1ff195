"""The arithmetic that decides the speed: the matrix product, and what feeds it.

XLA fuses a cheap element-wise operation into the product that consumes it and then computes it again for every output
row, which halves the speed of a whole model. It never duplicates an expensive operation, and a float division counts as
one. So each vector that feeds a product here ends in a true division. The values are those of the usual formulas.
"""

from __future__ import annotations

import math

import tensorflow as tf

from tf_gpt2.model.loops import copy_of, is_plain, loop_around, value_in_loop

LARGE = 2**19
"""Numbers in a weight from which on ``plain_product`` puts it first."""

MOST_ROWS_APART = 8
"""Rows for which a loop that XLA compiles rather reads an 8-bit weight once for each than makes floats of it."""


def product(x: tf.Tensor, w: tf.Tensor, scale: tf.Tensor | None = None) -> tf.Tensor:
    """Multiplies by a transposed weight: ``x @ w.T``.

    Args:
        x: floats (..., n_in).
        w: floats (n_out, n_in), cast to the dtype of ``x``; or int8, with a scale.
        scale: float32 (n_out,), what each row of an int8 weight is to be multiplied by.

    Returns:
        Floats (..., n_out), of the dtype of ``x``.
    """
    n_out, n_in = w.shape
    has_rows = len(x.shape) == 2
    rows = x if has_rows else tf.reshape(x, (-1, n_in))
    loop, copy = loop_around(), copy_of(w)
    if is_plain():
        y = plain_product(rows, value_in_loop(w) if copy is None else copy)
    elif rows.shape[0] == 1:
        y = one_row_product(rows, w)
    elif loop and w.dtype == tf.int8 and rows.shape[0] in range(2, MOST_ROWS_APART + 1):
        y = row_by_row(rows, w)
    elif w.dtype == tf.int8:
        y = tf.matmul(rows, tf.cast(cast_late(w, rows), x.dtype), transpose_b=True)
    elif loop:
        transposed = transposed_once(w, x.dtype) if copy is None else copy
        y = tf.cast(tf.matmul(tf.cast(rows, tf.float32), transposed), x.dtype)
    else:
        y = tf.matmul(rows, tf.cast(w, x.dtype), transpose_b=True)
    y = y if scale is None else y * tf.cast(scale, x.dtype)
    return y if has_rows else tf.reshape(y, (*shape_again(x)[:-1], n_out))


def shape_of(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Gives a shape in numbers where they are known; where not, as tensors, each of which is more to trace."""
    sizes = tf.shape(x) if None in x.shape else x.shape
    return [sizes[axis] if size is None else size for axis, size in enumerate(x.shape)]


def shape_again(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Gives a shape for ``tf.reshape``: -1 for a size that is the only unknown one, which computes nothing."""
    sizes = [-1 if size is None else size for size in x.shape]
    return sizes if sizes.count(-1) <= 1 else shape_of(x)


def one_row_product(row: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Multiplies one row, (1, n_in), in float32, and reads each weight once and as it is stored."""
    x = tf.cast(row, tf.float32)
    if w.dtype != tf.float32:
        return tf.cast(tf.matmul(x, cast_late(w, x), transpose_b=True), row.dtype)
    # XLA runs a one-row product on one core; two halves run side by side.
    half = w.shape[0] // 2
    parts = tf.split(w, (half, w.shape[0] - half))
    y = tf.concat([tf.matmul(x, part, transpose_b=True) for part in parts], axis=-1)
    return tf.cast(y, row.dtype)


def row_by_row(rows: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Multiplies few rows, (B, n_in), one after the other, each as if it were alone."""
    # a loop: of products beside each other XLA compiles each
    y = tf.map_fn(lambda row: one_row_product(row[None], w)[0], rows)
    return tf.ensure_shape(y, (rows.shape[0], w.shape[0]))


def plain_product(rows: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Multiplies few rows, (B, n_in), outside of XLA.

    oneDNN is up to 2.5 times as fast with a large matrix first; a small one is multiplied in less time than it takes to
    transpose the outcome.
    """
    w = tf.cast(cast_late(w, rows) if w.dtype == tf.int8 else w, rows.dtype)
    if rows.shape[0] == 1 or w.shape.num_elements() < LARGE:
        return tf.matmul(rows, w, transpose_b=True)
    return tf.transpose(tf.matmul(w, rows, transpose_b=True))


def swap_middle(x: tf.Tensor) -> tf.Tensor:
    """Takes (B, T, H, D) to (B, H, T, D); in a plain loop without oneDNN, which takes some 50 microseconds to begin.

    "Space to batch" is a transposition that oneDNN has no kernel of.
    """
    if not is_plain():
        return tf.transpose(x, (0, 2, 1, 3))
    n_rows, n_first, n_second, width = shape_of(x)
    one_batch = tf.reshape(x, (1, n_rows, n_first * n_second, width))
    blocks = tf.space_to_batch(one_batch, [tf.maximum(n_rows, 1), n_second], tf.zeros((2, 2), tf.int32))
    return tf.reshape(blocks, (n_rows, n_second, n_first, width))


def small_product(a: tf.Tensor, b: tf.Tensor, *, transpose_b: bool = False) -> tf.Tensor:
    """Computes ``tf.matmul``; of one row, (..., 1, n), without oneDNN, which takes some 50 microseconds to begin."""
    if a.shape[-2] != 1:
        return tf.matmul(a, b, transpose_b=transpose_b)
    return tf.raw_ops.BatchMatMulV3(x=a, y=b, Tout=a.dtype, adj_x=False, adj_y=transpose_b)


def masked(scores: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Hides scores from a softmax where a mask is false: float32 (N, T, S), bool (N or 1, T, S).

    In a plain loop by adding what depends on the mask alone, which TensorFlow computes once for all layers.
    """
    if is_plain():
        return scores + tf.where(mask, 0.0, tf.float32.min)
    return tf.where(mask, scores, tf.float32.min)


def softmax(x: tf.Tensor) -> tf.Tensor:
    """Computes ``tf.nn.softmax``; of one row, (..., 1, n), without oneDNN too, which has no kernel of its logarithm."""
    if x.shape[-2] != 1:
        return tf.nn.softmax(x)
    if is_plain():
        return tf.exp(tf.nn.log_softmax(x))
    powers = tf.exp(x - tf.reduce_max(x, axis=-1, keepdims=True))
    return powers / tf.reduce_sum(powers, axis=-1, keepdims=True)


def transposed_once(w: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Transposes a weight such that XLA does so before the loop: a product of a few rows is 1.5 times as fast then.

    XLA would fold a bare transposition back into the product. So a minimum that changes nothing is put behind it; as it
    depends on nothing in the loop, XLA moves both out. The price is a second copy of the weights during the loop.
    """
    return tf.minimum(tf.transpose(tf.cast(tf.cast(w, dtype), tf.float32)), tf.float32.max)


def cast_late(w: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Casts a weight to float32 such that XLA does so only when it multiplies ``x`` by it.

    A cast that depends on nothing else is made too early: before a loop, or all layers' at once, which is a float
    copy of all weights. So it is made to depend on ``x``, by an exclusive or with a zero that XLA does not know to be
    one. With one row XLA fuses such a cast into the product; with several, one matrix at a time is float.
    """
    zero = tf.minimum(tf.abs(tf.reshape(x, [-1])[0]), 0.0)
    if w.dtype == tf.int8:
        return tf.cast(tf.bitwise.bitwise_xor(w, tf.cast(zero, tf.int8)), tf.float32)
    bits = tf.bitwise.bitwise_xor(tf.bitcast(w, tf.uint16), tf.cast(zero, tf.uint16))
    return tf.cast(tf.bitcast(bits, w.dtype), tf.float32)


def normalize(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, *, eps: float) -> tf.Tensor:
    """Computes ``(x - mean) / sqrt(var + eps) * g + b`` over the last axis, as one division.

    Args:
        x: float32 (..., C).
        g: float32 (C,), the gain.
        b: float32 (C,), the bias.
        eps: added to the biased variance.

    In a plain loop without the one division, which takes more operations.

    Source: Ba et al. 2016, "Layer Normalization".
    """
    mean = tf.reduce_mean(x, axis=-1, keepdims=True)
    centred = x - mean
    if is_plain():
        return centred * tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + eps) * g + b
    std = tf.sqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * g + b * std) / std


def gelu(x: tf.Tensor) -> tf.Tensor:
    """Computes gelu's tanh form, ``x / 2 * (1 + tanh(u))``, as the equal ``x / (1 + exp(-2 u))``; in float32.

    In a plain loop with fewer operations.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; openai/gpt-2, ``src/model.py``, ``gelu``.
    """
    dtype = x.dtype
    x = tf.cast(x, tf.float32)
    slope = math.sqrt(2 / math.pi)
    if is_plain():
        return tf.cast(x * tf.sigmoid(x * (2 * slope + 2 * slope * 0.044715 * tf.square(x))), dtype)
    u = slope * (x + 0.044715 * x * x * x)
    # Beyond 80 the quotient is 0 in float32 anyway, and exp's overflow would make the gradient NaN.
    return tf.cast(x / (1.0 + tf.exp(tf.minimum(-2.0 * u, 80.0))), dtype)
