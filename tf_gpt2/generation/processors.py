"""Logits -> logits: bias, penalties and bans, which look at what a row has said so far.

All settings are data, and what no row uses costs nothing but the question whether one does. Random rows and greedy ones
are processed alike; what only makes sense for a draw is in ``choose``. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.model.arithmetic import Ops
from tf_gpt2.model.arithmetic.shapes import shape_of

EXCLUDED = tf.float32.min
"""The logit of an id that may not be chosen; not -inf, at which TensorFlow's checks of numbers stop.

What is added or subtracted here and in ``choose`` is so much smaller that the sum is still this number.
"""


class History(NamedTuple):
    """What the rows have said.

    Attributes:
        ids: int32 (B, S), prompt and new tokens. What lies past a row's length means nothing.
        lengths: int32 (B,), tokens so far.
        prompt_lengths: int32 (B,), how many of them are the prompt's; below 0 by the new tokens that have left the
            window.
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor


class Processing(NamedTuple):
    """What to change; the definitions are in ``options.SamplingOptions``.

    Attributes:
        bias: float32 (V,), added to the logits of each row; ``EXCLUDED`` bans an id.
        repetition_penalty: float32 (B,); 1 changes nothing.
        presence_penalty: float32 (B,); 0 changes nothing.
        frequency_penalty: float32 (B,); 0 changes nothing.
        no_repeat_ngram_size: int32 (B,); 0 changes nothing.
        bad_words: int32 (N, M), the ids of each sequence on the right, -1 before them; all -1 for none.
        min_new_tokens: int32 (B,); 0 changes nothing.
    """

    bias: tf.Tensor
    repetition_penalty: tf.Tensor
    presence_penalty: tf.Tensor
    frequency_penalty: tf.Tensor
    no_repeat_ngram_size: tf.Tensor
    bad_words: tf.Tensor
    min_new_tokens: tf.Tensor


def process(logits: tf.Tensor, processing: Processing, history: History, stop_ids: tf.Tensor, ops: Ops) -> tf.Tensor:
    """Applies bias, penalties and bans to float32 (B, V); what is banned becomes ``EXCLUDED``.

    A row that is left with nothing keeps the logits it had: it must say something.

    Args:
        logits: float32 (B, V).
        processing: the settings.
        history: what the rows have said.
        stop_ids: int32 (K,), which ``min_new_tokens`` bans; -1 for none.
        ops: the arithmetic.

    Source: the order is that of ``_get_logits_processor`` in Hugging Face's transformers 5, ``generation/utils.py``;
    presence and frequency penalties, which it does not have, follow the repetition penalty as in vLLM.
    """
    p = processing
    is_short = history.lengths - history.prompt_lengths < p.min_new_tokens
    has_bans = tf.reduce_any(p.no_repeat_ngram_size > 0) | tf.reduce_any(p.bad_words >= 0) | tf.reduce_any(is_short)
    has_penalties = (p.repetition_penalty != 1) | (p.presence_penalty != 0) | (p.frequency_penalty != 0)
    is_used = has_bans | tf.reduce_any(has_penalties) | tf.reduce_any(p.bias != 0)

    def apply_all() -> tf.Tensor:
        processed = apply_if(ops, has_penalties, penalize, logits + p.bias, p, history)
        processed = apply_if(ops, has_bans, ban, processed, p, history, tf.where(is_short[:, None], stop_ids, -1))
        is_left = tf.reduce_max(processed, axis=-1, keepdims=True) > EXCLUDED
        return tf.where(is_left, processed, logits)

    return tf.cond(is_used, ops.branch(apply_all), lambda: logits)


def apply_if(
    ops: Ops, is_used: tf.Tensor, change: Callable[..., tf.Tensor], logits: tf.Tensor, *settings: Any
) -> tf.Tensor:
    """Applies a change of the logits if any of ``is_used`` is true."""
    return tf.cond(tf.reduce_any(is_used), ops.branch(lambda: change(logits, *settings)), lambda: logits)


def penalize(logits: tf.Tensor, processing: Processing, history: History) -> tf.Tensor:
    """Makes ids that were said less likely, or likelier where penalties are below 1 or 0: (B, V).

    The repetition penalty divides positive logits of ids in prompt or text, and multiplies the others. Of ids among the
    new tokens the presence penalty is subtracted once, the frequency penalty for each time.

    Source: Keskar et al. 2019, "CTRL", with Hugging Face's ``RepetitionPenaltyLogitsProcessor`` for negative logits;
    OpenAI's API reference, "Frequency and presence penalties"; vLLM counts the new tokens only, too.
    """
    places, n_vocab = places_of(history), logits.shape[-1]
    is_said = places < history.lengths[:, None]
    n_said = count(history.ids, is_said, n_vocab)
    n_new = count(history.ids, is_said & (places >= history.prompt_lengths[:, None]), n_vocab)
    repetition = processing.repetition_penalty[:, None]

    def repeat_less(logits: tf.Tensor) -> tf.Tensor:
        return tf.where(n_said > 0, tf.where(logits < 0, logits * repetition, logits / repetition), logits)

    logits = change_allowed(logits, repeat_less)
    each_time = processing.frequency_penalty[:, None] * tf.cast(n_new, tf.float32)
    return logits - each_time - processing.presence_penalty[:, None] * tf.cast(n_new > 0, tf.float32)


def change_allowed(logits: tf.Tensor, change: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Changes logits, float32 (B, V), but those that are ``EXCLUDED``: products and quotients of these overflow."""
    is_excluded = logits == EXCLUDED
    return tf.where(is_excluded, EXCLUDED, change(tf.where(is_excluded, 0.0, logits)))


def ban(logits: tf.Tensor, processing: Processing, history: History, stop_ids: tf.Tensor) -> tf.Tensor:
    """Sets to ``EXCLUDED`` what would repeat an n-gram, end a bad word or end a row too early: (B, V).

    Args:
        logits: float32 (B, V).
        processing: the settings.
        history: what the rows have said.
        stop_ids: int32 (B, K), ids that the row may not say; -1 for none.

    Source: Hugging Face's ``MinNewTokensLengthLogitsProcessor`` for the last.
    """
    repeats = ends_ngram(processing.no_repeat_ngram_size, history)  # (B, S)
    bad, is_begun = bad_ends(processing.bad_words, history)  # (B, N), (B, N)
    ids = tf.concat([history.ids, bad, stop_ids], axis=1)
    banned = tf.concat([repeats, is_begun, stop_ids >= 0], axis=1)
    return tf.where(count(ids, banned, logits.shape[-1]) > 0, EXCLUDED, logits)


def ends_ngram(sizes: tf.Tensor, history: History) -> tf.Tensor:
    """Computes at which places a row has an id that, said next, would end an n-gram said before, the prompt included.

    Args:
        sizes: int32 (B,); 0 for no place.
        history: what the rows have said.

    Returns:
        bool (B, S).

    Source: Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization"; Hugging Face's
    ``NoRepeatNGramLogitsProcessor``.
    """
    n_before = sizes[:, None] - 1  # (B, 1)

    def may_change(n_same: tf.Tensor, before: tf.Tensor, matches: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any(matches & (n_same < n_before))

    def compare(n_same: tf.Tensor, before: tf.Tensor, matches: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Compares with the row's end one token more, further back."""
        before = tf.pad(before[:, :-1], [[0, 0], [1, 0]], constant_values=-1)
        at_end = tf.gather(history.ids, tf.maximum(history.lengths - 1 - n_same, 0), batch_dims=1)  # (B,)
        return n_same + 1, before, matches & ((before == at_end[:, None]) | (n_same >= n_before))

    matches = (sizes[:, None] > 0) & (places_of(history) < history.lengths[:, None])
    return tf.while_loop(may_change, compare, (tf.constant(0), history.ids, matches))[2]


def bad_ends(bad_words: tf.Tensor, history: History) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the last id of each sequence, and whether the row ends with its other ids: int32 (B, N), bool (B, N).

    Source: Hugging Face's ``NoBadWordsLogitsProcessor``.
    """
    first, last = bad_words[:, :-1], bad_words[:, -1]  # (N, M - 1), (N,)
    places = history.lengths[:, None] - tf.range(first.shape[1], 0, -1)  # (B, M - 1)
    said = tf.gather(history.ids, tf.maximum(places, 0), batch_dims=1)
    is_same = (places >= 0)[:, None] & (said[:, None] == first)  # (B, N, M - 1)
    is_begun = tf.reduce_all(is_same | (first < 0), axis=-1) & (last >= 0)
    return tf.broadcast_to(last, shape_of(is_begun)), is_begun


def count(ids: tf.Tensor, counted: tf.Tensor, n_vocab: int) -> tf.Tensor:
    """Counts how often each id is marked in its row: int32 (B, N), bool (B, N) -> int32 (B, V)."""
    n_rows, n_places = shape_of(ids)
    rows = tf.broadcast_to(tf.range(n_rows)[:, None], (n_rows, n_places))
    places = tf.stack([rows, tf.where(counted, ids, 0)], axis=-1)  # (B, N, 2)
    return tf.scatter_nd(places, tf.cast(counted, tf.int32), [n_rows, n_vocab])


def places_of(history: History) -> tf.Tensor:
    """Numbers the places of a row: int32 (1, S)."""
    return tf.range(shape_of(history.ids)[1])[None]
