"""Loss and gradients are Hugging Face's; adapters go to PEFT and come from it, in an environment of their own."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from huggingface import PYTHON, lively_params, pytestmark  # noqa: F401  # skips where the environment is missing

from benchmarks.peers.protocol import write_model
from tf_gpt2 import GPT2Config, GPT2Model
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.training import load_lora, save_lora
from tf_gpt2.training.fit import as_batch
from tf_gpt2.training.optimizer import Schedule
from tf_gpt2.training.step import StepOptions, TrainingStep

CONFIG = GPT2Config(n_vocab=301, n_ctx=17, n_embd=24, n_head=3, n_layer=2)
WORKER = Path(__file__).with_name("training_worker.py")
RNG = np.random.default_rng(0)
IDS, LABELS = RNG.integers(0, 301, (4, 13)), RNG.integers(0, 301, (4, 13))
LABELS[0, :5], LABELS[2, 7] = -100, -100


@pytest.fixture
def ask(tmp_path):
    params = lively_params(CONFIG)
    write_model(tmp_path, CONFIG.to_hparams(), dict(leaves(params)))
    np.savez(tmp_path / "batch.npz", ids=IDS, labels=LABELS)

    def ask(task):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [str(PYTHON.absolute()), str(WORKER), task, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]

    return ask


def make_model(**options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG))
    return model


def gradients(model, n_batches, **options):
    step = TrainingStep(model, StepOptions(schedule=Schedule(learning_rate=1, warmup_steps=0, steps=1), **options))
    parts = [tf.constant(part.reshape(n_batches, -1, 13)) for part in (IDS, LABELS)]
    loss, found = step.gradients(as_batch(parts), 0)
    values = {id(v.value): np.asarray(g) for v, g in zip(model.trainable_variables, found, strict=True)}
    by_path = {path: values[id(leaf.variable.value)] for path, leaf in leaves(model.leaf_tree())}
    return loss, {path: gradient.T if path.endswith("/w") else gradient for path, gradient in by_path.items()}


def test_loss_and_gradients_are_hugging_faces(ask, tmp_path):
    ask("gradients")
    wanted = dict(np.load(tmp_path / "gradients.npz"))
    loss = wanted.pop("loss")
    for n_batches, remat in ((1, False), (2, False), (1, True), (4, True)):
        found_loss, found = gradients(make_model(), n_batches, remat=remat)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == wanted.keys()
        for path, gradient in found.items():
            assert np.abs(gradient - wanted[path]).max() < 1e-5 * np.abs(wanted[path]).max(), path
    rough_loss, rough = gradients(make_model(dtype="mixed_bfloat16"), 2)
    assert rough_loss == pytest.approx(loss, rel=2e-2)
    difference = sum(np.square(rough[path] - wanted[path]).sum() for path in wanted) ** 0.5
    assert difference < 0.05 * sum(np.square(gradient).sum() for gradient in wanted.values()) ** 0.5


@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "c_proj"), ("attn.c_proj", "mlp.c_fc")])
def test_peft_loads_what_we_save(ask, tmp_path, targets):
    model = make_model()
    model.enable_lora(3, alpha=12, targets=targets)
    for variable in model.trainable_variables:
        variable.assign(RNG.standard_normal(variable.shape) * 0.3)
    save_lora(model, tmp_path / "adapter")
    ask("load")
    theirs = np.load(tmp_path / "logits.npy")
    assert np.abs(model(IDS) - make_model()(IDS)).max() > 0.1 * np.abs(theirs).max()
    assert np.abs(model(IDS) - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn"]},
        {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
        {"r": 2, "lora_alpha": 5, "target_modules": r".*\.mlp\.c_\w+", "lora_dropout": 0.1},
    ],
)
def test_we_load_what_peft_saves(ask, tmp_path, options):
    (tmp_path / "lora.json").write_text(json.dumps(options))
    ask("save")
    model, theirs = make_model(), np.load(tmp_path / "logits.npy")
    load_lora(model, tmp_path / "made")
    assert np.abs(model(IDS) - make_model()(IDS)).max() > 0.1 * np.abs(theirs).max()
    assert np.abs(model(IDS) - theirs).max() < 1e-5 * np.abs(theirs).max()
