"""From a name or a folder to encoder, config and weights: every door reads what one reads."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from reference import lively_params

import tf_gpt2
from tf_gpt2 import TextGenerator, cli
from tf_gpt2.checkpoint import download
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.openai import load_gpt2_params_from_tf_ckpt, save_gpt2_params_to_tf_ckpt
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.errors import CheckpointError, DownloadError

IDS = np.array([[1, 2, 3]])


@pytest.fixture(scope="module")
def expected():
    """Logits and a text of the embedded checkpoint."""
    generator = TextGenerator.from_checkpoint(embedded_dir())
    return np.asarray(generator.model(IDS)), generator.generate("To be", max_new_tokens=5)


@pytest.fixture
def run1(tmp_path):
    """The embedded checkpoint as a folder of gpt-2-simple's kind."""
    folder = shutil.copytree(embedded_dir(), tmp_path / "checkpoints" / "run1")
    for path in folder.glob("model.ckpt.*"):
        path.rename(folder / path.name.replace("model.ckpt", "model-25541"))
    (folder / "model-25541.meta").unlink()
    text = 'model_checkpoint_path: "/content/checkpoint/run1/model-25541"\n'
    (folder / "checkpoint").write_text(text)
    return folder


def assert_same(model, expected):
    np.testing.assert_array_equal(np.asarray(model(IDS)), expected[0])


@pytest.mark.parametrize("name", ["run1", "exp[lr=0.1]", "a\\b", os.fsdecode(b"\xff")])
def test_every_door_reads_a_training_run(run1, name, expected, capsysbinary):
    folder = run1.rename(run1.with_name(name))
    models_dir = str(folder.parent)
    assert_same(TextGenerator.from_checkpoint(folder).model, expected)
    assert_same(TextGenerator.load(name, models_dir).model, expected)
    assert_same(tf_gpt2.GPT2Model.from_checkpoint(str(folder)), expected)
    encoder, hparams, params = tf_gpt2.load_encoder_hparams_and_params(name, models_dir)
    model = tf_gpt2.GPT2Model(GPT2Config.from_hparams(hparams))
    model.set_weights(params)
    assert_same(model, expected)
    assert encoder.encode("To be") == tf_gpt2.get_encoder(name, models_dir).encode("To be")
    options = ["--model_size", name, "--models_dir", models_dir, "--max_new_tokens", "5"]
    assert cli.main(["generate", "To be", *options]) == 0
    assert capsysbinary.readouterr().out.decode().rstrip("\n") == expected[1].rstrip("\n")


def test_a_model_may_be_a_name_or_a_path(run1, expected, monkeypatch):
    monkeypatch.chdir(run1.parent.parent)
    for model in ("tiny", "run1", run1, str(run1), "checkpoints/run1", "./checkpoints/run1/"):
        assert_same(TextGenerator.load(model).model, expected)
    monkeypatch.chdir(run1)
    assert_same(TextGenerator.load(".", models_dir="nowhere").model, expected)
    monkeypatch.chdir(run1.parent)
    for model in ("run1", run1.relative_to(run1.parent)):
        assert_same(TextGenerator.load(model, models_dir="nowhere").model, expected)


def test_load_gives_model_and_encoder(run1, expected):
    model, encoder = tf_gpt2.load(run1)
    assert_same(model, expected)
    assert len(encoder) == model.config.n_vocab


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_load_takes_the_dtypes_of_from_checkpoint(dtype):
    one = TextGenerator.load("tiny", dtype=dtype).model
    other = TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype).model
    np.testing.assert_array_equal(np.asarray(one(IDS)), np.asarray(other(IDS)))


def test_a_wrong_dtype_is_refused_before_a_download(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, int4, got 'float16'"):
        TextGenerator.load("124M", tmp_path, "float16")
    assert not list(tmp_path.iterdir())


def test_a_size_is_downloaded_into_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_GPT2_BASE_URL", "mirror")
    with pytest.raises(DownloadError, match="mirror/124M/checkpoint"):
        TextGenerator.load("124M", models_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["124M"]


@pytest.mark.parametrize(
    "model", ["125M", "no/such/folder", "", "..x/", None, 124, "x" * 999, "x/" * 3000, "\0", "117M"]
)
def test_no_model_is_a_checkpoint_error(model, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        TextGenerator.load(model, models_dir=tmp_path)
    assert "124M" in str(caught.value)


def test_a_downloaded_folder_opens_with_all_its_variables(tmp_path, monkeypatch, assert_same_bits):
    """What counts as complete can be read, and what cannot be read does not count as complete."""
    config = GPT2Config(n_vocab=24933, n_ctx=4, n_embd=4, n_head=2, n_layer=1)
    params = lively_params(config)
    monkeypatch.setattr(download, "SIZES", {**SIZES, "124M": config})
    save_gpt2_params_to_tf_ckpt(params, config.to_hparams(), tmp_path)
    weights = [name for name in download.FILES if name not in ("encoder.json", "vocab.bpe")]
    assert download.missing_files(tmp_path, weights, config) == []
    assert_same_bits(load_gpt2_params_from_tf_ckpt(tmp_path, config.to_hparams()), params)
    for name in weights:
        body = (tmp_path / name).read_bytes()
        for damaged in (body[:-1], b"", None):
            (tmp_path / name).unlink()
            if damaged is not None:
                (tmp_path / name).write_bytes(damaged)
            if name != "checkpoint" or damaged != body[:-1]:  # a line feed less does no harm
                assert download.missing_files(tmp_path, weights, config) == [name]
            (tmp_path / name).write_bytes(body)


# ---- numbers in files


@pytest.mark.parametrize("change", [{"n_layer": 10**9}, {"n_layer": 1000}, {"n_ctx": 1 << 24}, {"n_vocab": 2**31}])
def test_hparams_beyond_the_checkpoint_are_refused_before_a_model_is_built(run1, change):
    hparams = json.loads((run1 / "hparams.json").read_text())
    (run1 / "hparams.json").write_text(json.dumps({**hparams, **change}))
    started = time.monotonic()
    for read in (TextGenerator.from_checkpoint, tf_gpt2.GPT2Model.from_checkpoint, tf_gpt2.load):
        with pytest.raises(CheckpointError) as caught:
            read(run1)
        assert len(str(caught.value)) < 2000
    assert time.monotonic() - started < 10


def test_ids_that_the_model_lacks_are_refused(run1):
    vocabulary = json.loads((run1 / "encoder.json").read_text(encoding="utf-8"))
    last = max(vocabulary, key=vocabulary.get)
    (run1 / "encoder.json").write_text(json.dumps({**vocabulary, last: vocabulary[last] + 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"do not fit each other: .* ids up to"):
        TextGenerator.load(run1)


def test_a_keras_file_of_a_billion_layers_is_refused():
    own = tf_gpt2.GPT2Model(GPT2Config(n_vocab=300, n_ctx=4, n_embd=4, n_head=2, n_layer=1)).get_config()
    with pytest.raises(ValueError, match="n_layer must be at most 1000, got 1000000000"):
        tf_gpt2.GPT2Model.from_config({**own, "config": {**own["config"], "n_layer": 10**9}})
