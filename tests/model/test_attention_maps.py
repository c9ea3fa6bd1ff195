"""Attention weights against the float64 reference, and logits against the model's own."""

import numpy as np
import pytest
import reference
import tensorflow as tf

from tf_gpt2.errors import ContextLengthError
from tf_gpt2.model.attention_maps import logits_and_attention
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.reference import block, linear


def expected_attention(params, ids, *, n_head):
    """Float64 (L, H, T, S), written from the papers."""
    x = reference.as_float64(params["wte"][ids]) + reference.as_float64(params["wpe"][: len(ids)])
    maps = []
    for w in params["blocks"]:
        qkv = linear(reference.layer_norm(x, w["ln_1"]), w["attn"]["c_attn"])
        q, k, _ = (np.split(part, n_head, axis=1) for part in np.split(qkv, 3, axis=1))
        scores = np.einsum("hqd,hkd->hqk", q, k) / np.sqrt(q[0].shape[1])
        scores[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
        maps.append(reference.softmax(scores))
        x = block(x, w, n_head)
    return np.array(maps)


@pytest.mark.parametrize("length", [1, 2, 23, 40])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_and_logits_are_the_references(odd_config, odd_params, length, quantization):
    model = GPT2Model(odd_config, quantization=quantization)
    model.set_weights(odd_params)
    params = model.get_params()
    ids = np.random.default_rng(length).integers(0, 101, length)
    logits, attention = logits_and_attention(model, tf.constant([ids], tf.int32))
    assert attention.shape == (2, 3, length, length)
    np.testing.assert_allclose(attention, expected_attention(params, ids, n_head=3), atol=1e-5)
    np.testing.assert_allclose(logits, reference.forward(params, ids, n_head=3), atol=1e-3)


def test_bfloat16_gives_the_models_own_logits(odd_config, odd_params):
    model = GPT2Model(odd_config, dtype="bfloat16")
    model.set_weights(odd_params)
    ids = tf.constant([[5, 7, 100, 0]])
    logits, attention = logits_and_attention(model, ids)
    np.testing.assert_array_equal(logits, model(ids)[0])
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-5)


def test_wrong_ids_are_refused(odd_model):
    with pytest.raises(ContextLengthError, match="n_ctx=40"):
        logits_and_attention(odd_model, tf.zeros((1, 41), tf.int32))
    with pytest.raises(ValueError, match="ids must lie in"):
        logits_and_attention(odd_model, tf.constant([[101]]))
