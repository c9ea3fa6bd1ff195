"""GPT-2s with other activations, widths, epsilons, attention scales and heads than OpenAI's, against the reference."""

import dataclasses

import numpy as np
import pytest
import reference
import tensorflow as tf

from tf_gpt2 import GPT2Config, GPT2Model, beam_search, generate
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.generation.scoring import score
from tf_gpt2.model.arithmetic import graph, xla
from tf_gpt2.model.attention_maps import logits_and_attention
from tf_gpt2.model.network import network_of

PLAIN = GPT2Config(n_vocab=61, n_ctx=20, n_embd=12, n_head=3, n_layer=3)
VARIATIONS = {
    "inner width": {"n_inner": 17},
    "exact gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
    "epsilon": {"layer_norm_epsilon": 0.01},
    "no scale": {"scale_attn_weights": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "own head": {"tie_word_embeddings": False},
}
ALL = {
    "n_inner": 17,
    "activation": "gelu",
    "layer_norm_epsilon": 0.01,
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": False,
}
IDS = np.random.default_rng(1).integers(61, size=(2, 9))


def lively(config):
    """Weights so large that activations curve and attention is uneven."""
    return reference.lively_params(config)


def model_of(config, **options):
    model = GPT2Model(config, **options)
    model.set_weights(lively(config))
    return model


def options_of(config):
    names = ("activation", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    return {name: getattr(config, name) for name in names}


def expected(config, params, ids):
    return np.stack([reference.logits(row, params, config.n_head, **options_of(config)) for row in ids])


def assert_close(found, wanted, tolerance=2e-5):
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.fixture(scope="module")
def varied():
    return model_of(dataclasses.replace(PLAIN, **ALL))


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_are_the_reference_s(name):
    config = dataclasses.replace(PLAIN, **VARIATIONS[name])
    wanted = expected(config, lively(config), IDS)
    assert_close(model_of(config)(IDS), wanted)
    vanilla = {key: value for key, value in lively(config).items() if key != "lm_head"}
    if name != "inner width":  # the variation matters, or the test would not notice its loss
        assert np.abs(expected(PLAIN, vanilla, IDS) - wanted).max() > 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("ops", [xla, graph], ids=["xla", "graph"])
@pytest.mark.parametrize("variation", [ALL, {"scale_attn_weights": False, "activation": "silu"}], ids=["all", "others"])
def test_each_arithmetic_computes_them(ops, variation):
    model = model_of(dataclasses.replace(PLAIN, **variation))
    network = network_of(model, ops)
    run = tf.function(lambda ids: network.logits(network.hidden_states(ids)[0]), jit_compile=ops.JIT_COMPILE)
    assert_close(run(tf.constant(IDS, tf.int32)), expected(model.config, model.get_params(), IDS))


@pytest.mark.parametrize("jit_compile", [True, False])
def test_generation_chooses_the_reference_s_ids(varied, jit_compile):
    row = IDS[0].tolist()
    found = generate(varied, [row], max_new_tokens=8, jit_compile=jit_compile).ids[0]
    for n, chosen in enumerate(found):
        logits = expected(varied.config, varied.get_params(), [row + found[:n]])[0, -1]
        assert logits[chosen] > logits.max() - 1e-4 * np.abs(logits).max()


def test_scores_and_beams_are_the_reference_s(varied):
    row = IDS[0].tolist()
    wanted = expected(varied.config, varied.get_params(), [row])[0]
    logprobs = [reference.log_softmax(wanted[i])[row[i + 1]] for i in range(len(row) - 1)]
    np.testing.assert_allclose(score(varied, [row])[0].logprobs[1:], logprobs, atol=1e-4)
    best = beam_search(varied, [row], num_beams=1, max_new_tokens=4, jit_compile=False).ids[0][0]
    assert best == generate(varied, [row], max_new_tokens=4, jit_compile=False).ids[0]


def test_8_bit_matrices_have_all_variations(varied):
    small = GPT2Model(varied.config, quantization="int8")
    small.set_weights(varied.get_params())
    assert_close(small(IDS), expected(small.config, small.get_params(), IDS))
    assert small.lm_head.dtype == "int8"
    found = generate(small, [IDS[0].tolist()], max_new_tokens=4).ids
    assert found == generate(small, [IDS[0].tolist()], max_new_tokens=4, jit_compile=False).ids


def test_attention_maps_have_the_scales(varied):
    logits, maps = logits_and_attention(varied, IDS[:1])
    assert_close(logits[None], expected(varied.config, varied.get_params(), IDS[:1]))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_a_varied_model_is_made_again_from_its_config(varied):
    again = GPT2Model.from_config(varied.get_config())
    again.set_weights(varied.get_params())
    np.testing.assert_array_equal(again(IDS), varied(IDS))
    assert again.config == varied.config
    assert again.count_params() == varied.config.n_params


def test_gradients_reach_the_head_and_the_embedding(varied):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(varied(tf.constant(IDS)) ** 2)
    for gradient in tape.gradient(loss, [varied.wte.value, varied.lm_head.value]):
        assert float(tf.reduce_max(tf.abs(tf.convert_to_tensor(gradient)))) > 0


def test_random_trees_have_a_head_of_their_own(varied):
    params = random_params(varied.config)
    assert params["lm_head"].shape == params["wte"].shape
    assert not np.array_equal(params["lm_head"], params["wte"])
