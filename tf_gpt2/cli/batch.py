"""The commands ``batch generate``, ``score``, ``embed`` and ``perplexity``: jobs over files of records.

Imports TensorFlow only when a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from tf_gpt2.cli.options import (
    Commands,
    add_generation_options,
    add_model_options,
    add_speed_options,
    add_stride_option,
    find_model,
    generation_settings,
    positive,
)
from tf_gpt2.cli.streams import Terminal, open_terminal, quiet_tensorflow, write_names
from tf_gpt2.jobs.kinds import Embed, Generate, Job, Perplexity, Score
from tf_gpt2.jobs.run import PART_SIZE, Engine, Interrupted, Summary, on_processes, run

DESCRIPTION = """Answers each record of the input files with a line of the output's. A record is a line of JSON such as
{"id": 1, "text": "To be"}, a line of text, or a row of a Parquet file; the answer to a bad one is an error."""


def add_batch(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``batch``, which has commands of its own."""
    command = commands.add_parser(
        "batch", help="answer files of many records", description="Answers files of many records; resumes; uses Spark."
    )
    jobs: Commands = command.add_subparsers(required=True, metavar="JOB")
    for name, text, add_options, make_job in (
        ("generate", "continue each text", add_generate_options, generate_job),
        ("score", "log-probability of each token", add_score_options, score_job),
        ("embed", "a vector for each text", add_embed_options, embed_job),
        ("perplexity", "how well each text is predicted", add_stride_option, perplexity_job),
    ):
        job = jobs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {DESCRIPTION}")
        job.set_defaults(run=run_batch, make_job=make_job)
        add_file_options(job)
        add_model_options(job)
        add_options(job)
        add_engine_options(job)
    return command


def add_file_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that name the files."""
    command.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or patterns: .jsonl, .txt (a record a line), both perhaps .gz, or .parquet",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="folder for the parts of the output")
    command.add_argument("--output_format", choices=("jsonl", "parquet"), default="jsonl", help="of the output's files")
    command.add_argument("--part_size", type=positive, default=PART_SIZE, metavar="N", help="most records of one part")
    command.add_argument("--resume", action="store_true", help="compute the parts that DIR lacks of the same job")


def add_engine_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that decide where to compute."""
    command.add_argument("--workers", type=positive, default=1, metavar="N", help="processes on this machine")
    command.add_argument(
        "--spark",
        metavar="URL",
        help="compute on this Spark cluster, as spark://host:7077; files are in shared folders",
    )
    command.add_argument(
        "--spark_conf", action="append", default=[], metavar="NAME=VALUE", help="a setting of Spark; repeatable"
    )
    add_speed_options(command)


def add_generate_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of ``batch generate``."""
    add_generation_options(command)
    command.add_argument(
        "--overflow",
        choices=("error", "truncate", "slide"),
        default="error",
        help="a text too long for the window: answer with an error, drop its beginning, or forget the older half",
    )
    command.add_argument("--batch_size", type=positive, default=16, metavar="N", help="texts at once; changes no text")


def add_score_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of ``batch score``."""
    command.add_argument(
        "--first_is_context", action="store_true", help="do not score the first token as one after <|endoftext|>"
    )


def add_embed_options(command: argparse.ArgumentParser) -> None:
    """Adds the options of ``batch embed``."""
    command.add_argument(
        "--pooling", choices=("mean", "last"), default="mean", help="of the last hidden states of all tokens"
    )


def generate_job(options: argparse.Namespace) -> Job:
    """Makes the job of ``batch generate``."""
    settings = generation_settings(options)
    return Generate(**{**settings, "stop": tuple(settings["stop"])}, seed=options.seed, overflow=options.overflow)


def score_job(options: argparse.Namespace) -> Job:
    """Makes the job of ``batch score``."""
    return Score(after_end_of_text=not options.first_is_context)


def embed_job(options: argparse.Namespace) -> Job:
    """Makes the job of ``batch embed``."""
    return Embed(pooling=options.pooling)


def perplexity_job(options: argparse.Namespace) -> Job:
    """Makes the job of ``batch perplexity``."""
    return Perplexity(stride=getattr(options, "stride", None))


def run_batch(options: argparse.Namespace) -> None:
    """Computes what the output lacks; shows a bar meanwhile, and prints a summary."""
    job, model = options.make_job(options), find_model(options)
    with (
        open_terminal() as terminal,
        quiet_tensorflow(show_on_error=options.debug),
        progress_bars(terminal, job) as callbacks,  # last, because tqdm starts a thread, and quiet_tensorflow forks
    ):
        try:
            summary = run(
                job,
                options.input,
                options.output,
                model=model,
                dtype=options.dtype,
                output_format=options.output_format,
                part_size=options.part_size,
                batch_size=getattr(options, "batch_size", 16),
                threads=threads_of(options),
                resume=options.resume,
                engine=engine_of(options),
                **callbacks,
            )
        except Interrupted as error:
            terminal.tell(
                f"{error.n_parts_there} of {error.n_parts} parts are there; the same command with --resume adds others"
            )
            raise
    write_names(as_lines(job, summary, options.output))


def threads_of(options: argparse.Namespace) -> int | None:
    """Returns how many cores a worker computes on: its share, if there are several on this machine."""
    if options.threads is not None or options.workers == 1 or options.spark:
        return options.threads
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, n_cores // options.workers)


def engine_of(options: argparse.Namespace) -> Engine:
    """Returns the engine that the options name."""
    if not options.spark:
        if options.spark_conf:
            raise ValueError("--spark_conf needs --spark URL")
        return on_processes(options.workers)
    if options.workers > 1:
        raise ValueError("--workers is for this machine; with --spark the cluster's executors count")
    from tf_gpt2.jobs.spark import on_spark

    settings = dict(setting.partition("=")[::2] for setting in options.spark_conf)
    return on_spark(options.spark, settings)


@contextlib.contextmanager
def progress_bars(terminal: Terminal, job: Job) -> Iterator[dict[str, Callable[..., Any]]]:
    """Shows how far a job is on standard error: first how much was read, then records, tokens/s and the time left."""
    settings: dict[str, Any] = {"file": terminal.file, "leave": False, "dynamic_ncols": True}
    with (
        tqdm(desc="Reading", unit="B", unit_scale=True, delay=1, **settings) as reading,
        contextlib.ExitStack() as stack,
    ):
        bars: list[tqdm[Any]] = []
        n_tokens = 0

        def start(n_before: int, n_records: int) -> None:
            reading.close()
            bar = tqdm(desc=job.name, unit=" records", total=n_records, initial=n_before, smoothing=0.05, **settings)
            bars.append(stack.enter_context(bar))

        def count(n_records: int, n_new: int) -> None:
            nonlocal n_tokens
            (bar,) = bars
            n_tokens += n_new
            elapsed_s = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{n_tokens / elapsed_s if elapsed_s else 0:.0f} tokens/s", refresh=False)
            bar.update(n_records)

        yield {"on_read": reading.update, "on_start": start, "on_batch": count}


def as_lines(job: Job, summary: Summary, output: str) -> str:
    """Formats a summary for people."""
    kinds = ", ".join(f"{n} {code}" for code, n in summary.errors.items())
    n_errors = sum(summary.errors.values())
    before = f", {summary.n_records - summary.n_done} answered before" if summary.n_done < summary.n_records else ""
    word = "new" if isinstance(job, Generate) else "read"
    seconds = max(summary.seconds, 1e-9)
    return (
        f"records  {summary.n_done} answered{before}\n"
        f"errors   {n_errors}{f' ({kinds})' if kinds else ''}\n"
        f"tokens   {summary.n_tokens} {word}\n"
        f"time     {summary.seconds:.1f} s: {summary.n_done / seconds:.1f} records/s, "
        f"{summary.n_tokens / seconds:.1f} tokens/s\n"
        f"output   {output}, {summary.n_parts} parts\n"
    )
