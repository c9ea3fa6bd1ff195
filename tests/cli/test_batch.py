"""The commands ``batch …``: stopped by Ctrl-C and resumed, what they print, and what their options mean."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tf_gpt2 import TextGenerator, cli
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.cli import batch
from tf_gpt2.jobs import answers
from tf_gpt2.jobs.kinds import Embed, Generate, Perplexity, Score
from tf_gpt2.jobs.run import Summary

SETTINGS = [
    "--model_size",
    "tiny",
    "--max-new-tokens",
    "40",
    "--temperature",
    "0.7",
    "--batch_size",
    "4",
    "--part-size",
    "6",
]


@pytest.fixture
def prompts(tmp_path):
    records = [{"id": i, "text": "To be, or not to be"[: 3 + i % 9]} for i in range(60)]
    records[7]["top_p"] = 5
    (tmp_path / "prompts-1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return records


def test_ctrl_c_leaves_a_job_that_resumes(prompts, tmp_path):
    out = tmp_path / "out"
    files = ["--input", "prompts-*.jsonl", "--output", "out"]
    command = [sys.executable, "-m", "tf_gpt2", "batch", "generate", *files, *SETTINGS]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not [*out.glob("part-*")] and time.monotonic() < end and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate(timeout=60)
    assert (first.returncode, stdout) == (130, b""), stderr
    n_there = len([*out.glob("part-*")])
    assert 1 <= n_there < 10
    assert f"{n_there} of 10 parts are there; the same command with --resume" in stderr.decode()

    refused = subprocess.run([*command, "--resume", "--seed", "3"], cwd=tmp_path, capture_output=True, timeout=120)
    assert refused.returncode == 1
    assert b"seed was 0 and is 3" in refused.stderr

    two = [*command, "--resume", "--workers", "2"]
    second = subprocess.run(two, cwd=tmp_path, capture_output=True, timeout=240)
    assert second.returncode == 0, second.stderr
    printed = second.stdout.decode()
    assert f"records  {60 - 6 * n_there} answered, {6 * n_there} answered before\n" in printed
    assert "output   out, 10 parts\n" in printed
    assert "records/s" in printed
    lines = [line for path in sorted(out.glob("part-*")) for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    generator = TextGenerator.from_checkpoint(embedded_dir())
    expected = answers.generate(generator, prompts, max_new_tokens=40, temperature=0.7, batch_size=4)
    for one, wanted in zip(found, expected, strict=True):
        assert one["id"] == wanted["id"]
        assert one.get("text") == wanted["text"]
        assert one.get("error") == wanted["error"]


@pytest.mark.parametrize(
    ("arguments", "job", "options"),
    [
        (
            ["generate", "--top-k", "5", "--seed", "9", "--stop", r"\n", "--stop", "x", "--overflow", "slide"],
            Generate(top_k=5, seed=9, stop=("\n", "x"), overflow="slide"),
            {"batch_size": 16, "part_size": 1024, "resume": False, "output_format": "jsonl", "threads": None},
        ),
        (["score", "--first-is-context", "--resume"], Score(after_end_of_text=False), {"resume": True}),
        (
            ["embed", "--pooling", "last", "--output-format", "parquet"],
            Embed(pooling="last"),
            {"output_format": "parquet"},
        ),
        (["perplexity", "--stride", "7", "--threads", "1"], Perplexity(stride=7), {"threads": 1}),
        (["perplexity", "--dtype", "int8", "--part-size", "5"], Perplexity(), {"dtype": "int8", "part_size": 5}),
    ],
)
def test_options_reach_the_job(arguments, job, options, capfdbinary, monkeypatch):
    seen = {}

    def run(job, inputs, output, **options):
        seen.update(job=job, files=(inputs, output), **options)
        return Summary(50, 2, 40, 1, 300, {"empty_text": 2, "invalid_json": 1}, 2.0, 1.0)

    monkeypatch.setattr(batch, "run", run)
    assert cli.main(["batch", *arguments, "--input", "a", "b*", "--output", "out", "--model_size", "tiny"]) == 0
    assert (seen["job"], seen["files"]) == (job, (["a", "b*"], "out"))
    assert {name: seen[name] for name in options} == options
    printed = capfdbinary.readouterr().out.decode()
    assert "records  40 answered, 10 answered before\nerrors   3 (2 empty_text, 1 invalid_json)\n" in printed
    assert "20.0 records/s, 150.0 tokens/s" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["batch"],
        ["batch", "translate"],
        ["batch", "score", "--input", "a"],
        ["batch", "score", "--output", "a"],
        ["batch", "score", "--input", "a", "--output", "b", "--workers", "0"],
        ["batch", "score", "--input", "a", "--output", "b", "--temperature", "1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--spark_conf", "a=b"], b"--spark URL"), (["--spark", "spark://host:7077", "--workers", "2"], b"--workers")],
)
def test_options_that_do_not_go_together_are_named(arguments, words, capfdbinary):
    assert cli.main(["batch", "embed", "--input", "a", "--output", "b", "--model_size=tiny", *arguments]) == 1
    assert words in capfdbinary.readouterr().err
