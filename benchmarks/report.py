"""What all results have in common: the date, the machine, the settings, and how they are stored."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.ceiling import describe_machine


def start_report(benchmark: str, arguments: argparse.Namespace, *settings: str) -> dict[str, Any]:
    """Begins a result: which benchmark, when, where, and with which of its arguments."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": {name: getattr(arguments, name) for name in settings},
    }


def store(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"stored in {path}")
