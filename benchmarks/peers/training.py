"""Makes whole steps of training with one engine, in its own environment, and prints how long each took.

A step is forward, backward, clipping to a norm of 1 and AdamW. Each engine gets the same shapes and ids; the weights
are random. The loss of the last step is printed, too: it must have fallen.

    .peers/huggingface/bin/python -m benchmarks.peers.training huggingface '{"n_vocab": 8192, …}'
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.protocol import package_version, peak_bytes

Step = Callable[[np.ndarray, np.ndarray], float]
"""Makes one step on ids and targets, (B, T); returns the loss before it."""

RATE, DECAY, BETAS = 1e-4, 0.1, (0.9, 0.95)


def main() -> None:
    engine, job = sys.argv[1], json.loads(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed
    step = {"tf_gpt2": tf_gpt2, "huggingface": huggingface, "keras_hub": keras_hub}[engine](job)
    rng = np.random.default_rng(0)
    ids = rng.integers(job["n_vocab"], size=(job["batch"], job["length"] + 1))
    times, losses = [], []
    for _ in range(job["steps"] + job["first"]):
        start = time.perf_counter()
        losses.append(float(step(ids[:, :-1], ids[:, 1:])))
        times.append(time.perf_counter() - start)
    reply = {"step_s": times[job["first"] :], "losses": losses, "peak_bytes": peak_bytes()}
    packages = {"huggingface": ("torch", "transformers")}.get(engine, ("tensorflow", "keras"))
    print(json.dumps({**reply, "versions": {name: package_version(name) for name in packages}}), file=replies)


def tf_gpt2(job: dict[str, Any]) -> Step:
    import tensorflow as tf

    from tf_gpt2 import GPT2Config, GPT2Model
    from tf_gpt2.training.fit import as_batch
    from tf_gpt2.training.optimizer import Schedule
    from tf_gpt2.training.step import StepOptions, TrainingStep

    tf.config.threading.set_intra_op_parallelism_threads(job["threads"])
    config = GPT2Config(**{name: job[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")})
    model = GPT2Model(config, dtype="mixed_bfloat16" if job["bfloat16"] else "float32")
    if job.get("lora_rank"):
        model.enable_lora(job["lora_rank"])
    schedule = Schedule(learning_rate=RATE, warmup_steps=0, steps=1000)
    step = TrainingStep(model, StepOptions(schedule=schedule, weight_decay=DECAY, remat=job.get("remat", False)))
    counter = iter(range(1000))
    return lambda ids, targets: step.update(
        as_batch([tf.constant(ids[None]), tf.constant(targets[None])]), next(counter)
    )


def huggingface(job: dict[str, Any]) -> Step:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
    sizes = {names.get(name, name): job[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_dropout, **tokens)).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)

    def step(ids: np.ndarray, targets: np.ndarray) -> float:
        with torch.autocast("cpu", torch.bfloat16) if job["bfloat16"] else contextlib.nullcontext():
            logits = model(torch.from_numpy(ids)).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def keras_hub(job: dict[str, Any]) -> Step:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import keras_hub
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(job["threads"])
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=job["n_vocab"],
        num_layers=job["n_layer"],
        num_heads=job["n_head"],
        hidden_dim=job["n_embd"],
        intermediate_dim=4 * job["n_embd"],
        max_sequence_length=job["n_ctx"],
        dropout=0.0,
        dtype="mixed_bfloat16" if job["bfloat16"] else "float32",
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    optimizer = keras.optimizers.AdamW(
        RATE, weight_decay=DECAY, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=1e-8, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if len(v.shape) < 2])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=job["jit_compile"])

    def step(ids: np.ndarray, targets: np.ndarray) -> float:
        inputs = {"token_ids": ids.astype(np.int32), "padding_mask": np.ones_like(ids, np.int32)}
        return np.ravel(model.train_on_batch(inputs, targets.astype(np.int32)))[0]  # behind it come metrics

    return step


if __name__ == "__main__":
    main()
