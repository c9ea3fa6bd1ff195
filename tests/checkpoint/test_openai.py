"""OpenAI's checkpoint format: bits that survive, names and files, damage of every kind, saving that is cut short.

The other side of each comparison is TensorFlow itself, used as OpenAI did, with names typed here.
"""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2.checkpoint.openai import load_gpt2_params_from_tf_ckpt, save_gpt2_params_to_tf_ckpt
from tf_gpt2.checkpoint.params import leaves, map_leaves
from tf_gpt2.config import GPT2Config, read_hparams
from tf_gpt2.errors import CheckpointError, ParamsError

CONFIG = GPT2Config(n_vocab=11, n_ctx=5, n_embd=6, n_head=3, n_layer=2)
ONES = GPT2Config(n_vocab=1, n_ctx=1, n_embd=1, n_head=1, n_layer=1)
HPARAMS = CONFIG.to_hparams()
DATA, INDEX, META = "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.meta"
BLOCK_NAMES = [
    *(f"{norm}/{leaf}" for norm in ("ln_1", "ln_2") for leaf in "bg"),
    *(f"{part}/{leaf}" for part in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj") for leaf in "bw"),
]
PARAMS = lively_params(CONFIG)


def openai_variables(params):
    """Names and arrays as in OpenAI's checkpoint, the width-1 convolutions with their third axis."""
    variables = {"model/wte": params["wte"], "model/wpe": params["wpe"]}
    variables |= {f"model/ln_f/{name}": leaf for name, leaf in params["ln_f"].items()}
    for i, block in enumerate(params["blocks"]):
        for name in BLOCK_NAMES:
            leaf = dict(leaves(block))[name]
            variables[f"model/h{i}/{name}"] = leaf[None] if name.endswith("/w") else leaf
    return variables


def write_with_tensorflow(folder, variables, *, prefix="model.ckpt", **options):
    """Writes a checkpoint as a TensorFlow 1 program does."""
    folder.mkdir(exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in variables.items():
            tf.compat.v1.get_variable(name, initializer=tf.constant(value), use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(save_relative_paths=True)
        saver.save(session, str(folder / prefix), **options)
    return folder


def loaded(folder, config=CONFIG):
    return load_gpt2_params_from_tf_ckpt(folder, config.to_hparams())


def complaint(folder, config=CONFIG):
    with pytest.raises(CheckpointError) as caught:
        loaded(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of ours; copy it before changing it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "saved"
    save_gpt2_params_to_tf_ckpt(PARAMS, HPARAMS, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


# ---- bits, names, files


def test_every_bit_survives(tmp_path, assert_same_bits):
    rng = np.random.default_rng(0)
    # any bit pattern: NaN with payloads, infinities, denormals, -0.0
    params = map_leaves(lambda _, x: rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32), PARAMS)
    params["wpe"].view(np.uint32).flat[:6] = [0x7FC0DEAD, 0xFF800001, 0x80000000, 1, 0x807FFFFF, 0xFF800000]
    save_gpt2_params_to_tf_ckpt(params, HPARAMS, tmp_path / "bits")
    assert_same_bits(loaded(tmp_path / "bits"), params)


@pytest.mark.parametrize("config", [ONES, GPT2Config(n_vocab=1, n_ctx=3, n_embd=2, n_head=2, n_layer=1)])
def test_sizes_of_one_survive(config, tmp_path, assert_same_bits):
    params = lively_params(config)
    save_gpt2_params_to_tf_ckpt(params, config.to_hparams(), tmp_path / "ones")
    assert_same_bits(loaded(tmp_path / "ones", config), params)


def test_files_are_those_of_the_original(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint", "hparams.json", DATA, INDEX, META]
    lines = (saved / "checkpoint").read_text(encoding="utf-8").splitlines()
    assert lines == ['model_checkpoint_path: "model.ckpt"', 'all_model_checkpoint_paths: "model.ckpt"']
    assert list(json.loads((saved / "hparams.json").read_text(encoding="utf-8")).items()) == list(HPARAMS.items())


def test_names_shapes_and_values_are_those_of_the_original(saved):
    expected, reader = openai_variables(PARAMS), tf.train.load_checkpoint(str(saved))
    assert reader.get_variable_to_shape_map() == {name: list(value.shape) for name, value in expected.items()}
    for name, value in expected.items():
        assert reader.get_variable_to_dtype_map()[name] == tf.float32
        assert reader.get_tensor(name).tobytes() == value.tobytes(), name


def test_the_meta_file_restores_the_variables(saved):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.train.import_meta_graph(str(saved / META)).restore(session, str(saved / "model.ckpt"))
        assert session.run("model/h1/mlp/c_fc/w:0").tobytes() == PARAMS["blocks"][1]["mlp"]["c_fc"]["w"].tobytes()


def test_tensorflow_writes_what_we_read(tmp_path, assert_same_bits):
    assert_same_bits(loaded(write_with_tensorflow(tmp_path / "theirs", openai_variables(PARAMS))), PARAMS)


@pytest.mark.parametrize("prefix", ["model", "my run.v2"])
def test_the_latest_of_several_is_read_and_any_by_its_path(prefix, tmp_path, assert_same_bits):
    other = lively_params(CONFIG, seed=1)
    folder = write_with_tensorflow(tmp_path / "run", openai_variables(other), prefix=prefix, global_step=900)
    write_with_tensorflow(folder, openai_variables(PARAMS), prefix=prefix, global_step=1000)
    assert_same_bits(loaded(folder), PARAMS)
    assert_same_bits(loaded(f"{folder}/{prefix}-900"), other)


NAMES = [
    "with blank",
    "x{1}",
    "x*?",
    "ü",
    "exp[lr=0.1]",
    "[",
    "[!a]",
    "a\\b",
    "\\",
    "a\nb",
    "~",
    "$HOME",
    "%s",
    "-",
    "'\"",
]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"\xff\xfe"), os.fsdecode(b"[\xff]")])
def test_any_name_of_a_folder_will_do(name, saved, tmp_path, assert_same_bits):
    shutil.copytree(saved, tmp_path / name / name)
    assert_same_bits(loaded(tmp_path / name / name), PARAMS)
    assert_same_bits(loaded(tmp_path / name / name / "model.ckpt"), PARAMS)
    save_gpt2_params_to_tf_ckpt(PARAMS, HPARAMS, tmp_path / name / "saved" / name)
    assert_same_bits(loaded(tmp_path / name / "saved" / name), PARAMS)
    files = sorted(path.name for path in (tmp_path / name / "saved" / name).iterdir())
    assert files == ["checkpoint", "hparams.json", DATA, INDEX, META]


def test_a_relative_folder_and_a_checkpoint_whose_names_are_patterns(saved, tmp_path, monkeypatch, assert_same_bits):
    folder = shutil.copytree(saved, tmp_path / "[a]")
    for path in folder.glob("model.ckpt.*"):
        path.rename(folder / path.name.replace("model.ckpt", "run[1]"))
    (folder / "checkpoint").write_text('model_checkpoint_path: "run[1]"')
    monkeypatch.chdir(tmp_path)
    assert_same_bits(loaded("[a]"), PARAMS)
    monkeypatch.chdir(folder)
    assert_same_bits(loaded("."), PARAMS)
    assert_same_bits(loaded("run[1]"), PARAMS)


def test_a_temporary_folder_that_is_a_pattern_is_named_as_the_reason(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved, tmp_path / "[a]")
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[tmp]"))
    assert "TMPDIR" in complaint(folder)


def test_other_floats_and_layouts_are_saved_as_float32(tmp_path, assert_same_bits):
    doubles = map_leaves(lambda _, x: np.asfortranarray(x.astype(np.float64)), PARAMS)
    save_gpt2_params_to_tf_ckpt(doubles, HPARAMS, tmp_path)
    assert_same_bits(loaded(tmp_path), PARAMS)


# ---- checkpoints that are not this GPT-2


@pytest.mark.parametrize("change", ["missing", "squeezed", "transposed", "halved"])
def test_a_wrong_variable_is_named(change, tmp_path):
    variables = openai_variables(PARAMS)
    name = "model/h1/attn/c_attn/w"
    value = variables.pop(name)
    if change != "missing":
        changed = {"squeezed": value[0], "transposed": value.transpose(0, 2, 1), "halved": value.astype(np.float16)}
        variables[name] = changed[change]
    expected = {
        "missing": "missing",
        "squeezed": "expected (1, 6, 18), got (6, 18)",
        "transposed": "expected (1, 6, 18), got (1, 18, 6)",
        "halved": "expected float32, got float16",
    }
    message = complaint(write_with_tensorflow(tmp_path / "wrong", variables))
    assert f"{name}: {expected[change]}" in message
    assert message.count("model/") == 1


@pytest.mark.parametrize(
    "name", ["model/h2/ln_1/g", "model/h0/adapter/w", "model/lm_head/w", "model/h0/attn/c_attn/lora_a", "model/wte2"]
)
def test_what_may_be_a_surplus_part_of_the_model_is_refused(name, tmp_path):
    variables = {**openai_variables(PARAMS), name: np.ones(3, np.float32)}
    message = complaint(write_with_tensorflow(tmp_path / "wrong", variables))
    assert f"{name}: unexpected" in message
    assert message.count("model/") == 1


# ---- what training runs leave


EXTRAS = {
    "global_step": np.array(25541, np.int64),
    "beta1_power": np.array(0.9, np.float32),
    "model/beta2_power": np.array(0.9, np.float32),
    "model/wte/Adam": PARAMS["wte"],
    "model/h1/attn/c_attn/w/Adam_1": np.ones((1, 6, 18), np.float32),
    "model/h0/ln_1/g/ExponentialMovingAverage": np.ones(6, np.float16),
    "training/model/wte/m": PARAMS["wte"],
    "Variable": np.ones(3, np.float64),
    "note": np.array(b"a text"),
    "counts": np.arange(3, dtype=np.uint8),
}


def test_what_is_no_weight_is_ignored_and_named_once(tmp_path, caplog, assert_same_bits):
    folder = write_with_tensorflow(tmp_path / "run", openai_variables(PARAMS) | EXTRAS)
    with caplog.at_level("DEBUG", logger="tf_gpt2"):
        assert_same_bits(loaded(folder), PARAMS)
    (record,) = [record for record in caplog.records if record.name.startswith("tf_gpt2")]
    assert record.levelname == "DEBUG"
    assert record.getMessage().count(str(folder)) == 1
    for name in EXTRAS:
        assert name in record.getMessage()
    caplog.clear()
    with caplog.at_level("DEBUG", logger="tf_gpt2"):
        loaded(write_with_tensorflow(tmp_path / "plain", openai_variables(PARAMS)))
    assert not caplog.records


@pytest.mark.parametrize(
    "named",
    [
        "model-25541",
        "/content/checkpoint/run1/model-25541",
        "checkpoint/run1/model-25541",
        r"C:\\runs\\my run\\model-25541",
        r"/home/\303\274/model-25541",
        '/no\\"thing/model-25541',
        "/home/ü/model-25541",
    ],
)
def test_a_checkpoint_may_name_another_machines_path(named, tmp_path, assert_same_bits):
    folder = write_with_tensorflow(tmp_path / "run1", openai_variables(PARAMS), prefix="model", global_step=25541)
    write_with_tensorflow(folder, openai_variables(lively_params(CONFIG, seed=1)), prefix="model", global_step=9)
    text = f'model_checkpoint_path: "{named}"\nall_model_checkpoint_paths: "/content/model-9"\n'
    (folder / "checkpoint").write_text(text, encoding="utf-8")
    (folder / "model-25541.meta").unlink()
    assert_same_bits(loaded(folder), PARAMS)


def test_a_checkpoint_may_name_a_path_that_is_there(tmp_path, assert_same_bits):
    folder = write_with_tensorflow(tmp_path / "far", openai_variables(PARAMS), prefix="run")
    for named in (folder / "run", "../far/run"):
        near = tmp_path / f"near{len(str(named))}"
        near.mkdir()
        (near / "checkpoint").write_text(f"model_checkpoint_path: '{named}'")
        assert_same_bits(loaded(near), PARAMS)


@pytest.mark.parametrize(
    "text",
    [
        'model_checkpoint_path: "elsewhere/none"',
        'model_checkpoint_path: ""',
        'model_checkpoint_path: "/"',
        'model_checkpoint_path: "a\\000b"',
        'model_checkpoint_path: "%s"' % ("x" * 5000),
        'model_checkpoint_path: "%s"' % ("y/" * 5000),
        "model_checkpoint_path: model.ckpt",
        'all_model_checkpoint_paths: "model.ckpt"',
        'model_checkpoint_path: "\\x"',
    ],
)
def test_a_checkpoint_that_names_nothing_is_a_checkpoint_error(text, folder):
    (folder / "checkpoint").write_text(text)
    assert len(complaint(folder)) < 1000


def test_several_data_files_are_read(tmp_path, assert_same_bits):
    variables, folder = openai_variables(PARAMS), tmp_path / "run"
    folder.mkdir()
    halves = [dict(list(variables.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        tf.raw_ops.SaveV2(
            prefix=f"{folder}/part{i}",
            tensor_names=list(half),
            shape_and_slices=[""] * len(half),
            tensors=list(half.values()),
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[f"{folder}/part0", f"{folder}/part1"], destination_prefix=f"{folder}/model-7"
    )
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-7"')
    assert (folder / "model-7.data-00001-of-00002").is_file()
    assert_same_bits(loaded(folder), PARAMS)
    (folder / "model-7.data-00001-of-00002").unlink()
    assert "model-7.data-00001-of-00002 is missing" in complaint(folder)


def test_a_variable_in_slices_is_read(tmp_path, assert_same_bits):
    variables, folder = openai_variables(PARAMS), tmp_path / "run"
    folder.mkdir()
    wte = variables.pop("model/wte")
    tf.raw_ops.SaveV2(
        prefix=f"{folder}/model.ckpt",
        tensor_names=[*variables, "model/wte", "model/wte"],
        shape_and_slices=[*[""] * len(variables), "11 6 0,4:-", "11 6 4,7:-"],
        tensors=[*variables.values(), wte[:4], wte[4:]],
    )
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    assert_same_bits(loaded(folder), PARAMS)


@pytest.mark.parametrize(
    ("hparam", "value", "part"),
    [
        ("n_layer", 1, "model/h1/attn/c_attn/b: unexpected"),
        ("n_layer", 3, "model/h2/attn/c_attn/b: missing"),
        ("n_vocab", 12, "model/wte: expected (12, 6), got (11, 6)"),
        ("n_embd", 9, "model/h0/attn/c_attn/w: expected (1, 9, 27), got (1, 6, 18)"),
    ],
)
def test_hparams_must_fit(saved, hparam, value, part):
    assert part in complaint(saved, GPT2Config(**{**HPARAMS, hparam: value}))
    with pytest.raises(ValueError, match="n_head must divide"):
        load_gpt2_params_from_tf_ckpt(saved, {**HPARAMS, "n_head": 4})


# ---- damage


@pytest.mark.parametrize("name", ["checkpoint", INDEX, DATA])
@pytest.mark.parametrize("body", [None, b"", b"\0" * 4096, b"\xff" * 4096, b"<Error>BlobNotFound</Error>"])
def test_replaced_files_are_noticed(name, body, folder):
    (folder / name).unlink()
    if body is not None:
        (folder / name).write_bytes(body)
    complaint(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    complaint(folder)


@pytest.mark.parametrize("name", ["checkpoint", INDEX, DATA])
def test_any_cut_is_noticed(name, folder):
    body = (folder / name).read_bytes()
    first_line = body.find(b"\n")
    for length in [*range(0, len(body), 1 + len(body) // 60), len(body) - 1]:
        (folder / name).write_bytes(body[:length])
        if name == "checkpoint" and length >= first_line:
            continue  # still says all that is needed
        complaint(folder)


@pytest.mark.parametrize("name", ["checkpoint", INDEX, DATA])
def test_a_flipped_bit_is_noticed_or_does_no_harm(name, folder, assert_same_bits):
    body = (folder / name).read_bytes()
    n_noticed, places = 0, range(0, len(body), 1 + len(body) // 100)
    for place in places:
        (folder / name).write_bytes(body[:place] + bytes([body[place] ^ 1 << place % 8]) + body[place + 1 :])
        try:
            assert_same_bits(loaded(folder), PARAMS)
        except CheckpointError as error:
            assert "\n" not in str(error)
            n_noticed += 1
    n_needed = body.index(b"\n") if name == "checkpoint" else len(body)  # its first line says all
    assert n_noticed > 0.8 * n_needed * len(places) / len(body)


def test_a_path_to_nothing_is_named(tmp_path, saved):
    for path in (tmp_path / "nowhere", tmp_path, saved / "model", saved / DATA):
        assert "no checkpoint" in complaint(path)


# ---- saving


def test_a_wrong_tree_is_refused_before_anything_is_written(tmp_path):
    wrong = {**PARAMS, "wte": PARAMS["wte"].T}
    with pytest.raises(ParamsError, match=r"wte: expected \(11, 6\), got \(6, 11\)"):
        save_gpt2_params_to_tf_ckpt(wrong, HPARAMS, tmp_path / "new")
    with pytest.raises(ValueError, match="hparams lacks n_layer"):
        save_gpt2_params_to_tf_ckpt(PARAMS, {k: v for k, v in HPARAMS.items() if k != "n_layer"}, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_the_checkpoint_and_nothing_else(folder, assert_same_bits):
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    other = lively_params(CONFIG, seed=1)
    save_gpt2_params_to_tf_ckpt(other, HPARAMS, folder)
    assert_same_bits(loaded(folder), other)
    assert (folder / "vocab.bpe").read_text() == "#version: 0.2\n"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(**_):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.raw_ops, "SaveV2", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_gpt2_params_to_tf_ckpt(PARAMS, HPARAMS, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_the_folder_may_be_a_file_system_of_its_own(folder, monkeypatch, assert_same_bits):
    replace = Path.replace

    def replace_within(source, target):
        if folder not in source.parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", replace_within)
    other = lively_params(CONFIG, seed=1)
    save_gpt2_params_to_tf_ckpt(other, HPARAMS, folder)
    assert_same_bits(loaded(folder), other)


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("n_moved", range(5))
def test_a_save_cut_short_never_mixes_old_and_new(n_moved, was_there, saved, tmp_path, monkeypatch, assert_same_bits):
    folder = shutil.copytree(saved, tmp_path / "model") if was_there else tmp_path / "model"
    new_hparams, new_params = {**HPARAMS, "n_head": 2}, lively_params(CONFIG, seed=1)
    moved, replace = [], Path.replace

    def replace_some(source, target):
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(source)
        return replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_some)
        save_gpt2_params_to_tf_ckpt(new_params, new_hparams, folder)
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}
    try:
        hparams = read_hparams(folder / "hparams.json")
        found = load_gpt2_params_from_tf_ckpt(folder, hparams)
    except CheckpointError:
        return
    assert_same_bits(found, new_params if hparams == new_hparams else PARAMS)


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(folder, monkeypatch, assert_same_bits):
    def save(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="No space left"):
        patch.setattr(tf.raw_ops, "SaveV2", save)
        save_gpt2_params_to_tf_ckpt(lively_params(CONFIG, seed=1), {**HPARAMS, "n_head": 2}, folder)
    assert_same_bits(loaded(folder), PARAMS)
    assert read_hparams(folder / "hparams.json") == HPARAMS
