"""Prefill and decode: the two functions that XLA compiles.

Prefill reads the prompts into the cache; decode feeds each row's last token and chooses the next, in a loop inside one
compiled function; the cache grows between calls. So the head, and what chooses, are compiled once, in decode. All that
may differ between calls is data; only shapes make XLA compile, and these come from ``bucket``. Ids and lengths are
taken as valid. Knows nothing of text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_gpt2.generation.cache import DecodeLayer, PrefillLayer, for_samples, repeat_heads, slots_at, with_room
from tf_gpt2.generation.processors import History
from tf_gpt2.generation.sampling import Sampling, choose
from tf_gpt2.generation.state import Limits, State, is_active, is_stop
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.loops import plain_loop
from tf_gpt2.model.products import shape_of

SMALLEST_BUCKET = 16
SMALLEST_GROWING = 256
"""A cache of up to so many positions is made at its final size: attention to them costs less than compiling again."""
GROWTH = 4


def prefill(
    model: GPT2Model,
    ids: tf.Tensor,
    lengths: tf.Tensor,
    n_samples: int = 1,
    n_top: int = 0,
    prompt_lengths: tf.Tensor | None = None,
) -> State:
    """Reads each prompt once, for all its samples; the cache has room for no more.

    Each last token is read here too, though it has yet to be fed: what it leaves in the cache is written again.

    Args:
        model: the model.
        ids: int32 (B, T), right-padded.
        lengths: int32 (B,), at least 1.
        n_samples: N, a shape: the state has B * N rows, the samples of the first prompt, of the second, and so on.
        n_top: K, how many of the likeliest ids to keep beside each chosen one, a shape.
        prompt_lengths: int32 (B,), how many of the ids are the prompt's, not new ones from before; all by default.
    """
    n_prompts = shape_of(ids)[0]
    _, cache = read_prompts(model, ids)
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
        keys=tuple(repeat_heads(layer.keys, n_prompts, n_samples) for layer in cache),
        values=tuple(repeat_heads(layer.values, n_prompts, n_samples) for layer in cache),
    )


def read_prompts(model: GPT2Model, ids: tf.Tensor) -> tuple[tf.Tensor, list[PrefillLayer]]:
    """Gives what comes before the logits, (B, T, C), and what attention keeps; int32 (B, T)."""
    cache = [PrefillLayer() for _ in model.blocks]
    return model.hidden_states(ids, cache=cache), cache


def decode(model: GPT2Model, state: State, sampling: Sampling, limits: Limits, n_steps: tf.Tensor) -> State:
    """Appends up to ``n_steps`` tokens to each row; stops early when no row goes on."""

    def goes_on(state: State) -> tf.Tensor:
        return tf.reduce_any(is_active(state, limits))

    def body(state: State) -> tuple[State]:
        return (decode_step(model, state, sampling, limits),)

    return tf.while_loop(goes_on, body, (state,), maximum_iterations=n_steps)[0]


def as_plain_loop(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Gives ``decode``, or another loop over a state with a cache, as it is fastest without XLA.

    It writes into a copy of the cache, which is made once: what others hold stays as it is.
    """

    @functools.wraps(loop)
    def in_plain_loop(model: GPT2Model, state: Any, *args: Any) -> Any:
        keys, values = (tuple(tf.raw_ops.DeepCopy(x=x) for x in parts) for parts in (state.keys, state.values))
        with plain_loop(variable.value for variable in model.variables):
            return loop(model, state._replace(keys=keys, values=values), *args)

    return in_plain_loop


def as_plain_prefill(prefill: Callable[..., Any]) -> Callable[..., Any]:
    """Gives ``prefill``, or another that reads prompts, as it is fastest without XLA: as the body of a plain loop."""

    @functools.wraps(prefill)
    def plain_prefill(*args: Any) -> Any:
        with plain_loop([]):
            return prefill(*args)

    return plain_prefill


def decode_step(model: GPT2Model, state: State, sampling: Sampling, limits: Limits) -> State:
    """Feeds each row's last token and appends the next one."""
    positions = state.lengths - 1  # (B,)
    last = tf.gather(state.ids, positions, batch_dims=1)  # (B,)
    logits, cache = feed(model, last, positions, state.keys, state.values)
    state = state._replace(keys=tuple(layer.keys for layer in cache), values=tuple(layer.values for layer in cache))
    return append(state, logits, sampling, limits)


def feed(
    model: GPT2Model,
    ids: tf.Tensor,
    positions: tf.Tensor,
    keys: tuple[tf.Tensor, ...],
    values: tuple[tf.Tensor, ...],
) -> tuple[tf.Tensor, list[DecodeLayer]]:
    """Feeds one token per row, int32 (B,), at its position, (B,); gives the logits, (B, V), and the longer cache."""
    hidden, cache = feed_several(model, ids[:, None], positions[:, None], keys, values)
    return model.logits(hidden[:, 0]), cache


def feed_several(
    model: GPT2Model,
    ids: tf.Tensor,
    positions: tf.Tensor,
    keys: tuple[tf.Tensor, ...],
    values: tuple[tf.Tensor, ...],
) -> tuple[tf.Tensor, list[DecodeLayer]]:
    """Feeds tokens that follow what the cache holds.

    What lies in the cache at later positions is neither seen nor needed: it may be left from tokens that were taken
    back.

    Args:
        model: the model.
        ids: int32 (B, T).
        positions: int32 (B, T), ascending; those of tokens that do not count may be equal.
        keys: per block (B*H, S, D).
        values: per block (B*H, S, D).

    Returns:
        What comes before the logits, (B, T, C), and the longer cache.
    """
    slots = slots_at(positions, model.config.n_head, keys[0])
    cache = [DecodeLayer(k, v, slots) for k, v in zip(keys, values, strict=True)]
    return model.hidden_states(ids, positions=positions, cache=cache), cache  # (B, T, C)


def append(state: State, logits: tf.Tensor, sampling: Sampling, limits: Limits) -> State:
    """Chooses from ``logits`` (B, V) and puts the ids behind the rows that go on."""
    history = History(state.ids, state.lengths, state.prompt_lengths - sampling.n_new)
    chosen = choose(logits, sampling, history, limits.stop_ids)  # (B,)
    log_total = tf.reduce_logsumexp(logits, axis=-1)  # (B,)
    logprobs = tf.gather(logits, chosen, batch_dims=1) - log_total
    active = is_active(state, limits)
    stops = is_stop(chosen, limits)
    # rows that have ended write past their end, where nothing is read
    slots = tf.stack([tf.range(shape_of(chosen)[0]), state.lengths], axis=1)  # (B, 2)
    state = append_top(state, logits, log_total, slots)
    return state._replace(
        ids=tf.tensor_scatter_nd_update(state.ids, slots, chosen),
        logprobs=tf.tensor_scatter_nd_update(state.logprobs, slots, logprobs),
        lengths=state.lengths + tf.cast(active & ~stops, tf.int32),
        stopped=state.stopped | (active & stops),
    )


def append_top(state: State, logits: tf.Tensor, log_total: tf.Tensor, slots: tf.Tensor) -> State:
    """Puts the likeliest ids of ``logits`` (B, V), whose exponentials sum to that of ``log_total`` (B,), into slots."""
    n_top = state.top_ids.shape[-1]
    if n_top == 0:
        return state
    top_logits, top_ids = tf.math.top_k(logits, n_top)  # (B, K)
    return state._replace(
        top_ids=tf.tensor_scatter_nd_update(state.top_ids, slots, top_ids),
        top_logprobs=tf.tensor_scatter_nd_update(state.top_logprobs, slots, top_logits - log_total[:, None]),
    )


def bucket(length: int, n_ctx: int) -> int:
    """Rounds a length up to a power of two, at most ``n_ctx``: XLA compiles once per bucket, not once per length."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, n_ctx)


def cache_sizes(length: int, limit: int, n_ctx: int) -> Iterator[int]:
    """Says how large the cache becomes while what is in it grows from ``length`` positions to ``limit``.

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
    room = n_slots - shape_of(state.keys[0])[1]
    return state._replace(
        ids=tf.pad(state.ids, [[0, 0], [0, room]]),
        logprobs=tf.pad(state.logprobs, [[0, 0], [0, room]]),
        top_ids=tf.pad(state.top_ids, [[0, 0], [0, room], [0, 0]]),
        top_logprobs=tf.pad(state.top_logprobs, [[0, 0], [0, room], [0, 0]]),
        keys=with_room(state.keys, room),
        values=with_room(state.values, room),
    )
