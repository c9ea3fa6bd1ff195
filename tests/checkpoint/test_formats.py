"""Every format through every door: what is saved comes back bit for bit, whole or not at all."""

import dataclasses
import json
import logging
import os
import random
import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import reference

import tf_gpt2
from tf_gpt2 import Encoder, GPT2Config, GPT2Model, TextGenerator, cli
from tf_gpt2.checkpoint import formats, keras_files
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.errors import CheckpointError
from tf_gpt2.jobs.compute import GenerateWork
from tf_gpt2.jobs.kinds import Generate
from tf_gpt2.jobs.records import Record
from tf_gpt2.text.conversation import Conversation
from tf_gpt2.text.saving import FORMATS, replacing
from tf_gpt2.tokenizer.encoder import SpecialToken

PLAIN = Encoder.from_files(embedded_dir())
CONFIG = GPT2Config(n_vocab=1030, n_ctx=20, n_embd=32, n_head=4, n_layer=2)
VARIED = dataclasses.replace(
    CONFIG,
    n_inner=24,
    activation="gelu",
    layer_norm_epsilon=1e-6,
    scale_attn_by_inverse_layer_idx=True,
    tie_word_embeddings=False,
)
IDS = np.array([[1, 2, 3]])


def make(config, **options):
    model = GPT2Model(config, **options)
    model.set_weights(reference.lively_params(config))
    return model


@pytest.fixture(scope="module")
def model():
    return make(CONFIG)


@pytest.fixture(scope="module")
def varied():
    return make(VARIED)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder per format, with the same model."""
    folder = tmp_path_factory.mktemp("saved")
    for name in FORMATS:
        tf_gpt2.save(model, PLAIN, folder / name, format=name)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_comes_back_bit_for_bit(saved, model, assert_same_bits, name):
    again, encoder = tf_gpt2.load(saved / name)
    assert_same_bits(again.get_params(), model.get_params())
    assert again.config == model.config
    assert (encoder.decoder, encoder.bpe_ranks, encoder.end_of_text) == (PLAIN.decoder, PLAIN.bpe_ranks, 1023)
    assert encoder.special_tokens == PLAIN.special_tokens


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gguf"])
def test_all_variations_come_back(varied, tmp_path, assert_same_bits, name):
    again, _ = tf_gpt2.load(tf_gpt2.save(varied, PLAIN, tmp_path / name, format=name))
    assert again.config == VARIED
    assert_same_bits(again.get_params(), varied.get_params())


def test_another_file_of_safetensors_does_not_stand_for_the_model(saved, tmp_path):
    shutil.copytree(saved / "huggingface", tmp_path / "x")
    shutil.copy(tmp_path / "x" / "model.safetensors", tmp_path / "x" / "better.safetensors")
    with pytest.raises(CheckpointError, match=r"no model at .*better\.safetensors"):
        tf_gpt2.load(tmp_path / "x" / "better.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_every_door_opens_every_format(saved, model, name):
    wanted = np.asarray(model(IDS))
    for found in (
        GPT2Model.from_checkpoint(saved / name),
        TextGenerator.load(name, saved).model,
        tf_gpt2.load(str(saved / name))[0],
    ):
        np.testing.assert_array_equal(np.asarray(found(IDS)), wanted)
    encoder, hparams, params = tf_gpt2.load_encoder_hparams_and_params(name, saved)
    assert GPT2Config.from_hparams(hparams) == CONFIG
    assert all(np.array_equal(leaf, dict(leaves(params))[path]) for path, leaf in leaves(model.get_params()))
    assert tf_gpt2.get_encoder(name, saved).encode("To be") == encoder.encode("To be") == PLAIN.encode("To be")


def test_commands_open_a_folder_or_a_file(saved, capsys):
    texts = set()
    for options in (["--model_size", name, "--models_dir", str(saved)] for name in FORMATS):
        assert cli.main(["encode", "To be", *options]) == 0
        texts.add(capsys.readouterr().out)
    assert cli.main(["encode", "To be", "--model_size", str(saved / "gguf" / "model.gguf")]) == 0
    assert texts == {capsys.readouterr().out} == {"396 304\n"}


def test_convert_goes_round_all_formats(saved, tmp_path, capsys):
    source = saved / "openai"
    for name in ("huggingface", "gguf", "keras", "openai"):
        assert cli.main(["convert", str(source), str(tmp_path / name), "--to", name]) == 0
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        source = tmp_path / name
    first, last = files_of(saved / "openai"), files_of(source)
    assert first.keys() == last.keys()
    for name in first.keys() - {"model.ckpt.meta"}:
        assert json.loads(first[name]) == json.loads(last[name]) if name.endswith("json") else first[name] == last[name]
    for name in ("huggingface", "gguf"):
        assert files_of(tmp_path / name) == files_of(saved / name)


def test_a_file_of_gguf_alone(model, tmp_path):
    made = tf_gpt2.save(model, PLAIN, tmp_path / "small.gguf", format="gguf", dtype="q8_0")
    assert [made] == list(tmp_path.iterdir())
    again, encoder = tf_gpt2.load(made)
    assert encoder.encode("To be") == PLAIN.encode("To be")
    wanted = np.asarray(model(IDS))
    assert 0 < np.abs(np.asarray(again(IDS)) - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_what_keras_saves_is_read(varied, tmp_path, options, suffix):
    model = make(VARIED, **options)
    path = tmp_path / f"my{suffix}"
    model.save(path) if suffix == ".keras" else model.save_weights(path)
    (tmp_path / "hparams.json").write_text(json.dumps(VARIED.to_hparams()))
    again = GPT2Model.from_checkpoint(path)
    for (name, wanted), (_, found) in zip(leaves(model.get_params()), leaves(again.get_params()), strict=True):
        assert np.array_equal(found, wanted.astype(np.float32)), name


def test_two_formats_in_a_folder_are_told(saved, tmp_path, model, caplog):
    shutil.copytree(saved / "huggingface", tmp_path / "both")
    shutil.copy(saved / "gguf" / "model.gguf", tmp_path / "both")
    with caplog.at_level(logging.WARNING):
        assert formats.recognize(tmp_path / "both") == ("huggingface", tmp_path / "both")
    (message,) = caplog.messages
    assert "holds a model as huggingface, gguf; takes huggingface; to choose, name a file" in message
    assert formats.recognize(tmp_path / "both" / "model.gguf")[0] == "gguf"
    assert formats.recognize(tmp_path / "both" / "model.safetensors") == ("huggingface", tmp_path / "both")


def test_what_a_format_cannot_express_is_refused_before_anything_is_written(varied, model, tmp_path):
    special, flagged, twice = (
        Encoder(PLAIN.encoder, PLAIN.bpe_ranks, special_tokens=tokens)
        for tokens in ({"word": 1024}, {"<mask>": SpecialToken(1024, lstrip=True)}, {"ab": 1024})
    )
    for arguments, options, message in [
        ((varied, PLAIN), {"format": "gguf"}, "cannot express activation='gelu'"),
        ((model, PLAIN), {"format": "onnx"}, "format must be one of openai, huggingface, keras, gguf"),
        ((model, PLAIN), {"dtype": "float16"}, "dtype must be 'float32' with format='openai'"),
        ((model, special), {}, "cannot express the special tokens"),
        ((model, special), {"format": "keras"}, "cannot express the special tokens"),
        ((model, flagged), {"format": "gguf"}, "cannot express lstrip"),
        ((model, twice), {"format": "huggingface"}, "cannot express the special tokens ab"),
        ((make(dataclasses.replace(CONFIG, n_vocab=9)), PLAIN), {}, "encoder has ids up to 1023"),
    ]:
        with pytest.raises(ValueError, match=message):
            tf_gpt2.save(*arguments, tmp_path / "x", **options)
        assert not list(tmp_path.iterdir())


def test_what_exists_is_replaced_only_when_asked(model, tmp_path):
    (tmp_path / "x").mkdir()
    tf_gpt2.save(model, PLAIN, tmp_path / "x", format="gguf")  # an empty folder is no loss
    with pytest.raises(FileExistsError, match="exists already"):
        tf_gpt2.save(model, PLAIN, tmp_path / "x", format="gguf")
    (tmp_path / "x" / "mine.txt").write_text("")
    tf_gpt2.save(model, None, tmp_path / "x", format="huggingface", overwrite=True)
    assert sorted(files_of(tmp_path / "x")) == ["config.json", "model.safetensors"]


def with_lora(**options):
    model = make(CONFIG, **options)
    model.enable_lora(2)
    for block in model.blocks:
        block.attn.c_attn.lora_b.assign(np.full(block.attn.c_attn.lora_b.shape, 0.1))
    return model


@pytest.mark.parametrize("name", ["huggingface", "keras"])
@pytest.mark.parametrize("kind", ["lora", "int8", "int4", "int8 and lora"])
def test_other_matrices_are_saved_as_the_numbers_that_they_stand_for(tmp_path, name, kind):
    options = {"quantization": kind[:4]} if kind.startswith("int") else {}
    model = with_lora(**options) if "lora" in kind else make(CONFIG, **options)
    again, _ = tf_gpt2.load(tf_gpt2.save(model, PLAIN, tmp_path / "x", format=name))
    assert again.lora is None
    np.testing.assert_allclose(np.asarray(again(IDS)), np.asarray(model(IDS)), rtol=0, atol=1e-4)


def test_what_is_there_stays_when_it_cannot_be_replaced(model, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("")
    rename = Path.rename

    def fail(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        tf_gpt2.save(model, None, tmp_path / "x", format="huggingface", overwrite=True)
    assert list(files_of(tmp_path / "x")) == ["old"]


def test_the_current_folder_and_a_pipe_as_targets(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    tf_gpt2.save(model, None, ".", format="huggingface")
    assert sorted(files_of(tmp_path / "empty")) == ["config.json", "model.safetensors"]
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FileExistsError, match="a device or a pipe"):
        tf_gpt2.save(model, None, tmp_path / "pipe.gguf", format="gguf", overwrite=True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch, name):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tf_gpt2.text.saving.with_bar", fail)
    monkeypatch.setattr(keras_files, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        tf_gpt2.save(model, PLAIN, tmp_path / "x", format=name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert list(files_of(tmp_path / "x")) == ["old"]


def test_added_tokens_beyond_the_model_are_left_out_and_told(saved, tmp_path, caplog):
    shutil.copytree(saved / "huggingface", tmp_path / "x")
    file = tmp_path / "x" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] += [{"id": 1029, "content": "<|user|>"}, {"id": 1030, "content": "[PAD]"}]
    file.write_text(json.dumps(content))
    _, encoder = tf_gpt2.load(tmp_path / "x")
    assert encoder.special_tokens.keys() == {"<|endoftext|>", "<|user|>"}
    assert "no embedding of the added tokens [PAD]" in caplog.text
    assert tf_gpt2.get_encoder("x", tmp_path).special_tokens == encoder.special_tokens


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_replaced_comes_back_when_the_last_move_fails(tmp_path, monkeypatch, is_folder):
    def write(path, text):
        if is_folder:
            path.mkdir()
        (path / "file" if is_folder else path).write_text(text)

    def fail_for_new(move):
        def moved(self, target):
            if self.name == "new":
                raise KeyboardInterrupt
            return move(self, target)

        return moved

    write(tmp_path / "x", "old")
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, fail_for_new(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x", overwrite=True) as made:
        write(made, "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "file" if is_folder else tmp_path / "x").read_text() == "old"
    with replacing(tmp_path / "x", overwrite=True) as made:
        write(made, "new")
    assert (tmp_path / "x" / "file" if is_folder else tmp_path / "x").read_text() == "new"


def test_weights_without_a_vocabulary_load_and_refuse_text(model, tmp_path):
    folder = tf_gpt2.save(model, None, tmp_path / "x", format="huggingface")
    generator = TextGenerator.load(folder)
    np.testing.assert_array_equal(np.asarray(generator.model(IDS)), np.asarray(model(IDS)))
    for ask in (generator.generate, generator.score, generator.encoder.encode):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.* pass ids"):
            ask("To be")


def test_ids_that_the_vocabulary_lacks_are_never_chosen():
    """Of the six rows without a token the logits are the largest."""
    params = reference.lively_params(CONFIG)
    params["wte"][1024:] *= 100
    model = GPT2Model(CONFIG)
    model.set_weights(params)
    generator = TextGenerator(model, PLAIN)
    assert generator.unknown_ids == [*range(1024, 1030)]
    plain = tf_gpt2.generate(model, [[1, 2]], max_new_tokens=6, jit_compile=False).ids[0]
    assert max(plain) >= 1024
    options = {"max_new_tokens": 6, "jit_compile": False}
    completions = [generator.complete("To be", **options), generator.complete("To be", temperature=2.0, **options)]
    completions.append(generator.complete("To be", suppress=[completions[0].ids[0]], **options))
    assert all(max(one.ids) < 1024 for one in completions)
    work = GenerateWork(generator, Generate(max_new_tokens=6), 1, jit_compile=False)
    (computed,) = work.compute([work.prepare(Record("a", "To be", {}))])
    assert computed.values["ids"] == completions[0].ids
    assert completions[2].ids[0] != completions[0].ids[0]
    assert "".join(generator.stream("To be", **options)) == completions[0].text
    assert generator.beam_search("To be", num_beams=2, **options)  # decodes: it has no unknown ids
    conversation = Conversation(generator, jit_compile=False)
    assert "".join(conversation.add("To be", max_new_tokens=6)) == completions[0].text


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "class"])
def test_damaged_files_of_keras_are_checkpoint_errors(saved, tmp_path, damage):
    path = tmp_path / "model.keras"
    whole = (saved / "keras" / "model.keras").read_bytes()
    if damage == "class":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps({"registered_name": "os>system", "config": {}}))
    else:
        path.write_bytes({"cut": whole[:-2000], "empty": b"", "other": b"PK\x03\x04" * 50}[damage])
    with pytest.raises(CheckpointError, match=r"model\.keras"):
        GPT2Model.from_checkpoint(path)


def test_damaged_bytes_in_keras_files_are_read_or_refused(saved, tmp_path):
    path, rng, n_refused = tmp_path / "model.keras", random.Random(1), 0
    whole = (saved / "keras" / "model.keras").read_bytes()
    for _ in range(100):
        body = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        path.write_bytes(body[: rng.choice([len(body), rng.randrange(len(body))])])
        try:
            list(keras_files.open_weights(path, keras_files.read_config(path)))
        except CheckpointError:
            n_refused += 1
    assert n_refused > 40


def test_numbers_that_keras_files_lack_are_no_zeros(saved, tmp_path):
    source = saved / "keras" / "model.keras"
    keras.saving.load_model(source).save_weights(tmp_path / "model.weights.h5")
    shutil.copy(saved / "keras" / "hparams.json", tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "r+") as store:
        shape = store["vars/0"].shape
        del store["vars/0"]
        store.create_dataset("vars/0", shape, "f4", chunks=(2, 2))  # takes no room in the file
    with pytest.raises(CheckpointError, match="wte: is compressed, or lacks numbers"):
        formats.open_weights(tmp_path)


def test_keras_files_that_refer_elsewhere_are_refused(saved, model, tmp_path):
    model.save_weights(tmp_path / "own.weights.h5")
    (tmp_path / "hparams.json").write_text(json.dumps(CONFIG.to_hparams()))
    shutil.copy(tmp_path / "own.weights.h5", tmp_path / "links.weights.h5")
    with h5py.File(tmp_path / "links.weights.h5", "a") as store:
        del store["vars/1"]
        store["vars/1"] = h5py.ExternalLink(str(tmp_path / "own.weights.h5"), "vars/1")
    with pytest.raises(CheckpointError, match="wpe: missing"):
        GPT2Model.from_checkpoint(tmp_path / "links.weights.h5")
    with pytest.raises(CheckpointError, match="must hold one file of Keras's"):
        GPT2Model.from_checkpoint(tmp_path)
