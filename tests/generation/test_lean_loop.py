"""The lean loop, which takes the likeliest tokens or draws, against the one for all, and whom it is for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_gpt2 import GPT2Config, GPT2Model, generate
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.generation import lean_loop, loop
from tf_gpt2.generation.lean_choice import Draw, Likeliest
from tf_gpt2.generation.lean_loop import MANY_ROWS, decode_lean, may_decode_lean
from tf_gpt2.generation.loop import as_plain_loop, decode_with, grow, prefill
from tf_gpt2.generation.settings import make_sampling
from tf_gpt2.generation.state import Limits
from tf_gpt2.model.layers import LayerNorm

CONFIG = GPT2Config(n_vocab=50, n_ctx=24, n_embd=12, n_head=3, n_layer=3)
PROMPT = 5
STOP_IDS = tf.range(0, 50, 4)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, seed=3)


def make_model(params, **options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(params)
    return model


@pytest.fixture(scope="module", params=["small", "large", "int8"])
def model(request, params):
    """Of a small one two steps are taken at once, and halves of many rows; not of a large one."""
    patch = pytest.MonkeyPatch()
    patch.setattr(lean_loop, "SMALL", 0 if request.param in ("large", "int8") else 2**22)
    yield make_model(params, quantization="int8" if request.param == "int8" else None)
    patch.undo()


def start(model, n_rows, *, n_slots=CONFIG.n_ctx, seed=0):
    """Prompts of many lengths, read, with room."""
    random = np.random.default_rng(seed)
    ids = tf.constant(random.integers(CONFIG.n_vocab, size=(n_rows, PROMPT)), tf.int32)
    lengths = tf.constant(random.integers(1, PROMPT + 1, n_rows), tf.int32)
    return grow(tf.function(lambda: prefill(model, ids, lengths), autograph=False)(), n_slots)


def options_of(n_rows, **options):
    """Settings of rows that differ: some take their likeliest token among others that draw."""
    several = {"temperature": [0.0, 1.0, 0.5, 1.5], "top_k": [0, 7, 0, 5], "top_p": [0.5, 0.9, 0.8, 1.0]}
    drawn = several | {"min_p": [0.0, 0.05, 0.0, 0.1], "seed": list(range(20))}
    options = options or {name: (values * n_rows)[1 : n_rows + 1] for name, values in drawn.items()}
    sampling = make_sampling(n_rows, CONFIG, **options)
    return sampling._replace(n_before=tf.range(n_rows))


def traced(decode, model, *arguments, knows_rows=True):
    """Gives a loop's graph, which may know the number of rows, as in Python, or not, as in a SavedModel."""

    def plain(state, sampling, limits, n_steps):
        return as_plain_loop(decode)(model, state, sampling, limits, n_steps)

    arguments = *arguments, tf.constant(0)
    shapes = [x.shape if knows_rows else [None] * len(x.shape[:2]) + x.shape[2:] for x in tf.nest.flatten(arguments)]
    specs = [tf.TensorSpec(shape, x.dtype) for shape, x in zip(shapes, tf.nest.flatten(arguments), strict=True)]
    signature = tf.nest.pack_sequence_as(arguments, specs)
    return tf.function(plain, input_signature=signature, autograph=False)


def run(decode, model, state, sampling, limits, n_steps):
    return traced(decode, model, state, sampling, limits)(state, sampling, limits, tf.constant(n_steps))


def likeliest(model, state, sampling, limits, n_steps):
    return decode_lean(model, state, Likeliest(), limits, n_steps)


def drawn(model, state, sampling, limits, n_steps):
    return decode_lean(model, state, Draw.of(sampling, CONFIG.n_vocab), limits, n_steps)


WAYS = ["for all", "Likeliest", "Draw"]
GREEDY = {"temperature": 0.0}
LOOPS = pytest.mark.parametrize(("lean", "options"), [(likeliest, GREEDY), (drawn, {})], ids=["likeliest", "drawn"])


def assert_same(found, wanted):
    """What counts: all but what lies past the rows' ends."""
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_array_equal(found.stopped, wanted.stopped)
    n_head = found.keys[0].shape[0] // len(found.lengths)
    for row, length in enumerate(wanted.lengths.numpy()):
        assert found.ids[row, :length].numpy().tolist() == wanted.ids[row, :length].numpy().tolist()
        np.testing.assert_allclose(found.logprobs[row, :length], wanted.logprobs[row, :length], atol=1e-4)
        heads = slice(row * n_head, (row + 1) * n_head)
        for one, other in zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True):
            np.testing.assert_allclose(one[heads, : length - 1], other[heads, : length - 1], atol=1e-4)


@LOOPS
@pytest.mark.parametrize(("n_rows", "knows_rows"), [(1, True), (3, False), (MANY_ROWS, False), (MANY_ROWS + 3, True)])
def test_it_decodes_as_the_loop_for_all(model, n_rows, knows_rows, lean, options):
    state, sampling = start(model, n_rows), options_of(n_rows, **options)
    lengths = np.random.default_rng(1).integers(4, CONFIG.n_ctx + 2, n_rows)  # some end before they begin
    limits = Limits(tf.constant(lengths, tf.int32), STOP_IDS)
    decode = traced(lean, model, state, sampling, limits, knows_rows=knows_rows)
    decode_for_all = traced(decode_with, model, state, sampling, limits)
    for n_steps in (0, 1, 6, 7, 40):
        arguments = state, sampling, limits, tf.constant(n_steps)
        assert_same(decode(*arguments), decode_for_all(*arguments))


def test_rows_do_stop(params):
    model = make_model(params)
    limits = Limits(tf.fill([MANY_ROWS], CONFIG.n_ctx), STOP_IDS)
    for lean, options in ((likeliest, GREEDY), (drawn, {})):
        arguments = start(model, MANY_ROWS), options_of(MANY_ROWS, **options), limits, 20
        assert run(lean, model, *arguments).stopped.numpy().any()


@LOOPS
@pytest.mark.parametrize("stop_ids", [tf.constant([-1]), STOP_IDS], ids=["none stops", "some stop"])
@pytest.mark.parametrize("n_rows", [2, MANY_ROWS])
def test_a_state_stays_as_it_was_and_is_continued_in_pieces(model, n_rows, stop_ids, lean, options):
    """The loop writes in place, but not into what others hold; a row that has stopped stays so while others go on."""
    state, sampling = start(model, n_rows), options_of(n_rows, **options)
    before = tf.nest.map_structure(lambda x: x.numpy().copy(), state)
    limits = Limits(tf.fill([n_rows], CONFIG.n_ctx + 1), stop_ids)
    whole = run(decode_with, model, state, sampling, limits, 9)
    decode = traced(lean, model, state, sampling, limits)
    decode(state, sampling, limits, tf.constant(9))
    for one, other in zip(tf.nest.flatten(before), tf.nest.flatten(state), strict=True):
        np.testing.assert_array_equal(one, other)
    for n_steps in (2, 3, 4):
        state = decode(state, sampling, limits, tf.constant(n_steps))
    assert_same(state, whole)


def test_a_row_that_is_full_writes_into_no_other(params):
    model = make_model(params)
    state = start(model, 2, n_slots=8)
    limits = Limits(tf.constant([9, 6]), tf.constant([-1]))
    arguments = state, options_of(2, **GREEDY), limits, 40
    alone = run(likeliest, model, *arguments)
    assert_same(alone, run(decode_with, model, *arguments))
    assert alone.lengths.numpy().tolist() == [9, 6]


@LOOPS
def test_a_full_row_keeps_its_cache(model, lean, options):
    """Steps after its end, which come where two are taken at once, must not spoil what it goes on with."""
    sampling = options_of(2, **options)
    limits = Limits(tf.fill([2], CONFIG.n_ctx), tf.constant([-1]))
    state = start(model, 2, n_slots=8)
    wanted = run(decode_with, model, grow(state, CONFIG.n_ctx), sampling, limits, 12)
    for n_slots in (8, CONFIG.n_ctx):
        state = grow(state, n_slots)
        n_steps = min(
            n_slots + 1 - int(tf.reduce_max(state.lengths)), 12 - int(state.lengths[0] - wanted.prompt_lengths[0])
        )
        state = run(lean, model, state, sampling, limits, n_steps)
    assert_same(state, wanted)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "Likeliest"),
        ({"min_p": 0.5, "top_k": 3}, "Likeliest"),
        ({"temperature": [0.0, 1.0]}, "Draw"),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, "Draw"),
        ({"temperature": 1.0, "typical_p": 0.5}, "for all"),
        ({"temperature": 1.0, "repetition_penalty": 1.2}, "for all"),
        ({"temperature": 1.0, "logit_bias": {3: 1.0}}, "for all"),
        ({"repetition_penalty": [1.0, 1.2]}, "for all"),
        ({"min_new_tokens": 2}, "for all"),
    ],
    ids=str,
)
def test_who_goes_which_way(params, monkeypatch, options, wanted):
    monkeypatch.setattr(lean_loop, "SMALL", 2**22)
    model = make_model(params)

    def say(way):
        def instead(model, state, *args):
            return state._replace(lengths=tf.fill(tf.shape(state.lengths), WAYS.index(way(*args))))

        return instead

    monkeypatch.setattr(loop, "decode_lean", say(lambda choice, *_: type(choice).__name__))
    monkeypatch.setattr(loop, "decode_with", say(lambda *_: "for all"))
    limits = Limits(tf.fill([2], CONFIG.n_ctx), tf.constant([-1]))
    way = run(loop.decode, model, start(model, 2), make_sampling(2, CONFIG, **options), limits, 9).lengths
    assert [WAYS[i] for i in way] == [wanted] * 2


def test_a_large_model_draws_in_the_loop_for_all(params, monkeypatch):
    monkeypatch.setattr(lean_loop, "SMALL", 0)
    monkeypatch.setattr(Draw, "of", None)
    model = make_model(params)
    limits = Limits(tf.fill([2], CONFIG.n_ctx), tf.constant([-1]))
    arguments = start(model, 2), options_of(2), limits, 9
    assert_same(run(loop.decode, model, *arguments), run(decode_with, model, *arguments))


class OwnModel(GPT2Model):
    """Someone's own model."""


def with_own_norm(model):
    class OwnNorm(LayerNorm):
        """Someone's own layer."""

    model.ln_f.__class__ = OwnNorm


def with_own_method(model):
    feed_forward = model.blocks[1].mlp.call
    model.blocks[1].mlp.call = lambda x, training=None: feed_forward(x)


def with_own_logits(model):
    model.logits = lambda hidden: GPT2Model.logits(model, hidden)


def with_branch(model):
    class Branch(keras.layers.Dropout):
        """A layer whose graph has a branch, which cannot run in one thread."""

        def call(self, x, training=None):
            return tf.cond(tf.reduce_sum(x) > 0, lambda: x * 1.0, lambda: x + 0.0)

    model.embd_dropout.__class__ = Branch


@pytest.mark.parametrize("change", [with_own_norm, with_own_method, with_own_logits, with_branch])
def test_what_someone_has_changed_goes_through_the_loop_for_all(params, change):
    model = make_model(params)
    prompts = [[1, 2, 3], [4, 5]]
    wanted = generate(model, prompts, max_new_tokens=6, jit_compile=False).ids
    changed = make_model(params)
    change(changed)

    @tf.function(autograph=False)
    def may(state):
        assert may_decode_lean(model, state)
        assert not may_decode_lean(changed, state)
        return state.lengths

    may(start(model, 1))
    assert generate(changed, prompts, max_new_tokens=6, jit_compile=False).ids == wanted


def test_a_subclass_and_likeliest_ids_go_through_the_loop_for_all(params):
    own = OwnModel(CONFIG)
    own.set_weights(params)
    state = start(own, 1)
    model = make_model(params)
    with_top = tf.function(lambda: prefill(model, tf.constant([[1, 2]]), tf.constant([2]), 1, 3), autograph=False)()

    @tf.function(autograph=False)
    def may(state, with_top):
        assert not may_decode_lean(own, state)
        assert not may_decode_lean(model, with_top)
        return state.lengths

    may(state, with_top)
    assert not may_decode_lean(model, state)  # eagerly
