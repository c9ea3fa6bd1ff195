"""The native kernels against the same integers in NumPy, bit for bit; and as XLA calls them."""

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.generate import generate
from tf_gpt2.model.arithmetic import native, plain
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.weights import Int4Matrix, Int8Matrix, Matrix, quantize, quantize_4
from tf_gpt2.runtime import kernels
from tf_gpt2.runtime.tf_internals import call_foreign

needs_library = pytest.mark.skipif(bool(kernels.why_missing()), reason=kernels.why_missing())
IN_ALL_SETS = pytest.mark.parametrize("instruction_set", kernels.instruction_sets())
CONFIG = GPT2Config(n_vocab=101, n_ctx=64, n_embd=72, n_head=3, n_layer=2)
GUARD = 16
"""Bytes before and behind each array that must stay as they are."""


# ---- the same in NumPy


def round_rows(x, block):
    """Rounds floats (R, n_in) to integers (R, n_blocks, block) with scales (R, n_blocks)."""
    x = np.pad(x, [(0, 0), (0, -x.shape[1] % block)]).reshape(len(x), -1, block)
    largest = np.abs(x).max(-1)
    per_step = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    return np.rint(x * per_step[..., None]).astype(int), largest / np.float32(127)


def product_8(x, w, scale):
    numbers, scales = round_rows(x, 16)
    w = np.pad(w, [(0, 0), (0, -w.shape[1] % 16)]).reshape(len(w), -1, 16).astype(int)
    sums = np.zeros((len(x), len(w)), np.float32)
    for block in range(w.shape[1]):
        sums += (numbers[:, block] @ w[:, block].T).astype(np.float32) * scales[:, block, None]
    return sums * scale


def product_4(x, w, scale):
    numbers, scales = round_rows(x, 32)
    w = w.reshape(len(w), -1, 16)
    w = np.concatenate([w & 15, w >> 4], axis=-1).astype(int) - 8
    sums = np.zeros((len(x), len(w)), np.float32)
    for block in range(w.shape[1]):
        factor = scales[:, block, None] * scale[block].astype(np.float32)
        sums += (numbers[:, block] @ w[:, block].T).astype(np.float32) * factor
    return sums


WANTED = {8: product_8, 4: product_4}


def make_case(bits, n_rows, n_in, n_out, seed=0):
    """Returns a row per magnitude, weights of any value, and scales."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_in)) * np.exp(2 * rng.standard_normal(n_in))
    x *= np.logspace(-3, 3, n_rows)[:, None]
    x[0, ::3] = 0
    if bits == 8:
        w, scale = rng.integers(-127, 128, (n_out, n_in)).astype(np.int8), rng.random(n_out).astype(np.float32)
    else:
        n_groups = -(-n_in // 32)
        w = rng.integers(0, 256, (n_out, n_groups * 16)).astype(np.uint8)
        scale = tf.cast(rng.standard_normal((n_groups, n_out)), tf.bfloat16).numpy()
    return x.astype(np.float32), w, scale


def guarded(array):
    """Returns a copy that ends where foreign bytes begin, and all these bytes."""
    memory = np.full(array.nbytes + 2 * GUARD, 0xA5, np.uint8)
    inside = memory[GUARD:-GUARD].view(array.dtype).reshape(array.shape)
    inside[...] = array
    return inside, memory


def call(function, first, inputs, shapes, sizes):
    """Calls the library without XLA; checks that nothing is written outside the results, float32 of these shapes."""
    copies = [guarded(array) for array in (*inputs, *(np.zeros(shape, np.float32) for shape in shapes))]
    before = [memory.copy() for _, memory in copies]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array, _ in copies]
    assert getattr(kernels.load_library(), function)(*first, *pointers, *sizes) == 0
    for (_, memory), old in zip(copies[: len(inputs)], before, strict=False):
        np.testing.assert_array_equal(memory, old)
    for _, memory in copies[len(inputs) :]:
        assert (memory[:GUARD] == 0xA5).all() and (memory[-GUARD:] == 0xA5).all()
    return [result for result, _ in copies[len(inputs) :]]


def run(instruction_set, bits, x, w, scale):
    """Multiplies by a quantized matrix."""
    first, sizes = (instruction_set.encode(), bits == 4), (len(x), x.shape[1], len(w))
    return call("tf_gpt2_product", first, (x, w, scale), [(len(x), len(w))], sizes)[0]


# ---- the kernels alone


@needs_library
@IN_ALL_SETS
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n_in", [1, 12, 32, 63, 64, 65, 200])
def test_a_product_is_numpy_s_bit_for_bit(n_in, bits, instruction_set):
    for n_out in (1, 7, 16, 33):
        for n_rows in (*range(1, 12), 131):
            case = make_case(bits, n_rows, n_in, n_out)
            np.testing.assert_array_equal(run(instruction_set, bits, *case), WANTED[bits](*case))


@needs_library
@IN_ALL_SETS
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_is_the_same_whatever_its_neighbours(bits, instruction_set):
    x, w, scale = make_case(bits, 19, 100, 21)
    together = run(instruction_set, bits, x, w, scale)
    for row in range(19):
        np.testing.assert_array_equal(run(instruction_set, bits, x[row : row + 1], w, scale)[0], together[row])
    x[3], x[5, 7] = np.nan, np.inf
    beside = run(instruction_set, bits, x, w, scale)
    assert np.isnan(beside[[3, 5]]).all()
    others = [row for row in range(19) if row not in (3, 5)]
    np.testing.assert_array_equal(beside[others], together[others])


@needs_library
@IN_ALL_SETS
def test_extreme_numbers(instruction_set):
    """The largest sums, which would not fit 16 bits; numbers too small to divide by; rows of zeros."""
    w = np.full((5, 96), -127, np.int8)
    x = np.array([[1.0], [-1.0], [0.0], [1e-39], [3e38]], np.float32) * np.ones(96, np.float32)
    found = run(instruction_set, 8, x, w, np.ones(5, np.float32))
    wanted = np.array([-96 * 127, 96 * 127, 0, 0, -np.inf], np.float32)
    np.testing.assert_allclose(found, np.broadcast_to(wanted[:, None], (5, 5)), rtol=1e-6)
    w4 = np.full((5, 48), 0xFF, np.uint8)
    found = run(instruction_set, 4, x[:4], w4, np.ones((3, 5), tf.bfloat16.as_numpy_dtype))
    np.testing.assert_allclose(found[:, 0], [96 * 7, -96 * 7, 0, 0], rtol=1e-6)


def run_floats(instruction_set, x, w):
    """Multiplies by a matrix of floats."""
    sizes = (len(x), x.shape[1], len(w))
    return call("tf_gpt2_float_product", [instruction_set.encode()], (x, w), [(len(x), len(w))], sizes)[0]


@needs_library
@IN_ALL_SETS
@pytest.mark.parametrize("n_in", [1, 7, 16, 63, 200])
def test_a_product_of_floats_is_exact_and_each_row_s_own(n_in, instruction_set):
    rng = np.random.default_rng(n_in)
    for n_out in (1, 2, 3, 7, 16, 50):
        x, w = (rng.standard_normal((n, n_in)).astype(np.float32) for n in (17, n_out))
        exact = x.astype(float) @ w.T.astype(float)
        rows = [run_floats(instruction_set, x[i : i + 1], w)[0] for i in range(17)]
        for n_rows in (*range(1, 12), 17):
            together = run_floats(instruction_set, x[:n_rows], w)
            np.testing.assert_array_equal(together, rows[:n_rows])
            np.testing.assert_allclose(together, exact[:n_rows], atol=1e-6 * n_in)
        beside = x.copy()
        beside[3], beside[5, 0] = np.nan, np.inf
        found = run_floats(instruction_set, beside, w)
        assert np.isnan(found[3]).all() and not np.isfinite(found[5]).any()
        others = [row for row in range(17) if row not in (3, 5)]
        np.testing.assert_array_equal(found[others], np.array(rows)[others])


def attend(instruction_set, q, k, v, mask):
    """Computes attention: the weights, and the sums."""
    (n, n_queries, width), n_keys = q.shape, k.shape[1]
    shapes, sizes = [(n, n_queries, n_keys), (n, n_queries, width)], (n, len(mask), n_queries, n_keys, width)
    return call("tf_gpt2_attention", [instruction_set.encode()], (q, k, v, mask), shapes, sizes)


def random_attention(n, n_queries, n_keys, width, n_masks):
    rng = np.random.default_rng(width)
    shapes = ((n, n_queries, width), (n, n_keys, width), (n, n_keys, width))
    q, k, v = (2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    mask = rng.random((n_masks, n_queries, n_keys)) < 0.6
    mask[..., 0] = True
    return q, k, v, mask


@needs_library
@IN_ALL_SETS
@pytest.mark.parametrize("n_masks", [1, 3])
@pytest.mark.parametrize(("n_queries", "n_keys", "width"), [(1, 1, 64), (2, 40, 5), (3, 17, 70), (1, 300, 96)])
def test_attention_is_exact(n_queries, n_keys, width, n_masks, instruction_set):
    q, k, v, mask = random_attention(3, n_queries, n_keys, width, n_masks)
    weights, y = attend(instruction_set, q, k, v, mask)
    scores = np.where(mask, q.astype(float) @ k.transpose(0, 2, 1) / np.sqrt(width), -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    exact = powers / powers.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, exact, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(y, exact @ v, atol=2e-5)
    assert not weights[~np.broadcast_to(mask, weights.shape)].any()


@needs_library
@IN_ALL_SETS
def test_attention_sees_nothing_else(instruction_set):
    """Whatever lies at places out of sight, how many there are, and which queries and heads are beside."""
    q, k, v, _ = random_attention(3, 4, 40, 20, 1)
    mask = np.arange(40) < np.array([13, 14, 15, 16])[:, None]  # each query sees one place more
    together = attend(instruction_set, q, k, v, mask[None])[1]
    k[:, 16:], v[:, 16:] = np.nan, np.inf
    for n_keys in (16, 17, 40):
        parts = [part[:, :n_keys].copy() for part in (k, v)]
        found = attend(instruction_set, q, *parts, mask[None, :, :n_keys].copy())[1]
        np.testing.assert_array_equal(found, together)
    for head in range(3):
        one = [part[head : head + 1].copy() for part in (q[:, 2:3], k, v)]
        found = attend(instruction_set, *one, mask[None, 2:3].copy())[1]
        np.testing.assert_array_equal(found[0, 0], together[head, 2])


@needs_library
@IN_ALL_SETS
def test_attention_to_extreme_scores(instruction_set):
    """Scores far apart leave one weight, equal ones equal weights; NaN and infinity are not lost."""
    k = np.zeros((1, 20, 4), np.float32)
    q, v, mask = np.full((1, 1, 4), 10, np.float32), np.ones_like(k), np.ones((1, 1, 20), bool)
    weights = attend(instruction_set, q, k, v, mask)[0]
    np.testing.assert_allclose(weights, 1 / 20, rtol=1e-6)
    k[0, 7] = 1e4
    np.testing.assert_array_equal(attend(instruction_set, q, k, v, mask)[0][0, 0], np.arange(20) == 7)
    k[0, 7] = -1e4
    np.testing.assert_allclose(attend(instruction_set, q, k, v, mask)[0][0, 0], (np.arange(20) != 7) / 19, rtol=1e-6)
    for bad in (np.nan, np.inf):
        k[0, 7] = bad
        assert np.isnan(attend(instruction_set, q, k, v, mask)[1]).all()


@needs_library
def test_another_instruction_set_is_refused():
    assert kernels.load_library().tf_gpt2_product(b"sse9", 0, None, None, None, None, 1, 1, 1) == 1
    assert kernels.load_library().tf_gpt2_float_product(b"sse9", None, None, None, 1, 1, 1) == 1
    assert kernels.load_library().tf_gpt2_attention(b"sse9", *[None] * 6, 1, 1, 1, 1, 1) == 1


# ---- outliers


def llama_cpp_8(x):
    """Q8_0: rounds each 32 numbers to 8 bits, with a float16 scale. Source: ggml, ``quantize_row_q8_0_ref``."""
    groups = x.reshape(len(x), -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / 127
    return (np.rint(groups / scale) * scale.astype(np.float16)).reshape(x.shape)


def llama_cpp_4(w):
    """Q4_0: the largest of 32 numbers, with its sign, is -8 steps. Source: ggml, ``quantize_row_q4_0_ref``."""
    groups = w.reshape(len(w), -1, 32)
    scale = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1) / -8
    return ((np.clip(np.floor(groups / scale + 8.5), 0, 15) - 8) * scale.astype(np.float16)).reshape(w.shape)


def with_outliers(n_columns, n_outliers, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, n_columns))
    x[:, rng.choice(n_columns, n_outliers, replace=False)] *= 50
    return x.astype(np.float32)


@needs_library
@pytest.mark.parametrize("n_outliers", [3, 8])
@pytest.mark.parametrize("bits", [8, 4])
def test_outliers_cost_no_more_than_in_llama_cpp(bits, n_outliers):
    """Logits of activations a few columns of which are 50 times the others: errors by their root mean square."""
    x = with_outliers(768, n_outliers, seed=n_outliers)
    w = np.random.default_rng(0).standard_normal((500, 768)).astype(np.float32) * 0.02
    exact = x.astype(float) @ w.T.astype(float)
    quantized = [part.numpy() for part in (quantize(w) if bits == 8 else quantize_4(w))]
    ours = np.square(run(kernels.instruction_sets()[0], bits, x, *quantized) - exact).mean()
    peer = np.square(llama_cpp_8(x) @ (llama_cpp_8 if bits == 8 else llama_cpp_4)(w).T - exact).mean()
    assert ours <= peer
    assert ours < (0.02 if bits == 8 else 0.12) ** 2 * np.square(exact).mean()


# ---- as XLA calls them


@pytest.fixture(params=["int8", "int4"])
def matrix(request):
    if kernels.why_missing():
        pytest.skip(kernels.why_missing())
    assert not kernels.why_not_registered()
    w = tf.constant(np.random.default_rng(1).standard_normal((50, 100)), tf.float32)
    return Int8Matrix(*quantize(w)) if request.param == "int8" else Int4Matrix(*quantize_4(w))


def test_xla_gets_what_the_library_computes(matrix):
    x = np.random.default_rng(0).standard_normal((2, 3, 100)).astype(np.float32)
    found = tf.function(native.product, jit_compile=True)(x, matrix).numpy()
    bits = 8 if isinstance(matrix, Int8Matrix) else 4
    wanted = WANTED[bits](x.reshape(6, 100), matrix.value.numpy(), matrix.scale.numpy())
    np.testing.assert_array_equal(found.reshape(6, 50), wanted)
    exact = plain.product(x, matrix).numpy()
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@needs_library
@pytest.mark.parametrize("n_rows", [1, 5, kernels.MOST_FLOAT_ROWS, kernels.MOST_FLOAT_ROWS + 1])
def test_xla_gets_what_the_library_computes_of_floats(n_rows):
    assert not kernels.why_not_registered()
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((n, 100)).astype(np.float32) for n in (n_rows, 50))
    function = tf.function(native.product, jit_compile=True)
    found = function(x[:, None], Matrix(tf.constant(w))).numpy()[:, 0]
    np.testing.assert_allclose(found, x.astype(float) @ w.T.astype(float), atol=1e-5)
    is_ours = "tf_gpt2_product_f_v1" in function.experimental_get_compiler_ir(x[:, None], Matrix(w))(stage="hlo")
    assert is_ours == (n_rows <= kernels.MOST_FLOAT_ROWS)
    if is_ours:
        np.testing.assert_array_equal(found, run_floats(kernels.instruction_sets()[0], x, w))


@needs_library
@pytest.mark.parametrize("n_queries", [1, kernels.MOST_POSITIONS, kernels.MOST_POSITIONS + 1])
def test_xla_gets_what_the_library_computes_of_attention(n_queries):
    assert not kernels.why_not_registered()
    q, k, v, mask = random_attention(6, n_queries, 24, 16, 6)

    @tf.function(jit_compile=True)
    def attention(q, k, v, mask):
        weights = native.attention_weights(q, k, mask)
        return weights, native.weighted_sum(weights, v)

    found = [part.numpy() for part in attention(q, k, v, mask)]
    weights = plain.attention_weights(*map(tf.constant, (q, k, mask)))
    for one, wanted in zip(found, (weights, plain.weighted_sum(weights, tf.constant(v))), strict=True):
        np.testing.assert_allclose(one, wanted, atol=2e-5)
    hlo = attention.experimental_get_compiler_ir(q, k, v, mask)(stage="hlo")
    is_ours = n_queries <= kernels.MOST_POSITIONS
    assert ("tf_gpt2_attention_weights_v1" in hlo, "tf_gpt2_weighted_sum_v1" in hlo) == (is_ours, is_ours)
    if is_ours:
        for one, ours in zip(found, attend(kernels.instruction_sets()[0], q, k, v, mask), strict=True):
            np.testing.assert_array_equal(one, ours)


def test_wrong_shapes_are_refused_by_name(matrix):
    name = f"tf_gpt2_product_{8 if isinstance(matrix, Int8Matrix) else 4}_v1"
    function = tf.function(lambda *inputs: call_foreign(name, inputs, (3, 50)), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="weights must be int8"):
        function(tf.ones((3, 300)), matrix.value, matrix.scale)
    function = tf.function(lambda *inputs: call_foreign("tf_gpt2_product_f_v1", inputs, (3, 50)), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="weights must be float32"):
        function(tf.ones((3, 300)), tf.ones((50, 200)))
    name = "tf_gpt2_attention_weights_v1"
    function = tf.function(lambda *inputs: call_foreign(name, inputs, (6, 1, 9)), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="mask must be bool"):
        function(tf.ones((6, 1, 4)), tf.ones((6, 9, 4)), tf.ones((6, 1, 8), tf.bool))
    function = tf.function(lambda *inputs: call_foreign("tf_gpt2_weighted_sum_v1", inputs, (6, 1, 4)), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="v must be float32"):
        function(tf.ones((6, 1, 9)), tf.ones((6, 8, 4)))


@needs_library
def test_the_library_is_registered_twice_without_harm():
    from tf_gpt2.runtime.tf_internals import ffi_api

    assert not kernels.why_not_registered()
    why_not = ctypes.create_string_buffer(512)
    kernels.load_library().tf_gpt2_register(ffi_api(), why_not, len(why_not))


def make_model(quantization, config=CONFIG, seed=0):
    model = GPT2Model(config, quantization=quantization)
    model.set_weights(lively_params(config, seed=seed))
    return model


PROMPTS = [[5, 6, 7], [1, 2], [9], [3, 4, 5, 6, 7, 8], [2] * 9]


@needs_library
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_many_requests_at_a_time_end_and_are_each_as_alone(quantization):
    model = make_model(quantization)
    wanted = [generate(model, [prompt], max_new_tokens=12).ids for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: generate(model, [PROMPTS[i % 5]], max_new_tokens=12).ids, range(40))
        for i, ids in enumerate(found):
            assert ids == wanted[i % 5]


@needs_library
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_text_in_a_batch_is_nearly_that_text_alone(quantization):
    """Nearly, because of what XLA computes between the kernels: ``docs/numerics.md``."""
    model = make_model(quantization)
    together = generate(model, PROMPTS, max_new_tokens=12)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], max_new_tokens=12)
        assert alone.ids[0] == together.ids[i]
        bound = 1e-4 if quantization is None else 0.1
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=bound)


FORK = """
import os, sys
import numpy as np, tensorflow as tf
from tf_gpt2.runtime import kernels
import ctypes

library = kernels.load_library()
x, w, scale = np.ones((1, 64), np.float32), np.ones((40, 64), np.int8), np.ones(40, np.float32)

def run():
    y = np.zeros((1, 40), np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, w, scale, y)]
    library.tf_gpt2_product(None, 0, *pointers, 1, 64, 40)
    return y

assert not kernels.why_not_registered()
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if (run() == before).all() else 1)
print(os.waitpid(child, 0)[1], float(before[0, 0]))
"""


@needs_library
def test_a_fork_after_loading_computes(run_python):
    status, value = run_python(FORK).split()
    assert (status, float(value)) == ("0", pytest.approx(64, rel=1e-6))


CACHED = """
import os, sys
os.environ["TF_GPT2_COMPILE_CACHE"], os.environ["TF_GPT2_KERNELS"] = sys.argv[1:3]
import tf_gpt2
from tf_gpt2.checkpoint.download import embedded_dir

generator = tf_gpt2.TextGenerator.from_checkpoint(embedded_dir(), dtype="int8")
print(generator.complete("To be", max_new_tokens=8).logprobs)
"""


@needs_library
def test_code_in_the_compile_cache_finds_the_kernels_or_does_without(tmp_path, run_python):
    first, again, without = (run_python(CACHED, tmp_path, choice) for choice in ("native", "native", "xla"))
    assert first == again
    np.testing.assert_allclose(eval(without), eval(first), atol=0.3)


# ---- the choice


def test_the_choice_is_made_by_a_variable(monkeypatch):
    for choice in ("off", "xla"):
        monkeypatch.setenv(kernels.ENV_VAR, choice)
        assert not kernels.are_chosen()
    monkeypatch.setenv(kernels.ENV_VAR, "fast")
    with pytest.raises(ValueError, match="TF_GPT2_KERNELS must be one of off, xla, native, got 'fast'"):
        kernels.are_chosen()


def test_kernels_that_are_demanded_and_not_there_are_an_error(monkeypatch):
    monkeypatch.setenv(kernels.ENV_VAR, "native")
    monkeypatch.setattr(kernels, "why_missing", lambda: "the native kernels were not compiled")
    with pytest.raises(ImportError, match="TF_GPT2_KERNELS=native, but the native kernels were not compiled"):
        generate(make_model("int8"), [[1]], max_new_tokens=1)


WITHOUT = """
import numpy as np
from pathlib import Path
from tf_gpt2.runtime import kernels
kernels.find_library = lambda: None
import tf_gpt2
from tf_gpt2.checkpoint.download import embedded_dir

assert not kernels.are_chosen() and "install g++" in kernels.why_missing()
for dtype in ("int8", "int4"):
    generator = tf_gpt2.TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype)
    print(len(generator.generate(["To be", "Or"], max_new_tokens=4)))
"""


def test_a_machine_without_the_library_works(run_python):
    assert run_python(WITHOUT).split() == ["2", "2"]


@needs_library
def test_info_names_the_instruction_sets():
    result = subprocess.run([sys.executable, "-m", "tf_gpt2", "info"], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert kernels.instruction_sets()[0] in result.stdout
    assert "int4" in result.stdout
