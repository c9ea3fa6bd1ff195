"""How likely are these ids? Log-probabilities of rows of any lengths, and of a text longer than the window.

Hidden states are computed in pieces of at most ``POSITIONS_PER_PIECE`` positions, logits in pieces of at most
``TARGETS_PER_PIECE``: those of a whole window would take 206 MB with OpenAI's vocabulary. All shapes are powers of two,
so the number of compilations is bounded. Knows nothing of text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.loop import bucket
from tf_gpt2.generation.options import check_row, check_stride, items_of, pad_rows, power_of_two
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

POSITIONS_PER_PIECE = 1024
"""B * T of one call, unless one row is longer: the attention matrices of 124M take 50 MB then."""

TARGETS_PER_PIECE = 256
"""Logits computed at once: 51 MB with OpenAI's vocabulary."""

Progress = Callable[[int, int], None]
"""Is told how many tokens have been scored, of how many."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds one sequence.

    Attributes:
        ids: the tokens.
        logprobs: for each, the natural logarithm of its probability given those before it; NaN for a first token that
            was not scored.
        total: the sum of those that were.
    """

    ids: list[int]
    logprobs: list[float]
    total: float


class Window(NamedTuple):
    """A part of a long text, of which the last tokens are scored and the others are context.

    Attributes:
        start: index of its first token.
        end: index after its last.
        n_targets: how many tokens at its end are scored.
    """

    start: int
    end: int
    n_targets: int


def score(
    model: GPT2Model,
    rows: Sequence[Sequence[int]],
    *,
    start_id: int | None = None,
    jit_compile: bool = True,
) -> list[Score]:
    """Scores each row of ids; a row's result does not depend on the other rows.

    Args:
        model: the model.
        rows: B lists of ids, each of up to ``n_ctx``.
        start_id: what a row's first token is scored after. With ``None`` it is context only and its logprob NaN.
        jit_compile: whether XLA compiles: the first call for a shape takes seconds, the others are fast.

    Raises:
        ContextLengthError: when a row is longer than the window.
        TypeError: when rows are not lists of integers.
        ValueError: when ids lie outside the vocabulary.

    Example:
        >>> from tf_gpt2.config import GPT2Config
        >>> config = GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> [len(one.logprobs) for one in score(GPT2Model(config), [[1, 2, 3], [4]], start_id=0)]
        [3, 1]
    """
    listed = items_of(rows)
    if listed is None:
        raise TypeError(f"rows must be a list of lists of ids, got {rows!r}")
    arrays = [check_row(f"rows[{i}]", row, model.config) for i, row in enumerate(listed)]
    for i, array in enumerate(arrays):
        check_window(f"sequence {i}", array, model.config)
    start = check_row("start_id", [] if start_id is None else [start_id], model.config)
    known = [np.concatenate([start, array]) for array in arrays]
    targets = [max(0, len(row) - 1) for row in known]
    scored = target_logprobs(model, known, targets, jit_compile=jit_compile)
    return [make_score(array, logprobs) for array, logprobs in zip(arrays, scored, strict=True)]


def check_window(name: str, row: np.ndarray, config: GPT2Config) -> None:
    """Raises ContextLengthError when a row does not fit into the window."""
    if len(row) > config.n_ctx:
        raise ContextLengthError(
            f"{name} has {len(row)} tokens, the window is n_ctx={config.n_ctx}; "
            f"cut it, or slide a window over it as perplexity does"
        )


def make_score(ids: np.ndarray, logprobs: np.ndarray) -> Score:
    """Puts NaN before the log-probabilities where the first id has none."""
    unscored = [math.nan] * (len(ids) - len(logprobs))
    return Score(ids=ids.tolist(), logprobs=unscored + logprobs.tolist(), total=math.fsum(logprobs))


def sliding_logprobs(
    model: GPT2Model, ids: Sequence[int], *, stride: int, jit_compile: bool = True, on_progress: Progress | None = None
) -> np.ndarray:
    """Scores a sequence of any length with a sliding window.

    Args:
        model: the model.
        ids: T of them, at least 2.
        stride: as for ``windows``.
        jit_compile: as for ``score``.
        on_progress: called from time to time.

    Returns:
        float64, of each token that ``windows`` scores.

    Raises:
        TypeError: when ids are not integers.
        ValueError: when there are fewer than two ids, some lie outside the vocabulary, or the stride is out of range.
    """
    stride = check_stride(stride, model.config)
    array = check_sliding("ids", ids, model.config)
    (logprobs,) = sliding_logprobs_of(model, [array], [stride], jit_compile=jit_compile, on_progress=on_progress)
    return logprobs


def check_sliding(name: str, ids: Sequence[int], config: GPT2Config) -> np.ndarray:
    """Checks a sequence of any length that a window slides over; returns int32 (T,), of at least 2 tokens."""
    array = check_row(name, ids, config)
    if len(array) < 2:
        raise ValueError(f"a text must have at least 2 tokens, got {len(array)}: the first is not scored, only context")
    return array


def sliding_logprobs_of(
    model: GPT2Model,
    arrays: Sequence[np.ndarray],
    strides: Sequence[int],
    *,
    jit_compile: bool = True,
    on_progress: Progress | None = None,
) -> list[np.ndarray]:
    """Scores several sequences with a sliding window, the windows of all together in pieces of like length.

    Args:
        model: the model.
        arrays: each int32 (T,), checked.
        strides: of each, checked.
        jit_compile: as for ``score``.
        on_progress: called from time to time.

    Returns:
        For each float64, of each token that ``windows`` scores.
    """
    spans = [list(windows(len(ids), model.config.n_ctx, n)) for ids, n in zip(arrays, strides, strict=True)]
    rows = [ids[span.start : span.end] for ids, of_text in zip(arrays, spans, strict=True) for span in of_text]
    n_targets = [span.n_targets for of_text in spans for span in of_text]
    scored = iter(target_logprobs(model, rows, n_targets, jit_compile=jit_compile, on_progress=on_progress))
    return [np.concatenate([next(scored) for _ in of_text]).astype(np.float64) for of_text in spans]


def windows(n_tokens: int, n_ctx: int, stride: int) -> Iterator[Window]:
    """Yields windows of ``n_ctx`` tokens, each ``stride`` further on, the last shorter.

    Each scores what the one before did not reach; the rest of it is context. The first token of a window is never
    scored: it is the first of the text, or scored before, or, if ``stride`` is ``n_ctx``, lost.

    Source: Hugging Face, "Perplexity of fixed-length models".
    """
    scored_to = 0
    for start in range(0, n_tokens, stride):
        end = min(start + n_ctx, n_tokens)
        yield Window(start, end, min(end - scored_to, end - start - 1))
        scored_to = end
        if end == n_tokens:
            return


def target_logprobs(
    model: GPT2Model,
    rows: Sequence[np.ndarray],
    n_targets: Sequence[int],
    *,
    jit_compile: bool = True,
    on_progress: Progress | None = None,
) -> list[np.ndarray]:
    """Scores the last ids of each row, given all before them.

    Args:
        model: the model.
        rows: int32, each of up to ``n_ctx + 1`` valid ids.
        n_targets: how many at each row's end; at most all but one.
        jit_compile: as for ``score``.
        on_progress: called after each piece.

    Returns:
        Per row float32, (n_targets,).
    """
    scorer = Scorer(model, jit_compile=jit_compile)
    logprobs = [np.zeros(0, np.float32) for _ in rows]
    n_done = 0
    for piece in pieces([len(row) - 1 if n else 0 for row, n in zip(rows, n_targets, strict=True)], model.config.n_ctx):
        scored = scorer.score_piece([rows[i] for i in piece], [n_targets[i] for i in piece])
        for i, one in zip(piece, scored, strict=True):
            logprobs[i] = one
            n_done += len(one)
        if on_progress is not None:
            on_progress(n_done, sum(n_targets))
    return logprobs


def pieces(lengths: Sequence[int], n_ctx: int) -> Iterator[list[int]]:
    """Groups rows of one bucket, in the order of their lengths: yields indices; leaves out rows of length 0."""
    piece: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: lengths[i]):
        size = bucket(lengths[i], n_ctx)
        is_full = power_of_two(len(piece) + 1, 1) * size > POSITIONS_PER_PIECE
        if piece and (is_full or size != bucket(lengths[piece[0]], n_ctx)):
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


class Scorer:
    """Two compiled functions of a model: ids to hidden states, and hidden states to log-probabilities.

    Args:
        model: the model.
        jit_compile: whether XLA compiles them.
    """

    def __init__(self, model: GPT2Model, *, jit_compile: bool):
        self.n_ctx = model.config.n_ctx
        self.hidden_states = compiled(hidden_rows, model, jit_compile=jit_compile)
        self.logprobs = compiled(chosen_logprobs, model, jit_compile=jit_compile)

    def score_piece(self, rows: list[np.ndarray], n_targets: list[int]) -> list[np.ndarray]:
        """Scores the last ids of rows that share a bucket."""
        n_rows, n_positions = power_of_two(len(rows), 1), bucket(max(map(len, rows)) - 1, self.n_ctx)
        ids = np.zeros((n_rows, n_positions), np.int32)  # (B, T)
        ids[: len(rows)] = pad_rows([row[:-1] for row in rows], n_positions)
        hidden = self.hidden_states(tf.constant(ids))  # (B*T, C)
        # the position before a target predicts it
        places = [
            b * n_positions + np.arange(len(row) - 1 - n, len(row) - 1)
            for b, (row, n) in enumerate(zip(rows, n_targets, strict=True))
        ]
        targets = np.concatenate([row[len(row) - n :] for row, n in zip(rows, n_targets, strict=True)])
        logprobs = self.score_places(hidden, np.concatenate(places), targets)
        return np.split(logprobs, np.cumsum(n_targets)[:-1])

    def score_places(self, hidden: tf.Tensor, places: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Takes the logits at some rows of ``hidden``, a few at a time, and gives each target's log-probability."""
        logprobs = []
        for start in range(0, len(places), TARGETS_PER_PIECE):
            part = slice(start, start + TARGETS_PER_PIECE)
            n = len(places[part])
            padding = (0, bucket(n, TARGETS_PER_PIECE) - n)
            picked = tf.gather(hidden, np.pad(places[part], padding))  # (P, C)
            chosen = self.logprobs(picked, tf.constant(np.pad(targets[part], padding)))  # (P,)
            logprobs.append(chosen[:n].numpy())
        return np.concatenate(logprobs)


def hidden_rows(network: Network, ids: tf.Tensor) -> tf.Tensor:
    """Runs the blocks: int32 (B, T) -> floats (B*T, C). Attention looks back only, so padding behind is not seen."""
    return tf.reshape(network.hidden_states(ids)[0], (-1, network.config.n_embd))


def chosen_logprobs(network: Network, hidden: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Computes the log-probability of one id per row: floats (P, C), int32 (P,) -> float32 (P,)."""
    logits = network.logits(hidden)  # (P, V)
    return tf.gather(logits, targets, batch_dims=1) - tf.reduce_logsumexp(logits, axis=-1)
