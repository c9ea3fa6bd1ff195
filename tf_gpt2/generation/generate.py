"""``generate`` and ``stream``: lists of ids in, lists of new ids out, at the end or as they come.

Checks what the user asks, and runs the compiled loop. Knows nothing of text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tf_gpt2.generation.lookup import LookupRun, is_large_enough
from tf_gpt2.generation.options import (
    SLIDE,
    Request,
    SamplingOptions,
    check_counts,
    check_names,
    check_prompts,
    fit_rows,
    make_request,
    pad,
    top_to_keep,
)
from tf_gpt2.generation.run import GenerationResult, Run, SlidingRun, Timings, compile_run, make_result, new_ids
from tf_gpt2.model.gpt2 import GPT2Model

if TYPE_CHECKING:
    from typing_extensions import Unpack


CHUNK = 16
"""Steps between two looks at whether texts are complete. Each call of the compiled loop copies the cache once."""

PIECE_S = 0.1
"""Seconds from one piece of a stream to the next, if steps do not take longer: to a reader it flows."""


def generate(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
    stop_ids: Sequence[int] = (),
    is_complete: Callable[[list[int]], bool] | None = None,
    num_samples: int = 1,
    top_logprobs: int = 0,
    overflow: str = "error",
    jit_compile: bool = True,
    prompt_lookup: bool = False,
    **options: Unpack[SamplingOptions],
) -> GenerationResult:
    """Continues each prompt, all in one batch; ``TextGenerator.generate`` takes many prompts batch by batch.

    A row's result does not depend on the other rows. Two equal prompts with one seed get one text: for different
    samples of a prompt ask for ``num_samples``, or give each row a seed of its own.

    Args:
        model: the model.
        prompts: B lists of ids, of any lengths from 1 to ``n_ctx - 1``; see ``overflow`` for longer ones.
        max_new_tokens: most new tokens per row, at least 0.
        stop_ids: ids that end a row.
        is_complete: returns for a row's new ids whether the row may end. It is called each ``CHUNK`` steps, so a row
            may get some more ids than it needs.
        num_samples: how many texts per prompt, which is read only once. The result has the samples of the first
            prompt, those of the second, and so on. A prompt's samples have its options, but its seed, the next seed,
            and so on: each is what a call with that seed returns.
        top_logprobs: how many of the likeliest ids to return beside each new id, at most ``n_vocab``. Up to 8 compile
            once, up to 16 once more, and so on.
        overflow: what to do with a row that is too long for the window. ``"error"`` refuses a prompt that leaves no
            room, and ends a row when the window is full. ``"truncate"`` keeps so much of the prompt's end, at least one
            token, that there is room for ``max_new_tokens``. ``"slide"`` never ends a row for want of room: when the
            window is full, its second half is read again, and the row goes on; that costs one prefill of n_ctx/2 per
            n_ctx/2 new tokens, and at most three more compilations. Penalties and bans then look at what is in the
            window, ``min_new_tokens`` and random numbers at the whole text.
        jit_compile: whether XLA compiles the loop: the first call for a shape takes seconds, the others are fast.
        prompt_lookup: guess the next tokens from what the text has said before, and check several at once: faster where
            a text quotes its prompt or repeats itself, with the same ids; for float32, and with native kernels
            for int8 and int4; neither with ``top_logprobs`` nor with a window that slides. See ``lookup``.
        **options: how to choose, for all prompts or one value per prompt: ``temperature``, ``top_k``, ``top_p``,
            ``min_p``, ``typical_p``, ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``, ``seed``,
            ``no_repeat_ngram_size``, ``min_new_tokens``; for all ``logit_bias``, ``bad_words_ids``, ``suppress``.
            ``tf_gpt2.generation.options.SamplingOptions`` defines them. Without any the likeliest token is taken.

    Raises:
        ContextLengthError: when a prompt leaves no room in the window.
        ParamsError: when the model's logits are not numbers.
        ValueError: when an argument is out of range, or a prompt is empty or has ids outside the vocabulary.
        TypeError: when prompts are not lists of integers, or an option is unknown.

    Example:
        >>> from tf_gpt2.config import GPT2Config
        >>> config = GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> result = generate(GPT2Model(config), [[1, 2, 3], [4]], max_new_tokens=5)
        >>> [len(ids) for ids in result.ids], result.finish_reasons
        ([5, 5], ['length', 'length'])
    """
    check_names(options, generate)
    rows = check_prompts(prompts, model.config, overflow=overflow)
    request = make_request(
        model,
        len(rows),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        num_samples=num_samples,
        top_logprobs=top_logprobs,
        overflow=overflow,
        prompt_lookup=prompt_lookup,
        jit_compile=jit_compile,
        **options,
    )
    return continue_rows(model, rows, request, is_complete)


def continue_rows(
    model: GPT2Model,
    prompts: list[np.ndarray],
    request: Request,
    is_complete: Callable[[list[int]], bool] | None = None,
) -> GenerationResult:
    """Continues prompts that are checked, all in one batch.

    Args:
        model: the model.
        prompts: each int32 (T,).
        request: what is asked of them.
        is_complete: as for ``generate``.
    """
    prompts, n_unseen = fit_rows(prompts, request, model.config)
    rows = [prompt for prompt in prompts for _ in range(request.num_samples)]
    start_s = time.perf_counter()
    run = start_run(model, prompts, request)
    read_s = time.perf_counter()
    while run.goes_on:
        run.advance(model.config.n_ctx if is_complete is None else CHUNK)
        if is_complete is not None:
            run.end([is_complete(ids) for ids in new_ids(run.state, rows)])
    timings = Timings(prefill_s=read_s - start_s, decode_s=time.perf_counter() - read_s)
    return make_result(run.state, rows, n_unseen, request, is_complete, timings)


def stream(
    model: GPT2Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 40,
    stop_ids: Sequence[int] = (),
    overflow: str = "error",
    jit_compile: bool = True,
    prompt_lookup: bool = False,
    **options: Unpack[SamplingOptions],
) -> Iterator[list[int]]:
    """Continues one prompt, and yields new ids as they come: the first at once, later ones several at a time.

    Together they are what ``generate`` returns. Nothing is computed while nobody asks for more.

    Args:
        model: the model.
        prompt: ids.
        max_new_tokens: as for ``generate``, like all that follows.
        stop_ids: ids that end the text.
        overflow: what to do when it is too long for the window.
        jit_compile: whether XLA compiles.
        prompt_lookup: whether to guess the next tokens from those before.
        **options: how to choose.

    Raises:
        ContextLengthError: as ``generate``, and at once, like the other errors.
        ValueError: as ``generate``.
        TypeError: as ``generate``.
    """
    check_names(options, stream)
    (row,) = check_prompts([prompt], model.config, overflow=overflow)
    request = make_request(
        model,
        1,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        overflow=overflow,
        prompt_lookup=prompt_lookup,
        jit_compile=jit_compile,
        **options,
    )
    return stream_row(model, row, request)


def stream_row(model: GPT2Model, prompt: np.ndarray, request: Request) -> Iterator[list[int]]:
    """Continues one prompt that is checked, int32 (T,); yields new ids as they come."""
    rows, _ = fit_rows([prompt], request, model.config)
    yield from in_pieces(start_run(model, rows, request), len(rows[0]))


def start_run(model: GPT2Model, prompts: list[np.ndarray], request: Request) -> Run | SlidingRun:
    """Reads the prompts; returns what goes on from there, past the window where ``overflow`` asks for it."""
    if request.overflow == SLIDE:
        return SlidingRun(model, prompts, request)
    run = LookupRun if request.prompt_lookup and is_large_enough(model) else Run
    rows = [prompt for prompt in prompts for _ in range(request.num_samples)]
    return run(
        model,
        *pad(prompts, model.config),
        request.sampling_of(len(prompts)),
        request.limits_of(rows, model.config),
        n_top=top_to_keep(request.top_logprobs, model.config),
        jit_compile=request.jit_compile,
    )


def in_pieces(run: Run | SlidingRun, n_known: int) -> Iterator[list[int]]:
    """Yields the ids behind the first ``n_known`` of one row as they come: the first alone, then more at a time."""
    n_steps = 1
    while True:
        ids = run.state.ids.numpy()[0, n_known : length_of(run)].tolist()
        if ids:
            yield ids
        n_known += len(ids)
        if not run.goes_on:
            return
        start_s = time.perf_counter()
        run.advance(n_steps)
        tokens_per_s = (length_of(run) - n_known) / (time.perf_counter() - start_s)
        n_steps = max(1, int(tokens_per_s * PIECE_S))


def length_of(run: Run | SlidingRun) -> int:
    """Returns the number of tokens of the first row; by way of NumPy, as slicing a tensor takes longer."""
    return int(run.state.lengths.numpy()[0])


def warm_up(
    model: GPT2Model, *, prompt_length: int = 1, max_new_tokens: int = 40, n_prompts: int = 1, jit_compile: bool = True
) -> None:
    """Compiles what a call of ``generate`` of that size needs, so that the call itself is fast.

    Args:
        model: the model.
        prompt_length: tokens of the longest prompt, at least 1.
        max_new_tokens: as for the call.
        n_prompts: B, at least 1; another number compiles anew.
        jit_compile: as for the call.

    Raises:
        ContextLengthError: when the prompt leaves no room in the window.
        ValueError: when a number is out of range.
    """
    prompt_length, n_prompts = check_counts(prompt_length=prompt_length, n_prompts=n_prompts)
    rows = check_prompts([[0] * prompt_length] * n_prompts, model.config)
    request = make_request(model, n_prompts, max_new_tokens=max_new_tokens, jit_compile=jit_compile)
    sampling, limits = request.sampling_of(n_prompts), request.limits_of(rows, model.config)
    compile_run(model, *pad(rows, model.config), sampling, limits, jit_compile=jit_compile)
