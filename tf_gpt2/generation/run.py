"""One generation under way: calls the two compiled functions over a cache that grows.

Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gpt2.errors import ParamsError
from tf_gpt2.generation.compiled import Compiled, once_per_model
from tf_gpt2.generation.loop import as_plain_loop, as_plain_prefill, cache_sizes, decode, grow, prefill
from tf_gpt2.generation.sampling import Sampling
from tf_gpt2.generation.state import Limits, State, is_active
from tf_gpt2.generation.transposed import CompiledOverCopies
from tf_gpt2.model.gpt2 import GPT2Model

NO_NUMBERS = (
    "model gives logits that are not numbers: its weights hold NaN or infinity, or are too large; look for them with "
    "numpy.isfinite in what get_params() gives"
)


class Run:
    """One generation under way: the prompts are read when it is made, and tokens appended as often as asked.

    Args:
        model: the model.
        ids: int32 (B, T), right-padded, T a bucket.
        lengths: int32 (B,), at least 1.
        sampling: how to choose, for the rows of the state.
        limits: when to end, for the same rows.
        n_samples: how many rows to make of each prompt.
        n_top: how many of the likeliest ids to keep.
        jit_compile: whether XLA compiles.

    Attributes:
        state: what there is so far; the prompts, to begin with.
        limits: when to end.

    Raises:
        ParamsError: by ``advance``, when the model's logits are not numbers.
    """

    def __init__(
        self,
        model: GPT2Model,
        ids: tf.Tensor,
        lengths: tf.Tensor,
        sampling: Sampling,
        limits: Limits,
        *,
        n_samples: int = 1,
        n_top: int = 0,
        jit_compile: bool,
    ):
        self.limits = limits
        self._sampling = sampling
        self._loop = loop_of(model, jit_compile=jit_compile)
        self._sizes = sizes_for(ids, limits, model)
        self._n_slots = next(self._sizes)
        self.state = self._loop.prefill(ids, lengths, n_samples, n_top)

    @property
    def goes_on(self) -> bool:
        """Whether any row still wants a token."""
        return bool(tf.reduce_any(is_active(self.state, self.limits)))

    def advance(self, n_steps: int) -> None:
        """Appends up to ``n_steps`` tokens to each row that goes on; fewer when that fills the cache."""
        active = is_active(self.state, self.limits)
        longest = int(tf.reduce_max(tf.where(active, self.state.lengths, 0)))
        if longest > self._n_slots:
            self._n_slots = next(self._sizes)
        n_steps = min(n_steps, self._n_slots + 1 - longest)
        if self.state.n_slots < self._n_slots:
            self.state = grow(self.state, self._n_slots)
        self.state = checked(self._decode(self.state, tf.constant(n_steps)))

    def _decode(self, state: State, n_steps: tf.Tensor) -> State:
        """Appends up to ``n_steps`` tokens to each row that goes on; there is room for them."""
        return self._loop.decode(state, self._sampling, self.limits, n_steps)

    def end(self, rows: Sequence[bool]) -> None:
        """Lets rows end where they are."""
        lengths = tf.where(tf.constant(rows), self.state.lengths, self.limits.lengths)
        self.limits = self.limits._replace(lengths=lengths)


def compile_run(
    model: GPT2Model, ids: tf.Tensor, lengths: tf.Tensor, sampling: Sampling, limits: Limits, *, jit_compile: bool
) -> None:
    """Compiles what a ``Run`` with these arguments needs."""
    loop = loop_of(model, jit_compile=jit_compile)
    state = loop.prefill(ids, lengths, 1, 0)
    for n_slots in sizes_for(ids, limits, model):
        state = grow(state, n_slots)
        loop.decode(state, sampling, limits, tf.constant(0))


def sizes_for(ids: tf.Tensor, limits: Limits, model: GPT2Model) -> Iterator[int]:
    """Says how large the cache becomes from the prompts to the end: the last token there may be is never fed."""
    return cache_sizes(ids.shape[1], int(tf.reduce_max(limits.lengths)) - 1, model.config.n_ctx)


def checked(state: State) -> State:
    """Gives a state back; refuses one of a model whose logits are not numbers, as its ids mean nothing."""
    if np.isnan(state.logprobs.numpy()).any():
        raise ParamsError(NO_NUMBERS)
    return state


class CompiledLoop:
    """One model's prefill and decode, compiled.

    Args:
        model: referred to weakly, so that a model can be freed while its loop is remembered.
        jit_compile: whether XLA compiles them.
        prefill: takes the model, tensors and integers.
        decode: the same.
    """

    def __init__(
        self,
        model: GPT2Model,
        *,
        jit_compile: bool,
        prefill: Callable[..., Any] = prefill,
        decode: Callable[..., Any] = decode,
    ):
        how_to_read = prefill if jit_compile else as_plain_prefill(prefill)
        self.prefill = Compiled(how_to_read, model, jit_compile=jit_compile)
        self.decode = (
            CompiledOverCopies(decode, model)
            if jit_compile
            else Compiled(as_plain_loop(decode), model, jit_compile=False)
        )

    @property
    def n_traces(self) -> int:
        """How often a new shape was met: under XLA the number of compilations."""
        return self.prefill.n_traces + self.decode.n_traces


@once_per_model
def loop_of(model: GPT2Model, *, jit_compile: bool) -> CompiledLoop:
    """Gives a model's compiled loop."""
    return CompiledLoop(model, jit_compile=jit_compile)
