"""How a process that runs a model uses memory: decided before it imports TensorFlow. Knows nothing of models."""

from __future__ import annotations

import atexit
import gc
import os
import platform
import sys
from pathlib import Path

ALLOCATOR = "TF_ONEDNN_USE_SYSTEM_ALLOCATOR"
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
OLDEST_GLIBC = (2, 35)
NEW_OBJECTS = 200_000
"""How many there may be before Python looks for garbage among them; 700 by default."""


def give_memory_back() -> None:
    """Has TensorFlow free its tensors' memory for good, unless the user has chosen.

    Its own allocator keeps what was freed: the float copies of weights that were rounded to 8 bits, say, for as long as
    the process lives.
    """
    os.environ.setdefault(ALLOCATOR, "true")


def restart_with_huge_pages() -> None:
    """Runs the same command again with glibc asking for huge pages, where that can be and the user has not chosen.

    glibc reads its tunables when a process starts. Weights on pages of 2 MiB need fewer address translations.
    """
    tunables = os.environ.get(TUNABLES, "")
    if HUGE_PAGES not in tunables and has_huge_pages():
        os.environ[TUNABLES] = f"{tunables}:{HUGE_PAGES}=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def collect_seldom() -> None:
    """Has Python look for garbage seldom, and not at all at exit, for a process of one command.

    TensorFlow makes a million objects when it is imported and when it traces. They stay, and to look through them again
    and again takes a third of a command's time.
    """
    gc.set_threshold(NEW_OBJECTS)
    atexit.register(gc.freeze)


def has_huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> bool:
    """Says whether the kernel gives huge pages to those who ask, and glibc is one who can."""
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < OLDEST_GLIBC:
        return False
    try:
        return "[madvise]" in setting.read_text(encoding="ascii")
    except OSError:
        return False
