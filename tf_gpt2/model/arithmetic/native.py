"""``xla``'s arithmetic, with native kernels for most of what a step of decoding computes.

They are products by 8-bit and 4-bit weights, products of a few rows by floats, and attention of a few new positions. By
integers, each row is rounded to 8 bits, with one scale per 16 columns for 8-bit weights and per 32 for 4-bit ones. A
row in a batch is that row alone, bit for bit. See ``runtime/native/kernels.cc``.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.model.arithmetic import xla
from tf_gpt2.model.weights import AnyMatrix, Int4Matrix, Int8Matrix
from tf_gpt2.runtime.kernels import MOST_FLOAT_ROWS, MOST_POSITIONS
from tf_gpt2.runtime.tf_internals import call_foreign

JIT_COMPILE, SORTS = xla.JIT_COMPILE, xla.SORTS

prepare, gather, norm, gelu, transpose_heads = xla.prepare, xla.gather, xla.norm, xla.gelu, xla.transpose_heads
places, write, owned, first_largest = xla.places, xla.write, xla.owned, xla.first_largest
once, branch = xla.once, xla.branch


def needs_twins(n_rows: int, dtype: str) -> bool:
    """Whether products need transposed twins to be fast: not where the kernels read each weight once for all rows."""
    return xla.needs_twins(n_rows, dtype) and (n_rows > MOST_FLOAT_ROWS or dtype != "float32")


def product(x: tf.Tensor, w: AnyMatrix) -> tf.Tensor:
    """Computes ``x @ w.T``; products of many floats, of bfloat16, and of shapes that are not known are XLA's."""
    if None in x.shape:
        return xla.product(x, w)
    rows = tf.reshape(x, (-1, x.shape[-1]))
    value = tf.convert_to_tensor(w.value)
    if isinstance(w, Int8Matrix):
        y = multiply("tf_gpt2_product_8_v1", rows, value, tf.convert_to_tensor(w.scale)[None])
    elif isinstance(w, Int4Matrix):
        y = multiply("tf_gpt2_product_4_v1", rows, value, tf.convert_to_tensor(w.scale))
    elif rows.dtype == value.dtype == tf.float32 and rows.shape[0] <= MOST_FLOAT_ROWS:
        y = multiply("tf_gpt2_product_f_v1", rows, value)
    else:
        return xla.product(x, w)
    return tf.reshape(y, (*x.shape[:-1], value.shape[0]))


def multiply(kernel: str, rows: tf.Tensor, value: tf.Tensor, *scale: tf.Tensor) -> tf.Tensor:
    """Calls a kernel: floats (R, n_in), a matrix of n_out rows -> (R, n_out) in the dtype of the rows."""
    y = call_foreign(kernel, (tf.cast(rows, tf.float32), value, *scale), (rows.shape[0], value.shape[0]))
    return tf.cast(y, rows.dtype)


def attention_weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes softmax(q k' / sqrt(D)); of a few positions over a cache by a kernel, which reads only keys in sight."""
    shapes = (*q.shape, *k.shape, *mask.shape)
    if None in shapes or q.shape[1] > MOST_POSITIONS or k.dtype != tf.float32:
        return xla.attention_weights(q, k, mask)
    inputs = (tf.cast(q, tf.float32), k, mask)
    return call_foreign("tf_gpt2_attention_weights_v1", inputs, (*q.shape[:2], k.shape[1]))


def weighted_sum(weights: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    """Sums values by their weights; for a few positions by a kernel, which reads only values that have one."""
    if None in (*weights.shape, *v.shape) or weights.shape[1] > MOST_POSITIONS or v.dtype != tf.float32:
        return xla.weighted_sum(weights, v)
    return call_foreign("tf_gpt2_weighted_sum_v1", (weights, v), (*weights.shape[:2], v.shape[2]))
