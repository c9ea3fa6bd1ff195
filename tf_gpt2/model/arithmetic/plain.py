"""The arithmetic of a textbook, for eager calls and training; the faster modules are tested against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.weights import AnyMatrix, floats_of

JIT_COMPILE = False
SORTS = True


def needs_twins(n_rows: int, dtype: str) -> bool:
    """Never: it multiplies by the matrix as it is."""
    return False


def prepare(weights: Any) -> Any:
    """Returns the weights as they are."""
    return weights


def gather(table: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Looks up rows; reads the table first, because a gather from the variable itself makes each later read a copy."""
    return tf.gather(tf.convert_to_tensor(table), rows)


def product(x: tf.Tensor, w: AnyMatrix) -> tf.Tensor:
    """Computes ``x @ w.T``."""
    rows = tf.reshape(x, (-1, x.shape[-1]))
    y = tf.matmul(rows, tf.cast(floats_of(w, x.shape[-1]), x.dtype), transpose_b=True)
    return tf.reshape(y, (*shape_of(x)[:-1], y.shape[-1]))


def norm(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, eps: float) -> tf.Tensor:
    """Computes ``(x - mean) / sqrt(var + eps) * g + b``.

    Source: Ba et al. 2016, "Layer Normalization".
    """
    wide = tf.cast(x, tf.float32)
    centred = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
    return tf.cast(centred * tf.math.rsqrt(variance + eps) * tf.cast(g, tf.float32) + tf.cast(b, tf.float32), x.dtype)


def gelu(x: tf.Tensor) -> tf.Tensor:
    """Computes ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; openai/gpt-2, ``src/model.py``, ``gelu``.
    """
    wide = tf.cast(x, tf.float32)
    return tf.cast(0.5 * wide * (1 + tf.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))), x.dtype)


def transpose_heads(x: tf.Tensor) -> tf.Tensor:
    """Transposes (B, T, H, D) to (B, H, T, D)."""
    return tf.transpose(x, (0, 2, 1, 3))


def attention_weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes softmax(q k' / sqrt(D)) over the keys that the mask shows: float32 (N, T, S)."""
    scores = tf.cast(tf.matmul(tf.cast(q, k.dtype), k, transpose_b=True), tf.float32) / math.sqrt(q.shape[-1])
    return tf.nn.softmax(tf.where(mask, scores, tf.float32.min))


def weighted_sum(weights: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
    """Sums values (N, S, D) by their weights (N, T, S)."""
    return tf.matmul(tf.cast(weights, v.dtype), v)


def places(positions: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Returns the row and the position of each entry: int32 (N, T) -> int32 (N, T, 2)."""
    rows = tf.broadcast_to(tf.range(shape_of(like)[0])[:, None], shape_of(positions))
    return tf.stack([rows, positions], axis=-1)


def write(part: tf.Tensor, new: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Writes entries (N, T, D) into a copy of keys or values (N, S, D)."""
    return tf.tensor_scatter_nd_update(part, places, tf.cast(new, part.dtype))


def owned(part: tf.Tensor) -> tf.Tensor:
    """Returns the keys or values as they are, because ``write`` copies them."""
    return part


def first_largest(x: tf.Tensor) -> tf.Tensor:
    """Returns the index of each row's largest value."""
    return tf.argmax(x, axis=-1, output_type=tf.int32)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function itself."""
    return function


def branch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function itself."""
    return function
