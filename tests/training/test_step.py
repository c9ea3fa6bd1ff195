"""The training step: gradients as TensorFlow has them for the plain model, dropout by seeds, several devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params, loss as reference_loss

from tf_gpt2 import GPT2Config, GPT2Model
from tf_gpt2.training import forward
from tf_gpt2.training.fit import as_batch
from tf_gpt2.training.optimizer import LARGE, AdamW, Schedule
from tf_gpt2.training.step import StepOptions, TrainingStep

CONFIG = GPT2Config(n_vocab=61, n_ctx=12, n_embd=12, n_head=3, n_layer=2)
RNG = np.random.default_rng(0)
IDS, LABELS = RNG.integers(0, 61, (2, 4, 9)).astype(np.int32), RNG.integers(0, 61, (2, 4, 9)).astype(np.int32)
LABELS[0, 1, 3:7], LABELS[1, 2] = -1, -100
WEIGHTS = RNG.uniform(0.5, 2, (2, 4)).astype(np.float32)
SCHEDULE = Schedule(learning_rate=1e-2, warmup_steps=0, steps=10)


def make_model(dropout=0.0, **options):
    model = GPT2Model(CONFIG, dropout=dropout, **options)
    model.set_weights(lively_params(CONFIG))
    return model


def batch_of(*parts):
    return as_batch([tf.constant(part) for part in parts])


def plain_gradients(model, ids, labels, weights):
    """By TensorFlow's own gradients of the Keras layers, all rows at once."""
    ids, labels = ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, labels.shape[-1])
    mask = (labels >= 0) * np.reshape(weights, (-1, 1)).astype(np.float32)
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(np.maximum(labels, 0), model(ids))
        loss = tf.reduce_sum(losses * mask) / mask.sum()
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    return float(loss), [tf.convert_to_tensor(gradient) for gradient in gradients]


def assert_near(found, wanted, bound):
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.float32(one) - np.float32(other)).max() <= bound * max(np.abs(other).max(), 1e-3)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("n_batches", [1, 2])
def test_gradients_are_those_of_the_plain_model(n_batches, remat):
    model = make_model()
    parts = IDS[:n_batches], LABELS[:n_batches], WEIGHTS[:n_batches]
    step = TrainingStep(model, StepOptions(schedule=SCHEDULE, accumulate=n_batches, remat=remat))
    loss, gradients = step.gradients(batch_of(*parts), 0)
    wanted_loss, wanted = plain_gradients(model, *parts)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_near(gradients, wanted, 1e-5)


def test_gradients_of_other_architectures():
    """An activation, a width, scales, an epsilon and a head of its own."""
    others = {"activation": "silu", "n_inner": 20, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False}
    config = GPT2Config(
        n_vocab=61, n_ctx=12, n_embd=12, n_head=3, n_layer=2, scale_attn_by_inverse_layer_idx=True, **others
    )
    model = GPT2Model(config)
    for variable in model.trainable_variables:
        variable.assign(RNG.standard_normal(variable.shape) * 0.3 + (variable.name == "g"))
    parts = IDS[:1], LABELS[:1], WEIGHTS[:1]
    loss, gradients = TrainingStep(model, StepOptions(schedule=SCHEDULE)).gradients(batch_of(*parts), 0)
    wanted_loss, wanted = plain_gradients(model, *parts)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_near(gradients, wanted, 2e-5)


def test_the_loss_is_that_of_the_reference():
    model = make_model()
    found = TrainingStep(model, StepOptions(schedule=SCHEDULE)).loss_sums(batch_of(IDS[1:], np.abs(LABELS[1:]) % 61))
    wanted = np.mean(
        [
            reference_loss(lively_params(CONFIG), ids, labels, n_head=3)
            for ids, labels in zip(IDS[1], np.abs(LABELS[1]) % 61, strict=True)
        ]
    )
    assert found[0] / found[1] == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_is_near_float32():
    wanted = plain_gradients(make_model(), IDS, LABELS, WEIGHTS)
    step = TrainingStep(make_model(dtype="mixed_bfloat16"), StepOptions(schedule=SCHEDULE, accumulate=2))
    loss, gradients = step.gradients(batch_of(IDS, LABELS, WEIGHTS), 0)
    assert loss == pytest.approx(wanted[0], rel=2e-2)
    flat = [np.concatenate([np.ravel(part) for part in parts]) for parts in (gradients, wanted[1])]
    assert np.linalg.norm(flat[0] - flat[1]) < 0.05 * np.linalg.norm(flat[1])


def test_logits_in_parts_are_the_logits(monkeypatch):
    from tf_gpt2.training import losses

    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 700)  # 36 rows of 61 in four parts, the last one shorter
    assert [part.stop - part.start for part in losses.parts_of_rows(37, 61)] == [10, 10, 10, 7]
    model = make_model()
    _, gradients = TrainingStep(model, StepOptions(schedule=SCHEDULE)).gradients(batch_of(IDS[:1], LABELS[:1]), 0)
    assert_near(gradients, plain_gradients(model, IDS[:1], LABELS[:1], np.ones(4))[1], 1e-5)


# ---- dropout


def test_dropout_keeps_its_share_and_its_mean():
    x = tf.ones((6, 40_000))
    keys = forward.keys_of_rows(tf.constant(1, tf.uint32), tf.constant(2, tf.uint32), tf.constant(range(6), tf.uint32))
    found = forward.dropped(x, keys, tf.constant(5, tf.uint32), 0.3).numpy()
    np.testing.assert_allclose((found == 0).mean(axis=1), 0.3, atol=0.01)
    np.testing.assert_allclose(found.mean(axis=1), 1, atol=0.02)
    rows = (found == 0).astype(float)
    assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.03


def gradients_of(model, number=0, rows=slice(None), **options):
    step = TrainingStep(model, StepOptions(schedule=SCHEDULE, **options))
    return step.gradients(batch_of(IDS[:1, rows], IDS[:1, rows]), number)


def test_recomputed_blocks_draw_the_same_dropout():
    model = make_model(dropout=0.4)
    kept, again = gradients_of(model), gradients_of(model, remat=True)
    assert kept[0] == pytest.approx(again[0], rel=1e-6)
    assert_near(again[1], kept[1], 1e-5)
    other_update, other_seed = gradients_of(model, 1)[0], gradients_of(model, seed=1)[0]
    assert (
        len({round(kept[0], 5), round(other_update, 5), round(other_seed, 5), round(gradients_of(make_model())[0], 5)})
        == 4
    )


def test_gradients_are_the_slopes_of_the_loss_with_dropout():
    """Along the gradient the loss of the same dropout rises by its squared norm."""
    model = make_model(dropout=0.3)
    _, gradients = gradients_of(model)
    norm = float(tf.linalg.global_norm(gradients))
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        variable.assign_add(gradient * (1e-3 / norm))
    after, _ = gradients_of(model)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        variable.assign_sub(gradient * (2e-3 / norm))
    before, _ = gradients_of(model)
    assert (after - before) / 2e-3 == pytest.approx(norm, rel=0.02)


# ---- the optimizer


def test_updates_are_those_of_adamw_in_numpy():
    shapes = [(3, 4), (4,), (LARGE // 64, 64)]
    starts = [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]
    variables = [tf.Variable(start) for start in starts]
    optimizer = AdamW(variables, weight_decay=0.2)
    wanted, means, squares = [s.astype(np.float64) for s in starts], [0] * 3, [0] * 3
    for number, rate in enumerate((0.1, 0.02, 0.05)):
        gradients = [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]
        optimizer.update([tf.constant(g) for g in gradients], scale=0.5, rate=rate, number=number)
        for i, gradient in enumerate(gradients):
            g = gradient * 0.5
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.95 * squares[i] + 0.05 * g * g
            mean, square = means[i] / (1 - 0.9 ** (number + 1)), squares[i] / (1 - 0.95 ** (number + 1))
            wanted[i] = wanted[i] * (1 - rate * (0.2 if len(shapes[i]) > 1 else 0)) - rate * mean / (
                np.sqrt(square) + 1e-8
            )
    for variable, value in zip(variables, wanted, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5, atol=1e-6)


MANY_SHAPES = """
import logging, sys
import tensorflow as tf
from tf_gpt2.training.optimizer import LARGE, AdamW

tf.get_logger().handlers = [logging.StreamHandler(sys.stdout)]
variables = [tf.Variable(tf.zeros((LARGE // 64, 64 + i))) for i in range(6)]
AdamW(variables, weight_decay=0.1).update(variables, scale=1.0, rate=0.1, number=0)
print("updated")
"""


def test_a_new_shape_of_a_large_weight_is_no_reason_to_warn(run_python):
    assert run_python(MANY_SHAPES) == "updated\n"


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    schedule = Schedule(learning_rate=1.0, warmup_steps=4, steps=24)
    assert [schedule.rate(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.rate(14) == pytest.approx(0.55)
    assert schedule.rate(24) == schedule.rate(99) == pytest.approx(0.1)


def test_clipping_is_by_the_norm_of_the_mean_gradient():
    model = make_model()
    norm = float(tf.linalg.global_norm(plain_gradients(model, IDS, LABELS, WEIGHTS)[1]))
    moved = []
    for clip_norm in (norm / 10, None):
        model = make_model()
        step = TrainingStep(model, StepOptions(schedule=SCHEDULE, accumulate=2, clip_norm=clip_norm, weight_decay=0.0))
        step.update(batch_of(IDS, LABELS, WEIGHTS), 0)
        moved.append(np.concatenate([np.ravel(slot) for slot in step.optimizers[0].slots[::2]]))
    np.testing.assert_allclose(moved[0] * 10, moved[1], rtol=1e-3, atol=1e-7)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = make_model()
    model.ln_f.g.assign(np.full(12, np.inf, np.float32))
    before = model.get_weights()
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        TrainingStep(model, StepOptions(schedule=SCHEDULE)).update(batch_of(IDS[:1], LABELS[:1]), 0)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_trained_is_refused():
    options = StepOptions(schedule=SCHEDULE)
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        TrainingStep(make_model(dtype="bfloat16"), options)
    frozen = make_model()
    frozen.trainable = False
    with pytest.raises(ValueError, match="no trainable weights"):
        TrainingStep(frozen, options)


# ---- several devices

DEVICES = Path(__file__).with_name("devices.py")


def losses_of(kind, **environment):
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    return subprocess.Popen([sys.executable, DEVICES, kind], stdout=subprocess.PIPE, env=variables, text=True)


def result_of(process):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def test_one_device_two_devices_and_two_processes_train_alike():
    """With dropout, accumulation, labels left out and clipping."""
    listeners = [socket.socket() for _ in range(2)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()
    workers = [
        losses_of(
            "workers", TF_CONFIG=json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}})
        )
        for i in range(2)
    ]
    alone, mirrored, *both = map(result_of, [losses_of("alone"), losses_of("mirrored"), *workers])
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    for other in (mirrored, *both):
        np.testing.assert_allclose(other["losses"], alone["losses"], rtol=2e-5)
        np.testing.assert_allclose(other["weights"], alone["weights"], rtol=1e-3)
