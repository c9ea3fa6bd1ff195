"""The model handler in Beam's local runner with two processes, compared with a direct call."""

import json

import pytest

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.jobs.kinds import Embed, Generate
from tf_gpt2.jobs.records import seed_of

beam = pytest.importorskip("apache_beam", reason="needs Apache Beam, in an environment of its own: make test-jobs")

N_RECORDS = 120
OPTIONS = {"max_new_tokens": 5, "temperature": 0.8}
BAD = {3: {"text": ""}, 40: {"text": "x" * 3000}, 41: {"topp": 1}, 77: {"text": None}}


@pytest.fixture(scope="module")
def records():
    words = ["To", "be,", "or", "not", "to", "be,", "that", "is", "the", "question:", "whether", "'tis", "nobler"]
    return [{"id": i, "text": " ".join(words[i % 4 : 5 + i % 8]), **BAD.get(i, {})} for i in range(N_RECORDS)]


def run(records, job, out, *arguments):
    """Runs a pipeline; returns its answers by id, and its result."""
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.options.pipeline_options import PipelineOptions

    from tf_gpt2.jobs.beam import JobModelHandler

    handler = JobModelHandler(job, embedded_dir(), batch_size=4, gathered=16, threads=1)
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *arguments]))
    _ = (
        pipeline
        | beam.Create(records, reshuffle=True)
        | RunInference(handler)
        | beam.Map(lambda result: json.dumps([result.example["id"], result.inference]))
        | beam.io.WriteToText(str(out / "answers"))
    )
    result = pipeline.run()
    result.wait_until_finish()
    lines = [line for path in out.glob("answers*") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    assert len(found) == len(records)  # each once
    assert all(record_id == one["id"] for record_id, one in found)
    return dict(found), result


@pytest.fixture(scope="module")
def answered(records, tmp_path_factory):
    two = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    return run(records, Generate(**OPTIONS), tmp_path_factory.mktemp("out"), *two)


def test_two_processes_answer_every_record_as_a_direct_call_does(answered, records, generator):
    found, _ = answered
    good = [record for record in records if record["id"] not in BAD]
    seeds = [seed_of(0, record["id"]) for record in good]
    expected = generator.complete_many([record["text"] for record in good], seed=seeds, batch_size=4, **OPTIONS)
    for record, one in zip(good, expected, strict=True):
        answer = found[record["id"]]
        assert (answer["text"], answer["ids"], answer["error"]) == (one.text, one.ids, None)


def test_bad_records_are_answered_by_errors_of_their_own(answered):
    found, _ = answered
    codes = {record_id: found[record_id]["error"]["code"] for record_id in BAD}
    assert codes == {3: "empty_text", 40: "context_length_exceeded", 41: "unknown_option", 77: "invalid_type"}
    assert sum(one["error"] is not None for one in found.values()) == len(BAD)


def test_metrics_count_records_tokens_errors_and_latencies(answered):
    found, result = answered
    metrics = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("tf_gpt2"))
    counters = {one.key.metric.name: one.committed for one in metrics["counters"]}
    n_tokens = sum(len(one["ids"]) for one in found.values() if one["ids"])
    names = ("empty_text", "context_length_exceeded", "unknown_option", "invalid_type")
    errors = {f"errors_{name}": 1 for name in names}
    assert counters == {"records": N_RECORDS, "tokens": n_tokens, "errors": 4, **errors}
    (latency,) = metrics["distributions"]
    assert latency.key.metric.name == "batch_latency_ms"
    assert latency.committed.count >= N_RECORDS / 16


def test_a_record_must_have_an_id(generator):
    from tf_gpt2.jobs.answers import Answerer
    from tf_gpt2.jobs.beam import JobModelHandler

    handler, answerer = JobModelHandler(Embed(), embedded_dir()), Answerer(generator, Embed())
    one, two = handler.run_inference([{"text": "To be"}, {"id": 1, "text": "To be"}], answerer)
    assert one.inference["error"]["code"] == "invalid_type"
    assert len(two.inference["embedding"]) == generator.model.config.n_embd
    with pytest.raises(ValueError, match="inference_args"):
        handler.validate_inference_args({"top_k": 1})
