"""The arithmetic that XLA compiles well for a CPU. The values are those of ``plain``, up to rounding.

XLA fuses a cheap element-wise operation into the product that consumes it and then computes it again for every output
row, which halves the speed of a whole model. It never duplicates an expensive operation, and a float division counts as
one. So each vector that feeds a product here ends in a true division.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.arithmetic.shapes import reshape_target
from tf_gpt2.model.weights import AnyMatrix, Int4Matrix, Int8Matrix, Matrix, dequantize_4
from tf_gpt2.runtime.tf_internals import not_inlined

JIT_COMPILE = True
SORTS = False

MOST_ROWS_APART = 8
"""Up to this many rows, an int8 weight is read once per row instead of being converted to float32 first.

Measured: ``python -m benchmarks.compare``, AMD EPYC (AVX-512) and Intel Sapphire Rapids, 2026-11.
"""

prepare, transpose_heads, weighted_sum = plain.prepare, plain.transpose_heads, plain.weighted_sum
places, write, owned, branch = plain.places, plain.write, plain.owned, plain.branch


def needs_twins(n_rows: int, dtype: str) -> bool:
    """Whether products need transposed twins to be fast: those of several rows take 1.5 times as long without."""
    return n_rows > 1


def gather(table: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Looks up rows; a bfloat16 table is read as uint16 bits, because XLA would first convert all of it to float32."""
    table = tf.convert_to_tensor(table)
    if table.dtype != tf.bfloat16:
        return tf.gather(table, rows)
    return tf.bitcast(tf.gather(tf.bitcast(table, tf.uint16), rows), tf.bfloat16)


def product(x: tf.Tensor, w: AnyMatrix) -> tf.Tensor:
    """Computes ``x @ w.T`` in the way that is fastest for the type of weight and the number of rows."""
    rows = tf.reshape(x, (-1, x.shape[-1]))
    y = PRODUCTS[type(w)](rows, w)
    return tf.reshape(y, (*reshape_target(x)[:-1], y.shape[-1]))


def float_product(rows: tf.Tensor, w: Matrix) -> tf.Tensor:
    """Multiplies floats (R, n_in) by a float matrix."""
    if rows.shape[0] == 1:
        return one_row_product(rows, tf.convert_to_tensor(w.value))
    if w.transposed is not None:
        return tf.cast(tf.matmul(tf.cast(rows, tf.float32), w.transposed), rows.dtype)
    # XLA has fast products of bfloat16 numbers only if they are summed in float32
    y = tf.matmul(rows, tf.cast(w.value, rows.dtype), transpose_b=True, output_type=tf.float32)
    return tf.cast(y, rows.dtype)


def int8_product(rows: tf.Tensor, w: Int8Matrix) -> tf.Tensor:
    """Multiplies floats (R, n_in) by an 8-bit matrix, then by its scales."""
    value = tf.convert_to_tensor(w.value)
    if rows.shape[0] == 1:
        y = one_row_product(rows, value)
    elif rows.shape[0] in range(2, MOST_ROWS_APART + 1):
        # map_fn, because XLA would compile one kernel per unrolled product
        y = tf.map_fn(lambda row: one_row_product(row[None], value)[0], rows)
        y = tf.ensure_shape(y, (rows.shape[0], value.shape[0]))
    else:
        y = tf.matmul(rows, tf.cast(cast_late(value, rows), rows.dtype), transpose_b=True)
    return y * tf.cast(w.scale, rows.dtype)


def int4_product(rows: tf.Tensor, w: Int4Matrix) -> tf.Tensor:
    """Multiplies floats (R, n_in) by a 4-bit matrix, which is converted to float32 when its turn comes."""
    value = cast_late(tf.convert_to_tensor(w.value), rows)
    matrix = dequantize_4(value, w.scale)[:, : rows.shape[1]]
    return tf.cast(tf.matmul(tf.cast(rows, tf.float32), matrix, transpose_b=True), rows.dtype)


def one_row_product(row: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Multiplies one row, (1, n_in), in float32; reads each weight once, in the dtype in which it is stored."""
    x = tf.cast(row, tf.float32)
    if w.dtype != tf.float32:
        return tf.cast(tf.matmul(x, cast_late(w, x), transpose_b=True), row.dtype)
    # XLA runs a one-row product on one core; two halves run side by side.
    half = w.shape[0] // 2
    parts = tf.split(w, (half, w.shape[0] - half))
    y = tf.concat([tf.matmul(x, part, transpose_b=True) for part in parts], axis=-1)
    return tf.cast(y, row.dtype)


PRODUCTS: dict[type, Callable[[tf.Tensor, Any], tf.Tensor]] = {
    Matrix: float_product,
    Int8Matrix: int8_product,
    Int4Matrix: int4_product,
}


def cast_late(w: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Casts a weight to float32 so late that XLA does it only while it multiplies ``x`` by the weight; 4 bits stay.

    XLA moves a cast that depends on the weight alone before the loop, or casts all layers' weights at once: both make
    a float copy of all weights. So this cast depends on ``x``, too: the bits are xored with a zero that XLA cannot
    prove to be zero. With one row XLA fuses the cast into the product; with several, one matrix at a time is float.

    Test: ``tests/generation/test_cache.py``, the compiled loop copies neither cache nor weights.
    """
    zero = tf.minimum(tf.abs(tf.reshape(x, [-1])[0]), 0.0)
    if w.dtype == tf.uint8:  # 4-bit numbers, which `dequantize_4` casts
        return tf.bitwise.bitwise_xor(w, tf.cast(zero, tf.uint8))
    if w.dtype == tf.int8:
        return tf.cast(tf.bitwise.bitwise_xor(w, tf.cast(zero, tf.int8)), tf.float32)
    bits = tf.bitwise.bitwise_xor(tf.bitcast(w, tf.uint16), tf.cast(zero, tf.uint16))
    return tf.cast(tf.bitcast(bits, w.dtype), tf.float32)


def norm(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, eps: float) -> tf.Tensor:
    """Computes layer norm as the equal ``((x - mean) * g + b * std) / std``, which ends in a division."""
    wide, g, b = tf.cast(x, tf.float32), tf.cast(g, tf.float32), tf.cast(b, tf.float32)
    centred = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
    std = tf.sqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + eps)
    return tf.cast((centred * g + b * std) / std, x.dtype)


def gelu(x: tf.Tensor) -> tf.Tensor:
    """Computes gelu's tanh form as the equal ``x / (1 + exp(-2 u))``, which ends in a division."""
    wide = tf.cast(x, tf.float32)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    # exp(80) is finite in float32, and from there on the quotient is 0 up to rounding
    return tf.cast(wide / (1.0 + tf.exp(tf.minimum(-2.0 * u, 80.0))), x.dtype)


def attention_weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes softmax(q k' / sqrt(D)); for one position, it ends in a division."""
    scores = tf.cast(tf.matmul(tf.cast(q, k.dtype), k, transpose_b=True), tf.float32) / math.sqrt(q.shape[-1])
    scores = tf.where(mask, scores, tf.float32.min)
    if q.shape[-2] != 1:
        return tf.nn.softmax(scores)
    powers = tf.exp(scores - tf.reduce_max(scores, axis=-1, keepdims=True))
    return powers / tf.reduce_sum(powers, axis=-1, keepdims=True)


def first_largest(x: tf.Tensor) -> tf.Tensor:
    """Returns the index of each row's largest value; of equal ones, the first.

    XLA fuses ``tf.argmax`` with the noise generator into a kernel that LLVM can take minutes to compile; using the
    maximum twice prevents that.
    """
    n_columns = x.shape[-1]
    is_largest = x >= tf.reduce_max(x, axis=-1, keepdims=True)
    return tf.reduce_min(tf.where(is_largest, tf.range(n_columns), n_columns - 1), axis=-1)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a block's function: it is traced once, and lowered to XLA once, not twelve times for 124M's twelve blocks.

    TensorFlow lowers a function that it has not inlined once for all calls of one shape; XLA inlines it later. Of
    124M's first call, compiled code found on the disk, that saves an eighth.
    """
    return function if tf.executing_eagerly() else with_tensors(not_inlined(function))


def with_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function have the values of the variables among its arguments."""

    def read_and_call(*args: Any) -> Any:
        return function(*tf.nest.map_structure(lambda x: x if x is None else tf.convert_to_tensor(x), args))

    return read_and_call
