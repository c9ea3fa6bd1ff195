"""The documents tell the truth: their code runs, their output is what it prints, their tables are the measured ones."""

import configparser
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
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "checkpoints" / "tiny" / "README.md",
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(path):
    """Returns ``(language, text)`` of each code block."""
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


def test_make_targets_that_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in DOCUMENTS:
        for target in re.findall(r"`make ([a-z][a-z-]*)", path.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.M), f"{path.name}: make {target}"


def headings(path):
    """Returns the anchors of a document's headings, as GitHub makes them."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    lines = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                file = path.parent / target if target else path
                assert file.exists(), f"{path.name}: {target}"
                assert not anchor or anchor in headings(file), f"{path.name}: {target}#{anchor}"


PLACE = re.compile(r"((?:`\w+`(?:, | and )?)+) in \[[^]]+\.py\]\(([^)]+)\)(?: and \[[^]]+\]\(([^)]+)\))?")


def test_functions_are_where_documents_say():
    """Looks up each "`name` in [file](path)"."""
    n_found = 0
    for path in DOCUMENTS:
        for names, *files in PLACE.findall(path.read_text(encoding="utf-8")):
            for name, file in itertools.product(re.findall(r"\w+", names), filter(None, files)):
                source = (path.parent / file).read_text(encoding="utf-8")
                assert re.search(rf"^\s*def {name}\(|^{name} =", source, re.M), f"{path.name}: {name} in {file}"
                n_found += 1
    assert n_found >= 15


@pytest.mark.parametrize("name", ["causal_mask", "choose", "int8_product"])
def test_the_readme_leads_to_what_people_look_for(name):
    assert any(name in names for names, *_ in PLACE.findall((ROOT / "README.md").read_text(encoding="utf-8")))


def test_tests_that_documents_name_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"\]\((tests/[^)]+\.py)\)((?:, `test_\w+`)+)", text)
    assert len(rows) >= 10
    for file, names in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert f"def {name}(" in source, f"{name} in {file}"


def test_the_readme_names_the_versions_that_are_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    options = setup["options"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", options["python_requires"]).groups()
    pins = dict(re.findall(r"^(tensorflow|keras)>=(\d+\.\d+),<", options["install_requires"], re.M))
    named = f"Python 3.{low} to 3.{int(high) - 1}, TensorFlow {pins['tensorflow']}, Keras {pins['keras']}."
    assert named in (ROOT / "README.md").read_text(encoding="utf-8")


def test_quoted_tables_and_help_texts_are_current():
    result = subprocess.run([sys.executable, ROOT / "docs" / "renew.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
