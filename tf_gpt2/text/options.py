"""What a user asks of text: the names of all options for editors and type checkers, and the check that text is text.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from tf_gpt2.generation.options import SamplingOptions, items_of


class CompletionOptions(SamplingOptions, total=False):
    """The options of ``TextGenerator.complete_many``, which defines them, but for ``num_samples``."""

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_at_end_of_text: bool
    top_logprobs: int
    overflow: str
    batch_size: int
    progress: bool
    jit_compile: bool
    prompt_lookup: bool


class BeamOptions(TypedDict, total=False):
    """The options of ``tf_gpt2.beam_search``, which defines them, but for ``stop_ids``."""

    num_beams: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: bool | str
    num_return_sequences: int
    suppress: Sequence[int]
    jit_compile: bool


def check_text(name: str, text: object) -> str:
    """Refuses what is no text.

    Raises:
        TypeError: when it is none; with how to make a text of bytes, and of a scalar of NumPy or TensorFlow.
    """
    if isinstance(text, str):
        return text
    raise TypeError(f"{name} must be a str, got {text!r}{remedy(text)}")


def check_several(name: str, texts: object) -> Iterable[Any]:
    """Refuses what does not hold several values; looks at none of them.

    Raises:
        TypeError: when it does not.
    """
    if isinstance(texts, Iterable) and not isinstance(texts, (str, bytes, Mapping)) and not is_scalar(texts):
        return texts
    raise TypeError(f"{name} must be str in a list or another iterable, got {texts!r}{remedy(texts)}")


def remedy(value: object) -> str:
    """Describes how to make a text of what holds one."""
    if isinstance(value, bytes):
        return "; decode it, as with .decode('utf-8')"
    if is_scalar(value):
        return "; take the text out of it: .item() of a NumPy array, .numpy().decode('utf-8') of a tensor"
    return ""


def is_scalar(value: object) -> bool:
    """Whether a value is an array or a tensor without axes, which cannot be iterated over."""
    return getattr(value, "ndim", None) == 0


def check_stops(stop: str | Sequence[str]) -> list[str]:
    """Returns stop strings as a list.

    Raises:
        TypeError: when they are not strings.
        ValueError: when one is empty.
    """
    stops = [stop] if isinstance(stop, str) else items_of(stop)
    if stops is None or not all(isinstance(one, str) for one in stops):
        raise TypeError(f"stop must be a str or a list of str, got {stop!r}")
    if "" in stops:
        raise ValueError(f"stop must have no empty string, got {stop!r}")
    return stops
