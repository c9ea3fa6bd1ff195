"""The random numbers: known answers of the published generator, the same bits everywhere, the right distribution."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tf_gpt2.generation import random
from tf_gpt2.generation.random import gumbel, threefry

# Source: Random123, kat_vectors, threefry2x32 with 20 rounds
KNOWN = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


def words(*columns):
    return tuple(tf.constant(column, tf.uint32) for column in columns)


def noise(seeds, positions, n_columns=50):
    words = [[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds]
    return gumbel(tf.constant(words, tf.uint32), tf.constant(positions), n_columns).numpy()


def uniforms(n_rows=100, n_columns=5000):
    """Inverts the Gumbel distribution: what was uniform is again."""
    return np.exp(-np.exp(-noise(range(n_rows), range(n_rows), n_columns).astype(np.float64)))


@pytest.mark.parametrize("compiled", [None, False, True])
def test_known_answers(compiled):
    function = threefry if compiled is None else tf.function(threefry, jit_compile=compiled)
    keys, counters, answers = (np.array(column).T for column in zip(*KNOWN, strict=True))
    np.testing.assert_array_equal(function(words(*keys), words(*counters)), answers)


def test_plain_compiled_and_eager_give_the_same_noise():
    arguments = tf.constant([[5, 6], [7, 0]], tf.uint32), tf.constant([3, 40])
    eager = gumbel(*arguments, 1000).numpy()
    for compiled in (False, True):
        function = tf.function(lambda *some: gumbel(*some, 1000), jit_compile=compiled)
        np.testing.assert_allclose(function(*arguments), eager, rtol=1e-5, atol=1e-6)


def test_noise_depends_on_seed_position_and_column_alone():
    first, second, third = noise([5, 2**63, 5], [9, 9, 9])
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    same(first, third)
    same(first, noise([5], [9])[0])
    same(second, noise([1, 2**63], [0, 9])[1])
    same(first[:20], noise([5], [9], 20)[0])


@pytest.mark.parametrize("other", [(6, 9), (5 + 2**32, 9), (5 << 32, 9), (5, 10), (9, 5)])
def test_each_of_them_matters(other):
    seed, position = other
    assert not np.isclose(noise([5], [9]), noise([seed], [position])).any()


def test_position_and_column_are_not_exchangeable():
    square = noise([5] * 50, range(50))
    assert np.isclose(square, square.T).sum() == 50
    assert np.unique(square).size > 2490


def test_noise_is_uniform_before_it_is_gumbel():
    counts, _ = np.histogram(uniforms(), bins=100, range=(0, 1))
    # chi-square with 99 degrees of freedom: one in a million exceeds 178
    assert np.sum((counts - 5000) ** 2 / 5000) < 178


def test_noise_has_the_moments_of_a_gumbel():
    values = noise(range(100), range(100), 5000)
    assert values.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert values.var() == pytest.approx(np.pi**2 / 6, abs=0.02)


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbours_are_independent(axis):
    u = uniforms() - 0.5
    rest, shifted = (u[1:], u[:-1]) if axis == 0 else (u[:, 1:], u[:, :-1])
    # the correlation of n independent pairs has standard deviation 1 / sqrt(n)
    assert abs(np.mean(rest * shifted) * 12) < 5 / np.sqrt(rest.size)


@pytest.mark.parametrize("word", [0, 2**32 - 1, 511, 2**32 - 512])
def test_noise_is_finite_for_any_bits(word, monkeypatch):
    monkeypatch.setattr(random, "threefry", lambda _, counter: (tf.fill(counter[0].shape, np.uint32(word)),) * 2)
    assert np.isfinite(noise([5], [9])).all()
