"""What XLA compiled is found again by the next process, and only by one that can use it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tf_gpt2.runtime import compile_cache

PROGRAM = """
import tf_gpt2
config = tf_gpt2.GPT2Config(n_vocab=20, n_ctx=16, n_embd=4, n_head=1, n_layer=1)
print(tf_gpt2.generate(tf_gpt2.GPT2Model(config), [[1, 2]], max_new_tokens=2).ids != [])
"""


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """Lets a test call ``enable`` with a home of its own, and read the flags it sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_clustering_debug")

    def enable():
        compile_cache.enable()
        return os.environ["TF_XLA_FLAGS"]

    return enable


def test_default_folder_is_in_the_users_cache(flags, tmp_path):
    other, own = flags().split()
    assert other == "--tf_xla_clustering_debug"
    folder = own.removeprefix(f"{compile_cache.FLAG}=").strip('"')
    assert folder.startswith(f"{tmp_path}/tf_gpt2/xla/tensorflow-2.")
    assert folder.endswith(compile_cache.processor_hash())
    assert os.path.isdir(folder)  # noqa: PTH112


def test_it_can_be_moved_or_switched_off(flags, monkeypatch, tmp_path):
    for off in ("off", "OFF"):
        monkeypatch.setenv(compile_cache.VARIABLE, off)
        assert flags() == "--tf_xla_clustering_debug"
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "elsewhere"))
    assert f'="{tmp_path / "elsewhere"}/tensorflow-' in flags()


def test_a_folder_of_the_users_choice_stays(flags, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", f"{compile_cache.FLAG}=/mine")
    assert flags() == f"{compile_cache.FLAG}=/mine"


def test_a_home_that_cannot_be_written_to_is_no_error(flags, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "file"))
    assert flags() == "--tf_xla_clustering_debug"


WHOLE = bytes([0x0A, 3, *b"key", 0x1A, 200, 1, *range(200)])
"""Fields 1 and 3 of a protocol buffer, with 3 and 200 bytes."""


@pytest.fixture
def entries(flags):
    """The folder that entries are in; ``enable`` looks through it once more."""
    folder = Path(flags().partition(f"{compile_cache.FLAG}=")[2].strip('"'))
    os.environ["TF_XLA_FLAGS"] = ""
    return folder


def test_what_a_power_failure_leaves_is_removed(entries):
    damaged = {f"cut_{n}.pb": WHOLE[:n] for n in (*range(5), *range(6, len(WHOLE), 7), len(WHOLE) - 1)}
    damaged |= {"zeros.pb": bytes(300), "endless.pb": b"\x0a" + b"\xff" * 20, "numbers.pb": b"\x08\x01"}
    kept = {"whole.pb": WHOLE, "being_written.pb.tmp": b""}
    for name, content in (damaged | kept).items():
        (entries / name).write_bytes(content)
    compile_cache.enable()
    assert sorted(path.name for path in entries.iterdir()) == sorted(kept)


def test_what_nobody_has_read_for_long_is_removed(entries):
    other = entries.with_name("tensorflow-2.0.0-0123456789ab")
    other.mkdir()
    for folder in (entries, other):
        for name, days in (("old.pb", 31), ("new.pb", 29)):
            (folder / name).write_bytes(WHOLE)
            then = time.time() - days * 24 * 3600
            os.utime(folder / name, (then, then))
    compile_cache.enable()
    assert [path.name for folder in (entries, other) for path in folder.iterdir()] == ["new.pb", "new.pb"]


def test_another_process_finds_what_the_first_compiled(tmp_path):
    folder = tmp_path / "with a space"
    environment = {**os.environ, compile_cache.VARIABLE: str(folder), "TF_XLA_FLAGS": ""}

    def run():
        result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=300)
        assert result.stdout == b"True\n", result.stderr
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.pb")}

    first = run()
    assert len(first) == 2  # prefill and decode
    assert run() == first
    cut, other = first
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    again = run()
    assert again.keys() == first.keys()
    assert again[other] == first[other]
    assert len(cut.read_bytes()) > len(whole) // 2
