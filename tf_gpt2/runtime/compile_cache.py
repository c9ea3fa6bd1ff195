"""Keeps what XLA compiled on disk, so that the next process need not compile it again.

The folder is ``~/.cache/tf_gpt2/xla`` (or under ``XDG_CACHE_HOME``); ``TF_GPT2_COMPILE_CACHE`` names another, or is
``off``. Compiled code fits one TensorFlow and one processor: each has a folder of its own in there. TensorFlow writes
an entry under a temporary name and renames it, so processes may share the folder. Knows nothing of what is compiled.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import time
from pathlib import Path

import tensorflow as tf

VARIABLE = "TF_GPT2_COMPILE_CACHE"
FLAG = "--tf_xla_persistent_cache_directory"
UNUSED_DAYS = 30
"""After which an entry is removed."""
BYTES = 2
"""A protocol buffer's mark for a field that begins with its length. Source: protobuf.dev, "Encoding"."""
MOST_LENGTH_BYTES = 5


def enable() -> None:
    """Switches the cache on, unless the user has chosen a folder of TensorFlow's own or none.

    TensorFlow reads its flags when it runs its first operation: what comes later has no effect.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    choice = os.environ.get(VARIABLE, "")
    if choice.lower() == "off" or FLAG in flags:
        return
    parent = Path(choice) if choice else default_folder()
    folder = parent / f"tensorflow-{tf.__version__}-{processor_hash()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in parent.glob("tensorflow-*/*.pb"):
            if is_unused(entry) or not is_whole(entry):
                entry.unlink(missing_ok=True)
    except OSError:
        return  # a home that cannot be written to only costs time
    os.environ["TF_XLA_FLAGS"] = f'{flags} {FLAG}="{folder}"'.strip()


def is_unused(entry: Path) -> bool:
    """Says whether nobody has read an entry for long, such as those of another version of TensorFlow."""
    times = entry.stat()
    return time.time() - max(times.st_atime, times.st_mtime) > UNUSED_DAYS * 24 * 3600


def is_whole(entry: Path) -> bool:
    """Says whether a file ends where its fields do: a power failure can cut it off, and TensorFlow would fail at it.

    An entry is a protocol buffer with fields of bytes alone: for each a tag, a length, and as many bytes.
    """
    size = entry.stat().st_size
    with entry.open("rb", buffering=0) as file:
        while file.tell() < size:
            tag, *rest = file.read(1 + MOST_LENGTH_BYTES)
            n_length_bytes = 1 + sum(1 for _ in itertools.takewhile(lambda byte: byte >= 0x80, rest))
            if tag & 7 != BYTES or n_length_bytes > len(rest):
                return False
            length = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(rest[:n_length_bytes]))
            file.seek(length + n_length_bytes - len(rest), os.SEEK_CUR)
        return 0 < size == file.tell()


def default_folder() -> Path:
    """Gives the folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tf_gpt2" / "xla"


def processor_hash() -> str:
    """Names the processor by what it can do: code compiled for one may not run on another."""
    description = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        pass  # not Linux: the platform's own description must do
    return hashlib.sha256(description.encode()).hexdigest()[:12]
