"""The key/value cache between steps: one ``KeyValues`` per block, made by a prefill, given to samples, grown.

Keys and values are apart, each (B*H, S, D): of the layouts measured, the one that XLA updates in place. How entries are
written is up to ``model.arithmetic``. Knows nothing of ids.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.formulas import KeyValues

Cache = tuple[KeyValues, ...]
"""One entry per block."""


def as_cache(present: Cache, n_prompts: int | tf.Tensor, n_samples: int) -> Cache:
    """Makes the cache of what a prefill computed for its prompts: each prompt's for all its samples, in float32.

    float32 holds every bfloat16; XLA updates a bfloat16 cache by way of a float32 copy of the whole.
    """

    def of_samples(part: tf.Tensor) -> tf.Tensor:
        return repeat_heads(tf.cast(part, tf.float32), n_prompts, n_samples)

    return tuple(KeyValues(*map(of_samples, one)) for one in present)


def for_samples(rows: tf.Tensor, n_samples: int) -> tf.Tensor:
    """Repeats each prompt's row for all its samples: (B, …) -> (B*N, …); for one a known number of rows stays known."""
    return rows if n_samples == 1 else tf.repeat(rows, n_samples, axis=0)


def repeat_heads(part: tf.Tensor, n_prompts: int | tf.Tensor, n_samples: int) -> tf.Tensor:
    """Repeats each prompt's keys or values for all its samples: (B*H, S, D) -> (B*N*H, S, D)."""
    if n_samples == 1:
        return part
    of_prompts = for_samples(tf.reshape(part, (n_prompts, -1)), n_samples)
    return tf.reshape(of_prompts, (-1, *shape_of(part)[1:]))


def with_room(cache: Cache, room: int | tf.Tensor) -> Cache:
    """Makes room for more positions: (B*H, S, D) -> (B*H, S + room, D)."""
    return tuple(KeyValues(*(tf.pad(part, [[0, 0], [0, room], [0, 0]]) for part in one)) for one in cache)
