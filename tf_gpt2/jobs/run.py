"""A job over files: plans its parts, leaves out those that are there, gives the others to an engine, and sums up.

Imports TensorFlow only where parts are computed.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tf_gpt2.errors import GPT2Error
from tf_gpt2.jobs.inputs import OnRead, Part, find_files, plan
from tf_gpt2.jobs.kinds import Job
from tf_gpt2.jobs.manifest import make_manifest, start_folder
from tf_gpt2.jobs.outputs import FORMATS, JSONL, remove_unfinished
from tf_gpt2.jobs.parts import PartDone, Task
from tf_gpt2.jobs.workers import run_here, run_workers

if TYPE_CHECKING:
    from tf_gpt2.jobs.answers import OnBatch

PART_SIZE = 1024
"""Records per part: sorted together, and lost together with a worker. A multiple of the usual batch sizes."""

Engine = Callable[[Task, Sequence[Part], "OnBatch"], Iterator[PartDone]]
"""Computes the parts of a task somewhere; yields each as it is done."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        n_records: of the whole job.
        n_parts: of the whole job.
        n_done: records that this run answered; the others were answered before.
        n_parts_done: parts that this run computed.
        n_tokens: tokens that this run made, or read.
        errors: how many answers of this run are errors, by code.
        seconds: of this run, with the start of TensorFlow.
        part_seconds: seconds that parts took, added up over all workers; without the start.
    """

    n_records: int
    n_parts: int
    n_done: int
    n_parts_done: int
    n_tokens: int
    errors: Mapping[str, int]
    seconds: float
    part_seconds: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with how much of the job is there: what is lost is at most one part per worker.

    Args:
        n_parts_there: parts of the output that are whole.
        n_parts: of the whole job.
    """

    def __init__(self, n_parts_there: int, n_parts: int):
        super().__init__(n_parts_there, n_parts)
        self.n_parts_there, self.n_parts = n_parts_there, n_parts


def run(
    job: Job,
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    model: Path,
    dtype: str = "float32",
    output_format: str = JSONL,
    part_size: int = PART_SIZE,
    batch_size: int = 16,
    threads: int | None = None,
    resume: bool = False,
    engine: Engine | None = None,
    on_read: OnRead = lambda n_bytes: None,
    on_start: Callable[[int, int], None] = lambda n_before, n_records: None,
    on_batch: OnBatch = lambda n_records, n_tokens: None,
) -> Summary:
    """Answers all records of some files.

    Args:
        job: what is asked.
        inputs: paths, or patterns such as ``"prompts-*.jsonl"``.
        output: a folder; gets ``part-000000.jsonl``, … and ``manifest.json``.
        model: the folder of a model, as ``checkpoint.load.find_folder`` finds it.
        dtype: as for ``TextGenerator.from_checkpoint``.
        output_format: ``"jsonl"`` or ``"parquet"``.
        part_size: most records of one part.
        batch_size: rows at once.
        threads: cores of one worker; ``None`` for all.
        resume: go on with a job whose folder has some parts; starts it where there is none.
        engine: where to compute; in this process by default.
        on_read: told of the bytes of the input as they are read.
        on_start: told how many records were answered before, and how many there are.
        on_batch: told of each batch, how many records and tokens.

    Raises:
        Interrupted: at Ctrl-C.
        JobError: when a worker cannot compute.
        ResumeError: when the folder has another job, or one and ``resume`` is not set.
        OSError: when a file cannot be read or written.
        ValueError: when an option is out of range, or an input is damaged.
    """
    if output_format not in FORMATS:
        raise ValueError(f"output_format must be one of {', '.join(FORMATS)}, got {output_format!r}")
    start_s = time.perf_counter()
    folder = Path(os.path.abspath(output))  # noqa: PTH100  # without "..", as those of the input
    planned = plan(find_files(inputs, folder), job, part_size, on_read)
    manifest = make_manifest(job, planned, model, dtype=dtype, format=output_format, part_size=part_size)
    start_folder(folder, manifest, resume=resume)
    remove_unfinished(folder)
    task = Task(
        job=job,
        model=model.absolute(),
        dtype=dtype,
        batch_size=batch_size,
        threads=threads,
        output=folder,
        format=output_format,
    )
    todo = [part for part in planned.parts if not task.path_of(part).exists()]
    on_start(planned.n_records - sum(part.n_records for part in todo), planned.n_records)
    done: list[PartDone] = []
    try:
        if todo:
            done.extend((engine or run_here)(task, todo, on_batch))
    except KeyboardInterrupt:
        n_there = sum(task.path_of(part).exists() for part in planned.parts)
        raise Interrupted(n_there, len(planned.parts)) from None
    finally:
        remove_unfinished(folder)
    refuse_gaps(task, planned.parts)
    return summarize(planned.n_records, len(planned.parts), done, time.perf_counter() - start_s)


def on_processes(n_workers: int) -> Engine:
    """Returns the engine of this machine with so many processes; with one, this process computes."""
    if n_workers == 1:
        return run_here
    return lambda task, parts, on_batch: run_workers(task, parts, on_batch, min(n_workers, len(parts)))


def refuse_gaps(task: Task, parts: Sequence[Part]) -> None:
    """Raises GPT2Error when a part is missing after all, as where the workers see another folder than this process."""
    missing = [task.path_of(part).name for part in parts if not task.path_of(part).exists()]
    if missing:
        raise GPT2Error(
            f"{len(missing)} parts are not in {task.output}, the first is {missing[0]}; --output must be a folder that "
            f"all workers see under this name"
        )


def summarize(n_records: int, n_parts: int, done: Sequence[PartDone], seconds: float) -> Summary:
    """Adds up what became of the parts."""
    errors: collections.Counter[str] = collections.Counter()
    for one in done:
        errors.update(one.errors)
    return Summary(
        n_records=n_records,
        n_parts=n_parts,
        n_done=sum(one.n_records for one in done),
        n_parts_done=len(done),
        n_tokens=sum(one.n_tokens for one in done),
        errors=dict(errors.most_common()),
        seconds=seconds,
        part_seconds=sum(one.seconds for one in done),
    )
