"""Blocks that share one graph against blocks that are called one by one; and when they may not share one."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.cache import DecodeLayer, PrefillLayer, slots_at
from tf_gpt2.generation.generate import generate
from tf_gpt2.generation.loop import read_prompts
from tf_gpt2.model.alike import are_alike, call_alike
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.layers import MLP, Block, causal_mask
from tf_gpt2.model.loops import compiled_loop

CONFIG = GPT2Config(n_vocab=53, n_ctx=24, n_embd=12, n_head=3, n_layer=4)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]


def make_model(**options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG))
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def n_calls(monkeypatch):
    """Counts the calls of blocks."""
    counts, call = [], Block.call
    monkeypatch.setattr(Block, "call", lambda *args, **kwargs: (counts.append(1), call(*args, **kwargs))[1])
    return counts


def draw(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), tf.float32)


def make_caches(kind, n_rows):
    if kind == "prefill":
        return [PrefillLayer() for _ in range(4)]
    parts = [(draw(3 * n_rows, 10, 4, seed=i), draw(3 * n_rows, 10, 4, seed=i + 9)) for i in range(4)]
    slots = slots_at(tf.range(n_rows)[:, None] + 5, 3, parts[0][0])
    return [DecodeLayer(keys, values, slots) for keys, values in parts]


def one_by_one(blocks, x, caches):
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, cache=cache)
    return x


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"quantization": "int8"}, {"dtype": "mixed_bfloat16"}, {"dropout": 0.1}], ids=str
)
@pytest.mark.parametrize(("kind", "n_rows", "n_fed"), [("prefill", 2, 7), ("decode", 1, 1), ("decode", 3, 1)])
def test_one_graph_for_all_gives_what_each_gives(kind, n_rows, n_fed, options, jit_compile):
    model, x = make_model(**options), draw(n_rows, n_fed, 12, seed=7)
    found = {}
    for call in (one_by_one, call_alike):

        def run(x, call=call):
            caches = make_caches(kind, n_rows)
            with compiled_loop():
                x = call(model.blocks, x, caches)
            return x, [(cache.keys, cache.values) for cache in caches]

        found[call] = tf.function(run, jit_compile=jit_compile)(x)
    for one, other in zip(*map(tf.nest.flatten, found.values()), strict=True):
        np.testing.assert_allclose(tf.cast(one, tf.float32), tf.cast(other, tf.float32), atol=1e-5)
    assert len({float(tf.reduce_sum(tf.cast(keys, tf.float32))) for keys, _ in found[call_alike][1]}) == 4


def test_each_block_multiplies_by_its_own_copies(model):
    """Copies that are unlike the weights show whose they are."""
    linears = [[b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj] for b in model.blocks]
    x, found = draw(3, 1, 12), {}
    for call in (one_by_one, call_alike):

        @tf.function
        def run(x, call=call):
            copies = {
                id(y.w.value): tf.transpose(y.w.value) * (i + 2.0) for i, part in enumerate(linears) for y in part
            }
            with compiled_loop(copies):
                return call(model.blocks, x, make_caches("decode", 3))

        found[call] = run(x).numpy()
    np.testing.assert_allclose(found[call_alike], found[one_by_one], rtol=1e-5, atol=1e-5)
    plain = tf.function(lambda x: one_by_one(model.blocks, x, make_caches("decode", 3)))(x).numpy()
    assert np.abs(plain - found[call_alike]).max() > 0.1


def test_one_block_is_traced_for_all(model, n_calls):
    generate(model, PROMPTS, max_new_tokens=3, jit_compile=False)
    assert len(n_calls) == 6  # for prefill, for the loop for all, and for two lean steps at once, greedy and drawn
    n_calls.clear()
    read_prompts(model, tf.constant([[1, 2, 3]]))
    assert len(n_calls) == 4  # eagerly each by itself


class Remembering:
    """Someone's own cache: keeps more than tensors."""

    def __init__(self):
        self.lengths = []

    def update(self, k, v):
        self.lengths.append(k.shape[1])
        return k, v, causal_mask(k.shape[1])


class Stateless:
    """Someone's own cache without attributes."""

    __slots__ = ()

    def update(self, k, v):
        return k, v, causal_mask(k.shape[1])


@pytest.mark.parametrize("cache", [Remembering, Stateless])
def test_any_object_can_be_a_cache_in_a_graph(cache, model):
    ids, caches = tf.constant([[3, 1, 4]]), [cache() for _ in model.blocks]
    found = tf.function(lambda ids: model.hidden_states(ids, cache=caches))(ids)
    np.testing.assert_allclose(found, model.hidden_states(ids), atol=1e-5)
    assert all(one.lengths == [3] for one in caches if cache is Remembering)


class Adapted(keras.layers.Layer):
    """Someone's own layer around another."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor, self.b = inner, factor, inner.b

    def call(self, x):
        return self.inner(x) * self.factor


class Counting(Block):
    """A block of someone's own, which counts its calls."""

    def build(self, input_shape):
        super().build(input_shape)
        self.n_calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="n_calls")

    def call(self, *args, **kwargs):
        self.n_calls.assign_add(1)
        return super().call(*args, **kwargs)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_a_layer_s_state_is_kept(n_layer):
    blocks = [Counting(12, 3) for _ in range(n_layer)]
    model = GPT2Model(dataclasses.replace(CONFIG, n_layer=n_layer))
    model._tracker.unlock()
    model.blocks = blocks
    for block in blocks:
        block.build((None, None, 12))
    generate(model, [[3, 1, 4]], max_new_tokens=5, jit_compile=False)
    assert [int(block.n_calls) for block in blocks] == [6] * n_layer  # once in prefill


def adapt(mlp, factor):
    mlp._tracker.unlock()
    mlp.c_proj = Adapted(mlp.c_proj, np.float32(factor))


def halve(layer):
    call = layer.call
    layer.call = lambda *args, **kwargs: call(*args, **kwargs) / 2


CHANGES = {
    "a method": lambda model: halve(model.blocks[2].mlp),
    "a method of each": lambda model: [halve(block.attn) for block in model.blocks],
    "a method of the first": lambda model: halve(model.blocks[0]),
    "a method inside": lambda model: halve(model.blocks[3].attn.c_proj),
    "a layer of each": lambda model: [adapt(block.mlp, 0.5 + i) for i, block in enumerate(model.blocks)],
    "another class": lambda model: setattr(model.blocks[1].mlp, "__class__", Narrow),
}


class Narrow(MLP):
    """An MLP of someone else's."""

    def call(self, x, training=None):
        return super().call(x) * 0.3


def test_a_batch_goes_through_someone_s_own_layers_under_xla(model):
    CHANGES["a layer of each"](model)
    plain = generate(model, PROMPTS, max_new_tokens=6, jit_compile=False)
    assert generate(model, PROMPTS, max_new_tokens=6).ids == plain.ids


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_someone_has_changed_in_a_block_counts(change, model):
    assert are_alike(model.blocks)
    before = generate(model, PROMPTS, max_new_tokens=6, jit_compile=False)
    model = make_model()
    change(model)
    assert not are_alike(model.blocks)
    result = generate(model, PROMPTS, max_new_tokens=6, jit_compile=False)
    assert result.logprobs != before.logprobs
    for prompt, ids, logprobs in zip(PROMPTS, result.ids, result.logprobs, strict=True):
        plain = tf.nn.log_softmax(model(np.array([prompt + ids])))[0, len(prompt) - 1 : -1].numpy()
        assert ids == plain.argmax(axis=1).tolist()
        assert logprobs == pytest.approx(plain.max(axis=1), abs=1e-4)


def test_other_settings_and_other_parts_are_not_alike():
    def block(**options):
        layer = Block(**{"n_embd": 12, "n_head": 3, **options})
        layer.build((None, None, 12))
        return layer

    assert are_alike([block(), block(name="another")])
    for options in ({"n_head": 2}, {"quantization": "int8"}, {"dtype": "bfloat16"}, {"dropout": 0.1}):
        assert not are_alike([block(), block(**options)])
    longer = Block(n_embd=12, n_head=3)
    longer.extra = keras.layers.Dropout(0.1)
    longer.build((None, None, 12))
    assert not are_alike([block(), longer])
