"""Renews what the documents quote: help texts and tables of measurements. ``--check`` only says what is out of date."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

COMMAND_LINE = """# Command line

`-` and `_` are the same in the names of options. Exit codes: 0, 1 for a failure (one line on standard error; `--debug`
shows the stack), 2 for wrong usage, 130 after Ctrl-C. `python -m tf_gpt2` is the same program.
"""


def main() -> int:
    """Renews the documents; with ``--check`` gives 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in renewed().items() if not is_current(path, text)}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is out of date" if check else f"renewed {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


def renewed() -> dict[Path, str]:
    """Gives each document's text as it should be."""
    sections = {"generation": generation_table(), "tokenizer": tokenizer_table()}
    documents = {path: fill(path, sections) for path in (ROOT / "README.md", ROOT / "docs" / "performance.md")}
    return {**documents, ROOT / "docs" / "command_line.md": command_line()}


def is_current(path: Path, text: str) -> bool:
    """Says whether a document is there and says what it should."""
    return path.is_file() and path.read_text(encoding="utf-8") == text


def fill(path: Path, sections: dict[str, str]) -> str:
    """Puts each section between its marks."""
    text = path.read_text(encoding="utf-8")
    for name, section in sections.items():
        marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        text = re.sub(
            f"{marks[0]}.*?{marks[1]}", lambda _, s=section, m=marks: f"{m[0]}\n{s}\n{m[1]}", text, flags=re.S
        )
    return text


def command_line() -> str:
    """Gives the help text of each command."""
    os.environ["COLUMNS"] = "100"
    from tf_gpt2.cli import make_parser

    parser = make_parser()
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    parts = [f"## {name}\n\n```text\n{command.format_help().rstrip()}\n```\n" for name, command in commands.items()]
    return "\n".join([COMMAND_LINE, *parts])


def load(name: str) -> dict[str, Any]:
    """Reads one result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def generation_table() -> str:
    """Gives the table of decode and prefill speeds, with machine and date."""
    result = load("generation")
    settings, machine = result["settings"], result["machine"]
    lines = [
        "| | pages | decode, tokens/s | × Hugging Face | of the ceiling | prefill, tokens/s | compile, s | peak, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pages, measured in result["pages"].items():
        for name, peer in measured["peers"].items():
            ratio = measured["ratio_to_huggingface"]["decode"] if name == "tf_gpt2" else 1.0
            lines.append(
                f"| {name} | {pages} | {median(peer['decode_tokens_per_s']):.1f} | {ratio:.2f} "
                f"| {measured['share_of_ceiling'][name]:.0%} | {median(peer['prefill_tokens_per_s']):.0f} "
                f"| {peer['compile_s']:.1f} | {peer['peak_bytes'] / 1e9:.2f} |"
            )
    lines.append(
        f"\n{settings['size']} shapes, random float32 weights, batch {settings['batch']}, {settings['prompt']} prompt "
        f"tokens and {settings['new']} new, {result['threads']} threads, medians of {settings['repetitions']}; "
        f"{machine['cpu']}, {machine['n_cores']} cores, {result['date'][:10]}."
    )
    return "\n".join(lines)


def tokenizer_table() -> str:
    """Gives the table of encoding speeds, with machine and date."""
    result = load("tokenizer")
    names = {"encoder_warm": "tf_gpt2, warm", "encoder_cold": "tf_gpt2, cold", "tiktoken": "tiktoken"}
    rows = [
        f"| {label} | {result['median_mb_per_s'][name]:.1f} | {result['ratio_to_tiktoken'].get(name, 1.0):.2f} |"
        for name, label in names.items()
    ]
    return "\n".join(
        [
            "| one thread | MB/s | × tiktoken |",
            "|---|---|---|",
            *rows,
            f"\n{result['text']['n_bytes'] / 1e6:.1f} MB of English ({result['text']['source']}); "
            f"{result['machine']['cpu']}, {result['date'][:10]}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
