"""Counter-based random numbers: the same bits compiled by XLA, in a plain graph and eagerly.

TensorFlow's ``tf.random.stateless_*`` give other numbers under XLA than without, for one seed; these do not.
"""

from __future__ import annotations

import tensorflow as tf

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
KEY_PARITY = 0x1BD11BDA
ROUND_GROUPS = 5


def threefry(key: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Turns two words of counter into two random words: Threefry-2x32 with 20 rounds.

    Args:
        key: two uint32 tensors that broadcast to the counter's shape.
        counter: two uint32 tensors of one shape.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    keys = (*key, key[0] ^ key[1] ^ tf.constant(KEY_PARITY, tf.uint32))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(ROUND_GROUPS):
        for distance in ROTATIONS[group % 2]:
            x += y
            y = rotate_left(y, distance) ^ x
        x += keys[(group + 1) % 3]
        y += keys[(group + 2) % 3] + tf.constant(group + 1, tf.uint32)
    return x, y


def rotate_left(x: tf.Tensor, distance: int) -> tf.Tensor:
    """Rotates the bits of uint32 words; a product and a sum, which are faster than a shift and an "or"."""
    left = x * tf.constant(1 << distance, tf.uint32)
    return left + tf.bitwise.right_shift(x, tf.constant(32 - distance, tf.uint32))


def gumbel(seeds: tf.Tensor, positions: tf.Tensor, n_columns: int) -> tf.Tensor:
    """Draws standard Gumbel noise that depends on seed, position and column alone.

    Args:
        seeds: uint32 (B, 2), low and high word of each row's seed.
        positions: int32 (B,).
        n_columns: V.

    Returns:
        float32 (B, V).
    """
    key = seeds[:, :1], seeds[:, 1:]  # each (B, 1)
    columns = tf.cast(tf.range(n_columns), tf.uint32)[None]  # (1, V)
    rows = tf.cast(positions, tf.uint32)[:, None]  # (B, 1)
    bits, _ = threefry(key, (rows + tf.zeros_like(columns), columns + tf.zeros_like(rows)))  # (B, V)
    mantissa = tf.cast(tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32)), tf.float32)
    uniform = (mantissa + 0.5) * 2.0**-23  # strictly between 0 and 1
    return -tf.math.log(-tf.math.log(uniform))
