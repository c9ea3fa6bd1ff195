"""What XLA compiled is found again by the next process, and only by one that can use it."""

import os
import subprocess
import sys

import pytest

from tf_gpt2 import compile_cache

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
    folder = own.removeprefix(f"{compile_cache.FLAG}=")
    assert folder.startswith(f"{tmp_path}/tf_gpt2/xla/tensorflow-2.")
    assert folder.endswith(compile_cache.processor_hash())
    assert os.path.isdir(folder)  # noqa: PTH112


def test_it_can_be_moved_or_switched_off(flags, monkeypatch, tmp_path):
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert flags() == "--tf_xla_clustering_debug"
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "elsewhere"))
    assert f"={tmp_path / 'elsewhere'}/tensorflow-" in flags()


def test_a_folder_of_the_users_choice_stays(flags, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", f"{compile_cache.FLAG}=/mine")
    assert flags() == f"{compile_cache.FLAG}=/mine"


def test_a_home_that_cannot_be_written_to_is_no_error(flags, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "file"))
    assert flags() == "--tf_xla_clustering_debug"


def test_an_empty_entry_is_removed(flags, tmp_path):
    folder = flags().split(f"{compile_cache.FLAG}=")[1]
    for name, text in (("empty.pb", ""), ("full.pb", "x"), ("being_written.pb.tmp", "")):
        (tmp_path / folder / name).write_text(text)
    os.environ["TF_XLA_FLAGS"] = ""
    compile_cache.enable()
    assert sorted(os.listdir(folder)) == ["being_written.pb.tmp", "full.pb"]  # noqa: PTH208


def test_another_process_finds_what_the_first_compiled(tmp_path):
    environment = {**os.environ, compile_cache.VARIABLE: str(tmp_path), "TF_XLA_FLAGS": ""}

    def run():
        result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=300)
        assert result.stdout == b"True\n", result.stderr
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pb")}

    first = run()
    assert len(first) == 2  # prefill and decode
    assert run() == first
