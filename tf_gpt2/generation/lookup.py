"""Prompt look-up decoding: guesses the next tokens from the text so far, and reads several in one pass to check them.

Text that quotes its prompt, or repeats itself, has said before what it says next: what followed the last tokens earlier
is a draft of what comes. One pass over the draft gives what the model itself says at each of its places, and the part
on which both agree is kept, with one token more. So the ids are those of plain decoding, draws included, whose random
numbers depend on seed and place only; a pass over several rows may round otherwise than a pass over one, though, and
where two tokens are equally likely but for that, the other one may be chosen.

A pass over several tokens costs more than one over one, so drafts are checked only while they pay: how often look-up
foresees the next token is known without a check. Knows nothing of text.

Source: Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.loop import decode_step, feed_several
from tf_gpt2.generation.processors import History
from tf_gpt2.generation.sampling import Sampling, choose
from tf_gpt2.generation.state import Limits, State, is_active, is_stop
from tf_gpt2.model.gpt2 import GPT2Model

N_DRAFTED = 3
"""Tokens of a draft. One pass over four tokens costs about 1.4 passes over one, over eight about twice as much."""

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
"""How many of the last tokens are looked for."""

MEMORY = 0.75
"""How much of the hit rate is kept at each token: the last four count for two thirds."""

SURE = 0.8
"""The hit rate from which a copy of the weights is made: six tokens foreseen in a row. It costs about ten passes."""

FREE_ROWS = 4
"""In so many rows a product computes for as long as it reads its weight: a pass over n takes time as n + 4."""


class Lookup(NamedTuple):
    """What the loop carries.

    Attributes:
        state: the texts.
        drafts: int32 (B, N), what may come next.
        is_found: bool (B,), whether the last tokens were there before; where not, the draft means nothing.
        hit_rate: float32 (B,), which part of the tokens was foreseen of late.
        n_passes: int32, passes over the model so far.
    """

    state: State
    drafts: tf.Tensor
    is_found: tf.Tensor
    hit_rate: tf.Tensor
    n_passes: tf.Tensor


Step = Callable[[GPT2Model, Lookup, Sampling, Limits], Lookup]


def start(state: State) -> Lookup:
    """Begins with no tokens foreseen."""
    n_rows = state.lengths.shape[0]
    return Lookup(
        state=state,
        drafts=tf.zeros((n_rows, N_DRAFTED), tf.int32),
        is_found=tf.zeros((n_rows,), tf.bool),
        hit_rate=tf.zeros((n_rows,), tf.float32),
        n_passes=tf.constant(0),
    )


def find_drafts(state: State) -> tuple[tf.Tensor, tf.Tensor]:
    """Looks for each row's last tokens earlier in the row, the longest match first, of equals the latest.

    Where the row ends before the draft does, the draft goes on with its own beginning: what has a period keeps it.

    Returns:
        int32 (B, N), what followed there; bool (B,), whether there was a match.
    """
    ids, last = state.ids, state.lengths[:, None] - 1
    places = tf.range(ids.shape[1])[None]  # (1, S + 2)
    is_same, n_same = places < last, tf.zeros(ids.shape, tf.int32)
    for back in range(LONGEST_MATCH):
        wanted = tf.gather(ids, tf.maximum(last - back, 0), batch_dims=1)  # (B, 1)
        is_same &= (places >= back) & (tf.roll(ids, back, axis=1) == wanted)
        n_same += tf.cast(is_same, tf.int32)
    best = tf.reduce_max(n_same * ids.shape[1] + places, axis=1, keepdims=True)  # (B, 1)
    period = tf.maximum(last - best % ids.shape[1], 1)
    ahead = tf.range(N_DRAFTED)[None] % period  # (B, N)
    drafts = tf.gather(ids, tf.maximum(last + 1 - period + ahead, 0), batch_dims=1)
    return drafts, best[:, 0] // ids.shape[1] >= SHORTEST_MATCH


def pays(lookup: Lookup, limits: Limits) -> tf.Tensor:
    """Says whether to check the drafts: a batch waits for its slowest row, so each row must gain."""
    active, rate = is_active(lookup.state, limits), lookup.hit_rate
    n_rows = active.shape[0]
    cost = N_DRAFTED * n_rows / (n_rows + FREE_ROWS)  # in passes over one token per row
    gain = tf.add_n([rate ** (i + 1) for i in range(N_DRAFTED)])  # tokens, if each is foreseen as often as of late
    return tf.reduce_any(active) & tf.reduce_all((lookup.is_found & (gain > cost)) | ~active)


def pays_with_copy(lookup: Lookup, limits: Limits) -> tf.Tensor:
    """Says whether to make what checking needs, and begin."""
    is_sure = (lookup.hit_rate > SURE) | ~is_active(lookup.state, limits)
    return pays(lookup, limits) & tf.reduce_all(is_sure)


def plain_step(model: GPT2Model, lookup: Lookup, sampling: Sampling, limits: Limits) -> Lookup:
    """Appends one token to each row, and sees whether look-up had foreseen it."""
    before = lookup.state
    state = decode_step(model, before, sampling, limits)
    chosen = tf.gather(state.ids, before.lengths, batch_dims=1)  # (B,)
    n_hits = tf.cast(chosen == lookup.drafts[:, 0], tf.int32)
    return followed(lookup, state, n_hits, n_seen=1)


def checking_step(model: GPT2Model, lookup: Lookup, sampling: Sampling, limits: Limits) -> Lookup:
    """Appends to each row as much of its draft as the model says too, and the token that it says then."""
    state, drafts = lookup.state, lookup.drafts
    n_rows, n_fed = state.ids.shape[0], N_DRAFTED + 1
    places = state.lengths[:, None] + tf.range(n_fed)  # (B, T), of what is chosen
    last = tf.gather(state.ids, state.lengths - 1, batch_dims=1)  # (B,)
    # a row that goes on feeds no place but those before the last one: what comes too late may go there
    positions = tf.minimum(places - 1, state.n_slots - 1)
    fed = tf.concat([last[:, None], drafts], axis=1)  # (B, T)
    hidden, cache = feed_several(model, fed, positions, state.keys, state.values)
    logits = tf.reshape(model.logits(hidden), (n_rows * n_fed, -1))  # (B*T, V)

    # each place chooses as a row of its own, that has said the draft up to there
    drafted = write(state.ids, places[:, :-1], drafts)
    lengths = tf.reshape(tf.minimum(places, state.n_slots), [-1])  # (B*T,)
    history = History(tf.repeat(drafted, n_fed, axis=0), lengths, tf.repeat(state.prompt_lengths, n_fed))
    chosen = choose(logits, repeat(sampling, n_fed), history, limits.stop_ids)  # (B*T,)
    logprobs = tf.gather(logits, chosen, batch_dims=1) - tf.reduce_logsumexp(logits, axis=-1)
    chosen, logprobs = (tf.reshape(x, (n_rows, n_fed)) for x in (chosen, logprobs))  # (B, T)

    n_hits = tf.reduce_sum(tf.math.cumprod(tf.cast(chosen[:, :-1] == drafts, tf.int32), axis=1), axis=1)  # (B,)
    stops = is_stop(chosen, limits)  # (B, T)
    n_before_stop = tf.reduce_min(tf.where(stops, tf.range(n_fed), n_fed), axis=1)
    n_wanted = tf.minimum(n_hits + 1, tf.minimum(limits.lengths, state.n_slots) - state.lengths)
    active = is_active(state, limits)
    longer = state._replace(
        ids=write(state.ids, places, chosen),
        logprobs=write(state.logprobs, places, logprobs),
        lengths=state.lengths + tf.where(active, tf.minimum(n_wanted, n_before_stop), 0),
        stopped=state.stopped | (active & (n_before_stop < n_wanted)),
        keys=tuple(layer.keys for layer in cache),
        values=tuple(layer.values for layer in cache),
    )
    return followed(lookup, longer, n_hits, n_seen=N_DRAFTED)


def write(rows: tf.Tensor, places: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Writes (B, T) into (B, S + 2); what lies behind the last column goes there, where nothing is read."""
    numbers = tf.broadcast_to(tf.range(rows.shape[0])[:, None], places.shape)
    slots = tf.stack([numbers, tf.minimum(places, rows.shape[1] - 1)], axis=-1)  # (B, T, 2)
    return tf.tensor_scatter_nd_update(rows, slots, values)


def repeat(sampling: Sampling, times: int) -> Sampling:
    """Gives each row's settings several times, one after the other."""

    def of_rows(settings: Any, shared: tuple[str, ...]) -> dict[str, tf.Tensor]:
        return {name: tf.repeat(x, times, axis=0) for name, x in settings._asdict().items() if name not in shared}

    processing = sampling.processing._replace(**of_rows(sampling.processing, ("bias", "bad_words")))
    return Sampling(**of_rows(sampling, ("processing",)), processing=processing)


def followed(lookup: Lookup, state: State, n_hits: tf.Tensor, *, n_seen: int) -> Lookup:
    """Goes on from a longer state.

    Args:
        lookup: what there was.
        state: the longer texts.
        n_hits: int32 (B,), how many tokens of the draft were right before the first that was wrong.
        n_seen: how many were compared.
    """
    rate = 1 - (1 - lookup.hit_rate) * MEMORY ** tf.cast(n_hits, tf.float32)
    rate = tf.where(n_hits < n_seen, rate * MEMORY, rate)
    rate = tf.where(lookup.is_found, rate, lookup.hit_rate)
    return Lookup(state, *find_drafts(state), hit_rate=rate, n_passes=lookup.n_passes + 1)


def scout(
    model: GPT2Model, lookup: Lookup, sampling: Sampling, limits: Limits, n_steps: tf.Tensor
) -> tuple[Lookup, tf.Tensor]:
    """Takes up to ``n_steps`` plain steps, until it pays to begin with checks; says whether it does."""
    end = lookup.n_passes + n_steps
    lookup = repeat_while(lambda now: ~pays_with_copy(now, limits), plain_step, model, lookup, sampling, limits, end)
    return lookup, pays_with_copy(lookup, limits)


def decode(model: GPT2Model, lookup: Lookup, sampling: Sampling, limits: Limits, n_steps: tf.Tensor) -> Lookup:
    """Takes up to ``n_steps`` steps, of either kind."""
    end = lookup.n_passes + n_steps

    def is_to_check(now: Lookup) -> tf.Tensor:
        # the last token there is room for is plain
        return pays(now, limits) & (longest(now, limits) < now.state.n_slots)

    def body(lookup: Lookup) -> tuple[Lookup]:
        # two loops in one, not a choice in it: a choice would copy the cache at each step
        lookup = repeat_while(lambda now: ~is_to_check(now), plain_step, model, lookup, sampling, limits, end)
        return (repeat_while(is_to_check, checking_step, model, lookup, sampling, limits, end),)

    return tf.while_loop(lambda now: has_room(now, limits, end), body, (lookup,))[0]


def repeat_while(
    condition: Callable[[Lookup], tf.Tensor],
    step: Step,
    model: GPT2Model,
    lookup: Lookup,
    sampling: Sampling,
    limits: Limits,
    end: tf.Tensor,
) -> Lookup:
    """Takes steps of one kind while a condition holds, and a row goes on, and there is room."""
    return tf.while_loop(
        lambda now: has_room(now, limits, end) & condition(now),
        lambda now: (step(model, now, sampling, limits),),
        (lookup,),
    )[0]


def has_room(lookup: Lookup, limits: Limits, end: tf.Tensor) -> tf.Tensor:
    """Says whether any row goes on, all of them can be fed, and there were fewer than ``end`` passes."""
    goes_on = tf.reduce_any(is_active(lookup.state, limits))
    return goes_on & (longest(lookup, limits) <= lookup.state.n_slots) & (lookup.n_passes < end)


def longest(lookup: Lookup, limits: Limits) -> tf.Tensor:
    """Gives the length of the longest row that goes on."""
    return tf.reduce_max(tf.where(is_active(lookup.state, limits), lookup.state.lengths, 0))
