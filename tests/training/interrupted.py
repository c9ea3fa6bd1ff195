"""Fine-tunes a small model, with dropout, accumulation and shuffling; prints each loss as it comes, then what is left.

python interrupted.py OUT [ADAPTER_RANK [DTYPE]]
"""

import sys
from pathlib import Path

import keras
import numpy as np

from tf_gpt2 import GPT2Config, GPT2Model
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.training import data, finetune, state
from tf_gpt2.training.fit import fingerprint
from tf_gpt2.training.from_text import DTYPES

CONFIG = GPT2Config(n_vocab=53, n_ctx=8, n_embd=8, n_head=2, n_layer=2)
rank = int(sys.argv[2]) if len(sys.argv) > 2 else 0
dtype = sys.argv[3] if len(sys.argv) > 3 else "float32"
ids = data.Ids([np.random.default_rng(0).integers(0, 53, 500).astype(np.uint16)])
model = GPT2Model(CONFIG, dropout=0.2, **DTYPES[dtype])
model.set_weights(random_params(CONFIG))
if rank:
    model.enable_lora(rank)


class Tell(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print(f"loss {logs['loss']!r}", flush=True)


history = finetune(
    model,
    data.shuffled_windows(ids.part(0, 400), n_ctx=8, batch_size=2, seed=1),
    validation=data.held_out_windows(ids.part(400, 500), n_ctx=8, batch_size=2),
    steps=40,
    remat=dtype == "bfloat16",
    accumulate=2,
    learning_rate=0.02,
    save_every=3,
    out=sys.argv[1],
    callbacks=[Tell()],
    progress=False,
)
print("history", history.history)
print("weights", fingerprint(model.get_weights()))
(last, *_) = state.checkpoints(Path(sys.argv[1], "training"))
print("weights and slots", last.name, fingerprint(state.read_arrays(last / state.ARRAYS)))
