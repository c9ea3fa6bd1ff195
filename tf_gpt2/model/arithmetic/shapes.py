"""Returns shapes of tensors: a number for each size that is known at tracing, a tensor for each that is not."""

from __future__ import annotations

import tensorflow as tf


def shape_of(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns a shape; a known size is a number, because a tensor would add a node to the graph."""
    sizes = tf.shape(x) if None in x.shape else x.shape
    return [sizes[axis] if size is None else size for axis, size in enumerate(x.shape)]


def reshape_target(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns a shape for ``tf.reshape``; a single unknown size is -1, which adds no node to the graph."""
    sizes = [-1 if size is None else size for size in x.shape]
    return sizes if sizes.count(-1) <= 1 else shape_of(x)
