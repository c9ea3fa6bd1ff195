"""Keeps the code that XLA compiled on disk, so that the next process need not compile it again.

The folder is ``~/.cache/tf_gpt2/xla`` (or ``$XDG_CACHE_HOME/tf_gpt2/xla``); the environment variable
``TF_GPT2_COMPILE_CACHE`` names another, or is ``off``. Compiled code fits one version of TensorFlow, one processor and
one setting of ``XLA_FLAGS``: each of their combinations has its own folder inside.

The entries are machine code, which TensorFlow itself writes and reads, without checks. So the folder must belong to the
user alone, and a manifest beside the entries lists their checksums: a process adds those of new entries when it ends,
and removes every entry that differs when it starts. Knows nothing of models.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tf_gpt2.runtime.xla_flags import OWN_SUMS, users_flags

try:
    import fcntl
except ImportError:  # on Windows, which also lacks such owners and modes
    fcntl = None  # type: ignore[assignment]

ENV_VAR = "TF_GPT2_COMPILE_CACHE"
FLAG = "--tf_xla_persistent_cache_directory"
MANIFEST = "checksums"
"""The file of checksums; a line has an entry's SHA-256, its size in bytes and its name."""
UNUSED_DAYS = 30
"""An entry that no process has read for so many days is removed."""


class Checksum(NamedTuple):
    """The SHA-256 and the size of an entry's content."""

    sha256: str
    n_bytes: int


REMOVED = Checksum("0" * 64, 0)
"""Marks an entry in the manifest as removed; TensorFlow may write it anew."""


def enable() -> None:
    """Switches the cache on, unless the user chose "off" or another cache by ``TF_XLA_FLAGS``.

    Does nothing where the folder cannot be used: without the cache a program is slower, but right.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    names_a_file = bool(flags.strip()) and not flags.lstrip().startswith("--")  # TensorFlow reads its flags there
    if fcntl is None or names_a_file or os.environ.get(ENV_VAR, "").lower() == "off":
        return
    try:
        folder = chosen_folder()
        flag = f"{FLAG}={quote(folder)}"
        if flag not in flags:  # if it is there, a parent process has set it
            if FLAG in flags:
                return
            flags = f"{flags} {flag}".strip()
        make_private(folder)
        manifest = verify(folder)
        remove_unused(folder.parent)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return
    os.environ["TF_XLA_FLAGS"] = flags
    atexit.register(record, folder, manifest)


def chosen_folder() -> Path:
    """Returns the folder for this TensorFlow, this processor and these flags of XLA.

    Raises:
        RuntimeError: when the user has no home.
    """
    import tensorflow as tf

    choice = os.environ.get(ENV_VAR, "")
    parent = Path(choice).expanduser().absolute() if choice else default_folder()
    return parent / f"tensorflow-{tf.__version__}-{machine_hash()}"


def default_folder() -> Path:
    """Returns the folder in the user's cache.

    Raises:
        RuntimeError: when the user has no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
    if not cache.is_absolute():  # a relative path is invalid. Source: XDG Base Directory Specification
        home = Path.home()
        if os.environ.get("HOME") == "" or not home.is_absolute():
            raise RuntimeError(f"HOME must be an absolute path, got {home}")
        cache = home / ".cache"
    return cache / "tf_gpt2" / "xla"


def quote(folder: Path) -> str:
    """Quotes a path as TensorFlow reads it in a flag. Source: tensorflow, ``parse_flags_from_env.cc``."""
    escaped = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def make_private(folder: Path) -> None:
    """Makes a folder that only the user may enter.

    Raises:
        OSError: when it cannot be made, or it exists and another user owns it or may write to it.
    """
    for part in (*reversed(folder.parents), folder):
        part.mkdir(mode=0o700, exist_ok=True)
    if not is_own_folder(folder):
        raise PermissionError(f"{folder} must belong to the user alone")
    folder.chmod(0o700)


def is_own_folder(folder: Path) -> bool:
    """Whether the user owns a folder, and nobody else may write to it; a link is not a folder."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def verify(folder: Path) -> int:
    """Removes entries that differ from the manifest.

    The manifest stays open and locked as long as the process lives. An entry that it does not list was written by a
    process that was killed, or that still runs: the entry is removed only when no other process has the lock.

    Returns:
        The manifest's file descriptor.

    Raises:
        OSError: when the folder cannot be read or written to.
    """
    path = folder / MANIFEST
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)
    manifest = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_alone = True
    except BlockingIOError:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        is_alone = False
    listed = read_manifest(manifest)
    for entry in entries(folder):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if not is_sound(entry, listed.get(entry.name), keep_unlisted=not is_alone):
                remove(entry)
                append(manifest, {entry.name: REMOVED})
    if is_alone:
        os.ftruncate(manifest, 0)
        append(manifest, {entry.name: listed[entry.name] for entry in entries(folder) if entry.name in listed})
        fcntl.flock(manifest, fcntl.LOCK_SH)
    return manifest


def is_sound(entry: Path, expected: Checksum | None, *, keep_unlisted: bool) -> bool:
    """Whether an entry may stay: it is a file with the expected checksum, or with none and ``keep_unlisted`` is set."""
    status = entry.lstat()
    if not stat.S_ISREG(status.st_mode):  # TensorFlow would wait at a pipe without end
        return False
    if expected is None:
        return keep_unlisted
    try:
        return status.st_size == expected.n_bytes and checksum_of(entry) == expected
    except OSError:  # the disk cannot read it
        return False


def record(folder: Path, manifest: int) -> None:
    """Adds the checksums of new entries to the manifest; does nothing where that fails."""
    with contextlib.suppress(OSError):
        listed = read_manifest(manifest)
        new = {}
        for entry in entries(folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.name not in listed and stat.S_ISREG(entry.lstat().st_mode):
                    new[entry.name] = checksum_of(entry)
        append(manifest, new)


def entries(folder: Path) -> Iterator[Path]:
    """Yields the entries; a file that TensorFlow is still writing has another suffix."""
    return folder.glob("*.pb")


def checksum_of(entry: Path) -> Checksum:
    """Computes a file's checksum without changing its access time, which ``remove_unused`` looks at."""
    no_trace = getattr(os, "O_NOATIME", 0)
    with os.fdopen(os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | no_trace), "rb") as file:
        content = file.read()
    return Checksum(hashlib.sha256(content).hexdigest(), len(content))


def read_manifest(manifest: int) -> dict[str, Checksum]:
    """Reads the checksum of each entry; ignores lines that a power failure has cut off."""
    text = os.pread(manifest, os.fstat(manifest).st_size, 0).decode("ascii", "replace")
    lines = re.findall(r"^([0-9a-f]{64}) ([0-9]{1,18}) (\S+)$", text, re.M)
    last = {name: Checksum(sha256, int(n_bytes)) for sha256, n_bytes, name in lines}
    return {name: checksum for name, checksum in last.items() if checksum != REMOVED}


def append(manifest: int, checksums: dict[str, Checksum]) -> None:
    """Adds lines to the manifest by one write, so that processes that end at the same time do not mix theirs."""
    lines = [f"{sha256} {n_bytes} {name}\n" for name, (sha256, n_bytes) in checksums.items()]
    if lines:
        os.write(manifest, "".join(["\n", *lines]).encode("ascii", "replace"))


def remove(path: Path) -> None:
    """Removes a file, link, pipe or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unused(parent: Path) -> None:
    """Removes entries that no process has read for ``UNUSED_DAYS``, e.g. those of an older TensorFlow."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in filter(is_own_folder, parent.glob("tensorflow-*")):
        for entry in folder.glob("*.pb*"):
            with contextlib.suppress(FileNotFoundError):
                times = entry.lstat()
                if max(times.st_atime, times.st_mtime) < oldest:
                    remove(entry)


def machine_hash() -> str:
    """Returns a hash of what compiled code depends on: the processor's model and features, and the flags of XLA.

    TensorFlow's names of entries do not tell with which flags they were compiled.
    """
    description = platform.machine() + platform.processor() + OWN_SUMS + users_flags()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        pass  # not Linux: the platform's own description must do
    return hashlib.sha256(description.encode()).hexdigest()[:12]
