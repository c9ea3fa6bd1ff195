"""Choosing the next id: the filters against sorting, the frequencies against the exact probabilities."""

import numpy as np
import pytest
import tensorflow as tf
from asking import make_sampling
from hypothesis import given, settings, strategies as st
from reference import kept_by_min_p, kept_by_top_k, kept_by_top_p, kept_by_typical_p, softmax

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.choose import choose, filter_logits
from tf_gpt2.generation.processors import EXCLUDED, History
from tf_gpt2.model.arithmetic import graph, plain, xla

NEVER = float(EXCLUDED)
# few different values, so that there are many ties
TIED = st.sampled_from([NEVER, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0])
# processors may take subnormal numbers for 0
ANY = st.floats(-50, 50, width=32, allow_subnormal=False)
ROWS = st.lists(TIED, min_size=1, max_size=12) | st.lists(ANY, min_size=1, max_size=12)
FINITE = ROWS.filter(lambda row: max(row) > NEVER)
COMPARED = settings(deadline=None, max_examples=150)


def settings_of(n_rows, *, seeds=None, n_vocab=1, **options):
    config = GPT2Config(n_vocab=n_vocab, n_ctx=1, n_embd=1, n_head=1, n_layer=1)  # a bias of 1 fits any vocabulary
    seeds = list(range(n_rows)) if seeds is None else seeds
    return make_sampling(n_rows, config, **{"temperature": 1.0, "seed": seeds, **options})


def choose_at(logits, sampling, positions, ops=xla):
    """Chooses the tokens for these places, whatever was said before."""
    ids = tf.zeros((logits.shape[0], 1), tf.int32)
    return choose(logits, sampling, History(ids, positions, positions), tf.constant([-1]), ops=ops)


def batch(row, n_rows=1):
    return tf.constant([row] * n_rows, tf.float32)


def bisected(logits, sampling):
    """Filters as XLA does, but eagerly."""
    return filter_logits(logits, sampling, xla)


@tf.function(autograph=False)
def traced(logits, sampling):
    return filter_logits(logits, sampling, graph)


compiled = tf.function(bisected, autograph=False, jit_compile=True)


def padded(logits):
    """Short rows as long as the longest, so that they have one graph."""
    impossible = tf.fill((len(logits), max(12 - logits.shape[-1], 0)), NEVER)
    return tf.concat([logits, impossible], axis=-1)


def keep_in_graph(logits, sampling):
    """Filters as outside of XLA, by sorting."""
    return traced(padded(logits), sampling)[:, : logits.shape[-1]]


def keep_in_xla(logits, sampling):
    """Filters as XLA does: on many rows much sooner than eagerly."""
    return compiled(padded(logits), sampling)[:, : logits.shape[-1]]


EVERYWHERE = pytest.mark.parametrize("keep", [bisected, keep_in_graph], ids=["eager", "plain graph"])
COMPILED = pytest.mark.parametrize("keep", [keep_in_xla, keep_in_graph], ids=["xla", "plain graph"])


def left(filtered, row):
    """Ids that a filter left; what it left must be unchanged, what it took excluded."""
    filtered, row = np.asarray(filtered), np.asarray(row, np.float32)
    kept = filtered > NEVER
    np.testing.assert_array_equal(filtered[kept], row[kept])
    return np.flatnonzero(kept).tolist()


choose_in_xla = tf.function(choose_at, autograph=False, jit_compile=True)


def drawn(row, n_draws=20_000, **options):
    sampling = settings_of(n_draws, n_vocab=len(row), **options)
    return choose_in_xla(batch(row, n_draws), sampling, tf.fill([n_draws], 7)).numpy()


# ---- top-k


@COMPILED
@COMPARED
@given(FINITE, st.integers(0, 14))
def test_top_k_keeps_what_sorting_keeps(keep, row, k):
    possible = [i for i in kept_by_top_k(row, k) if row[i] > NEVER]
    assert left(keep(batch(row), settings_of(1, top_k=k))[0], row) == possible


@EVERYWHERE
@pytest.mark.parametrize(
    ("row", "k", "kept"),
    [
        ([1, 1, 1, 1], 2, [0, 1]),
        ([0, 1, 1, 2], 2, [1, 3]),
        ([0, 1, 1, 2], 3, [1, 2, 3]),
        ([5, 4, 3], 1, [0]),
        ([5, 4, 3], 3, [0, 1, 2]),
        ([5, 4, 3], 1000, [0, 1, 2]),
        ([5, 4, 3], 2**31 - 1, [0, 1, 2]),
        ([5, 4, 3], 0, [0, 1, 2]),
        ([-1e38, -2e38, 3e38], 2, [0, 2]),
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([NEVER, 2, NEVER, 1], 3, [1, 3]),
        ([7], 1, [0]),
    ],
)
def test_top_k_on_known_rows(keep, row, k, kept):
    assert left(keep(batch(row), settings_of(1, top_k=k))[0], row) == kept


# ---- top-p


@COMPILED
@COMPARED
@given(FINITE, st.integers(1, 1000).map(lambda n: n / 1000))
def test_top_p_keeps_what_sorting_keeps(keep, row, p):
    found = left(keep(batch(row), settings_of(1, top_p=p))[0], row)
    # where float32 cannot tell on which side of p a mass is, both answers are right
    right = [kept_by_top_p(row, q) if p < 1 else kept_by_top_p(row, 1) for q in (p, p - 1e-6, p + 1e-6)]
    assert found in [[i for i in kept if row[i] > NEVER] for kept in right]


@EVERYWHERE
@pytest.mark.parametrize(
    ("probabilities", "p", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5, [0]),
        ([0.5, 0.25, 0.125, 0.125], 0.5000001, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.75, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.8, [0, 1, 2]),
        ([0.125, 0.5, 0.125, 0.25], 0.8, [0, 1, 3]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [0, 1]),
        ([0.25, 0.25, 0.25, 0.25], 0.51, [0, 1, 2]),
        ([0.25, 0.25, 0.25, 0.25], 1.0, [0, 1, 2, 3]),
        ([0.1, 0.9], 1e-6, [1]),
        ([0.1, 0.9], 1e-38, [1]),
        ([0.1, 0.9], 1e-44, [1]),
        ([0.1, 0.9], 0.99999994, [0, 1]),
        ([0.0, 0.5, 0.5], 0.9, [1, 2]),
        ([1.0], 0.3, [0]),
    ],
)
def test_top_p_on_known_rows(keep, probabilities, p, kept):
    with np.errstate(divide="ignore"):
        row = np.log(np.float32(probabilities))
    assert left(keep(batch(row), settings_of(1, top_p=p))[0], row) == kept


@EVERYWHERE
def test_top_p_is_exact_on_a_large_vocabulary(keep):
    row = np.random.default_rng(0).normal(size=50257).astype(np.float32) * 3
    for p in (0.1, 0.5, 0.9, 0.99):
        n_wrong = set(left(keep(batch(row), settings_of(1, top_p=p))[0], row)) ^ set(kept_by_top_p(row, np.float32(p)))
        assert len(n_wrong) <= 1 + 1e-3 * len(kept_by_top_p(row, p))


# ---- min-p


@COMPILED
@COMPARED
@given(FINITE, st.integers(0, 1000).map(lambda n: n / 1000))
def test_min_p_keeps_what_is_likely_enough(keep, row, p):
    found = left(keep(batch(row), settings_of(1, min_p=p))[0], row)
    right = [kept_by_min_p(row, q) for q in (p, max(p - 1e-6, 0), min(p + 1e-6, 1))]
    assert found in [[i for i in kept if row[i] > NEVER] for kept in right]


@EVERYWHERE
@pytest.mark.parametrize(
    ("row", "p", "kept"),
    [
        ([0, 1, 3, 3], 1.0, [2, 3]),
        ([0, 1, 3, 3], 0.1353, [1, 2, 3]),
        ([0, 1, 3, 3], 0.1354, [2, 3]),
        ([0, 1, 3, 3], 0.0, [0, 1, 2, 3]),
        ([-50, 1, 3, 3], 1e-44, [0, 1, 2, 3]),
        ([NEVER, 1, NEVER], 1e-9, [1]),
        ([5], 1.0, [0]),
    ],
)
def test_min_p_on_known_rows(keep, row, p, kept):
    assert left(keep(batch(row), settings_of(1, min_p=p))[0], row) == kept


@pytest.mark.parametrize("keep", [bisected, keep_in_graph, compiled], ids=["eager", "plain graph", "xla"])
@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"top_p": 0.999}, {"typical_p": 0.9999}], ids=str)
@pytest.mark.parametrize("shift", [0, 1e6, -1e6, 1e5])
def test_min_p_compares_what_differs_of_large_logits(keep, others, shift):
    """e to the -3 is 0.0498, and beside 1e6 the logarithm of 0.05 is rounded to it."""
    row = np.float32([shift, shift - 3, shift - 2.9375, shift - 50])
    for p, kept in ((0.05, [0, 2]), (0.0497, [0, 1, 2]), (0.054, [0])):
        assert left(keep(batch(row), settings_of(1, min_p=p, **others))[0], row) == kept


def test_what_min_p_drops_of_large_logits_is_never_drawn():
    assert set(drawn([0.0] * 3, 2000, logit_bias={0: 1e6, 1: 999_997.0, 2: -1e6}, min_p=0.05)) == {0}


# ---- typical-p


@COMPILED
@COMPARED
@given(FINITE, st.integers(1, 1000).map(lambda n: n / 1000))
def test_typical_p_keeps_what_sorting_keeps(keep, row, p):
    row = [round(x * 64) / 64 if np.isfinite(x) else x for x in row]  # equal, or further apart than rounding errors
    found = left(keep(batch(row), settings_of(1, typical_p=p))[0], row)
    right = [kept_by_typical_p(row, q) if p < 1 else range(len(row)) for q in (p, p - 1e-5, p + 1e-5)]
    assert found in [[i for i in kept if row[i] > NEVER] for kept in right]


# the entropy of the first is 1.21 nats, the information of its tokens 0.69, 1.39, 2.08, 2.08
@EVERYWHERE
@pytest.mark.parametrize(
    ("probabilities", "p", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.01, [1]),
        ([0.5, 0.25, 0.125, 0.125], 1e-44, [1]),
        ([0.5, 0.25, 0.125, 0.125], 0.25, [1]),
        ([0.5, 0.25, 0.125, 0.125], 0.26, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.75, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.76, [0, 1, 2, 3]),
        ([0.25, 0.25, 0.25, 0.25], 0.01, [0, 1, 2, 3]),
        ([0.0, 0.5, 0.5], 0.1, [1, 2]),
        ([0.0, 1.0], 0.99, [1]),
        ([0.9, 0.1], 0.5, [0]),
        ([1.0], 0.3, [0]),
    ],
)
def test_typical_p_on_known_rows(keep, probabilities, p, kept):
    with np.errstate(divide="ignore"):
        row = np.log(np.float32(probabilities))
    assert left(keep(batch(row), settings_of(1, typical_p=p))[0], row) == kept


@EVERYWHERE
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_typical_p_is_exact_on_a_large_vocabulary(keep, p):
    row = np.random.default_rng(0).normal(size=50257).astype(np.float32) * 3
    wanted = kept_by_typical_p(row, p)
    found = left(keep(batch(row), settings_of(1, typical_p=p))[0], row)
    assert len(set(found) ^ set(wanted)) <= 1 + 1e-3 * len(wanted)


@pytest.mark.parametrize("offset", [0.0, -100.0])
@pytest.mark.parametrize("temperature", [1.0, 100.0, 1000.0, 1e4])
def test_the_most_typical_at_any_temperature(temperature, offset):
    """The rows differ by millionths at the highest: the order of a sum must not decide."""
    logits = tf.constant(np.random.default_rng(0).normal(size=(60, 20_000)) * 3 + offset, tf.float32)
    options = settings_of(60, temperature=temperature, typical_p=1e-6)
    scaled = logits.numpy().astype(np.float64) / temperature
    probs = softmax(scaled)
    distances = np.abs(scaled - (probs * scaled).sum(axis=1, keepdims=True))
    for keep in (traced, compiled):
        kept = keep(logits, options).numpy() > NEVER
        assert kept[np.arange(60), distances.argmin(axis=1)].all()
        assert kept.sum() <= 63  # now and then two are equally near


@EVERYWHERE
@pytest.mark.parametrize("temperature", [1e3, 1e6])
def test_all_that_are_equally_typical_stay_at_a_high_temperature(keep, temperature):
    row = np.float32([5, 1, 1, -7, 5])  # nearly equal probabilities, and so a mean of 1
    kept = keep(batch(row), settings_of(1, temperature=temperature, typical_p=0.01))[0].numpy() > NEVER
    assert np.flatnonzero(kept).tolist() == [1, 2]


# ---- together


@EVERYWHERE
def test_each_filter_sees_what_the_one_before_left(keep):
    row = np.log(np.float32([0.4, 0.25, 0.2, 0.1, 0.05])) * 2  # at temperature 2 these are the probabilities
    options = {"temperature": 2.0, "top_k": 4, "top_p": 0.95, "min_p": 0.45, "typical_p": 0.7}
    wanted = np.arange(5)
    for kept_by, value in (
        (kept_by_top_k, 4), (kept_by_top_p, 0.95), (kept_by_min_p, 0.45), (kept_by_typical_p, 0.7)
    ):  # fmt: skip
        wanted = wanted[kept_by(row[wanted] / 2, value)]
    filtered = keep(batch(row), settings_of(1, **options))[0].numpy()
    assert np.flatnonzero(filtered > NEVER).tolist() == wanted.tolist()


@EVERYWHERE
def test_min_p_comes_after_top_p(keep):
    row = np.log([0.4, 0.25, 0.2, 0.1, 0.05])  # the other way round, the first two of the first three would reach 0.7
    filtered = keep(batch(row), settings_of(1, top_p=0.7, min_p=0.3))[0].numpy()
    assert np.flatnonzero(filtered > NEVER).tolist() == [0, 1, 2]


@EVERYWHERE
@pytest.mark.parametrize("options", [{"top_k": [0, 1]}, {"top_p": [1, 0.5]}, {"typical_p": [1, 0.5]}], ids=str)
def test_a_row_without_a_filter_keeps_all_beside_one_with(keep, options):
    row = [0.0, -40.0, -60.0]  # in float32 the first has all the mass
    filtered = keep(batch(row, 2), settings_of(2, **options)).numpy()
    assert filtered[0].tolist() == row
    assert filtered[1].tolist() == [0.0, NEVER, NEVER]


@COMPILED
@COMPARED
@given(
    st.lists(ANY, min_size=2, max_size=12, unique=True),
    st.sampled_from([0, 1, 3, 5]),
    st.sampled_from([0.3, 0.8, 1.0]),
    st.sampled_from([0.0, 0.01, 0.4]),
    st.sampled_from([0.2, 0.6, 1.0]),
)
def test_filters_in_a_row_keep_what_sorting_keeps(keep, row, top_k, top_p, min_p, typical_p):
    # apart by more than rounding errors, so that no two are as typical
    row = list(dict.fromkeys(round(x * 64) / 64 for x in row))
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    found = left(keep(batch(row), settings_of(1, **options))[0], row)
    right = []
    for shift in (0, -1e-5, 1e-5):  # where float32 cannot tell on which side of p a mass is, both answers are right
        kept = np.array(kept_by_top_k(row, top_k))
        kept = kept[kept_by_top_p(np.array(row)[kept], top_p + shift if top_p < 1 else 1)]
        kept = kept[kept_by_min_p(np.array(row)[kept], max(min_p + shift, 0))]
        if typical_p < 1:
            kept = kept[kept_by_typical_p(np.array(row)[kept], typical_p + shift)]
        right.append(kept.tolist())
    assert found in right


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0], ids=["flat", "usual", "sharp"])
@pytest.mark.parametrize("step", [1e-4, 0.5], ids=["few ties", "many ties"])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 300])
def test_sorting_a_part_keeps_what_bisection_keeps(top_k, top_p, step, scale):
    """Outside of XLA no more is sorted than may remain, which in a row of few tokens is all."""
    n_rows, n_vocab = 24, 1000
    row = np.random.default_rng(0).normal(size=(n_rows, n_vocab)) * scale
    logits = tf.constant(np.round(row / step) * step, tf.float32)
    settings = settings_of(n_rows, top_k=top_k, top_p=top_p, min_p=[0.0, 0.02, 0.7] * 8)
    wanted, found = compiled(logits, settings).numpy(), traced(logits, settings).numpy()
    differing = np.argwhere(wanted != found)
    probs = softmax(np.where(np.maximum(wanted, found) > NEVER, logits, NEVER))
    # where float32 cannot tell on which side of p a mass is, both answers are right; such a token is the last one
    assert len({row for row, _ in differing}) == len(differing) <= 2
    assert all(probs[row, i] <= probs[row][probs[row] > 0].min() for row, i in differing)


def test_what_a_row_keeps_does_not_depend_on_its_neighbours():
    """How much is sorted does, so nothing else may."""
    logits = tf.constant(np.random.default_rng(1).normal(size=(40, 1000)) * 3, tf.float32)
    options = {"top_k": [0, 50, 7, 300], "top_p": [0.9, 0.95, 1.0, 0.3], "min_p": [0.0, 0.01, 0.1, 0.0]}
    together = settings_of(40, **{name: values * 10 for name, values in options.items()})
    kept = traced(logits, together).numpy()
    for i in range(40):
        alone = settings_of(1, **{name: values[i % 4] for name, values in options.items()})
        np.testing.assert_array_equal(traced(logits[i : i + 1], alone)[0], kept[i])


@EVERYWHERE
def test_top_p_counts_the_mass_that_temperature_and_top_k_left(keep):
    row = np.log([0.4, 0.3, 0.2, 0.1])
    # of the first three 0.4 is 4/9 and 0.7 is 7/9
    for p, kept in ((0.44, [0]), (0.45, [0, 1]), (0.77, [0, 1]), (0.78, [0, 1, 2])):
        filtered = keep(batch(row), settings_of(1, top_k=3, top_p=p))[0]
        assert np.flatnonzero(filtered.numpy() > NEVER).tolist() == kept
    # at temperature 1/2 the probabilities are as 16, 9, 4, 1
    for p, kept in ((0.53, [0]), (0.54, [0, 1]), (0.83, [0, 1]), (0.84, [0, 1, 2])):
        filtered = keep(batch(row), settings_of(1, temperature=0.5, top_p=p))[0]
        assert np.flatnonzero(filtered.numpy() > NEVER).tolist() == kept


@EVERYWHERE
def test_each_row_has_its_own_settings(keep):
    row = [0.0, 3.0, 2.0, 1.0]
    options = {"temperature": [0, 1, 1, 2], "top_k": [0, 1, 3, 0], "top_p": [1, 1, 0.5, 1]}
    together = keep(batch(row, 4), settings_of(4, **options)).numpy()
    for i in range(4):
        alone = settings_of(1, **{name: values[i] for name, values in options.items()})
        np.testing.assert_allclose(together[i], keep(batch(row), alone)[0], rtol=1e-6)


def test_plain_and_compiled_choose_as_eager_does():
    logits = tf.constant(np.random.default_rng(0).normal(size=(6, 97)) * 4, tf.float32)
    options = settings_of(6, temperature=[0, 1, 0.5, 2, 1, 1], top_k=[0, 0, 10, 5, 0, 1], top_p=[1, 1, 1, 0.9, 0.3, 1])
    options = options._replace(
        min_p=tf.constant([0, 0.01, 0, 0, 0, 0.5]), typical_p=tf.constant([1, 1, 0.7, 0.5, 1, 1])
    )
    for compiled in (False, True):
        function = tf.function(choose_at, jit_compile=compiled)
        for position in range(10):
            positions = tf.fill([6], position)
            np.testing.assert_array_equal(
                function(logits, options, positions), choose_at(logits, options, positions).numpy()
            )


# ---- greedy


@pytest.mark.parametrize("temperature", [0.0, 1e-44, 1e-40, 1e-38, 1e-37, 1e-30, 1e-6])
@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_temperatures_down_to_zero_take_the_likeliest(shift, temperature):
    assert drawn(shift + np.array([0.0, 5.0, 9.0, 2.0]), 50, temperature=temperature).tolist() == [2] * 50


OPS = {"plain": plain, "xla": xla, "graph": graph}


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_of_equals_the_lowest_id_is_taken(ops):
    rows = tf.constant([[1, 3, 3, 3], [2, 2, 2, 2], [NEVER, NEVER, 0, 0], [-0.0, 0.0, 0.0, -0.0]], tf.float32)
    chosen = choose_at(rows, settings_of(4, temperature=0), tf.zeros(4, tf.int32), ops)
    assert chosen.numpy().tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("n_rows", [1, 3, 64])
def test_of_equals_in_many_the_lowest_id_is_taken(ops, n_rows):
    rng = np.random.default_rng(n_rows)
    rows = rng.integers(0, 50, (n_rows, 50257)).astype(np.float32)
    np.testing.assert_array_equal(ops.first_largest(tf.constant(rows)), rows.argmax(axis=1))


def test_greedy_rows_among_random_ones_ignore_the_filters():
    row = [0.0, 9.0, 8.0]
    options = {"temperature": [0, 1] * 50, "top_k": 2, "top_p": 0.9999}
    chosen = choose_at(batch(row, 100), settings_of(100, **options), tf.zeros(100, tf.int32)).numpy()
    assert set(chosen[::2]) == {1}
    assert set(chosen[1::2]) == {1, 2}


# ---- frequencies


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 0.5]),
        ({"temperature": 0.5}, [1, 4, 9, 16, 25, 36, 0.25]),
        ({"temperature": 2.0}, np.sqrt([1, 2, 3, 4, 5, 6, 0.5])),
        ({"top_k": 3}, [0, 0, 0, 4, 5, 6, 0]),
        ({"top_p": 0.65}, [0, 0, 0, 4, 5, 6, 0]),
        ({"temperature": 1e30}, np.ones(7)),
        ({"min_p": 0.5}, [0, 0, 3, 4, 5, 6, 0]),
        ({"min_p": 0.1, "top_k": 6, "temperature": 0.5}, [0, 4, 9, 16, 25, 36, 0]),
        ({"typical_p": 0.4}, [0, 0, 3, 4, 5, 0, 0]),
        ({"suppress": [5], "logit_bias": {0: np.log(3), 6: np.log(2)}}, [3, 2, 3, 4, 5, 0, 1]),
    ],
)
def test_frequencies_are_the_probabilities(options, weights):
    row, probabilities = np.log([1, 2, 3, 4, 5, 6, 0.5]), np.array(weights) / np.sum(weights)
    for draws in (
        drawn(row, **options),
        drawn(row, seeds=[2**32 - 1 - i for i in range(20_000)], **options),
    ):
        counts, expected = np.bincount(draws, minlength=7), 20_000 * probabilities
        assert not counts[expected == 0].any()
        possible = expected > 0
        # chi-square with at most 6 degrees of freedom: one in a million exceeds 39
        assert np.sum((counts - expected)[possible] ** 2 / expected[possible]) < 39


def test_frequencies_over_positions_of_one_seed():
    row = np.log([1, 2, 3, 4])
    draws = choose_at(batch(row, 20_000), settings_of(20_000, seeds=[3] * 20_000), tf.range(20_000)).numpy()
    expected = 20_000 * softmax(row)
    assert np.sum((np.bincount(draws, minlength=4) - expected) ** 2 / expected) < 31
    # successive draws are independent: the frequency of each pair is the product
    pairs = np.bincount(4 * draws[:-1] + draws[1:], minlength=16)
    expected = 20_000 * np.outer(softmax(row), softmax(row)).ravel()
    assert np.sum((pairs - expected) ** 2 / expected) < 60


def test_what_is_impossible_is_never_drawn():
    draws = drawn([NEVER, 0.0, NEVER, 0.0], 1000)
    assert set(draws) == {1, 3}
