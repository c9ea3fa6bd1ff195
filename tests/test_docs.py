"""The documents tell the truth: their code runs, their output is what it prints, their tables are the measured ones."""

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tf_gpt2 import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "checkpoints" / "tiny" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(path):
    """Gives ``(language, text)`` of each code block."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run_and_print_what_follows_them(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace, printed = {}, ""
    for language, text in blocks(path):
        if language == "python":
            stdout = io.StringIO()
            with contextlib.redirect_stdout(stdout):
                exec(compile(text, str(path), "exec"), namespace)
            printed = stdout.getvalue()
        elif language == "text" and printed:
            assert text == printed
            printed = ""


def test_the_readme_has_an_example_with_its_output():
    languages = [language for language, _ in blocks(ROOT / "README.md")]
    assert ("python", "text") in itertools.pairwise(languages)


def test_commands_of_the_readme_exist():
    """Parses each ``tf-gpt2`` line of the README, and looks up each ``make`` target."""
    lines = "\n".join(text for language, text in blocks(ROOT / "README.md") if not language).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [words[1:] for words in commands if words[:1] == ["tf-gpt2"]]
    targets = [words[1] for words in commands if words[:1] == ["make"]]
    assert len(ours) >= 5
    assert targets == ["run", "test"]
    for words in ours:
        cli.make_parser().parse_args(cli.with_underscores(words))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_quoted_tables_and_help_texts_are_current():
    result = subprocess.run([sys.executable, ROOT / "docs" / "renew.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
