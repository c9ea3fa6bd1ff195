"""Hyperparameters: what is refused and how, what is read from ``hparams.json``, how many parameters they make."""

import dataclasses
import json
import os

import numpy as np
import pytest

from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import LAYER_NORM_EPS, SIZES, GPT2Config, read_hparams
from tf_gpt2.errors import CheckpointError

SMALL = {"n_vocab": 11, "n_ctx": 7, "n_embd": 6, "n_head": 3, "n_layer": 2}


def test_epsilon_is_that_of_the_original():
    assert LAYER_NORM_EPS == 1e-5


@pytest.mark.parametrize(
    ("size", "n_layer", "n_head", "n_embd", "n_params"),
    [
        ("124M", 12, 12, 768, 124_439_808),
        ("355M", 24, 16, 1024, 354_823_168),
        ("774M", 36, 20, 1280, 774_030_080),
        ("1558M", 48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_four_sizes(size, n_layer, n_head, n_embd, n_params):
    config = SIZES[size]
    assert (config.n_layer, config.n_head, config.n_embd) == (n_layer, n_head, n_embd)
    assert (config.n_vocab, config.n_ctx, config.head_width) == (50257, 1024, 64)
    assert config.n_params == n_params


def test_there_are_four_sizes_and_nobody_can_add_one():
    assert list(SIZES) == ["124M", "355M", "774M", "1558M"]
    with pytest.raises(TypeError):
        SIZES["3B"] = GPT2Config(**SMALL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("value", [1.0, "6", None, True, [6], float("nan")])
def test_what_is_no_integer_is_named(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be an int, got "):
        GPT2Config(**{**SMALL, name: value})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("value", [0, -1, -(2**40)])
def test_what_is_below_one_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}"):
        GPT2Config(**{**SMALL, name: value})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("value", [10**9, 2**63, 10**5000], ids=["9", "19", "5000"])
def test_what_no_gpt2_has_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must ") as caught:
        GPT2Config(**{**SMALL, name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [-(10**5000), -(10**30)], ids=["5000", "30"])
def test_any_integer_can_be_named(value):
    with pytest.raises(ValueError, match=r"^n_ctx must be at least 1, got an integer of"):
        GPT2Config(**{**SMALL, "n_ctx": value})


def test_values_that_are_too_many_together_are_named():
    with pytest.raises(ValueError, match=r"n_embd=1048576 with n_layer=1000 .* parameters"):
        GPT2Config(n_vocab=11, n_ctx=7, n_embd=1 << 20, n_head=1, n_layer=1000)


def test_models_far_larger_than_gpt2_are_valid():
    gpt3 = GPT2Config(n_vocab=50257, n_ctx=2048, n_embd=12288, n_head=96, n_layer=96)
    assert gpt3.n_params > 174e9
    GPT2Config(n_vocab=250_000, n_ctx=1_000_000, n_embd=64, n_head=1, n_layer=500)


@pytest.mark.parametrize("n_head", [4, 5, 7, 12])
def test_heads_must_divide_the_width(n_head):
    with pytest.raises(ValueError, match=f"n_head must divide n_embd, got n_head={n_head} and n_embd=6"):
        GPT2Config(**{**SMALL, "n_head": n_head})


def test_a_config_is_a_value():
    config = GPT2Config(**SMALL)
    assert config == GPT2Config(**SMALL)
    assert len({config, GPT2Config(**SMALL), dataclasses.replace(config, n_layer=3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3
    with pytest.raises(TypeError):
        GPT2Config(11, 7, 6, 3, 2)


def test_sizes_of_one_are_valid():
    config = GPT2Config(n_vocab=1, n_ctx=1, n_embd=1, n_head=1, n_layer=1)
    assert (config.head_width, config.n_params) == (1, 29)


def test_hparams_come_back_in_the_original_order():
    config = GPT2Config.from_hparams(dict(reversed(SMALL.items())))
    assert list(config.to_hparams().items()) == list(SMALL.items())


def test_missing_and_unknown_hparams_are_named():
    assert GPT2Config.from_hparams({**SMALL, "precision": "float32", "attn_dropout": 0.1}) == GPT2Config(**SMALL)
    with pytest.raises(ValueError, match="hparams has rotary_dim, which may change what the model computes"):
        GPT2Config.from_hparams({**SMALL, "rotary_dim": 64})
    with pytest.raises(ValueError, match="hparams lacks n_ctx, n_head; it needs n_vocab, n_ctx, n_embd, n_head"):
        GPT2Config.from_hparams({"n_vocab": 11, "n_embd": 6, "n_layer": 2})


VARIATIONS = {
    "n_inner": 5,
    "activation": "relu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_what_is_not_openais_stands_in_hparams(name):
    config = GPT2Config(**SMALL, **{name: VARIATIONS[name]})
    assert config.to_hparams() == {**SMALL, name: VARIATIONS[name]}
    assert GPT2Config.from_hparams(config.to_hparams()) == config != GPT2Config(**SMALL)


def test_equal_models_have_equal_configs():
    assert GPT2Config(**SMALL, n_inner=24, activation="gelu_pytorch_tanh") == GPT2Config(**SMALL)
    assert GPT2Config(**SMALL, activation="swish").activation == "silu"


def test_parameters_of_other_shapes_are_counted():
    config = GPT2Config(**SMALL, n_inner=5, tie_word_embeddings=False)
    assert config.n_params == sum(int(np.prod(shape)) for _, shape in leaves(param_shapes(config)))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_inner", 0, ValueError),
        ("n_inner", 5.0, TypeError),
        ("n_inner", 10**9, ValueError),
        ("activation", "mish", ValueError),
        ("activation", ["relu"], TypeError),
        ("layer_norm_epsilon", 0, ValueError),
        ("layer_norm_epsilon", float("nan"), ValueError),
        ("layer_norm_epsilon", "1e-5", TypeError),
        ("scale_attn_weights", 1, TypeError),
        ("tie_word_embeddings", None, TypeError),
    ],
)
def test_wrong_variations_are_named(name, value, error):
    with pytest.raises(error, match=f"^{name} must "):
        GPT2Config(**SMALL, **{name: value})


def test_hparams_are_read_as_they_stand(tmp_path):
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps({**SMALL, "precision": "π"}), encoding="utf-8")
    assert read_hparams(path) == {**SMALL, "precision": "π"}
    assert GPT2Config.from_file(str(path)) == GPT2Config(**SMALL)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"null",
        b"5",
        b'"n_vocab n_ctx n_embd n_head n_layer"',
        b'["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"]',
        b"{}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"<?xml version='1.0'?><Error><Code>BlobNotFound</Code></Error>",
        json.dumps({**SMALL, "n_head": 4}).encode(),
        json.dumps({**SMALL, "n_ctx": 7.0}).encode(),
        json.dumps({**SMALL, "n_ctx": None}).encode(),
        json.dumps(SMALL).encode()[:-1],
        json.dumps(SMALL).encode().replace(b"11", b"1" * 5000),
        json.dumps(SMALL).encode().replace(b"11", b"1" * 4000),
        json.dumps({**SMALL, "n_layer": 10**9}).encode(),
        json.dumps({**SMALL, "n_vocab": 2**31}).encode(),
        json.dumps({**SMALL, "n_vocab": ["a long text"] * 10_000}).encode(),
        b" " * 2_000_000 + json.dumps(SMALL).encode(),
        b"[" * 100_000,
    ],
)
def test_damaged_hparams_are_a_checkpoint_error(damaged, tmp_path):
    path = tmp_path / "hparams.json"
    path.write_bytes(damaged)
    for read in (read_hparams, GPT2Config.from_file):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "hparams.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_hparams(path)


def test_no_hparams_is_a_checkpoint_error(tmp_path):
    for path in (tmp_path / "hparams.json", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_hparams(path)
