"""One part of a job: reads its records, answers them, writes its file. What every engine calls, wherever it runs.

Imports TensorFlow when the first part is computed, as an engine may fork the process before.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tf_gpt2.jobs.inputs import Part, id_type, read_part
from tf_gpt2.jobs.kinds import Job, answer_columns
from tf_gpt2.jobs.outputs import part_path, write_answers

if TYPE_CHECKING:
    from tf_gpt2.jobs.answers import OnBatch
    from tf_gpt2.text.generator import TextGenerator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a process must know to compute any part of a job.

    Attributes:
        job: what is asked.
        model: the model's folder.
        dtype: of the weights, as for ``TextGenerator.from_checkpoint``.
        batch_size: rows at once.
        threads: cores to compute on; ``None`` for all.
        output: the folder of the answers.
        format: of the answers' files.
    """

    job: Job
    model: Path
    dtype: str
    batch_size: int
    threads: int | None
    output: Path
    format: str

    def path_of(self, part: Part) -> Path:
        """Returns the file of a part's answers."""
        return part_path(self.output, part.index, self.format)


@dataclasses.dataclass(frozen=True)
class PartDone:
    """What became of a part.

    Attributes:
        index: which of all parts it is.
        n_records: how many were answered.
        n_tokens: how many tokens were made, or read.
        errors: how many of the answers are errors, by code.
        seconds: how long it took.
    """

    index: int
    n_records: int
    n_tokens: int
    errors: Mapping[str, int]
    seconds: float


@functools.cache
def load_generator(model: Path, dtype: str, threads: int | None) -> TextGenerator:
    """Starts TensorFlow and loads a model, once in a process."""
    from tf_gpt2.model import require_tensorflow_backend

    require_tensorflow_backend()
    import tensorflow as tf

    from tf_gpt2.runtime import prepare_process
    from tf_gpt2.text.generator import TextGenerator

    prepare_process()
    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    return TextGenerator.from_checkpoint(model, dtype=dtype)


def do_part(task: Task, part: Part, on_batch: OnBatch) -> PartDone:
    """Answers all records of a part, and writes its file.

    Args:
        task: the job.
        part: which records.
        on_batch: told of each batch.

    Raises:
        OSError: when a file cannot be read or written.
        ValueError: when an option of the job is out of range.
    """
    generator = load_generator(task.model, task.dtype, task.threads)
    from tf_gpt2.jobs.answers import Answerer

    start_s, n_tokens = time.perf_counter(), 0

    def count(n_records: int, n_new: int) -> None:
        nonlocal n_tokens
        n_tokens += n_new
        on_batch(n_records, n_new)

    answers = Answerer(generator, task.job, batch_size=task.batch_size).answer(read_part(part), count)
    write_answers(task.path_of(part), answers, {"id": id_type(part), **answer_columns(task.job)})
    errors = collections.Counter(one["error"]["code"] for one in answers if one["error"] is not None)
    return PartDone(part.index, len(answers), n_tokens, dict(errors), time.perf_counter() - start_s)
