"""``GPT2Model`` against Hugging Face's ``GPT2LMHeadModel``, which runs in an environment of its own."""

import contextlib
import os

import numpy as np
import pytest
from huggingface import PYTHON, lively_params, pytestmark  # noqa: F401

from tf_gpt2 import GPT2Config, GPT2Model, generate
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.config import SIZES

LARGEST = 1e-5
"""Bound on the largest difference of logits, relative to the largest logit; rounding makes 1e-6."""
MEAN = 1e-6
"""Bound on the mean absolute difference, relative to the same; rounding makes 1.5e-7, an exact gelu 1e-4."""

SHAPES = {
    "batch": (GPT2Config(n_vocab=301, n_ctx=17, n_embd=24, n_head=3, n_layer=2), (3, 11)),
    "full window": (GPT2Config(n_vocab=97, n_ctx=29, n_embd=40, n_head=5, n_layer=3), (2, 29)),
    "one token": (GPT2Config(n_vocab=64, n_ctx=9, n_embd=20, n_head=1, n_layer=1), (1, 1)),
    "heads of width 1": (GPT2Config(n_vocab=53, n_ctx=8, n_embd=7, n_head=7, n_layer=2), (4, 5)),
    "window of 1": (GPT2Config(n_vocab=11, n_ctx=1, n_embd=6, n_head=2, n_layer=1), (2, 1)),
    "124M": (SIZES["124M"], (2, 24)),
}


@pytest.fixture
def make_pair(tmp_path):
    """Gives ``make(config)``: our model and a Hugging Face process, with the same weights."""
    from benchmarks.peers.protocol import Worker, write_model

    with contextlib.ExitStack() as stack:

        def make(config):
            params = lively_params(config)
            model = GPT2Model(config)
            model.set_weights(params)
            write_model(tmp_path, config.to_hparams(), dict(leaves(params)))
            worker = Worker(PYTHON.absolute(), "huggingface", tmp_path, n_threads=os.cpu_count())
            return model, stack.enter_context(worker)

        yield make


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_hugging_faces(make_pair, name):
    config, shape = SHAPES[name]
    model, peer = make_pair(config)
    ids = np.random.default_rng(1).integers(config.n_vocab, size=shape)
    ours, theirs = model(ids).numpy(), peer.logits(ids.tolist())
    assert ours.shape == theirs.shape == (*shape, config.n_vocab)
    difference = np.abs(ours - theirs) / np.abs(theirs).max()
    assert difference.max() < LARGEST
    assert difference.mean() < MEAN


def test_greedy_ids_are_hugging_faces(make_pair):
    config, _ = SHAPES["full window"]
    model, peer = make_pair(config)
    prompts = np.random.default_rng(2).integers(config.n_vocab, size=(3, 5)).tolist()
    ours = generate(model, prompts, max_new_tokens=24).ids  # to the end of the window
    assert ours == peer.ask(task="generate", prompts=prompts, max_new_tokens=24)["ids"]
    assert min(len(set(row)) for row in ours) > 3  # else there was little to agree on
