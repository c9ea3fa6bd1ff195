"""Losses of the next token: a Keras loss for ``model.fit``, and the head's loss that never holds all logits.

A label below 0, such as -1 or Hugging Face's -100, is left out: it counts neither in the sum nor in the mean.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_gpt2.model.arithmetic.fused import compiled

LOGITS_AT_ONCE = 2**24
"""Most logits at once: 64 MB of float32. Fewer keep less memory, more make fewer and larger products."""


@keras.saving.register_keras_serializable("tf_gpt2")
class NextTokenLoss(keras.losses.Loss):
    """Mean cross-entropy in nats of the labels that count, as a Keras loss for ``model.compile``.

    Call arguments:
        y_true: integers (B, T); labels below 0 are left out.
        y_pred: logits, floats (B, T, V).
        sample_weight: floats that broadcast to (B, T), by which the mean is weighted.

    Example:
        >>> import numpy as np
        >>> round(float(NextTokenLoss()(np.array([[1, -1]]), np.zeros((1, 2, 4), np.float32))), 3)
        1.386
    """

    def __init__(self, name: str = "next_token_loss", **kwargs: Any):
        super().__init__(name=name, **kwargs)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        """Returns the weighted mean over the labels that count; 0 where none does."""
        labels = tf.cast(tf.convert_to_tensor(y_true), tf.int32)
        logits = tf.cast(tf.convert_to_tensor(y_pred), tf.float32)
        weights = label_weights(labels, sample_weight)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)  # (B, T)
        losses = tf.where(labels >= 0, losses, 0.0) * weights
        if self.reduction == "none":
            return losses
        total = tf.reduce_sum(losses)
        return total if self.reduction == "sum" else tf.math.divide_no_nan(total, tf.reduce_sum(weights))

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Returns the loss of each label, (B, T); 0 where it is left out."""
        labels = tf.cast(tf.convert_to_tensor(y_true), tf.int32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), tf.cast(y_pred, tf.float32))
        return tf.where(labels >= 0, losses, 0.0)


def label_weights(labels: tf.Tensor, sample_weight: Any = None) -> tf.Tensor:
    """Returns the weight of each label, float32 in their shape: 0 below 0, else 1 or the sample's weight.

    Args:
        labels: integers (B, T).
        sample_weight: floats (B,), (B, 1) or (B, T); ``None`` weighs all alike.
    """
    weights = tf.cast(labels >= 0, tf.float32)
    if sample_weight is None:
        return weights
    given = tf.cast(tf.convert_to_tensor(sample_weight), tf.float32)
    if given.shape.rank == 1:
        given = given[:, None]  # (B, 1)
    return weights * given


def head_loss(x: tf.Tensor, wte: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Computes the weighted sum of the cross-entropies of logits ``x @ wte.T``, a part of the rows at a time.

    The gradients are computed in the same pass, while a part's logits are there; memory holds no other logits.

    Args:
        x: floats (M, C) in the compute dtype.
        wte: floats (V, C).
        labels: int32 (M,); those below 0 must weigh 0.
        weights: float32 (M,).

    Returns:
        float32 (), the sum in nats. Its gradient goes to ``x`` and to ``wte``.
    """

    @tf.custom_gradient
    def with_gradient(x: tf.Tensor, wte: tf.Tensor) -> Any:
        table = tf.cast(wte, x.dtype)
        total, dx, d_table = tf.constant(0.0), [], None
        for rows in parts_of_rows(x.shape[0], table.shape[0]):
            part, logits = x[rows], tf.matmul(x[rows], table, transpose_b=True)  # (R, C), (R, V)
            losses, d_logits = cross_entropy(logits, labels[rows], weights[rows])
            total += losses
            dx.append(tf.matmul(d_logits, table))  # (R, C)
            d_part = tf.cast(tf.matmul(d_logits, part, transpose_a=True), wte.dtype)  # (V, C)
            d_table = d_part if d_table is None else d_table + d_part

        def gradient(d_total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.concat(dx, axis=0) * tf.cast(d_total, x.dtype), d_table * tf.cast(d_total, wte.dtype)

        return total, gradient

    return with_gradient(x, wte)


def parts_of_rows(n_rows: int, n_vocab: int) -> list[slice]:
    """Returns slices of the rows, each with at most ``LOGITS_AT_ONCE`` logits, of sizes as equal as can be."""
    n_parts = min(n_rows, -(-n_rows * n_vocab // LOGITS_AT_ONCE))
    size = -(-n_rows // n_parts)
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


@compiled
def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the weighted sum of cross-entropies, and its gradient by the logits.

    Args:
        logits: floats (R, V).
        labels: int32 (R,).
        weights: float32 (R,).

    Returns:
        float32 (), and floats (R, V) in the dtype of the logits.
    """
    wide = tf.cast(logits, tf.float32)
    largest = tf.reduce_max(wide, axis=-1, keepdims=True)
    log_sum = tf.math.log(tf.reduce_sum(tf.exp(wide - largest), axis=-1, keepdims=True)) + largest  # (R, 1)
    is_label = tf.range(wide.shape[-1])[None] == labels[:, None]  # (R, V)
    of_label = tf.reduce_sum(tf.where(is_label, wide, 0.0), axis=-1)
    gradient = (tf.exp(wide - log_sum) - tf.cast(is_label, tf.float32)) * weights[:, None]
    return tf.reduce_sum((log_sum[:, 0] - of_label) * weights), tf.cast(gradient, logits.dtype)
