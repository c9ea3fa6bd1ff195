"""Trains a small model for some updates on one device, two logical ones, or as one of two workers; prints losses."""

import contextlib
import json
import sys

import numpy as np
import tensorflow as tf

kind = sys.argv[1]
if kind == "mirrored":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
if kind == "workers":
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
elif kind == "mirrored":
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
else:
    strategy = None

from tf_gpt2 import GPT2Config, GPT2Model  # noqa: E402
from tf_gpt2.checkpoint.params import random_params  # noqa: E402
from tf_gpt2.training import finetune  # noqa: E402

CONFIG = GPT2Config(n_vocab=53, n_ctx=8, n_embd=8, n_head=2, n_layer=2)
ids = np.random.default_rng(0).integers(0, 53, (2, 4, 9)).astype(np.int32)
labels = ids[:, :, 1:].copy()
labels[0, 3] = -1
data = tf.data.Dataset.from_tensor_slices((ids[:, :, :-1], labels)).repeat()
with strategy.scope() if strategy else contextlib.nullcontext():
    model = GPT2Model(CONFIG, dropout=0.2)
    model.set_weights(random_params(CONFIG))
    history = finetune(
        model,
        data,
        steps=5,
        accumulate=2,
        learning_rate=0.05,
        warmup_steps=0,
        clip_norm=0.5,
        save_every=1,
        progress=False,
    )
print(json.dumps({"losses": history.history["loss"], "weights": [float(np.abs(w).sum()) for w in model.get_weights()]}))
