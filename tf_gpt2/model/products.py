"""The arithmetic that decides the speed: the matrix product, and what feeds it.

XLA fuses a cheap element-wise operation into the product that consumes it and then computes it again for every output
row, which halves the speed of a whole model. It never duplicates an expensive operation, and a float division counts as
one. So each vector that feeds a product here ends in a true division. The values are those of the usual formulas.
"""

from __future__ import annotations

import math

import tensorflow as tf


def product(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
    """Multiplies by a transposed weight: ``x @ w.T``.

    Args:
        x: floats (..., n_in).
        w: floats (n_out, n_in), of the same dtype.

    Returns:
        Floats (..., n_out).
    """
    n_out, n_in = w.shape
    rows = tf.reshape(x, (-1, n_in))
    if rows.shape[0] == 1:
        # XLA runs a one-row product on one core; two halves run side by side.
        y = tf.concat([tf.matmul(rows, half, transpose_b=True) for half in (w[: n_out // 2], w[n_out // 2 :])], axis=-1)
    else:
        y = tf.matmul(rows, w, transpose_b=True)
    return tf.reshape(y, tf.concat([tf.shape(x)[:-1], [n_out]], axis=0))


def normalize(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, *, eps: float) -> tf.Tensor:
    """Computes ``(x - mean) / sqrt(var + eps) * g + b`` over the last axis, as one division.

    Args:
        x: float32 (..., C).
        g: float32 (C,), the gain.
        b: float32 (C,), the bias.
        eps: added to the biased variance.

    Source: Ba et al. 2016, "Layer Normalization".
    """
    mean = tf.reduce_mean(x, axis=-1, keepdims=True)
    centred = x - mean
    std = tf.sqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * g + b * std) / std


def gelu(x: tf.Tensor) -> tf.Tensor:
    """Computes gelu's tanh form, ``x / 2 * (1 + tanh(u))``, as the equal ``x / (1 + exp(-2 u))``; in float32.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; openai/gpt-2, ``src/model.py``, ``gelu``.
    """
    dtype = x.dtype
    x = tf.cast(x, tf.float32)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    # Beyond 80 the quotient is 0 in float32 anyway, and exp's overflow would make the gradient NaN.
    return tf.cast(x / (1.0 + tf.exp(tf.minimum(-2.0 * u, 80.0))), dtype)
