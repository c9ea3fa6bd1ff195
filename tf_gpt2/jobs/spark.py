"""Spark as the engine of a job over files, and for a DataFrame of one's own.

Spark gives work to Python processes on all machines, which load the model once each, and gives the work of one that
dies to another. The weights are copied into memory that TensorFlow owns: OpenAI's files hold no arrays that it could
map. Executors fork their Python processes, so TensorFlow is imported in these alone.

    from tf_gpt2.jobs.kinds import Generate
    from tf_gpt2.jobs.spark import answer

    answers = answer(Generate(max_new_tokens=40), session.read.parquet("prompts"), model="/shared/124M")
    answers.write.parquet("answers")
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_gpt2.errors import GPT2Error
from tf_gpt2.jobs.inputs import Part, check_columns
from tf_gpt2.jobs.kinds import Job, answer_columns
from tf_gpt2.jobs.outputs import arrow_schema, rows_of
from tf_gpt2.jobs.parts import PartDone, Task, do_part, load_generator
from tf_gpt2.jobs.records import make_record

if TYPE_CHECKING:
    from tf_gpt2.jobs.answers import OnBatch
    from tf_gpt2.jobs.run import Engine

NEED_SPARK = "Spark needs pyspark, pandas, pyarrow and Java 17 or later; pip install 'tf_gpt2[spark]'"
POLL_S = 0.5
"""Seconds between two looks at how far the executors are."""


def answer(
    job: Job, frame: Any, *, model: str | Path, dtype: str = "float32", batch_size: int = 16, threads: int | None = None
) -> Any:
    """Answers each row of a DataFrame, by ``mapInArrow``.

    Arrow and not pandas hands the rows over: in pandas a column of integers of which some are missing is one of floats.

    Args:
        job: what is asked.
        frame: a DataFrame with the columns ``id`` and ``text``, and perhaps options of a record; null counts as not
            there. Its partitions are computed in parallel, and rows are sorted by length as far as they come together
            (``spark.sql.execution.arrow.maxRecordsPerBatch``).
        model: the folder of a model, under the same name on all machines.
        dtype: as for ``TextGenerator.from_checkpoint``.
        batch_size: rows at once.
        threads: cores of one Python process; by default the cores of a Spark task.

    Returns:
        A DataFrame with ``id`` and the columns of the job and ``error``. Ids are integers if those of ``frame`` are,
        else text. It is computed when Spark needs it, and again if Spark needs it again: write it, or cache it.

    Raises:
        ImportError: when pyspark is missing.
        ValueError: when a column is no option of the job, or there is no ``id``.
    """
    check_columns("the DataFrame", frame.columns, job)
    if "id" not in frame.columns:
        raise ValueError(f"the DataFrame must have a column 'id', and has {', '.join(frame.columns)}")
    kinds = {"tinyint": "BIGINT", "smallint": "BIGINT", "int": "BIGINT", "bigint": "BIGINT"}
    columns = {"id": kinds.get(dict(frame.dtypes)["id"], "STRING"), **answer_columns(job)}
    folder = Path(model).absolute()

    def answer_batches(batches: Iterable[Any]) -> Iterator[Any]:
        import pyarrow

        from tf_gpt2.jobs.answers import Answerer, windows

        generator = load_generator(folder, dtype, threads or cores_of_task())
        answerer = Answerer(generator, job, batch_size=batch_size)
        for batch in batches:
            records = (make_record(fields, "null") for fields in batch.to_pylist())
            for window in windows(records):
                rows = rows_of(answerer.answer(window), columns)
                yield pyarrow.RecordBatch.from_pylist(rows, schema=arrow_schema(columns))

    return frame.mapInArrow(answer_batches, ddl(columns))


def ddl(columns: Mapping[str, str]) -> str:
    """Returns columns as Spark declares them."""
    return ", ".join(f"`{name}` {kind}" for name, kind in columns.items())


def cores_of_task() -> int:
    """Returns how many cores Spark counts for the task that runs in this process."""
    from pyspark import TaskContext

    context = TaskContext.get()
    return context.cpus() if context is not None else 1


def on_spark(master: str, settings: Mapping[str, str]) -> Engine:
    """Returns the engine of a Spark cluster, for ``run``; input, output and model must be in folders that all see.

    Args:
        master: the URL of the cluster, as ``"spark://host:7077"``.
        settings: of Spark, by name.
    """

    def engine(task: Task, parts: Sequence[Part], on_batch: OnBatch) -> Iterator[PartDone]:
        session = start_session(master, settings)
        try:
            yield from compute(session.sparkContext, task, parts, on_batch)
        finally:
            session.stop()

    return engine


def start_session(master: str, settings: Mapping[str, str]) -> Any:
    """Starts a session with a cluster.

    Raises:
        GPT2Error: when Java is missing.
        ImportError: when pyspark is missing.
    """
    try:
        from pyspark.errors import PySparkRuntimeError
        from pyspark.sql import SparkSession
    except ImportError:
        raise ImportError(NEED_SPARK) from None
    builder = SparkSession.builder.master(master).appName("tf-gpt2 batch").config("spark.ui.showConsoleProgress", False)
    for name, value in settings.items():
        builder = builder.config(name, value)
    try:
        return builder.getOrCreate()
    except (FileNotFoundError, PySparkRuntimeError) as error:
        raise GPT2Error(f"Spark does not start: {error}; {NEED_SPARK}") from None


def compute(context: Any, task: Task, parts: Sequence[Part], on_batch: OnBatch) -> Iterator[PartDone]:
    """Computes each part as one task of Spark; a part's file appears when it is whole, however often it is tried.

    Args:
        context: of the session.
        task: the job.
        parts: which to compute.
        on_batch: told of finished parts meanwhile.
    """
    n_records, n_tokens = context.accumulator(0), context.accumulator(0)

    def do(part: Part) -> PartDone:
        own = dataclasses.replace(task, threads=task.threads or cores_of_task())
        done = do_part(own, part, lambda *counts: None)
        n_records.add(done.n_records)
        n_tokens.add(done.n_tokens)
        return done

    job = Background(lambda: context.parallelize(parts, len(parts)).map(do).collect())
    told = [0, 0]
    try:
        while job.is_alive():
            job.join(POLL_S)
            now = [n_records.value, n_tokens.value]
            if now != told:
                on_batch(now[0] - told[0], now[1] - told[1])
                told = now
    except BaseException:
        context.cancelAllJobs()
        raise
    yield from job.result()


class Background(threading.Thread):
    """Calls a function in a thread of its own, so that this one can show how far it is and is interrupted at once.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[[], list[PartDone]]):
        super().__init__(daemon=True)
        self._function = function
        self._error: BaseException | None = None
        self._value: list[PartDone] = []
        self.start()

    def run(self) -> None:
        """Calls the function."""
        try:
            self._value = self._function()
        except BaseException as error:  # the other thread raises it
            self._error = error

    def result(self) -> list[PartDone]:
        """Waits, and returns what the function returns; raises what it raises."""
        self.join()
        if self._error is not None:
            raise GPT2Error(f"the job failed on Spark: {first_lines(self._error)}") from self._error
        return self._value


def first_lines(error: BaseException) -> str:
    """Returns what a Python process said last before Spark's own stack, or the beginning of Spark's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.partition(":")[0].endswith("Error") and ":" in line]
    return causes[-1] if causes else " ".join(lines[:3])
