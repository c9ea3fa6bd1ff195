"""The likeliest ids beside each chosen one: those of the float64 reference, whatever the options choose."""

import dataclasses
import json
import math

import numpy as np
import pytest
import reference
import tensorflow as tf
from asking import make_limits, make_sampling
from counting import count_traces

from tf_gpt2.generation import loop
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.generate import generate
from tf_gpt2.model.gpt2 import GPT2Model

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(20, 36))]
N_VOCAB = 101
CHANGED = {
    "temperature": [0.0, 2.0, 0.7],
    "seed": [1, 2, 3],
    "top_k": [0, 5, 0],
    "repetition_penalty": 1.5,
    "frequency_penalty": 1.0,
    "logit_bias": {3: 5.0},
    "suppress": [65, 89],
}


@pytest.fixture(scope="module")
def run(odd_model):
    return lambda prompts=PROMPTS, **options: generate(
        odd_model, prompts, **{"max_new_tokens": 9, "jit_compile": False, **options}
    )


def assert_likeliest(result, prompts, params, k):
    """Compares with the reference, and each chosen id's entry with its own log-probability, to the bit."""
    assert len(result.top_logprobs) == len(prompts)
    for prompt, ids, logprobs, tops in zip(prompts, result.ids, result.logprobs, result.top_logprobs, strict=True):
        plain = reference.log_softmax(reference.forward(params, [*prompt, *ids], n_head=3))[len(prompt) - 1 : -1]
        assert len(tops) == len(ids)
        for chosen, logprob, top, wanted in zip(ids, logprobs, tops, plain, strict=True):
            assert [i for i, _ in top] == np.argsort(-wanted, kind="stable")[:k].tolist()
            assert [value for _, value in top] == pytest.approx(np.sort(wanted)[::-1][:k], abs=1e-4)
            assert dict(top).get(chosen, logprob) == logprob


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "compiled"])
def test_they_are_the_references(jit_compile, run, odd_params):
    for options in ({}, CHANGED):
        result = run(**options, top_logprobs=5, jit_compile=jit_compile)
        assert_likeliest(result, PROMPTS, odd_params, 5)
        plain = run(**options, jit_compile=jit_compile)
        assert (result.ids, result.finish_reasons) == (plain.ids, plain.finish_reasons)
        assert ([[top[0][0] for top in row] for row in result.top_logprobs] == result.ids) == (not options)


def test_all_ids_together_are_certain(run, odd_params):
    result = run(**CHANGED, top_logprobs=N_VOCAB)
    assert_likeliest(result, PROMPTS, odd_params, N_VOCAB)
    for logprobs, row in zip(result.logprobs, result.top_logprobs, strict=True):
        for logprob, top in zip(logprobs, row, strict=True):
            assert math.fsum(math.exp(value) for _, value in top) == pytest.approx(1, abs=1e-5)
            assert logprob in dict(top).values()


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_the_chosen_one_agrees_with_smaller_weights(options, odd_config, odd_params):
    model = GPT2Model(odd_config, **options)
    model.set_weights(odd_params)
    result = generate(model, PROMPTS, top_logprobs=1, max_new_tokens=9, jit_compile=False)
    for ids, logprobs, tops in zip(result.ids, result.logprobs, result.top_logprobs, strict=True):
        assert tops == [[pair] for pair in zip(ids, logprobs, strict=True)]


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "compiled"])
def test_of_equals_the_lower_id_comes_first(jit_compile, odd_config, odd_params):
    model = GPT2Model(odd_config)
    model.set_weights({**odd_params, "wte": np.zeros_like(odd_params["wte"])})
    result = generate(model, PROMPTS, top_logprobs=4, max_new_tokens=9, jit_compile=jit_compile)
    assert result.top_logprobs == [[[(i, pytest.approx(-math.log(N_VOCAB))) for i in range(4)]] * 9] * 3


def test_they_end_where_the_ids_end(run):
    """At a stop id, where the row is complete, in the window, at once."""
    whole = run(top_logprobs=2)
    stop = whole.ids[0][4]
    for options in (
        {"stop_ids": [stop]},
        {"is_complete": lambda ids: stop in ids},
        {"max_new_tokens": 40},
        {"max_new_tokens": 0},
    ):
        result = run(**options, top_logprobs=2)
        assert [len(row) for row in result.top_logprobs] == [len(ids) for ids in result.ids]
        n = min(len(result.ids[0]), 4)
        assert [[i for i, _ in top] for top in result.top_logprobs[0][:n]] == [
            [i for i, _ in top] for top in whole.top_logprobs[0][:n]
        ]


def test_a_growing_cache_keeps_them(run, odd_params, monkeypatch):
    for name, value in {"SMALLEST_BUCKET": 5, "SMALLEST_GROWING": 5, "GROWTH": 2}.items():
        monkeypatch.setattr(loop, name, value)
    assert_likeliest(run(max_new_tokens=20, top_logprobs=3), PROMPTS, odd_params, 3)


def test_each_sample_has_its_own(run, odd_params):
    result = run(PROMPTS[:2], temperature=1.5, num_samples=2, top_logprobs=3)
    assert_likeliest(result, [prompt for prompt in PROMPTS[:2] for _ in range(2)], odd_params, 3)
    assert result.ids[0] != result.ids[1]


# ---- what it costs


def test_none_are_given_unless_asked_for(run):
    assert run().top_logprobs == [[], [], []]
    assert run(top_logprobs=0) == run()


def test_numbers_up_to_8_share_what_is_compiled(run, odd_model):
    run(top_logprobs=8)
    eight, n_traces = run(top_logprobs=8), count_traces(odd_model)
    for k in (1, 5, 7, np.int64(3)):
        fewer = run(top_logprobs=k)
        assert fewer.top_logprobs == [[top[:k] for top in row] for row in eight.top_logprobs]
        assert {len(top) for row in fewer.top_logprobs for top in row} == {k}
    run()
    assert count_traces(odd_model) == n_traces
    run(top_logprobs=9)
    assert count_traces(odd_model) == n_traces + 2


@pytest.mark.parametrize("n_top", [0, 8])
def test_the_ordinary_loop_looks_for_no_likeliest(n_top, odd_model, odd_config):
    """Nothing is computed for what nobody asked for, and nothing carried along."""
    rows = [np.array([1, 2, 3], np.int32)]
    sampling, limits = make_sampling(1, odd_config), make_limits(rows, 5, (), odd_config)
    read = compiled(loop.prefill, odd_model, jit_compile=False)
    state = read(tf.constant([[1, 2, 3]]), tf.constant([3]), 1, n_top)
    assert state.top_ids.shape == state.top_logprobs.shape == (1, 5, n_top)
    go_on = compiled(loop.decode, odd_model, jit_compile=False)
    arguments = *go_on.args, loop.grow(state, 8), sampling, limits, 3
    graph = go_on.func.function.get_concrete_function(*arguments).graph
    parts = [{node.name: node for node in part.node_def} for part in graph.as_graph_def().library.function]
    inputs = [part.get(node.input[1].partition(":")[0]) for part in parts for node in part.values() if is_top_k(node)]
    numbers = [tf.make_ndarray(k.attr["value"].tensor).item() for k in inputs if k and k.op == "Const"]
    assert inputs  # filters sort as well, but not so few
    assert (8 in numbers) == (n_top > 0)


def is_top_k(node):
    return node.op == "TopKV2"


def test_the_result_is_plain_python(run):
    result = run(top_logprobs=2)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["top_logprobs"][0][0] == [
        list(pair) for pair in result.top_logprobs[0][0]
    ]
    [[first, *_], *_] = result.top_logprobs[0]
    assert [type(part) for part in first] == [int, float]


@pytest.mark.parametrize("k", [-1, N_VOCAB + 1, 2**70, 1.5, 2.0, True, None, "5", [5]])
def test_a_wrong_number_is_named_with_its_value(k, run):
    with pytest.raises(ValueError, match=r"^top_logprobs must be an integer in \[0, n_vocab=101\], got") as caught:
        run(top_logprobs=k)
    assert repr(k) in str(caught.value)
