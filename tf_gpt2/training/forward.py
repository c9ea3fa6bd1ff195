"""The forward pass of a training step: the formulas, with dropout whose seeds are given, and blocks that recompute.

Which numbers dropout sets to zero is a function of the seed, the update, the row of the batch, the place in the model
and the place in the row, and of nothing else: it is the same on one device and on several, and when a block is computed
again for its gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import fused
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.formulas import Drop, Weights

PLACES = {"attn_weights": 0, "attn": 1, "mlp": 2, "embd": 3}
"""A number for each place in a block where dropout acts."""

ops: Any = fused


def hidden_states(
    tokens: tf.Tensor,
    weights: Weights,
    *,
    config: GPT2Config,
    rate: float = 0.0,
    row_keys: tf.Tensor | None = None,
    remat: bool = False,
) -> tf.Tensor:
    """Adds positions, and runs blocks and the last layer norm as ``formulas.hidden_states`` does, for training.

    Args:
        tokens: rows of the token embedding, floats (B, T, C) in the compute dtype.
        weights: the whole tree.
        config: the hyperparameters.
        rate: of dropout.
        row_keys: uint32 (B,), see ``keys_of_rows``; needed where ``rate`` is above 0.
        remat: keep only the input of each block, and compute the block again for its gradients.

    Returns:
        Floats (B, T, C) in the compute dtype.
    """
    positions = tf.range(shape_of(tokens)[1])[None]  # (1, T)
    x = tokens + tf.cast(ops.gather(weights["wpe"], positions), tokens.dtype)  # (B, T, C)
    x = dropout_at(0, rate, row_keys)(x, "embd")
    for i, w in enumerate(weights["blocks"]):
        run = functools.partial(run_block, number=i + 1, config=config, rate=rate)
        x = recomputed(run, x, w, row_keys) if remat else run(x, w, row_keys)
    return formulas.norm(x, weights["ln_f"], ops=ops, epsilon=config.layer_norm_epsilon)


def run_block(
    x: tf.Tensor, w: Weights, row_keys: tf.Tensor | None, *, number: int, config: GPT2Config, rate: float
) -> tf.Tensor:
    """Runs one block with dropout: (B, T, C) -> (B, T, C)."""
    drop, divisor = dropout_at(number, rate, row_keys), formulas.divisor_of(number - 1, config)
    return formulas.block(x, w, None, divisor, config=config, ops=ops, drop=drop)[0]


def recomputed(run: Any, x: tf.Tensor, w: Weights, row_keys: tf.Tensor | None) -> tf.Tensor:
    """Runs a block so that nothing but its arguments is kept for its gradients.

    ``tf.recompute_grad`` takes tensors by position only: variables are read before, and dropout's keys are tensors.
    """
    flat = tf.nest.flatten(w)  # None where a matrix has no twin
    tensors = [tf.convert_to_tensor(leaf) for leaf in flat if leaf is not None]
    keys = [] if row_keys is None else [row_keys]

    @tf.recompute_grad
    def body(x: tf.Tensor, *args: tf.Tensor) -> tf.Tensor:
        rest = iter(args)
        tree = tf.nest.pack_sequence_as(w, [None if leaf is None else next(rest) for leaf in flat])
        return run(x, tree, next(rest, None))

    return body(x, *tensors, *keys)


# ---- dropout


def dropout_at(number: int, rate: float, row_keys: tf.Tensor | None) -> Drop:
    """Returns dropout for a block.

    Args:
        number: 0 for the embeddings, then 1 for the first block, and so on.
        rate: the share of numbers that become zero.
        row_keys: uint32 (B,).
    """
    if not rate or row_keys is None:
        return formulas.keep_all

    def drop(x: tf.Tensor, place: str) -> tf.Tensor:
        rows = tf.reshape(x, (row_keys.shape[0], -1))  # (B, n): attention's weights have B*H first
        salt = tf.constant(number * len(PLACES) + PLACES[place], tf.uint32)
        return tf.reshape(dropped(rows, row_keys, salt, rate), shape_of(x))

    return drop


def dropped(x: tf.Tensor, row_keys: tf.Tensor, salt: tf.Tensor, rate: float) -> tf.Tensor:
    """Sets numbers to zero, and divides the others by the share that is kept: floats (B, n), uint32 (B,), uint32 ()."""
    bound = tf.constant(min(round(rate * 2**32), 2**32 - 1), tf.uint32)
    scale = tf.constant(1 / (1 - rate))

    @tf.custom_gradient
    def with_gradient(x: tf.Tensor) -> Any:
        return masked(x, row_keys, salt, bound, scale), lambda dy: masked(dy, row_keys, salt, bound, scale)

    return with_gradient(x)


@fused.compiled
def masked(x: tf.Tensor, row_keys: tf.Tensor, salt: tf.Tensor, bound: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Multiplies by ``scale`` where the bits of a number's place are at least ``bound``, else by 0."""
    places = tf.cast(tf.range(tf.shape(x)[1]), tf.uint32)[None]  # (1, n)
    bits = mixed(mixed(places ^ mixed(row_keys + mixed(salt))[:, None]) + row_keys[:, None])  # (B, n)
    # compared as signed, with the sign bit flipped: TensorFlow compares no uint32 on a CPU
    sign = tf.constant(1 << 31, tf.uint32)
    keeps = tf.bitcast(bits ^ sign, tf.int32) >= tf.bitcast(bound ^ sign, tf.int32)
    return tf.where(keeps, x * tf.cast(scale, x.dtype), tf.zeros([], x.dtype))


def keys_of_rows(seed: tf.Tensor, update: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Returns a key for each row of an update.

    Args:
        seed: uint32 (), of the run.
        update: uint32 (), the number of the update.
        rows: uint32 (B,), the place of each row in the update's batch, counted over all devices and micro-batches.

    Returns:
        uint32 (B,).
    """
    return mixed(rows + mixed(update + mixed(seed + tf.constant(0x9E3779B9, tf.uint32))))


def mixed(x: tf.Tensor) -> tf.Tensor:
    """Mixes the bits of uint32 words.

    Source: Wellons 2018, "Prospecting for Hash Functions", ``lowbias32``.
    """
    x ^= shifted(x, 16)
    x *= tf.constant(0x7FEB352D, tf.uint32)
    x ^= shifted(x, 15)
    x *= tf.constant(0x846CA68B, tf.uint32)
    return x ^ shifted(x, 16)


def shifted(x: tf.Tensor, distance: int) -> tf.Tensor:
    """Shifts the bits of uint32 words to the right."""
    return tf.bitwise.right_shift(x, tf.constant(distance, tf.uint32))
