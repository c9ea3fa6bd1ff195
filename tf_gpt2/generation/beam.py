"""``beam_search``: lists of ids in, for each the likeliest continuations that a search of fixed width finds.

Checks what the user gives, runs the compiled loop, cuts out the sequences. Knows nothing of text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_gpt2.errors import ParamsError
from tf_gpt2.generation.beam_loop import Finished, Search, run
from tf_gpt2.generation.prompts import check_prompts, pad
from tf_gpt2.generation.run import NO_NUMBERS
from tf_gpt2.generation.settings import check_counts, make_limits
from tf_gpt2.model.gpt2 import GPT2Model

LARGEST_PENALTY = 10
"""Beyond it a power of the length may leave float32."""


@dataclasses.dataclass(frozen=True)
class BeamSearchResult:
    """What ``beam_search`` gives: per prompt a list, one entry per sequence, best first.

    Attributes:
        ids: the new ids only, without the stop id. Hugging Face's ``sequences`` also have the prompt before and, where
            the finish reason is ``"stop"``, the stop id and padding behind.
        scores: the sum of the log-probabilities of all new tokens, the stop id included, divided by their number to the
            power of ``length_penalty``; Hugging Face's ``sequences_scores``.
        finish_reasons: ``"length"`` after ``max_new_tokens``, ``"stop"`` at a stop id, ``"context"`` when the
            window was full.
    """

    ids: list[list[list[int]]]
    scores: list[list[float]]
    finish_reasons: list[list[str]]


def beam_search(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 40,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    jit_compile: bool = True,
) -> BeamSearchResult:
    """Continues each prompt in the likeliest ways that a search with ``num_beams`` beams finds.

    At each step all beams are extended by all tokens, and of these candidates the ``num_beams`` likeliest go on; those
    among the ``num_beams`` likeliest that end are remembered. Sequences and scores are Hugging Face's. A prompt's
    result does not depend on the other prompts. One beam is greedy search, if ``early_stopping`` is not ``"never"``.

    Args:
        model: the model.
        prompts: B lists of ids, of any lengths from 1 to ``n_ctx - 1``.
        num_beams: K, at least 1; another number compiles anew. Memory and time are those of B*K rows.
        max_new_tokens: most new tokens per sequence, at least 1.
        length_penalty: in [-10, 10]; scores are divided by the length to this power. As they are negative, more
            than 0 favours long sequences, less than 0 short ones; 0 leaves the sums as they are.
        early_stopping: when a prompt has enough, once ``num_beams`` sequences have ended. ``True``: at once. ``False``:
            when the likeliest beam, divided by its present length, is no better than the worst of them; it might become
            so if ``length_penalty`` is more than 0. ``"never"``: when it cannot become better, even if all
            tokens that are left were certain.
        num_return_sequences: how many to give per prompt, at most ``num_beams``; fewer come where there are no more, as
            with one new token and a vocabulary smaller than that.
        stop_ids: ids that end a sequence.
        jit_compile: whether XLA compiles the loop: the first call for a shape takes seconds, the others are fast.

    Raises:
        ContextLengthError: when a prompt leaves no room in the window.
        ParamsError: when the model's logits are not numbers.
        ValueError: when an argument is out of range, or a prompt is empty or has ids outside the vocabulary.
        TypeError: when prompts are not lists of integers.

    Source: ``GenerationMixin._beam_search`` of Hugging Face's transformers 5.

    Example:
        >>> from tf_gpt2.config import GPT2Config
        >>> config = GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> result = beam_search(GPT2Model(config), [[1, 2, 3], [4]], max_new_tokens=5, num_return_sequences=2)
        >>> [[len(ids) for ids in best] for best in result.ids]
        [[5, 5], [5, 5]]
        >>> all(first >= second for first, second in result.scores)
        True
    """
    rows = check_prompts(prompts, model.config)
    num_beams, max_new_tokens, num_return_sequences = check_counts(
        num_beams=num_beams, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences
    )
    if num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams={num_beams}, got {num_return_sequences}; "
            f"raise num_beams for more"
        )
    check_comparison(length_penalty, early_stopping)
    search = Search(
        limits=make_limits(rows, max_new_tokens, stop_ids, model.config),
        length_penalty=tf.constant(float(length_penalty)),
        ends_when_full=tf.constant(early_stopping is True),
        hopes_for_longest=tf.constant(early_stopping == "never" and length_penalty > 0),
    )
    state = run(model, *pad(rows, model.config), num_beams, search, jit_compile=jit_compile)
    return make_result(state.finished, rows, max_new_tokens, num_return_sequences)


def check_comparison(length_penalty: float, early_stopping: bool | str) -> None:
    """Refuses what beams cannot be compared by."""
    is_number = not isinstance(length_penalty, (bool, np.bool_)) and np.asarray(length_penalty).dtype.kind in "iuf"
    if not is_number or np.ndim(length_penalty) or not abs(length_penalty) <= LARGEST_PENALTY:
        raise ValueError(
            f"length_penalty must be a number in [-{LARGEST_PENALTY}, {LARGEST_PENALTY}] (0 compares sums), "
            f"got {length_penalty!r}"
        )
    if not isinstance(early_stopping, bool) and not (isinstance(early_stopping, str) and early_stopping == "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")


def make_result(
    finished: Finished, rows: list[np.ndarray], max_new_tokens: int, num_return_sequences: int
) -> BeamSearchResult:
    """Cuts each sequence's new part out of the loop's last state."""
    tensors = [part.numpy() for part in finished]
    result = BeamSearchResult([], [], [])
    for row, *of_prompt in zip(rows, *tensors, strict=True):
        best = [one for one in zip(*of_prompt, strict=True) if np.isfinite(one[2])][:num_return_sequences]
        if not best:  # one sequence there always is
            raise ParamsError(NO_NUMBERS)
        result.ids.append([ids[len(row) : end].tolist() for ids, end, _, _ in best])
        result.scores.append([float(score) for _, _, score, _ in best])
        result.finish_reasons.append(
            [
                "stop" if stopped else "length" if end - len(row) == max_new_tokens else "context"
                for _, end, _, stopped in best
            ]
        )
    return result
