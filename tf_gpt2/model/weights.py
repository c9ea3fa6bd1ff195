"""Defines the leaf types of the parameter tree that the formulas compute with: float and 8-bit matrices.

A vector or a table is a bare tensor. A matrix is one of the types here, always (n_out, n_in): a product with one row
then reads a contiguous run of memory per output. The modules of ``model/arithmetic`` multiply by them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

LARGEST = 127
"""The largest 8-bit value used, on both sides: -128, which has no positive counterpart, is left out."""

ROWS_AT_ONCE = 2048
"""Rows rounded at once: float copies of so many are small beside those of the embedding's 50,257 rows."""


class Matrix(NamedTuple):
    """A float matrix.

    Attributes:
        value: floats (n_out, n_in), a tensor or a variable.
        transposed: the twin for products of several rows: float32 (n_in, n_out), the same numbers rounded to the
            compute dtype; ``None`` where no twin is kept.
    """

    value: Any
    transposed: Any = None


class Int8Matrix(NamedTuple):
    """A matrix of 8-bit integers with one scale per output; its floats are about ``value * scale[:, None]``.

    Attributes:
        value: int8 (n_out, n_in), a tensor or a variable.
        scale: float32 (n_out,).
    """

    value: Any
    scale: Any


AnyMatrix = Matrix | Int8Matrix


def floats_of(w: AnyMatrix, n_in: int) -> Any:
    """Returns the floats of a matrix, (n_out, n_in): those of a float matrix as they are, of others float32."""
    return dequantize(w.value, w.scale) if isinstance(w, Int8Matrix) else w.value


class LoraMatrix(NamedTuple):
    """A matrix of any type with a low-rank addition: it computes ``base + scale * b @ a``, and never holds the sum.

    Attributes:
        base: the matrix, (n_out, n_in), which is not trained.
        a: floats (r, n_in), a tensor or a variable.
        b: floats (n_out, r).
        scale: float32 ().

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    base: AnyMatrix
    a: Any
    b: Any
    scale: Any


def quantize(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds each row to 255 evenly spaced values, symmetric around zero.

    Args:
        w: floats (n_out, n_in).

    Returns:
        ``q``, int8 (n_out, n_in), and ``scale``, float32 (n_out,): ``q * scale[:, None]`` differs from ``w`` by at most
        half a scale.
    """
    parts = [quantize_rows(w[i : i + ROWS_AT_ONCE]) for i in range(0, w.shape[0], ROWS_AT_ONCE)]
    q, scale = zip(*parts, strict=True)
    return tf.concat(q, axis=0), tf.concat(scale, axis=0)


def quantize_rows(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds all rows at once, as ``quantize`` does in parts."""
    w = tf.cast(w, tf.float32)
    largest = tf.reduce_max(tf.abs(w), axis=1)
    scale = tf.where(largest > 0, largest, 1.0) / LARGEST
    return tf.cast(tf.round(w / scale[:, None]), tf.int8), scale


def dequantize(q: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Computes the floats of a quantized matrix: int8 (n_out, n_in), float32 (n_out,) -> float32 (n_out, n_in)."""
    return tf.cast(q, tf.float32) * tf.expand_dims(scale, 1)
