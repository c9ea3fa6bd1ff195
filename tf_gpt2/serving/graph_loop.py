"""Generation and scoring inside one graph, without Python between the steps: what a server can run.

The functions are those of ``generation``, for any number of rows and positions. A plain graph takes shapes as they
come. What XLA compiles is padded to powers of two first, and one row goes by a function of its own, because its
products are others; those of several rows are of transposed copies of the weights. Knows nothing of text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.cache import Cache
from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.compiled import with_twins
from tf_gpt2.generation.loop import SMALLEST_BUCKET, Limits, decode, grow, prefill
from tf_gpt2.generation.scoring import chosen_logprobs
from tf_gpt2.model.arithmetic import graph, xla as xla_ops
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.formulas import KeyValues
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network, network_of
from tf_gpt2.serving.copies import TwinsInGraph

SCORED_AT_ONCE = 256
"""Positions whose logits are in memory at one time."""


class Prompts(NamedTuple):
    """What to continue.

    Attributes:
        ids: int32 (B, T), right-padded.
        lengths: int32 (B,), at least 1.
        prompt_lengths: int32 (B,), how many of them are the prompt's, and not new ones from before.
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor


class Continued(NamedTuple):
    """Prompts with what was appended.

    Attributes:
        ids: int32 (B, S).
        lengths: int32 (B,).
        logprobs: float32 (B, S), of new ids under the unmodified model, at their places in ``ids``.
        stopped: bool (B,), whether the row chose a stop id.
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    logprobs: tf.Tensor
    stopped: tf.Tensor


class GraphLoop:
    """A model's forward passes for a graph of any shapes.

    Args:
        model: must outlive what is made of it.
        xla: whether XLA compiles them, when they are run.
    """

    def __init__(self, model: GPT2Model, *, xla: bool):
        self.config = model.config
        self.xla = xla
        self._network = network_of(model, xla_ops if xla else graph)
        self._twins = TwinsInGraph(self._network) if xla else None
        self._prefill = self._function(prefill)
        self._decode = self._function(decode)
        self._decode_several = self._function(self._decode_with_twins)
        self._logprobs = self._function(logprobs_at)
        self._hidden_states = self._function(lambda network, ids: network.hidden_states(ids)[0])
        self._logits = self._function(lambda network, ids: network.logits(network.hidden_states(ids)[0]))

    def _function(self, function: Any) -> Any:
        """Makes a graph that all callers share, so that a SavedModel has it once."""

        def bound(*args: Any) -> Any:
            network = self._network
            prepared = dataclasses.replace(network, weights=network.ops.prepare(network.weights))
            return function(prepared, *args)

        return tf.function(bound, jit_compile=self.xla, autograph=False)

    @staticmethod
    def _decode_with_twins(network: Network, twins: tuple[tf.Tensor, ...], *args: Any) -> Any:
        return decode(dataclasses.replace(network, weights=with_twins(network.weights, twins)), *args)

    def n_rows(self, n_rows: tf.Tensor) -> tf.Tensor:
        """Says to how many rows to pad a batch: there must be one, and XLA compiles for each number."""
        return power_of_two(n_rows) if self.xla else tf.maximum(n_rows, 1)

    def n_positions(self, n_positions: tf.Tensor) -> tf.Tensor:
        """Says to how many positions to pad."""
        bucket = tf.maximum(power_of_two(n_positions), SMALLEST_BUCKET) if self.xla else tf.maximum(n_positions, 1)
        return tf.minimum(bucket, self.config.n_ctx)

    def generate(self, prompts: Prompts, sampling: Sampling, limits: Limits) -> Continued:
        """Continues prompts of padded shapes until each row ends."""
        if not self.xla:
            return self._generate(prompts, sampling, limits)
        return tf.cond(
            tf.shape(prompts.ids)[0] == 1,
            lambda: self._generate(*one_row(prompts, sampling, limits)),
            lambda: self._generate(prompts, sampling, limits),
        )

    def _generate(self, prompts: Prompts, sampling: Sampling, limits: Limits) -> Continued:
        state = self._prefill(prompts.ids, prompts.lengths, 1, 0, prompts.prompt_lengths)
        longest = tf.maximum(tf.reduce_max(limits.lengths), tf.shape(prompts.ids)[1])  # include finished rows
        state = grow(state, self.n_positions(longest))
        has_one_row = prompts.ids.shape[0] == 1
        if has_one_row:  # static sizes are lost in the cache's first axis; restore them
            state = state._replace(cache=with_heads(state.cache, self.config.n_head))
        n_steps = tf.constant(self.config.n_ctx)
        if self._twins and self._twins.exist and not has_one_row:
            state = self._decode_several(self._twins(), state, sampling, limits, n_steps)
        else:
            state = self._decode(state, sampling, limits, n_steps)
        return Continued(state.ids, state.lengths, state.logprobs, state.stopped)

    def logprobs(self, ids: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Gives each target's log-probability behind the ids up to its place: twice int32 (B, T) -> float32 (B, T)."""
        return self._logprobs(ids, targets)

    def hidden_states(self, ids: tf.Tensor) -> tf.Tensor:
        """Runs the blocks: int32 (B, T) -> float32 (B, T, C)."""
        return tf.cast(self._hidden_states(ids), tf.float32)

    def logits(self, ids: tf.Tensor) -> tf.Tensor:
        """Gives logits at every position: int32 (B, T) -> float32 (B, T, V)."""
        return self._logits(ids)


def power_of_two(number: tf.Tensor) -> tf.Tensor:
    """Rounds int32 () up to a power of two, at least 1."""
    n_bits = tf.reduce_sum(tf.cast(tf.bitwise.right_shift(tf.maximum(number, 1) - 1, tf.range(31)) > 0, tf.int32))
    return tf.bitwise.left_shift(1, n_bits)


def one_row(prompts: Prompts, sampling: Sampling, limits: Limits) -> tuple[Prompts, Sampling, Limits]:
    """Tells TensorFlow that there is one row, so that it traces products of one row."""
    return tf.nest.map_structure(lambda x: x if x.shape[0] else with_rows(x, 1), (prompts, sampling, limits))


def with_rows(x: tf.Tensor, n_rows: int) -> tf.Tensor:
    """Tells TensorFlow the size of the first axis."""
    return tf.ensure_shape(x, [n_rows, *x.shape[1:]])


def with_heads(cache: Cache, n_head: int) -> Cache:
    """Tells TensorFlow that a cache, (B*H, S, D), has one row."""
    return tuple(KeyValues(*(with_rows(part, n_head) for part in one)) for one in cache)


def logprobs_at(network: Network, ids: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Gives each target's log-probability, float32 (B, T), with the logits of a few positions at a time in memory."""
    n_rows, n_positions = shape_of(ids)
    n_embd = network.config.n_embd
    hidden = tf.reshape(network.hidden_states(ids)[0], (-1, n_embd))  # (B*T, C)
    targets = tf.reshape(targets, (-1,))
    n_places = n_rows * n_positions
    n_pieces = -(-n_places // SCORED_AT_ONCE)
    padding = n_pieces * SCORED_AT_ONCE - n_places
    hidden = tf.reshape(tf.pad(hidden, [[0, padding], [0, 0]]), (-1, SCORED_AT_ONCE, n_embd))
    targets = tf.reshape(tf.pad(targets, [[0, padding]]), (-1, SCORED_AT_ONCE))

    def score_piece(i: tf.Tensor, logprobs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = chosen_logprobs(network, tf.gather(hidden, i), tf.gather(targets, i))  # (P,)
        return i + 1, tf.tensor_scatter_nd_update(logprobs, [[i]], chosen[None])

    start = tf.constant(0), tf.zeros_like(targets, tf.float32)
    logprobs = tf.while_loop(lambda i, _: i < n_pieces, score_piece, start)[1]
    return tf.reshape(tf.reshape(logprobs, (-1,))[:n_places], (n_rows, n_positions))
