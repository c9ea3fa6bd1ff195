"""Sets how a process uses memory, before TensorFlow's first operation. Knows nothing of models."""

from __future__ import annotations

import atexit
import gc
import os

ALLOCATOR = "TF_ONEDNN_USE_SYSTEM_ALLOCATOR"
NEW_OBJECTS = 200_000
"""New objects after which Python looks for garbage among them; Python's default is 700."""


def give_memory_back() -> None:
    """Makes TensorFlow return freed memory to the system, unless the user has set ``ALLOCATOR``.

    TensorFlow's own allocator keeps freed memory as long as the process lives, such as that of the float copies of
    weights that were rounded to 8 bits.
    """
    os.environ.setdefault(ALLOCATOR, "true")


def collect_seldom() -> None:
    """Makes Python look for garbage seldom, and not at all at exit, for a process of one command.

    TensorFlow makes a million objects when it is imported and when it traces. They stay, and searching them again and
    again takes a third of a command's time.
    """
    gc.set_threshold(NEW_OBJECTS)
    atexit.register(gc.freeze)
