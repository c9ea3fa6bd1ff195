"""Text-level scores and perplexity on the embedded checkpoint, and the command that prints it."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import reference

from tf_gpt2 import cli
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.text.perplexity import Perplexity
from tf_gpt2.tokenizer.encoder import Encoder

HELD_OUT = """\
As shall with either part's agreement stand?

BAPTISTA:
Not in my house, Lucentio; for, you know,
Pitchers have ears, and I have many servants:
Besides, old Gremio is hearkening still;
And happily we might be interrupted.

TRANIO:
Then at my lodging, an it like you:
There doth my father lie; and there, this night,
We'll pass the business privately and well.
Send for your daughter by your servant here:
My boy shall fetch the scrivener presently.
The worst is this, that, at so slender warning,
You are like to have a thin and slender pittance.
"""
"""From the part of the text that the embedded checkpoint was not trained on."""

TINY = ["--model_size", "tiny"]


@pytest.fixture(scope="module")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_bytes(HELD_OUT.encode())
    return tmp_path / "text.txt"


# ---- score


def test_scores_are_those_of_the_reference_after_the_end_of_a_text(generator):
    texts = ["To be, or not to be", "", "naïve 🙂"]
    encoder, params = generator.encoder, generator.model.get_params()
    for text, one in zip(texts, generator.score(texts), strict=True):
        ids = [encoder.end_of_text, *encoder.encode(text)]
        log_probs = reference.log_softmax(reference.forward(params, ids, n_head=5))
        expected = [log_probs[i, ids[i + 1]] for i in range(len(ids) - 1)]
        assert one.ids == ids[1:]
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)
        assert one.total == pytest.approx(sum(expected), abs=1e-3)


def test_a_score_for_a_text_and_a_list_for_a_list(generator):
    alone = generator.score("To be")
    assert generator.score(["To be"]) == [alone]
    assert generator.score(("To be",)) == [alone]
    assert generator.score([]) == []


def test_the_first_token_may_be_context_only(generator):
    scored, given = generator.score("To be, or"), generator.score("To be, or", after_end_of_text=False)
    assert math.isnan(given.logprobs[0])
    assert given.total == pytest.approx(sum(given.logprobs[1:]))
    assert abs(given.logprobs[1] - scored.logprobs[1]) > 1e-3  # nothing before it


def test_likelier_text_scores_higher(generator):
    likely, unlikely = generator.score(["KING RICHARD III:\nWhat", "KING RICHARD III:\nzxq"])
    assert likely.total > unlikely.total


def test_what_cannot_be_scored_is_refused(generator, monkeypatch):
    with pytest.raises(ContextLengthError, match="sequence 1 has 300 tokens, the window is n_ctx=256"):
        generator.score(["a", "!" * 300])
    for texts in (5, None, [5], [b"To be"]):
        with pytest.raises(TypeError):
            generator.score(texts)
    monkeypatch.setattr(Encoder, "end_of_text", None)
    with pytest.raises(ValueError, match="after_end_of_text must be False"):
        generator.score("To be")
    assert generator.score("To be", after_end_of_text=False).ids


# ---- perplexity


@pytest.mark.parametrize("stride", [None, 100, 256])
def test_perplexity_is_that_of_a_plain_loop(generator, stride):
    text = HELD_OUT * 2
    params, ids, nll, scored_to, n_scored = generator.model.get_params(), generator.encoder.encode(text), 0.0, 0, 0
    for begin in range(0, len(ids), stride or 128):
        window = ids[begin : begin + 256]
        log_probs = reference.log_softmax(reference.forward(params, window, n_head=5))
        for i in range(max(scored_to, begin + 1), begin + len(window)):
            nll, n_scored = nll - log_probs[i - 1 - begin, ids[i]], n_scored + 1
        scored_to = begin + len(window)
        if scored_to == len(ids):
            break
    found = generator.perplexity(text, stride=stride)
    counts = {"n_tokens": len(ids), "n_scored": n_scored, "n_words": len(text.split()), "n_bytes": len(text.encode())}
    assert dataclasses.asdict(found) == {**counts, "nll": found.nll, "window": 256, "stride": stride or 128}
    assert found.nll == pytest.approx(nll, abs=0.01)
    assert found.per_token == pytest.approx(math.exp(nll / n_scored), rel=1e-4)
    assert found.per_word == pytest.approx(math.exp(nll / counts["n_words"]), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / counts["n_bytes"], rel=1e-4)


def test_the_embedded_checkpoint_predicts_as_well_as_its_readme_says(generator):
    assert 1.9 < generator.perplexity(HELD_OUT).bits_per_byte < 2.45  # 2.17 on all that was held out


@pytest.mark.parametrize(
    ("dtype", "bound", "kernels"), [("int8", 0.003, ""), ("int4", 0.03, ""), ("int4", 0.03, "xla")]
)
def test_rounding_costs_few_bits_per_byte(generator, dtype, bound, kernels, monkeypatch):
    monkeypatch.setenv("TF_GPT2_KERNELS", kernels)
    rounded = TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype).perplexity(HELD_OUT)
    assert abs(rounded.bits_per_byte / generator.perplexity(HELD_OUT).bits_per_byte - 1) < bound


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_weights_predict_about_as_well(generator, dtype):
    smaller = TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype).perplexity(HELD_OUT, jit_compile=False)
    assert smaller.per_token == pytest.approx(generator.perplexity(HELD_OUT).per_token, rel=0.01)
    assert smaller.per_token != generator.perplexity(HELD_OUT).per_token


def test_extreme_figures_are_no_error():
    assert Perplexity(3, 2, 1, 3, nll=5000.0, window=8, stride=4).per_token == math.inf
    assert math.isnan(Perplexity(3, 2, 0, 3, nll=5.0, window=8, stride=4).per_word)


def test_short_texts_and_wrong_strides_are_refused(generator):
    for text in ("", "a"):
        with pytest.raises(ValueError, match="a text must have at least 2 tokens"):
            generator.perplexity(text)
    for stride in (0, 257, 1.5):
        with pytest.raises(ValueError, match=r"stride must be an integer in \[1, n_ctx=256\]"):
            generator.perplexity(HELD_OUT, stride=stride)
    with pytest.raises(TypeError, match="text must be a str"):
        generator.perplexity([HELD_OUT])


def test_bytes_are_those_of_what_was_scored(generator):
    found = generator.perplexity("é \ud83d 🙂", jit_compile=False)  # a lone surrogate is read as U+FFFD
    assert found.n_bytes == len("é \ufffd 🙂".encode())


# ---- commands


def test_the_command_prints_figures_on_stdout_and_a_bar_on_stderr(generator, file):
    command = [sys.executable, "-m", "tf_gpt2", "perplexity", "-", *TINY, "--stride=64"]
    result = subprocess.run(command, input=HELD_OUT.encode(), capture_output=True, timeout=300, cwd=file.parent)
    expected = generator.perplexity(HELD_OUT, stride=64)
    assert result.returncode == 0, result.stderr
    out = result.stdout.decode()
    assert f"perplexity     {expected.per_token:.4f}"[:20] in out
    assert f"bits per byte  {expected.bits_per_byte:.4f}" in out
    assert f"{expected.n_tokens} tokens ({expected.n_tokens - 1} scored)" in out
    assert "window 256, stride 64" in out
    bar = result.stderr.decode()
    assert f"{expected.n_scored}/{expected.n_scored}" in bar
    assert "tensorflow" not in bar.lower()
    assert "\n" not in bar.strip("\n\r ")


def test_the_command_prints_json_for_a_machine(generator, file, capfdbinary):
    assert cli.main(["perplexity", str(file), *TINY, "--json", "--dtype", "int8"]) == 0
    found = json.loads(capfdbinary.readouterr().out)
    assert found["n_bytes"] == len(HELD_OUT)
    assert found["bits_per_byte"] == pytest.approx(generator.perplexity(HELD_OUT).bits_per_byte, rel=0.01)
    assert (found["window"], found["stride"]) == (256, 128)


def test_what_no_number_says_is_null(tmp_path, capfdbinary):
    (tmp_path / "blank.txt").write_text(" \n \n")
    assert cli.main(["perplexity", str(tmp_path / "blank.txt"), *TINY, "--json"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["per_word"] is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"To be\xff or", [], b"FILE must be text in UTF-8"),
        (b"To be\xff or", [], b"0xff at 5"),
        (b"", [], b"at least 2 tokens, got 0"),
        (b"To be", ["--stride", "257"], b"stride must be an integer in [1, n_ctx=256], got 257"),
        (None, [], b"No such file"),
    ],
)
def test_failures_are_one_line(content, options, message, tmp_path, capfdbinary):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert cli.main(["perplexity", str(tmp_path / "text.txt"), *TINY, *options]) == 1
    captured = capfdbinary.readouterr()
    assert captured.out == b""
    assert message in captured.err.splitlines()[-1]


def test_explain_writes_a_page(tmp_path, capfdbinary):
    assert cli.main(["explain", "To be", "--out", str(tmp_path / "page.html"), *TINY]) == 0
    assert b"<!DOCTYPE html>" in (tmp_path / "page.html").read_bytes()
    assert cli.main(["explain", "To be", "--out", str(tmp_path / "page.pdf"), *TINY]) == 1
    assert b"out must end in .html, .htm, .png, got" in capfdbinary.readouterr().err
    assert cli.main(["explain", "!" * 300, "--out", str(tmp_path / "other.html"), *TINY]) == 1
    assert b"300 tokens, the most to explain is 255" in capfdbinary.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("arguments", [["perplexity"], ["perplexity", "x", "--stride", "0"], ["explain", "x"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
