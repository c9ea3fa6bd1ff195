"""What a generation under way consists of: tensors that loops carry, and when rows end. Knows nothing of models."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class State(NamedTuple):
    """What the loop carries.

    Attributes:
        ids: int32 (B, S + 2), prompt and new tokens: S that can be fed, and the last one. What lies past a row's length
            means nothing; the last column is there for rows that are full and still write.
        lengths: int32 (B,), tokens so far. The last one has not been fed to the model yet.
        prompt_lengths: int32 (B,), how many of them are the prompt's.
        logprobs: float32 (B, S + 2), of each new token under the unmodified model, at its place in ``ids``.
        top_ids: int32 (B, S + 2, K), what the unmodified model finds likeliest there, the likeliest first.
        top_logprobs: float32 (B, S + 2, K), of these.
        stopped: bool (B,), whether the row chose a stop id, which is not counted in ``lengths``.
        keys: per block (B*H, S, D).
        values: per block (B*H, S, D).
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor
    logprobs: tf.Tensor
    top_ids: tf.Tensor
    top_logprobs: tf.Tensor
    stopped: tf.Tensor
    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]

    @property
    def n_slots(self) -> int:
        """S, how many positions the cache has room for."""
        return self.keys[0].shape[1]


class Limits(NamedTuple):
    """When rows end.

    Attributes:
        lengths: int32 (B,), the most tokens a row may have, its prompt included.
        stop_ids: int32 (K,), -1 for none.
    """

    lengths: tf.Tensor
    stop_ids: tf.Tensor


def is_active(state: State, limits: Limits) -> tf.Tensor:
    """Says which rows still want a token: bool (B,)."""
    return ~state.stopped & (state.lengths < limits.lengths)


def is_stop(ids: tf.Tensor, limits: Limits) -> tf.Tensor:
    """Says which ids end their rows: int32, of any shape -> bool."""
    return tf.reduce_any(ids[..., None] == limits.stop_ids, axis=-1)
