"""A text that grows turn by turn: each turn reads only what is new, since the cache of the last one is kept.

Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.cache import Cache
from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.generate import in_pieces
from tf_gpt2.generation.loop import Limits, State, cache_sizes, grow, with_own_cache
from tf_gpt2.generation.options import Request, SamplingOptions, check_names, check_row, make_request, pad
from tf_gpt2.generation.run import Run, finish_reason
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

if TYPE_CHECKING:
    from typing_extensions import Unpack

N_READ = 32
"""Tokens that are read at once: one number for all turns, as another one compiles anew."""


def read(network: Network, state: State, start: tf.Tensor) -> State:
    """Reads a row on from ``start``, up to its last token, which has yet to be fed.

    Args:
        network: the model.
        state: one row; its cache holds what is before ``start``.
        start: int32, the first position to read.
    """

    def body(start: tf.Tensor, cache: Cache) -> tuple[tf.Tensor, Cache]:
        # the last token, and what lies behind the text, goes to places that later tokens take over
        positions = tf.minimum(start + tf.range(N_READ), state.n_slots - 1)[None]  # (1, T)
        ids = tf.gather(state.ids, positions, batch_dims=1)
        _, cache = network.hidden_states(ids, positions, cache)
        return start + N_READ, cache

    loop = (start, with_own_cache(network, state).cache)
    _, cache = tf.while_loop(lambda start, _: start < state.lengths[0] - 1, body, loop)
    return state._replace(cache=cache)


class GrowingRun(Run):
    """A ``Run`` of one row that can be given more to read."""

    def __init__(self, model: GPT2Model, *arguments: Any, jit_compile: bool):
        super().__init__(model, *arguments, jit_compile=jit_compile)
        self._read = compiled(read, model, jit_compile=jit_compile)
        self._n_ctx = model.config.n_ctx
        self._plan(self.state)

    def extend(self, n_kept: int, ids: Sequence[int], sampling: Sampling, limits: Limits) -> None:
        """Keeps the first tokens, and reads others behind them."""
        n_tokens = n_kept + len(ids)
        state = self.state
        while self._n_slots < n_tokens:
            self._n_slots = next(self._sizes)
        state = grow(state, self._n_slots)
        row = state.ids.numpy()
        row[0, n_kept:n_tokens] = ids
        lengths = tf.constant([n_tokens])
        state = state._replace(
            ids=tf.constant(row), lengths=lengths, prompt_lengths=lengths, stopped=tf.constant([False])
        )
        self._sampling, self.limits = sampling, limits
        # the last of the tokens that are kept has not been fed yet
        self.state = self._read(state, tf.constant(n_kept - 1))

    def finish_reason(self, max_new_tokens: int) -> str:
        """Returns why the row has ended."""
        n_new = int(self.state.lengths[0] - self.state.prompt_lengths[0])
        return finish_reason(bool(self.state.stopped[0]), n_new, max_new_tokens)

    def _plan(self, state: State) -> None:
        """Plans few sizes of the cache, whatever one turn may need: each of them compiles."""
        self._sizes = cache_sizes(state.n_slots, self._n_ctx, self._n_ctx)
        self._n_slots = next(self._sizes)


class Session:
    """Ids that a user and the model write in turns.

    When a turn does not fit into the window, the oldest ids are dropped, so many that half of the window is left for
    the rest, and what remains is read again.

    Args:
        model: the model.
        jit_compile: whether XLA compiles.

    Attributes:
        ids: what both have written so far, as far as it is remembered.
        n_read: how many positions were read so far, apart from those of tokens that the model has chosen.
        n_dropped: how many ids were dropped so far.
        finish_reason: why the last turn ended, ``"length"``, ``"stop"`` or ``"context"``; ``None`` if it was cut short.
            It is known when the last ids of a turn come.
        turn: a number that changes when a turn begins, or what is remembered is cut.

    Example:
        >>> from tf_gpt2.config import GPT2Config
        >>> config = GPT2Config(n_vocab=300, n_ctx=64, n_embd=8, n_head=2, n_layer=1)
        >>> session = Session(GPT2Model(config))
        >>> for turn in ([1, 2, 3], [4, 5]):
        ...     new_ids = [i for piece in session.add(turn, max_new_tokens=6) for i in piece]
        >>> len(session.ids), session.n_read
        (17, 6)
    """

    def __init__(self, model: GPT2Model, *, jit_compile: bool = True):
        self.model = model
        self.ids: list[int] = []
        self.n_read = 0
        self.n_dropped = 0
        self.finish_reason: str | None = None
        self._jit_compile = jit_compile
        self._run: GrowingRun | None = None
        self._n_in_run = 0  # so many of the ids lie in the run's cache, but for the last of them
        self.turn = 0

    def add(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 40,
        stop_ids: Sequence[int] = (),
        **options: Unpack[SamplingOptions],
    ) -> Iterator[list[int]]:
        """Appends ids and continues; yields the new ids as they come, and remembers those that were yielded.

        Closing the iterator, or an interrupt, ends the turn there.

        Args:
            ids: the user's; may be empty when there is something to continue.
            max_new_tokens: most new tokens.
            stop_ids: ids that end the turn, and are not remembered.
            **options: how to choose, as for ``tf_gpt2.generate``; "prompt" is all that was before.

        Raises:
            ContextLengthError: when the ids alone leave no room in the window; at once, like the other errors.
            ValueError: when an option is out of range, or there is nothing to continue.
            TypeError: when ids are no integers, or an option is unknown.
        """
        config = self.model.config
        row = check_row("ids", ids, config)
        if row.size >= config.n_ctx:
            raise ContextLengthError(
                f"ids have {row.size} tokens, which leaves no room in the window of n_ctx={config.n_ctx}; cut them to "
                f"{config.n_ctx - 1} or fewer"
            )
        if not self.ids and not row.size:
            raise ValueError("ids are empty, and there is nothing to continue")
        check_names(options, self.add)
        request = make_request(
            self.model,
            1,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            jit_compile=self._jit_compile,
            **options,
        )
        return self._take_turn(row, request)

    def _take_turn(self, row: np.ndarray, request: Request) -> Iterator[list[int]]:
        """Appends a checked row, int32 (T,), and continues; yields the new ids as they come."""
        self.turn += 1
        turn = self.turn
        self.finish_reason = None
        n_dropped = self._n_to_drop(row.size)
        whole = np.array([*self.ids[n_dropped:], *row.tolist()], np.int32)
        run = self._start(whole, 0 if n_dropped else min(self._n_in_run, len(self.ids)), request)
        self._run, self.n_dropped = run, self.n_dropped + n_dropped
        ids = whole.tolist()
        self._remember(ids)
        for new_ids in in_pieces(run, len(whole)):
            ids += new_ids
            self._remember(ids)
            if not run.goes_on:
                self.finish_reason = run.finish_reason(request.max_new_tokens)
            yield new_ids
            if turn != self.turn:  # another turn ends this one, and so does ``keep``
                return
        self._remember(ids)
        self.finish_reason = run.finish_reason(request.max_new_tokens)

    def keep(self, n_tokens: int) -> None:
        """Forgets all but the first tokens, and ends the turn under way."""
        self.turn += 1
        self.show(n_tokens)

    def show(self, n_tokens: int, then: Sequence[int] = ()) -> None:
        """Lets ``ids`` be the first tokens only, for a turn under way until it yields more.

        Args:
            n_tokens: how many stay.
            then: ids to put behind them, in place of others with the same text; the next turn reads them.
        """
        self._n_in_run = min(self._n_in_run, n_tokens)
        self.ids = [*self.ids[:n_tokens], *then]

    def _remember(self, ids: Sequence[int]) -> None:
        """Takes over what is in the run's cache."""
        self.ids, self._n_in_run = list(ids), len(ids)

    def _n_to_drop(self, n_new: int) -> int:
        """Computes how many of the oldest ids to drop, so that the new ones fit behind the others."""
        n_ctx = self.model.config.n_ctx
        if len(self.ids) + n_new < n_ctx:
            return 0
        return len(self.ids) - max(0, min(len(self.ids), n_ctx // 2 - n_new))

    def _start(self, whole: np.ndarray, n_kept: int, request: Request) -> GrowingRun:
        """Reads what lies behind the first ``n_kept`` ids."""
        config = self.model.config
        sampling, limits = request.sampling_of(1), request.limits_of([whole], config)
        if self._run is None or n_kept == 0:
            run = GrowingRun(self.model, *pad([whole], config), sampling, limits, jit_compile=request.jit_compile)
            self.n_read += len(whole)
        else:
            run = self._run
            run.extend(n_kept, whole[n_kept:].tolist(), sampling, limits)
            self.n_read += len(whole) - n_kept + 1
        return run
