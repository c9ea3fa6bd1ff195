"""Weights as 8-bit integers: symmetric, one scale per output.

Only matrices are quantized, which are all but a thousandth of the weights. Activations, biases, layer norms, positions
and the key/value cache stay as they are. Knows nothing of layers.
"""

from __future__ import annotations

import tensorflow as tf

LARGEST = 127
"""Of the 8-bit range the one value without a positive twin, -128, is not used."""


def quantize(w: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds each row to 255 evenly spaced values.

    Args:
        w: floats (n_out, n_in).

    Returns:
        int8 (n_out, n_in) and float32 (n_out,), with ``w`` about ``q * scale[:, None]``, at most half a scale off.
    """
    w = tf.cast(w, tf.float32)
    largest = tf.reduce_max(tf.abs(w), axis=1)
    scale = tf.where(largest > 0, largest, 1.0) / LARGEST
    return tf.cast(tf.round(w / scale[:, None]), tf.int8), scale


def dequantize(q: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Gives back float32 (n_out, n_in)."""
    return tf.cast(q, tf.float32) * scale[:, None]
