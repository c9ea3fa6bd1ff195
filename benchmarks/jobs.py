"""Measures jobs over files against a plain loop: in one process, in two, and on one executor of Spark.

The loop calls ``TextGenerator.generate`` with the same batch size. Each engine answers every prompt twice in one job;
its rate is that of the second half, so the start of processes, TensorFlow and compilation are apart: the seconds until
the first batch (with Spark, the first part). 124M's shapes have random weights.

    python -m benchmarks.jobs
    python -m benchmarks.jobs --sizes tiny --engines here spark
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import start_report, store
from benchmarks.rounds import wait_until_quiet
from tf_gpt2 import TextGenerator
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.genuine import VOCABULARY_FILES
from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.config import SIZES
from tf_gpt2.jobs.kinds import Generate
from tf_gpt2.jobs.parts import load_generator
from tf_gpt2.jobs.run import Engine, run
from tf_gpt2.jobs.spark import on_spark
from tf_gpt2.jobs.workers import run_here, run_workers

RESULTS = Path(__file__).parent / "results" / "jobs.json"
TEXT = Path(__file__).parents[1] / "docs" / "design.md"
N_PROMPTS = {"tiny": 2000, "124M": 100}
PART_SIZE = {"tiny": 512, "124M": 48}
HALF = 0.45
"""Where the second half begins: at the end of a part, as Spark tells of no smaller pieces."""
GOALS = {"here": 0.95, "spark": 0.9}
"""Least rate of an engine, as a share of the plain loop's."""
SPARK = {
    "spark.executor.memory": "1g",
    "spark.task.cpus": "2",
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
}
"""One executor of two cores, which one Python process has."""


def engines() -> dict[str, tuple[Engine, int | None]]:
    """Returns each engine with the cores of one of its workers; ``None`` for both of this machine's."""
    return {
        "here": (run_here, None),
        "one worker, one core": (lambda *of: run_workers(*of, n_workers=1), 1),
        "two workers, one core each": (lambda *of: run_workers(*of, n_workers=2), 1),
        "spark": (on_spark("local-cluster[1,2,1024]", SPARK), 2),
    }


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        **start_report("jobs", arguments, "sizes", "engines", "n_tokens", "batch_size"),
        "sizes": {},
    }
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))
        result["sizes"] = stored["sizes"] if stored["settings"]["n_tokens"] == arguments.n_tokens else {}
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            for _ in measure(size, Path(folder), arguments, result["sizes"].setdefault(size, {})):
                store(result, arguments.output)  # each time: an engine that fails costs no other's measurement


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=[*N_PROMPTS], default=[*N_PROMPTS], help="which models")
    parser.add_argument("--engines", nargs="+", choices=[*engines()], default=[*engines()], help="which engines")
    parser.add_argument("--n_tokens", "--n-tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=16, help="rows at once")
    parser.add_argument("--patience_s", "--patience-s", type=float, default=10, help="longest wait for a quiet machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write, or to add measurements to")
    return parser.parse_args()


def measure(size: str, folder: Path, arguments: argparse.Namespace, found: dict[str, Any]) -> Iterator[str]:
    """Measures the loop and each engine with one model; yields the name of what was added to ``found``."""
    model, prompts = model_folder(size, folder), make_prompts(N_PROMPTS[size])
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate([*prompts, *prompts])]
    (folder / f"{size}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wait_until_quiet(arguments.patience_s)
    found["n_prompts"] = len(prompts)
    found["loop"] = rate_of_loop(load_generator(model, "float32", None), prompts, arguments)
    show(size, "loop", found)
    for name in arguments.engines:
        found[name] = rate_of_job(*engines()[name], model, folder / f"{size}.jsonl", arguments)
        found[name]["ratio"] = found[name]["records_per_s"] / found["loop"]["records_per_s"]
        show(size, name, found)
        yield name


def model_folder(size: str, folder: Path) -> Path:
    """Returns the folder of a checkpoint; makes one of random weights, and of made-up words behind our vocabulary."""
    if size == "tiny":
        return embedded_dir()
    made, config = folder / size, SIZES[size]
    made.mkdir()
    for name in VOCABULARY_FILES:
        shutil.copy(embedded_dir() / name, made / name)
    vocabulary = json.loads((made / "encoder.json").read_text(encoding="utf-8"))
    names = (f"word{i}" for i in range(config.n_vocab - len(vocabulary)))
    free = sorted(set(range(config.n_vocab)) - set(vocabulary.values()))
    vocabulary |= dict(zip(names, free, strict=True))
    (made / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    save_gpt2_params_to_tf_ckpt(random_params(config), config.to_hparams(), made)
    return made


def make_prompts(n_prompts: int) -> list[str]:
    """Returns texts of 4 to 16 words, at most 100 characters."""
    words = [word for word in TEXT.read_text(encoding="utf-8").split() if word.isascii()]
    random = np.random.default_rng(0)
    starts, lengths = random.integers(len(words) - 16, size=n_prompts), random.integers(4, 17, size=n_prompts)
    return [" ".join(words[start : start + n])[:100] for start, n in zip(starts, lengths, strict=True)]


def rate_of_loop(generator: TextGenerator, prompts: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Times a loop over ``generate``, after one that compiles."""

    def loop() -> Iterator[str]:
        for start in range(0, len(prompts), arguments.batch_size):
            texts = prompts[start : start + arguments.batch_size]
            texts += texts[-1:] * (arguments.batch_size - len(texts))
            yield from generator.generate(texts, max_new_tokens=arguments.n_tokens, batch_size=arguments.batch_size)

    times = []
    for _ in range(2):
        start_s = time.perf_counter()
        for _ in loop():
            pass
        times.append(time.perf_counter() - start_s)
    return {"records_per_s": len(prompts) / times[1], "start_s": times[0] - times[1]}


def rate_of_job(
    engine: Engine, threads: int | None, model: Path, prompts: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Times the second half of a job; returns its rate, and the seconds until the first records."""
    start_s = time.perf_counter()
    moments: list[tuple[float, int]] = []

    def tell(n_records: int, n_tokens: int) -> None:
        if n_records:
            n_before = moments[-1][1] if moments else 0
            moments.append((time.perf_counter() - start_s, n_before + n_records))

    with tempfile.TemporaryDirectory() as out:
        summary = run(
            Generate(max_new_tokens=arguments.n_tokens),
            [prompts],
            out,
            model=model,
            threads=threads,
            part_size=PART_SIZE[prompts.stem],
            batch_size=arguments.batch_size,
            engine=engine,
            on_batch=tell,
        )
    half_s, n_half = next(moment for moment in moments if moment[1] >= HALF * summary.n_records)
    last_s, n_last = moments[-1]
    return {"records_per_s": (n_last - n_half) / (last_s - half_s), "start_s": moments[0][0], "all_s": summary.seconds}


def show(size: str, name: str, found: dict[str, Any]) -> None:
    rate, start_s, ratio = found[name]["records_per_s"], found[name]["start_s"], found[name].get("ratio", 1.0)
    goal = f" (goal {GOALS[name]}, {'reached' if ratio >= GOALS[name] else 'missed'})" if name in GOALS else ""
    print(f"{size:5} {name:28} {rate:8.1f} records/s, {ratio:.2f} x{goal}; start {start_s:.1f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    main()
