"""Logits -> the next id: greedy, or drawn at a temperature of what the filters leave.

All settings are data, one value per row of the batch, so that no change of them compiles anything anew. Penalties and
bans come first, see ``processors``.

XLA never sorts the vocabulary: it takes ten times longer for that than to find a threshold by bisection. Elsewhere it
is faster to sort, of top-k and top-p only what may remain. Knows nothing of models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.processors import EXCLUDED, History, Processing, apply_if, change_allowed, process
from tf_gpt2.generation.random import gumbel
from tf_gpt2.model.arithmetic import Ops
from tf_gpt2.runtime.tf_internals import not_inlined

FILTERS = TOP_K, TOP_P, TYPICAL_P = range(3)
"""What is kept of the vocabulary, in the order in which it applies; min-p is a comparison and comes before the last."""
LEAST_P = 1e-9
"""The likeliest token has more in any vocabulary; processors take 1e-40 for 0."""
SMALLEST = np.finfo(np.float32).tiny
"""The smallest number that processors do not take for 0."""
MARGIN = 0.9
"""Safety factor against float32 rounding of the bound in ``how_many_to_sort``."""


class Sampling(NamedTuple):
    """How each row chooses; the definitions are in ``options.SamplingOptions``.

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


def shared(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Makes a function of tensors and an arithmetic one graph per shapes for all callers, not one in each caller's.

    To make the graph of choosing takes as long as that of twelve blocks; another model or a larger cache needs no new
    one.
    """
    graph_for = functools.cache(lambda ops: not_inlined(functools.partial(function, ops=ops)))

    @functools.wraps(function)
    def call(*tensors: Any, ops: Any) -> tf.Tensor:
        if tf.executing_eagerly():
            return function(*tensors, ops=ops)
        ids = graph_for(ops)(*tensors)
        ids.set_shape(tensors[0].shape[:1])  # TensorFlow may take a graph that was made for any number of rows
        return ids

    return call


@shared
def choose(logits: tf.Tensor, sampling: Sampling, history: History, stop_ids: tf.Tensor, *, ops: Ops) -> tf.Tensor:
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
    places = sampling.n_before + history.lengths

    def sample() -> tf.Tensor:
        return tf.where(is_random, draw(logits, sampling, places, ops=ops), likeliest)

    return tf.cond(tf.reduce_any(is_random), sample, lambda: likeliest)


@shared
def draw(logits: tf.Tensor, sampling: Sampling, places: tf.Tensor, *, ops: Ops) -> tf.Tensor:
    """Draws one id per row of what the filters leave, at places of texts: float32 (B, V), int32 (B,) -> int32 (B,)."""
    noise = gumbel(sampling.seeds, places, logits.shape[-1])
    # Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax
    return ops.first_largest(filter_logits(logits, sampling, ops) + noise)


def filter_logits(logits: tf.Tensor, sampling: Sampling, ops: Ops) -> tf.Tensor:
    """Applies temperature, top-k, top-p, min-p, typical-p; what may not be drawn becomes ``EXCLUDED``: (B, V).

    Source: the order is that of Hugging Face's ``_get_logits_processor``.
    """
    s = sampling
    logits = change_allowed(logits, lambda allowed: allowed / temperature_of(s)[:, None])
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
    """Returns what to divide logits by, float32 (B,); 1 for rows that take the likeliest id."""
    # no logit comes near EXCLUDED when divided by 1e-20, and a temperature below it draws as it does
    return tf.where(sampling.temperature > 0, tf.maximum(sampling.temperature, 1e-20), 1.0)


def repeat(sampling: Sampling, times: int) -> Sampling:
    """Repeats each row's settings, so that several places of one row choose at once."""
    if times == 1:
        return sampling

    def of_rows(settings: Any, shared: tuple[str, ...]) -> dict[str, tf.Tensor]:
        return {name: tf.repeat(x, times, axis=0) for name, x in settings._asdict().items() if name not in shared}

    processing = sampling.processing._replace(**of_rows(sampling.processing, ("bias", "bad_words")))
    return Sampling(**of_rows(sampling, ("processing",)), processing=processing)


class Cut(NamedTuple):
    """Top-k, top-p and min-p as ``keep_part`` and ``keep_min_p`` have them, by sorting; all rows alike, no branches.

    Attributes:
        has_k: bool (B, 1).
        has_p: bool (B, 1).
        k: int32 (B, 1), V where it is not used.
        p: float32 (B, 1), more than 1 where it is not used.
        log_min_p: float32 (B, 1), ``EXCLUDED`` where it is not used.
    """

    has_k: tf.Tensor
    has_p: tf.Tensor
    k: tf.Tensor
    p: tf.Tensor
    log_min_p: tf.Tensor

    @classmethod
    def of(cls, top_k: tf.Tensor, top_p: tf.Tensor, min_p: tf.Tensor, n_vocab: int) -> Cut:
        """Makes it of int32 (B,), 0 for all, float32 (B,), 1 for all, and float32 (B,), 0 for all."""
        top_k, top_p = top_k[:, None], top_p[:, None]
        has_k, has_p = (top_k > 0) & (top_k < n_vocab), top_p < 1
        return cls(
            has_k=has_k,
            has_p=has_p,
            k=tf.where(has_k, top_k, n_vocab),
            p=tf.where(has_p, tf.maximum(top_p, LEAST_P), 2.0),
            log_min_p=log_or_least(min_p)[:, None],
        )

    def keeps(self, logits: tf.Tensor) -> tf.Tensor:
        """Computes what remains: float32 (B, V) -> bool (B, V)."""
        n_vocab = logits.shape[-1]
        probs = tf.exp(tf.nn.log_softmax(logits))  # oneDNN's softmax takes longer to begin
        n = self.how_many_to_sort(probs)
        in_order, ids = tf.math.top_k(logits, n)  # (B, N), of equals the lower id first

        mass = tf.where(tf.range(n) < self.k, tf.gather(probs, ids, batch_dims=1), 0.0)
        reached = tf.cumsum(mass, axis=-1)  # (B, N)
        whole = tf.where(self.has_k, reached[:, -1:], 1.0)
        n_before = count(reached < self.p * whole)  # (B, 1), N where p is not reached, so that all V remain
        last = tf.minimum(n_before, tf.minimum(self.k, n) - 1)
        least = tf.where(self.has_k | (n_before < n), tf.gather(in_order, last, batch_dims=1), EXCLUDED)

        last_id = tf.gather(ids, last, batch_dims=1)
        kept = (logits > least) | ((logits == least) & (tf.range(n_vocab) <= last_id))
        kept &= is_likely_enough(logits, in_order[:, :1], self.log_min_p)
        kept.set_shape(logits.shape)  # which TensorFlow does not find out
        return kept

    def how_many_to_sort(self, probs: tf.Tensor) -> tf.Tensor:
        """Computes how many of the likeliest hold what remains: float32 (B, V) -> int32 ().

        If n tokens hold mass m > p, any of them with less than (m - p) / n can be dropped, and p is still reached. The
        bound is applied twice: to all tokens, then to those it left.
        """
        n_vocab = probs.shape[-1]
        is_likely = probs >= (1 - self.p) / n_vocab
        rest = sum_where(is_likely, probs)[:, None] - self.p
        n_likely = count(probs >= MARGIN * rest / tf.cast(count(is_likely), tf.float32))
        n = tf.reduce_max(tf.where(self.has_k, self.k, tf.where(self.has_p, n_likely, 1)))
        return tf.where(n > n_vocab // 4, n_vocab, n)  # it is faster to sort all than most of it


def count(marked: tf.Tensor) -> tf.Tensor:
    """Counts what is true in each row: bool (B, V) -> int32 (B, 1)."""
    return tf.reduce_sum(tf.cast(marked, tf.int32), axis=-1, keepdims=True)


def keep_likeliest(logits: tf.Tensor, top_k: tf.Tensor, top_p: tf.Tensor, min_p: tf.Tensor) -> tf.Tensor:
    """Applies top-k, top-p and min-p to float32 (B, V) where XLA does not compile."""
    return tf.where(Cut.of(top_k, top_p, min_p, logits.shape[-1]).keeps(logits), logits, EXCLUDED)


def keep_part(logits: tf.Tensor, which: tf.Tensor, is_used: tf.Tensor, target: tf.Tensor, ops: Ops) -> tf.Tensor:
    """Applies one of ``FILTERS``: excludes all ids but the first, in its order, that together reach a target.

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
        ops: the arithmetic.
    """
    keys = sortable(tf.cond(which == TYPICAL_P, lambda: typicality(logits), lambda: logits))  # (B, V)
    weights = tf.where(which == TOP_K, 1.0, tf.nn.softmax(logits))
    target = tf.maximum(target, LEAST_P)

    threshold = find_threshold(keys, weights, target, ops)
    larger, tied = keys > threshold[:, None], keys == threshold[:, None]  # (B, V)
    missing = target - sum_where(larger, weights)
    each = tf.reduce_max(tf.where(tied, weights, 0.0), axis=-1)
    n_vocab = logits.shape[-1]
    n_missing = missing / tf.maximum(each, SMALLEST)  # where they have no mass, all
    n_tied = tf.cast(tf.math.ceil(tf.minimum(n_missing, float(n_vocab))), tf.int32)
    n_tied = tf.where((which == TYPICAL_P) | ~is_used, n_vocab, tf.maximum(n_tied, 1))
    kept = larger | keep_first(tied, n_tied)
    return tf.where(kept | ~is_used[:, None], logits, EXCLUDED)


def find_threshold(keys: tf.Tensor, weights: tf.Tensor, target: tf.Tensor, ops: Ops) -> tf.Tensor:
    """Finds the largest key that with all larger ones reaches a target; of a row that never does, the least or less.

    Args:
        keys: uint32 (B, V).
        weights: float32 (B, V).
        target: float32 (B,).
        ops: the arithmetic.

    Returns:
        uint32 (B,).
    """
    if not ops.SORTS:
        return bisect(lambda t: sum_where(keys >= t[:, None], weights) >= target, target)
    n_keys = keys.shape[-1]
    largest = tf.math.top_k(keys, n_keys)  # outside of XLA sorting is faster
    reached = tf.cumsum(tf.gather(weights, largest.indices, batch_dims=1), axis=-1)
    n_before = count(reached < target[:, None])  # (B, 1)
    return tf.gather(largest.values, tf.minimum(n_before, n_keys - 1), batch_dims=1)[:, 0]


def sum_where(kept: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Sums the weights of what is kept: bool and float32 (B, V) -> float32 (B,)."""
    return tf.reduce_sum(tf.where(kept, weights, 0.0), axis=-1)


def keep_first(marked: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Keeps the first marks of each row, up to a number: bool (B, V) and int32 (B,) -> bool (B, V)."""

    def first() -> tf.Tensor:
        places = tf.cumsum(tf.cast(marked, tf.int32), axis=-1)
        return marked & (places <= numbers[:, None])

    # counting places takes longer than most of what is around it, and seldom is there one too many
    are_too_many = count(marked) > numbers[:, None]
    return tf.cond(tf.reduce_any(are_too_many), first, lambda: marked)


def typicality(logits: tf.Tensor) -> tf.Tensor:
    """Computes minus the distance of each token's information from the entropy, in nats: (B, V).

    The logarithm of the softmax's denominator is in both and cancels. At a high temperature it would be a large number
    beside small differences, and rounding would decide. The mean takes float64, as XLA and TensorFlow add up in
    different orders.
    """
    z = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    weights = tf.cast(tf.exp(z), tf.float64)
    weighted = tf.where(weights > 0, weights * tf.cast(z, tf.float64), 0.0)
    mean = tf.reduce_sum(weighted, axis=-1, keepdims=True) / tf.reduce_sum(weights, axis=-1, keepdims=True)
    return -tf.abs(z - tf.cast(mean, tf.float32))


def keep_min_p(logits: tf.Tensor, min_p: tf.Tensor) -> tf.Tensor:
    """Excludes ids that are less than p times as likely as the likeliest; 0 keeps all.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    largest = tf.reduce_max(logits, axis=-1, keepdims=True)  # (B, 1)
    return tf.where(is_likely_enough(logits, largest, log_or_least(min_p)[:, None]), logits, EXCLUDED)


def is_likely_enough(logits: tf.Tensor, largest: tf.Tensor, log_min_p: tf.Tensor) -> tf.Tensor:
    """Computes what min-p keeps: float32 (B, V) and twice (B, 1) -> bool (B, V).

    The difference is compared, since beside a large logit the sum with log(p) would be rounded.
    """
    return tf.maximum(logits - largest, EXCLUDED) >= log_min_p


def log_or_least(p: tf.Tensor) -> tf.Tensor:
    """Computes log(p), and for 0 the lowest number that there is, float32 (B,)."""
    return tf.where(p > 0, tf.math.log(tf.maximum(p, SMALLEST)), EXCLUDED)


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
