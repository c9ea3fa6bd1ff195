"""Generation and scoring inside one graph, without Python between the steps: what a server can run.

The functions are those of ``generation``, for any number of rows and positions. A plain graph takes shapes as they
come. What XLA compiles is padded to powers of two first, and one row goes by a function of its own, because its
products are others; those of several rows are of transposed copies of the weights. Knows nothing of text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.loop import SMALLEST_BUCKET, as_plain_loop, as_plain_prefill, decode, grow, prefill
from tf_gpt2.generation.sampling import Sampling
from tf_gpt2.generation.scoring import chosen_logprobs
from tf_gpt2.generation.state import Limits
from tf_gpt2.generation.transposed import over_copies
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.products import shape_of
from tf_gpt2.serving.copies import CopiesInGraph

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
        self.model = model
        self.xla = xla
        self._prefill = self._function(prefill if xla else as_plain_prefill(prefill))
        self._copies = CopiesInGraph(model) if xla else None
        self._decode = self._function(over_copies(decode) if xla else as_plain_loop(decode))
        self._logprobs = self._function(logprobs_at)
        self._hidden_states = self._function(lambda model, ids: model.hidden_states(ids))
        self._logits = self._function(lambda model, ids: model.logits(model.hidden_states(ids)))

    def _function(self, function: Any) -> Any:
        """Makes a graph that all callers share, so that a SavedModel has it once."""

        def bound(*args: Any) -> Any:
            return function(self.model, *args)

        return tf.function(bound, jit_compile=self.xla, autograph=False)

    def n_rows(self, n_rows: tf.Tensor) -> tf.Tensor:
        """Says to how many rows to pad a batch: there must be one, and XLA compiles for each number."""
        return power_of_two(n_rows) if self.xla else tf.maximum(n_rows, 1)

    def n_positions(self, n_positions: tf.Tensor) -> tf.Tensor:
        """Says to how many positions to pad."""
        bucket = tf.maximum(power_of_two(n_positions), SMALLEST_BUCKET) if self.xla else tf.maximum(n_positions, 1)
        return tf.minimum(bucket, self.model.config.n_ctx)

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
        longest = tf.maximum(tf.reduce_max(limits.lengths), tf.shape(prompts.ids)[1])  # of rows that go no further too
        state = grow(state, self.n_positions(longest))
        has_one_row = prompts.ids.shape[0] == 1
        if has_one_row:  # of which the cache knows nothing
            n_head = self.model.config.n_head
            keys, values = (tuple(with_rows(x, n_head) for x in layers) for layers in (state.keys, state.values))
            state = state._replace(keys=keys, values=values)
        arguments = [state, sampling, limits, tf.constant(self.model.config.n_ctx)]
        if self._copies:
            arguments.append(() if has_one_row else self._copies())
        state = self._decode(*arguments)
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


def logprobs_at(model: GPT2Model, ids: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Gives each target's log-probability, float32 (B, T), with the logits of a few positions at a time in memory."""
    n_rows, n_positions = shape_of(ids)
    hidden = tf.reshape(model.hidden_states(ids), (-1, model.config.n_embd))  # (B*T, C)
    targets = tf.reshape(targets, (-1,))
    n_places = n_rows * n_positions
    n_pieces = -(-n_places // SCORED_AT_ONCE)
    padding = n_pieces * SCORED_AT_ONCE - n_places
    hidden = tf.reshape(tf.pad(hidden, [[0, padding], [0, 0]]), (-1, SCORED_AT_ONCE, model.config.n_embd))
    targets = tf.reshape(tf.pad(targets, [[0, padding]]), (-1, SCORED_AT_ONCE))

    def score_piece(i: tf.Tensor, logprobs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = chosen_logprobs(model, tf.gather(hidden, i), tf.gather(targets, i))  # (P,)
        return i + 1, tf.tensor_scatter_nd_update(logprobs, [[i]], chosen[None])

    start = tf.constant(0), tf.zeros_like(targets, tf.float32)
    logprobs = tf.while_loop(lambda i, _: i < n_pieces, score_piece, start)[1]
    return tf.reshape(tf.reshape(logprobs, (-1,))[:n_places], (n_rows, n_positions))
