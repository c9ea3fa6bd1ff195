"""Many texts -> their completions, batch by batch: in order, in memory that does not grow, with few shapes to compile.

Prompts are taken in windows of some batches, and within a window those of like length go together. Knows nothing of
files and commands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tf_gpt2.generation.generate import continue_rows
from tf_gpt2.generation.options import Request, SamplingValues, check_prompt
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.text.options import check_several, check_text
from tf_gpt2.text.pieces import Completion, has_stop, make_completions
from tf_gpt2.tokenizer.encoder import Encoder

BATCHES_PER_WINDOW = 8
"""The more, the less padding, and the longer one waits for the first completion."""

BAR_AFTER_S = 1.0
"""What is done sooner needs no bar."""


class Prompt(NamedTuple):
    """One text to continue.

    Attributes:
        place: which of all prompts it is, from 0.
        ids: int32 (T,).
    """

    place: int
    ids: np.ndarray


def complete_many(
    model: GPT2Model,
    encoder: Encoder,
    prompts: Iterable[str],
    request: Request,
    *,
    stops: Sequence[str],
    batch_size: int,
    progress: bool,
) -> Iterator[list[Completion]]:
    """Continues texts; yields each prompt's samples, in the order of the prompts.

    Prompts are read and computed only as completions are asked for, ``BATCHES_PER_WINDOW`` batches ahead. A list is
    checked as a whole first; what another iterable yields is checked as it comes, and the prompts before a wrong one
    are completed before its error is raised.

    Up to ``batch_size`` prompts make one batch of as many rows. More make batches of exactly ``batch_size`` rows, the
    last one filled up, so that only lengths differ: XLA then compiles at most once per bucket of prompts and once per
    bucket of caches, which are powers of two from 16 to ``n_ctx``: at most 14 times with OpenAI's models.

    Args:
        model: the model.
        encoder: its vocabulary.
        prompts: any number of str.
        request: what is asked of them.
        stops: strings that end a text.
        batch_size: most texts at once; a prompt's samples are never parted.
        progress: whether a bar on standard error shows how far it is, if there is more than one batch.

    Raises:
        ContextLengthError: when a prompt fills the window; like all errors about a prompt, this names its index.
        TypeError: when a prompt is not a str.
        ValueError: when there are no prompts, or not one for each value of the request.
    """
    is_complete = (lambda ids: has_stop(encoder, ids, stops)) if stops else None

    def read() -> Iterator[Prompt]:
        for place, text in number_prompts(prompts, request.sampling):
            name = f"prompts[{place}]"
            ids = encode_prompt(encoder, check_text(name, text))
            yield Prompt(place, check_prompt(name, ids, model.config, overflow=request.overflow))

    def complete(batch: Sequence[Prompt]) -> list[list[Completion]]:
        of_batch = request.of_prompts([prompt.place for prompt in batch])
        result = continue_rows(model, [prompt.ids for prompt in batch], of_batch, is_complete)
        return make_completions(encoder, result, stops, request.num_samples)

    read_prompts = iter(list(read())) if isinstance(prompts, Sequence) else read()
    n_prompts = len(prompts) if isinstance(prompts, Sized) else None
    batch_size = max(1, batch_size // request.num_samples)
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
    """Yields the places of prompts of like length together, so that little is padded."""
    order = sorted(range(len(window)), key=lambda i: len(window[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def number_prompts(prompts: Iterable[str], sampling: SamplingValues) -> Iterator[tuple[int, str]]:
    """Yields each prompt with its place.

    Raises:
        ValueError: when there are more or fewer prompts than values of an option.
    """
    n_values, n_prompts = sampling.n_values, 0
    for place, text in enumerate(prompts):
        if place == n_values:
            break
        yield place, text
        n_prompts = place + 1
    else:
        if n_values is None or n_prompts == n_values:
            return
    raise ValueError(
        f"{', '.join(sampling.names)} must have one value per prompt, and {n_prompts} are all that both have"
    )


def encode_prompt(encoder: Encoder, text: str) -> list[int]:
    """Returns a prompt's ids, ``<|endoftext|>`` for an empty one."""
    ids = encoder.encode(text)
    if not ids and encoder.end_of_text is None:
        raise ValueError("prompts must not be empty: this vocabulary has no <|endoftext|> to start from")
    return ids or [encoder.end_of_text]  # type: ignore[list-item]
