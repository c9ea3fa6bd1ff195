"""This project's own model as a worker of the comparison, in a process of its own, as the comparison starts it."""

import sys

import numpy as np

from benchmarks.peers.protocol import Worker
from tf_gpt2 import GPT2Model, generate
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.text.generator import DTYPES


def test_it_generates_what_generate_does():
    precision = "int8"
    prompts = np.random.default_rng(0).integers(1024, size=(2, 5)).tolist()
    model = GPT2Model.from_checkpoint(embedded_dir(), **DTYPES[precision])
    with Worker(sys.executable, "tf_gpt2", embedded_dir(), precision=precision, n_threads=2) as worker:
        reply = worker.ask(task="generate", prompts=prompts, max_new_tokens=7)
    assert reply["ids"] == generate(model, prompts, max_new_tokens=7).ids
    assert reply["prefill_s"] > 0
    assert reply["decode_s"] > 0
