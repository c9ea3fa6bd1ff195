"""New ids -> new text: whole, or piece by piece, up to a stop string.

A piece is given as soon as it is certain: no half characters, nothing that a stop string takes back. Knows nothing of
models.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence

from tf_gpt2.generation.run import GenerationResult, Timings
from tf_gpt2.tokenizer.encoder import Encoder

UNKNOWN = sys.maxsize
"""Where the text of an id ends that ends inside a character."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text's continuation.

    Attributes:
        text: the new text, without the stop string.
        ids: the new ids, the one included that completed a stop string.
        logprobs: natural logarithms of their probabilities under the unmodified model.
        finish_reason: ``"length"``, ``"stop"`` at a stop string or ``<|endoftext|>``, or ``"context"``.
        top_logprobs: for each new id ``(id, logprob)`` pairs of the likeliest ids under the unmodified model, the
            likeliest first; empty where none were asked for. ``encoder.decode([id])`` is an id's text.
        timings: durations of the whole batch. Not compared.
        n_truncated: how many tokens at the prompt's beginning the model did not see.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[list[tuple[int, float]]]
    timings: Timings = dataclasses.field(compare=False)
    n_truncated: int = 0


def make_completions(
    encoder: Encoder, result: GenerationResult, stops: Sequence[str], num_samples: int
) -> list[list[Completion]]:
    """Makes the texts of each prompt, as many as it has samples."""
    rows = [make_completion(encoder, result, row, stops) for row in range(len(result.ids))]
    return [rows[start : start + num_samples] for start in range(0, len(rows), num_samples)]


def texts_of(completions: Completion | list[Completion]) -> str | list[str]:
    """Returns the text of a prompt's completion, or those of its samples."""
    return completions.text if isinstance(completions, Completion) else [one.text for one in completions]


def make_completion(encoder: Encoder, result: GenerationResult, row: int, stops: Sequence[str]) -> Completion:
    """Makes one row's text, which ends at a stop string; the result knows already why it ends."""
    pieces = TextPieces(encoder, stops)
    text = pieces.take(result.ids[row]) + pieces.close()
    return Completion(
        text=text,
        ids=result.ids[row][: pieces.n_ids],
        logprobs=result.logprobs[row][: pieces.n_ids],
        finish_reason=result.finish_reasons[row],
        top_logprobs=result.top_logprobs[row][: pieces.n_ids],
        timings=result.timings,
        n_truncated=result.n_truncated[row],
    )


def has_stop(encoder: Encoder, ids: Iterable[int], stops: Sequence[str]) -> bool:
    """Whether a stop string is in the text of some ids."""
    pieces = TextPieces(encoder, stops)
    pieces.take(ids)
    return pieces.is_stopped


class TextPieces:
    """The text of ids that come one after the other, up to the first stop string.

    The string that is complete first counts, of several at once the one that begins first. So the text does not depend
    on how many ids come at a time.

    Args:
        encoder: the vocabulary.
        stops: strings that end the text and are not part of it.

    Attributes:
        is_stopped: whether a stop string was found; then nothing follows.
        n_ids: how many ids were taken, the one included that completes the stop string.

    Example:
        >>> from tf_gpt2.checkpoint.download import embedded_dir
        >>> encoder = Encoder.from_files(embedded_dir())
        >>> pieces = TextPieces(encoder, ["be,"])
        >>> pieces.take(encoder.encode("To be")), pieces.take(encoder.encode(", or")), pieces.is_stopped
        ('To ', '', True)
    """

    def __init__(self, encoder: Encoder, stops: Sequence[str] = ()):
        self.is_stopped = False
        self.n_ids = 0
        self._encoder = encoder
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(encoder.errors)
        self._held = ""
        self._given = ""
        self._ends: list[int] = []

    def take(self, ids: Iterable[int]) -> str:
        """Returns the text that is certain now and was not before; ids behind a stop string are left alone."""
        text = ""
        for token_id in ids:
            if self.is_stopped:
                break
            self.n_ids += 1
            decoded = self._decoder.decode(self._encoder.decode_bytes([token_id]))
            text += self._certain(decoded)
            is_whole = not self._decoder.getstate()[0]  # no half character waits for more bytes
            self._ends.append(len(self._given) + len(self._held) if is_whole else UNKNOWN)
        return text

    def close(self) -> str:
        """Returns what was held back, when no more ids come."""
        if self.is_stopped:
            return ""
        text = self._certain(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        self._given += held
        return text + held

    def given(self) -> tuple[int, str]:
        """Returns how many ids have given all their text, and the text that was given of those behind them."""
        n_ids, n_chars = 0, 0
        for i, end in enumerate(self._ends):
            if end <= len(self._given):
                n_ids, n_chars = i + 1, end
        return n_ids, self._given[n_chars:]

    def texts(self, chunks: Iterable[Iterable[int]]) -> Iterator[str]:
        """Yields the pieces of text, none of them empty, of ids that come several at a time."""
        for ids in chunks:
            if text := self.take(ids):
                yield text
            if self.is_stopped:
                return
        if text := self.close():
            yield text

    def _certain(self, text: str) -> str:
        self._held += text
        end = find_stop(self._held, self._stops)
        if end is not None:
            self.is_stopped = True
        else:
            end = len(self._held) - held_back(self._held, self._stops)
        certain, self._held = self._held[:end], "" if self.is_stopped else self._held[end:]
        self._given += certain
        return certain


def find_stop(text: str, stops: Iterable[str]) -> int | None:
    """Finds where the stop string begins that is complete first, of several at once the longest; ``None`` for none."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def held_back(text: str, stops: Iterable[str]) -> int:
    """Returns the length of the longest end of a text that a stop string could begin with."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
