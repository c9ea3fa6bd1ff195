"""Prompts as the user gives them -> checked rows, cut to the window if asked, padded into buckets.

Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.loop import bucket
from tf_gpt2.generation.options import check_row, items_of

OVERFLOWS = ERROR, TRUNCATE, SLIDE = "error", "truncate", "slide"
"""What to do with a text that is too long for the window; ``generate`` says what each means."""


def fit_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, overflow: str, config: GPT2Config
) -> tuple[list[np.ndarray], list[int]]:
    """Checks the prompts; gives them as arrays, and how many tokens at the beginning of each the model will not see.

    With ``"truncate"`` these are cut off. With ``"slide"`` the rows stay whole: the window moves over them.
    """
    check_overflow(overflow)
    rows = check_prompts(prompts, config, overflow=overflow)
    if overflow == SLIDE:
        return rows, [window_start(len(row), config.n_ctx) for row in rows]
    n_kept = max(1, config.n_ctx - max(1, max_new_tokens)) if overflow == TRUNCATE else config.n_ctx
    return [row[-n_kept:] for row in rows], [max(0, len(row) - n_kept) for row in rows]


def window_start(length: int, n_ctx: int) -> int:
    """Says where the window begins from which the token behind a text of ``length`` is chosen.

    It moves on by half as soon as it is full, and so depends on the text's length alone, not on what was read when.
    """
    stride = n_ctx - n_ctx // 2
    return 0 if length < n_ctx else stride * ((length - n_ctx) // stride + 1)


def check_prompts(prompts: Sequence[Sequence[int]], config: GPT2Config, *, overflow: str = ERROR) -> list[np.ndarray]:
    """Checks the prompts and gives them as arrays; longer ones than the window only where ``overflow`` has a use."""
    listed = items_of(prompts) if hasattr(prompts, "__len__") else None
    if not listed:
        raise ValueError(f"prompts must be a non-empty list of lists of ids, got {prompts!r}")
    return [check_prompt(f"prompts[{i}]", prompt, config, overflow=overflow) for i, prompt in enumerate(listed)]


def check_prompt(name: str, prompt: Sequence[int], config: GPT2Config, *, overflow: str) -> np.ndarray:
    """Checks one prompt and gives it as int32 (T,)."""
    row = check_row(name, prompt, config)
    if row.size == 0:
        raise ValueError(f"{name} is empty; start from the id of <|endoftext|> for text from nothing")
    if row.size >= config.n_ctx and (overflow == ERROR or config.n_ctx == 1):
        raise ContextLengthError(
            f"{name} has {row.size} tokens, which leaves no room in the window of n_ctx={config.n_ctx}; "
            f"cut it to {config.n_ctx - 1} or fewer, or let generate do so with overflow='truncate' or 'slide'"
        )
    return row


def check_overflow(overflow: str) -> None:
    """Refuses what is none of ``OVERFLOWS``."""
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)}, got {overflow!r}")


def pad(rows: list[np.ndarray], config: GPT2Config) -> tuple[tf.Tensor, tf.Tensor]:
    """Gives ragged rows as int32 (B, T), T a bucket, and their lengths, (B,)."""
    longest = max(map(len, rows))
    return tf.constant(pad_rows(rows, bucket(longest, config.n_ctx))), tf.constant([len(row) for row in rows], tf.int32)


def pad_rows(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Puts ragged rows, each (T, …), into (B, T, …), zeros behind; there is no padding token, lengths tell."""
    padded = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for wide, row in zip(padded, rows, strict=True):
        wide[: len(row)] = row
    return padded
