"""XLA's flags: what is set for the user, and that the user's own choice stands."""

import pytest

from tf_gpt2.runtime.xla_flags import FLAG

SUMS = """
import os
import tensorflow as tf
from tf_gpt2.runtime import prepare_process

def is_by_ynnpack(n):
    sums = tf.function(lambda x: tf.reduce_sum(tf.exp(x), axis=-1), jit_compile=True)
    return "ynn_fusion" in sums.experimental_get_compiler_ir(tf.zeros((n, 4096)))(stage="optimized_hlo")

if PREPARES_FIRST:
    prepare_process()
print(is_by_ynnpack(512), end=" ")
prepare_process()
print(is_by_ynnpack(513), os.environ.get("XLA_FLAGS"))
"""


@pytest.mark.parametrize("prepares_first", [True, False])
def test_large_sums_are_not_left_to_ynnpack(prepares_first, run_python, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = run_python(SUMS.replace("PREPARES_FIRST", str(prepares_first)))
    assert found == f"{not prepares_first} False None\n"  # if not even the first is, the setting is needed no more


@pytest.mark.parametrize("flags, is_left", [(f"{FLAG}=+reduce", True), ("--xla_cpu_prefer_vector_width=256", False)])
def test_the_users_flags_of_xla_stay(flags, is_left, run_python, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert run_python(SUMS.replace("PREPARES_FIRST", "True")) == f"{is_left} {is_left} {flags}\n"


def test_a_file_of_flags_counts(run_python, monkeypatch, tmp_path):
    (tmp_path / "flags").write_text(f"{FLAG}=+reduce\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert run_python(SUMS.replace("PREPARES_FIRST", "True")) == f"True True {tmp_path / 'flags'}\n"


MANY = """
import os, sys, threading
import tensorflow as tf
from tf_gpt2 import runtime

sys.setswitchinterval(1e-6)
for _ in range(300):
    runtime.prepare_once.cache_clear()
    threads = [threading.Thread(target=runtime.prepare_process) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(os.environ.get("XLA_FLAGS"))
"""


def test_threads_that_prepare_together_leave_the_environment(run_python, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("TF_GPT2_COMPILE_CACHE", "off")
    assert run_python(MANY) == "None\n"


CRASH = """
import threading
import tensorflow as tf
from tf_gpt2.runtime import prepare_process

prepare_process()
x = tf.zeros((256, 4096))
for factor in range(20):
    sums = tf.function(lambda x: tf.reduce_sum(tf.exp(x * factor), axis=-1), jit_compile=True)
    threads = [threading.Thread(target=sums, args=(x,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("whole")
"""


def test_first_calls_from_many_threads_end_well(run_python, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert run_python(CRASH) == "whole\n"
