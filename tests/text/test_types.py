"""The front door is typed: mypy knows what each call returns, and refuses options that there are not."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_gpt2.generation.beam import beam_search
from tf_gpt2.generation.options import SamplingOptions
from tf_gpt2.text.conversation import Conversation
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.text.options import BeamOptions, CompletionOptions

ROOT = Path(__file__).parents[2]
PROGRAM = """
from collections.abc import Iterator

from typing_extensions import assert_type

import tf_gpt2
from tf_gpt2 import Completion, Perplexity, Score


def several() -> Iterator[str]:
    yield "To be"


def ask(generator: tf_gpt2.TextGenerator, n: int) -> None:
    assert_type(generator.generate("To be", max_new_tokens=3, temperature=0.5, seed=1, stop=["x"]), str)
    assert_type(generator.generate("To be", num_samples=2), list[str])
    assert_type(generator.generate(["To be"], seed=[1]), list[str])
    assert_type(generator.generate(several(), batch_size=3), list[str])
    assert_type(generator.generate(several(), num_samples=n), list[list[str]])

    assert_type(generator.complete("To be", prompt_lookup=True), Completion)
    assert_type(generator.complete("To be", num_samples=2), list[Completion])
    assert_type(generator.complete(("To be",), overflow="slide"), list[Completion])
    assert_type(generator.complete(several(), num_samples=2), list[list[Completion]])
    assert_type(generator.complete_many(several()), Iterator[Completion])
    assert_type(generator.complete_many(["To be"], num_samples=2, logit_bias={1: 2.0}), Iterator[list[Completion]])

    assert_type(generator.stream("To be", overflow="truncate", top_p=0.9), Iterator[str])
    assert_type(generator.beam_search("To be", num_beams=2), list[tuple[str, float]])
    assert_type(generator.beam_search(["To be"], early_stopping="never"), list[list[tuple[str, float]]])
    assert_type(generator.score("To be"), Score)
    assert_type(generator.score(["To be"], after_end_of_text=False), list[Score])
    assert_type(generator.perplexity("To be"), Perplexity)
    assert_type(tf_gpt2.TextGenerator.from_checkpoint("tiny"), tf_gpt2.TextGenerator)
"""
REFUSED = """
import tf_gpt2


def ask(generator: tf_gpt2.TextGenerator) -> None:
    generator.generate("To be", temprature=1.0)
    generator.generate("To be", temperature="hot")
    generator.complete(5)
    generator.complete_many(["To be"], stop_ids=[1])
    generator.stream("To be", num_samples=2)
    generator.stream(["To be"])
    generator.beam_search("To be", temperature=1.0)
    generator.score("To be", seed=1)
"""


def run_mypy(program, folder):
    file = folder / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "mypy", f"--config-file={ROOT / 'setup.cfg'}", str(file)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment).stdout


def test_a_type_checker_knows_what_comes_back(tmp_path):
    assert run_mypy(PROGRAM, tmp_path).startswith("Success")


def test_a_type_checker_refuses_what_there_is_not(tmp_path):
    lines = [line for line in run_mypy(REFUSED, tmp_path).splitlines() if ": error:" in line]
    refused = {int(line.split(":")[1]) for line in lines}
    asked = {n for n, line in enumerate(REFUSED.splitlines(), 1) if "    generator." in line}
    assert refused == asked


def names_of(function, *, without):
    parameters = inspect.signature(function).parameters.values()
    return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} - {without}


def test_all_options_are_named():
    complete_many = names_of(TextGenerator.complete_many, without="num_samples") | set(SamplingOptions.__annotations__)
    assert set(CompletionOptions.__annotations__) == complete_many
    assert set(BeamOptions.__annotations__) == names_of(beam_search, without="stop_ids")


@pytest.mark.parametrize("name", [name for name in vars(TextGenerator) if not name.startswith("_")])
def test_no_option_and_no_answer_is_any(name):
    assert "Any" not in str(inspect.signature(getattr(TextGenerator, name)))
    assert "Any" not in str(inspect.signature(Conversation.add))
