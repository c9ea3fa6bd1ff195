"""Transposed copies of the weights: what they hold, when they are made, and that they are never out of date."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2 import GPT2Config, GPT2Model, generate
from tf_gpt2.checkpoint.params import map_leaves
from tf_gpt2.generation import transposed
from tf_gpt2.generation.transposed import matrices, transposed_of

CONFIG = GPT2Config(n_vocab=101, n_ctx=40, n_embd=12, n_head=3, n_layer=2)
PROMPTS = [[5, 6, 7], [1, 2]]


def make_model(seed=0, **options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG, seed=seed))
    return model


@pytest.mark.parametrize("access", [tf.gather, lambda w, rows: w.sparse_read(rows)])
def test_rows_that_are_gathered_change_nothing(access):
    model = make_model()
    access(model.wte.value, [1, 2])
    copies = transposed_of(model)()
    assert transposed_of(model)() is copies
    model.wte.value.scatter_nd_update([[3]], tf.ones((1, CONFIG.n_embd)))
    changed = transposed_of(model)()
    assert changed is not copies
    assert np.array_equal(changed[0][:, 3], np.ones(CONFIG.n_embd))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_each_matrix_is_there_as_it_is_multiplied(dtype):
    model = make_model(dtype=dtype)
    computed = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    copies = transposed_of(model)()
    assert len(copies) == 4 * CONFIG.n_layer + 1
    for copy, variable in zip(copies, matrices(model), strict=True):
        assert copy.dtype == tf.float32
        assert np.array_equal(copy, variable.numpy().astype(computed).astype(np.float32).T)


def test_of_8_bit_weights_there_are_none():
    assert transposed_of(make_model(quantization="int8"))() == ()


def test_they_are_made_once():
    model = make_model()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: transposed_of(model)(), range(20)))
    assert all(copies is found[0] for copies in found)


def test_one_row_needs_none(monkeypatch):
    made = []
    monkeypatch.setattr(transposed, "transpose", lambda *arguments: made.append(arguments) or made)
    generate(make_model(), PROMPTS[:1], max_new_tokens=5)
    assert not made


def test_calls_share_them(monkeypatch):
    made, transpose = [], transposed.transpose
    monkeypatch.setattr(transposed, "transpose", lambda *arguments: made.append(1) or transpose(*arguments))
    model = make_model()
    for _ in range(3):
        generate(model, PROMPTS, max_new_tokens=5)
    assert len(made) == 4 * CONFIG.n_layer + 1


def assign_one(model):
    model.blocks[1].mlp.c_proj.w.assign(model.blocks[1].mlp.c_proj.w.value * 3)


def add_in_place(model):
    model.wte.value.assign_add(tf.ones_like(model.wte.value))


def scatter(model):
    weight = model.blocks[0].attn.c_attn.w.value
    weight.scatter_nd_add([[0]], [[5.0] * CONFIG.n_embd])


def add_in_compiled_code(model):
    weight = model.blocks[0].mlp.c_fc.w.value
    tf.function(lambda: weight.assign_sub(tf.ones_like(weight)), jit_compile=True)()


def fit(model, *, jit_compile):
    model.compile(keras.optimizers.Adam(0.5), keras.losses.SparseCategoricalCrossentropy(True), jit_compile=jit_compile)
    ids = np.random.default_rng(0).integers(CONFIG.n_vocab, size=(4, 9)).astype(np.int32)
    model.fit(ids[:, :-1], ids[:, 1:], epochs=2, verbose=0)


CHANGES = {
    "a tree": lambda model: model.set_weights(map_leaves(lambda _, leaf: 2 * leaf, model.get_params())),
    "a list": lambda model: model.set_weights([2 * weight for weight in model.get_weights()]),
    "one weight": assign_one,
    "in place": add_in_place,
    "some rows": scatter,
    "compiled": add_in_compiled_code,
    "fit": lambda model: fit(model, jit_compile=False),
    "fit with XLA": lambda model: fit(model, jit_compile=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_changed_count_at_once(change):
    model, fresh = make_model(), GPT2Model(CONFIG)
    before = generate(model, PROMPTS, max_new_tokens=8)
    old = [copy.numpy() for copy in transposed_of(model)()]
    for _ in range(2):  # the second time the memory of the first may come back
        change(model)
        copies = transposed_of(model)()
        assert all(np.array_equal(c, w.numpy().T) for c, w in zip(copies, matrices(model), strict=True))
        assert not all(map(np.array_equal, copies, old))
        old = [copy.numpy() for copy in copies]
    fresh.set_weights(model.get_params())
    after, wanted = (generate(x, PROMPTS, max_new_tokens=8) for x in (model, fresh))
    assert after.ids == wanted.ids
    assert after.logprobs == wanted.logprobs
    assert after.logprobs != before.logprobs


def test_they_go_with_their_model():
    model = make_model()
    generate(model, PROMPTS, max_new_tokens=2)
    copies, model = weakref.ref(transposed_of(model)), weakref.ref(model)
    gc.collect()
    assert model() is None
    assert copies() is None
