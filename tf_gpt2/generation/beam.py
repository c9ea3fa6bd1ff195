"""``beam_search``: lists of ids in, for each the likeliest continuations that a search of fixed width finds.

The loop is compiled as one function: prefill once per prompt, then K rows of the batch for each. A step extends all
beams of a prompt by all tokens and looks at the best of these candidates: those that end become finished sequences, the
best others are the next beams, and each takes over the cache of the beam it came from. All has a fixed shape; a score
``NONE`` marks what is not there. Knows nothing of text.

Source: ``GenerationMixin._beam_search`` of Hugging Face's transformers 5, of which each prompt here is a batch of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.errors import ParamsError
from tf_gpt2.generation.cache import Cache, as_cache, with_room
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.loop import Limits, cache_sizes, is_stop, with_own_cache
from tf_gpt2.generation.options import check_counts, check_prompts, check_stop_ids, make_bias, make_limits, pad
from tf_gpt2.generation.processors import EXCLUDED
from tf_gpt2.generation.run import NO_NUMBERS, finish_reason
from tf_gpt2.model.formulas import KeyValues
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

LARGEST_PENALTY = 10
"""Beyond it a power of the length may leave float32."""

NONE = tf.float32.min
"""The score of a beam or of a sequence that is not there; not -inf, at which TensorFlow's checks of numbers stop."""


@dataclasses.dataclass(frozen=True)
class BeamSearchResult:
    """What ``beam_search`` returns: per prompt a list, one entry per sequence, best first.

    Attributes:
        ids: the new ids only, without the stop id. Hugging Face's ``sequences`` also have the prompt before and, where
            the finish reason is ``"stop"``, the stop id and padding behind.
        scores: the sum of the log-probabilities of all new tokens, the stop id included, divided by their number to the
            power of ``length_penalty``; Hugging Face's ``sequences_scores``.
        finish_reasons: ``"length"`` after ``max_new_tokens``, ``"stop"`` at a stop id, ``"context"`` when the
            window was full.
    """

    ids: list[list[list[int]]]
    scores: list[list[float]]
    finish_reasons: list[list[str]]


def beam_search(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 40,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    suppress: Sequence[int] = (),
    jit_compile: bool = True,
) -> BeamSearchResult:
    """Continues each prompt in the likeliest ways that a search with ``num_beams`` beams finds.

    At each step all beams are extended by all tokens, and of these candidates the ``num_beams`` likeliest go on; those
    among the ``num_beams`` likeliest that end are remembered. Sequences and scores are Hugging Face's. A prompt's
    result does not depend on the other prompts. One beam is greedy search, if ``early_stopping`` is not ``"never"``.

    Args:
        model: the model.
        prompts: B lists of ids, of any lengths from 1 to ``n_ctx - 1``.
        num_beams: K, at least 1; another number compiles anew. Memory and time are those of B*K rows.
        max_new_tokens: most new tokens per sequence, at least 1.
        length_penalty: in [-10, 10]; scores are divided by the length to this power. As they are negative, more
            than 0 favours long sequences, less than 0 short ones; 0 leaves the sums as they are.
        early_stopping: when a prompt has enough, once ``num_beams`` sequences have ended. ``True``: at once. ``False``:
            when the likeliest beam, divided by its present length, is no better than the worst of them; it might become
            so if ``length_penalty`` is more than 0. ``"never"``: when it cannot become better, even if all
            tokens that are left were certain.
        num_return_sequences: how many to return per prompt, at most ``num_beams``; fewer where there are no more, as
            with one new token and a vocabulary smaller than that.
        stop_ids: ids that end a sequence.
        suppress: ids that are not said.
        jit_compile: whether XLA compiles the loop: the first call for a shape takes seconds, the others are fast.

    Raises:
        ContextLengthError: when a prompt leaves no room in the window.
        ParamsError: when the model's logits are not numbers.
        ValueError: when an argument is out of range, or a prompt is empty or has ids outside the vocabulary.
        TypeError: when prompts are not lists of integers.

    Source: ``GenerationMixin._beam_search`` of Hugging Face's transformers 5.

    Example:
        >>> from tf_gpt2.config import GPT2Config
        >>> config = GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> result = beam_search(GPT2Model(config), [[1, 2, 3], [4]], max_new_tokens=5, num_return_sequences=2)
        >>> [[len(ids) for ids in best] for best in result.ids]
        [[5, 5], [5, 5]]
        >>> all(first >= second for first, second in result.scores)
        True
    """
    rows = check_prompts(prompts, model.config)
    num_beams, max_new_tokens, num_return_sequences = check_counts(
        num_beams=num_beams, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences
    )
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams={num_beams}, got {num_return_sequences}; "
            f"raise num_beams for more"
        )
    check_comparison(length_penalty, early_stopping)
    search = Search(
        limits=make_limits(rows, max_new_tokens, check_stop_ids(stop_ids, model.config), model.config),
        length_penalty=tf.constant(float(length_penalty)),
        ends_when_full=tf.constant(early_stopping is True),
        hopes_for_longest=tf.constant(early_stopping == "never" and length_penalty > 0),
        is_banned=tf.constant(make_bias({}, suppress, [], model.config) == EXCLUDED),
    )
    state = run_search(model, *pad(rows, model.config), num_beams, search, jit_compile=jit_compile)
    return make_result(state.finished, rows, max_new_tokens, num_return_sequences)


def check_comparison(length_penalty: float, early_stopping: bool | str) -> None:
    """Raises ValueError unless beams can be compared by these."""
    is_number = not isinstance(length_penalty, (bool, np.bool_)) and np.asarray(length_penalty).dtype.kind in "iuf"
    if not is_number or np.ndim(length_penalty) or not abs(length_penalty) <= LARGEST_PENALTY:
        raise ValueError(
            f"length_penalty must be a number in [-{LARGEST_PENALTY}, {LARGEST_PENALTY}] (0 compares sums), "
            f"got {length_penalty!r}"
        )
    if not isinstance(early_stopping, bool) and not (isinstance(early_stopping, str) and early_stopping == "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")


def make_result(
    finished: Finished, rows: list[np.ndarray], max_new_tokens: int, num_return_sequences: int
) -> BeamSearchResult:
    """Cuts each sequence's new part out of the loop's last state."""
    tensors = [part.numpy() for part in finished]
    result = BeamSearchResult([], [], [])
    for row, *of_prompt in zip(rows, *tensors, strict=True):
        best = [one for one in zip(*of_prompt, strict=True) if NONE < one[2] < np.inf][:num_return_sequences]
        if not best:  # one sequence there always is
            raise ParamsError(NO_NUMBERS)
        result.ids.append([ids[len(row) : end].tolist() for ids, end, _, _ in best])
        result.scores.append([float(score) for _, _, score, _ in best])
        result.finish_reasons.append(
            [finish_reason(stopped, end - len(row), max_new_tokens) for _, end, _, stopped in best]
        )
    return result


class Search(NamedTuple):
    """How beams are compared and when a prompt has enough; data, so that no change of it compiles anything anew.

    Attributes:
        limits: when sequences end, one length per prompt.
        length_penalty: float32 scalar, the exponent of the length that a sum of log-probabilities is divided by.
        ends_when_full: bool scalar, whether a prompt has enough as soon as K sequences have ended, even where a beam
            could become better than they are.
        hopes_for_longest: bool scalar, whether a beam's present sum is divided as if it had all tokens that it may
            have, and not only those it has, when it is asked whether it could become better.
        is_banned: bool (V,), ids that are never said.
    """

    limits: Limits
    length_penalty: tf.Tensor
    ends_when_full: tf.Tensor
    hopes_for_longest: tf.Tensor
    is_banned: tf.Tensor


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
        cache: per block keys and values, each (B*K*H, S, D).
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor
    scores: tf.Tensor
    finished: Finished
    is_open: tf.Tensor
    cache: Cache


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


def prefill(network: Network, ids: tf.Tensor, lengths: tf.Tensor, scores: tf.Tensor, search: Search) -> Beams:
    """Reads each prompt once and makes its beams from the first token's candidates; the cache has room for no more.

    Args:
        network: the model.
        ids: int32 (B, T), right-padded.
        lengths: int32 (B,), at least 1.
        scores: float32 (B, K), 0 for the first beam and ``NONE`` for the others, as all are the same prompt.
        search: how to compare, when to end.
    """
    n_prompts, n_beams = scores.shape
    hidden, present = network.hidden_states(ids)
    logits = network.logits(tf.gather(hidden, lengths - 1, batch_dims=1))  # (B, V): one position's are enough
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
        cache=take_rows(as_cache(present, n_prompts, 1), rows, n_prompts),
    )
    return advance(state, logits[:, None], search)


def decode(network: Network, state: Beams, search: Search, n_steps: tf.Tensor) -> Beams:
    """Extends the beams up to ``n_steps`` times; stops early when no prompt wants more."""

    def goes_on(step: tf.Tensor, state: Beams) -> tf.Tensor:
        return (step < n_steps) & tf.reduce_any(state.is_open)

    def body(step: tf.Tensor, state: Beams) -> tuple[tf.Tensor, Beams]:
        return step + 1, decode_step(network, state, search)

    return tf.while_loop(goes_on, body, (tf.constant(0), with_own_cache(network, state)))[1]


def decode_step(network: Network, state: Beams, search: Search) -> Beams:
    """Feeds each beam's last token and chooses the next beams."""
    n_prompts, n_beams = state.scores.shape
    positions = tf.reshape(tf.tile(state.lengths[:, None] - 1, (1, n_beams)), (n_prompts * n_beams,))  # (B*K,)
    last = tf.gather(tf.reshape(state.ids, (n_prompts * n_beams, -1)), positions, batch_dims=1)  # (B*K,)
    hidden, cache = network.hidden_states(last[:, None], positions[:, None], state.cache)
    logits = network.logits(hidden[:, 0])  # (B*K, V)
    return advance(state._replace(cache=cache), tf.reshape(logits, (n_prompts, n_beams, -1)), search)


def advance(state: Beams, logits: tf.Tensor, search: Search) -> Beams:
    """Extends all beams by all tokens and keeps what is best; a prompt that is not open only seems to go on.

    Args:
        state: before.
        logits: float32 (B, K, V) behind each beam, or (B, 1, V) where all are alike.
        search: how to compare, when to end.
    """
    n_prompts, n_beams = state.scores.shape
    candidates = best_candidates(state, logits, search)
    finished = best_of(state.finished, newly_finished(state, candidates, search))
    scores, kept = tf.math.top_k(tf.where(candidates.ends, NONE, candidates.scores), n_beams)  # (B, K)
    parents = tf.gather(candidates.parents, kept, batch_dims=1)
    rows = parents + n_beams * tf.range(n_prompts)[:, None]
    state = state._replace(
        ids=tf.gather(candidates.ids, kept, batch_dims=1),
        lengths=state.lengths + tf.cast(state.is_open, tf.int32),
        scores=scores,
        finished=finished,
        cache=take_rows(state.cache, rows, n_prompts * n_beams),
    )
    return state._replace(is_open=state.is_open & wants_more(state, search))


def best_candidates(state: Beams, logits: tf.Tensor, search: Search) -> Candidates:
    """Returns the best continuations of each prompt by one token: so many that K of them do not stop."""
    n_prompts, n_beams = state.scores.shape
    limits, n_vocab = search.limits, logits.shape[-1]
    sums = tf.where(search.is_banned, NONE, state.scores[..., None] + tf.nn.log_softmax(logits))  # (B, K, V)
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
    scores = divide_by_length(candidates.scores, lengths - state.prompt_lengths[:, None], search)
    return Finished(
        ids=candidates.ids,
        lengths=lengths - tf.cast(candidates.stops, tf.int32),
        scores=tf.where(counts, scores, NONE),
        stopped=candidates.stops,
    )


def wants_more(state: Beams, search: Search) -> tf.Tensor:
    """Whether a beam may become better than the worst of K finished sequences: bool (B,)."""
    worst = state.finished.scores[:, -1]  # NONE while there are fewer
    lengths = tf.where(search.hopes_for_longest, search.limits.lengths, state.lengths)
    hoped_for = divide_by_length(state.scores[:, 0], lengths - state.prompt_lengths, search)
    return (hoped_for > worst) & ~(search.ends_when_full & (worst > NONE))


def divide_by_length(scores: tf.Tensor, n_new: tf.Tensor, search: Search) -> tf.Tensor:
    """Divides sums of log-probabilities by a power of the number of new tokens; ``NONE`` stays what it is."""
    is_none = scores == NONE
    return tf.where(
        is_none, NONE, tf.where(is_none, 0.0, scores) / tf.pow(tf.cast(n_new, tf.float32), search.length_penalty)
    )


def best_of(old: Finished, new: Finished) -> Finished:
    """Keeps as many as there were of old and new together; of equals the old ones, then the first."""
    merged = Finished(*(tf.concat(pair, axis=1) for pair in zip(old, new, strict=True)))
    best = tf.math.top_k(merged.scores, old.scores.shape[1]).indices
    return Finished(*(tf.gather(part, best, batch_dims=1) for part in merged))


def take_rows(cache: Cache, rows: tf.Tensor, n_rows: int) -> Cache:
    """Makes a cache of some rows of another: (n_rows*H, S, D), int32 (B, K) -> (B*K*H, S, D)."""
    n_head = cache[0].keys.shape[0] // n_rows
    of_heads = tf.reshape(rows[..., None] * n_head + tf.range(n_head), (-1,))
    return tuple(KeyValues(*(tf.gather(part, of_heads) for part in one)) for one in cache)


def grow(state: Beams, n_slots: int) -> Beams:
    """Makes room for ``n_slots`` positions in all; runs outside XLA."""
    room = n_slots - state.cache[0].keys.shape[1]
    behind = [[0, 0], [0, 0], [0, room]]
    return state._replace(
        ids=tf.pad(state.ids, behind),
        finished=state.finished._replace(ids=tf.pad(state.finished.ids, behind)),
        cache=with_room(state.cache, room),
    )


def run_search(
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
    decode_some = compiled(decode, model, jit_compile=jit_compile, n_rows=ids.shape[0] * n_beams)
    scores = np.full((ids.shape[0], n_beams), NONE, np.float32)
    scores[:, 0] = 0
    state = compiled(prefill, model, jit_compile=jit_compile)(ids, lengths, tf.constant(scores), search)
    sizes = cache_sizes(ids.shape[1], int(tf.reduce_max(search.limits.lengths)), model.config.n_ctx)
    n_slots = next(sizes)
    while (is_open := state.is_open.numpy()).any():
        longest = int(state.lengths.numpy()[is_open].max())
        if longest == n_slots:
            n_slots = next(sizes)
        state = decode_some(grow(state, n_slots), search, tf.constant(n_slots - longest))
    return state
