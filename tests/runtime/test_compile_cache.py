"""What XLA compiled is found again by the next process, and only by one that can use it."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tf_gpt2.runtime import compile_cache

OTHER = "--tf_xla_clustering_debug"
PROGRAM = """
import tf_gpt2
config = tf_gpt2.GPT2Config(n_vocab=20, n_ctx=16, n_embd=4, n_head=1, n_layer=1)
print(tf_gpt2.generate(tf_gpt2.GPT2Model(config), [[1, 2]], max_new_tokens=2).ids != [])
"""


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """Lets a test call ``enable`` with a home of its own, and read the flags it sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compile_cache.ENV_VAR, raising=False)
    monkeypatch.setenv("TF_XLA_FLAGS", OTHER)
    monkeypatch.setattr("atexit.register", lambda *_: None)  # nothing is left to record when the tests end

    def enable():
        compile_cache.enable()
        return os.environ["TF_XLA_FLAGS"]

    return enable


def folder_of(flags):
    """The folder that flags name."""
    return Path(flags.partition(f"{compile_cache.FLAG}=")[2].strip('"'))


def test_default_folder_is_in_the_users_cache(flags, tmp_path):
    other, own = flags().split()
    assert other == OTHER
    folder = folder_of(own)
    assert str(folder).startswith(f"{tmp_path}/tf_gpt2/xla/tensorflow-2.")
    assert folder.name.endswith(compile_cache.machine_hash())
    assert folder.is_dir()


def test_it_can_be_moved_or_switched_off(flags, monkeypatch, tmp_path):
    for off in ("off", "OFF"):
        monkeypatch.setenv(compile_cache.ENV_VAR, off)
        assert flags() == OTHER
    monkeypatch.setenv(compile_cache.ENV_VAR, str(tmp_path / "elsewhere"))
    assert f'="{tmp_path / "elsewhere"}/tensorflow-' in flags()


def test_other_flags_of_xla_have_another_folder(flags, monkeypatch):
    """With LLVM's optimization off XLA makes wrong bfloat16 products, under the same names of entries."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    first = folder_of(flags())
    monkeypatch.setenv("TF_XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    other = folder_of(flags())
    assert other != first
    assert other.parent == first.parent


def test_a_tilde_is_the_users_home(flags, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(compile_cache.ENV_VAR, "~/mine")
    assert folder_of(flags()).parent == tmp_path / "home" / "mine"
    monkeypatch.setenv("TF_XLA_FLAGS", "")
    monkeypatch.delenv(compile_cache.ENV_VAR)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert folder_of(flags()).parent == tmp_path / "home" / "cache" / "tf_gpt2" / "xla"


def test_a_relative_folder_stays_where_it_was(flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(compile_cache.ENV_VAR, "here")
    assert folder_of(flags()).parent == tmp_path / "here"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_there_is_no_cache_and_no_error(flags, monkeypatch, tmp_path, home):
    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert flags() == OTHER
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(compile_cache.ENV_VAR, "~nobody-of-this-name/cache")
    assert flags() == OTHER


def test_a_folder_of_the_users_choice_stays(flags, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", f"{compile_cache.FLAG}=/mine")
    assert flags() == f"{compile_cache.FLAG}=/mine"


@pytest.mark.parametrize("file", ["/a/file/of/flags", "flags --more", " file"])
def test_a_file_of_flags_stays(flags, monkeypatch, file):
    monkeypatch.setenv("TF_XLA_FLAGS", file)
    assert flags() == file


def test_what_a_parent_process_has_set_is_set_once(flags):
    first = flags()
    assert first.count(compile_cache.FLAG) == 1
    assert flags() == first


def test_a_home_that_cannot_be_written_to_is_no_error(flags, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compile_cache.ENV_VAR, str(tmp_path / "file"))
    assert flags() == OTHER


# ---- whose folder it is


def test_only_the_user_may_enter_the_folder(flags):
    before = os.umask(0)
    try:
        folder = folder_of(flags())
    finally:
        os.umask(before)
    for made in (folder, *folder.parents[:2]):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_folder_that_others_may_read_is_closed(flags):
    folder = folder_of(flags())
    folder.chmod(0o755)
    os.environ["TF_XLA_FLAGS"] = OTHER
    assert folder_of(flags()) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(flags, mode):
    folder_of(flags()).chmod(mode)
    os.environ["TF_XLA_FLAGS"] = OTHER
    assert flags() == OTHER


def test_the_folder_of_another_user_is_not_used(flags, monkeypatch):
    folder = folder_of(flags())
    (folder / "their.pb").write_bytes(b"machine code")
    owner = folder.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    os.environ["TF_XLA_FLAGS"] = OTHER
    assert flags() == OTHER
    assert (folder / "their.pb").exists()


def test_a_link_to_a_folder_is_not_used(flags, tmp_path):
    folder = folder_of(flags())
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    os.environ["TF_XLA_FLAGS"] = OTHER
    assert flags() == OTHER


# ---- what is in it


@pytest.fixture
def cache(flags):
    """A folder, and what a process does with it when it starts and when it ends."""

    class Cache:
        folder = folder_of(flags())

        def start(self):
            return compile_cache.verify(self.folder)

        def end(self, manifest):
            compile_cache.record(self.folder, manifest)
            os.close(manifest)

        def restart(self):
            self.end(self.start())
            return self.names()

        def names(self):
            return sorted(path.name for path in self.folder.iterdir() if path.name != compile_cache.MANIFEST)

        def fill(self, **contents):
            """A process that writes entries and ends."""
            manifest = self.start()
            for name, content in contents.items():
                (self.folder / f"{name}.pb").write_bytes(content)
            self.end(manifest)

    made = Cache()
    # the fixture's own ``enable`` holds the lock as a process does that runs: let go of it
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if os.path.realpath(f"/proc/self/fd/{number}") == str(made.folder / compile_cache.MANIFEST):
            os.close(int(number))
    return made


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_what_a_process_leaves_is_kept(cache):
    cache.fill(one=b"1" * 1000, two=b"2" * 1000)
    cache.fill(three=b"3")
    assert cache.restart() == ["one.pb", "three.pb", "two.pb"]


def test_an_entry_that_is_not_what_it_was_is_removed(cache):
    cache.fill(sound=b"s" * 100, first=b"f" * 100, last=b"l" * 100, short=b"c" * 100, long=b"a" * 100, empty=b"e" * 100)
    flip(cache.folder / "first.pb", 0)
    flip(cache.folder / "last.pb", 99)
    (cache.folder / "short.pb").write_bytes(b"c" * 99)
    (cache.folder / "long.pb").write_bytes(b"a" * 101)
    (cache.folder / "empty.pb").write_bytes(b"")
    assert cache.restart() == ["sound.pb"]


def test_an_entry_under_anothers_name_is_removed(cache):
    cache.fill(a=b"a", b=b"b")
    (cache.folder / "a.pb").rename(cache.folder / "b.pb")
    assert cache.restart() == []


def test_what_is_no_file_is_removed_and_keeps_nobody_waiting(cache, tmp_path):
    cache.fill(**dict.fromkeys(("pipe", "link", "folder", "sound"), b"content"))
    for name in ("pipe", "link", "folder"):
        (cache.folder / f"{name}.pb").unlink()
    os.mkfifo(cache.folder / "pipe.pb")
    os.mkfifo(cache.folder / "another.pb")
    (tmp_path / "target").write_bytes(b"content")
    (cache.folder / "link.pb").symlink_to(tmp_path / "target")
    (cache.folder / "folder.pb").mkdir()
    assert cache.restart() == ["sound.pb"]
    assert (tmp_path / "target").exists()


def test_what_a_killed_process_leaves_is_removed_by_the_next(cache):
    cache.fill(sound=b"s")
    os.close(cache.start())
    (cache.folder / "unknown.pb").write_bytes(bytes(1000))
    assert cache.restart() == ["sound.pb"]


def test_what_a_running_process_has_written_stays(cache):
    running = cache.start()
    (cache.folder / "new.pb").write_bytes(b"new")
    other = cache.start()
    assert cache.names() == ["new.pb"]
    cache.end(running)
    cache.end(other)
    assert cache.restart() == ["new.pb"]


def test_processes_that_end_together_keep_both_their_entries(cache):
    one, other = cache.start(), cache.start()
    (cache.folder / "one.pb").write_bytes(b"one")
    compile_cache.record(cache.folder, one)
    (cache.folder / "other.pb").write_bytes(b"other")
    cache.end(other)
    os.close(one)
    assert cache.restart() == ["one.pb", "other.pb"]


def test_a_damaged_entry_is_replaced_for_good_while_another_process_runs(cache):
    cache.fill(entry=b"sound")
    running = cache.start()
    flip(cache.folder / "entry.pb", 0)
    cache.fill(entry=b"compiled anew")
    assert cache.names() == ["entry.pb"]
    os.close(running)
    assert cache.restart() == ["entry.pb"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "pipe", "folder", "link", "gone"])
def test_a_damaged_manifest_costs_entries_and_is_no_error(cache, damage, tmp_path):
    cache.fill(a=b"a", b=b"b")
    manifest = cache.folder / compile_cache.MANIFEST
    content = manifest.read_bytes()
    manifest.unlink()
    if damage == "cut":
        manifest.write_bytes(content[:-10])
    elif damage == "garbage":
        manifest.write_bytes(os.urandom(1000) + b"0" * 64 + b" " + b"9" * 5000 + b" a.pb\n")
    elif damage == "pipe":
        os.mkfifo(manifest)
    elif damage == "folder":
        manifest.mkdir()
    elif damage == "link":
        (tmp_path / "target").write_bytes(content)
        manifest.symlink_to(tmp_path / "target")
    assert len(cache.restart()) == (damage == "cut")
    cache.fill(c=b"c")
    assert "c.pb" in cache.restart()


def test_what_nobody_has_read_for_long_is_removed(flags, tmp_path):
    folder = folder_of(flags())
    other = folder.with_name("tensorflow-2.0.0-0123456789ab")
    other.mkdir(mode=0o700)
    for place in (folder, other):
        for name, days in (("old.pb", 31), ("new.pb", 29)):
            (place / name).write_bytes(b"content")
            then = time.time() - days * 24 * 3600
            os.utime(place / name, (then, then))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "old.pb").write_bytes(b"not the cache's")
    os.utime(tmp_path / "theirs" / "old.pb", (0, 0))
    folder.with_name("tensorflow-link").symlink_to(tmp_path / "theirs")
    compile_cache.enable()
    assert [path.name for place in (folder, other) for path in place.glob("*.pb")] == ["new.pb", "new.pb"]
    assert (tmp_path / "theirs" / "old.pb").exists()


def test_looking_at_checksums_is_no_use_of_an_entry(cache):
    cache.fill(entry=b"content")
    then = time.time() - 10 * 24 * 3600
    os.utime(cache.folder / "entry.pb", (then, then))
    cache.restart()
    assert (cache.folder / "entry.pb").stat().st_atime == pytest.approx(then)


# ---- with TensorFlow


def test_another_process_finds_what_the_first_compiled(tmp_path):
    folder = tmp_path / "with a space, \"quotes' and a back\\slash"
    environment = {**os.environ, compile_cache.ENV_VAR: str(folder), "TF_XLA_FLAGS": ""}

    def run():
        result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=300)
        assert result.stdout == b"True\n", result.stderr
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.pb")}

    first = run()
    assert len(first) == 2  # prefill and decode
    assert run() == first
    damaged, other = first
    size = damaged.stat().st_size
    flip(damaged, size // 2)
    again = run()
    assert again.keys() == first.keys()
    assert again[other] == first[other]
    assert again[damaged] > first[damaged]
    assert run() == again
