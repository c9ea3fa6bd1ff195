"""A model whose layers someone has replaced or changed: counts in ``model(ids)``, and is refused by generation."""

import keras
import numpy as np
import pytest
from reference import lively_params

from tf_gpt2 import GPT2Config, GPT2Model, beam_search, generate
from tf_gpt2.generation.scoring import score
from tf_gpt2.model.layers import MLP
from tf_gpt2.training import NextTokenLoss
from tf_gpt2.training.optimizer import Schedule
from tf_gpt2.training.step import StepOptions, TrainingStep

CONFIG = GPT2Config(n_vocab=53, n_ctx=24, n_embd=12, n_head=3, n_layer=4)
IDS = np.array([[3, 1, 4], [1, 5, 9]])
SCHEDULE = Schedule(learning_rate=1.0, warmup_steps=0, steps=1)


def make_model(kind=GPT2Model):
    model = kind(CONFIG)
    model.set_weights(lively_params(CONFIG))
    return model


class Adapted(keras.layers.Layer):
    """Someone's own layer around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        return self.inner(x) / 2

    def leaf_tree(self):
        return self.inner.leaf_tree()


class Narrow(MLP):
    """Someone's own MLP."""

    def call(self, x, training=None):
        return super().call(x) * 0.3


class Halved(GPT2Model):
    """Someone's own model."""

    def logits(self, hidden):
        return super().logits(hidden) / 2


class Watched(GPT2Model):
    """A model that computes what it inherits."""

    def train_step(self, data):
        return super().train_step(data)


def adapt(mlp):
    mlp._tracker.unlock()
    mlp.c_proj = Adapted(mlp.c_proj)


def halve(layer):
    call = layer.call
    layer.call = lambda *args, **kwargs: call(*args, **kwargs) / 2


def replace_block(model):
    model._tracker.unlock()
    model.blocks[2] = Adapted(model.blocks[2])


CHANGES = {
    "a method": (lambda model: halve(model.blocks[2].mlp), "blocks/2/mlp"),
    "a method inside": (lambda model: halve(model.blocks[3].attn.c_proj), "blocks/3/attn/c_proj"),
    "the last norm": (lambda model: halve(model.ln_f), "ln_f"),
    "a layer": (lambda model: adapt(model.blocks[1].mlp), "blocks/1/mlp/c_proj"),
    "a block": (replace_block, "blocks/2"),
    "another class": (lambda model: setattr(model.blocks[1].mlp, "__class__", Narrow), "blocks/1/mlp"),
    "the model": (lambda model: setattr(model, "__class__", Halved), "model"),
}

SETTINGS = {
    "blocks/1/mlp has activation='relu'": lambda model: setattr(model.blocks[1].mlp, "activation", "relu"),
    "blocks/3/attn has n_head=2": lambda model: setattr(model.blocks[3].attn, "n_head", 2),
    "blocks/0/attn has score_divisor=2.0": lambda model: setattr(model.blocks[0].attn, "score_divisor", 2.0),
    "blocks/2/ln_1 has epsilon=0.1": lambda model: setattr(model.blocks[2].ln_1, "epsilon", 0.1),
    "ln_f has epsilon=0.1": lambda model: setattr(model.ln_f, "epsilon", 0.1),
}

USES = {
    "generate": lambda model: generate(model, IDS.tolist(), max_new_tokens=2, jit_compile=False),
    "score": lambda model: score(model, IDS.tolist(), jit_compile=False),
    "beam_search": lambda model: beam_search(model, IDS.tolist(), max_new_tokens=2, jit_compile=False),
    "training": lambda model: TrainingStep(model, StepOptions(schedule=SCHEDULE)),
}


@pytest.mark.parametrize(("change", "path"), CHANGES.values(), ids=CHANGES)
def test_what_someone_has_changed_counts_or_is_refused_by_name(change, path):
    model = make_model()
    before = model(IDS).numpy()
    for use in USES.values():
        use(model)
    change(model)
    assert np.abs(model(IDS).numpy() - before).max() > 0.1
    for use in USES.values():
        with pytest.raises(ValueError, match=f"{path} has been replaced or changed"):
            use(model)


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_are_not_the_configs_are_refused_by_name(message):
    model = make_model()
    before = model(IDS).numpy()
    SETTINGS[message](model)
    assert np.abs(model(IDS).numpy() - before).max() > 1e-3
    for use in USES.values():
        with pytest.raises(ValueError, match=f"{message} and the model's config "):
            use(model)


def test_a_changed_layer_counts_in_fit():
    losses = []
    for change in (lambda model: None, lambda model: halve(model.blocks[2].mlp)):
        model = make_model()
        change(model)
        model.compile(keras.optimizers.SGD(0.0), NextTokenLoss(), jit_compile=False)
        losses += model.fit(IDS[:, :-1], IDS[:, 1:], verbose=0).history["loss"]
        logits = model(IDS[:, :-1])
        assert losses[-1] == pytest.approx(float(NextTokenLoss()(IDS[:, 1:], logits)), rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_model_with_its_own_training_generates():
    wanted = generate(make_model(), IDS.tolist(), max_new_tokens=3, jit_compile=False)
    assert generate(make_model(Watched), IDS.tolist(), max_new_tokens=3, jit_compile=False) == wanted


def test_layers_of_another_dtype_are_refused():
    model = make_model()
    model.blocks[0].mlp.c_fc.dtype_policy = keras.DTypePolicy("bfloat16")
    with pytest.raises(ValueError, match="blocks/0/mlp/c_fc computes in bfloat16 and the model in float32"):
        USES["generate"](model)
