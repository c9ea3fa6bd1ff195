"""Logits -> the next id: greedy, or drawn at a temperature of what the filters leave.

All settings are data, one value per row of the batch, so that no change of them compiles anything anew. Penalties and
bans come first, see ``processors``. Knows nothing of models.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.filters import FILTERS, TYPICAL_P, keep_likeliest, keep_min_p, keep_part
from tf_gpt2.generation.processors import History, Processing, apply_if, process
from tf_gpt2.generation.random import gumbel
from tf_gpt2.model.arithmetic import Ops


class Sampling(NamedTuple):
    """How each row chooses; the definitions are in ``settings.SamplingOptions``.

    Attributes:
        temperature: float32 (B,); 0 takes the likeliest token.
        top_k: int32 (B,); only the k likeliest remain, of equals the lower id; 0 keeps all.
        top_p: float32 (B,) in (0, 1]; only the smallest set of likeliest tokens whose mass reaches p remains, after
            top-k.
        min_p: float32 (B,) in [0, 1]; only what is at least p times as likely as the likeliest remains, after top-p.
        typical_p: float32 (B,) in (0, 1]; only the most typical tokens whose mass reaches p remain, after min-p.
        seeds: uint32 (B, 2), low and high word.
        processing: what happens to the logits before.
        n_before: int32 (B,), tokens of the text before the window that the model sees.
        n_new: int32 (B,), how many new tokens there were when the window was read; they count as new all the same.
    """

    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    min_p: tf.Tensor
    typical_p: tf.Tensor
    seeds: tf.Tensor
    processing: Processing
    n_before: tf.Tensor
    n_new: tf.Tensor


def choose(logits: tf.Tensor, sampling: Sampling, history: History, stop_ids: tf.Tensor, ops: Ops) -> tf.Tensor:
    """Chooses one id per row.

    The random numbers depend on the seed and the whole text's length only, so a row draws the same alone, in a batch,
    and in several calls.

    Args:
        logits: float32 (B, V).
        sampling: the settings.
        history: what the rows have said.
        stop_ids: int32 (K,), -1 for none.
        ops: the arithmetic.

    Returns:
        int32 (B,).
    """
    logits = process(logits, sampling.processing, history, stop_ids, ops)
    likeliest = ops.first_largest(logits)
    is_random = sampling.temperature > 0

    def sample() -> tf.Tensor:
        noise = gumbel(sampling.seeds, sampling.n_before + history.lengths, logits.shape[-1])
        # Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax
        drawn = ops.first_largest(filter_logits(logits, sampling, ops) + noise)
        return tf.where(is_random, drawn, likeliest)

    return tf.cond(tf.reduce_any(is_random), sample, lambda: likeliest)


def filter_logits(logits: tf.Tensor, sampling: Sampling, ops: Ops) -> tf.Tensor:
    """Applies temperature, top-k, top-p, min-p, typical-p; what may not be drawn becomes -inf: float32 (B, V).

    Source: the order is that of Hugging Face's ``_get_logits_processor``.
    """
    s = sampling
    logits = logits / temperature_of(s)[:, None]
    if ops.SORTS:
        is_cut = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)
        logits = apply_if(ops, is_cut, keep_likeliest, logits, s.top_k, s.top_p, s.min_p)
        is_typical = s.typical_p < 1
        return apply_if(ops, is_typical, keep_part, logits, tf.constant(TYPICAL_P), is_typical, s.typical_p, ops)
    k, n_vocab = s.top_k, logits.shape[-1]
    k = tf.cast(tf.where((k > 0) & (k < n_vocab), k, n_vocab), tf.float32)
    targets = tf.stack([k, s.top_p, s.typical_p])  # (3, B)
    is_used = targets < tf.constant([[n_vocab], [1], [1]], tf.float32)

    def apply_next(i: tf.Tensor, logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = apply_if(ops, (i == TYPICAL_P) & (s.min_p > 0), keep_min_p, logits, s.min_p)
        of_rows = tf.gather(is_used, i), tf.gather(targets, i)
        return i + 1, apply_if(ops, of_rows[0], keep_part, logits, i, *of_rows, ops)

    # a loop, because XLA compiles what is in a loop once
    return tf.while_loop(lambda i, _: i < len(FILTERS), apply_next, (tf.constant(0), logits))[1]


def temperature_of(sampling: Sampling) -> tf.Tensor:
    """Gives what to divide logits by, float32 (B,); 1 for rows that take the likeliest id."""
    # no logit overflows when divided by 1e-30, and a temperature below it draws as it does
    return tf.where(sampling.temperature > 0, tf.maximum(sampling.temperature, 1e-30), 1.0)


def repeat(sampling: Sampling, times: int) -> Sampling:
    """Repeats each row's settings, so that several places of one row choose at once."""
    if times == 1:
        return sampling

    def of_rows(settings: Any, shared: tuple[str, ...]) -> dict[str, tf.Tensor]:
        return {name: tf.repeat(x, times, axis=0) for name, x in settings._asdict().items() if name not in shared}

    processing = sampling.processing._replace(**of_rows(sampling.processing, ("bias", "bad_words")))
    return Sampling(**of_rows(sampling, ("processing",)), processing=processing)
