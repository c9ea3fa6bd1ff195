"""What ``export_saved_model`` and ``tf-gpt2 export`` leave on the disk."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
import reference
import tensorflow as tf
from reference import lively_params

from tf_gpt2 import Encoder, GPT2Config, GPT2Model, TextGenerator, export_saved_model
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.cli import main
from tf_gpt2.errors import ParamsError
from tf_gpt2.serving import export
from tf_gpt2.tokenizer.encoder import bytes_to_unicode

SIGNATURES = {"serving_default", "generate", "generate_ids", "next", "score", "embed", "logits", "encode", "decode"}
TWINS = {f"{name}_xla" for name in SIGNATURES - {"encode", "decode"}}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    generator = TextGenerator.from_checkpoint(embedded_dir(), dtype="int8")
    return export_saved_model(generator, tmp_path_factory.mktemp("int8"), version=7, max_new_tokens=5)


@pytest.fixture
def fails_at_the_end(monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "trace_signatures", lambda *_: {})
    monkeypatch.setattr(export, "write_assets", fail)


@pytest.fixture
def few_signatures(monkeypatch):
    """Exports have a signature that is traced soon, and needs no weights."""
    trace = export.ServedFunctions.signatures
    monkeypatch.setattr(export.ServedFunctions, "signatures", lambda self: {"encode": trace(self)["encode"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_exported(value, tmp_path):
    generator = TextGenerator.from_checkpoint(embedded_dir())
    bias = generator.model.blocks[1].mlp.c_fc.b
    bias.assign(tf.concat([bias.value[:-1], [value]], axis=0))
    with pytest.raises(ParamsError, match=r"h1/.*c_fc/b holds NaN or infinity"):
        export_saved_model(generator, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_other_architectures_are_served_as_python_computes_them(monkeypatch, tmp_path):
    """All that may differ from OpenAI's at once; the largest logits are those of ids without a token."""
    vocabulary = {symbol: i for i, symbol in enumerate(bytes_to_unicode().values())}
    config = GPT2Config(
        n_vocab=260,
        n_ctx=24,
        n_embd=12,
        n_head=3,
        n_layer=2,
        n_inner=17,
        activation="gelu",
        layer_norm_epsilon=0.01,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    )
    params = lively_params(config)
    params["lm_head"][256:] *= 100
    model = GPT2Model(config)
    model.set_weights(params)
    generator = TextGenerator(model, Encoder(vocabulary, []))
    trace = export.ServedFunctions.signatures

    def few(self):
        return {name: one for name, one in trace(self).items() if name.startswith(("serving_default", "logits"))}

    monkeypatch.setattr(export.ServedFunctions, "signatures", few)
    served = tf.saved_model.load(
        export_saved_model(generator, tmp_path / "export", max_new_tokens=8, xla=True, warm_up="none")
    )
    prompts, ids = ["To be", "or"], np.array([[1, 2, 3, 4]], np.int32)
    wanted = generator.generate(prompts, max_new_tokens=8, jit_compile=False)
    logits = reference.logits(ids[0], params, config.n_head, **architecture(config))
    for suffix in ("", "_xla"):
        found = served.signatures[f"serving_default{suffix}"](text=tf.constant(prompts))
        assert [text.decode() for text in found["text"].numpy()] == wanted
        found = served.signatures[f"logits{suffix}"](ids=tf.constant(ids), lengths=tf.constant([4]))
        np.testing.assert_allclose(found["logits"][0], logits, atol=2e-5 * np.abs(logits).max())


def architecture(config):
    names = ("activation", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    return {name: getattr(config, name) for name in names}


def read_manifest(folder):
    return json.loads((folder / "assets" / "manifest.json").read_text())


def test_assets_are_the_checkpoint_s(exported, generator):
    assets = exported / "assets"
    assert GPT2Config.from_file(assets / "hparams.json") == generator.model.config
    encoder = Encoder.from_files(assets)
    assert encoder.encoder == generator.encoder.encoder
    assert encoder.bpe_ranks == generator.encoder.bpe_ranks


def test_the_manifest_says_what_it_is(exported, quantized, generator):
    manifest = read_manifest(exported)
    assert manifest["tensorflow"] == tf.__version__
    assert manifest["dtype"] == "float32"
    assert manifest["n_params"] == generator.model.config.n_params
    assert set(manifest["signatures"]) == SIGNATURES | TWINS
    for name in ("hparams.json", "encoder.json", "vocab.bpe"):
        content = (exported / "assets" / name).read_bytes()
        assert manifest["sha256"][name] == hashlib.sha256(content).hexdigest()
    other = read_manifest(quantized)
    assert (other["dtype"], other["max_new_tokens"]) == ("int8", 5)
    assert other["sha256"]["vocab.bpe"] == manifest["sha256"]["vocab.bpe"]
    assert other["sha256"]["weights"] != manifest["sha256"]["weights"]


def test_signatures_are_as_a_server_wants_them(exported):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    (graph,) = saved.meta_graphs
    assert list(graph.meta_info_def.tags) == ["serve"]
    signatures = {name: one for name, one in graph.signature_def.items() if name != "__saved_model_init_op"}
    assert set(signatures) == SIGNATURES | TWINS
    for name, one in signatures.items():
        assert one.method_name == "tensorflow/serving/predict"
        for tensor in (*one.inputs.values(), *one.outputs.values()):
            assert tensor.tensor_shape.dim[0].size == -1, name
        assert one.inputs.keys() - one.defaults.keys() <= {"text", "ids", "lengths"}
    assert signatures["serving_default"].inputs.keys() == {"text"}
    assert signatures["serving_default"].outputs.keys() == {"text"}
    for name in SIGNATURES - {"encode", "decode"}:
        assert signatures[name].inputs.keys() == signatures[f"{name}_xla"].inputs.keys()
        assert signatures[name].outputs.keys() == signatures[f"{name}_xla"].outputs.keys()
    assert signatures["generate"].defaults["max_new_tokens"].int_val == [12]
    assert signatures["generate"].defaults["top_p"].float_val == [1]


def test_8_bit_weights_stay_8_bit(quantized, exported, generator):
    def weights_bytes(folder):
        return (folder / "variables" / "variables.data-00000-of-00001").stat().st_size

    n_params = generator.model.config.n_params
    assert weights_bytes(exported) > 4 * n_params
    assert weights_bytes(quantized) < 1.2 * n_params
    text = tf.constant(["To be", "ROMEO:"])
    loaded = tf.saved_model.load(quantized)
    found = loaded.signatures["serving_default"](text=text)["text"].numpy()
    python = TextGenerator.from_checkpoint(embedded_dir(), dtype="int8")
    assert [one.decode() for one in found] == python.generate(["To be", "ROMEO:"], max_new_tokens=5)


def test_a_version_is_not_replaced_unasked(exported, generator):
    before = read_manifest(exported)
    with pytest.raises(FileExistsError, match=r"version 1 exists already: .*overwrite"):
        export_saved_model(generator, exported.parent)
    assert read_manifest(exported) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_an_interrupted_export_leaves_nothing(is_there, fails_at_the_end, generator, tmp_path):
    target = tmp_path / "gpt2" / "3"
    if is_there:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(generator, tmp_path / "gpt2", version=3, overwrite=True)
    assert [path.name for path in (tmp_path / "gpt2").iterdir()] == ["3"] * is_there
    assert not is_there or (target / "old").read_text() == "old"


def test_a_new_version_takes_the_old_ones_place_whole(tmp_path):
    target = tmp_path / "2"
    target.mkdir()
    (target / "old").write_text("old")
    with export.new_folder(target, overwrite=True) as made:
        assert (target / "old").exists()
        assert not made.name.isdigit()
        assert made.parent.parent == tmp_path  # the same file system, and no name that a server takes for a version
        assert made.parent.name.startswith(".")
        (made / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_version_that_was_made_meanwhile_is_not_replaced_unasked(tmp_path):
    target = tmp_path / "2"
    message = "version 2 exists already"
    with pytest.raises(FileExistsError, match=message), export.new_folder(target, overwrite=False) as made:
        (made / "new").write_text("new")
        target.mkdir()
        (target / "other").write_text("other")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [target]


def leave_over(parent, name, days=2.0):
    """Makes what a killed export leaves, as old as that."""
    (parent / name / "new" / "variables").mkdir(parents=True)
    (parent / name / "new" / "variables" / "weights").write_text("many")
    then = time.time() - days * 86400
    os.utime(parent / name, (then, then))


def test_what_killed_exports_left_is_removed_after_a_day(tmp_path):
    leave_over(tmp_path, ".1-ab_d1234")
    leave_over(tmp_path, ".27-abcd")
    leave_over(tmp_path, ".2-abcd1234", days=0.9)
    leave_over(tmp_path, ".mine-abcd1234")
    leave_over(tmp_path, "1")
    leave_over(tmp_path, "1-abcd1234")
    (tmp_path / ".3-abcd1234").write_text("a file")
    (tmp_path / ".4-abcd1234").symlink_to(tmp_path / "1")
    with export.new_folder(tmp_path / "5", overwrite=False):
        pass
    kept = {".2-abcd1234", ".mine-abcd1234", "1", "1-abcd1234", ".3-abcd1234", ".4-abcd1234", "5"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_only_copy_of_a_version_is_not_removed(tmp_path):
    leave_over(tmp_path, ".1-abcd1234")
    leave_over(tmp_path, ".2-abcd1234")
    for name in (".1-abcd1234", ".2-abcd1234"):
        (tmp_path / name / "old").mkdir()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "2").mkdir()
    with export.new_folder(tmp_path / "5", overwrite=False):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".1-abcd1234", "2", "5"}


EXPORTING = """
import os, sys, time
from pathlib import Path
from tf_gpt2.serving.export import new_folder
with new_folder(Path(sys.argv[1]), overwrite=False) as made:
    os.utime(made.parent, (0, 0))
    print("working", flush=True)
    time.sleep(600)
"""


def test_an_export_that_lives_keeps_its_folder_and_one_that_was_killed_does_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", EXPORTING, tmp_path / "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "working\n"
        with export.new_folder(tmp_path / "2", overwrite=False):
            pass
        (alive,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert alive.is_dir()  # what SIGKILL left
    with export.new_folder(tmp_path / "3", overwrite=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


NAMES = ["exp lr=0.1", "exp*", "a?b", "{a,b}", "é ü", "-x", "%41", "a[b", "a]b", "'\"$(x)", "a\nb", "gs:x"]
PATTERNS = ["exp[lr=0.1]", "[ab]", "a\\b", "exp[1]/gpt2", "exp[!a]", os.fsdecode(b"\xff")]


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_any_name_can_be_loaded(name, generator, tmp_path, few_signatures):
    folder = export_saved_model(generator, tmp_path / name)
    loaded = tf.saved_model.load(str(folder))
    assert loaded.signatures["encode"](text=tf.constant(["To be"]))["ids"].numpy().tolist() == [[396, 304]]
    assert {spec.name for spec in records(folder)} == {name}
    assert [path.name for path in (tmp_path / name).iterdir()] == ["1"]


@pytest.mark.parametrize("name", PATTERNS)
def test_what_tensorflow_takes_for_a_pattern_is_refused_before_anything_is_written(name, generator, tmp_path):
    with pytest.raises(ValueError, match=r"folder must .*TensorFlow.*choose another name"):
        export_saved_model(generator, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_pattern_is_its_own_name(generator, tmp_path, monkeypatch, few_signatures):
    (tmp_path / "exp[1]" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "exp[1]")
    folder = export_saved_model(generator, "gpt2")
    assert tf.saved_model.load(str(folder)).signatures["encode"](text=tf.constant(["To be"]))
    assert {spec.name for spec in records(folder)} == {"gpt2"}


@pytest.mark.parametrize(
    ("folder", "name"), [(".", "gpt2"), ("..", "models"), ("../gpt2/.", "gpt2"), ("x/..", "gpt2"), ("a..b", "a..b")]
)
def test_records_name_the_model_by_its_folder(folder, name, generator, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "trace_signatures", lambda *_: {})
    (tmp_path / "models" / "gpt2" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models" / "gpt2")
    assert {spec.name for spec in records(export_saved_model(generator, folder))} == {name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 0}, "version must be an integer of at least 1, got 0"),
        ({"version": 1.5}, "version must be"),
        ({"version": 2**63}, "version must be at most 9223372036854775807, .* got 9223372036854775808"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
        ({"warm_up": "all"}, "warm_up must be one of plain, xla, none, and xla only with xla=True, got 'all'"),
        ({"warm_up": "xla"}, "warm_up must be"),
        ({"max_new_tokens": 256}, "max_new_tokens must leave room for a prompt in n_ctx=256, got 256"),
    ],
)
def test_wrong_arguments(options, message, generator, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_saved_model(generator, tmp_path / "export", **options)
    assert not (tmp_path / "export").exists()


def records(folder):
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    logs = [PredictionLog.FromString(record) for record in tf.data.TFRecordDataset([str(path)]).as_numpy_iterator()]
    return [log.predict_log.request.model_spec for log in logs]


def test_only_plain_signatures_are_warmed_up_unasked(exported, monkeypatch, generator, tmp_path):
    specs = records(exported)
    assert {spec.name for spec in specs} == {"gpt2"}
    assert {spec.signature_name for spec in specs} == SIGNATURES
    monkeypatch.setattr(export, "trace_signatures", lambda *_: {})
    for choice, names in (("xla", SIGNATURES | TWINS), ("plain", SIGNATURES)):
        folder = export_saved_model(generator, tmp_path / choice, xla=True, warm_up=choice)
        assert {spec.signature_name for spec in records(folder)} == names
    folder = export_saved_model(generator, tmp_path / "none", warm_up="none")
    assert not (folder / "assets.extra").exists()


def test_no_protos_no_records(monkeypatch, generator, tmp_path):
    monkeypatch.setattr(export, "trace_signatures", lambda *_: {})
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis.prediction_log_pb2", None)
    lines = []
    folder = export_saved_model(generator, tmp_path, on_step=lines.append)
    assert not (folder / "assets.extra").exists()
    assert lines[-1] == 'no requests that warm a server up: they need pip install "tf_gpt2[serving]"'
    with pytest.raises(ImportError, match="serving protos"):
        export_saved_model(generator, tmp_path, version=2, xla=True, warm_up="xla")
    assert not (tmp_path / "2").exists()


def test_the_command_says_what_it_made(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(export, "trace_signatures", lambda *arguments: arguments[-1]("tracing") or {})
    folder = tmp_path / "served here"
    assert main(["export", str(folder), "--model_size", "tiny", "--version", "4", "--dtype", "int8"]) == 0
    out, err = capfd.readouterr()
    assert f"made       {folder / '4'} (" in out
    assert 'curl -d \'{"instances": ["To be"]}\'' in out
    assert f"{folder}:/models/gpt2:ro" in shlex.split(out.partition("serve it")[2].partition("call it")[0])
    assert err.splitlines() == [
        "loading the model",
        "tracing",
        "writing the graph and the weights",
        "writing the assets",
        "writing requests that warm a server up",
    ]
    assert main(["export", str(folder), "--model_size", "tiny", "--version", "4"]) == 1
    assert "version 4 exists already" in capfd.readouterr().err
    assert read_manifest(folder / "4")["dtype"] == "int8"
