"""What is compiled serves all models of one shape; transposed twins of weights are never out of date."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2.checkpoint.params import leaves, map_leaves
from tf_gpt2.config import GPT2Config
from tf_gpt2.generation import choose
from tf_gpt2.generation.beam import beam_search
from tf_gpt2.generation.compiled import Compiled, arithmetic, compiled, compiled_for, matrices, twins_of, with_twins
from tf_gpt2.generation.generate import generate, warm_up
from tf_gpt2.generation.loop import decode, prefill
from tf_gpt2.generation.scoring import score
from tf_gpt2.model.arithmetic import graph, xla
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import weights_of
from tf_gpt2.runtime import kernels
from tf_gpt2.runtime.tf_internals import address, call_flat, read_without_copy

CONFIG = GPT2Config(n_vocab=17, n_ctx=12, n_embd=4, n_head=1, n_layer=1)
OPTIONS = {"max_new_tokens": 3, "jit_compile": False}
WIDER = GPT2Config(n_vocab=101, n_ctx=40, n_embd=12, n_head=3, n_layer=2)
PROMPTS = [[5, 6, 7], [1, 2]]


@pytest.fixture
def model():
    return GPT2Model(CONFIG)


def make_model(seed=0, **options):
    model = GPT2Model(WIDER, **options)
    model.set_weights(lively_params(WIDER, seed=seed))
    return model


# ---- one function for all models of a shape


def test_shapes_and_integers_are_compiled_apart_and_once(model):
    function = Compiled(lambda net, x, n: tf.fill([n], tf.reduce_sum(x) + net.config.n_embd), CONFIG, "float32", xla)
    for _ in range(2):
        for length, n in ((2, 3), (2, 1), (5, 3)):
            assert function(weights_of(model), tf.ones(length), n).numpy().tolist() == [length + 4] * n
    assert function.n_traces == 3


@pytest.mark.parametrize("ops", [graph, xla])
def test_xla_compiles_if_asked_to(ops, model):
    function = Compiled(lambda _, x: x + 1, CONFIG, "float32", ops)
    weights = weights_of(model)
    function(weights, tf.ones(2))
    concrete = function.function.get_concrete_function(weights, tf.ones(2))
    assert concrete.function_def.attr["_XlaMustCompile"].b is ops.JIT_COMPILE


@pytest.mark.parametrize("jit_compile", [False, True])
def test_models_of_one_shape_share_what_is_compiled_and_keep_their_weights(jit_compile):
    models = [make_model(seed) for seed in range(3)]
    ops = arithmetic(jit_compile=jit_compile)
    functions = [compiled_for(function, WIDER, "float32", ops) for function in (prefill, decode)]
    found = [generate(models[0], PROMPTS, max_new_tokens=5, jit_compile=jit_compile)]
    n_traces = [function.n_traces for function in functions]
    assert 0 not in n_traces
    found += [generate(one, PROMPTS, max_new_tokens=5, jit_compile=jit_compile) for one in models[1:]]
    assert [function.n_traces for function in functions] == n_traces
    for one, result in zip(models, found, strict=True):
        for prompt, ids, logprobs in zip(PROMPTS, result.ids, result.logprobs, strict=True):
            wanted = tf.nn.log_softmax(one(np.array([prompt + ids])))[0, len(prompt) - 1 : -1].numpy()
            assert logprobs == pytest.approx([row[i] for row, i in zip(wanted, ids, strict=True)], abs=1e-4)
    assert len({str(result.ids) for result in found}) == 3


def test_models_of_different_shapes_share_the_graph_of_choosing(monkeypatch):
    """Guards a speed that would be lost in silence."""
    calls = []
    drawn = choose.gumbel
    monkeypatch.setattr(choose, "gumbel", lambda *args: calls.append(args) or drawn(*args))
    options = {"max_new_tokens": 3, "temperature": 1.0, "jit_compile": False}
    for n_embd in (4, 8):  # of 23 ids, as no other test has
        model = GPT2Model(GPT2Config(n_vocab=23, n_ctx=12, n_embd=n_embd, n_head=1, n_layer=1))
        generate(model, [[5, 6, 7]], **options)
    assert len(calls) == 1


def test_training_between_two_texts_compiles_nothing():
    model = make_model()
    ops = arithmetic(jit_compile=True)
    functions = [compiled_for(function, WIDER, "float32", ops) for function in (prefill, decode)]
    before = generate(model, PROMPTS, max_new_tokens=5)
    n_traces = [function.n_traces for function in functions]
    fit(model, jit_compile=False)
    after = generate(model, PROMPTS, max_new_tokens=5)
    assert [function.n_traces for function in functions] == n_traces
    assert before.logprobs != after.logprobs


LOAD_AND_DROP = """
import ctypes, gc, sys, tf_gpt2
from tf_gpt2.generation.compiled import arithmetic, compiled_for
from tf_gpt2.generation.loop import decode, prefill

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

sizes = []
for turn in range(15):
    generator = tf_gpt2.TextGenerator.from_checkpoint(sys.argv[1])
    generator.generate("To be", max_new_tokens=8)
    config = generator.model.config
    del generator
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the allocator keeps up to 100 MiB for later
    sizes.append(resident())
ops = arithmetic(jit_compile=True)
n_traces = [compiled_for(function, config, "float32", ops).n_traces for function in (prefill, decode)]
print(sizes[2], max(sizes[2:]), *n_traces)
"""


def test_loading_and_dropping_models_leaves_memory_flat(run_python):
    from tf_gpt2.checkpoint.download import embedded_dir

    third, largest, *n_traces = map(float, run_python(LOAD_AND_DROP, embedded_dir(), timeout=300).split())
    assert n_traces == [1, 1]
    assert largest - third < 10  # MiB; a name of its own for each model's variables would take 2 a turn


def test_a_model_is_not_kept_alive():
    other = GPT2Model(CONFIG)
    generate(other, [[1], [2]], **OPTIONS)
    freed = weakref.ref(other)
    del other
    gc.collect()
    assert freed() is None


def test_a_flat_call_is_an_ordinary_call():
    """Guards an internal of TensorFlow: the order of arguments in a flat list."""
    one, other = make_model(), make_model(seed=1)
    function = tf.function(lambda tree, x: (tf.nest.map_structure(tf.reduce_sum, tree), x + 1), autograph=False)
    for model in (one, other):
        weights = with_twins(weights_of(model), [m.value * 2 for m in matrices(weights_of(model))])
        concrete = function.get_concrete_function(weights, tf.ones(2))
        flat = [x.handle if isinstance(x, tf.Variable) else x for x in tf.nest.flatten([weights, tf.ones(2)])]
        found, wanted = call_flat(concrete, flat), function(weights, tf.ones(2))
        assert [float(tf.reduce_sum(x)) for x in tf.nest.flatten(found)] == [
            float(tf.reduce_sum(x)) for x in tf.nest.flatten(wanted)
        ]


def test_reading_weights_copies_none():
    variable = tf.Variable(tf.ones((5, 3)))
    tf.gather(variable, [1])  # from now on TensorFlow copies at each read
    assert address(read_without_copy(variable)) == address(read_without_copy(variable))
    for _, leaf in leaves(make_model().leaf_tree()):
        assert leaf.weight() is leaf.variable.value or leaf.weight().value is leaf.variable.value


def test_an_ordinary_function_is_complained_of(caplog):
    """Or the test below proves nothing."""
    function = tf.function(lambda x: x)
    for n in range(9):
        function(tf.ones(n))
    assert "retracing" in caplog.text


@pytest.mark.parametrize(
    "use",
    [
        lambda model, n: generate(model, [[1]] * n, **OPTIONS),
        lambda model, n: warm_up(model, n_prompts=n, **OPTIONS),
        lambda model, n: beam_search(model, [[1]] * n, num_beams=2, **OPTIONS),
        lambda model, n: score(model, [[1, 2]] * n, jit_compile=False),
    ],
    ids=["generate", "warm_up", "beam_search", "score"],
)
def test_no_number_of_shapes_is_complained_of(use, model, caplog):
    """Powers of two, each of which is a shape of its own everywhere."""
    for i in range(5):
        use(model, 2**i)
    assert "retracing" not in caplog.text


# ---- transposed twins


def twins(model):
    return [matrix.transposed for matrix in matrices(twins_of(model).add_to(weights_of(model)))]


def variables(model):
    return [matrix.value for matrix in matrices(weights_of(model))]


@pytest.mark.parametrize("access", [tf.gather, lambda w, rows: w.sparse_read(rows)])
def test_rows_that_are_gathered_change_nothing(access):
    model = make_model()
    access(model.wte.value, [1, 2])
    before = twins(model)
    assert all(one is other for one, other in zip(before, twins(model), strict=True))
    model.wte.value.scatter_nd_update([[3]], tf.ones((1, WIDER.n_embd)))
    changed = dict(zip((v.ref() for v in variables(model)), twins(model), strict=True))[model.wte.value.ref()]
    assert np.array_equal(changed[:, 3], np.ones(WIDER.n_embd))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_each_matrix_is_there_as_it_is_multiplied(dtype):
    model = make_model(dtype=dtype)
    computed = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    assert len(twins(model)) == 4 * WIDER.n_layer + 1
    for twin, variable in zip(twins(model), variables(model), strict=True):
        assert twin.dtype == tf.float32
        assert np.array_equal(twin, variable.numpy().astype(computed).astype(np.float32).T)


def test_of_8_bit_weights_there_are_none():
    model = make_model(quantization="int8")
    assert twins(model) == []
    assert matrices(compiled(decode, model, jit_compile=True, n_rows=20).args[0]) == []


def test_they_are_made_once():
    model = make_model()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: twins(model), range(20)))
    assert all(one is other for tree in found for one, other in zip(tree, found[0], strict=True))


def test_one_row_and_plain_code_get_none(monkeypatch):
    monkeypatch.setenv(kernels.ENV_VAR, "xla")
    model = make_model()
    for options in ({"jit_compile": True}, {"jit_compile": False, "n_rows": 2}):
        weights = compiled(decode, model, **options).args[0]
        assert all(matrix.transposed is None for matrix in matrices(weights))
    assert all(m.transposed is not None for m in matrices(compiled(decode, model, jit_compile=True, n_rows=2).args[0]))


@pytest.mark.skipif(not kernels.are_chosen(), reason="no native kernels for this processor")
def test_rows_that_the_kernels_multiply_get_none():
    def has_twins(n_rows, dtype="float32"):
        weights = compiled(decode, make_model(dtype=dtype), jit_compile=True, n_rows=n_rows).args[0]
        return any(matrix.transposed is not None for matrix in matrices(weights))

    assert not has_twins(kernels.MOST_FLOAT_ROWS)
    assert has_twins(kernels.MOST_FLOAT_ROWS + 1)
    assert has_twins(2, "bfloat16")


def assign_one(model):
    model.blocks[1].mlp.c_proj.w.assign(model.blocks[1].mlp.c_proj.w.value * 3)


def add_in_place(model):
    model.wte.value.assign_add(tf.ones_like(model.wte.value))


def scatter(model):
    weight = model.blocks[0].attn.c_attn.w.value
    weight.scatter_nd_add([[0]], [[5.0] * WIDER.n_embd])


def add_in_compiled_code(model):
    weight = model.blocks[0].mlp.c_fc.w.value
    tf.function(lambda: weight.assign_sub(tf.ones_like(weight)), jit_compile=True)()


def fit(model, *, jit_compile):
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(True)
        model.compile(keras.optimizers.Adam(0.5), loss, jit_compile=jit_compile)
    ids = np.random.default_rng(0).integers(WIDER.n_vocab, size=(4, 9)).astype(np.int32)
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
def test_transposed_weights_follow_a_change(change, monkeypatch):
    monkeypatch.setenv(kernels.ENV_VAR, "xla")  # whose products use them
    model, fresh = make_model(), GPT2Model(WIDER)
    before = generate(model, PROMPTS, max_new_tokens=8)
    old = [twin.numpy() for twin in twins(model)]
    for _ in range(2):  # the second time the memory of the first may come back
        change(model)
        found = twins(model)
        assert all(np.array_equal(twin, w.numpy().T) for twin, w in zip(found, variables(model), strict=True))
        assert not all(map(np.array_equal, found, old))
        old = [twin.numpy() for twin in found]
    fresh.set_weights(model.get_params())
    after, wanted = (generate(x, PROMPTS, max_new_tokens=8) for x in (model, fresh))
    assert after.ids == wanted.ids
    assert after.logprobs == wanted.logprobs
    assert after.logprobs != before.logprobs


def test_they_go_with_their_model():
    model = make_model()
    generate(model, PROMPTS, max_new_tokens=2)
    kept, model = weakref.ref(twins_of(model)), weakref.ref(model)
    gc.collect()
    assert model() is None
    assert kept() is None
