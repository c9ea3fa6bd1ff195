"""Beam search against Hugging Face's, on the same random weights: sequences and their scores."""

import contextlib
import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from huggingface import PYTHON, pytestmark  # noqa: F401
from reference import lively_params

from tf_gpt2 import GPT2Config, GPT2Model, beam_search
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.generation import beam
from tf_gpt2.generation.beam import Search

ROOT = Path(__file__).parents[2]
CONFIG = GPT2Config(n_vocab=23, n_ctx=32, n_embd=24, n_head=3, n_layer=2)
PROMPTS = np.random.default_rng(3).integers(CONFIG.n_vocab, size=(4, 6)).tolist()
STOP_IDS = [[], [7], [16, 2, 11], [5, 7, 9, 11, 13, 15, 17, 19, 21, 3]]
EARLY = [True, False, "never"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Gives ``search(prompts, stop_ids, **options)``: per prompt ``(ids, reason)`` of each sequence, and the scores."""
    with start_peer(tmp_path_factory.mktemp("weights"), params()) as search:
        yield search


@contextlib.contextmanager
def start_peer(folder, tree):
    """Starts a process with these weights."""
    from benchmarks.peers.protocol import write_model

    write_model(folder, CONFIG.to_hparams(), dict(leaves(tree)))
    command = [str(PYTHON.absolute()), str(Path(__file__).parent / "beam_worker.py"), str(folder)]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )
        stack.callback(process.stdin.close)

        def search(prompts, stop_ids, **options):
            process.stdin.write(json.dumps({"prompts": prompts, "stop_ids": stop_ids, "options": options}) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            sequences = [[cut(ids, stop_ids) for ids in of_prompt] for of_prompt in reply["sequences"]]
            return sequences, reply["scores"]

        yield search


def params(scale=0.3):
    """Flat logits, so that sequences stop often and at different lengths."""
    tree = lively_params(CONFIG, seed=4)
    return {**tree, "ln_f": {"g": scale * tree["ln_f"]["g"], "b": 0 * tree["ln_f"]["b"]}}


def cut(ids, stop_ids):
    """Cuts before the first stop id; says why the sequence ended."""
    places = [i for i, token in enumerate(ids) if token in stop_ids]
    return (ids[: places[0]], "stop") if places else (ids, "length")


@pytest.fixture(scope="module")
def model():
    model = GPT2Model(CONFIG)
    model.set_weights(params())
    return model


def compare(model, peer, prompts, stop_ids, **options):
    """Compares, and gives what was found."""
    ours = beam_search(model, prompts, stop_ids=stop_ids, jit_compile=False, **options)
    sequences, scores = peer(prompts, stop_ids, **options)
    pairs = zip(ours.ids, ours.finish_reasons, strict=True)
    assert [list(zip(ids, reasons, strict=True)) for ids, reasons in pairs] == sequences, (stop_ids, options)
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-4, atol=1e-4)
    return ours


@pytest.mark.parametrize("num_beams", [2, 3, 4, 8])
@pytest.mark.parametrize("stop_ids", STOP_IDS, ids=str)
def test_sequences_and_scores_are_hugging_faces(stop_ids, num_beams, model, peer):
    found = {}
    for length_penalty, early_stopping in itertools.product((0.0, 1.0, 2.0, -1.0, 0.4), EARLY):
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        sizes = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 12}
        found[length_penalty, early_stopping] = compare(model, peer, PROMPTS, stop_ids, **options, **sizes)
    reasons = {reason for result in found.values() for of_prompt in result.finish_reasons for reason in of_prompt}
    assert reasons == ({"stop", "length"} if stop_ids else {"length"})
    if stop_ids == [7] and num_beams == 4:  # or there was little to agree on
        assert len({str(found[2.0, early].ids) for early in EARLY}) > 1
        assert len({str(found[penalty, "never"].ids) for penalty in (0.0, 1.0, 2.0, -1.0)}) > 1


def test_never_with_a_negative_penalty_hopes_for_no_longer_sequence(tmp_path):
    """A likely beam overtakes unlikely sequences that ended early: the more tokens, the worse, so none are added."""
    model, n_later = GPT2Model(CONFIG), 0
    model.set_weights(params(1.5))
    with start_peer(tmp_path, params(1.5)) as peer:
        for stop_ids, num_beams, penalty in itertools.product(STOP_IDS[2:], (4, 8), (-0.1, -0.5, -1.0)):
            options = {"length_penalty": penalty, "num_beams": num_beams, "num_return_sequences": num_beams}
            found = compare(model, peer, PROMPTS, stop_ids, **options, max_new_tokens=24, early_stopping="never")
            n_later += found.ids != hopeful_ids(model, stop_ids, **options, max_new_tokens=24)
    assert n_later > 3  # or there was little to agree on


def hopeful_ids(model, stop_ids, **options):
    """What is found if a beam's sum is divided as if it had all tokens that it may have, with any penalty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam, "Search", lambda **parts: Search(**{**parts, "hopes_for_longest": tf.constant(True)}))
        options |= {"early_stopping": "never", "jit_compile": False}
        return beam_search(model, PROMPTS, stop_ids=stop_ids, **options).ids


@pytest.mark.parametrize("seed", range(12))
def test_any_settings_on_prompts_of_any_length(seed, model, peer):
    """Each prompt alone there, all together here."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(CONFIG.n_vocab, size=n).tolist() for n in rng.integers(1, 16, size=4)]
    stop_ids = np.unique(rng.integers(CONFIG.n_vocab, size=rng.integers(0, 7))).tolist()
    options = {
        "num_beams": 5,
        "max_new_tokens": int(rng.integers(1, 17)),
        "length_penalty": float(rng.uniform(-3, 3)),
        "early_stopping": EARLY[rng.integers(3)],
        "num_return_sequences": int(rng.integers(1, 6)),
    }
    ours = beam_search(model, prompts, stop_ids=stop_ids, jit_compile=False, **options)
    for row, prompt in enumerate(prompts):
        sequences, scores = peer([prompt], stop_ids, **options)
        assert [list(zip(ours.ids[row], ours.finish_reasons[row], strict=True))] == sequences
        np.testing.assert_allclose([ours.scores[row]], scores, rtol=1e-4, atol=1e-4)
