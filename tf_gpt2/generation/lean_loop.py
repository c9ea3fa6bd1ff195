"""Tokens on the processor, outside of XLA: ``loop.decode`` with little beside the arithmetic.

There each operation takes a microsecond, whatever it computes, and what a loop carries takes several at each step. So a
step is one graph that runs in one thread; what stays the same from step to step is computed before; and one number a
row is carried, with the noise for the next step where rows draw. All else is memory that is written in place. Only for
what needs no branches, see ``lean_choice``, and for models that nobody has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.cache import EntryLayer, Grid
from tf_gpt2.generation.lean_choice import Choice
from tf_gpt2.generation.state import Limits, State, is_active, is_stop
from tf_gpt2.model.alike import is_own, overridden
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.loops import as_one_node, kept_apart, read_before_loop
from tf_gpt2.model.one_thread import in_one_thread
from tf_gpt2.model.products import shape_of

SMALL = 2**22
"""Parameters of a model that stays in the processor's caches, so that two threads may read it at the cost of one."""
STEPS_AT_ONCE = 2
"""Steps of a small model in one graph: to go from one to the next takes longer than a step too many may cost."""
MANY_ROWS = 8
"""Rows from which on two halves side by side are faster than all in one, in a small model."""


class Memory(NamedTuple):
    """What the loop writes to in place; see ``State``.

    Attributes:
        ids: int32 (B * (S + 2),).
        logprobs: float32 (B * (S + 2),).
        keys: per block (B*H*S, 1, D).
        values: per block (B*H*S, 1, D).
    """

    ids: tf.Tensor
    logprobs: tf.Tensor
    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]


def may_decode_lean(model: GPT2Model, state: State) -> bool:
    """Says whether ``decode_lean`` is for such a model and state, if it runs on the processor."""
    parts = [*model.blocks, model.ln_f, model.embd_dropout]
    is_unchanged = type(model) is GPT2Model and not overridden(model) and all(map(is_own, parts))
    return is_unchanged and state.top_ids.shape[-1] == 0 and not tf.executing_eagerly()


def decode_lean(model: GPT2Model, state: State, choice: Choice, limits: Limits, n_steps: tf.Tensor) -> State:
    """Appends up to ``n_steps`` tokens to each row, in a plain loop that has the cache alone."""

    def decode(state: State, choice: Choice, limits: Limits) -> State:
        return decode_rows(model, state, choice, limits, n_steps)

    # the loop writes into what is its own alone, as the cache already is
    ids, logprobs = (tf.raw_ops.DeepCopy(x=x) for x in (state.ids, state.logprobs))
    state = state._replace(ids=ids, logprobs=logprobs)
    with read_before_loop(variable.value for variable in model.variables):
        n_rows = shape_of(state.lengths)[0]
        if not is_small(model):
            return decode(state, choice, limits)
        if isinstance(n_rows, int):
            return in_halves(decode, state, choice, limits) if n_rows >= MANY_ROWS else decode(state, choice, limits)
        part = kept_apart(decode)
        return tf.cond(
            n_rows >= MANY_ROWS,
            as_one_node(lambda: in_halves(part, state, choice, limits)),
            as_one_node(lambda: part(state, choice, limits)),
        )


def is_small(model: GPT2Model) -> bool:
    """Says whether a step of a model takes little more time than what is around it."""
    return model.config.n_params <= SMALL


def in_halves(decode: Callable[..., State], state: State, choice: Choice, limits: Limits) -> State:
    """Decodes half of the rows beside the other half."""
    n_rows = shape_of(state.lengths)[0]
    half = n_rows // 2

    def first(x: tf.Tensor) -> tf.Tensor:
        return x[: half * (shape_of(x)[0] // n_rows)]  # keys and values have H rows each

    def second(x: tf.Tensor) -> tf.Tensor:
        return x[half * (shape_of(x)[0] // n_rows) :]

    ends = [
        decode(*tf.nest.map_structure(part, (state, choice)), limits._replace(lengths=part(limits.lengths)))
        for part in (first, second)
    ]
    return tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *ends)


def decode_rows(model: GPT2Model, state: State, choice: Choice, limits: Limits, n_steps: tf.Tensor) -> State:
    """Decodes rows side by side in each step, which runs in one thread.

    Each step makes each active row longer by one. So ``left`` says all: int32 (B,), how many tokens a row may still
    get; 0 when it ended, and below 0 when it stopped, by as many as it might have got.
    """
    furthest = tf.minimum(limits.lengths, state.lengths + n_steps)
    ends = tf.where(is_active(state, limits), furthest, state.lengths)
    grid = Grid.of(state.keys[0], model.config.n_head)
    memory = Memory(
        ids=tf.reshape(state.ids, (-1,)),
        logprobs=tf.reshape(state.logprobs, (-1,)),
        keys=tuple(map(grid.as_entries, state.keys)),
        values=tuple(map(grid.as_entries, state.values)),
    )
    firsts = tf.range(shape_of(state.lengths)[0]) * shape_of(state.ids)[1]  # (B,), where rows begin in memory

    n_at_once = STEPS_AT_ONCE if is_small(model) else 1

    def steps(left: tf.Tensor, noises: Any) -> tf.Tensor:
        for noise in noises:  # a step after the end changes nothing
            choose = functools.partial(choice.choose, noise=noise)
            chosen = append(model, memory, grid, ends - tf.abs(left), firsts, choose)
            left = tf.where(left > 0, tf.where(is_stop(chosen, limits), -left, left - 1), left)
        return left

    def noises_at(lengths: tf.Tensor) -> Any:
        return choice.noise(lengths, n_at_once, model.config.n_vocab)

    def body(left: tf.Tensor, noises: Any) -> tuple[tf.Tensor, Any]:
        return in_one_thread(steps, left, noises), noises_at(ends - tf.abs(left) + n_at_once)

    start = ends - state.lengths, noises_at(state.lengths)
    left = tf.while_loop(lambda left, _: tf.reduce_any(left > 0), body, start)[0]
    with tf.control_dependencies([left]):  # all is written
        written = tf.nest.map_structure(tf.identity, memory)
    return state._replace(
        ids=tf.reshape(written.ids, tf.shape(state.ids)),
        logprobs=tf.reshape(written.logprobs, tf.shape(state.ids)),
        lengths=ends - tf.abs(left),
        stopped=state.stopped | (left < 0),
        keys=tuple(map(grid.as_part, written.keys)),
        values=tuple(map(grid.as_part, written.values)),
    )


def append(
    model: GPT2Model,
    memory: Memory,
    grid: Grid,
    lengths: tf.Tensor,
    firsts: tf.Tensor,
    choose: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """Feeds each row's last token and writes the one behind it that is chosen; gives that, int32 (B,).

    A row that has ended goes through all this too: it leaves in the cache what was there, and writes past its end,
    where nothing is read.
    """
    positions = grid.inside(lengths - 1)  # (B,); of a full row the one before, which was fed already
    last = tf.gather(memory.ids, firsts + positions)  # (B,)
    slots = grid.at(positions)
    cache = [EntryLayer(k, v, slots) for k, v in zip(memory.keys, memory.values, strict=True)]
    logits = model.logits(model.hidden_states(last, positions=positions, cache=cache))  # (B, V)
    chosen = choose(logits)  # (B,)
    logprobs = tf.gather(tf.nn.log_softmax(logits), chosen, batch_dims=1)
    places = firsts + lengths
    written = (
        tf.raw_ops.InplaceUpdate(x=memory.ids, i=places, v=chosen),
        tf.raw_ops.InplaceUpdate(x=memory.logprobs, i=places, v=logprobs),
    )
    with tf.control_dependencies(written):
        return tf.identity(chosen)
