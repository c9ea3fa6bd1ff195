"""Jobs over files: interrupted and resumed = not interrupted; nothing half-written; workers may die."""

import json
import os
import signal

import pyarrow.parquet
import pytest

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.jobs import answers, parts, workers
from tf_gpt2.jobs.inputs import find_files, plan
from tf_gpt2.jobs.kinds import Embed, Generate, Perplexity, Score
from tf_gpt2.jobs.manifest import ResumeError
from tf_gpt2.jobs.parts import Task
from tf_gpt2.jobs.run import Interrupted, on_processes, run

JOB = Generate(max_new_tokens=3, temperature=0.8)
OPTIONS = {"model": embedded_dir(), "part_size": 8, "batch_size": 4}
WORDS = ["To", "be", "or", "not", "to", "be", "that", "is", "the", "question"]


@pytest.fixture(autouse=True)
def one_model(generator, monkeypatch):
    """Parts that this process computes use the model that is there."""
    monkeypatch.setattr(parts, "load_generator", lambda *arguments: generator)


@pytest.fixture
def inputs(tmp_path):
    """Forty records, five parts; one record is bad."""
    path = tmp_path / "a.jsonl"
    records = [{"id": i, "text": " ".join(WORDS[: 1 + i % 7])} for i in range(40)]
    records[11] = {"id": 11, "text": ""}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def expected(generator, path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {"id": one["id"], "error": one["error"]} if one["error"] else {n: v for n, v in one.items() if n != "error"}
        for one in answers.generate(generator, records, batch_size=4, max_new_tokens=3, temperature=0.8)
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def found(folder):
    lines = [line for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def same(one, other):
    logprobs = [[answer.pop("logprob", 0) for answer in answers] for answers in (one, other)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    return one == other


def test_every_record_is_answered_in_its_place(generator, inputs, tmp_path):
    told, started = [], []
    summary = run(
        JOB,
        [inputs],
        tmp_path / "out",
        **OPTIONS,
        on_batch=lambda *n: told.append(n),
        on_start=lambda *n: started.append(n),
    )
    assert same(found(tmp_path / "out"), expected(generator, inputs))
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", *(f"part-00000{i}.jsonl" for i in range(5))]
    assert (summary.n_records, summary.n_done, summary.n_parts_done) == (40, 40, 5)
    assert (summary.n_tokens, summary.errors) == (39 * 3, {"empty_text": 1})
    assert started == [(0, 40)]
    assert [sum(counts) for counts in zip(*told, strict=True)] == [40, 39 * 3]


def test_stopped_and_resumed_is_not_stopped(inputs, tmp_path):
    run(JOB, [inputs], tmp_path / "whole", **OPTIONS)
    out, n_batches = tmp_path / "out", 0

    def stop(*counts):
        nonlocal n_batches
        n_batches += 1
        if n_batches == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as error:
        run(JOB, [inputs], out, **OPTIONS, on_batch=stop)
    there = contents(out)
    assert (error.value.n_parts_there, error.value.n_parts) == (len(there) - 1, 5)
    assert 1 <= len(there) - 1 < 5
    (out / ".part-000004.jsonl.abc.tmp").write_text("half")  # as a killed process leaves it
    with pytest.raises(ResumeError, match="--resume"):
        run(JOB, [inputs], out, **OPTIONS)
    summary = run(JOB, [inputs], out, **OPTIONS, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert summary.n_parts_done == 5 - (len(there) - 1)
    assert run(JOB, [inputs], out, **OPTIONS, resume=True).n_done == 0


def test_a_pattern_that_finds_the_output_too_still_resumes(inputs, tmp_path):
    pattern = tmp_path / "**" / "*.jsonl"
    for name in ("out", "x/../out"):
        (tmp_path / "x").mkdir(exist_ok=True)
        summary = run(JOB, [pattern], tmp_path / name, **OPTIONS, resume=True)
        assert summary.n_records == 40
    assert summary.n_done == 0


def test_a_lost_part_is_computed_again(inputs, tmp_path):
    run(JOB, [inputs], tmp_path / "out", **OPTIONS)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "part-000002.jsonl").unlink()
    assert run(JOB, [inputs], tmp_path / "out", **OPTIONS, resume=True).n_done == 8
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"job": Generate(max_new_tokens=3, temperature=0.9)}, r"temperature was 0\.8 and is 0\.9$"),
        ({"job": Embed()}, 'job was "generate" and is "embed"; .*pooling was null and is "mean"'),
        ({"dtype": "int8"}, r'model\.dtype was "float32" and is "int8"$'),
        ({"part_size": 16}, "part_size was 8 and is 16"),
        ({"output_format": "parquet"}, "output_format"),
        ({"input": "more"}, r"input\.a\.jsonl was "),
    ],
)
def test_another_job_does_not_resume(inputs, tmp_path, change, words):
    out = tmp_path / "out"
    run(JOB, [inputs], out, **OPTIONS)
    (out / "part-000000.jsonl").unlink()
    before = contents(out)
    if "input" in change:
        inputs.write_text(inputs.read_text() + '{"text": "x"}\n')
    options = {**OPTIONS, **{name: value for name, value in change.items() if name not in ("job", "input")}}
    with pytest.raises(ResumeError, match=words):
        run(change.get("job", JOB), [inputs], out, **options, resume=True)
    assert contents(out) == before


def test_another_model_does_not_resume(inputs, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in embedded_dir().iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    options = {**OPTIONS, "model": model}
    run(JOB, [inputs], tmp_path / "out", **options)
    (model / "hparams.json").write_bytes((model / "hparams.json").read_bytes() + b" ")
    with pytest.raises(ResumeError, match=r"model\.sha256"):
        run(JOB, [inputs], tmp_path / "out", **options, resume=True)


def test_a_folder_with_other_files_is_left_alone(inputs, tmp_path):
    with pytest.raises(ResumeError, match="empty"):
        run(JOB, [inputs], tmp_path, **OPTIONS, resume=True)
    assert contents(tmp_path) == {"a.jsonl": inputs.read_bytes()}


@pytest.mark.parametrize("job", [JOB, Score(after_end_of_text=False), Embed(), Perplexity()])
def test_parquet_holds_what_jsonl_does(inputs, tmp_path, job):
    text = tmp_path / "some.txt"
    text.write_text("To be\n\nA horse")
    for ending in ("jsonl", "parquet"):
        run(job, [text], tmp_path / ending, **OPTIONS, output_format=ending)
    lines, rows = found(tmp_path / "jsonl"), pyarrow.parquet.read_table(tmp_path / "parquet" / "part-000000.parquet")
    assert rows.column_names == ["id", *job.columns, "error"]
    for line, row in zip(lines, rows.to_pylist(), strict=True):
        shown = {name: value for name, value in row.items() if value is not None or (name in line and name != "error")}
        assert shown.keys() == line.keys()
        assert shown["id"] == line["id"]
        assert {
            name: pytest.approx(value) if isinstance(value, float | list) else value for name, value in shown.items()
        } == line


def test_integers_as_ids_stay_so_from_parquet_to_parquet(inputs, tmp_path):
    table = pyarrow.table({"id": [5, 6], "text": ["To be", "or"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    run(JOB, [tmp_path / "b.parquet"], tmp_path / "out", **OPTIONS, output_format="parquet")
    assert pyarrow.parquet.read_table(tmp_path / "out" / "part-000000.parquet")["id"].to_pylist() == [5, 6]


def test_a_failing_disk_leaves_no_half_part(inputs, tmp_path, monkeypatch):
    def sync(path):
        if "part-" in path.name:
            raise OSError("disk full")

    monkeypatch.setattr("tf_gpt2.jobs.outputs.sync", sync)
    with pytest.raises(OSError, match="disk full"):
        run(JOB, [inputs], tmp_path / "out", **OPTIONS)
    assert [*contents(tmp_path / "out")] == ["manifest.json"]


def test_killed_workers_are_replaced_and_nothing_is_lost(inputs, tmp_path, monkeypatch):
    """Kills each of the first two workers after its first batch."""
    run(JOB, [inputs], tmp_path / "one", **OPTIONS)
    made = []
    start = workers.Worker.__init__

    def remember(self, task):
        start(self, task)
        made.append(self._process)

    def kill(*counts):
        for process in made[:2]:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(workers.Worker, "__init__", remember)
    summary = run(JOB, [inputs], tmp_path / "two", **OPTIONS, threads=1, engine=on_processes(2), on_batch=kill)
    assert len(made) == 4
    assert same(found(tmp_path / "two"), found(tmp_path / "one"))
    assert (summary.n_done, summary.n_parts_done) == (40, 5)
    assert all(process.poll() is not None for process in made)


def test_a_part_that_ends_every_worker_ends_the_job(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(workers.JobError, match=r"part \d \(a.jsonl, from line \d+\) ended 3 workers.*exit code 1"):
        run(JOB, [inputs], tmp_path / "out", **OPTIONS, engine=on_processes(1 + 1))


def test_a_worker_that_cannot_compute_says_why(inputs, tmp_path):
    task = Task(
        job=Generate(top_p=7),
        model=embedded_dir(),
        dtype="float32",
        batch_size=4,
        threads=1,
        output=tmp_path,
        format="jsonl",
    )
    planned = plan(find_files([inputs]), JOB, 8)
    with pytest.raises(workers.JobError, match="top_p must be"):
        list(workers.run_workers(task, planned.parts, lambda *counts: None, 1))
