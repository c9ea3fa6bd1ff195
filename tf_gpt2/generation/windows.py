"""Texts longer than the window: a ``Run`` that, when the window is full, reads the last part of it again and goes on.

Half of a full window is kept, so n_ctx/2 new tokens cost one prefill of n_ctx/2. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.lookup_run import LookupRun, is_large_enough
from tf_gpt2.generation.prompts import SLIDE, pad, pad_rows, window_start
from tf_gpt2.generation.run import Run
from tf_gpt2.generation.sampling import Sampling
from tf_gpt2.generation.settings import LARGEST_INT
from tf_gpt2.generation.state import Limits, State
from tf_gpt2.model.gpt2 import GPT2Model


def start_run(
    model: GPT2Model,
    prompts: list[np.ndarray],
    sampling: Sampling,
    limits: Limits,
    *,
    max_new_tokens: int,
    overflow: str,
    prompt_lookup: bool = False,
    n_samples: int = 1,
    n_top: int = 0,
    jit_compile: bool,
) -> Run | SlidingRun:
    """Reads the prompts, and gives what goes on from there: past the window where ``overflow`` says so."""
    kept: Any = {"n_top": n_top, "jit_compile": jit_compile}
    if overflow != SLIDE:
        run = LookupRun if prompt_lookup and is_large_enough(model) else Run
        return run(model, *pad(prompts, model.config), sampling, limits, n_samples=n_samples, **kept)
    rows = [prompt for prompt in prompts for _ in range(n_samples)]
    return SlidingRun(model, rows, sampling, limits.stop_ids, max_new_tokens=max_new_tokens, **kept)


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
        sampling: how to choose.
        stop_ids: int32 (K,), -1 for none.
        max_new_tokens: most new tokens per row.
        n_top: how many of the likeliest ids to keep beside each chosen one.
        jit_compile: whether XLA compiles.
    """

    def __init__(
        self,
        model: GPT2Model,
        rows: list[np.ndarray],
        sampling: Sampling,
        stop_ids: tf.Tensor,
        *,
        max_new_tokens: int,
        n_top: int,
        jit_compile: bool,
    ):
        self._model = model
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._kept: Any = {"n_top": n_top, "jit_compile": jit_compile}
        self._texts = {
            "ids": rows,
            "logprobs": [np.zeros(len(row), np.float32) for row in rows],
            "top_ids": [np.zeros((len(row), n_top), np.int32) for row in rows],
            "top_logprobs": [np.zeros((len(row), n_top), np.float32) for row in rows],
        }
        self._prompt_lengths = lengths_of(rows)
        self._ends = self._prompt_lengths + min(max_new_tokens, LARGEST_INT)  # (B,), int64
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
        limits = Limits(lengths=tf.constant(ends, tf.int32), stop_ids=self._stop_ids)
        return Run(self._model, *pad(windows, self._model.config), sampling, limits, **self._kept)

    def _whole(self) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
        """Gives the whole texts, ids and what is kept at their places, and which rows have stopped."""
        state = self._run.state
        n_read, lengths = state.prompt_lengths.numpy(), state.lengths.numpy()

        def with_new(before: list[np.ndarray], window: np.ndarray) -> list[np.ndarray]:
            parts = zip(before, window, n_read, lengths, strict=True)
            return [np.concatenate([old, row[n:end]]) for old, row, n, end in parts]

        texts = {name: with_new(before, getattr(state, name).numpy()) for name, before in self._texts.items()}
        return texts, self._stopped | state.stopped.numpy()


def lengths_of(rows: list[np.ndarray]) -> np.ndarray:
    """Gives the rows' lengths, int64 (B,)."""
    return np.array([len(row) for row in rows])
