"""The loop of beam search, compiled as one function: prefill once per prompt, then K rows of the batch for each.

A step extends all beams of a prompt by all tokens and looks at the best of these candidates: those that end become
finished sequences, the best others are the next beams, and each takes over the cache of the beam it came from. All has
a fixed shape; a score of -inf marks what is not there. Ids and lengths are taken as valid. Knows nothing of text.

Source: ``GenerationMixin._beam_search`` of Hugging Face's transformers 5, of which each prompt here is a batch of one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.cache import with_room
from tf_gpt2.generation.compiled import once_per_model
from tf_gpt2.generation.loop import cache_sizes, feed, read_prompts
from tf_gpt2.generation.run import CompiledLoop
from tf_gpt2.generation.state import Limits, is_stop
from tf_gpt2.model.gpt2 import GPT2Model

NONE = -float("inf")
"""The score of a beam or of a sequence that is not there."""


class Search(NamedTuple):
    """How beams are compared and when a prompt has enough; data, so that no change of it compiles anything anew.

    Attributes:
        limits: when sequences end, one length per prompt.
        length_penalty: float32 scalar, the exponent of the length that a sum of log-probabilities is divided by.
        ends_when_full: bool scalar, whether a prompt has enough as soon as K sequences have ended, even where a beam
            could become better than they are.
        hopes_for_longest: bool scalar, whether a beam's present sum is divided as if it had all tokens that it may
            have, and not only those it has, when it is asked whether it could become better.
    """

    limits: Limits
    length_penalty: tf.Tensor
    ends_when_full: tf.Tensor
    hopes_for_longest: tf.Tensor


class Finished(NamedTuple):
    """Sequences that have ended, of each prompt N, best first.

    Attributes:
        ids: int32 (B, N, S + 1), prompt and new tokens. What lies past a sequence's length means nothing.
        lengths: int32 (B, N), without the stop id.
        scores: float32 (B, N), sums of log-probabilities divided by a power of the number of new tokens, the stop id
            included.
        stopped: bool (B, N), whether a stop id ended it.
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    scores: tf.Tensor
    stopped: tf.Tensor


class Beams(NamedTuple):
    """What the loop carries.

    Attributes:
        ids: int32 (B, K, S + 1), prompt and new tokens of each beam, the likeliest first.
        lengths: int32 (B,), tokens so far, the same for all beams of a prompt. The last one has not been fed to the
            model yet.
        prompt_lengths: int32 (B,), how many of them are the prompt's.
        scores: float32 (B, K), sums of the new tokens' log-probabilities.
        finished: the K best sequences.
        is_open: bool (B,), whether the prompt still wants better ones.
        keys: per block (B*K*H, S, D).
        values: per block (B*K*H, S, D).
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor
    scores: tf.Tensor
    finished: Finished
    is_open: tf.Tensor
    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]


class Candidates(NamedTuple):
    """The best continuations of each prompt's beams by one token, N of them, best first.

    Attributes:
        ids: int32 (B, N, S + 1), prompt and new tokens.
        scores: float32 (B, N), sums of the new tokens' log-probabilities.
        parents: int32 (B, N), the beams that they continue.
        stops: bool (B, N), whether the last token is a stop id.
        ends: bool (B, N), whether it is, or is the last there may be.
    """

    ids: tf.Tensor
    scores: tf.Tensor
    parents: tf.Tensor
    stops: tf.Tensor
    ends: tf.Tensor


def prefill(model: GPT2Model, ids: tf.Tensor, lengths: tf.Tensor, scores: tf.Tensor, search: Search) -> Beams:
    """Reads each prompt once and makes its beams from the first token's candidates; the cache has room for no more.

    Args:
        model: the model.
        ids: int32 (B, T), right-padded.
        lengths: int32 (B,), at least 1.
        scores: float32 (B, K), 0 for the first beam and -inf for the others, as all are the same prompt.
        search: how to compare, when to end.
    """
    n_prompts, n_beams = scores.shape
    hidden, cache = read_prompts(model, ids)
    logits = model.logits(tf.gather(hidden, lengths - 1, batch_dims=1))  # (B, V): one position's are enough
    ids = tf.tile(tf.pad(ids, [[0, 0], [0, 1]])[:, None], (1, n_beams, 1))  # (B, K, T + 1)
    rows = tf.tile(tf.range(n_prompts)[:, None], (1, n_beams))  # (B, K)
    state = Beams(
        ids=ids,
        lengths=lengths,
        prompt_lengths=lengths,
        scores=scores,
        finished=Finished(
            ids=ids,
            lengths=tf.tile(lengths[:, None], (1, n_beams)),
            scores=tf.fill(scores.shape, NONE),
            stopped=tf.zeros(scores.shape, tf.bool),
        ),
        is_open=tf.ones(lengths.shape, tf.bool),
        keys=tuple(take_rows(layer.keys, rows, n_prompts) for layer in cache),
        values=tuple(take_rows(layer.values, rows, n_prompts) for layer in cache),
    )
    return advance(state, logits[:, None], search)


def decode(model: GPT2Model, state: Beams, search: Search, n_steps: tf.Tensor) -> Beams:
    """Extends the beams up to ``n_steps`` times; stops early when no prompt wants more."""

    def goes_on(step: tf.Tensor, state: Beams) -> tf.Tensor:
        return (step < n_steps) & tf.reduce_any(state.is_open)

    def body(step: tf.Tensor, state: Beams) -> tuple[tf.Tensor, Beams]:
        return step + 1, decode_step(model, state, search)

    return tf.while_loop(goes_on, body, (tf.constant(0), state))[1]


def decode_step(model: GPT2Model, state: Beams, search: Search) -> Beams:
    """Feeds each beam's last token and chooses the next beams."""
    n_prompts, n_beams = state.scores.shape
    positions = tf.reshape(tf.tile(state.lengths[:, None] - 1, (1, n_beams)), (n_prompts * n_beams,))  # (B*K,)
    last = tf.gather(tf.reshape(state.ids, (n_prompts * n_beams, -1)), positions, batch_dims=1)  # (B*K,)
    logits, cache = feed(model, last, positions, state.keys, state.values)
    state = state._replace(keys=tuple(layer.keys for layer in cache), values=tuple(layer.values for layer in cache))
    return advance(state, tf.reshape(logits, (n_prompts, n_beams, -1)), search)


def advance(state: Beams, logits: tf.Tensor, search: Search) -> Beams:
    """Extends all beams by all tokens and keeps what is best; a prompt that is not open only seems to go on.

    Args:
        state: before.
        logits: float32 (B, K, V) behind each beam, or (B, 1, V) where all are alike.
        search: how to compare, when to end.
    """
    n_prompts, n_beams = state.scores.shape
    candidates = best_candidates(state, logits, search.limits)
    finished = best_of(state.finished, newly_finished(state, candidates, search))
    scores, kept = tf.math.top_k(tf.where(candidates.ends, NONE, candidates.scores), n_beams)  # (B, K)
    parents = tf.gather(candidates.parents, kept, batch_dims=1)
    rows = parents + n_beams * tf.range(n_prompts)[:, None]
    state = state._replace(
        ids=tf.gather(candidates.ids, kept, batch_dims=1),
        lengths=state.lengths + tf.cast(state.is_open, tf.int32),
        scores=scores,
        finished=finished,
        keys=tuple(take_rows(keys, rows, n_prompts * n_beams) for keys in state.keys),
        values=tuple(take_rows(values, rows, n_prompts * n_beams) for values in state.values),
    )
    return state._replace(is_open=state.is_open & wants_more(state, search))


def best_candidates(state: Beams, logits: tf.Tensor, limits: Limits) -> Candidates:
    """Gives the best continuations of each prompt by one token: so many that K of them do not stop."""
    n_prompts, n_beams = state.scores.shape
    n_vocab = logits.shape[-1]
    sums = state.scores[..., None] + tf.nn.log_softmax(logits)  # (B, K, V)
    n_candidates = n_beams * min(1 + limits.stop_ids.shape[0], n_vocab)
    scores, places = tf.math.top_k(tf.reshape(sums, (n_prompts, n_beams * n_vocab)), n_candidates)  # (B, N)
    parents, tokens = places // n_vocab, places % n_vocab
    ids = tf.gather(state.ids, parents, batch_dims=1)  # (B, N, S + 1)
    is_new = tf.range(ids.shape[-1]) == state.lengths[:, None, None]
    stops = is_stop(tokens, limits)
    return Candidates(
        ids=tf.where(is_new, tokens[..., None], ids),
        scores=scores,
        parents=parents,
        stops=stops,
        ends=stops | (state.lengths + 1 == limits.lengths)[:, None],
    )


def newly_finished(state: Beams, candidates: Candidates, search: Search) -> Finished:
    """Picks the candidates that end and are among the K best; the others only made room for beams that go on."""
    lengths = state.lengths[:, None] + 1
    is_among_best = tf.range(candidates.scores.shape[1]) < state.scores.shape[1]
    counts = candidates.ends & is_among_best & state.is_open[:, None]
    scores = penalized(candidates.scores, lengths - state.prompt_lengths[:, None], search)
    return Finished(
        ids=candidates.ids,
        lengths=lengths - tf.cast(candidates.stops, tf.int32),
        scores=tf.where(counts, scores, NONE),
        stopped=candidates.stops,
    )


def wants_more(state: Beams, search: Search) -> tf.Tensor:
    """Says whether a beam may become better than the worst of K finished sequences: bool (B,)."""
    worst = state.finished.scores[:, -1]  # -inf while there are fewer
    lengths = tf.where(search.hopes_for_longest, search.limits.lengths, state.lengths)
    hoped_for = penalized(state.scores[:, 0], lengths - state.prompt_lengths, search)
    return (hoped_for > worst) & ~(search.ends_when_full & (worst > NONE))


def penalized(scores: tf.Tensor, n_new: tf.Tensor, search: Search) -> tf.Tensor:
    """Divides sums of log-probabilities by a power of the number of new tokens."""
    return scores / tf.pow(tf.cast(n_new, tf.float32), search.length_penalty)


def best_of(old: Finished, new: Finished) -> Finished:
    """Keeps as many as there were of old and new together; of equals the old ones, then the first."""
    both = Finished(*(tf.concat(pair, axis=1) for pair in zip(old, new, strict=True)))
    best = tf.math.top_k(both.scores, old.scores.shape[1]).indices
    return Finished(*(tf.gather(part, best, batch_dims=1) for part in both))


def take_rows(x: tf.Tensor, rows: tf.Tensor, n_rows: int) -> tf.Tensor:
    """Makes a cache of some rows of another: (n_rows*H, S, D), int32 (B, K) -> (B*K*H, S, D)."""
    heads = tf.range(x.shape[0] // n_rows)
    return tf.gather(x, tf.reshape(rows[..., None] * heads.shape[0] + heads, (-1,)))


def grow(state: Beams, n_slots: int) -> Beams:
    """Makes room for ``n_slots`` positions in all; runs outside XLA."""
    room = n_slots - state.keys[0].shape[1]
    behind = [[0, 0], [0, 0], [0, room]]
    return state._replace(
        ids=tf.pad(state.ids, behind),
        finished=state.finished._replace(ids=tf.pad(state.finished.ids, behind)),
        keys=with_room(state.keys, room),
        values=with_room(state.values, room),
    )


def run(
    model: GPT2Model, ids: tf.Tensor, lengths: tf.Tensor, n_beams: int, search: Search, *, jit_compile: bool
) -> Beams:
    """Searches until no prompt wants more.

    Args:
        model: the model.
        ids: int32 (B, T), right-padded, T a bucket.
        lengths: int32 (B,), at least 1.
        n_beams: K; another number compiles anew.
        search: how to compare, when to end.
        jit_compile: whether XLA compiles.
    """
    loop = beam_loop_of(model, jit_compile=jit_compile)
    scores = np.full((ids.shape[0], n_beams), NONE, np.float32)
    scores[:, 0] = 0
    state = loop.prefill(ids, lengths, tf.constant(scores), search)
    sizes = cache_sizes(ids.shape[1], int(tf.reduce_max(search.limits.lengths)), model.config.n_ctx)
    n_slots = next(sizes)
    while (is_open := state.is_open.numpy()).any():
        longest = int(state.lengths.numpy()[is_open].max())
        if longest == n_slots:
            n_slots = next(sizes)
        state = loop.decode(grow(state, n_slots), search, tf.constant(n_slots - longest))
    return state


@once_per_model
def beam_loop_of(model: GPT2Model, *, jit_compile: bool) -> CompiledLoop:
    """Gives a model's compiled search."""
    return CompiledLoop(model, jit_compile=jit_compile, prefill=prefill, decode=decode)
