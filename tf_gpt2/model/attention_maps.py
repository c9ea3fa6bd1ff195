"""Computes the logits and every head's attention weights of one row: for pictures, not for speed.

The layers do not return their attention weights, so these are computed once more from each block's input.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.gpt2 import GPT2Model, check_ids
from tf_gpt2.model.layers import CausalSelfAttention


def logits_and_attention(model: GPT2Model, ids: tf.Tensor) -> tuple[tf.Tensor, np.ndarray]:
    """Runs one row through the model.

    Args:
        model: the model.
        ids: integers (1, T).

    Returns:
        Logits, float32 (T, V); attention weights, float32 (L, H, T, S) with S = T, each row of sum 1.

    Raises:
        ContextLengthError: when T exceeds ``n_ctx``.
        ValueError: when ids are empty or outside the vocabulary.
    """
    check_ids(ids, model.config)
    x = model.token_embeddings(ids) + tf.cast(model.wpe.value[: ids.shape[1]], model.compute_dtype)  # (1, T, C)
    weights = []
    for block in model.blocks:
        weights.append(weights_of(block.attn, block.ln_1(x)))
        x = block(x)
    return model.logits(model.ln_f(x))[0], np.stack(weights)


def weights_of(attn: CausalSelfAttention, x: tf.Tensor) -> np.ndarray:
    """Computes one layer's attention weights: floats (1, T, C) -> float32 (H, T, S)."""
    q, k, _ = (formulas.split_heads(x, attn.n_head, plain) for x in tf.split(attn.c_attn(x), 3, axis=-1))  # (H, T, D)
    q = q / tf.cast(attn.score_divisor, q.dtype)
    return plain.attention_weights(q, k, formulas.causal_mask(x.shape[1])).numpy()
