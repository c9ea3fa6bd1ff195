"""The arithmetic of a training step: products by oneDNN, all between them fused by XLA, with gradients written out.

The values are those of ``plain``, up to rounding. TensorFlow's own gradients keep and read many arrays between two
products; here each function keeps its input alone, and XLA computes it and its gradient in one pass over memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.arithmetic.shapes import shape_of

JIT_COMPILE = False
SORTS = True

prepare, gather, product, transpose_heads = plain.prepare, plain.gather, plain.product, plain.transpose_heads
places, write, owned, first_largest = plain.places, plain.write, plain.owned, plain.first_largest
once, branch, needs_twins = plain.once, plain.branch, plain.needs_twins

SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function of tensors by XLA, inside a graph that XLA does not compile.

    On several devices it stays plain: XLA compiles for the first one only.
    """
    fast = tf.function(function, jit_compile=True, autograph=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args) if tf.distribute.has_strategy() else fast(*args)

    return call


# ---- layer norm


@compiled
def norm_forward(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, eps: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns layer norm of (M, C), and mean and reciprocal deviation, float32 (M, 1)."""
    wide = tf.cast(x, tf.float32)
    mean = tf.reduce_mean(wide, axis=-1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(tf.square(wide - mean), axis=-1, keepdims=True) + eps)
    return tf.cast((wide - mean) * scale * g + b, x.dtype), mean, scale


@compiled
def norm_backward(
    dy: tf.Tensor, x: tf.Tensor, g: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the gradients of input, gain and bias."""
    wide = tf.cast(dy, tf.float32)
    normed = (tf.cast(x, tf.float32) - mean) * scale
    inner = wide * g
    along = tf.reduce_mean(inner * normed, axis=-1, keepdims=True)
    dx = (inner - tf.reduce_mean(inner, axis=-1, keepdims=True) - normed * along) * scale
    return tf.cast(dx, x.dtype), tf.reduce_sum(wide * normed, axis=0), tf.reduce_sum(wide, axis=0)


def norm(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, eps: float) -> tf.Tensor:
    """Computes ``(x - mean) / sqrt(var + eps) * g + b``."""

    @tf.custom_gradient
    def with_gradient(x: tf.Tensor, g: tf.Tensor, b: tf.Tensor) -> Any:
        rows, wide_g = tf.reshape(x, (-1, x.shape[-1])), tf.cast(g, tf.float32)
        y, mean, scale = norm_forward(rows, wide_g, tf.cast(b, tf.float32), tf.constant(eps))

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            dx, dg, db = norm_backward(tf.reshape(dy, (-1, x.shape[-1])), rows, wide_g, mean, scale)
            return tf.reshape(dx, shape_of(x)), tf.cast(dg, g.dtype), tf.cast(db, b.dtype)

        return tf.reshape(y, shape_of(x)), gradient

    return with_gradient(x, tf.convert_to_tensor(g), tf.convert_to_tensor(b))


# ---- gelu


@compiled
def gelu_forward(x: tf.Tensor) -> tf.Tensor:
    """Computes gelu's tanh form."""
    wide = tf.cast(x, tf.float32)
    return tf.cast(0.5 * wide * (1 + tf.tanh(SLOPE * (wide + CUBIC * wide * wide * wide))), x.dtype)


@compiled
def gelu_backward(dy: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Computes the gradient of gelu's tanh form."""
    wide = tf.cast(x, tf.float32)
    squared = wide * wide
    tanh = tf.tanh(SLOPE * wide * (1 + CUBIC * squared))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * SLOPE * (1 + 3 * CUBIC * squared)
    return tf.cast(tf.cast(dy, tf.float32) * slope, x.dtype)


@tf.custom_gradient
def gelu(x: tf.Tensor) -> Any:
    """Computes ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``."""
    return gelu_forward(x), lambda dy: gelu_backward(dy, x)


# ---- attention


@compiled
def softmax_forward(scores: tf.Tensor, mask: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns the softmax of ``scores * scale`` over the keys that the mask shows, in the dtype of the scores."""
    wide = tf.where(mask, tf.cast(scores, tf.float32) * scale, tf.float32.min)
    powers = tf.exp(wide - tf.reduce_max(wide, axis=-1, keepdims=True))
    return tf.cast(powers / tf.reduce_sum(powers, axis=-1, keepdims=True), scores.dtype)


@compiled
def softmax_backward(dy: tf.Tensor, weights: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns the gradient of the scores."""
    wide, w = tf.cast(dy, tf.float32), tf.cast(weights, tf.float32)
    return tf.cast((wide - tf.reduce_sum(wide * w, axis=-1, keepdims=True)) * w * scale, dy.dtype)


def attention_weights(q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes softmax(q k' / sqrt(D)) over the keys that the mask shows: (N, T, S) in the dtype of ``k``."""
    scale = tf.constant(1 / math.sqrt(q.shape[-1]))

    @tf.custom_gradient
    def softmax(scores: tf.Tensor) -> Any:
        weights = softmax_forward(scores, mask, scale)
        return weights, lambda dy: softmax_backward(dy, weights, scale)

    return softmax(tf.matmul(tf.cast(q, k.dtype), k, transpose_b=True))


weighted_sum = plain.weighted_sum
