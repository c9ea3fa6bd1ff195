"""The key/value cache: one object per block, as attention asks for it.

Keys and values are apart, each (B*H, S, D): of the layouts measured, the one that XLA updates in place. New entries are
written first and then attended to; the other order makes XLA copy the cache at each step. Outside of XLA TensorFlow
would copy it in any case, so there it is told to write in place. Knows nothing of ids.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tf_gpt2.model.layers import causal_mask
from tf_gpt2.model.loops import is_plain
from tf_gpt2.model.products import shape_of


class PrefillLayer:
    """One block's cache while the prompt is read: keeps what attention computes, and hides nothing but the future.

    Attributes:
        keys: (B*H, T, D), after ``update``.
        values: (B*H, T, D), after ``update``.
    """

    keys: tf.Tensor
    values: tf.Tensor

    def update(self, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Remembers keys and values (B*H, T, D); gives them back with a causal mask (1, T, T)."""
        # float32 holds every bfloat16; XLA updates a bfloat16 cache by way of a float32 copy of the whole
        self.keys, self.values = tf.cast(k, tf.float32), tf.cast(v, tf.float32)
        return k, v, causal_mask(shape_of(k)[1])


class DecodeSlots(NamedTuple):
    """Where each row's new entries go and what each of them may see: the same for all blocks.

    Attributes:
        slots: int32 (B*H, T, 2), row and position; in a plain loop int32 (B*H*T,), places in the cache as one list.
        mask: bool (B*H, T, S), false behind the position.
    """

    slots: tf.Tensor
    mask: tf.Tensor

    @classmethod
    def at(cls, positions: tf.Tensor, n_head: int, n_slots: int | tf.Tensor) -> DecodeSlots:
        """Makes them from positions, int32 (B, T), for a cache (B*H, S, D)."""
        n_tokens = shape_of(positions)[1]
        positions = tf.reshape(tf.tile(positions[:, None], (1, n_head, 1)), (-1, n_tokens))  # (B*H, T)
        mask = tf.range(n_slots) <= positions[..., None]  # (B*H, T, S)
        rows = tf.range(shape_of(positions)[0])[:, None]  # (B*H, 1)
        if is_plain():
            places = rows * n_slots + tf.minimum(positions, n_slots - 1)
            return cls(slots=tf.reshape(places, [-1]), mask=mask)
        return cls(slots=tf.stack([tf.broadcast_to(rows, shape_of(positions)), positions], axis=-1), mask=mask)


class DecodeLayer:
    """One block's cache while tokens are appended, each row at positions of its own.

    Args:
        keys: (B*H, S, D).
        values: (B*H, S, D).
        slots: where the new entries go; what lies behind is not attended to.
    """

    def __init__(self, keys: tf.Tensor, values: tf.Tensor, slots: DecodeSlots):
        self.keys = keys
        self.values = values
        self.slots = slots

    def update(self, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Writes keys and values (B*H, T, D) into their slots; gives the whole cache and the mask (B*H, T, S)."""
        slots, mask = self.slots
        self.keys, self.values = write(self.keys, slots, k), write(self.values, slots, v)
        return self.keys, self.values, mask


def write(part: tf.Tensor, slots: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
    """Writes entries, (B*H, T, D), into slots of keys or values, (B*H, S, D); see ``DecodeSlots``."""
    new = tf.cast(new, part.dtype)
    if not is_plain():
        return tf.tensor_scatter_nd_update(part, slots, new)
    shape, width = shape_of(part), part.shape[-1]
    entries, new = (tf.reshape(x, (-1, width)) for x in (part, new))  # (B*H*S, D), (B*H*T, D)
    # whoever else holds this memory sees it change: a loop must have it alone, see ``as_plain_loop``
    return tf.reshape(tf.raw_ops.InplaceUpdate(x=entries, i=slots, v=new), shape)


def for_samples(rows: tf.Tensor, n_samples: int) -> tf.Tensor:
    """Gives each prompt's row to all its samples: (B, …) -> (B*N, …); for one a known number of rows stays known."""
    return rows if n_samples == 1 else tf.repeat(rows, n_samples, axis=0)


def repeat_heads(part: tf.Tensor, n_prompts: int | tf.Tensor, n_samples: int) -> tf.Tensor:
    """Gives each prompt's keys or values to all its samples: (B*H, S, D) -> (B*N*H, S, D)."""
    if n_samples == 1:
        return part
    of_prompts = for_samples(tf.reshape(part, (n_prompts, -1)), n_samples)
    return tf.reshape(of_prompts, (-1, *shape_of(part)[1:]))


def with_room(parts: tuple[tf.Tensor, ...], room: int | tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Makes room for more positions in each block's keys or values: (B*H, S, D) -> (B*H, S + room, D)."""
    return tuple(tf.pad(part, [[0, 0], [0, room], [0, 0]]) for part in parts)
