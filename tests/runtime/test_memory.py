"""How a process is set up: what is decided for the user, and that the user's own choice stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_gpt2.runtime import memory

MEMORY = """
import os
from tf_gpt2.runtime import prepare_process
prepare_process()
import tensorflow as tf

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024

tf.constant(0)
before = resident()
x = tf.fill((25_000_000,), 1.0)
print(os.environ["TF_ONEDNN_USE_SYSTEM_ALLOCATOR"], resident() - before > 90e6, end=" ")
del x
print(resident() - before < 10e6)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_freed_tensors_are_given_back(run_python, monkeypatch):
    monkeypatch.delenv(memory.ALLOCATOR, raising=False)
    assert run_python(MEMORY) == "true True True\n"


def test_the_users_allocator_stays(monkeypatch):
    monkeypatch.setenv(memory.ALLOCATOR, "false")
    memory.give_memory_back()
    assert os.environ[memory.ALLOCATOR] == "false"


def test_garbage_is_looked_for_seldom_and_not_at_exit():
    code = """
import atexit, gc
from tf_gpt2.runtime.memory import collect_seldom
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # called after what was registered later
collect_seldom()
print(gc.isenabled(), gc.get_threshold()[0] > 10_000)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "True", "True"]
