"""The model among Keras and TensorFlow: id types, training checkpoints, what is frozen, several devices."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2 import GPT2Config, GPT2Model
from tf_gpt2.model.layers import Block

CONFIG = GPT2Config(n_vocab=256, n_ctx=16, n_embd=8, n_head=2, n_layer=2)
IDS = np.random.default_rng(0).integers(0, 120, (4, 10)).astype(np.int32)


def make_model():
    model = GPT2Model(CONFIG)
    model.set_weights(lively_params(CONFIG))
    return model


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, **options)
    return model


# ---- ids of any integer type


@pytest.mark.parametrize(("dtype", "jit_compile"), [("uint8", True), ("int64", False)])
def test_any_integer_type_of_ids_is_what_int32_is(dtype, jit_compile):
    """256 tokens: in 8 bits the size of the vocabulary is none."""
    losses = [
        compiled(make_model(), jit_compile=jit_compile).fit(ids, IDS, verbose=0).history["loss"]
        for ids in (IDS, IDS.astype(dtype))
    ]
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)  # XLA may fuse another type's look-up otherwise


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64"])
def test_ids_of_any_type_in_each_kind_of_call(dtype):
    model, ids = make_model(), IDS.astype(dtype)
    inputs = keras.Input((None,), dtype=dtype)
    functional = keras.Model(inputs, model(inputs))
    wanted = model(IDS).numpy()
    for call in (model, tf.function(model), model.predict, functional, tf.function(model, jit_compile=True)):
        options = {"verbose": 0} if call == model.predict else {}
        np.testing.assert_allclose(call(tf.constant(ids), **options), wanted, atol=1e-4)


def test_wrong_ids_of_a_small_type_are_still_wrong():
    config = GPT2Config(n_vocab=100, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
    model = GPT2Model(config)
    for dtype, wrong in ((np.uint8, 255), (np.int8, -1), (np.uint64, 2**63), (np.int64, 2**32 + 5)):
        ids = np.array([[1, wrong], [1, 2]]).astype(dtype) if wrong < 2**63 else np.array([[1, wrong], [1, 2]], dtype)
        with pytest.raises(ValueError, match="ids must lie in"):
            model(ids)
        is_nan = np.isnan(tf.function(model, jit_compile=True)(tf.constant(ids))).any(axis=(1, 2))
        assert is_nan.tolist() == [True, False]


# ---- TensorFlow's own checkpoints


def as_itself(model):
    return model


def as_functional(model):
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, model(ids))


def as_module(model):
    module = tf.Module()
    module.inner = model
    return module


@pytest.mark.parametrize("hold", [as_itself, as_functional, as_module])
@pytest.mark.parametrize("manage", [False, True])
def test_a_training_checkpoint_has_every_variable(hold, manage, tmp_path):
    saved, restored = make_model(), GPT2Model(CONFIG)
    checkpoint = tf.train.Checkpoint(model=hold(saved))
    if manage:
        path = tf.train.CheckpointManager(checkpoint, str(tmp_path), max_to_keep=1).save()
    else:
        path = checkpoint.save(str(tmp_path / "training"))
    status = tf.train.Checkpoint(model=hold(restored)).restore(path)
    status.assert_existing_objects_matched()
    for found, wanted in zip(restored.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)
    shapes = [tuple(shape) for _, shape in tf.train.list_variables(path)]
    for variable in saved.variables:
        assert tuple(variable.shape) in shapes


# ---- what is frozen

FREEZE = {
    "a block": lambda model: setattr(model.blocks[0], "trainable", False),
    "a part of a block": lambda model: setattr(model.blocks[1].mlp.c_fc, "trainable", False),
    "a layer norm": lambda model: setattr(model.ln_f, "trainable", False),
    "an embedding": lambda model: setattr(model.wte, "trainable", False),
    "one variable": lambda model: setattr(model.blocks[1].attn.c_attn.b, "trainable", False),
    "all": lambda model: setattr(model, "trainable", False),
    "nothing": lambda model: None,
}


def trained_paths(model):
    trained = {id(variable) for variable in model.trainable_variables}
    return [i for i, variable in enumerate(model.variables) if id(variable) in trained]


@pytest.mark.parametrize("freeze", FREEZE.values(), ids=FREEZE)
def test_what_is_frozen_stays_frozen(freeze, tmp_path):
    model = make_model()
    freeze(model)
    compiled(model)
    if model.trainable_variables:
        model.fit(IDS, IDS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (loaded, keras.models.clone_model(model)):
        assert trained_paths(other) == trained_paths(model)
        assert other.blocks[0].trainable == model.blocks[0].trainable
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    loaded.trainable = False
    loaded.trainable = True  # all of it again
    assert len(loaded.trainable_variables) == len(loaded.variables)


def test_a_frozen_part_of_a_block_in_a_functional_model_stays_frozen(tmp_path):
    inputs = keras.Input((None, 8))
    block = Block(8, 2)
    model = keras.Model(inputs, block(inputs))
    block.attn.trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert trained_paths(loaded) == trained_paths(model)
    assert len(trained_paths(model)) == 8


# ---- several devices; checks of numbers; a Sequential model

MIRRORED = """
import keras, numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from tf_gpt2 import GPT2Config, GPT2Model, generate
config = GPT2Config(n_vocab=53, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
ids = np.random.default_rng(0).integers(0, 53, (8, 10))
def fit(scope):
    keras.utils.set_random_seed(0)
    with scope:
        model = GPT2Model(config)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.5), loss, jit_compile=False)
    history = model.fit(ids, ids, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    return history, model.get_weights(), generate(model, [[1, 2], [3]], max_new_tokens=4, jit_compile=False).ids
import contextlib
alone, several = fit(contextlib.nullcontext()), fit(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope())
np.testing.assert_allclose(several[0], alone[0], rtol=1e-5)
for one, other in zip(several[1], alone[1]):
    np.testing.assert_allclose(one, other, atol=1e-5)
assert several[2] == alone[2]
assert alone[0][1] < alone[0][0]
"""


def test_two_mirrored_replicas_train_as_one_device(run_python):
    run_python(MIRRORED, timeout=240)


NUMBERS = """
import numpy as np, tensorflow as tf, keras, sys
from tf_gpt2 import GPT2Config, GPT2Model, TextGenerator
ruins = [tf.fill([n], np.float32(np.nan)) for n in range(1, 200000, 997)]
del ruins  # what is allocated from here on may hold NaN
tf.debugging.enable_check_numerics()
config = GPT2Config(n_vocab=53, n_ctx=16, n_embd=8, n_head=2, n_layer=2)
model, ids = GPT2Model(config), np.ones((2, 5), np.int32)
assert np.isfinite(model(ids)).all() and np.isfinite(tf.function(model)(ids)).all()
model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
model.fit(ids, ids, verbose=0)
generator = TextGenerator.from_checkpoint(sys.argv[1])
two = ["To be", "or"]  # as everywhere below: another number of rows is traced anew
print(generator.generate(two, max_new_tokens=4)[0])
generator.generate(two, max_new_tokens=4, temperature=0.8, prompt_lookup=True)
filters = {"top_k": [0, 40], "top_p": [0.9, 1.0], "min_p": [0.0, 0.1], "typical_p": [0.5, 1.0]}
bans = {"suppress": [5], "logit_bias": {7: -np.inf, 8: 2.0}, "bad_words_ids": [[1], [2, 3]], "no_repeat_ngram_size": 2}
penalties = {"repetition_penalty": [1.5, 0.01], "presence_penalty": 1.0, "frequency_penalty": -1.0, "min_new_tokens": 2}
for temperature in (0.0, 1e-30, 0.7, 1e30):
    generator.generate(two, max_new_tokens=4, temperature=temperature, **filters, **bans, **penalties)
generator.beam_search("To be", num_beams=3, max_new_tokens=4, num_return_sequences=2, length_penalty=-10.0)
generator.complete("To be", max_new_tokens=4, top_logprobs=3, num_samples=2, temperature=1.0, stop=["x"])
generator.perplexity("To be or not to be")
generator.score("To be")
"""


def test_checks_of_numbers_find_nothing_in_a_sound_model(run_python):
    from tf_gpt2.checkpoint.download import embedded_dir

    assert run_python(NUMBERS, embedded_dir(), timeout=400).startswith(" a brief")


def test_a_sequential_model_says_what_it_begins_with():
    with pytest.raises(ValueError, match=r"begins with keras.Input\(\(None,\), dtype='int32'\)"):
        compiled(keras.Sequential([make_model()])).fit(IDS, IDS, verbose=0)
    model = compiled(keras.Sequential([keras.Input((None,), dtype="int32"), make_model()]))
    assert np.isfinite(model.fit(IDS, IDS, verbose=0).history["loss"]).all()
