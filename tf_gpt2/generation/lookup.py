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

from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.loop import Limits, State, is_active, step, with_own_cache
from tf_gpt2.generation.run import Run
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

N_DRAFTED = 3
"""Tokens of a draft. One pass over four tokens costs 1.1 to 1.2 passes over one by native kernels, without them more.

Measured: ``python -m benchmarks.prompt_lookup``, AMD EPYC (AVX-512), 2026-12.
"""

LONGEST_MATCH, SHORTEST_MATCH = 3, 2
"""How many of the last tokens are looked for."""

MEMORY = 0.75
"""How much of the hit rate is kept at each token: the last four count for two thirds."""

LEAST_HIT_RATE = 0.8
"""The hit rate from which a copy of the weights is made: six tokens foreseen in a row. It costs about ten passes."""

SMALLEST = 3_000_000
"""Parameters from which on look-up is used: a step of a smaller model is too short to gain what the rest costs."""

ROWS_FOR_FREE = 4
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


Step = Callable[[Network, Lookup, Sampling, Limits], Lookup]


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


def drafts_pay(lookup: Lookup, limits: Limits) -> tf.Tensor:
    """Whether to check the drafts: a batch waits for its slowest row, so each row must gain."""
    active, rate = is_active(lookup.state, limits), lookup.hit_rate
    n_rows = active.shape[0]
    cost = N_DRAFTED * n_rows / (n_rows + ROWS_FOR_FREE)  # in passes over one token per row
    gain = tf.add_n([rate ** (i + 1) for i in range(N_DRAFTED)])  # tokens, if each is foreseen as often as of late
    return tf.reduce_any(active) & tf.reduce_all((lookup.is_found & (gain > cost)) | ~active)


def drafts_pay_with_twins(lookup: Lookup, limits: Limits) -> tf.Tensor:
    """Whether the hit rate justifies transposing the weights and starting to check drafts."""
    is_sure = (lookup.hit_rate > LEAST_HIT_RATE) | ~is_active(lookup.state, limits)
    return drafts_pay(lookup, limits) & tf.reduce_all(is_sure)


def plain_step(network: Network, lookup: Lookup, sampling: Sampling, limits: Limits) -> Lookup:
    """Appends one token to each row, and sees whether look-up had foreseen it."""
    before = lookup.state
    state, _ = step(network, before, lookup.drafts[:, :0], sampling, limits)
    chosen = tf.gather(state.ids, before.lengths, batch_dims=1)  # (B,)
    n_hits = tf.cast(chosen == lookup.drafts[:, 0], tf.int32)
    return update_hit_rate(lookup, state, n_hits, n_seen=1)


def checking_step(network: Network, lookup: Lookup, sampling: Sampling, limits: Limits) -> Lookup:
    """Appends to each row as much of its draft as the model says too, and the token that it says then."""
    state, n_hits = step(network, lookup.state, lookup.drafts, sampling, limits)
    return update_hit_rate(lookup, state, n_hits, n_seen=N_DRAFTED)


def update_hit_rate(lookup: Lookup, state: State, n_hits: tf.Tensor, *, n_seen: int) -> Lookup:
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


def decode_until_drafts_pay(
    network: Network, lookup: Lookup, sampling: Sampling, limits: Limits, n_steps: tf.Tensor
) -> tuple[Lookup, tf.Tensor]:
    """Takes up to ``n_steps`` plain steps, until it pays to begin with checks; returns whether it does."""
    lookup = lookup._replace(state=with_own_cache(network, lookup.state))
    end = lookup.n_passes + n_steps

    def is_unsure(now: Lookup) -> tf.Tensor:
        return ~drafts_pay_with_twins(now, limits)

    lookup = repeat_while(is_unsure, plain_step, network, lookup, sampling, limits, end)
    return lookup, drafts_pay_with_twins(lookup, limits)


def decode(network: Network, lookup: Lookup, sampling: Sampling, limits: Limits, n_steps: tf.Tensor) -> Lookup:
    """Takes up to ``n_steps`` steps, of either kind."""
    lookup = lookup._replace(state=with_own_cache(network, lookup.state))
    end = lookup.n_passes + n_steps

    def is_to_check(now: Lookup) -> tf.Tensor:
        # the last token there is room for is plain
        return drafts_pay(now, limits) & (longest(now, limits) < now.state.n_slots)

    def body(lookup: Lookup) -> tuple[Lookup]:
        # two loops in one, not a choice in it: a choice would copy the cache at each step
        lookup = repeat_while(lambda now: ~is_to_check(now), plain_step, network, lookup, sampling, limits, end)
        return (repeat_while(is_to_check, checking_step, network, lookup, sampling, limits, end),)

    return tf.while_loop(lambda now: has_room(now, limits, end), body, (lookup,))[0]


def repeat_while(
    condition: Callable[[Lookup], tf.Tensor],
    step: Step,
    network: Network,
    lookup: Lookup,
    sampling: Sampling,
    limits: Limits,
    end: tf.Tensor,
) -> Lookup:
    """Takes steps of one kind while a condition holds, and a row goes on, and there is room."""
    return tf.while_loop(
        lambda now: has_room(now, limits, end) & condition(now),
        lambda now: (step(network, now, sampling, limits),),
        (lookup,),
    )[0]


def has_room(lookup: Lookup, limits: Limits, end: tf.Tensor) -> tf.Tensor:
    """Whether any row goes on, all of them can be fed, and there were fewer than ``end`` passes."""
    goes_on = tf.reduce_any(is_active(lookup.state, limits))
    return goes_on & (longest(lookup, limits) <= lookup.state.n_slots) & (lookup.n_passes < end)


def longest(lookup: Lookup, limits: Limits) -> tf.Tensor:
    """Returns the length of the longest row that goes on."""
    return tf.reduce_max(tf.where(is_active(lookup.state, limits), lookup.state.lengths, 0))


class LookupRun(Run):
    """A ``Run`` that chooses the same ids and may need fewer passes; the arguments are those of ``Run``.

    Once drafts pay, it uses transposed twins of the weights: a product of a few rows is 1.5 times as fast with them.
    """

    def __init__(self, model: GPT2Model, *arguments: Any, jit_compile: bool, **kwargs: Any):
        super().__init__(model, *arguments, jit_compile=jit_compile, **kwargs)
        n_rows = self.state.lengths.shape[0]
        self._lookup = start(self.state)
        self._checks = False
        self._until_drafts_pay = compiled(decode_until_drafts_pay, model, jit_compile=jit_compile, n_rows=n_rows)
        self._model, self._jit_compile, self._n_rows_checked = model, jit_compile, n_rows * (N_DRAFTED + 1)

    @property
    def n_passes(self) -> int:
        """Passes over the model since the prompts were read."""
        return int(self._lookup.n_passes)

    def _decode(self, state: State, n_steps: tf.Tensor) -> State:
        lookup = self._lookup._replace(state=state)
        if self._checks:
            check = compiled(decode, self._model, jit_compile=self._jit_compile, n_rows=self._n_rows_checked)
            lookup = check(lookup, self._sampling, self.limits, n_steps)
        else:
            lookup, is_worth_it = self._until_drafts_pay(lookup, self._sampling, self.limits, n_steps)
            self._checks = bool(is_worth_it)
        self._lookup = lookup
        return lookup.state


def is_large_enough(model: GPT2Model) -> bool:
    """Whether look-up can make the model faster."""
    return model.config.n_params >= SMALLEST
