"""Shapes in numbers where they are known when a graph is traced, as tensors where not."""

from __future__ import annotations

import tensorflow as tf


def shape_of(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns a shape, each size a number if it is known: a tensor is one more node to trace."""
    sizes = tf.shape(x) if None in x.shape else x.shape
    return [sizes[axis] if size is None else size for axis, size in enumerate(x.shape)]


def reshape_target(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns a shape for ``tf.reshape``: -1 for a size that is the only unknown one, which computes nothing."""
    sizes = [-1 if size is None else size for size in x.shape]
    return sizes if sizes.count(-1) <= 1 else shape_of(x)
