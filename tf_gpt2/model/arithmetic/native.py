"""``xla``'s arithmetic, with products by 8-bit and 4-bit weights from the native kernels.

Each row is rounded to 8 bits, with one scale per 16 columns for 8-bit weights and per 32 for 4-bit ones, and multiplied
in integers. A row in a batch is that row alone, bit for bit. See ``runtime/native/kernels.cc``.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.model.arithmetic import xla
from tf_gpt2.model.weights import AnyMatrix, Int4Matrix, Int8Matrix
from tf_gpt2.runtime.tf_internals import call_foreign

JIT_COMPILE, SORTS = xla.JIT_COMPILE, xla.SORTS

prepare, gather, norm, gelu, transpose_heads = xla.prepare, xla.gather, xla.norm, xla.gelu, xla.transpose_heads
attention_weights, weighted_sum = xla.attention_weights, xla.weighted_sum
places, write, owned, first_largest = xla.places, xla.write, xla.owned, xla.first_largest
once, branch = xla.once, xla.branch


def product(x: tf.Tensor, w: AnyMatrix) -> tf.Tensor:
    """Computes ``x @ w.T``; products by float matrices, and of shapes that are not known, are XLA's."""
    if not isinstance(w, Int8Matrix | Int4Matrix) or None in x.shape:
        return xla.product(x, w)
    rows = tf.cast(tf.reshape(x, (-1, x.shape[-1])), tf.float32)
    name, scale = "tf_gpt2_product_4_v1", tf.convert_to_tensor(w.scale)
    if isinstance(w, Int8Matrix):
        name, scale = "tf_gpt2_product_8_v1", scale[None]
    value = tf.convert_to_tensor(w.value)
    y = call_foreign(name, (rows, value, scale), (rows.shape[0], value.shape[0]))
    return tf.cast(tf.reshape(y, (*x.shape[:-1], value.shape[0])), x.dtype)
