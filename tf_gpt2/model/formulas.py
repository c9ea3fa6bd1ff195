"""GPT-2 as functions of its weights: token ids -> logits.

Axis letters: B batch, T query positions, S key positions, C width, H heads, D head width, F MLP width, V vocabulary,
L layers, N = B*H. ``weights`` is the parameter tree under OpenAI's names, whose matrices have the types of
``model/weights.py``; ``ops`` is a module of ``model/arithmetic``, which decides how each operation is computed.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2, ``src/model.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.config import LAYER_NORM_EPS, GPT2Config
from tf_gpt2.model.arithmetic import Ops
from tf_gpt2.model.arithmetic.activations import activate
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.weights import AnyMatrix, Int8Matrix, LoraMatrix, Matrix

Weights = Any
"""The parameter tree, or a part of it: nested dicts, ``blocks`` a list."""


class KeyValues(NamedTuple):
    """The keys and values of one block's attention, of earlier positions or with room for later ones.

    Attributes:
        keys: floats (N, S, D).
        values: floats (N, S, D).
    """

    keys: tf.Tensor
    values: tf.Tensor


class Past(NamedTuple):
    """One block's cache, and the places of new keys and values in it.

    Attributes:
        keys: floats (N, S, D).
        values: floats (N, S, D).
        places: returned by ``ops.places``; the same for all blocks.
        mask: bool (N, T, S), which keys each new position may see; the same for all blocks.
    """

    keys: tf.Tensor
    values: tf.Tensor
    places: tf.Tensor
    mask: tf.Tensor


Extend = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
"""Puts new keys and values, (N, T, D), behind earlier ones; returns all, (N, S, D), and a mask, (N or 1, T, S)."""


Drop = Callable[[tf.Tensor, str], tf.Tensor]
"""Applies dropout to a tensor whose first axis counts rows, at the place that the name tells."""


def keep_all(x: tf.Tensor, place: str) -> tf.Tensor:
    """Returns ``x``: no dropout, as outside of training."""
    return x


def hidden_states(
    ids: tf.Tensor,
    weights: Weights,
    *,
    config: GPT2Config,
    dtype: str,
    ops: Ops,
    positions: tf.Tensor | None = None,
    past: Sequence[Past] | None = None,
) -> tuple[tf.Tensor, tuple[KeyValues, ...]]:
    """Runs embeddings, blocks and the last layer norm.

    Args:
        ids: integers (B, T).
        weights: the whole tree.
        config: the hyperparameters.
        dtype: the compute dtype.
        ops: the arithmetic.
        positions: int32 (B, T), the place of each id in its sequence; 0, 1, … by default.
        past: a cache per block, for ids that follow earlier ones.

    Returns:
        The hidden states that the logits are computed from, (B, T, C); and each block's keys and values: those of
        ``ids``, (N, T, D), or the whole cache with them.
    """
    if positions is None:
        positions = tf.range(shape_of(ids)[1])[None]  # (1, T)
    x = embed(ids, positions, weights, dtype=dtype, ops=ops)  # (B, T, C)
    run_block = ops.once(functools.partial(block, config=config, ops=ops))
    present = []
    for i, w in enumerate(weights["blocks"]):
        x, key_values = run_block(x, w, past[i] if past else None, divisor_of(i, config))
        present.append(key_values)
    return norm(x, weights["ln_f"], ops=ops, epsilon=config.layer_norm_epsilon), tuple(present)


def divisor_of(layer: int, config: GPT2Config) -> float | None:
    """Returns what a block's queries are divided by, beside the usual sqrt(D); ``None`` for nothing."""
    divisor = config.score_divisor(layer)
    return None if divisor == 1 else divisor


def head_of(weights: Weights) -> AnyMatrix:
    """Returns the matrix that makes logits, (V, C): the token embedding, or one of its own."""
    return weights.get("lm_head", weights["wte"])


def logits(x: tf.Tensor, head: AnyMatrix, *, ops: Ops) -> tf.Tensor:
    """Multiplies by the matrix that ``head_of`` returns: floats (..., C) -> float32 (..., V)."""
    return tf.cast(ops.product(x, head), tf.float32)


def embed(ids: tf.Tensor, positions: tf.Tensor, weights: Weights, *, dtype: str, ops: Ops) -> tf.Tensor:
    """Adds token and position embeddings: integers (B, T) -> (B, T, C)."""
    return embed_tokens(ids, weights["wte"], dtype=dtype, ops=ops) + tf.cast(
        ops.gather(weights["wpe"], positions), dtype
    )


def embed_tokens(ids: tf.Tensor, wte: AnyMatrix, *, dtype: str, ops: Ops) -> tf.Tensor:
    """Looks up rows of the token embedding: integers (B, T) -> (B, T, C)."""
    rows = ops.gather(wte.value, ids)
    if isinstance(wte, Int8Matrix):
        rows = tf.cast(rows, tf.float32) * tf.expand_dims(ops.gather(wte.scale, ids), -1)
    return tf.cast(rows, dtype)


def block(
    x: tf.Tensor,
    w: Weights,
    past: Past | None,
    divisor: Any = None,
    *,
    config: GPT2Config,
    ops: Ops,
    drop: Drop = keep_all,
) -> tuple[tf.Tensor, KeyValues]:
    """Adds attention's and the MLP's contributions to ``x``, (B, T, C); ``divisor`` is that of ``attend``."""
    epsilon = config.layer_norm_epsilon
    x_1 = norm(x, w["ln_1"], ops=ops, epsilon=epsilon)
    attended, key_values = attention(x_1, w["attn"], past, divisor, n_head=config.n_head, ops=ops, drop=drop)
    x = x + drop(attended, "attn")
    x_2 = norm(x, w["ln_2"], ops=ops, epsilon=epsilon)
    return x + drop(mlp(x_2, w["mlp"], ops=ops, activation=config.activation), "mlp"), key_values


def attention(
    x: tf.Tensor,
    w: Weights,
    past: Past | None,
    divisor: Any = None,
    *,
    n_head: int,
    ops: Ops,
    drop: Drop = keep_all,
) -> tuple[tf.Tensor, KeyValues]:
    """Lets each position see itself and earlier ones: (B, T, C) -> (B, T, C)."""
    qkv = linear(x, w["c_attn"], ops=ops)  # (B, T, 3C)
    extend = None if past is None else functools.partial(write_behind, past, ops)
    out, key_values = attend(
        qkv,
        n_head=n_head,
        ops=ops,
        divisor=divisor,
        extend=extend,
        drop=lambda weights: drop(weights, "attn_weights"),
    )
    return linear(tf.cast(out, x.dtype), w["c_proj"], ops=ops), key_values


def write_behind(past: Past, ops: Ops, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Writes new keys and values, (N, T, D), into a cache; returns the whole of it, and the mask."""
    # Write first, then attend: in the other order XLA copies the cache at each step.
    return ops.write(past.keys, k, past.places), ops.write(past.values, v, past.places), past.mask


def attend(
    qkv: tf.Tensor,
    *,
    n_head: int,
    ops: Ops,
    divisor: Any = None,
    extend: Extend | None = None,
    drop: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
) -> tuple[tf.Tensor, KeyValues]:
    """Sums the values, weighted by how much each query looks at each key.

    Args:
        qkv: floats (B, T, 3C): queries, keys, values.
        n_head: H.
        ops: the arithmetic.
        divisor: a number or a float tensor () that divides the queries, beside the usual sqrt(D).
        extend: puts keys and values behind earlier ones; by default there are no earlier ones.
        drop: applies dropout to the attention weights; by default returns them as they are.

    Returns:
        Floats (B, T, C); and all keys and values, the earlier ones included.
    """
    q, k, v = (split_heads(part, n_head, ops) for part in tf.split(qkv, 3, axis=-1))  # each (N, T, D)
    q = q if divisor is None else q / tf.cast(divisor, q.dtype)
    k, v, mask = extend(k, v) if extend else (k, v, causal_mask(shape_of(qkv)[1]))
    weights = drop(ops.attention_weights(q, k, mask))  # (N, T, S)
    return merge_heads(ops.weighted_sum(weights, v), n_head, ops), KeyValues(k, v)


def causal_mask(n_positions: int | tf.Tensor) -> tf.Tensor:
    """Returns which key positions (columns) each query position (rows) may see: bool (1, T, T)."""
    positions = tf.range(n_positions)
    return (positions <= tf.expand_dims(positions, 1))[None]  # (1, T, T)


def split_heads(x: tf.Tensor, n_head: int, ops: Ops) -> tf.Tensor:
    """Reshapes (B, T, C) to (N, T, D); three axes, because XLA updates a cache of three axes in place."""
    n_positions, head_width = shape_of(x)[1], x.shape[-1] // n_head
    x = tf.reshape(x, (-1, n_positions, n_head, head_width))  # (B, T, H, D)
    return tf.reshape(ops.transpose_heads(x), (-1, n_positions, head_width))  # (N, T, D)


def merge_heads(x: tf.Tensor, n_head: int, ops: Ops) -> tf.Tensor:
    """Reshapes (N, T, D) back to (B, T, C)."""
    n_positions, head_width = shape_of(x)[1], x.shape[-1]
    x = tf.reshape(x, (-1, n_head, n_positions, head_width))  # (B, H, T, D)
    return tf.reshape(ops.transpose_heads(x), (-1, n_positions, n_head * head_width))  # (B, T, C)


def mlp(x: tf.Tensor, w: Weights, *, ops: Ops, activation: str = "gelu_new") -> tf.Tensor:
    """Widens, applies gelu or another activation, narrows: (B, T, C) -> (B, T, F) -> (B, T, C)."""
    return linear(activate(linear(x, w["c_fc"], ops=ops), activation, ops), w["c_proj"], ops=ops)


def linear(x: tf.Tensor, w: Weights, *, ops: Ops) -> tf.Tensor:
    """Computes ``x @ w + b``: (..., n_in) -> (..., n_out)."""
    return product(x, w["w"], ops=ops) + tf.cast(w["b"], x.dtype)


def product(x: tf.Tensor, w: AnyMatrix | LoraMatrix, *, ops: Ops) -> tf.Tensor:
    """Computes ``x @ w.T``, a low-rank addition apart: (..., n_in) -> (..., n_out)."""
    if not isinstance(w, LoraMatrix):
        return ops.product(x, w)
    added = ops.product(ops.product(x, Matrix(w.a)), Matrix(w.b))
    return ops.product(x, w.base) + added * tf.cast(w.scale, x.dtype)


def norm(x: tf.Tensor, w: Weights, *, ops: Ops, epsilon: float = LAYER_NORM_EPS) -> tf.Tensor:
    """Computes layer norm with gain and bias over the last axis: (..., C) -> (..., C)."""
    return ops.norm(x, w["g"], w["b"], epsilon)
