"""Records in, answers out, without an engine: ``generate``, ``score``, ``embed`` and ``perplexity``.

A window of records is sorted by length, computed batch by batch, and answered in the order in which it came. Knows
nothing of files and engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tf_gpt2.generation.options import check_counts
from tf_gpt2.jobs.compute import Prepared, Work, make_work, prepare
from tf_gpt2.jobs.kinds import Embed, Generate, Job, Perplexity, Score, answer_columns
from tf_gpt2.jobs.records import Answer, Record, RecordError, make_record
from tf_gpt2.text.generator import TextGenerator

RECORDS_PER_WINDOW = 1024
"""Records that are sorted together: of 16 to a batch, lengths then differ little within one."""

OnBatch = Callable[[int, int], None]
"""Is told how many records were answered since the last call, and how many tokens were made or read for them."""


def generate(
    generator: TextGenerator, records: Iterable[Any], *, batch_size: int = 16, **options: Any
) -> Iterator[Answer]:
    """Continues the text of each record; yields an answer for each, in their order.

    An answer holds ``id``, ``text`` (only the new text), ``ids``, ``finish_reason``, ``logprob`` (the sum of the new
    tokens') and ``error``: ``None``, or for a bad record ``{"code", "message"}``, while the others are ``None``. A
    record's answer depends on the job's options, its id, its text and its options alone.

    Args:
        generator: the model.
        records: mappings with ``text``, and perhaps ``id`` (by default the record's number, from 0) and options of
            their own, those of ``Generate.per_record``. Read as answers are asked for, in windows of 1024.
        batch_size: rows at once; changes no text.
        **options: those of ``Generate``: ``max_new_tokens``, ``temperature``, ``seed``, ``stop``, …

    Raises:
        TypeError: when an option is unknown or of a wrong type.
        ValueError: when an option is out of range.

    Example:
        >>> records = [{"id": 7, "text": "To be", "max_new_tokens": 3}, {"id": 8, "text": ""}]
        >>> one, two = generate(TextGenerator.load("tiny"), records)
        >>> one["id"], len(one["ids"]), one["finish_reason"], two["error"]["code"]
        (7, 3, 'length', 'empty_text')
    """
    return answer(generator, Generate(**options), records, batch_size=batch_size)


def score(generator: TextGenerator, records: Iterable[Any], **options: Any) -> Iterator[Answer]:
    """Computes how likely each record's text is: ``ids``, ``logprobs`` of each, and their sum ``logprob``.

    Args:
        generator: the model.
        records: as for ``generate``, without options.
        **options: those of ``Score``.
    """
    return answer(generator, Score(**options), records)


def embed(generator: TextGenerator, records: Iterable[Any], **options: Any) -> Iterator[Answer]:
    """Computes a vector for each record's text: ``embedding``, of ``n_embd`` numbers, and ``n_tokens``.

    Args:
        generator: the model.
        records: as for ``generate``, without options.
        **options: those of ``Embed``.
    """
    return answer(generator, Embed(**options), records)


def perplexity(generator: TextGenerator, records: Iterable[Any], **options: Any) -> Iterator[Answer]:
    """Measures how well each record's text, of any length, is predicted: the columns of ``Perplexity``.

    Args:
        generator: the model.
        records: as for ``generate``; the only option is ``stride``.
        **options: those of ``Perplexity``.
    """
    return answer(generator, Perplexity(**options), records)


def answer(generator: TextGenerator, job: Job, records: Iterable[Any], *, batch_size: int = 16) -> Iterator[Answer]:
    """Answers each record of a job, in their order; the arguments and errors are those of ``generate``."""
    answerer = Answerer(generator, job, batch_size=batch_size)
    numbered = (make_record(fields, str(i)) for i, fields in enumerate(records))
    return (one for window in windows(numbered) for one in answerer.answer(window))


def windows(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yields lists of ``RECORDS_PER_WINDOW`` records, the last shorter."""
    rest = iter(records)
    while window := list(itertools.islice(rest, RECORDS_PER_WINDOW)):
        yield window


class Answerer:
    """Answers records of one job with one model.

    Args:
        generator: the model.
        job: what is asked.
        batch_size: rows at once of ``Generate``; the other jobs choose theirs.
        jit_compile: whether XLA compiles.

    Raises:
        TypeError: when an option of the job is of a wrong type.
        ValueError: when one is out of range.
    """

    def __init__(self, generator: TextGenerator, job: Job, *, batch_size: int = 16, jit_compile: bool = True):
        (batch_size,) = check_counts(batch_size=batch_size)
        self.job = job
        self._work = make_work(generator, job, batch_size, jit_compile=jit_compile)
        self._nothing = dict.fromkeys(answer_columns(job))

    def answer(self, records: Sequence[Record], on_batch: OnBatch | None = None) -> list[Answer]:
        """Answers each record, in their order.

        Args:
            records: as many as fit into memory; sorted by length, so that the more there are the less is padded.
            on_batch: called after each batch.

        Raises:
            ParamsError: when the model's logits are not numbers.
        """
        answers: list[Answer] = [{"id": record.id, **self._nothing} for record in records]
        ready: list[tuple[int, Prepared]] = []
        for i, record in enumerate(records):
            try:
                ready.append((i, prepare(self._work, self.job, record)))
            except RecordError as error:
                answers[i]["error"] = error.as_value()
        tell = on_batch or (lambda n_records, n_tokens: None)
        tell(len(records) - len(ready), 0)
        for batch in batches(self._work, ready):
            computed = self._work.compute([one for _, one in batch])
            for (i, _), one in zip(batch, computed, strict=True):
                answers[i].update(one.values)
            tell(len(batch), sum(one.n_tokens for one in computed))
        return answers


def batches(work: Work, ready: Sequence[tuple[int, Prepared]]) -> Iterator[list[tuple[int, Prepared]]]:
    """Sorts prepared records and yields those of one group, so many at a time as the work takes."""
    in_order = sorted(ready, key=lambda one: work.order(one[1]))
    for _, group in itertools.groupby(in_order, key=lambda one: work.group(one[1])):
        rest = iter(group)
        while batch := list(itertools.islice(rest, work.at_once)):
            yield batch
