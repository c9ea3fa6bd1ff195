"""The table of features in docs/generation.md says what each program can; each cell is looked up, or tried."""

import inspect
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tf_gpt2
from benchmarks.peers.protocol import run_prepare, write_model
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.generation.options import SamplingOptions

ROOT = Path(__file__).parents[2]
PEERS_DIR = os.environ.get("TF_GPT2_PEERS_DIR", "")
COLUMNS = {
    "keras_hub": "KerasHub",
    "huggingface": "transformers",
    "ctranslate2": "CTranslate2",
    "llama_cpp": "llama-cpp-python",
}

OURS = {
    "options per row": "temperature",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "logit_bias": "logit_bias",
    "bad words": "bad_words_ids",
    "suppress": "suppress",
    "min_new_tokens": "min_new_tokens",
    "seed": "seed",
    "beam search": "beam_search",
    "num_samples": "num_samples",
    "stop strings": "stop",
    "logprobs": "logprobs",
    "top_logprobs": "top_logprobs",
    "finish reasons": "finish_reason",
    "ragged": "prompts",
    "many prompts": "batch_size",
    "beyond the window": "overflow",
    "stream": "stream",
    "score": "score",
    "perplexity": "perplexity",
    "prompt look-up": "prompt_lookup",
    "saved model": "export_saved_model",
    "int8": "dtype",
}
"""What the workers call each row of the table, in its order, and the name that stands for it in our own interface."""


def table():
    """Gives the cells of each column by feature, and the heading of each column, without the numbers of notes."""
    document = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    lines = re.search(r"<!-- begin features -->\n(.*)<!-- end features -->", document, re.S)[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) - 2 == len(OURS)
    columns = list(zip(*(row[1:] for row in rows[2:]), strict=True))
    cells = [dict(zip(OURS, (cell.rstrip(" ⁰¹²³⁴⁵⁶⁷⁸⁹") for cell in column), strict=True)) for column in columns]
    return dict(zip(rows[0][1:], cells, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded checkpoint as the peers read it."""
    path = tmp_path_factory.mktemp("tiny")
    _, hparams, params = tf_gpt2.load_encoder_hparams_and_params("tiny", ROOT / "checkpoints")
    write_model(path, hparams, dict(leaves(params)))
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(ROOT / "checkpoints" / "tiny" / name, path)
    return path


@pytest.mark.parametrize("peer", COLUMNS)
def test_the_table_says_what_a_peer_can(peer, folder):
    python = Path(PEERS_DIR, peer, "bin", "python").absolute()
    if not PEERS_DIR or not python.exists():
        pytest.skip(f"TF_GPT2_PEERS_DIR has no {peer}; 'make bench-peers' builds it")
    if peer == "ctranslate2":
        for precision in ("float32", "int8"):
            run_prepare(python, peer, folder, precision)
    worker = Path(__file__).parent / f"features_{peer}.py"
    done = subprocess.run(
        [str(python), str(worker), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    version, more = found.pop("version"), found.pop("more")
    assert table()[f"{COLUMNS[peer]} {version}"] == found
    assert more == "yes"  # what is said below the table


def test_the_table_says_what_we_can():
    """What the options do is tested elsewhere; here, that they are there."""
    generator = tf_gpt2.TextGenerator
    functions = {name: getattr(generator, name) for name in vars(generator) if name[0] != "_"}
    names = {*functions, *(name for one in functions.values() for name in inspect.signature(one).parameters)}
    names |= {*SamplingOptions.__annotations__, *tf_gpt2.Completion.__dataclass_fields__, *tf_gpt2.__all__}
    assert table()["tf_gpt2"] == {feature: "yes" if name in names else "no" for feature, name in OURS.items()}


def test_notes_are_numbered_as_in_the_table():
    document = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    before, _, below = document.partition("<!-- end features -->")
    superscript = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    used = {int(n.translate(superscript)) for n in re.findall(r"[⁰¹²³⁴⁵⁶⁷⁸⁹]+", before)}
    assert sorted(used) == [int(n) for n in re.findall(r"^(\d+)\. ", below, re.M)] == list(range(1, len(used) + 1))
