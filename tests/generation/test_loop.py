"""Prefill and decode against a plain forward pass at each step, in each way of running them; and what compiles.

The plain forward pass is the float64 reference: the cached path is never compared with itself alone.
"""

import numpy as np
import pytest
import reference
import tensorflow as tf
from asking import make_limits, make_sampling
from counting import count_traces
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.compiled import compiled, compiled_for
from tf_gpt2.generation.generate import generate
from tf_gpt2.generation.loop import bucket, cache_sizes, decode, grow, prefill, step
from tf_gpt2.generation.options import pad_rows
from tf_gpt2.generation.run import Run, compile_run
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import network_of

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
MIXED = {"temperature": [1.0, 0.0, 0.7], "top_k": [0, 5, 0], "top_p": [1.0, 0.5, 0.9], "seed": [1, 2, 2**40]}
CONFIGS = [
    GPT2Config(n_vocab=101, n_ctx=40, n_embd=12, n_head=3, n_layer=2),
    GPT2Config(n_vocab=37, n_ctx=18, n_embd=10, n_head=5, n_layer=3),
    GPT2Config(n_vocab=16, n_ctx=8, n_embd=32, n_head=1, n_layer=1),
    GPT2Config(n_vocab=5, n_ctx=3, n_embd=1, n_head=1, n_layer=1),
]


class Recorder:
    """A network that remembers the logits it gave."""

    def __init__(self, model):
        network = network_of(model, plain)
        self.config, self.ops, self.hidden_states, self._logits = (
            model.config,
            plain,
            network.hidden_states,
            network.logits,
        )
        self.seen = []

    def logits(self, hidden):
        self.seen.append(self._logits(hidden))
        return self.seen[-1]


def one_step(network, state, sampling, limits):
    """Appends one token to each row."""
    return step(network, state, tf.zeros((state.ids.shape[0], 0), tf.int32), sampling, limits)[0]


def prompts_of(config, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.n_vocab, length).astype(np.int32) for length in lengths]


def start(model, rows, options, *, limit, stop_ids=(), padding=0):
    """Ids and lengths, for prefill, sampling and limits; what lies past a row's length is ``padding``."""
    ids = pad_rows(rows, max(map(len, rows)))
    for row, padded in zip(rows, ids, strict=True):
        padded[len(row) :] = padding
    limits = make_limits(rows, 0, stop_ids, model.config)._replace(lengths=tf.fill((len(rows),), limit))
    sampling = make_sampling(len(rows), model.config, **options)
    return tf.constant(ids), tf.constant([len(row) for row in rows]), sampling, limits


def run(model, *arguments, steps=1000):
    """The states of a run, the first and after each call."""
    whole = Run(model, *arguments, jit_compile=False)
    yield whole.state
    while whole.goes_on:
        whole.advance(steps)
        yield whole.state


def texts(state):
    """Ids of each row, as far as they count."""
    return [row[:length].tolist() for row, length in zip(state.ids.numpy(), state.lengths.numpy(), strict=True)]


# ---- cached = uncached


@pytest.mark.parametrize(
    ("config", "options", "quantization"),
    [
        (CONFIGS[0], GREEDY, None),
        (CONFIGS[0], GREEDY, "int8"),
        (CONFIGS[1], MIXED, None),
        (CONFIGS[2], MIXED, None),
        (CONFIGS[2], GREEDY, "int8"),
        (CONFIGS[3], GREEDY, None),
        (CONFIGS[3], MIXED, None),
    ],
    ids=str,
)
def test_logits_are_those_of_a_plain_forward_pass_at_each_step(config, options, quantization):
    model = GPT2Model(config, quantization=quantization)
    model.set_weights(lively_params(config))
    params, recorder = model.get_params(), Recorder(model)
    rows = prompts_of(config, [1, config.n_ctx // 2, config.n_ctx - 1])
    arguments = start(model, rows, options, limit=config.n_ctx, padding=config.n_vocab - 1)
    state, lengths = grow(prefill(recorder, *arguments[:2]), config.n_ctx), []
    while (state.lengths < config.n_ctx).numpy().any():
        lengths.append(state.lengths.numpy())
        state = one_step(recorder, state, *arguments[2:4])
    assert len(recorder.seen) == len(lengths) == config.n_ctx - 1
    for row, ids in enumerate(texts(state)):
        assert ids[: len(rows[row])] == rows[row].tolist()
        plain = reference.forward(params, ids, n_head=config.n_head)
        for logits, before in zip(recorder.seen, lengths, strict=True):
            if before[row] < config.n_ctx:
                wanted = plain[before[row] - 1]
                np.testing.assert_allclose(logits[row], wanted, atol=1e-5 * np.abs(plain).max())
                chosen = ids[before[row]]
                logprob = state.logprobs[row, before[row]].numpy()
                assert logprob == pytest.approx(reference.log_softmax(wanted)[chosen], abs=1e-4)


@pytest.mark.parametrize("lengths", [[3, 11], [11]])
@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_logits_in_reduced_precision_are_those_of_the_model_itself(policy, lengths, odd_config, odd_params):
    model = GPT2Model(odd_config, dtype=policy)
    model.set_weights(odd_params)
    recorder = Recorder(model)
    arguments = start(model, prompts_of(odd_config, lengths), GREEDY, limit=20)
    state = grow(prefill(recorder, *arguments[:2]), 32)
    for _ in range(9):
        state = one_step(recorder, state, *arguments[2:4])
    for row, ids in enumerate(texts(state)):
        plain = model(np.array([ids])).numpy()[0]
        found = np.stack([logits[row] for logits in recorder.seen])
        wanted = plain[len(ids) - 10 : len(ids) - 1]
        assert np.abs(found - wanted).max() < 0.03 * np.abs(plain).max()
        assert np.abs(found - wanted).mean() < 0.004 * np.abs(plain).max()


# ---- plain graph = XLA = eager


@pytest.mark.parametrize("options", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_plain_graph_and_xla_give_what_eager_gives(options, odd_model, odd_config):
    rows = prompts_of(odd_config, [1, 7, 16])
    arguments = start(odd_model, rows, options, limit=30, stop_ids=[50])
    network = network_of(odd_model, plain)
    states = [decode(network, grow(prefill(network, *arguments[:2]), 32), *arguments[2:4], tf.constant(32))]
    for jit_compile in (False, True):
        read = compiled(prefill, odd_model, jit_compile=jit_compile)
        go_on = compiled(decode, odd_model, jit_compile=jit_compile, n_rows=3)
        states.append(go_on(grow(read(*arguments[:2]), 32), *arguments[2:4], tf.constant(32)))
    eager = states[0]
    assert texts(eager) != [row.tolist() for row in rows]
    for state in states[1:]:
        assert texts(state) == texts(eager)
        np.testing.assert_array_equal(state.stopped, eager.stopped)
        for row, length in enumerate(eager.lengths.numpy()):
            np.testing.assert_allclose(state.logprobs[row, :length], eager.logprobs[row, :length], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"quantization": "int8"}, {"quantization": "int4"}, {"dtype": "bfloat16"}],
    ids=["int8", "int4", "bfloat16"],
)
def test_xla_computes_with_smaller_weights_as_the_model_does(options):
    """Up to the rounding of activations."""
    config = GPT2Config(n_vocab=53, n_ctx=16, n_embd=12, n_head=2, n_layer=1)
    model = GPT2Model(config, **options)
    model.set_weights(lively_params(config))
    result = generate(model, [[3, 1]], max_new_tokens=9)
    plain = reference.log_softmax(model(np.array([[3, 1, *result.ids[0]]]))[0])[1:-1]
    assert result.logprobs[0] == pytest.approx(plain[np.arange(9), result.ids[0]], abs=0.1)
    assert result.logprobs[0] == pytest.approx(plain.max(axis=1), abs=0.1)


# ---- ends


def test_rows_that_have_ended_stay_as_they_are(odd_model, odd_config):
    rows = prompts_of(odd_config, [2, 5])
    ids, lengths, sampling, limits = start(odd_model, rows, GREEDY, limit=9)
    limits = limits._replace(lengths=tf.constant([4, 12]))
    network = network_of(odd_model, plain)
    state = grow(prefill(network, ids, lengths), 16)
    state = decode(network, state, sampling, limits, 100)
    assert state.lengths.numpy().tolist() == [4, 12]
    both = start(odd_model, rows, GREEDY, limit=12)
    free = decode(network, grow(prefill(network, *both[:2]), 16), *both[2:4], 100)
    assert texts(state)[0] == texts(free)[0][:4]
    assert texts(state)[1] == texts(free)[1]


def test_no_more_steps_than_asked_for_and_none_when_all_have_ended(odd_model, odd_config):
    arguments = start(odd_model, prompts_of(odd_config, [3]), GREEDY, limit=20)
    network = network_of(odd_model, plain)
    state = grow(prefill(network, *arguments[:2]), 32)
    for n_steps in range(3):
        assert decode(network, state, *arguments[2:4], n_steps).lengths.numpy().tolist() == [3 + n_steps]
    recorder = Recorder(odd_model)
    arguments = start(odd_model, prompts_of(odd_config, [3]), GREEDY, limit=5)
    decode(recorder, grow(prefill(recorder, *arguments[:2]), 16), *arguments[2:4], 1000)
    assert len(recorder.seen) == 2


# ---- a cache that grows


@pytest.mark.parametrize(
    ("length", "limit", "n_ctx", "sizes"),
    [
        (16, 17, 1024, [32]),
        (32, 160, 1024, [256]),
        (16, 256, 1024, [256]),
        (16, 1024, 1024, [256, 1024]),
        (64, 257, 1024, [256, 512]),
        (128, 1024, 1024, [512, 1024]),
        (256, 1024, 1024, [1024]),
        (1024, 1024, 1024, [1024]),
        (16, 8, 1024, [16]),
        (16, 1000, 1000, [256, 1000]),
    ],
)
def test_caches_start_small_and_end_at_the_limit(length, limit, n_ctx, sizes):
    assert list(cache_sizes(length, limit, n_ctx)) == sizes


@pytest.fixture
def small_steps(monkeypatch):
    """Caches of 5, 10, 20 … places."""
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_BUCKET", 5)
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_GROWING", 5)
    monkeypatch.setattr("tf_gpt2.generation.loop.GROWTH", 2)


@pytest.mark.parametrize("options", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_a_growing_cache_changes_nothing(options, odd_model, odd_config, small_steps):
    rows = prompts_of(odd_config, [1, 5, 3])
    arguments = start(odd_model, rows, options, limit=37)
    limits = arguments[3]._replace(lengths=tf.constant([37, 12, 30]))
    sizes, states = [], []
    for state in run(odd_model, *arguments[:3], limits):
        sizes.append(state.n_slots)
        states.append(state)
    assert sizes == [5, 10, 20, 20, 40]  # the longest row ends within 20 places, and others are shorter
    network = network_of(odd_model, plain)
    whole = decode(network, grow(prefill(network, *arguments[:2]), 40), arguments[2], limits, 40)
    assert texts(states[-1]) == texts(whole)
    assert [len(row) for row in texts(whole)] == [37, 12, 30]
    for row, length in enumerate(whole.lengths.numpy()):
        np.testing.assert_allclose(states[-1].logprobs[row, :length], whole.logprobs[row, :length], atol=1e-5)


def test_a_cache_grows_for_the_rows_that_go_on(odd_model, odd_config, small_steps):
    """The longest row stops early; the other fills the small cache before a larger one is made."""
    arguments = start(odd_model, prompts_of(odd_config, [5, 1]), GREEDY, limit=37)
    limits = arguments[3]._replace(lengths=tf.constant([6, 12]))
    states = list(run(odd_model, *arguments[:3], limits))
    assert [state.n_slots for state in states] == [5, 10, 10, 20]
    assert [state.lengths.numpy().tolist() for state in states] == [[5, 1], [6, 7], [6, 11], [6, 12]]


def test_compiling_ahead_leaves_nothing_to_compile(odd_config, odd_params, small_steps):
    model = GPT2Model(odd_config)
    model.set_weights(odd_params)
    arguments = start(model, prompts_of(odd_config, [5, 2]), GREEDY, limit=37)
    compiled_for.cache_clear()
    compile_run(model, *arguments, jit_compile=False)
    assert count_traces(model) == 1 + len([10, 20, 40])
    list(run(model, *arguments))
    assert count_traces(model) == 1 + len([10, 20, 40])


# ---- compilations


@pytest.mark.parametrize(
    ("length", "n_ctx", "size"),
    [(1, 1024, 16), (16, 1024, 16), (17, 1024, 32), (1023, 1024, 1024), (1024, 1024, 1024), (33, 40, 40), (1, 5, 5)],
)
def test_buckets_are_powers_of_two_up_to_the_window(length, n_ctx, size):
    assert bucket(length, n_ctx) == size


def test_there_are_few_buckets():
    assert sorted({bucket(length, 1000) for length in range(1, 1001)}) == [16, 32, 64, 128, 256, 512, 1000]


HEALTH = """
import numpy as np, tensorflow as tf
from tf_gpt2 import GPT2Config, GPT2Model, generate
from tf_gpt2.generation.processors import History
from tf_gpt2.generation.choose import choose
from tf_gpt2.generation.options import check_sampling
from tf_gpt2.model.arithmetic import xla
for n_rows, n_vocab in [(3, 256), (2, 512), (1, 2048)]:
    config = GPT2Config(n_vocab=n_vocab, n_ctx=32, n_embd=1, n_head=1, n_layer=1)
    settings = check_sampling(n_rows, config, temperature=1.0, top_k=7, top_p=0.9, min_p=0.1, typical_p=0.5)
    sampling = settings.spread(n_rows)
    history = History(tf.zeros((n_rows, 33), tf.int32), tf.fill([n_rows], 2), tf.fill([n_rows], 1))
    logits = tf.zeros((n_rows, n_vocab))
    ids = tf.function(lambda *a: choose(*a, ops=xla), jit_compile=True)(logits, sampling, history, tf.constant([3, -1]))
    assert ids.shape == n_rows
model = GPT2Model(GPT2Config(n_vocab=1024, n_ctx=64, n_embd=64, n_head=1, n_layer=1))
assert len(generate(model, [[0]], max_new_tokens=12, temperature=0.8, top_p=0.9).ids[0]) == 12
print("well")
"""


def test_powers_of_two_compile(run_python):
    """The compiler once took minutes over 1,024 tokens: in a process of its own, that can be stopped."""
    assert run_python(HEALTH, timeout=240) == "well\n"
