"""The command line: what it prints where, its exit codes, and what it does not import."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tf_gpt2 import cli
from tf_gpt2.cli.files import describe_machine
from tf_gpt2.cli.options import SAMPLING_FLAGS
from tf_gpt2.runtime import kernels

TINY = ["--model_size", "tiny"]


def run(*arguments, text="", **options):
    """Runs ``tf-gpt2`` in a process of its own, in an empty folder unless told otherwise."""
    return subprocess.run(
        [sys.executable, "-m", "tf_gpt2", *arguments], input=text.encode(), capture_output=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def greedy(folder):
    return run("generate", "To be", *TINY, cwd=folder)


def test_generate_prints_the_completion_and_nothing_else(greedy):
    from tf_gpt2.checkpoint.download import embedded_dir
    from tf_gpt2.text.generator import TextGenerator

    expected = TextGenerator.from_checkpoint(embedded_dir()).generate("To be", max_new_tokens=40)
    assert greedy.returncode == 0
    assert greedy.stdout.decode() == expected + "\n"
    assert greedy.stderr == b""


def test_prompt_from_standard_input_and_samples(folder):
    options = ["--num-samples", "2", "--temperature=0.8", "--top_k", "20", "--top-p", "0.9", "--seed", "5"]
    first = run("generate", "-", *TINY, "--n-tokens-to-generate", "8", *options, text="To be", cwd=folder)
    again = run("generate", "--n_tokens_to_generate", "8", *options, *TINY, "--", "To be", cwd=folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    one, two = first.stdout.decode().split("=== sample 2 ===\n")
    assert one.startswith("=== sample 1 ===\n")
    assert one.removeprefix("=== sample 1 ===\n") != two


def test_streamed_text_is_the_same_and_stops(greedy, folder):
    streamed = run("generate", "To be", *TINY, "--stream", cwd=folder)
    assert (streamed.returncode, streamed.stdout, streamed.stderr) == (0, greedy.stdout, b"")
    samples = ["--stream", "--num_samples", "2", "--temperature", "0.9", "--stop", r"\n", "--stop", "xyz"]
    stopped = run("generate", "To be", *TINY, *samples, cwd=folder).stdout.decode().split("=== sample 2 ===\n")
    assert len(stopped) == 2
    assert stopped[0].count("\n") == 2
    assert stopped[1].count("\n") == 1


def test_one_thread_gives_the_same_text(greedy, folder):
    assert run("generate", "To be", *TINY, "--threads", "1", cwd=folder).stdout == greedy.stdout


def test_failure_is_one_line_and_no_stack_trace(folder):
    result = run("generate", "To be", "--model_size", "117M", cwd=folder)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().count("\n") == 1
    assert b"model_size='124M'" in result.stderr


def test_too_long_a_prompt_says_how_long(folder):
    result = run("generate", "-", *TINY, text="To be " * 300, cwd=folder)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().count("\n") == 1
    assert b"n_ctx=256" in result.stderr


def test_debug_shows_the_stack(folder):
    result = run("encode", "--debug", "To be", "--model_size", "117M", cwd=folder)
    assert result.returncode == 1
    assert b"Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["banana"],
        ["generate"],
        ["generate", "x", "--n_tokens_to_generate", "-1"],
        ["generate", "x", "--n_tokens_to_generate", "many"],
        ["generate", "x", "--num_samples", "0"],
        ["generate", "x", "--dtype", "float8"],
        ["generate", "x", "--threads", "0"],
        ["generate", "x", "--overflow", "wrap"],
        ["encode", "x", "--unknown"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: tf-gpt2" in capsys.readouterr().err


def test_sampling_flags_reach_generate(capfdbinary, monkeypatch):
    from tf_gpt2.text.generator import TextGenerator

    seen = {}
    monkeypatch.setattr(TextGenerator, "generate", lambda self, prompts, **options: seen.update(options) or ["text"])
    wanted = {name: kind(0.5) + 2 for name, (kind, *_) in SAMPLING_FLAGS.items()}
    wanted |= {"num_samples": 3, "seed": 7}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    assert cli.main(["generate", "To be", *TINY, *flags]) == 0
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["overflow"] == "error"


def test_too_long_a_prompt_may_be_cut_or_slid_over(capfdbinary):
    from tf_gpt2.generation.options import OVERFLOWS

    for overflow in OVERFLOWS:
        arguments = ["generate", "To be " * 300, *TINY, "--n_tokens_to_generate", "3", "--overflow", overflow]
        assert cli.main(arguments) == (overflow == "error")
        captured = capfdbinary.readouterr()
        assert bool(captured.out) == (overflow != "error")
        assert (b"overflow='truncate' or 'slide'" in captured.err) == (overflow == "error")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "-1"],
        ["--top_p", "0"],
        ["--temperature", "nan"],
        ["--min_p", "2"],
        ["--repetition_penalty", "0"],
        ["--no_repeat_ngram_size", "-1"],
    ],
)
def test_values_out_of_range_are_named(arguments, capfdbinary):
    assert cli.main(["generate", "To be", *TINY, *arguments]) == 1
    captured = capfdbinary.readouterr()
    assert captured.out == b""
    assert arguments[0][2:].encode() in captured.err


def test_encode_and_decode_are_inverse(capfdbinary):
    assert cli.main(["encode", "Where art thou?\n", *TINY]) == 0
    ids = capfdbinary.readouterr().out.decode().split()
    assert cli.main(["decode", *ids, *TINY]) == 0
    assert capfdbinary.readouterr().out == b"Where art thou?\n\n"


def test_decode_reads_standard_input_and_refuses_what_is_no_id(folder):
    ids = run("encode", "naïve — 🙂", *TINY, cwd=folder).stdout.decode()
    assert run("decode", "-", *TINY, text=ids, cwd=folder).stdout.decode() == "naïve — 🙂\n"
    result = run("decode", "1", "two", *TINY, cwd=folder)
    assert result.returncode == 1
    assert b"two" in result.stderr


def test_output_is_utf_8_in_any_locale(folder):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ids = run("encode", "-", *TINY, text="é🙂", cwd=folder, env=environment).stdout.decode().split()
    assert run("decode", *ids, *TINY, cwd=folder, env=environment).stdout == "é🙂\n".encode()


def test_info_lists_all_sizes(capfdbinary, tmp_path):
    assert cli.main(["info", "--models_dir", str(tmp_path)]) == 0
    table = capfdbinary.readouterr().out.decode()
    for word in ("tiny", "124,439,808", "354,823,168", "774,030,080", "1,557,611,200", "498 MB"):
        assert word in table
    sizes = table.partition("\n\n")[0].splitlines()
    assert [line.split()[-1] for line in sizes] == ["here", "yes", "no", "no", "no", "no"]


@pytest.mark.parametrize(
    ("choice", "why_missing", "sets", "products", "attention"),
    [
        ("", "", ("avx2", "portable"), "native, avx2", "native, avx2; of more than 8 new positions"),
        ("native", "", ("portable",), "native, portable", "native, portable; of more"),
        ("", "", ("portable",), "XLA's: the native kernels have no instruction set", "XLA's: the native kernels have"),
        ("xla", "", ("avx2", "portable"), "XLA's, as TF_GPT2_KERNELS=xla demands", "XLA's, as TF_GPT2"),
        ("", "no compiler", (), "XLA's, which are slower: no compiler", "XLA's, which are slower"),
        ("native", "no compiler", (), "none: TF_GPT2_KERNELS=native demands the kernels, and no compiler", "none"),
    ],
)
def test_info_tells_what_computes(choice, why_missing, sets, products, attention, monkeypatch):
    monkeypatch.setenv(kernels.ENV_VAR, choice)
    monkeypatch.setattr(kernels, "why_missing", lambda: why_missing)
    monkeypatch.setattr(kernels, "instruction_sets", lambda: sets)
    machine = describe_machine()
    assert machine["processor"]
    assert machine["native kernels"] == (", ".join(sets) or "none")
    assert machine["  int8, int4"].startswith(products)
    assert machine["  float32"].startswith(products)
    assert machine["  bfloat16"] == "XLA's"
    assert machine["attention"].startswith(attention)


def test_download_offline_names_the_way_out(folder, monkeypatch, capsys):
    monkeypatch.setenv("TF_GPT2_BASE_URL", "http://127.0.0.1:9/models")
    assert cli.main(["download", "355M", "--models_dir", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "http://127.0.0.1:9/models/355M/checkpoint" in message
    assert "--model_size tiny" in message


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["encode", "To be", *TINY], ["info"]])
def test_light_commands_do_not_import_tensorflow(arguments, folder):
    program = (
        "import sys, tf_gpt2, tf_gpt2.cli\n"
        "try: tf_gpt2.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'keras', 'requests'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, cwd=folder, timeout=60)
    assert result.returncode == 0, result.stderr


def test_interrupt_is_quiet(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "tf_gpt2", "generate", "-", *TINY],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also if the tests ignore it
    )
    time.sleep(1)  # it waits for the prompt
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"tf-gpt2: interrupted\n")


def test_a_reader_that_goes_away_is_no_error(folder):
    command = f"{sys.executable} -m tf_gpt2 info | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, cwd=folder, timeout=60)
    assert result.stderr == b""
