"""Transposed copies in a graph's variables: what they hold, and when they are filled."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2 import GPT2Config, GPT2Model
from tf_gpt2.generation.compiled import matrices
from tf_gpt2.model.arithmetic import xla
from tf_gpt2.model.network import network_of, weights_of
from tf_gpt2.serving.copies import TwinsInGraph

CONFIG = GPT2Config(n_vocab=101, n_ctx=40, n_embd=12, n_head=3, n_layer=2)
ASKED_AT_ONCE = 8


def make_model(**options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG, seed=0))
    return model


def variables_of(model):
    return [matrix.value for matrix in matrices(weights_of(model))]


def save_and_load(model, path):
    """Gives a SavedModel whose ``function`` gives the copies."""
    module = tf.Module()
    module.twins, module.model_variables = TwinsInGraph(network_of(model, xla)), variables_of(model)
    module.function = tf.function(lambda: list(module.twins()), autograph=False, input_signature=[])
    module.variables_read = module.function.get_concrete_function().graph.variables
    tf.saved_model.save(module, str(path), signatures={})
    return tf.saved_model.load(str(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_request_gets_all_however_many_come_at_once(dtype, tmp_path):
    model = make_model(dtype=dtype)
    computed = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    expected = [w.numpy().astype(computed).astype(np.float32).T for w in variables_of(model)]
    served = save_and_load(model, tmp_path)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        found = list(pool.map(lambda _: served.function(), range(4 * ASKED_AT_ONCE)))
    for copies in found:
        assert all(np.array_equal(copy, one) for copy, one in zip(copies, expected, strict=True))


def test_the_second_request_reads_what_the_first_one_made(tmp_path):
    model = make_model()
    served = save_and_load(model, tmp_path)
    first, second, third = served.function(), served.function(), served.function()
    assert [address(x) for x in second] == [address(x) for x in third]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def address(x):
    return np.asarray(x).ctypes.data


def test_the_files_do_not_hold_them(tmp_path):
    model = make_model()
    save_and_load(model, tmp_path)
    stored = sum(path.stat().st_size for path in (tmp_path / "variables").iterdir())
    n_bytes = sum(4 * w.shape.num_elements() for w in variables_of(model))
    assert stored < 1.5 * n_bytes + 10_000


def test_of_8_bit_weights_there_are_none():
    assert not TwinsInGraph(network_of(make_model(quantization="int8"), xla)).exist
