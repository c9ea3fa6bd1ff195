"""8-bit and 4-bit weights: how far rounding goes, what it costs in quality, and that no float32 weights are kept."""

from pathlib import Path

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from reference import lively_params

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.generation.generate import generate
from tf_gpt2.model.arithmetic import native, xla
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import network_of
from tf_gpt2.model.weights import ROWS_AT_ONCE, dequantize, dequantize_4, quantize, quantize_4
from tf_gpt2.runtime import kernels

MATRICES = ("wte", "attn/c_attn/w", "attn/c_proj/w", "mlp/c_fc/w", "mlp/c_proj/w")


def quantized(config, params, quantization="int8"):
    model = GPT2Model(config, quantization=quantization)
    model.set_weights(params)
    return model


# ---- rounding


def test_each_row_is_rounded_to_its_own_255_values():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((9, 50)).astype(np.float32) * np.logspace(-6, 4, 9, dtype=np.float32)[:, None]
    q, scale = (tensor.numpy() for tensor in quantize(w))
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (np.int8, (9, 50), np.float32, (9,))
    np.testing.assert_allclose(scale, np.abs(w).max(axis=1) / 127, rtol=1e-6)
    assert np.abs(q.astype(int)).max(axis=1).tolist() == [127] * 9
    error = np.abs(dequantize(q, scale).numpy() - w)
    assert (error <= 0.5001 * scale[:, None]).all()
    # the best that integers can do
    np.testing.assert_array_equal(q, np.rint(w / scale[:, None]))


def test_rows_of_zeros_and_a_single_value():
    q, scale = quantize(np.array([[0.0, 0.0], [-3.0, 0.0]], np.float32))
    assert q.numpy().tolist() == [[0, 0], [-127, 0]]
    np.testing.assert_allclose(dequantize(q, scale), [[0, 0], [-3, 0]], rtol=1e-6)


@pytest.mark.parametrize("n_rows", [1, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 2 * ROWS_AT_ONCE + 3])
def test_rounding_in_parts_is_rounding_in_one(n_rows):
    w = np.random.default_rng(1).standard_normal((n_rows, 3)).astype(np.float32)
    q, scale = (tensor.numpy() for tensor in quantize(w))
    assert q.shape == w.shape
    np.testing.assert_array_equal(q, np.rint(w / scale[:, None]))


def spread_4(w):
    """Returns 4-bit rounding's values, and each weight's scale."""
    value, scale = quantize_4(w)
    assert (value.dtype, scale.dtype) == (tf.uint8, tf.bfloat16)
    values = dequantize_4(value, scale).numpy()
    assert not values[:, w.shape[1] :].any()
    return values[:, : w.shape[1]], np.repeat(tf.cast(scale, tf.float32).numpy().T, 32, axis=1)[:, : w.shape[1]]


@pytest.mark.parametrize("n_in", [5, 32, 50, 96])
def test_each_group_is_rounded_to_its_own_16_values(n_in):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((9, n_in)).astype(np.float32) * np.logspace(-6, 4, 9, dtype=np.float32)[:, None]
    w[4] = 0
    values, scale = spread_4(w)
    numbers = values / np.where(scale == 0, 1, scale)
    np.testing.assert_array_equal(numbers, np.rint(numbers))
    assert numbers.min() >= -8 and numbers.max() <= 7
    assert not values[4].any()
    groups = [range(i, min(i + 32, n_in)) for i in range(0, n_in, 32)]
    for group in groups:
        largest = np.abs(w[:, group]).max(axis=1)
        assert (np.abs(values - w)[:, group].max(axis=1) <= 0.09 * largest).all()
    np.testing.assert_array_equal(spread_4(values)[0], values)


def test_4_bits_are_no_worse_than_those_of_llama_cpp():
    """Q4_0: the largest weight of 32, with its sign, is -8 steps; the scale is a float16."""
    w = np.random.default_rng(0).standard_normal((64, 768)).astype(np.float32)
    groups = w.reshape(64, -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    peer = np.clip(np.floor(groups / largest * -8 + 8.5), 0, 15) - 8
    peer = (peer * (largest / -8).astype(np.float16).astype(np.float32)).reshape(w.shape)
    assert np.square(spread_4(w)[0] - w).mean() < 0.95 * np.square(peer - w).mean()


# ---- what a model keeps


def test_4_bits_are_for_the_blocks_matrices(odd_config, odd_params):
    model = quantized(odd_config, odd_params, "int4")
    found, eight = dict(leaves(model.get_params())), dict(leaves(quantized(odd_config, odd_params).get_params()))
    for path, leaf in leaves(odd_params):
        if path != "wte" and path.endswith(MATRICES):
            np.testing.assert_array_equal(found[path], spread_4(leaf.T)[0].T)
        else:
            np.testing.assert_array_equal(found[path], eight[path])


def test_only_matrices_are_rounded_and_no_float_copy_is_kept(odd_config, odd_params):
    model = quantized(odd_config, odd_params)
    found = dict(leaves(model.get_params()))
    for path, leaf in leaves(odd_params):
        if path.endswith(MATRICES):
            by_output = leaf if path == "wte" else leaf.T
            scale = np.abs(by_output).max(axis=1) / 127
            error = found[path] - leaf if path == "wte" else (found[path] - leaf).T
            assert np.abs(error).max() > 0 and (np.abs(error) <= 0.5001 * scale[:, None]).all()
        else:
            np.testing.assert_array_equal(found[path], leaf)
    n_matrices = sum(leaf.size for path, leaf in leaves(odd_params) if path.endswith(MATRICES))
    sizes = {"int8": 0, "float32": 0}
    for variable in model.variables:
        sizes[variable.dtype] += int(np.prod(variable.shape))
    n_outputs = sum(len(leaf) if path == "wte" else leaf.shape[1] for path, leaf in leaves(odd_params)
                    if path.endswith(MATRICES))  # fmt: skip
    assert sizes == {"int8": n_matrices, "float32": odd_config.n_params - n_matrices + n_outputs}


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_logits_are_those_of_the_rounded_weights(quantization, odd_config, odd_params):
    """A float64 forward pass over what ``get_params`` gives: nothing else is rounded."""
    model = quantized(odd_config, odd_params, quantization)
    ids = np.random.default_rng(0).integers(0, odd_config.n_vocab, 17)
    wanted = reference.forward(model.get_params(), ids, n_head=odd_config.n_head)
    for rows in ([ids], [ids, ids[::-1]]):
        found = model(np.array(rows)).numpy()[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    plain = reference.forward(odd_params, ids, n_head=odd_config.n_head)
    assert 1e-4 < np.abs(wanted - plain).max() / np.abs(plain).max() < (0.1 if quantization == "int8" else 0.5)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_saved_and_loaded_without_the_float_weights(quantization, tmp_path, odd_config, odd_params):
    model = quantized(odd_config, odd_params, quantization)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.quantization == quantization
    for found, wanted in zip(loaded.variables, model.variables, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    ids = np.array([[1, 2, 3]])
    np.testing.assert_array_equal(loaded(ids), model(ids))
    assert (tmp_path / "model.keras").stat().st_size < 3 * odd_config.n_params + 100_000


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_round_to_themselves(quantization, odd_config, odd_params):
    model = quantized(odd_config, odd_params, quantization)
    again = quantized(odd_config, model.get_params(), quantization)
    for (_, found), (_, wanted) in zip(leaves(again.get_params()), leaves(model.get_params()), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


# ---- what is refused


def test_training_is_refused(odd_config, odd_params):
    model = quantized(odd_config, odd_params)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [variable.numpy() for variable in model.variables]
    ids = np.ones((2, 5), int)
    with pytest.raises(ValueError, match="inference only"):
        model.fit(ids, ids, verbose=0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert np.isfinite(model.evaluate(ids, ids, verbose=0))


def test_a_model_that_is_made_is_not_quantized_in_silence(odd_config):
    with pytest.raises(NotImplementedError, match="mode='int8': a GPT2Model is quantized when it is made"):
        GPT2Model(odd_config).quantize("int8")


def test_other_precisions_are_refused(odd_config):
    with pytest.raises(ValueError, match="quantization must be None or one of 'int8', 'int4', got 'int2'"):
        GPT2Model(odd_config, quantization="int2")


# ---- quality


@pytest.fixture(scope="module")
def embedded():
    """The embedded checkpoint's model, 16 texts drawn from it as ids (B, T), its logits."""
    model = GPT2Model.from_checkpoint(embedded_dir())
    end = model.config.n_vocab - 1
    texts = generate(model, [[end]] * 16, max_new_tokens=240, temperature=1.0, seed=range(16), jit_compile=False).ids
    windows = np.array([[end, *ids] for ids in texts])
    return windows, model(windows).numpy()


@pytest.mark.parametrize(
    ("options", "least_agreement"), [({"quantization": "int8"}, 0.98), ({"dtype": "bfloat16"}, 0.96)]
)
def test_quality_on_the_embedded_checkpoint(options, least_agreement, embedded):
    windows, wanted = embedded
    logits = GPT2Model.from_checkpoint(embedded_dir(), **options)(windows).numpy()
    nats, plain_nats = (
        -np.take_along_axis(reference.log_softmax(x)[:, :-1], windows[:, 1:, None], axis=-1).sum()
        for x in (logits, wanted)
    )
    assert abs(nats / plain_nats - 1) < 0.002  # of the bits per byte as well
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() >= least_agreement
    assert np.abs(logits - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("ops", [xla, native])
@pytest.mark.parametrize(("quantization", "least_agreement"), [("int8", 0.98), ("int4", 0.88)])
def test_quality_of_compiled_products(quantization, least_agreement, ops, embedded):
    """As above, with activations rounded, too."""
    if ops is native and not kernels.are_chosen():
        pytest.skip(kernels.why_missing() or "no kernels for this processor")
    windows, wanted = embedded
    network = network_of(GPT2Model.from_checkpoint(embedded_dir(), quantization=quantization), ops)
    logits = tf.function(lambda ids: network.logits(network.hidden_states(ids)[0]), jit_compile=True)(windows).numpy()
    assert (logits.argmax(-1) == wanted.argmax(-1)).mean() >= least_agreement


def test_models_of_the_true_shape_are_close():
    """Random weights of 124M: the logits' largest and mean error, of the largest logit."""
    config = SIZES["124M"]
    params = lively_params(config)
    ids = np.random.default_rng(0).integers(0, config.n_vocab, (1, 48))

    def logits(**options):
        model = GPT2Model(config, **options)
        model.set_weights(params)
        return model(ids).numpy()

    wanted = logits()
    # measured 0.018 and 0.0026, 0.012 and 0.0016
    for options, largest, mean in (({"quantization": "int8"}, 0.03, 0.004), ({"dtype": "bfloat16"}, 0.02, 0.003)):
        errors = np.abs(logits(**options) - wanted) / np.abs(wanted).max()
        assert 0 < errors.max() < largest
        assert 0 < errors.mean() < mean


LOAD = """
import sys
from tf_gpt2 import GPT2Model

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

quantization = sys.argv[3] if len(sys.argv) > 3 else None
GPT2Model.from_checkpoint(sys.argv[2], quantization=quantization)
before = memory("VmRSS")
model = GPT2Model.from_checkpoint(sys.argv[1], quantization=quantization)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("format", "quantization", "n_vocab", "n_layer", "least", "most"),  # measured 0.78 and 1.19
    [("openai", "int8", 20000, 20, 0.25, 1.2), ("huggingface", "", 60000, 12, 1.0, 1.6)],
)
def test_loading_peaks_near_the_weights(
    tmp_path, run_python, odd_config, odd_params, format, quantization, n_vocab, n_layer, least, most
):
    from tf_gpt2.checkpoint import huggingface
    from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt

    # large, because allocators differ by tens of MB
    config = GPT2Config(n_vocab=n_vocab, n_ctx=64, n_embd=512, n_head=8, n_layer=n_layer)
    for name, params, its_config in (("large", lively_params(config), config), ("odd", odd_params, odd_config)):
        (tmp_path / name).mkdir()
        if format == "openai":
            save_gpt2_params_to_tf_ckpt(params, its_config.to_hparams(), tmp_path / name)
        else:
            huggingface.write(tmp_path / name, its_config, leaves(params), None)
    extra_bytes = int(run_python(LOAD, tmp_path / "large", tmp_path / "odd", *filter(None, [quantization])))
    assert least < extra_bytes / (4 * config.n_params) < most


def test_the_whole_graph_runs_on_8_bits_without_xla(odd_config, odd_params):
    model = quantized(odd_config, odd_params)
    ids = tf.constant([[5, 4, 3]])
    np.testing.assert_allclose(tf.function(model)(ids), model(ids), atol=1e-4)
