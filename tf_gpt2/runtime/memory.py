"""How a process that runs a model uses memory: decided before TensorFlow's first operation. Knows no models."""

from __future__ import annotations

import atexit
import gc
import os

ALLOCATOR = "TF_ONEDNN_USE_SYSTEM_ALLOCATOR"
NEW_OBJECTS = 200_000
"""How many there may be before Python looks for garbage among them; 700 by default."""


def give_memory_back() -> None:
    """Has TensorFlow free its tensors' memory for good, unless the user has chosen.

    Its own allocator keeps what was freed: the float copies of weights that were rounded to 8 bits, say, for as long as
    the process lives.
    """
    os.environ.setdefault(ALLOCATOR, "true")


def collect_seldom() -> None:
    """Has Python look for garbage seldom, and not at all at exit, for a process of one command.

    TensorFlow makes a million objects when it is imported and when it traces. They stay, and to look through them again
    and again takes a third of a command's time.
    """
    gc.set_threshold(NEW_OBJECTS)
    atexit.register(gc.freeze)
