"""The four jobs as data: what each may be asked, for all records or by one record, and what its answers hold.

Imports no TensorFlow, so that a driver can make a job, send it to workers, and store it in a manifest.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tf_gpt2.jobs.records import UNKNOWN_OPTION, Record, RecordError

PER_RECORD_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "no_repeat_ngram_size",
    "min_new_tokens",
)
"""The options of generation that may differ from row to row of a batch; ``SamplingOptions`` defines them."""

Columns = Mapping[str, str]
"""Name of each column of the answers, and its type as SQL has it, which Spark and ``outputs`` read."""

ERROR_COLUMN = "STRUCT<code: STRING, message: STRING>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of all records; the subclasses have the options as attributes.

    Attributes:
        name: as on the command line.
        per_record: the options that a record may have of its own.
        columns: of the answers, but for ``id`` and ``error``.
    """

    name: ClassVar[str]
    per_record: ClassVar[Sequence[str]] = ()
    columns: ClassVar[Columns]

    def options(self) -> dict[str, Any]:
        """Returns the options by name, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def check_names(self, record: Record) -> None:
        """Raises RecordError when a record has an option that it cannot have."""
        for name in record.options:
            if name not in self.per_record:
                raise RecordError(UNKNOWN_OPTION, self.no_option(name))

    def no_option(self, name: str) -> str:
        """Returns the sentence about an option that a record cannot have."""
        meant = "".join(f", did you mean {near!r}?" for near in difflib.get_close_matches(name, self.per_record, 1))
        known = ", ".join(self.per_record) or "none"
        return f"{name!r} is no option of a record in {self.name}{meant}; it may have: id, text; options: {known}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Job):
    """Continues each text; the options are those of ``TextGenerator.complete_many``, with its defaults.

    A record without a ``seed`` of its own gets ``seed_of(seed, id)``, so records with equal texts differ.
    """

    name = "generate"
    per_record = (*PER_RECORD_SAMPLING, "max_new_tokens", "stop")
    columns: ClassVar[Columns] = {
        "text": "STRING",
        "ids": "ARRAY<INT>",
        "finish_reason": "STRING",
        "logprob": "DOUBLE",
    }

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    stop: Sequence[str] = ()
    stop_at_end_of_text: bool = True
    overflow: str = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Job):
    """Computes how likely each text is; the option is that of ``TextGenerator.score``."""

    name = "score"
    columns: ClassVar[Columns] = {"ids": "ARRAY<INT>", "logprobs": "ARRAY<DOUBLE>", "logprob": "DOUBLE"}

    after_end_of_text: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed(Job):
    """Computes a vector for each text: its last hidden states, after the last layer norm, pooled.

    Attributes:
        pooling: ``"mean"`` or ``"last"``, as for ``generation.embedding.embed``.
    """

    name = "embed"
    columns: ClassVar[Columns] = {"n_tokens": "INT", "embedding": "ARRAY<FLOAT>"}

    pooling: str = "mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Job):
    """Measures how well each text is predicted; the option is that of ``TextGenerator.perplexity``."""

    name = "perplexity"
    per_record = ("stride",)
    columns: ClassVar[Columns] = {
        "perplexity": "DOUBLE",
        "perplexity_per_word": "DOUBLE",
        "bits_per_byte": "DOUBLE",
        "nll": "DOUBLE",
        "n_tokens": "INT",
        "n_scored": "INT",
        "n_words": "INT",
        "n_bytes": "INT",
    }

    stride: int | None = None


JOBS: Mapping[str, type[Job]] = {job.name: job for job in (Generate, Score, Embed, Perplexity)}
"""The jobs by name."""


def answer_columns(job: Job) -> Columns:
    """Returns all columns of a job's answers, but for ``id``, whose type is the input's."""
    return {**job.columns, "error": ERROR_COLUMN}
