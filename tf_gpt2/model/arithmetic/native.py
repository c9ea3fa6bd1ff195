"""``xla``'s arithmetic, with products by 8-bit and 4-bit weights, and of a few rows by floats, from the native kernels.

By integers, each row is rounded to 8 bits, with one scale per 16 columns for 8-bit weights and per 32 for 4-bit ones. A
row in a batch is that row alone, bit for bit. See ``runtime/native/kernels.cc``.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.model.arithmetic import xla
from tf_gpt2.model.weights import AnyMatrix, Int4Matrix, Int8Matrix
from tf_gpt2.runtime.kernels import MOST_FLOAT_ROWS
from tf_gpt2.runtime.tf_internals import call_foreign

JIT_COMPILE, SORTS = xla.JIT_COMPILE, xla.SORTS

prepare, gather, norm, gelu, transpose_heads = xla.prepare, xla.gather, xla.norm, xla.gelu, xla.transpose_heads
attention_weights, weighted_sum = xla.attention_weights, xla.weighted_sum
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
