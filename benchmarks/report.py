"""Adds the date, the machine and the settings to a result, stores it, and compares it with a stored one."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ceiling import describe_machine
from benchmarks.processors import describe_processor


def start_report(benchmark: str, arguments: argparse.Namespace, *settings: str) -> dict[str, Any]:
    """Starts a result with the benchmark's name, the date, the machine and the arguments."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": {name: getattr(arguments, name) for name in settings},
    }


def fallen(before: Mapping[str, float], after: Mapping[str, float], margin: float) -> list[str]:
    """Describes the figures that fell by more than ``margin``, or are missing; larger figures are better."""
    missing = [f"{name}: {before[name]:.2f} -> not measured" for name in before if name not in after]
    return missing + [
        f"{name}: {before[name]:.2f} -> {after[name]:.2f}"
        for name in before
        if name in after and after[name] * (1 + margin) < before[name]
    ]


def add_against(parser: argparse.ArgumentParser) -> None:
    """Adds the two options for a comparison with a stored result, which makes the exit code 1 if a figure fell."""
    parser.add_argument("--against", type=Path, help="stored result to compare the ratios with")
    parser.add_argument("--margin", type=float, default=0.07, help="how much worse than stored is worse")


def read_stored(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Reads the stored result to compare with, if one is named; before the run, so that a bad name fails early."""
    if not arguments.against:
        return None
    try:
        return json.loads(arguments.against.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--against {arguments.against}: {error}") from error


def file_of_kind(path: Path) -> Path:
    """Returns the file of this machine's kind of processor in a folder; a path that ends in ``.json`` as it is."""
    return path if path.suffix == ".json" else path / f"{describe_processor()['kind']}.json"


def print_fallen(lines: Sequence[str], arguments: argparse.Namespace) -> int:
    """Prints the lines of ``fallen``, and returns the exit code."""
    print(f"worse than in {arguments.against} by more than {arguments.margin:.0%}: {len(lines) or 'nothing'}")
    for line in lines:
        print(f"  {line}")
    return int(bool(lines))


def store(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"stored in {path}")
