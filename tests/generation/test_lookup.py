"""Prompt look-up: the same as plain decoding in fewer passes, drafts against a search in Python, and what it refuses.

The models here draw little from positions, so that their texts repeat themselves: the texts must do so for a test to
say anything, and each test sees to it.
"""

import re

import numpy as np
import pytest
import reference
import tensorflow as tf
from asking import make_limits, make_sampling
from counting import count_traces
from hypothesis import given, settings, strategies as st
from reference import lively_params

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.config import GPT2Config
from tf_gpt2.generation import lookup
from tf_gpt2.generation.compiled import compiled, compiled_for
from tf_gpt2.generation.generate import generate, stream
from tf_gpt2.generation.lookup import LookupRun, decode, decode_until_drafts_pay, find_drafts
from tf_gpt2.generation.loop import grow, prefill
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.formulas import KeyValues
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import network_of
from tf_gpt2.runtime import kernels
from tf_gpt2.text.generator import TextGenerator

CONFIG = GPT2Config(n_vocab=23, n_ctx=72, n_embd=12, n_head=3, n_layer=1)
PROMPTS = [[3, 1, 4, 1, 5], [2], [9, 2, 6] * 5]


def repetitive_params(seed=0, config=CONFIG):
    params = lively_params(config, seed=seed)
    params["wpe"] *= 0.02
    return params


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Uses look-up for the small models here too, and one bucket for all, so that the tests share what was compiled."""
    monkeypatch.setattr(lookup, "SMALLEST", 0)
    monkeypatch.setattr("tf_gpt2.generation.loop.SMALLEST_BUCKET", CONFIG.n_ctx)


@pytest.fixture(scope="module")
def model():
    model = GPT2Model(CONFIG)
    model.set_weights(repetitive_params())
    return model


@pytest.fixture
def runs(monkeypatch):
    """The runs that were made, to ask them for their passes."""
    made = []
    start = LookupRun.__init__

    def remember(self, *arguments, **options):
        start(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(LookupRun, "__init__", remember)
    return made


@pytest.fixture(scope="class")
def eager_to_check():
    """Checks each draft, however unlikely; what is compiled so is used by all tests of a class, and by no others."""

    def is_found(now, limits):
        return tf.reduce_any(lookup.is_active(now.state, limits) & now.is_found)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lookup, "drafts_pay", is_found)
        monkeypatch.setattr(lookup, "drafts_pay_with_twins", is_found)
        compiled_for.cache_clear()
        yield
    compiled_for.cache_clear()


def assert_same(found, wanted):
    assert found.ids == wanted.ids
    assert found.finish_reasons == wanted.finish_reasons
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# ---- the several-token pass


@pytest.mark.parametrize("policy", [{}, {"quantization": "int8"}])
@pytest.mark.parametrize("n_fed", [1, 2, 5])
def test_several_tokens_at_once_are_a_plain_forward_pass(policy, n_fed):
    config = GPT2Config(n_vocab=37, n_ctx=18, n_embd=10, n_head=5, n_layer=3)
    model = GPT2Model(config, **policy)
    model.set_weights(lively_params(config))
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(0, 37, (3, 16)).astype(np.int32), np.array([1, 4, 8], np.int32)
    network = network_of(model, plain)
    state = grow(prefill(network, tf.constant(rows[:, :8]), tf.constant(lengths)), 18)
    # what is left at later positions, as from drafts that were wrong, must not be seen
    is_known = np.arange(18)[:, None] < np.repeat(lengths, 5)[:, None, None]
    cache = tf.nest.map_structure(lambda part: tf.where(is_known, part, 1e3), state.cache)
    for _ in range(2):
        positions = lengths[:, None] + np.arange(n_fed, dtype=np.int32)
        ids = np.take_along_axis(rows, positions, axis=1)
        hidden, cache = network.hidden_states(tf.constant(ids), tf.constant(positions), cache)
        for row, length in enumerate(lengths):
            wanted = reference.forward(model.get_params(), rows[row, : length + n_fed], n_head=5)[length:]
            np.testing.assert_allclose(network.logits(hidden)[row], wanted, atol=1e-5 * np.abs(wanted).max())
        lengths = lengths + n_fed
        if lengths.max() + n_fed > 16:
            break


# ---- drafts


def draft_in_python(ids):
    """The longest match of up to three tokens, of equals the latest; what followed, again and again."""
    for size in (3, 2):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                return [ids[end:][i % (len(ids) - end)] for i in range(lookup.N_DRAFTED)]
    return None


IDS = st.integers(0, 2)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=2, max_size=2), rest=st.integers(0, 2)
)
def test_drafts_are_those_of_a_plain_search(rows, rest):
    config = GPT2Config(n_vocab=3, n_ctx=24, n_embd=1, n_head=1, n_layer=1)
    ids = np.full((2, 25), rest, np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    state = blank_state(config, ids, [len(row) for row in rows])
    drafts, is_found = find_drafts(state)
    for row, draft, found in zip(rows, drafts.numpy().tolist(), is_found.numpy(), strict=True):
        wanted = draft_in_python(row)
        assert found == (wanted is not None)
        assert not found or draft == wanted


def blank_state(config, ids, lengths):
    from tf_gpt2.generation.loop import State

    lengths = tf.constant(lengths, tf.int32)
    part = tf.zeros((config.n_head * len(ids), ids.shape[1] - 1, 1))
    no_top = tf.zeros((*ids.shape, 0))
    return State(
        ids=tf.constant(ids),
        lengths=lengths,
        prompt_lengths=lengths,
        logprobs=tf.zeros(ids.shape),
        top_ids=tf.cast(no_top, tf.int32),
        top_logprobs=no_top,
        stopped=tf.zeros(len(ids), tf.bool),
        cache=(KeyValues(part, part),),
    )


# ---- the same ids, logprobs and ends


OPTIONS = {
    "greedy": {},
    "stop": {"stop_ids": [11, 7, 18]},
    "drawn": {"temperature": [0.4, 0.0, 1.0], "seed": [1, 2, 3], "top_p": 0.95},
    "filters": {"temperature": 0.5, "top_k": [3, 0, 5], "min_p": 0.05, "typical_p": 0.9, "seed": 5},
    "processed": {
        "repetition_penalty": [1.02, 1.0, 1.1],
        "presence_penalty": 0.01,
        "frequency_penalty": [0.0, 0.02, 0.0],
        "no_repeat_ngram_size": [9, 0, 6],
        "min_new_tokens": [0, 20, 5],
        "bad_words_ids": [[4, 4, 4, 4], [1, 2]],
        "logit_bias": {3: 0.5},
        "suppress": [8],
        "stop_ids": [11],
    },
}


@pytest.mark.usefixtures("eager_to_check")
class TestWhereEachDraftIsChecked:
    """Most drafts are rejected, and all rows accept another number of tokens."""

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("jit_compile", [False, True], ids=["plain graph", "xla"])
    def test_look_up_changes_nothing(self, options, jit_compile, model, runs):
        for max_new_tokens in (1, 57, 100):
            arguments = {"max_new_tokens": max_new_tokens, "jit_compile": jit_compile, **options}
            wanted = generate(model, PROMPTS, **arguments)
            assert_same(generate(model, PROMPTS, prompt_lookup=True, **arguments), wanted)
        if options == {}:
            assert runs[-1].n_passes < 60
            assert set(wanted.finish_reasons) == {"context"}


@pytest.mark.parametrize("seed", range(6))
def test_other_weights_other_rows(seed, runs):
    rng = np.random.default_rng(seed)
    model = GPT2Model(CONFIG)
    model.set_weights(repetitive_params(seed))
    prompts = [rng.integers(0, 23, rng.integers(1, 30)).tolist() for _ in range(1 + seed % 2 * 2)]
    options = {"max_new_tokens": int(rng.integers(30, 60)), "stop_ids": [int(rng.integers(23))], "jit_compile": False}
    wanted = generate(model, prompts, **options)
    assert_same(generate(model, prompts, prompt_lookup=True, **options), wanted)


def test_a_text_that_repeats_itself_needs_few_passes(model, runs):
    prompts = [[9, 2, 6] * 2]
    wanted = generate(model, prompts, max_new_tokens=66)
    assert len(set(wanted.ids[0][20:])) < 8
    assert_same(generate(model, prompts, max_new_tokens=66, prompt_lookup=True), wanted)
    assert runs[-1].n_passes < 33


def test_drafts_that_fail_are_given_up(model, runs):
    """Drawn at random, nothing is foreseen; then all passes are plain, and weights are not copied."""
    options = {"max_new_tokens": 39, "temperature": 5.0, "jit_compile": False}
    found = generate(model, [[1]], prompt_lookup=True, **options)
    assert_same(found, generate(model, [[1]], **options))
    assert runs[-1].n_passes == 39
    assert not runs[-1]._checks


def test_a_batch_waits_for_its_slowest_row(model, runs):
    """One row repeats itself; checking its drafts would hold up the other, until that one ends."""
    options = {"temperature": [0.0, 9.0], "jit_compile": False}
    generate(model, [[3, 1, 4, 1, 5]] * 2, max_new_tokens=40, prompt_lookup=True, **options)
    assert runs[-1].n_passes == 40


def test_a_growing_cache_changes_nothing(model, monkeypatch):
    for name, value in {"SMALLEST_BUCKET": 20, "SMALLEST_GROWING": 20, "GROWTH": 2}.items():
        monkeypatch.setattr(f"tf_gpt2.generation.loop.{name}", value)
    options = {"max_new_tokens": 66, "jit_compile": False}
    wanted = generate(model, PROMPTS[:2], **options)
    assert_same(generate(model, PROMPTS[:2], prompt_lookup=True, **options), wanted)


def test_pieces_and_rows_that_are_complete_are_the_same(model, runs):
    options = {"max_new_tokens": 60, "jit_compile": False}
    wanted = generate(model, PROMPTS[:1], **options).ids[0]
    pieces = list(stream(model, PROMPTS[0], prompt_lookup=True, **options))
    assert [i for piece in pieces for i in piece] == wanted
    assert runs[-1].n_passes < 40
    found = generate(model, PROMPTS[:1], is_complete=lambda ids: len(ids) >= 20, prompt_lookup=True, **options)
    assert found.ids[0] == wanted[: len(found.ids[0])]
    assert len(found.ids[0]) >= 20
    assert found.finish_reasons == ["stop"]


def test_with_trained_weights_the_texts_are_equal_or_part_at_a_tie(runs):
    generator = TextGenerator.from_checkpoint(embedded_dir())
    prompts = ["To be, or not to be", "O, O, O, O, O"]
    model, params = generator.model, generator.model.get_params()
    for prompt in prompts:
        plain = generator.complete(prompt, max_new_tokens=150)
        found = generator.complete(prompt, max_new_tokens=150, prompt_lookup=True)
        if found.ids != plain.ids:
            same = next(i for i, (a, b) in enumerate(zip(found.ids, plain.ids, strict=False)) if a != b)
            before = generator.encode_prompt(prompt) + plain.ids[:same]
            logits = reference.forward(params, before, n_head=model.config.n_head)[-1]
            assert abs(logits[found.ids[same]] - logits[plain.ids[same]]) < 1e-4
        else:
            np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
        assert runs[-1].n_passes < 140


# ---- what is compiled


def test_new_weights_count_at_once(runs):
    """All tests here meet one shape of one row under XLA, and two models compile no more than that."""
    model = GPT2Model(CONFIG)
    for seed in (3, 4):
        model.set_weights(repetitive_params(seed))
        wanted = generate(model, PROMPTS[:1], max_new_tokens=60)
        assert_same(generate(model, PROMPTS[:1], max_new_tokens=60, prompt_lookup=True), wanted)
    assert count_traces(model, decode, decode_until_drafts_pay, jit_compile=True) <= 3


def test_the_loops_copy_neither_cache_nor_weight():
    config = GPT2Config(n_vocab=200, n_ctx=72, n_embd=64, n_head=2, n_layer=2)
    model = GPT2Model(config)
    sampling, limits = make_sampling(1, config), make_limits([np.ones(4)], 36, (), config)
    ids, lengths = tf.ones((1, 16), tf.int32), tf.fill([1], 4)
    state = grow(compiled(prefill, model, jit_compile=False)(ids, lengths), 48)
    check = compiled(decode, model, jit_compile=True, n_rows=4)
    arguments = *check.args, lookup.start(state), sampling, limits, tf.constant(9)
    text = check.func.function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    blocks = re.findall(r"^(?:ENTRY )?%[\w.-]+ \(.*?^}", text, re.S | re.M)
    loops = [block for block in blocks if not block.startswith("ENTRY")]
    updates = [line for block in loops for line in block.splitlines() if re.search(r"f32\[2,48,32\]\S* fusion", line)]
    assert len(updates) >= 2 * 2 * config.n_layer  # keys and values, in each kind of pass
    assert not re.findall(r"f32\[2,48,32\]\S* copy\(", "\n".join(loops))
    assert not re.findall(r"f32\[\d+,\d+\]\S* transpose\(", text)


# ---- what is refused


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "bfloat16"}, {"dtype": "mixed_bfloat16"}])
@pytest.mark.parametrize("function", [lambda *a, **k: generate(a[0], [a[1]], **k), stream])
def test_what_it_is_not_for_is_refused(options, function, monkeypatch):
    monkeypatch.setenv(kernels.ENV_VAR, "xla")
    with pytest.raises(ValueError, match=r"^prompt_lookup must be False .* float32"):
        function(GPT2Model(CONFIG, **options), [1], prompt_lookup=True)


@pytest.mark.skipif(not kernels.are_chosen(), reason="there are no native kernels")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_integers_are_for_it_where_kernels_compute(quantization, runs):
    """A pass over several tokens reads each weight once there."""
    model = GPT2Model(CONFIG, quantization=quantization)
    model.set_weights(repetitive_params())
    found, wanted = (generate(model, [[9, 2, 6] * 3], max_new_tokens=60, prompt_lookup=on) for on in (True, False))
    assert_same(found, wanted)
    assert runs[0].n_passes < 50
    with pytest.raises(ValueError, match="where XLA and native kernels compute"):
        generate(model, PROMPTS, prompt_lookup=True, jit_compile=False)


def test_a_small_model_does_without(model, runs, monkeypatch):
    options = {"max_new_tokens": 30, "jit_compile": False}
    for smallest, n_runs in ((CONFIG.n_params + 1, 0), (CONFIG.n_params, 1)):
        monkeypatch.setattr(lookup, "SMALLEST", smallest)
        found = generate(model, PROMPTS, prompt_lookup=True, **options)
        assert found.ids == generate(model, PROMPTS, **options).ids
        assert len(runs) == n_runs
