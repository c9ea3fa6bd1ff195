"""LoRA: only the additions train, merging changes nothing, PEFT's folder is read and written, each type of matrix."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from reference import forward, lively_params
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tf_gpt2 import CheckpointError, Encoder, GPT2Config, GPT2Model, TextGenerator, generate
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.generation.scoring import score
from tf_gpt2.model.lora import linears
from tf_gpt2.training import NextTokenLoss, finetune, load_lora, save_lora
from tf_gpt2.training.fit import as_batch
from tf_gpt2.training.optimizer import Schedule
from tf_gpt2.training.step import StepOptions, TrainingStep

CONFIG = GPT2Config(n_vocab=61, n_ctx=12, n_embd=12, n_head=3, n_layer=2)
IDS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
ALL = ("c_attn", "c_fc", "c_proj")


def make_model(targets=None, **options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG))
    if targets:
        model.enable_lora(2, alpha=3, targets=targets)
        rng = np.random.default_rng(1)
        for variable in model.trainable_variables:
            variable.assign(rng.standard_normal(variable.shape) * 0.2)
    return model


def test_the_model_is_as_before_until_it_is_trained():
    model = make_model()
    before = model(IDS).numpy()
    model.enable_lora(2, alpha=16)
    np.testing.assert_array_equal(model(IDS), before)
    assert [tuple(v.shape) for v in model.trainable_variables] == [(2, 12), (36, 2)] * 2
    assert model.lora.places == ("attn.c_attn",)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4", "bfloat16"])
def test_only_the_additions_train(dtype):
    options = {"quantization": dtype} if dtype.startswith("int") else {"dtype": dtype}
    model = make_model(ALL, **options)
    trained = {id(variable) for variable in model.trainable_variables}
    before = [np.asarray(variable.value).copy() for variable in model.variables]
    data = tf.data.Dataset.from_tensors((IDS[:, :-1], IDS[:, 1:])).repeat(12)
    losses = finetune(model, data, learning_rate=0.1, weight_decay=0.0, save_every=4, progress=False).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    for variable, old in zip(model.variables, before, strict=True):
        assert (id(variable) in trained) != np.array_equal(np.asarray(variable.value), old)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 1e-4),
        ({"quantization": "int8"}, 1e-4),
        ({"quantization": "int4"}, 1e-4),
        ({"dtype": "mixed_bfloat16"}, 0.1),
    ],
)
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_those_of_the_sum(options, bound, remat):
    """By TensorFlow's own gradients G of a float32 model that holds the sum: those of a and b are s b' G and s G a'."""
    model = make_model(ALL, **options)
    wide = GPT2Model(CONFIG)
    wide.set_weights(model.get_params())
    with tf.GradientTape() as tape:
        logits = wide(IDS[:, :-1])
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(IDS[:, 1:], logits))
    layers = dict(linears(wide, model.lora.places))
    wanted = dict(zip(layers, tape.gradient(loss, [layer.w.value for layer in layers.values()]), strict=True))
    step = TrainingStep(model, StepOptions(schedule=Schedule(learning_rate=1.0, warmup_steps=0, steps=1), remat=remat))
    found_loss, gradients = step.gradients(as_batch([IDS[None, :, :-1], IDS[None, :, 1:]]), 0)
    found = dict(zip([variable.path for variable in model.trainable_variables], gradients, strict=True))
    assert found_loss == pytest.approx(float(loss), rel=bound)
    for name, layer in linears(model, model.lora.places):
        whole, scale = wanted[name].numpy(), 3 / 2
        for part, gradient in (
            (layer.lora_a, scale * layer.lora_b.numpy().T @ whole),
            (layer.lora_b, scale * whole @ layer.lora_a.numpy().T),
        ):
            error = np.abs(found[part.path] - gradient).max()
            assert error <= bound * np.abs(gradient).max(), name


def test_merging_changes_only_where_the_numbers_are():
    model = make_model(ALL)
    apart, expected = model(IDS).numpy(), forward(model.get_params(), IDS[0], n_head=3)
    np.testing.assert_allclose(apart[0], expected, rtol=1e-4, atol=1e-4)
    plain = make_model()(IDS).numpy()
    assert np.abs(apart - plain).max() > 0.5
    sum_before = dict(leaves(model.get_params()))
    model.merge_lora()
    np.testing.assert_allclose(model(IDS), apart, rtol=1e-4, atol=1e-4)
    for path, array in leaves(model.get_params()):
        np.testing.assert_array_equal(array, sum_before[path])
    assert model.lora is None
    assert len(model.trainable_variables) == len(model.variables) == len(make_model().variables)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_generation_and_scores_count_the_additions(dtype, jit_compile):
    model = make_model(ALL, quantization="int8" if dtype == "int8" else None)
    wide = GPT2Model(CONFIG)
    wide.set_weights(model.get_params())
    prompts = [[1, 2, 3], [4]]
    options = {"max_new_tokens": 4, "jit_compile": jit_compile}
    assert generate(model, prompts, **options).ids == generate(wide, prompts, **options).ids
    ours, theirs = (score(m, IDS.tolist(), jit_compile=jit_compile) for m in (model, wide))
    # what an 8-bit matrix is multiplied by may be rounded to 8 bits, too
    np.testing.assert_allclose(ours[0].logprobs, theirs[0].logprobs, atol=1e-3 if dtype == "float32" else 0.1)


def test_two_ranks_of_one_shape_of_model_do_not_meet():
    for rank in (1, 3):
        model = make_model()
        model.enable_lora(rank)
        assert len(generate(model, [[1, 2]], max_new_tokens=2, jit_compile=False).ids[0]) == 2


def test_weights_of_a_model_with_another_alpha_bring_it(tmp_path):
    model, other = make_model(ALL), make_model()
    model.save_weights(tmp_path / "x.weights.h5")
    other.enable_lora(2, alpha=10, targets=ALL)
    other.load_weights(tmp_path / "x.weights.h5")
    save_lora(other, tmp_path / "adapter")
    loaded = make_model()
    load_lora(loaded, tmp_path / "adapter")
    assert loaded.lora.alpha == 3 == GPT2Model.from_config(other.get_config()).lora.alpha
    np.testing.assert_array_equal(loaded(IDS), model(IDS))


def test_a_keras_file_keeps_the_additions(tmp_path):
    model = make_model(ALL)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.lora == model.lora or loaded.lora.alpha == 3
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


def test_plain_fit_trains_the_additions_of_an_int8_model():
    model = make_model(quantization="int8")
    model.enable_lora(4, targets=ALL)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, jit_compile=False)
    losses = model.fit(IDS[:, :-1], IDS[:, 1:], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"alpha": -1}, "alpha must be above 0"),
        ({"alpha": float("inf")}, "alpha must be above 0 and finite"),
        ({"targets": ["wte"]}, "targets must be among .* got \\['wte'\\]"),
        ({"targets": []}, "targets must be among"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().enable_lora(**arguments)


def test_what_keras_has_compiled_before_does_not_go_on_without_the_additions():
    model = make_model()
    model.compile(keras.optimizers.Adam(0.05), NextTokenLoss(), jit_compile=False)
    model.predict(IDS, verbose=0)
    model.fit(IDS[:, :-1], IDS[:, 1:], verbose=0)
    model.enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(3).standard_normal(variable.shape))
    np.testing.assert_allclose(model.predict(IDS, verbose=0), model(IDS), atol=1e-5)
    with pytest.raises(ValueError, match="optimizer"):  # which has the old variables: it must be compiled again
        model.fit(IDS[:, :-1], IDS[:, 1:], verbose=0)


def test_after_merging_the_same_weights_train_as_before():
    model = make_model(dropout=0.1)
    before = [variable.path for variable in model.trainable_variables]
    model.enable_lora(2)
    model.merge_lora()
    assert [variable.path for variable in model.trainable_variables] == before


def test_what_cannot_be_merged_or_enabled_twice_is_refused():
    with pytest.raises(ValueError, match="integers cannot hold the sum"):
        make_model(ALL, quantization="int8").merge_lora()
    with pytest.raises(ValueError, match="LoRA is not on"):
        make_model().merge_lora()
    with pytest.raises(ValueError, match="LoRA is on already"):
        make_model(ALL).enable_lora(2)


# ---- PEFT's folder


@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "mlp.c_proj"), ALL])
def test_an_adapter_comes_back_from_its_folder(tmp_path, targets):
    model, other = make_model(targets), make_model()
    save_lora(model, tmp_path / "adapter")
    load_lora(other, tmp_path / "adapter")
    np.testing.assert_array_equal(other(IDS), model(IDS))
    assert other.lora.places == model.lora.places
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == ("LORA", 2, 3, True)


@pytest.mark.parametrize("targets", [["c_attn"], r"h\.\d+\.attn\.c_attn", ["h.0.attn.c_attn", "h.1.attn.c_attn"]])
def test_an_adapter_of_the_model_without_a_head_is_read(adapter, targets):
    """As PEFT makes it of ``GPT2Model``, whose matrices' names do not begin with ``transformer``."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace(".transformer.", "."): v for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    change_config(adapter, target_modules=targets)
    model = make_model()
    load_lora(model, adapter)
    np.testing.assert_array_equal(model(IDS), make_model(("c_attn",))(IDS))


@pytest.fixture
def adapter(tmp_path):
    save_lora(make_model(("c_attn",)), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern="),
        ({"modules_to_save": ["wte"]}, "modules_to_save="),
        ({"layers_to_transform": [0]}, "layers_to_transform="),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow=3"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"fan_in_fan_out": False}, "fan_in_fan_out=False"),
        ({"r": 3}, "shape"),
        ({"target_modules": ["c_attn", "c_fc"]}, "has no .*mlp.c_fc"),
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"r": "two"}, "r='two'"),
    ],
)
def test_what_we_lack_is_refused_by_its_key(adapter, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_lora(make_model(), adapter)


def test_what_changes_nothing_is_accepted(adapter):
    change_config(adapter, use_dora=False, inference_mode=True, lora_dropout=0.1, a_key_of_tomorrow=None, revision="x")
    load_lora(make_model(), adapter)


def test_rslora_has_its_own_scale(adapter):
    change_config(adapter, use_rslora=True)
    model = make_model()
    load_lora(model, adapter)
    assert float(model.blocks[0].attn.c_attn.lora_scale.value) == pytest.approx(3 / 2**0.5)


def test_target_modules_may_be_a_regular_expression(adapter):
    change_config(adapter, target_modules=r".*\.attn\.c_attn")
    model = make_model()
    load_lora(model, adapter)
    np.testing.assert_array_equal(model(IDS), make_model(("c_attn",))(IDS))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_a_file_or_with_a_damaged_one_is_refused(adapter, name):
    (adapter / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=name):
        load_lora(make_model(), adapter)
    (adapter / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_lora(make_model(), adapter)


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("extra", np.zeros((2, 12), np.float32), "has extra, which target_modules .* does not name"),
        ("extra", np.zeros((2, 12), np.int64), "has extra, which target_modules .* does not name"),
        ("extra", np.zeros((2, 12), np.bool_), "has extra, which target_modules .* does not name"),
        ("a", np.zeros((2, 12), np.int8), r"lora_A\.weight as I8, must be one of .*BF16; save .* in floats"),
        ("a", np.zeros(2, np.float32), "shape"),
        ("a", np.float32(0), "shape"),
        ("a", np.zeros((2, 12, 1), np.float32), "shape"),
    ],
)
def test_a_file_with_other_tensors_is_refused(adapter, key, array, message):
    path = adapter / "adapter_model.safetensors"
    name = key if key == "extra" else "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
    save_file({**load_file(path), name: np.asarray(array)}, path)
    with pytest.raises(CheckpointError, match=message):
        load_lora(make_model(), adapter)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_read(adapter, dtype):
    path = adapter / "adapter_model.safetensors"
    rounded = {name: array.astype(dtype) for name, array in load_file(path).items()}
    save_file(rounded, path)
    model = make_model()
    load_lora(model, adapter)
    expected = rounded["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.blocks[0].attn.c_attn.lora_b.value, expected)


def test_what_is_written_is_what_peft_reads(adapter):
    model = make_model(("c_attn",))
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for i, block in enumerate(model.blocks):
            name = f"base_model.model.transformer.h.{i}.attn.c_attn.lora_"
            np.testing.assert_array_equal(file.get_tensor(f"{name}A.weight"), block.attn.c_attn.lora_a.value)
            np.testing.assert_array_equal(file.get_tensor(f"{name}B.weight"), block.attn.c_attn.lora_b.value)
        assert len(file.keys()) == 2 * len(model.blocks)


def test_an_adapter_of_another_size_is_refused(adapter):
    other = GPT2Model(GPT2Config(n_vocab=61, n_ctx=12, n_embd=24, n_head=3, n_layer=2))
    with pytest.raises(CheckpointError, match="shape"):
        load_lora(other, adapter)
    assert other.lora is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_generator_takes_an_adapter(tmp_path, dtype):
    base = TextGenerator.load("tiny", dtype=dtype)
    base.model.enable_lora(2, alpha=64)
    for variable in base.model.trainable_variables:
        variable.assign(np.random.default_rng(3).standard_normal(variable.shape) * 0.1)
    save_lora(base.model, tmp_path)
    loaded = TextGenerator.load("tiny", dtype=dtype, adapter=tmp_path)
    assert isinstance(loaded.encoder, Encoder)
    wanted = base.generate("To be", max_new_tokens=6, jit_compile=False)
    assert loaded.generate("To be", max_new_tokens=6, jit_compile=False) == wanted
    assert wanted != TextGenerator.load("tiny", dtype=dtype).generate("To be", max_new_tokens=6, jit_compile=False)
