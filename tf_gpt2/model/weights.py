"""What a weight is: the leaf types of the parameter tree that the formulas compute with.

A vector or a table is a bare tensor. A matrix is one of the types here, always (n_out, n_in): a product with one row
then reads a contiguous run of memory per output. How each is multiplied by is up to ``arithmetic``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

LARGEST = 127
"""Of the 8-bit range the one value without a positive twin, -128, is not used."""

ROWS_AT_ONCE = 2048
"""Rounding makes float copies of its input; of so many rows they are small beside the embedding's 50,257."""


class Matrix(NamedTuple):
    """A float matrix.

    Attributes:
        value: floats (n_out, n_in), a tensor or a variable.
        transposed: float32 (n_in, n_out), the same numbers rounded to the compute dtype, where a twin is kept for
            products of several rows; else ``None``.
    """

    value: Any
    transposed: Any = None


class Int8Matrix(NamedTuple):
    """A matrix of 8-bit integers with one scale per output: about ``value * scale[:, None]``.

    Attributes:
        value: int8 (n_out, n_in), a tensor or a variable.
        scale: float32 (n_out,).
    """

    value: Any
    scale: Any


AnyMatrix = Matrix | Int8Matrix


def quantize(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds each row to 255 evenly spaced values, symmetric around zero.

    Args:
        w: floats (n_out, n_in).

    Returns:
        int8 (n_out, n_in) and float32 (n_out,), with ``w`` about ``q * scale[:, None]``, at most half a scale off.
    """
    parts = [quantize_rows(w[i : i + ROWS_AT_ONCE]) for i in range(0, w.shape[0], ROWS_AT_ONCE)]
    q, scale = zip(*parts, strict=True)
    return tf.concat(q, axis=0), tf.concat(scale, axis=0)


def quantize_rows(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Does what ``quantize`` does, in one go."""
    w = tf.cast(w, tf.float32)
    largest = tf.reduce_max(tf.abs(w), axis=1)
    scale = tf.where(largest > 0, largest, 1.0) / LARGEST
    return tf.cast(tf.round(w / scale[:, None]), tf.int8), scale


def dequantize(q: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns float32 (n_out, n_in) for int8 (n_out, n_in) and float32 (n_out,)."""
    return tf.cast(q, tf.float32) * tf.expand_dims(scale, 1)
