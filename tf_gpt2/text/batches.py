"""Many texts -> their completions, batch by batch: in order, in memory that does not grow, with few shapes to compile.

Prompts are taken in windows of some batches, and within a window those of like length go together. Knows nothing of
files and commands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tf_gpt2.generation.generate import generate
from tf_gpt2.generation.lookup import check_lookup
from tf_gpt2.generation.options import (
    RULES,
    SamplingOptions,
    check_counts,
    check_overflow,
    check_prompt,
    check_top,
    make_limits,
    make_sampling,
)
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.text.options import check_several, check_stops, check_text
from tf_gpt2.text.pieces import Completion, has_stop, make_completions
from tf_gpt2.tokenizer.encoder import Encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

BATCHES_PER_WINDOW = 8
"""The more, the less padding, and the longer one waits for the first completion."""

BAR_AFTER_S = 1.0
"""What is done sooner needs no bar."""


class Prompt(NamedTuple):
    """One text to continue.

    Attributes:
        ids: int32 (T,).
        options: its own values of those options that have one per prompt.
    """

    ids: np.ndarray
    options: dict[str, Any]


def complete_many(
    model: GPT2Model,
    encoder: Encoder,
    prompts: Iterable[str],
    *,
    batch_size: int = 16,
    progress: bool = True,
    max_new_tokens: int = 40,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    num_samples: int | None = None,
    top_logprobs: int = 0,
    overflow: str = "error",
    jit_compile: bool = True,
    prompt_lookup: bool = False,
    **options: Unpack[SamplingOptions],
) -> Iterator[Completion] | Iterator[list[Completion]]:
    """Continues texts, and gives the completions in the order of the prompts.

    Prompts are read and computed only as completions are asked for, ``BATCHES_PER_WINDOW`` batches ahead. A list is
    checked as a whole first, and so are the options; what another iterable gives is checked as it comes, and the
    prompts before a wrong one are completed before its error is raised.

    Up to ``batch_size`` prompts make one batch of as many rows. More make batches of exactly ``batch_size`` rows, the
    last one filled up, so that only lengths differ: XLA then compiles at most once per bucket of prompts and once per
    bucket of caches, which are powers of two from 16 to ``n_ctx``: at most 14 times with OpenAI's models.

    Args:
        model: the model.
        encoder: its vocabulary.
        prompts: any number of str.
        batch_size: most texts at once; a prompt's samples are never parted.
        progress: whether a bar on standard error shows how far it is, if there is more than one batch.
        max_new_tokens: as for ``TextGenerator.complete``, like all that follows.
        stop: strings that end a text.
        stop_ids: ids that end a text.
        num_samples: how many texts per prompt.
        top_logprobs: how many of the likeliest ids to tell beside each new id.
        overflow: what to do with texts that are too long for the window.
        jit_compile: whether XLA compiles.
        prompt_lookup: whether to guess the next tokens from those before.
        **options: how to choose.

    Raises:
        ContextLengthError: when a prompt fills the window; like all errors about a prompt, this names its index.
        TypeError: when a prompt is not a str, or an option is unknown.
        ValueError: when an option is out of range, or there are no prompts.
    """
    check_several("prompts", prompts)
    stops, config = check_stops(stop), model.config
    batch_size, n_samples = check_counts(batch_size=batch_size, num_samples=1 if num_samples is None else num_samples)
    check_lookup(model, prompt_lookup=prompt_lookup, overflow=overflow, n_top=check_top(top_logprobs, config))
    batch_size = max(1, batch_size // n_samples)
    check_overflow(overflow)
    make_limits([], max_new_tokens, stop_ids, config)
    n_prompts = len(prompts) if isinstance(prompts, Sized) else None
    each = {name: values_of(value) for name, value in options.items() if name in RULES and has_values(value)}
    n_values = next(map(len, each.values()), 1)
    make_sampling(n_values if n_prompts is None else n_prompts, config, n_samples, **options)

    def read() -> Iterator[Prompt]:
        for i, (text, own) in enumerate(zip_options(prompts, each)):
            ids = encode_prompt(encoder, check_text(f"prompts[{i}]", text))
            yield Prompt(check_prompt(f"prompts[{i}]", ids, config, overflow=overflow), own)

    def complete(batch: Sequence[Prompt]) -> list[Completion] | list[list[Completion]]:
        own: Any = {name: [prompt.options[name] for prompt in batch] for name in each}
        result = generate(
            model,
            [prompt.ids for prompt in batch],  # type: ignore[misc]
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            is_complete=(lambda ids: has_stop(encoder, ids, stops)) if stops else None,
            num_samples=n_samples,
            top_logprobs=top_logprobs,
            overflow=overflow,
            jit_compile=jit_compile,
            prompt_lookup=prompt_lookup,
            **{**options, **own},
        )
        return make_completions(encoder, result, stops, None if num_samples is None else n_samples)

    read_prompts = iter(list(read())) if isinstance(prompts, Sequence) else read()
    return in_batches(read_prompts, complete, batch_size, n_prompts=n_prompts, progress=progress)


def check_texts(name: str, texts: Iterable[str]) -> list[str]:
    """Lists several texts."""
    return [check_text(f"{name}[{i}]", text) for i, text in enumerate(check_several(name, texts))]


def in_batches(
    prompts: Iterator[Prompt],
    complete: Callable[[Sequence[Prompt]], list[Any]],
    batch_size: int,
    *,
    n_prompts: int | None,
    progress: bool,
) -> Iterator[Any]:
    """Takes windows of prompts and yields their completions, in order; then raises the error that ended the prompts."""
    window, error = next_window(prompts, batch_size * BATCHES_PER_WINDOW)
    if not window and error is None:
        raise ValueError("prompts must be a non-empty list of str, got none")
    n_rows = min(len(window), batch_size)
    hidden = not progress or len(window) <= batch_size
    with tqdm(
        desc="Generating", unit=" prompts", total=n_prompts, delay=BAR_AFTER_S, leave=False, disable=hidden
    ) as bar:
        while window:
            done: dict[int, Any] = {}
            for places in places_by_length(window, batch_size):
                batch = [window[i] for i in places]
                filled = batch + batch[-1:] * (n_rows - len(batch))
                done.update(zip(places, complete(filled), strict=False))
                bar.update(len(batch))
            yield from (done.pop(i) for i in range(len(window)))
            if error is not None:
                break
            window, error = next_window(prompts, batch_size * BATCHES_PER_WINDOW)
    if error is not None:
        raise error


def next_window(prompts: Iterator[Prompt], n_prompts: int) -> tuple[list[Prompt], Exception | None]:
    """Reads up to so many prompts; returns them, and the error that kept it from reading more."""
    window: list[Prompt] = []
    try:
        for prompt in itertools.islice(prompts, n_prompts):
            window.append(prompt)  # one by one, to keep them when the next one raises
    except Exception as error:  # whatever the user's iterable raises
        return window, error
    return window, None


def places_by_length(window: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Gives the places of prompts of like length together, so that little is padded."""
    order = sorted(range(len(window)), key=lambda i: len(window[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def zip_options(prompts: Iterable[str], each: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gives each prompt with its own options.

    Raises:
        ValueError: when there are more or fewer prompts than values.
    """
    missing: Any = object()
    for i, (text, *own) in enumerate(itertools.zip_longest(prompts, *each.values(), fillvalue=missing)):
        if any(one is missing for one in (text, *own)):
            raise ValueError(f"{', '.join(each)} must have one value per prompt, and {i} are all that both have")
        yield text, dict(zip(each, own, strict=True))


def has_values(value: object) -> bool:
    """Says whether an option is a list or an array."""
    return len(getattr(value, "shape", ())) > 0 or (isinstance(value, Sequence) and not isinstance(value, str))


def values_of(values: Any) -> Sequence[Any]:
    """Lists an option's values, those of an array or a tensor as Python's numbers."""
    return np.asarray(values).tolist() if hasattr(values, "shape") else values


def encode_prompt(encoder: Encoder, text: str) -> list[int]:
    """Gives a prompt's ids, ``<|endoftext|>`` for an empty one."""
    ids = encoder.encode(text)
    if not ids and encoder.end_of_text is None:
        raise ValueError("prompts must not be empty: this vocabulary has no <|endoftext|> to start from")
    return ids or [encoder.end_of_text]  # type: ignore[list-item]
