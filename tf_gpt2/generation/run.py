"""One generation under way, over a cache that grows or a window that slides; and its last state -> the result.

A text longer than the window goes on when half of the window is read again, so n_ctx/2 new tokens cost one prefill of
n_ctx/2. Knows nothing of text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.errors import ParamsError
from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.loop import Limits, State, cache_sizes, decode, grow, is_active, prefill
from tf_gpt2.generation.options import LARGEST_INT, Request, pad, pad_rows, top_to_keep, window_start
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
        sampling: how to choose, for B*N rows: the N samples of the first prompt, of the second, and so on.
        limits: when to end, for the same rows.
        n_top: how many of the likeliest ids to keep beside each chosen one.
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
        n_top: int = 0,
        jit_compile: bool,
    ):
        n_rows = limits.lengths.shape[0]
        self.limits = limits
        self._sampling = sampling
        self._decode_some = compiled(decode, model, jit_compile=jit_compile, n_rows=n_rows)
        self._sizes = sizes_for(ids, limits, model.config.n_ctx)
        self._n_slots = next(self._sizes)
        self.state = compiled(prefill, model, jit_compile=jit_compile)(ids, lengths, n_rows // ids.shape[0], n_top)

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
        self.state = refuse_nan(self._decode(self.state, tf.constant(n_steps)))

    def _decode(self, state: State, n_steps: tf.Tensor) -> State:
        """Appends up to ``n_steps`` tokens to each row that goes on; there is room for them."""
        return self._decode_some(state, self._sampling, self.limits, n_steps)

    def end(self, rows: Sequence[bool]) -> None:
        """Lets rows end where they are."""
        lengths = tf.where(tf.constant(rows), self.state.lengths, self.limits.lengths)
        self.limits = self.limits._replace(lengths=lengths)


def compile_run(
    model: GPT2Model, ids: tf.Tensor, lengths: tf.Tensor, sampling: Sampling, limits: Limits, *, jit_compile: bool
) -> None:
    """Compiles what a ``Run`` with these arguments needs."""
    state = compiled(prefill, model, jit_compile=jit_compile)(ids, lengths, 1, 0)
    decode_some = compiled(decode, model, jit_compile=jit_compile, n_rows=ids.shape[0])
    for n_slots in sizes_for(ids, limits, model.config.n_ctx):
        state = grow(state, n_slots)
        decode_some(state, sampling, limits, tf.constant(0))


def sizes_for(ids: tf.Tensor, limits: Limits, n_ctx: int) -> Iterator[int]:
    """Returns the sizes of the cache from the prompts to the end: the last token is never fed, so it needs no slot."""
    return cache_sizes(ids.shape[1], int(tf.reduce_max(limits.lengths)) - 1, n_ctx)


def refuse_nan(state: State) -> State:
    """Returns the state; raises ParamsError when the logits were not numbers, as the ids then mean nothing."""
    if np.isnan(state.logprobs.numpy()).any():
        raise ParamsError(NO_NUMBERS)
    return state


class SlidingRun:
    """One generation under way, as ``Run``, without an end to the window.

    The rows of a batch are full at different times; each waits until the others are, or have ended, and then all that
    go on are read at once. Where a row's window begins depends on the row's length alone, see ``window_start``.

    Only what is in the window counts for the next token, penalties and bans included. The number of new tokens, for
    ``min_new_tokens``, and the places that random numbers depend on are those in the whole text: no window repeats the
    numbers of the one before.

    Args:
        model: the model.
        rows: B prompts of any length, int32.
        request: what is asked of them.
    """

    def __init__(self, model: GPT2Model, rows: list[np.ndarray], request: Request):
        n_top = top_to_keep(request.top_logprobs, model.config)
        self._model = model
        self._request = request
        self._sampling = request.sampling_of(len(rows))
        rows = [row for row in rows for _ in range(request.num_samples)]
        self._texts = {
            "ids": rows,
            "logprobs": [np.zeros(len(row), np.float32) for row in rows],
            "top_ids": [np.zeros((len(row), n_top), np.int32) for row in rows],
            "top_logprobs": [np.zeros((len(row), n_top), np.float32) for row in rows],
        }
        self._prompt_lengths = lengths_of(rows)
        self._ends = self._prompt_lengths + min(request.max_new_tokens, LARGEST_INT)  # (B,), int64
        self._stopped = np.zeros(len(rows), bool)
        self._run = self._read()

    @property
    def state(self) -> State:
        """What there is so far: whole texts, with the cache of the last window."""
        texts, stopped = self._whole()
        lengths = lengths_of(texts["ids"])
        return self._run.state._replace(
            lengths=tf.constant(lengths, tf.int32),
            prompt_lengths=tf.constant(self._prompt_lengths, tf.int32),
            stopped=tf.constant(stopped),
            **{name: tf.constant(pad_rows(rows, lengths.max())) for name, rows in texts.items()},
        )

    @property
    def goes_on(self) -> bool:
        """Whether any row still wants a token."""
        texts, stopped = self._whole()
        return bool((~stopped & (lengths_of(texts["ids"]) < self._ends)).any())

    def advance(self, n_steps: int) -> None:
        """Appends up to ``n_steps`` tokens to each row that goes on; reads again when the windows are full."""
        if not self._run.goes_on:
            self._texts, self._stopped = self._whole()
            self._run = self._read()
        self._run.advance(n_steps)

    def end(self, rows: Sequence[bool]) -> None:
        """Lets rows end where they are."""
        self._ends = np.where(rows, lengths_of(self._whole()[0]["ids"]), self._ends)
        self._run.end(rows)

    def _read(self) -> Run:
        """Reads each row's window; of a row that has ended the last token, which keeps the shapes."""
        n_ctx = self._model.config.n_ctx
        lengths = lengths_of(self._texts["ids"])
        n_wanted = np.where(self._stopped, 0, self._ends - lengths)
        starts = [window_start(n, n_ctx) if wanted else n - 1 for n, wanted in zip(lengths, n_wanted, strict=True)]
        windows = [ids[start:] for ids, start in zip(self._texts["ids"], starts, strict=True)]
        ends = np.minimum(lengths_of(windows) + n_wanted, n_ctx)
        sampling = self._sampling._replace(
            n_before=tf.constant(starts, tf.int32), n_new=tf.constant(lengths - self._prompt_lengths, tf.int32)
        )
        limits = Limits(lengths=tf.constant(ends, tf.int32), stop_ids=tf.constant(self._request.stop_ids))
        return Run(
            self._model,
            *pad(windows, self._model.config),
            sampling,
            limits,
            n_top=top_to_keep(self._request.top_logprobs, self._model.config),
            jit_compile=self._request.jit_compile,
        )

    def _whole(self) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
        """Returns the whole texts, ids and what is kept at their places, and which rows have stopped."""
        state = self._run.state
        n_read, lengths = state.prompt_lengths.numpy(), state.lengths.numpy()

        def with_new(before: list[np.ndarray], window: np.ndarray) -> list[np.ndarray]:
            parts = zip(before, window, n_read, lengths, strict=True)
            return [np.concatenate([old, row[n:end]]) for old, row, n, end in parts]

        texts = {name: with_new(before, getattr(state, name).numpy()) for name, before in self._texts.items()}
        return texts, self._stopped | state.stopped.numpy()


def lengths_of(rows: list[np.ndarray]) -> np.ndarray:
    """Returns the rows' lengths, int64 (B,)."""
    return np.array([len(row) for row in rows])


class Timings(NamedTuple):
    """Durations of one call.

    Attributes:
        prefill_s: seconds until the prompts were read.
        decode_s: seconds for the new tokens.
    """

    prefill_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What ``generate`` returns, one entry per prompt, or per sample of it, those of the first prompt first.

    Attributes:
        ids: the new ids only, without the stop id.
        logprobs: natural logarithms of the new ids' probabilities under the unmodified model.
        finish_reasons: ``"length"`` after ``max_new_tokens``, ``"stop"`` at a stop id or if ``is_complete`` was true,
            ``"context"`` when the window was full.
        top_logprobs: for each new id ``(id, logprob)`` pairs of the likeliest ids under the unmodified model, the
            likeliest first, of equals the lower id; empty where none were asked for.
        timings: how long the call took; what had to be compiled is in it. Not compared.
        n_truncated: how many tokens at the prompt's beginning the model did not see, see ``overflow``.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    top_logprobs: list[list[list[tuple[int, float]]]] = dataclasses.field(default_factory=list)
    timings: Timings = dataclasses.field(default=Timings(0.0, 0.0), compare=False)
    n_truncated: list[int] = dataclasses.field(default_factory=list)


def make_result(
    state: State,
    rows: list[np.ndarray],
    n_unseen: list[int],
    request: Request,
    is_complete: Callable[[list[int]], bool] | None,
    timings: Timings,
) -> GenerationResult:
    """Cuts each row's new part out of the loop's last state.

    Args:
        state: the last state, B rows.
        rows: their prompts, as far as they are in the state.
        n_unseen: for each prompt, before its samples, how many tokens the model did not see.
        request: what was asked.
        is_complete: as for ``generate``.
        timings: how long it took.
    """
    ids = new_ids(state, rows)
    stopped = [
        one or (is_complete is not None and is_complete(row))
        for row, one in zip(ids, state.stopped.numpy().tolist(), strict=True)
    ]
    return GenerationResult(
        ids=ids,
        logprobs=new_part(state.logprobs, state, rows),
        finish_reasons=[
            finish_reason(one, len(row), request.max_new_tokens) for row, one in zip(ids, stopped, strict=True)
        ],
        top_logprobs=likeliest(state, rows, request.top_logprobs),
        timings=timings,
        n_truncated=[n for n in n_unseen for _ in range(request.num_samples)],
    )


def finish_reason(stopped: bool, n_new: int, max_new_tokens: int) -> str:
    """Returns why a row ended that has so many new tokens: ``"stop"``, ``"length"`` or else ``"context"``."""
    if stopped:
        return "stop"
    return "length" if n_new == max_new_tokens else "context"


def new_ids(state: State, rows: list[np.ndarray]) -> list[list[int]]:
    """Returns each row's ids behind its prompt."""
    return new_part(state.ids, state, rows)


def new_part(part: tf.Tensor, state: State, rows: list[np.ndarray]) -> list[list[Any]]:
    """Returns what a part of the state has behind each row's prompt."""
    ends = state.lengths.numpy()
    return [one[len(row) : end].tolist() for one, row, end in zip(part.numpy(), rows, ends, strict=True)]


def likeliest(state: State, rows: list[np.ndarray], n: int) -> list[list[list[tuple[int, float]]]]:
    """Returns the ``n`` likeliest ids at each new id's place, with their log-probabilities."""
    if n == 0:
        return [[] for _ in rows]
    parts = [new_part(part[..., :n], state, rows) for part in (state.top_ids, state.top_logprobs)]
    return [[list(zip(*place, strict=True)) for place in zip(*row, strict=True)] for row in zip(*parts, strict=True)]
