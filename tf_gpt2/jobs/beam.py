"""A model handler for Apache Beam's ``RunInference``: records in, answers out, errors as values.

    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference
    from tf_gpt2.jobs.beam import JobModelHandler
    from tf_gpt2.jobs.kinds import Generate

    handler = JobModelHandler(Generate(max_new_tokens=40), "/shared/124M")
    records | RunInference(handler) | beam.Map(lambda result: result.inference)

Beam's own exception handling sends the whole batch of a bad record to the dead letters, so a bad record is answered by
an error of its own instead. Records that Beam gathers are sorted by length and computed in batches of ``batch_size``
rows, however many there are, so that no number of them compiles anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tf_gpt2.jobs.kinds import Job
from tf_gpt2.jobs.parts import load_generator
from tf_gpt2.jobs.records import INVALID_TYPE, Answer, Record, RecordError, make_record

try:
    from apache_beam.metrics import Metrics
    from apache_beam.ml.inference.base import ModelHandler, PredictionResult
except ImportError:
    raise ImportError("tf_gpt2.jobs.beam needs Apache Beam; pip install 'tf_gpt2[beam]'") from None

NAMESPACE = "tf_gpt2"
"""Of the metrics."""


class JobModelHandler(ModelHandler[Any, PredictionResult, Any]):
    """Answers records of one job in a pipeline.

    An element is a record: a mapping with ``id``, ``text`` and perhaps options. Its ``PredictionResult`` has the record
    as ``example`` and the answer as ``inference``, of the form that ``tf_gpt2.jobs.answers`` describes.

    Metrics, in the namespace ``tf_gpt2``: the counters ``records``, ``tokens`` (made or read), ``errors`` and
    ``errors_CODE``, and the distribution ``batch_latency_ms``.

    Args:
        job: what is asked.
        model: the folder of a model, which each worker reads.
        dtype: as for ``TextGenerator.from_checkpoint``.
        batch_size: rows at once.
        gathered: records that Beam hands over at once where it has them; sorted by length, so more are less padded.
        threads: cores of one process; ``None`` for all.
        max_batch_duration_secs: longest wait for ``gathered`` records, for a streaming pipeline; by default a batch
            ends with Beam's bundle.
    """

    def __init__(
        self,
        job: Job,
        model: str | Path,
        *,
        dtype: str = "float32",
        batch_size: int = 16,
        gathered: int = 256,
        threads: int | None = None,
        max_batch_duration_secs: int | None = None,
    ):
        super().__init__(
            min_batch_size=gathered,
            max_batch_size=gathered,
            max_batch_duration_secs=max_batch_duration_secs,
        )
        self._job, self._model, self._dtype = job, Path(model).absolute(), dtype
        self._batch_size, self._threads = batch_size, threads

    def load_model(self) -> Any:
        """Starts TensorFlow, loads the model once for all stages of a process, and checks the job's options."""
        from tf_gpt2.jobs.answers import Answerer

        generator = load_generator(self._model, self._dtype, self._threads)
        return Answerer(generator, self._job, batch_size=self._batch_size)

    def run_inference(
        self, batch: Sequence[Any], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterator[PredictionResult]:
        """Answers a batch of records, in their order.

        Args:
            batch: the records.
            model: as loaded.
            inference_args: none are known; a record has its own options.

        Raises:
            ValueError: when there are ``inference_args``.
        """
        if inference_args:
            raise ValueError(
                f"inference_args must be empty: options belong to the job or a record, got {inference_args}"
            )
        records = [with_own_id(make_record(fields, "")) for fields in batch]
        start_s = time.perf_counter()
        answers = model.answer(records, count)
        Metrics.distribution(NAMESPACE, "batch_latency_ms").update(int(1e3 * (time.perf_counter() - start_s)))
        count_errors(answers)
        for record, one in zip(batch, answers, strict=True):
            yield PredictionResult(record, one)

    def get_metrics_namespace(self) -> str:
        """Returns the namespace of Beam's own metrics of inference, beside those of the class."""
        return "BeamML_tf_gpt2"

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Raises ValueError when a pipeline is made with ``inference_args``."""
        if inference_args:
            raise ValueError("inference_args must be None: options belong to the job or a record")


def with_own_id(record: Record) -> Record:
    """Refuses a record without an id: elements have no order from which one could be made."""
    if record.id == "" and record.error is None:
        return record._replace(error=RecordError(INVALID_TYPE, "a record in a pipeline must have an id"))
    return record


def count(n_records: int, n_tokens: int) -> None:
    """Adds to the counters."""
    Metrics.counter(NAMESPACE, "records").inc(n_records)
    Metrics.counter(NAMESPACE, "tokens").inc(n_tokens)


def count_errors(answers: Iterable[Answer]) -> None:
    """Counts answers that are errors."""
    for code in (one["error"]["code"] for one in answers if one["error"] is not None):
        Metrics.counter(NAMESPACE, "errors").inc()
        Metrics.counter(NAMESPACE, f"errors_{code}").inc()
