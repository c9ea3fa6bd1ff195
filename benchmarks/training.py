"""Measures whole steps of training: tokens per second and peak memory, beside PyTorch and KerasHub.

Each engine runs in a process and an environment of its own, one after the other, all in each round; its rate is that
of its fastest step, the ratio to another's is taken within a round, and the median of the rounds counts. Results are
stored per kind of processor: a run replaces what its own kind has.

    python -m benchmarks.environments huggingface keras_hub
    python -m benchmarks.training
    python -m benchmarks.training --cells "6x384 8x256" --dtypes float32 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environments import PEERS_DIR
from benchmarks.peers.protocol import ROOT
from benchmarks.report import start_report

RESULTS = Path(__file__).parent / "results" / "training.json"
SMALL = {"n_vocab": 8192, "n_ctx": 256, "n_embd": 384, "n_head": 6, "n_layer": 6}
MODEL = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
CELLS = {
    "124M 2x256": {**MODEL, "batch": 2, "length": 256},
    "124M 4x64": {**MODEL, "batch": 4, "length": 64},
    "6x384 8x256": {**SMALL, "batch": 8, "length": 256},
}
ENGINES: dict[str, dict[str, Any]] = {
    "tf_gpt2": {},
    "tf_gpt2 remat": {"remat": True},
    "tf_gpt2 lora": {"lora_rank": 8},
    "huggingface": {},
    "keras_hub": {"jit_compile": False},
    "keras_hub jit": {"jit_compile": True},
}
PYTHONS = {name: PEERS_DIR / name / "bin" / "python" for name in ("huggingface", "keras_hub")}


def main() -> None:
    arguments = parse_arguments()
    report = start_report("training", arguments, "rounds", "steps", "threads")
    cells = {}
    for cell in arguments.cells:
        for dtype in arguments.dtypes:
            rounds = [run_round(cell, dtype, arguments) for _ in range(arguments.rounds)]
            cells[f"{cell} {dtype}"] = summary(rounds, CELLS[cell])
            print_cell(f"{cell} {dtype}", cells[f"{cell} {dtype}"])
            keep(report, cells, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="model, rows x length")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine runs")
    parser.add_argument("--steps", type=int, default=5, help="steps that count, behind two that do not")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def run_round(cell: str, dtype: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs each engine once."""
    return {engine: run(engine, cell, dtype, arguments) for engine in arguments.engines}


def run(engine: str, cell: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one engine in a process of its own.

    Raises:
        RuntimeError: when it fails, or its loss does not fall.
    """
    name = engine.partition(" ")[0]
    job = {**CELLS[cell], **ENGINES[engine], "bfloat16": dtype == "bfloat16", "first": 2}
    job |= {"steps": arguments.steps, "threads": arguments.threads}
    python = str(PYTHONS.get(name, sys.executable))
    command = [python, "-m", "benchmarks.peers.training", name, json.dumps(job)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{engine}, {cell}, {dtype}:\n{done.stderr[-2000:]}")
    reply = json.loads(done.stdout)
    if not reply["losses"][-1] < reply["losses"][0]:
        raise RuntimeError(f"{engine}, {cell}, {dtype}: the loss did not fall: {reply['losses']}")
    return reply


def summary(rounds: list[dict[str, dict[str, Any]]], cell: dict[str, int]) -> dict[str, Any]:
    """Returns each engine's rate, its memory, and by how much the first engine is faster."""
    n_tokens = cell["batch"] * cell["length"]
    engines = {}
    for engine in rounds[0]:
        ratios = [
            min(found[engine]["step_s"]) / min(found["tf_gpt2"]["step_s"]) for found in rounds if "tf_gpt2" in found
        ]
        engines[engine] = {
            "tokens_per_s": n_tokens / median(min(found[engine]["step_s"]) for found in rounds),
            "peak_bytes": max(found[engine]["peak_bytes"] for found in rounds),
            "ours_is_faster_by": median(ratios) if ratios else None,
            "versions": rounds[0][engine]["versions"],
        }
    return engines


def print_cell(name: str, engines: dict[str, Any]) -> None:
    """Prints a line per engine."""
    print(name)
    for engine, found in engines.items():
        rate, memory = found["tokens_per_s"], found["peak_bytes"] / 1e9
        print(f"  {engine:14} {rate:8.0f} tokens/s {memory:6.2f} GB   ours is {found['ours_is_faster_by'] or 0:.2f} x")
    sys.stdout.flush()


def keep(report: dict[str, Any], cells: dict[str, Any], path: Path) -> None:
    """Writes the cells so far under the kind of processor; other cells of earlier runs stay."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kind = report["machine"]["kind"]
    before = stored.get(kind, {}).get("cells", {})
    stored[kind] = {**report, "cells": {**before, **cells}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
