"""Rows of ids -> one vector each: the last hidden states, pooled.

Rows of like length are computed together, in shapes that are powers of two, as in ``scoring``. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.loop import bucket
from tf_gpt2.generation.options import check_row, pad_rows, power_of_two
from tf_gpt2.generation.scoring import check_window, pieces
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

POOLINGS = MEAN, LAST = "mean", "last"


def embed(
    model: GPT2Model, rows: Sequence[Sequence[int]], *, pooling: str = MEAN, jit_compile: bool = True
) -> np.ndarray:
    """Computes a vector for each row: its hidden states after the last layer norm, pooled over its tokens.

    GPT-2 was not trained for this; the mean is the usual choice (Muennighoff 2022). A row's vector does not depend on
    the other rows.

    Args:
        model: the model.
        rows: B lists of ids, each of 1 to ``n_ctx``.
        pooling: ``"mean"`` over all tokens, or the ``"last"`` token's, which has seen all others.
        jit_compile: whether XLA compiles.

    Returns:
        float32 (B, C).

    Raises:
        ContextLengthError: when a row is longer than the window.
        TypeError: when rows are not lists of integers.
        ValueError: when a row is empty, ids lie outside the vocabulary, or ``pooling`` is another.

    Example:
        >>> from tf_gpt2.config import GPT2Config
        >>> config = GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> embed(GPT2Model(config), [[1, 2, 3], [4]]).shape
        (2, 8)
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    arrays = [check_row(f"rows[{i}]", row, model.config) for i, row in enumerate(rows)]
    for i, array in enumerate(arrays):
        check_window(f"rows[{i}]", array, model.config)
        if not array.size:
            raise ValueError(f"rows[{i}] must have at least one id")
    pool = compiled(mean_states if pooling == MEAN else last_states, model, jit_compile=jit_compile)
    vectors = np.zeros((len(arrays), model.config.n_embd), np.float32)
    for piece in pieces([len(array) for array in arrays], model.config.n_ctx):
        of_piece = [arrays[i] for i in piece]
        of_piece += of_piece[-1:] * (power_of_two(len(piece), 1) - len(piece))
        padded = pad_rows(of_piece, bucket(max(map(len, of_piece)), model.config.n_ctx))  # (B, T)
        lengths = tf.constant([len(row) for row in of_piece])
        vectors[piece] = pool(tf.constant(padded), lengths)[: len(piece)].numpy()
    return vectors


def mean_states(network: Network, ids: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Computes the mean of each row's hidden states: int32 (B, T), int32 (B,) -> float32 (B, C)."""
    hidden = tf.cast(network.hidden_states(ids)[0], tf.float32)  # (B, T, C)
    is_token = tf.range(ids.shape[1])[None] < lengths[:, None]  # (B, T)
    total = tf.reduce_sum(tf.where(is_token[..., None], hidden, 0.0), axis=1)  # (B, C)
    return total / tf.cast(lengths, tf.float32)[:, None]


def last_states(network: Network, ids: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Picks the hidden state of each row's last token: int32 (B, T), int32 (B,) -> float32 (B, C)."""
    hidden = tf.cast(network.hidden_states(ids)[0], tf.float32)  # (B, T, C)
    return tf.gather(hidden, lengths - 1, batch_dims=1)
