"""Prefill and decode: the two functions that are compiled, the state that they carry, and the step that they share.

Prefill reads the prompts into the cache; decode feeds each row's last token and chooses the next, in a loop inside one
compiled function; the cache grows between calls. So the head, and what chooses, are compiled once, in decode. All that
may differ between calls is data; only shapes make XLA compile, and these come from ``bucket``. Ids and lengths are
taken as valid. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.cache import Cache, as_cache, for_samples, with_room
from tf_gpt2.generation.choose import Sampling, choose, repeat
from tf_gpt2.generation.processors import History
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.network import Network

SMALLEST_BUCKET = 16
"""Fewer positions cost as much."""
SMALLEST_GROWING = 256
"""A cache of up to so many positions is made at its final size: attention to them costs less than compiling again."""
GROWTH = 4
"""How much larger a cache becomes at a time. Measured, like the two above: ``python -m benchmarks.growth``."""


class State(NamedTuple):
    """What the loop carries.

    Attributes:
        ids: int32 (B, S + 2), prompt and new tokens: S that can be fed, and the last one. What lies past a row's length
            means nothing; the spare last column is where full rows keep writing,
            and nobody reads there.
        lengths: int32 (B,), tokens so far. The last one has not been fed to the model yet.
        prompt_lengths: int32 (B,), how many of them are the prompt's.
        logprobs: float32 (B, S + 2), of each new token under the unmodified model, at its place in ``ids``.
        top_ids: int32 (B, S + 2, K), what the unmodified model finds likeliest there, the likeliest first.
        top_logprobs: float32 (B, S + 2, K), of these.
        stopped: bool (B,), whether the row chose a stop id, which is not counted in ``lengths``.
        cache: per block keys and values, each (B*H, S, D).
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor
    logprobs: tf.Tensor
    top_ids: tf.Tensor
    top_logprobs: tf.Tensor
    stopped: tf.Tensor
    cache: Cache

    @property
    def n_slots(self) -> int | tf.Tensor:
        """S, how many positions the cache has room for."""
        return shape_of(self.cache[0].keys)[1]


class Limits(NamedTuple):
    """When rows end.

    Attributes:
        lengths: int32 (B,), the most tokens a row may have, its prompt included.
        stop_ids: int32 (K,), -1 for none.
    """

    lengths: tf.Tensor
    stop_ids: tf.Tensor


def is_active(state: State, limits: Limits) -> tf.Tensor:
    """Returns which rows still want a token: bool (B,)."""
    return ~state.stopped & (state.lengths < limits.lengths)


def is_stop(ids: tf.Tensor, limits: Limits) -> tf.Tensor:
    """Returns which ids end their rows: int32, of any shape -> bool."""
    return tf.reduce_any(ids[..., None] == limits.stop_ids, axis=-1)


def prefill(
    network: Network,
    ids: tf.Tensor,
    lengths: tf.Tensor,
    n_samples: int = 1,
    n_top: int = 0,
    prompt_lengths: tf.Tensor | None = None,
) -> State:
    """Reads each prompt once, for all its samples; the cache has room for no more.

    Each last token is read here too, though it has yet to be fed: what it leaves in the cache is written again.

    Args:
        network: the model.
        ids: int32 (B, T), right-padded.
        lengths: int32 (B,), at least 1.
        n_samples: N, a shape: the state has B * N rows, the samples of the first prompt, of the second, and so on.
        n_top: K, how many of the likeliest ids to keep beside each chosen one, a shape.
        prompt_lengths: int32 (B,), how many of the ids are the prompt's, not new ones from before; all by default.
    """
    n_prompts = shape_of(ids)[0]
    _, present = network.hidden_states(ids)
    ids = for_samples(tf.pad(ids, [[0, 0], [0, 2]]), n_samples)  # (B*N, T + 2)
    lengths = for_samples(lengths, n_samples)  # (B*N,)
    return State(
        ids=ids,
        lengths=lengths,
        prompt_lengths=lengths if prompt_lengths is None else prompt_lengths,
        logprobs=tf.zeros_like(ids, tf.float32),
        top_ids=tf.zeros((*shape_of(ids), n_top), tf.int32),
        top_logprobs=tf.zeros((*shape_of(ids), n_top), tf.float32),
        stopped=tf.zeros_like(lengths, tf.bool),
        cache=as_cache(present, n_prompts, n_samples),
    )


def decode(network: Network, state: State, sampling: Sampling, limits: Limits, n_steps: tf.Tensor) -> State:
    """Appends up to ``n_steps`` tokens to each row; stops early when no row goes on."""
    no_drafts = tf.zeros((shape_of(state.ids)[0], 0), tf.int32)

    def goes_on(state: State) -> tf.Tensor:
        return tf.reduce_any(is_active(state, limits))

    def body(state: State) -> tuple[State]:
        return (step(network, state, no_drafts, sampling, limits)[0],)

    return tf.while_loop(goes_on, body, (with_own_cache(network, state),), maximum_iterations=n_steps)[0]


def with_own_cache(network: Network, state: Any) -> Any:
    """Returns a state of any loop whose cache that loop may write to: what others hold stays as it is."""
    return state._replace(cache=tf.nest.map_structure(network.ops.owned, state.cache))


def step(
    network: Network, state: State, drafts: tf.Tensor, sampling: Sampling, limits: Limits
) -> tuple[State, tf.Tensor]:
    """Feeds each row's last token and a draft of what follows; appends what the model says, too.

    The model's own choice at each place of the draft is kept as long as the draft has said the same, and one more.
    Without a draft (N = 0) that is one token per row.

    Args:
        network: the model.
        state: the rows so far; the cache has room for their last tokens.
        drafts: int32 (B, N).
        sampling: how to choose.
        limits: when to end.

    Returns:
        The longer rows; int32 (B,), how many tokens of each draft were right before the first wrong one.
    """
    n_fed = drafts.shape[1] + 1  # T
    chosen_at = state.lengths[:, None] + tf.range(n_fed)  # (B, T), the place of what is chosen
    last = tf.gather(state.ids, state.lengths - 1, batch_dims=1)  # (B,)
    # a row that goes on feeds no slot but those before the last one, if it has a draft: what comes too late goes there
    positions = tf.minimum(chosen_at - 1, state.n_slots - 1)
    hidden, cache = network.hidden_states(tf.concat([last[:, None], drafts], axis=1), positions, state.cache)
    logits = network.logits(tf.reshape(hidden, (-1, network.config.n_embd)))  # (B*T, V)

    history = history_at(state, drafts, chosen_at, sampling)
    chosen = choose(logits, repeat(sampling, n_fed), history, limits.stop_ids, ops=network.ops)  # (B*T,)
    log_total = tf.reduce_logsumexp(logits, axis=-1)  # (B*T,)
    logprobs = tf.gather(logits, chosen, batch_dims=1) - log_total
    state = write_top(state, logits, log_total, chosen_at)
    chosen = tf.reshape(chosen, (-1, n_fed))  # (B, T)

    n_hits = count_hits(chosen, drafts)
    n_kept, stops = how_many_to_keep(state, chosen, n_hits, limits)
    longer = state._replace(
        ids=write_rows(state.ids, chosen_at, chosen),
        logprobs=write_rows(state.logprobs, chosen_at, tf.reshape(logprobs, (-1, n_fed))),
        lengths=state.lengths + n_kept,
        stopped=state.stopped | stops,
        cache=cache,
    )
    return longer, n_hits


def write_top(state: State, logits: tf.Tensor, log_total: tf.Tensor, places: tf.Tensor) -> State:
    """Writes the likeliest ids of logits (B*T, V) at places (B, T); ``log_total`` is the logits' logsumexp, (B*T,)."""
    n_top = state.top_ids.shape[-1]
    if n_top == 0:
        return state
    top_logits, top_ids = tf.math.top_k(logits, n_top)  # (B*T, K)
    by_row = (-1, places.shape[1], n_top)
    return state._replace(
        top_ids=write_rows(state.top_ids, places, tf.reshape(top_ids, by_row)),
        top_logprobs=write_rows(state.top_logprobs, places, tf.reshape(top_logits - log_total[:, None], by_row)),
    )


def history_at(state: State, drafts: tf.Tensor, chosen_at: tf.Tensor, sampling: Sampling) -> History:
    """Returns what has been said at each place of a draft, B*T rows: each chooses as a row of its own."""
    prompt_lengths = state.prompt_lengths - sampling.n_new
    n_fed = drafts.shape[1] + 1
    if n_fed == 1:
        return History(state.ids, state.lengths, prompt_lengths)
    drafted = write_rows(state.ids, chosen_at[:, :-1], drafts)
    lengths = tf.reshape(tf.minimum(chosen_at, state.n_slots), [-1])  # (B*T,)
    return History(tf.repeat(drafted, n_fed, axis=0), lengths, tf.repeat(prompt_lengths, n_fed))


def count_hits(chosen: tf.Tensor, drafts: tf.Tensor) -> tf.Tensor:
    """Counts the tokens of each draft, (B, N), before the first that differs from what was chosen, (B, N + 1)."""
    if drafts.shape[1] == 0:
        return tf.zeros_like(chosen[:, 0])
    return tf.reduce_sum(tf.math.cumprod(tf.cast(chosen[:, :-1] == drafts, tf.int32), axis=1), axis=1)


def how_many_to_keep(state: State, chosen: tf.Tensor, n_hits: tf.Tensor, limits: Limits) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns how many of the chosen ids, (B, T), each row keeps, int32 (B,), and whether it stops behind them."""
    n_fed = chosen.shape[1]
    longest = tf.minimum(limits.lengths, state.n_slots + (n_fed == 1))  # the last slot is no draft's
    n_wanted = tf.minimum(n_hits + 1, longest - state.lengths)
    stops = is_stop(chosen, limits)  # (B, T)
    n_before_stop = tf.reduce_min(tf.where(stops, tf.range(n_fed), n_fed), axis=1)
    active = is_active(state, limits)
    return tf.where(active, tf.minimum(n_wanted, n_before_stop), 0), active & (n_before_stop < n_wanted)


def write_rows(rows: tf.Tensor, places: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Writes (B, T, …) into (B, S + 2, …); what lies behind the last column goes there, where nothing is read."""
    n_rows, n_columns = shape_of(rows)[:2]
    numbers = tf.broadcast_to(tf.range(n_rows)[:, None], tf.shape(places))
    return tf.tensor_scatter_nd_update(rows, tf.stack([numbers, tf.minimum(places, n_columns - 1)], axis=-1), values)


def bucket(length: int, n_ctx: int) -> int:
    """Rounds a length up to a power of two, at most ``n_ctx``: XLA compiles once per bucket, not once per length."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, n_ctx)


def cache_sizes(length: int, limit: int, n_ctx: int) -> Iterator[int]:
    """Yields how large the cache becomes while what is in it grows from ``length`` positions to ``limit``.

    Attention reads the whole cache, used or not, so a large one is not made at once; but each size compiles anew.
    """
    size, limit = length, max(length, limit)
    while True:
        size = bucket(min(limit, max(GROWTH * size, SMALLEST_GROWING)), n_ctx)
        yield size
        if size >= limit:
            return


def grow(state: State, n_slots: int | tf.Tensor) -> State:
    """Makes room for ``n_slots`` positions in all; runs outside XLA."""
    room = n_slots - state.n_slots
    behind = [[0, 0], [0, room]]
    return state._replace(
        ids=tf.pad(state.ids, behind),
        logprobs=tf.pad(state.logprobs, behind),
        top_ids=tf.pad(state.top_ids, [*behind, [0, 0]]),
        top_logprobs=tf.pad(state.top_logprobs, [*behind, [0, 0]]),
        cache=with_room(state.cache, room),
    )
