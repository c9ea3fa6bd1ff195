"""The SavedModel in the loader that TensorFlow Serving uses, against the same SavedModel in Python."""

import random
import threading

import numpy as np
import pytest
import tensorflow as tf
from answer import answer
from cases import CASES, WRONG, XLA_CASES
from loader import Loader, build, compiler, pack_inputs, read_signatures, unpack

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no g++ to build load.cc with")

N_THREADS = 8
N_REQUESTS = 200
N_WRONG = 200
"""A check that other operations run beside may lose against them once in many requests."""
MOST_GROWTH_BYTES = 64 << 20
"""What the process may grow by over 200 requests, after 200 others; allocators take and give some."""
MOST_S = 180
"""By when requests that wait for each other are given up."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("load") / "load")


@pytest.fixture(scope="module")
def server(program, exported):
    """As a server that is not told otherwise: XLA is off."""
    with Loader(program, exported, n_threads=N_THREADS) as loader:
        yield loader


@pytest.fixture(scope="module")
def xla_server(program, exported):
    with Loader(program, exported, xla=True) as loader:
        yield loader


@pytest.fixture(scope="module")
def alone(server):
    """Gives what a case's request gets when there is no other."""
    found = {}

    def ask(case):
        if case not in found:
            signature, inputs = CASES[case]
            found[case] = server.ask(signature, **inputs)
        assert found[case].error == ""
        return found[case].outputs

    return ask


@pytest.fixture(scope="module")
def in_python(exported):
    """Gives ``ask(signature, inputs)``."""
    served, signatures = tf.saved_model.load(str(exported)), read_signatures(exported)

    def ask(name, inputs):
        (outputs,) = answer(served, name, pack_inputs(signatures[name], inputs))
        return unpack(outputs)

    return ask


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        if values.dtype == np.float32:
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=2e-5, err_msg=name)
        else:
            assert found[name].tolist() == values.tolist()


@pytest.mark.parametrize("case", CASES)
def test_plain_signatures_give_what_python_gives(alone, in_python, case):
    assert_same(alone(case), in_python(*CASES[case]))


def test_wrong_options_are_told_per_row(alone):
    reasons = alone("generate wrong options")["finish_reason"].tolist()
    names = (b"temperature", b"top_p", b"temperature", b"max_new_tokens", b"temperature")
    assert all(reason.startswith(b"error: " + name) for reason, name in zip(reasons, names, strict=True))


@pytest.mark.parametrize("case", WRONG)
def test_what_fits_no_row_is_an_invalid_argument(server, alone, case):
    signature, inputs, sentence = WRONG[case]
    for _ in range(N_WRONG):
        found = server.ask(signature, **inputs)
        assert found.error.startswith("INVALID_ARGUMENT: ")
        assert sentence in found.error
    assert_same(server.ask("generate", text=["To be, or not to be"]).outputs, alone("generate one row"))


def test_inputs_without_a_default_are_needed_and_others_unknown(server):
    assert server.ask("generate").error == "INVALID_ARGUMENT: missing input: text"
    assert server.ask("generate", text=["a"], heat=[1.0]).error == "INVALID_ARGUMENT: unknown input: heat"


def test_defaults_are_those_of_the_signature(server, alone):
    given = {"max_new_tokens": [12], "temperature": [0.0], "top_p": [1.0], "seed": [0]}
    assert_same(server.ask("generate", text=["To be, or not to be"], **given).outputs, alone("generate one row"))


@pytest.mark.parametrize("signature", ["generate_xla", "score_xla"])
def test_without_xla_a_twin_says_so_and_disturbs_nobody(server, alone, signature):
    found = server.ask(signature, text=["To be"])
    assert "XLA compilation disabled" in found.error
    assert found.outputs == {}
    again = server.ask("generate", text=["To be, or not to be"])
    assert_same(again.outputs, alone("generate one row"))


@pytest.mark.parametrize("case", XLA_CASES)
def test_with_xla_the_twins_give_the_same(xla_server, alone, case):
    signature, inputs = CASES[case]
    found = xla_server.ask(f"{signature}_xla", **inputs)
    assert found.error == ""
    assert_same(found.outputs, alone(case))


def test_threads_get_what_one_gets_and_memory_stays(server, alone):
    chooser = random.Random(0)
    rss_bytes = []
    for _ in range(2):
        cases = chooser.choices(list(CASES), k=N_REQUESTS)
        for case, found in zip(cases, server.ask_all(CASES[case] for case in cases), strict=True):
            assert found.error == ""
            assert_same(found.outputs, alone(case))
        rss_bytes.append(server.rss_bytes())
    assert rss_bytes[1] - rss_bytes[0] < MOST_GROWTH_BYTES


@pytest.mark.parametrize("case", ["generate one row", "generate drawn few rows"])
def test_one_thread_between_operations_is_enough_for_many_requests(program, exported, alone, monkeypatch, case):
    """As in a container with one core: where a graph in one thread waited for another, none would be left to run it."""
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "1")
    with Loader(program, exported, n_threads=N_THREADS) as loader:
        watch = threading.Timer(MOST_S, loader.process.kill)
        watch.start()
        found = loader.ask_all([CASES[case]] * 4 * N_THREADS)
        watch.cancel()
    for one in found:
        assert one.error == ""
        assert_same(one.outputs, alone(case))
