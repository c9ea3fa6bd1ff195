"""Penalties, bans and filters against Hugging Face's processors, on random logits and random histories."""

import contextlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from asking import make_sampling
from huggingface import PYTHON, pytestmark  # noqa: F401

from tf_gpt2 import GPT2Config
from tf_gpt2.generation.choose import filter_logits
from tf_gpt2.generation.processors import EXCLUDED, History, process
from tf_gpt2.model.arithmetic import xla

N_VOCAB, N_PLACES, STOP_IDS = 30, 24, [3, 29]
CONFIG = GPT2Config(n_vocab=N_VOCAB, n_ctx=N_PLACES, n_embd=1, n_head=1, n_layer=1)

WORDS = [[1, 2], [2], [0, 1, 2, 3], [0, 0], [4] * 30, [1, 1, 1, 1, 5]]
CASES = {
    "repetition_penalty": [0.3, 1.2, 2.0, 100.0],
    "no_repeat_ngram_size": [1, 2, 3, 23, 24, 25],
    "bad_words_ids": [WORDS, WORDS[:1], [[i] for i in range(5, 25)]],
    "min_new_tokens": [1, 2, 8],
    "suppress": [[0], [0, 29, 29], list(range(5, 28))],
    "logit_bias": [{0: 2.5, 7: -3.0}, {29: -1e5}],
    "temperature": [0.1, 0.9, 30.0],
    "top_k": [1, 2, 15, 29, 30, 1000],
    "top_p": [1e-6, 0.1, 0.5, 0.9, 0.999],
    "min_p": [1e-6, 0.01, 0.3, 0.99, 1.0],
    "typical_p": [1e-6, 0.1, 0.5, 0.9, 0.999],
}


@pytest.fixture(scope="module")
def peer():
    """Gives ``ask(**job)``."""
    command = [str(PYTHON.absolute()), str(Path(__file__).parent / "processors_worker.py")]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        )
        stack.callback(process.stdin.close)

        def ask(**job):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return np.array(json.loads(process.stdout.readline()))

        yield ask


@tf.function(jit_compile=True, autograph=False)
def ours(logits, sampling, history, stop_ids):
    return filter_logits(process(logits, sampling.processing, history, stop_ids, xla), sampling, xla)


def compare(peer, rng, options):
    n_prompt, length = sorted(rng.integers(1, N_PLACES + 1, 2).tolist())
    logits = (rng.standard_normal(N_VOCAB) * rng.choice([0.1, 1, 4])).astype(np.float32)
    text = rng.integers(0, rng.choice([2, 5, 30]), length).tolist()
    job = {"text": text, "n_prompt": n_prompt, "stop_ids": STOP_IDS, "logits": logits.tolist(), "options": options}
    theirs = peer(**job)
    ids = np.full((1, N_PLACES + 1), 7, np.int32)
    ids[0, :length] = text
    history = History(tf.constant(ids), tf.constant([length]), tf.constant([n_prompt]))
    sampling = make_sampling(1, CONFIG, **{"temperature": 1.0, **options})
    found = ours(tf.constant(logits[None]), sampling, history, tf.constant([*STOP_IDS, -1]))[0].numpy()
    if np.isfinite(theirs).any():  # else everything is banned, which Hugging Face leaves to fail
        found[found == EXCLUDED] = -np.inf
        np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5, err_msg=str(job))
    else:
        assert np.isfinite(found).any()
    return (theirs != logits).any()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CASES.items() for value in values])
def test_one_processor(peer, name, value):
    rng = np.random.default_rng(0)
    changed = [compare(peer, rng, {name: value}) for _ in range(40)]
    never = {"no_repeat_ngram_size": (23, 24, 25), "top_k": (30, 1000)}.get(name, ())
    assert any(changed) or value in never


@pytest.mark.parametrize("seed", range(8))
def test_combinations(peer, seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        names = rng.choice(list(CASES), rng.integers(2, len(CASES)), replace=False)
        compare(peer, rng, {str(name): CASES[name][rng.integers(len(CASES[name]))] for name in names})
