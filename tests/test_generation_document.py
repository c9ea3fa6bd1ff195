"""docs/generation.md: its commands print what it says, what it says of compiling holds. Its examples: ``test_docs``."""

import re
import shlex
from pathlib import Path

import pytest
from counting import count_traces

from tf_gpt2 import GPT2Model, beam_search, cli, generate
from tf_gpt2.generation import beam, loop
from tf_gpt2.generation.options import RULES, SamplingOptions

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


def test_commands_print_what_follows_them(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```console\n\$ tf-gpt2 (.*?)\n(.*?)^```$", DOCUMENT, re.S | re.M)
    assert blocks
    for command, output in blocks:
        assert cli.main(shlex.split(command)) == 0
        assert capfd.readouterr().out == output


def test_commands_in_the_text_exist():
    commands = re.findall(r"`tf-gpt2 ([^`]*)`", DOCUMENT)
    assert commands
    for command in commands:
        cli.make_parser().parse_args(cli.with_underscores(shlex.split(command)))


def test_all_options_are_in_the_table_with_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\d*)", DOCUMENT, re.M)
    assert sorted(name for name, _ in rows) == sorted(SamplingOptions.__annotations__)
    defaults = {name: float(default) for name, default in rows if default}
    assert defaults == {name: rule.default for name, rule in RULES.items()}


@pytest.fixture(scope="module")
def traces(odd_config):
    """Gives ``traces(**options)``: how many functions a call compiles anew; a plain graph, as traces are the same."""
    model = GPT2Model(odd_config)
    functions = (loop.prefill, loop.decode, beam.prefill, beam.decode)

    def count(prompts=((1, 2, 3),), max_new_tokens=5, function=generate, **options):
        before = count_traces(model, *functions)
        function(model, prompts, max_new_tokens=max_new_tokens, jit_compile=False, **options)
        return count_traces(model, *functions) - before

    count()
    return count


def test_what_compiles_nothing(traces):
    for prompt in ([4], [5] * 11):
        assert traces([prompt]) == 0
    assert traces(max_new_tokens=13) == 0
    drawn = {"temperature": 0.9, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9, "seed": 4}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1, "min_new_tokens": 2}
    bans = {"no_repeat_ngram_size": 2, "logit_bias": {1: 2.0}, "suppress": [7], "bad_words_ids": [[1, 2, 3, 4], [5]]}
    assert traces(**drawn, **penalties, **bans) == 0
    assert traces(stop_ids=range(8), is_complete=lambda ids: len(ids) > 2) == 0


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"prompts": [[1], [2]]}, {"prompts": [[3], [4, 5]]}),
        ({"prompts": [[1] * 17]}, {"prompts": [[1] * 20]}),
        ({"max_new_tokens": 31}, {"max_new_tokens": 37}),
        ({"num_samples": 2}, {"num_samples": 2, "seed": 5}),
        ({"num_samples": 3}, {"num_samples": 3}),
        ({"top_logprobs": 1}, {"top_logprobs": 8}),
        ({"top_logprobs": 9}, {"top_logprobs": 16}),
        ({"stop_ids": range(9)}, {"stop_ids": range(16)}),
        ({"bad_words_ids": [[1, i] for i in range(9)]}, {"bad_words_ids": [[1, i] for i in range(16)]}),
        ({"bad_words_ids": [[1, 2, 3, 4, 5]]}, {"bad_words_ids": [[1] * 8]}),
        ({"function": beam_search, "num_beams": 2}, {"function": beam_search, "num_beams": 2, "length_penalty": 2.0}),
        ({"function": beam_search, "num_beams": 3}, {"function": beam_search, "num_beams": 3}),
    ],
)
def test_what_compiles_anew_but_only_once(traces, options, again):
    assert traces(**options) > 0
    assert traces(**again) == 0
