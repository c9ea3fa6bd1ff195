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


class Slots(NamedTuple):
    """Where each row's new entries go and what each of them may see: the same for all blocks.

    Attributes:
        places: int32 (B*H, T, 2), row and position.
        mask: bool (B*H, T, S), false behind the position.
    """

    places: tf.Tensor
    mask: tf.Tensor

    @classmethod
    def at(cls, positions: tf.Tensor, mask: tf.Tensor, like: tf.Tensor) -> Slots:
        """Makes them for positions, int32 (B*H, T), in parts ``like`` this, (B*H, S, D)."""
        rows = tf.broadcast_to(tf.range(shape_of(like)[0])[:, None], shape_of(positions))
        return cls(tf.stack([rows, positions], axis=-1), mask)

    def write(self, part: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        """Writes entries, (B*H, T, D), into keys or values, (B*H, S, D)."""
        return tf.tensor_scatter_nd_update(part, self.places, new)


class SlotsInPlace(NamedTuple):
    """As ``Slots``, where XLA does not compile: TensorFlow is told to write in place, and would copy the whole else.

    Attributes:
        places: int32 (B*H*T,), in the cache as one list of entries.
        mask: bool (B*H, T, S).
        shape: int32 (3,), of keys or values.
    """

    places: tf.Tensor
    mask: tf.Tensor
    shape: tf.Tensor

    @classmethod
    def at(cls, positions: tf.Tensor, mask: tf.Tensor, like: tf.Tensor) -> SlotsInPlace:
        """Makes them for positions, int32 (B*H, T), in parts ``like`` this, (B*H, S, D)."""
        n_rows, n_slots, _ = shape_of(like)
        firsts = tf.expand_dims(tf.range(n_rows) * n_slots, 1)  # (B*H, 1)
        places = firsts + tf.minimum(positions, n_slots - 1)  # behind a row's last place is the next row's first
        return cls(tf.reshape(places, [-1]), mask, tf.shape(like))

    def write(self, part: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        """Writes entries, (B*H, T, D), into the memory of keys or values, (B*H, S, D).

        Whoever else holds it sees it change: a loop must have it alone, see ``as_plain_loop``.
        """
        entries, new = (tf.reshape(x, (-1, part.shape[-1])) for x in (part, new))  # (B*H*S, D), (B*H*T, D)
        written = tf.reshape(tf.raw_ops.InplaceUpdate(x=entries, i=self.places, v=new), self.shape)
        written.set_shape(part.shape)
        return written


def slots_at(positions: tf.Tensor, n_head: int, like: tf.Tensor) -> Slots | SlotsInPlace:
    """Gives the slots for positions, int32 (B, T), in keys or values ``like`` this, (B*H, S, D)."""
    positions = tf.reshape(tf.tile(positions, (1, n_head)), (-1, shape_of(positions)[1]))  # (B*H, T)
    mask = tf.range(shape_of(like)[1]) <= tf.expand_dims(positions, -1)  # (B*H, T, S)
    return (SlotsInPlace if is_plain() else Slots).at(positions, mask, like)


class DecodeLayer:
    """One block's cache while tokens are appended, each row at positions of its own.

    Args:
        keys: (B*H, S, D).
        values: (B*H, S, D).
        slots: where the new entries go; what lies behind is not attended to.
    """

    def __init__(self, keys: tf.Tensor, values: tf.Tensor, slots: Slots | SlotsInPlace):
        self.keys = keys
        self.values = values
        self.slots = slots

    def update(self, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Writes keys and values (B*H, T, D) into their slots; gives the whole cache and the mask (B*H, T, S)."""
        k, v = tf.cast(k, self.keys.dtype), tf.cast(v, self.values.dtype)
        self.keys, self.values = self.slots.write(self.keys, k), self.slots.write(self.values, v)
        return self.keys, self.values, self.slots.mask


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
