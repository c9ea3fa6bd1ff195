"""Defines the leaf types of the parameter tree that the formulas compute with: float, 8-bit and 4-bit matrices.

A vector or a table is a bare tensor. A matrix is one of the types here, always (n_out, n_in): a product with one row
then reads a contiguous run of memory per output. The modules of ``model/arithmetic`` multiply by them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

LARGEST = 127
"""The largest 8-bit value used, on both sides: -128, which has no positive counterpart, is left out."""

GROUP = 32
"""Weights of an output that have one scale in a 4-bit matrix."""

DIVISORS = (-8.5, -8.0, -7.5, -7.0, 7.0, 7.5, 8.0)
"""A group's largest weight divided by one of these is the group's scale: the one that leaves the smallest error."""

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


class Int4Matrix(NamedTuple):
    """A matrix of 4-bit integers with one scale per output and group of 32 inputs; the last group is filled with zeros.

    Attributes:
        value: uint8 (n_out, n_groups * 16), a tensor or a variable. Byte i of a group has the number of input i in its
            lower half and that of input 16 + i in its upper half, each plus 8.
        scale: bfloat16 (n_groups, n_out).
    """

    value: Any
    scale: Any


AnyMatrix = Matrix | Int8Matrix | Int4Matrix


def floats_of(w: AnyMatrix, n_in: int) -> Any:
    """Returns the floats of a matrix, (n_out, n_in): those of a float matrix as they are, of others float32."""
    if isinstance(w, Int8Matrix):
        return dequantize(w.value, w.scale)
    return dequantize_4(w.value, w.scale)[:, :n_in] if isinstance(w, Int4Matrix) else w.value


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


def is_finite(value: Any) -> bool:
    """Whether a tensor or variable holds neither NaN nor infinity; integers never do."""
    return not value.dtype.is_floating or bool(tf.reduce_all(tf.math.is_finite(value)))


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
    scale = tf.where(largest == 0, 1.0, largest) / LARGEST  # NaN stays NaN, for the integers cannot tell
    return tf.cast(tf.round(w / scale[:, None]), tf.int8), scale


def dequantize(q: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Computes the floats of a quantized matrix: int8 (n_out, n_in), float32 (n_out,) -> float32 (n_out, n_in)."""
    return tf.cast(q, tf.float32) * tf.expand_dims(scale, 1)


def quantize_4(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds each group of 32 inputs of each output to 16 evenly spaced values, zero among them.

    Args:
        w: floats (n_out, n_in).

    Returns:
        The value and the scale of an ``Int4Matrix``.
    """
    parts = [quantize_rows_4(w[i : i + ROWS_AT_ONCE]) for i in range(0, w.shape[0], ROWS_AT_ONCE)]
    value, scale = zip(*parts, strict=True)
    return tf.concat(value, axis=0), tf.concat(scale, axis=1)


def quantize_rows_4(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds all rows at once, as ``quantize_4`` does in parts."""
    w = tf.pad(tf.cast(w, tf.float32), [[0, 0], [0, -w.shape[1] % GROUP]])
    groups = tf.reshape(w, (w.shape[0], -1, GROUP))  # (n_out, n_groups, 32)
    largest = tf.gather(groups, tf.argmax(tf.abs(groups), axis=-1), batch_dims=2)[..., None]  # with its sign
    best = round_groups(groups, largest / DIVISORS[0])
    for divisor in DIVISORS[1:]:
        other = round_groups(groups, largest / divisor)
        best = tuple(tf.where(other[-1] < best[-1], *pair) for pair in zip(other, best, strict=True))
    numbers, scale, error = best
    scale = tf.where(tf.math.is_nan(error), error, scale)  # the integers cannot tell
    low, high = tf.split(tf.cast(numbers + 8, tf.uint8), 2, axis=-1)  # each (n_out, n_groups, 16)
    value = tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, tf.constant(4, tf.uint8)))
    return tf.reshape(value, (w.shape[0], -1)), tf.transpose(tf.cast(scale[..., 0], tf.bfloat16))


def round_groups(groups: tf.Tensor, scale: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Rounds groups, (…, 32), with scales, (…, 1); returns the numbers in [-8, 7], the scales, the squared errors."""
    scale = tf.cast(tf.cast(scale, tf.bfloat16), tf.float32)
    numbers = tf.clip_by_value(tf.round(groups / tf.where(scale == 0, 1.0, scale)), -8, 7)
    return numbers, scale, tf.reduce_sum(tf.square(numbers * scale - groups), axis=-1, keepdims=True)


def unpack_4(value: tf.Tensor) -> tf.Tensor:
    """Returns the numbers of a 4-bit matrix: uint8 (n_out, n_groups * 16) -> int8 (n_out, n_groups, 32), in [-8, 7]."""
    bytes_of_groups = tf.reshape(value, (value.shape[0], -1, GROUP // 2))
    low = tf.bitwise.bitwise_and(bytes_of_groups, tf.constant(15, tf.uint8))
    high = tf.bitwise.right_shift(bytes_of_groups, tf.constant(4, tf.uint8))
    return tf.cast(tf.concat([low, high], axis=-1), tf.int8) - 8


def dequantize_4(value: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Computes the floats of a 4-bit matrix, with those that fill its last group: float32 (n_out, n_groups * 32)."""
    scale = tf.transpose(tf.cast(scale, tf.float32))[..., None]  # (n_out, n_groups, 1)
    return tf.reshape(tf.cast(unpack_4(value), tf.float32) * scale, (value.shape[0], -1))
