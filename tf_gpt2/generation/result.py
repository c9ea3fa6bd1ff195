"""The loop's last state -> what ``generate`` gives: each row's new part, and why it ended. Knows nothing of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.loop import State


class Timings(NamedTuple):
    """Durations of one call.

    Attributes:
        prefill_s: until the prompts were read.
        decode_s: for the new tokens.
    """

    prefill_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What ``generate`` gives, one entry per prompt, or per sample of it.

    Attributes:
        ids: the new ids only, without the stop id.
        logprobs: natural logarithms of the new ids' probabilities under the unmodified model.
        finish_reasons: ``"length"`` after ``max_new_tokens``, ``"stop"`` at a stop id or where ``is_complete`` said so,
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
    max_new_tokens: int,
    top_logprobs: int,
    is_complete: Callable[[list[int]], bool] | None,
    timings: Timings,
) -> GenerationResult:
    """Cuts each row's new part out of the loop's last state."""
    ids, logprobs = new_ids(state, rows), new_part(state.logprobs, state, rows)
    reasons = [
        "stop"
        if stopped or (is_complete is not None and is_complete(row))
        else "length"
        if len(row) == max_new_tokens
        else "context"
        for row, stopped in zip(ids, state.stopped.numpy(), strict=True)
    ]
    return GenerationResult(
        ids=ids,
        logprobs=logprobs,
        finish_reasons=reasons,
        top_logprobs=likeliest(state, rows, top_logprobs),
        timings=timings,
    )


def new_ids(state: State, rows: list[np.ndarray]) -> list[list[int]]:
    """Gives each row's ids behind its prompt."""
    return new_part(state.ids, state, rows)


def new_part(part: tf.Tensor, state: State, rows: list[np.ndarray]) -> list[list[Any]]:
    """Gives what a part of the state has behind each row's prompt."""
    ends = state.lengths.numpy()
    return [one[len(row) : end].tolist() for one, row, end in zip(part.numpy(), rows, ends, strict=True)]


def likeliest(state: State, rows: list[np.ndarray], n: int) -> list[list[list[tuple[int, float]]]]:
    """Gives the ``n`` likeliest ids at each new id's place, with their log-probabilities."""
    if n == 0:
        return [[] for _ in rows]
    parts = [new_part(part[..., :n], state, rows) for part in (state.top_ids, state.top_logprobs)]
    return [[list(zip(*place, strict=True)) for place in zip(*row, strict=True)] for row in zip(*parts, strict=True)]
