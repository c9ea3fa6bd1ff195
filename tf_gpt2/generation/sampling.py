"""Logits -> the next id: greedy, temperature, top-k, top-p, min-p, typical-p.

All settings are data, one value per row of the batch, so that no change of them compiles anything anew. XLA never sorts
the vocabulary: it takes ten times longer for that than to find a threshold by bisection. Penalties and bans come first,
see ``processors``. Knows nothing of models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tf_gpt2.generation.processors import History, Processing, apply_if, asks_for_processing, process
from tf_gpt2.generation.random import gumbel
from tf_gpt2.model.loops import is_plain

FILTERS = TOP_K, TOP_P, TYPICAL_P = range(3)
"""What is kept of the vocabulary, in the order in which it applies; min-p is a comparison and comes before the last."""


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


def asks_for_more(sampling: Sampling) -> tf.Tensor:
    """Says whether any row asks for more than its likeliest token: bool ()."""
    return tf.reduce_any(sampling.temperature > 0) | asks_for_processing(sampling.processing)


def choose(logits: tf.Tensor, sampling: Sampling, history: History, stop_ids: tf.Tensor) -> tf.Tensor:
    """Chooses one id per row.

    The random numbers depend on the seed and the whole text's length only, so a row draws the same alone, in a batch,
    and in several calls.

    Args:
        logits: float32 (B, V).
        sampling: the settings.
        history: what the rows have said.
        stop_ids: int32 (K,), -1 for none.

    Returns:
        int32 (B,).
    """
    logits = process(logits, sampling.processing, history, stop_ids)
    likeliest = first_largest(logits)
    is_random = sampling.temperature > 0

    def sample() -> tf.Tensor:
        noise = gumbel(sampling.seeds, sampling.n_before + history.lengths, logits.shape[-1])
        # Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax
        drawn = first_largest(filter_logits(logits, sampling) + noise)
        return tf.where(is_random, drawn, likeliest)

    return tf.cond(tf.reduce_any(is_random), sample, lambda: likeliest)


def first_largest(x: tf.Tensor) -> tf.Tensor:
    """Gives the index of each row's largest value, of equals the first: float32 (B, V) -> int32 (B,).

    As ``tf.argmax``, which XLA fuses with the noise it is to be taken of, into a loop that LLVM can take minutes to
    compile. A value that is used twice is computed first.
    """
    if is_plain():
        return tf.argmax(x, axis=-1, output_type=tf.int32)
    n_columns = x.shape[-1]
    is_largest = x >= tf.reduce_max(x, axis=-1, keepdims=True)
    return tf.reduce_min(tf.where(is_largest, tf.range(n_columns), n_columns - 1), axis=-1)


def filter_logits(logits: tf.Tensor, sampling: Sampling) -> tf.Tensor:
    """Applies temperature, top-k, top-p, min-p, typical-p; what may not be drawn becomes -inf: float32 (B, V).

    Source: the order is that of Hugging Face's ``_get_logits_processor``.
    """
    # no logit overflows when divided by 1e-30, and a temperature below it draws as it does
    temperature = tf.where(sampling.temperature > 0, tf.maximum(sampling.temperature, 1e-30), 1.0)
    k, n_vocab = sampling.top_k, logits.shape[-1]
    k = tf.cast(tf.where((k > 0) & (k < n_vocab), k, n_vocab), tf.float32)
    targets = tf.stack([k, sampling.top_p, sampling.typical_p])  # (3, B)
    is_used = targets < tf.constant([[n_vocab], [1], [1]], tf.float32)

    def apply_next(i: tf.Tensor, logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        has_min_p = (i == TYPICAL_P) & (sampling.min_p > 0)
        logits = apply_if(has_min_p, keep_min_p, logits, sampling.min_p)
        of_rows = tf.gather(is_used, i), tf.gather(targets, i)
        return i + 1, apply_if(of_rows[0], keep_part, logits, i, *of_rows)

    start = tf.constant(0), logits / temperature[:, None]
    if is_plain():
        return functools.reduce(lambda passed, _: apply_next(*passed), FILTERS, start)[1]
    # a loop, because XLA compiles what is in a loop once
    return tf.while_loop(lambda i, _: i < len(FILTERS), apply_next, start)[1]


def keep_part(logits: tf.Tensor, which: tf.Tensor, is_used: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Applies one of ``FILTERS``: sets logits to -inf but for the first, in its order, that together reach a target.

    - top-k: the largest logits, whose number reaches k; of equals the lower id stays.
    - top-p: the largest logits, whose softmax mass reaches p; of equals the lower id stays. Source: Holtzman et al.
      2020, "The Curious Case of Neural Text Degeneration". OpenAI's own code drops the token that crosses p; the paper
      keeps it, and so does this.
    - typical-p: the most typical tokens, whose softmax mass reaches p; all that are equally typical stay. Typical is a
      token whose information, -log of its probability, is near the entropy. Source: Meister et al. 2022, "Locally
      Typical Sampling"; ties are those of Hugging Face's ``TypicalLogitsWarper``.

    Args:
        logits: float32 (B, V).
        which: int32 scalar.
        is_used: bool (B,); the other rows stay as they are.
        target: float32 (B,), k or p.
    """
    keys = sortable(tf.cond(which == TYPICAL_P, lambda: typicality(logits), lambda: logits))  # (B, V)
    weights = tf.where(which == TOP_K, 1.0, tf.nn.softmax(logits))
    target = tf.maximum(target, 1e-9)  # the likeliest token has more in any vocabulary; processors take 1e-40 for 0

    threshold = find_threshold(keys, weights, target)
    larger, tied = keys > threshold[:, None], keys == threshold[:, None]  # (B, V)
    missing = target - sum_where(larger, weights)
    each = tf.reduce_max(tf.where(tied, weights, 0.0), axis=-1)
    n_vocab = logits.shape[-1]
    n_tied = tf.cast(tf.math.ceil(tf.minimum(missing / each, float(n_vocab))), tf.int32)
    n_tied = tf.where((which == TYPICAL_P) | ~is_used, n_vocab, tf.maximum(n_tied, 1))
    kept = larger | keep_first(tied, n_tied)
    return tf.where(kept | ~is_used[:, None], logits, -float("inf"))


def find_threshold(keys: tf.Tensor, weights: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Finds the largest key that with all larger ones reaches a target; of a row that never does, the least or less.

    Args:
        keys: uint32 (B, V).
        weights: float32 (B, V).
        target: float32 (B,).

    Returns:
        uint32 (B,).
    """
    if not is_plain():
        return bisect(lambda t: sum_where(keys >= t[:, None], weights) >= target, target)
    n_keys = keys.shape[-1]
    largest = tf.math.top_k(keys, n_keys)  # outside of XLA sorting is faster
    reached = tf.cumsum(tf.gather(weights, largest.indices, batch_dims=1), axis=-1)
    n_before = tf.math.count_nonzero(reached < target[:, None], axis=-1, dtype=tf.int32)  # (B,)
    return tf.gather(largest.values, tf.minimum(n_before, n_keys - 1), batch_dims=1)


def sum_where(kept: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Sums the weights of what is kept: bool and float32 (B, V) -> float32 (B,)."""
    return tf.reduce_sum(tf.where(kept, weights, 0.0), axis=-1)


def keep_first(marked: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Keeps the first marks of each row, up to a number: bool (B, V) and int32 (B,) -> bool (B, V)."""

    def first() -> tf.Tensor:
        places = tf.cumsum(tf.cast(marked, tf.int32), axis=-1)
        return marked & (places <= numbers[:, None])

    # counting places takes longer than most of what is around it, and seldom is there one too many
    are_too_many = tf.math.count_nonzero(marked, axis=-1, dtype=tf.int32) > numbers
    return tf.cond(tf.reduce_any(are_too_many), first, lambda: marked)


def typicality(logits: tf.Tensor) -> tf.Tensor:
    """Gives minus the distance of each token's information from the entropy, in nats: (B, V)."""
    log_probs = tf.nn.log_softmax(logits)
    probs = tf.exp(log_probs)
    entropy = -tf.reduce_sum(tf.where(probs > 0, log_probs * probs, 0.0), axis=-1, keepdims=True)
    return -tf.abs(log_probs + entropy)


def keep_min_p(logits: tf.Tensor, min_p: tf.Tensor) -> tf.Tensor:
    """Sets logits to -inf that are less than p times as likely as the likeliest; 0 keeps all.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    least = tf.reduce_max(logits, axis=-1) + tf.math.log(min_p)  # (B,)
    return tf.where(logits >= least[:, None], logits, -float("inf"))


def sortable(x: tf.Tensor) -> tf.Tensor:
    """Maps float32 to uint32 in the same order, so that a threshold can be found bit by bit."""
    bits = tf.bitcast(tf.where(x == 0, 0.0, x), tf.uint32)  # -0.0 equals 0.0 and has other bits
    sign = tf.constant(1 << 31, tf.uint32)
    return tf.where(bits >= sign, tf.bitwise.invert(bits), bits | sign)


def bisect(holds: Callable[[tf.Tensor], tf.Tensor], like: tf.Tensor) -> tf.Tensor:
    """Finds per row the largest threshold for which a condition holds that turns false once as the threshold grows.

    Args:
        holds: uint32 (B,) -> bool (B,).
        like: any tensor (B,).

    Returns:
        uint32 (B,); 0 where the condition never holds.
    """

    def try_bit(i: tf.Tensor, threshold: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        candidate = threshold | tf.bitwise.left_shift(tf.constant(1, tf.uint32), tf.cast(31 - i, tf.uint32))
        return i + 1, tf.where(holds(candidate), candidate, threshold)

    start = tf.zeros_like(like, tf.uint32)
    return tf.while_loop(lambda i, _: i < 32, try_bit, (tf.constant(0), start))[1]
