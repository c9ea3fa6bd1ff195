"""Keeps what XLA compiled on disk, so that the next process need not compile it again.

The folder is ``~/.cache/tf_gpt2/xla`` (or under ``XDG_CACHE_HOME``); ``TF_GPT2_COMPILE_CACHE`` names another, or is
``off``. Compiled code fits one TensorFlow and one processor: each has a folder of its own in there. TensorFlow writes
an entry under a temporary name and renames it, so processes may share the folder. Knows nothing of what is compiled.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import tensorflow as tf

VARIABLE = "TF_GPT2_COMPILE_CACHE"
FLAG = "--tf_xla_persistent_cache_directory"


def enable() -> None:
    """Switches the cache on, unless the user has chosen a folder of TensorFlow's own or none.

    TensorFlow reads its flags when it runs its first operation: what comes later has no effect.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    choice = os.environ.get(VARIABLE, "")
    if choice == "off" or FLAG in flags:
        return
    folder = (Path(choice) if choice else default_folder()) / f"tensorflow-{tf.__version__}-{processor_hash()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.glob("*.pb"):
            if entry.stat().st_size == 0:  # a power failure can leave one, and TensorFlow would stop at it
                entry.unlink(missing_ok=True)
    except OSError:
        return  # a home that cannot be written to only costs time
    if " " not in str(folder):  # TF_XLA_FLAGS is split at spaces
        os.environ["TF_XLA_FLAGS"] = f"{flags} {FLAG}={folder}".strip()


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
