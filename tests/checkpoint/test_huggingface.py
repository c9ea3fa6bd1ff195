"""Hugging Face's folders: each key of the config, each form of the weights, and what is refused by name."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tf_gpt2.checkpoint import huggingface
from tf_gpt2.checkpoint.params import leaves, random_params
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError

KEYS = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 7, "n_embd": 6, "n_head": 3, "n_layer": 2}
CONFIG = GPT2Config(n_vocab=11, n_ctx=7, n_embd=6, n_head=3, n_layer=2)
PARAMS = random_params(CONFIG, seed=3)


def by_name(params, prefix="transformer."):
    """The tensors under Hugging Face's names, written out."""
    tensors = {"wte.weight": params["wte"], "wpe.weight": params["wpe"]}
    tensors |= {"ln_f.weight": params["ln_f"]["g"], "ln_f.bias": params["ln_f"]["b"]}
    for i, block in enumerate(params["blocks"]):
        for name in ("ln_1", "ln_2"):
            tensors |= {f"h.{i}.{name}.weight": block[name]["g"], f"h.{i}.{name}.bias": block[name]["b"]}
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            pair = block[part][name]
            tensors |= {f"h.{i}.{part}.{name}.weight": pair["w"], f"h.{i}.{part}.{name}.bias": pair["b"]}
    return {prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def write(folder, tensors, keys=KEYS):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read(folder):
    config = huggingface.read_config(folder)
    return {path: np.asarray(array[:]) for path, array in huggingface.open_weights(folder, config)}


def assert_weights(found, params=PARAMS):
    expected = dict(leaves(params))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert np.array_equal(found[path], array), path


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_language_models_and_base_models_are_read(tmp_path, prefix):
    masks = {
        f"{prefix}h.0.attn.bias": np.ones((1, 1, 7, 7), np.float32),
        f"{prefix}h.1.attn.masked_bias": np.float32(0),
    }
    masks = {name: np.asarray(mask) for name, mask in masks.items()}
    assert_weights(read(write(tmp_path, by_name(PARAMS, prefix) | masks)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_read(tmp_path, dtype):
    found = read(write(tmp_path, {name: tensor.astype(dtype) for name, tensor in by_name(PARAMS).items()}))
    assert all(np.array_equal(found[path], array.astype(dtype)) for path, array in leaves(PARAMS))


def test_several_files_are_read(tmp_path):
    tensors = by_name(PARAMS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "config.json").write_text(json.dumps(KEYS))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert huggingface.is_here(tmp_path)
    assert_weights(read(tmp_path))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", 5]
)
def test_an_index_names_no_other_files(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(KEYS))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(CheckpointError, match=r"which is no file of safetensors beside it|lists no files"):
        read(tmp_path)


def test_a_head_of_its_own_and_a_tied_one(tmp_path):
    head = np.ones((11, 6), np.float32)
    found = read(write(tmp_path, by_name(PARAMS) | {"lm_head.weight": head}, {**KEYS, "tie_word_embeddings": False}))
    assert_weights(found, PARAMS | {"lm_head": head})
    assert_weights(read(write(tmp_path, by_name(PARAMS) | {"lm_head.weight": PARAMS["wte"]})))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight that is not the token embedding"):
        read(write(tmp_path, by_name(PARAMS) | {"lm_head.weight": head}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_inner": 5}, {"n_inner": 5}),
        ({"n_inner": None}, {}),
        ({"activation_function": "gelu_pytorch_tanh"}, {}),
        ({"activation_function": "gelu"}, {"activation": "gelu"}),
        ({"activation_function": "swish"}, {"activation": "silu"}),
        ({"layer_norm_epsilon": 1e-6}, {"layer_norm_epsilon": 1e-6}),
        ({"scale_attn_weights": False}, {"scale_attn_weights": False}),
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx": True}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"reorder_and_upcast_attn": True, "attn_pdrop": 0.3, "torch_dtype": "float16", "eos_token_id": 5}, {}),
        ({"hidden_size": 6, "max_position_embeddings": 7, "add_cross_attention": False, "pruned_heads": {}}, {}),
    ],
)
def test_each_key_is_honoured(change, expected):
    assert huggingface.config_from({**KEYS, **change}) == dataclasses.replace(CONFIG, **expected)


def test_aliases_are_read_and_defaults_are_those_of_transformers():
    aliases = {"hidden_size": 6, "max_position_embeddings": 7, "num_attention_heads": 3, "num_hidden_layers": 2}
    assert huggingface.config_from({"vocab_size": 11, **aliases}) == CONFIG
    assert huggingface.config_from({}).n_params == 124_439_808


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type must be 'gpt2', got 'gpt_neo'"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ({"activation_function": "mish"}, "activation must be one of"),
        ({"rotary_dim": 64}, "rotary_dim: unknown, and may change what the model computes"),
        ({"hidden_size": 8}, "hidden_size and n_embd must be equal"),
        ({"n_head": 4}, "n_head must divide n_embd"),
        ({"n_layer": "2"}, "n_layer must be an int"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a float"),
    ],
)
def test_other_keys_and_values_are_named(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**KEYS, **change}))
    with pytest.raises(CheckpointError, match=message):
        huggingface.read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"n_layer": ' + "1" * 5000 + "}"], ids=len)
def test_a_damaged_config_is_a_checkpoint_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        huggingface.read_config(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    tensors = by_name(PARAMS)
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"transformer.ln_f.bias": "b.safetensors"}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"transformer.ln_f.bias": tensors["transformer.ln_f.bias"] + 1}, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(KEYS))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"ln_f.bias is in .*a\.safetensors and in b\.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_tied_embedding_may_have_the_heads_name(tmp_path, prefix):
    tensors = by_name(PARAMS, prefix)
    tensors["lm_head.weight"] = tensors.pop(f"{prefix}wte.weight")
    assert_weights(read(write(tmp_path, tensors)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias: missing"),
        (lambda t: t.update({"score.weight": t["transformer.wte.weight"]}), "score.weight: unexpected"),
        (
            lambda t: t.update({"transformer.wpe.weight": t["transformer.wte.weight"]}),
            r"transformer.wpe.weight: expected \(7, 6\), got \(11, 6\)",
        ),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((7, 6), np.int32)}), "wpe.weight: missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = by_name(PARAMS)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        read(write(tmp_path, tensors))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"])
def test_other_files_of_weights_are_not_read(tmp_path, file):
    (tmp_path / "config.json").write_text(json.dumps(KEYS))
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert huggingface.is_here(tmp_path)
    with pytest.raises(CheckpointError, match=rf"are not read: {file} is .*save_pretrained\(folder\)"):
        read(tmp_path)


@pytest.mark.parametrize("ties", [True, False])
def test_what_is_written_has_hugging_faces_names(tmp_path, ties):
    config = dataclasses.replace(CONFIG, activation="relu", n_inner=5, tie_word_embeddings=ties)
    params = random_params(config)
    huggingface.write(tmp_path, config, leaves(params), 10)
    keys = json.loads((tmp_path / "config.json").read_text())
    assert keys["n_ctx"] == keys["n_positions"] == 7
    assert (keys["architectures"], keys["eos_token_id"]) == (["GPT2LMHeadModel"], 10)
    expected = by_name(params) | ({} if ties else {"lm_head.weight": params["lm_head"]})
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert huggingface.read_config(tmp_path) == config
    assert_weights(read(tmp_path), params)
