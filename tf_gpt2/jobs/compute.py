"""Checks a job's records against a model, and computes batches of them: one class per job.

Each prepares a record, or raises what is wrong with it; and computes prepared records together, so that a record's
result does not depend on its neighbours. Knows nothing of files and engines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.embedding import embed
from tf_gpt2.generation.generate import continue_rows
from tf_gpt2.generation.options import (
    ERROR,
    RULES,
    SLIDE,
    check_max_new_tokens,
    check_prompt,
    check_row,
    check_stride,
    check_values,
    fit_rows,
    make_request,
)
from tf_gpt2.generation.run import GenerationResult
from tf_gpt2.generation.scoring import check_sliding, check_window, score, sliding_logprobs_of
from tf_gpt2.jobs.kinds import PER_RECORD_SAMPLING, Embed, Generate, Job, Perplexity, Score
from tf_gpt2.jobs.records import INVALID_OPTION, TOO_LONG, TOO_SHORT, Record, RecordError, seed_of
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.text.options import check_stops
from tf_gpt2.text.perplexity import default_stride, make_perplexity
from tf_gpt2.text.pieces import TextPieces, has_stop

READ_AT_ONCE = 128
"""Texts that are scored or embedded at once; ``scoring.pieces`` cuts them into calls of at most 1024 positions."""


class Prepared(NamedTuple):
    """A record that can be computed.

    Attributes:
        ids: int32 (T,).
        options: by name, its own or the job's.
        text: as it was.
    """

    ids: np.ndarray
    options: Mapping[str, Any]
    text: str


class Computed(NamedTuple):
    """What a record's answer holds.

    Attributes:
        values: by column.
        n_tokens: what the job made for it: new tokens, or tokens that were read.
    """

    values: dict[str, Any]
    n_tokens: int


class Work(Protocol):
    """One job with a model.

    Attributes:
        at_once: most records of one ``compute``.
    """

    at_once: int

    def prepare(self, record: Record) -> Prepared:
        """Checks a record; raises RecordError when it is bad."""

    def order(self, one: Prepared) -> Any:
        """Returns by what to sort, so that little is padded."""

    def group(self, one: Prepared) -> Hashable:
        """Returns what records of one batch must have in common."""

    def compute(self, batch: Sequence[Prepared]) -> list[Computed]:
        """Computes prepared records of one group."""


class GenerateWork:
    """Continues texts, in batches that always have ``at_once`` rows: only lengths differ, in few buckets.

    Args:
        generator: the model.
        job: what is asked.
        batch_size: rows at once.
        jit_compile: whether XLA compiles.

    Raises:
        TypeError: when an option of the job is of a wrong type.
        ValueError: when one is out of range.
    """

    def __init__(self, generator: TextGenerator, job: Generate, batch_size: int, *, jit_compile: bool = True):
        self.at_once = batch_size
        self._generator = generator
        self._model, self._encoder = generator.model, generator.encoder
        self._job = job
        self._shared: dict[str, Any] = {
            "stop_ids": generator.stop_ids(job.stop_at_end_of_text),
            "jit_compile": jit_compile,
            **generator.without_unknown({}),
        }
        self._defaults = {name: getattr(job, name) for name in job.per_record}
        self._defaults |= {"stop": tuple(check_stops(job.stop))}
        sampling: dict[str, Any] = {name: self._defaults[name] for name in PER_RECORD_SAMPLING}
        self._request = make_request(
            self._model, 1, max_new_tokens=job.max_new_tokens, overflow=job.overflow, **self._shared, **sampling
        )

    def prepare(self, record: Record) -> Prepared:
        """Checks a record's options and text, and cuts the text to the window if the job asks for it."""
        own = {name: check_option(name, value) for name, value in record.options.items()}
        options = {**self._defaults, "seed": seed_of(self._job.seed, record.id), **own}
        ids = self._generator.encode_prompt(record.text)
        row = check_prompt("text", ids, self._model.config, overflow=self._job.overflow)
        request = dataclasses.replace(self._request, max_new_tokens=options["max_new_tokens"])
        (row,), _ = fit_rows([row], request, self._model.config)
        return Prepared(row, options, record.text)

    def order(self, one: Prepared) -> tuple[Any, ...]:
        """Sorts by stop strings, then by how many tokens are asked for, then by the prompt's length."""
        return one.options["stop"], one.options["max_new_tokens"], len(one.ids)

    def group(self, one: Prepared) -> Hashable:
        """Returns the stop strings, which the whole batch is looked through for."""
        return one.options["stop"]

    def compute(self, batch: Sequence[Prepared]) -> list[Computed]:
        """Continues the texts as far as the longest asks for, and cuts the others."""
        filled = [*batch, *[batch[-1]] * (self.at_once - len(batch))]
        stops = batch[0].options["stop"]
        sampling: dict[str, Any] = {name: [one.options[name] for one in filled] for name in PER_RECORD_SAMPLING}
        request = make_request(
            self._model,
            len(filled),
            max_new_tokens=max(one.options["max_new_tokens"] for one in batch),
            overflow=SLIDE if self._job.overflow == SLIDE else ERROR,
            **self._shared,
            **sampling,
        )
        is_complete = (lambda ids: has_stop(self._encoder, ids, stops)) if stops else None
        result = continue_rows(self._model, [one.ids for one in filled], request, is_complete)
        return [self._cut(result, row, one) for row, one in enumerate(batch)]

    def _cut(self, result: GenerationResult, row: int, one: Prepared) -> Computed:
        """Cuts a row to the tokens that its record asked for, and its text before a stop string.

        The first tokens of a row are the same however many follow, so this is what the record alone would give.
        """
        most = one.options["max_new_tokens"]
        ids = result.ids[row][:most]
        pieces = TextPieces(self._encoder, one.options["stop"])
        text = pieces.take(ids) + pieces.close()
        reason = "length" if len(ids) == most else result.finish_reasons[row]
        logprobs = result.logprobs[row][: pieces.n_ids]
        values = {
            "text": text,
            "ids": ids[: pieces.n_ids],
            "finish_reason": "stop" if pieces.is_stopped else reason,
            "logprob": math.fsum(logprobs),
        }
        return Computed(values, pieces.n_ids)


class ReadingWork:
    """What the jobs share that read texts and write none."""

    at_once = READ_AT_ONCE

    def __init__(self, generator: TextGenerator, *, jit_compile: bool = True):
        self._model, self._encoder = generator.model, generator.encoder
        self._jit_compile = jit_compile

    def prepare(self, record: Record) -> Prepared:
        """Checks a record whose text must fit into the window."""
        ids = check_row("text", self._encoder.encode(record.text), self._model.config)
        check_window("text", ids, self._model.config)
        return Prepared(ids, {}, record.text)

    def order(self, one: Prepared) -> int:
        """Sorts by length."""
        return len(one.ids)

    def group(self, one: Prepared) -> Hashable:
        """Returns the same for all: any texts can be read together."""
        return None


class ScoreWork(ReadingWork):
    """Scores texts.

    Args:
        generator: the model.
        job: what is asked.
        jit_compile: whether XLA compiles.

    Raises:
        ValueError: when the vocabulary has no ``<|endoftext|>`` to score a first token after.
    """

    def __init__(self, generator: TextGenerator, job: Score, *, jit_compile: bool = True):
        super().__init__(generator, jit_compile=jit_compile)
        self._start_id = self._encoder.end_of_text if job.after_end_of_text else None
        if job.after_end_of_text and self._start_id is None:
            raise ValueError("after_end_of_text must be False: this vocabulary has no <|endoftext|>")

    def compute(self, batch: Sequence[Prepared]) -> list[Computed]:
        """Computes the log-probability of each token; ``None`` for a first one that is not scored."""
        rows: list[Any] = [one.ids for one in batch]
        scores = score(self._model, rows, start_id=self._start_id, jit_compile=self._jit_compile)
        return [
            Computed({"ids": one.ids, "logprobs": [*map(finite, one.logprobs)], "logprob": one.total}, len(one.ids))
            for one in scores
        ]


class EmbedWork(ReadingWork):
    """Embeds texts.

    Args:
        generator: the model.
        job: what is asked.
        jit_compile: whether XLA compiles.

    Raises:
        ValueError: when the pooling is unknown.
    """

    def __init__(self, generator: TextGenerator, job: Embed, *, jit_compile: bool = True):
        super().__init__(generator, jit_compile=jit_compile)
        embed(self._model, [], pooling=job.pooling)  # checks it
        self._pooling = job.pooling

    def compute(self, batch: Sequence[Prepared]) -> list[Computed]:
        """Computes a vector of ``n_embd`` floats for each text."""
        rows: list[Any] = [one.ids for one in batch]
        vectors = embed(self._model, rows, pooling=self._pooling, jit_compile=self._jit_compile)
        return [
            Computed({"n_tokens": len(row), "embedding": vector.tolist()}, len(row))
            for row, vector in zip(rows, vectors, strict=True)
        ]


class PerplexityWork(ReadingWork):
    """Measures how well texts of any length are predicted.

    Args:
        generator: the model.
        job: what is asked.
        jit_compile: whether XLA compiles.

    Raises:
        ValueError: when the stride is out of range.
    """

    def __init__(self, generator: TextGenerator, job: Perplexity, *, jit_compile: bool = True):
        super().__init__(generator, jit_compile=jit_compile)
        config = self._model.config
        self._stride = default_stride(config) if job.stride is None else check_stride(job.stride, config)

    def prepare(self, record: Record) -> Prepared:
        """Checks a record's stride, and that its text has two tokens."""
        config = self._model.config
        stride = check_stride(record.options.get("stride", self._stride), config)
        ids = self._encoder.encode(record.text)
        if len(ids) < 2:
            raise RecordError(TOO_SHORT, f"text must have at least 2 tokens, got {len(ids)}: the first is not scored")
        return Prepared(check_sliding("text", ids, config), {"stride": stride}, record.text)

    def compute(self, batch: Sequence[Prepared]) -> list[Computed]:
        """Measures the texts, the windows of all together."""
        strides = [one.options["stride"] for one in batch]
        scored = sliding_logprobs_of(self._model, [one.ids for one in batch], strides, jit_compile=self._jit_compile)
        return [self._figures(one, logprobs) for one, logprobs in zip(batch, scored, strict=True)]

    def _figures(self, one: Prepared, logprobs: np.ndarray) -> Computed:
        stride, window = one.options["stride"], self._model.config.n_ctx
        ids = one.ids.tolist()
        found = make_perplexity(self._encoder, one.text, ids, logprobs, window=window, stride=stride)
        values = {
            "perplexity": finite(found.per_token),
            "perplexity_per_word": finite(found.per_word),
            "bits_per_byte": finite(found.bits_per_byte),
            **{name: getattr(found, name) for name in ("nll", "n_tokens", "n_scored", "n_words", "n_bytes")},
        }
        return Computed(values, found.n_tokens)


def make_work(generator: TextGenerator, job: Job, batch_size: int, *, jit_compile: bool = True) -> Work:
    """Makes what computes a job; raises the errors of its class when an option of the job is wrong."""
    if isinstance(job, Generate):
        return GenerateWork(generator, job, batch_size, jit_compile=jit_compile)
    if isinstance(job, Score):
        return ScoreWork(generator, job, jit_compile=jit_compile)
    if isinstance(job, Embed):
        return EmbedWork(generator, job, jit_compile=jit_compile)
    if isinstance(job, Perplexity):
        return PerplexityWork(generator, job, jit_compile=jit_compile)
    raise TypeError(f"job must be Generate, Score, Embed or Perplexity, got {job!r}")


def prepare(work: Work, job: Job, record: Record) -> Prepared:
    """Prepares a record; whatever is wrong with it is a RecordError."""
    if record.error is not None:
        raise record.error
    job.check_names(record)
    try:
        return work.prepare(record)
    except ContextLengthError as error:
        raise RecordError(TOO_LONG, str(error)) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(INVALID_OPTION, str(error)) from None


def check_option(name: str, value: object) -> Any:
    """Returns a record's own option of generation, checked; raises TypeError or ValueError."""
    if name == "max_new_tokens":
        return check_max_new_tokens(value)
    if name == "stop":
        return tuple(check_stops(value))  # type: ignore[arg-type]
    checked = check_values(name, value, 1, RULES[name])
    if checked.ndim:
        raise ValueError(f"{name} must be one number for a record, got {value!r}")
    return checked.item()


def finite(number: float) -> float | None:
    """Returns a number, or ``None`` for NaN and infinity, which JSON does not know."""
    return number if math.isfinite(number) else None
