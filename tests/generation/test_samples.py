"""Several samples of a prompt: each is what a call of its own gives, and the prompt is read once."""

import numpy as np
import pytest
from counting import count_traces

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation import loop
from tf_gpt2.generation.generate import generate
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7]]
N = 3
SAMPLED = {"temperature": 1.0, "seed": 11}
SEEDS = {"temperature": [1.0, 0.6], "seed": [2**64 - N, 2**32 - 1], "top_k": [0, 20], "top_p": [0.9, 1.0]}
PROCESSED = {
    "temperature": [1.5, 1.0],
    "seed": [3, 4],
    "min_p": [0.0, 0.05],
    "typical_p": [0.9, 1.0],
    "repetition_penalty": [1.4, 1.0],
    "presence_penalty": [0.0, 1.0],
    "frequency_penalty": [0.5, -0.2],
    "no_repeat_ngram_size": [2, 3],
    "min_new_tokens": [0, 9],
    "logit_bias": {3: 1.0, 50: -2.0},
    "bad_words_ids": [[4], [5, 6], [7, 8, 9]],
    "suppress": [10, 11],
    "stop_ids": [65, 89],
}


@pytest.fixture(scope="module")
def run(odd_model):
    return lambda prompts=PROMPTS, **options: generate(
        odd_model, prompts, **{"max_new_tokens": 14, "jit_compile": False, **options}
    )


def assert_each_is_a_call_of_its_own(run, options, n, prompts=PROMPTS):
    """Row by row: prompt 0's samples come first."""
    seeds = np.broadcast_to(np.array(options.get("seed", 0), object), len(prompts))
    result = run(prompts, **options, num_samples=n)
    assert len(result.ids) == len(result.logprobs) == len(result.finish_reasons) == n * len(prompts)
    for i in range(n):
        alone = run(prompts, **{**options, "seed": [int(seed) + i for seed in seeds]})
        assert result.ids[i::n] == alone.ids
        assert result.finish_reasons[i::n] == alone.finish_reasons
        for one, other in zip(result.logprobs[i::n], alone.logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    return result


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "compiled"])
def test_samples_are_what_calls_with_their_seeds_give(jit_compile, run):
    """The options change nothing that is compiled, so all three share it."""
    for options in (SAMPLED, SEEDS, PROCESSED):
        result = assert_each_is_a_call_of_its_own(run, {**options, "jit_compile": jit_compile}, N)
        texts = set(map(tuple, result.ids))
        assert len(texts) == N * len(PROMPTS)  # or the test proves little


@pytest.mark.parametrize("n", [1, 4])
def test_any_number_of_samples_of_one_prompt(n, run):
    assert_each_is_a_call_of_its_own(run, {"temperature": 1.2, "seed": 7}, n, PROMPTS[1:])


def test_greedy_samples_are_equal(run):
    assert run(num_samples=N).ids == [ids for ids in run().ids for _ in range(N)]


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_samples_with_smaller_weights(options, odd_config, odd_params):
    model = GPT2Model(odd_config, **options)
    model.set_weights(odd_params)

    def run(prompts, **options):
        return generate(model, prompts, max_new_tokens=9, jit_compile=False, **options)

    assert_each_is_a_call_of_its_own(run, SAMPLED, 2)


def test_rows_of_samples_end_by_themselves(run):
    """Each sample asks for itself whether it is complete, and has its own stop id and its own place in the window."""
    whole = run(**SAMPLED, num_samples=N)
    wanted = {ids[2 + i] for i, ids in enumerate(whole.ids)}

    def is_complete(ids):
        return bool(wanted & set(ids))

    options = {**SAMPLED, "is_complete": is_complete, "max_new_tokens": 25}
    result = assert_each_is_a_call_of_its_own(run, options, N)
    assert "stop" in result.finish_reasons
    stopped = run(**SAMPLED, num_samples=N, stop_ids=[whole.ids[4][1]])
    assert stopped.ids[4] == whole.ids[4][:1]
    assert stopped.finish_reasons[4] == "stop"
    long = [[5] * 37, [6] * 3]
    ends = assert_each_is_a_call_of_its_own(run, SAMPLED, N, long)
    assert ends.finish_reasons == ["context"] * N + ["length"] * N


def test_the_cache_of_samples_grows(run, monkeypatch):
    whole = run(**SAMPLED, num_samples=N)
    for name, value in {"SMALLEST_BUCKET": 5, "SMALLEST_GROWING": 5, "GROWTH": 2}.items():
        monkeypatch.setattr(loop, name, value)
    assert run(**SAMPLED, num_samples=N).ids == whole.ids


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "compiled"])
def test_a_prompt_is_read_once(jit_compile, monkeypatch):
    """The blocks see one row per prompt for the prompts' length, and one per sample for each token after."""
    model, seen = GPT2Model(GPT2Config(n_vocab=31, n_ctx=34, n_embd=6, n_head=3, n_layer=1)), []
    hidden_states = Network.hidden_states

    def spy(network, ids, *arguments):
        seen.append(tuple(ids.shape))
        return hidden_states(network, ids, *arguments)

    monkeypatch.setattr(Network, "hidden_states", spy)
    generate(model, [[1] * 20, [2]], num_samples=4, max_new_tokens=5, temperature=1.0, jit_compile=jit_compile)
    assert seen[0] == (2, 32)
    assert set(seen[1:]) == {(8, 1)}


COMPILES = """
from tf_gpt2 import GPT2Config, GPT2Model, generate
model = GPT2Model(GPT2Config(n_vocab=64, n_ctx=33, n_embd=6, n_head=3, n_layer=1))
generate(model, [[1] * 20], num_samples=8, max_new_tokens=1, temperature=1.0)
print("well")
"""


def test_samples_compile(run_python):
    """The compiler once took minutes over eight rows: in a process of its own, that can be stopped."""
    assert run_python(COMPILES, timeout=120) == "well\n"


def test_the_number_of_samples_is_a_shape(run, odd_model):
    run(num_samples=N)
    n_traces = count_traces(odd_model)
    for n in (N, np.int64(N)):
        run(num_samples=n, **SEEDS | {"seed": 5})
    assert count_traces(odd_model) == n_traces


def test_samples_draw_from_the_models_distribution(run, odd_model):
    """400 first tokens of one prompt, against its softmax: seeds that follow one another draw as any others."""
    result = run([[5]], temperature=1.0, max_new_tokens=1, num_samples=400)
    probs = np.exp(odd_model(np.array([[5]]))[0, -1].numpy().astype(np.float64))
    probs /= probs.sum()
    counts = np.bincount([ids[0] for ids in result.ids], minlength=len(probs))
    assert np.abs(counts / 400 - probs).sum() < 0.5  # half of that is the total variation; noise makes 0.3 here


# ---- what is refused


@pytest.mark.parametrize("n", [0, -1, 1.5, 2.0, True, None, "2", [2]])
def test_a_wrong_number_is_named_with_its_value(n, run):
    with pytest.raises(ValueError, match=r"^num_samples must be an integer of at least 1, got") as caught:
        run(num_samples=n)
    assert repr(n) in str(caught.value)


@pytest.mark.parametrize("seed", [2**64 - 2, [0, 2**64 - 1]])
def test_seeds_that_would_leave_their_range_are_refused(seed, run):
    with pytest.raises(ValueError, match=r"^seed must be at most 2\*\*64 - 3 for 3 samples, got 1844674407370955161"):
        run(num_samples=3, seed=seed)


def test_settings_are_one_per_prompt_and_not_per_sample(run):
    for name, value in {"temperature": [1.0] * 6, "seed": list(range(6)), "top_k": [1, 2, 3]}.items():
        with pytest.raises(ValueError, match=rf"^{name} must be .* one value per prompt \(2\)"):
            run(num_samples=3, **{name: value})


def test_a_prompt_that_fills_the_window_is_refused(run):
    with pytest.raises(ContextLengthError, match=r"^prompts\[1\] has 40 tokens"):
        run([[1], [2] * 40], num_samples=3)
