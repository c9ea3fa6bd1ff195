"""How a process is set up: what is decided for the user, and that the user's own choice stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tf_gpt2.runtime import memory as process


@pytest.fixture
def restarted(monkeypatch):
    """What would have been run, as arguments and tunables."""
    calls = []

    def execv(path, arguments):
        calls.append((path, arguments, os.environ[process.TUNABLES]))

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(process, "has_huge_pages", lambda: True)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "tf_gpt2", "generate", "a b"])
    monkeypatch.setenv(process.TUNABLES, "")
    return calls


def test_the_same_command_runs_again_with_huge_pages(restarted):
    process.restart_with_huge_pages()
    arguments = [sys.executable, "-m", "tf_gpt2", "generate", "a b"]
    assert restarted == [(sys.executable, arguments, "glibc.malloc.hugetlb=1")]
    process.restart_with_huge_pages()
    assert len(restarted) == 1  # once


@pytest.mark.parametrize("tunables", ["glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=2:glibc.malloc.check=1"])
def test_the_users_pages_stay(tunables, restarted, monkeypatch):
    monkeypatch.setenv(process.TUNABLES, tunables)
    process.restart_with_huge_pages()
    assert restarted == []


def test_other_tunables_stay(restarted, monkeypatch):
    monkeypatch.setenv(process.TUNABLES, "glibc.malloc.check=1")
    process.restart_with_huge_pages()
    assert restarted[0][2] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


def test_no_restart_where_there_are_none(restarted, monkeypatch):
    monkeypatch.setattr(process, "has_huge_pages", lambda: False)
    process.restart_with_huge_pages()
    assert restarted == []


@pytest.mark.parametrize(
    ("libc", "setting", "has"),
    [
        (("glibc", "2.36"), "always [madvise] never", True),
        (("glibc", "2.35"), "always [madvise] never", True),
        (("glibc", "2.34"), "always [madvise] never", False),
        (("", ""), "always [madvise] never", False),
        (("glibc", "2.36"), "always madvise [never]", False),
        (("glibc", "2.36"), "[always] madvise never", False),  # they are given unasked
        (("glibc", "2.36"), None, False),
    ],
)
def test_who_has_huge_pages(libc, setting, has, tmp_path, monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    assert process.has_huge_pages(tmp_path / "enabled") is has


MEMORY = """
import os, sys
import tensorflow as tf
import tf_gpt2.model

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
    monkeypatch.delenv(process.ALLOCATOR, raising=False)
    assert run_python(MEMORY) == "true True True\n"


def test_the_users_allocator_stays(monkeypatch):
    monkeypatch.setenv(process.ALLOCATOR, "false")
    process.give_memory_back()
    assert os.environ[process.ALLOCATOR] == "false"


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
