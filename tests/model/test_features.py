"""Hidden states and attention weights as a functional model, and a head on top of them."""

import keras
import numpy as np
import pytest
from reference import as_float64, layer_norm, lively_params, softmax

from tf_gpt2 import GPT2Config, GPT2Model, reference
from tf_gpt2.model.features import feature_model

CONFIG = GPT2Config(n_vocab=61, n_ctx=12, n_embd=12, n_head=3, n_layer=2)
IDS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)


def make_model(**options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG))
    return model


def test_features_are_those_of_the_reference():
    params = lively_params(CONFIG)
    found = feature_model(make_model(), attentions=True)(IDS)
    for row, ids in enumerate(IDS):
        x = as_float64(params["wte"])[ids] + as_float64(params["wpe"])[: len(ids)]
        np.testing.assert_allclose(found["embd"][row], x, atol=1e-5)
        for i, w in enumerate(params["blocks"]):
            qkv = reference.linear(layer_norm(x, w["ln_1"]), w["attn"]["c_attn"])
            queries, keys = qkv[:, :12], qkv[:, 12:24]
            for head in range(3):
                q, k = queries[:, head * 4 : head * 4 + 4], keys[:, head * 4 : head * 4 + 4]
                scores = np.where(np.triu(np.ones((9, 9), bool), 1), -np.inf, q @ k.T / 2)
                np.testing.assert_allclose(found[f"attn{i}"][row, head], softmax(scores), atol=1e-5)
            x = reference.block(x, w, 3)
            np.testing.assert_allclose(found[f"h{i}"][row], x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["ln_f"][row], layer_norm(x, params["ln_f"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}], ids=["float32", "int8"])
def test_a_classifier_trains_the_models_own_weights_and_is_saved(tmp_path, options):
    model = make_model(**options)
    features = feature_model(model)
    pooled = keras.layers.GlobalAveragePooling1D()(features.output["ln_f"])
    classifier = keras.Model(features.input, keras.layers.Dense(2, activation="softmax")(pooled))
    classifier.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", jit_compile=False)
    before = model.wpe.numpy().copy()
    history = classifier.fit(IDS, np.array([0, 1]), epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]
    assert np.abs(model.wpe.numpy() - before).max() > 0
    assert len(classifier.variables) == len({id(v) for v in classifier.variables}) == len(model.variables) + 2
    classifier.save(tmp_path / "classifier.keras")
    loaded = keras.models.load_model(tmp_path / "classifier.keras")
    np.testing.assert_allclose(loaded(IDS), classifier(IDS), atol=1e-6)
