"""Prepares the process that a model runs in: compile cache, memory, XLA. Importing it changes nothing."""

from __future__ import annotations

import functools
import threading

_lock = threading.Lock()


def prepare_process() -> None:
    """Switches the compile cache on, makes TensorFlow return freed memory, and XLA sum safely; once per process.

    Called where a model is first made, read or compiled. TensorFlow reads the first two settings when it runs its first
    operation or lists its devices: a program that does so before this call keeps TensorFlow's own.
    """
    with _lock:  # threads may make the first models at the same time
        prepare_once()


@functools.cache
def prepare_once() -> None:
    """Does what ``prepare_process`` says, the first time."""
    from tf_gpt2.runtime import compile_cache, memory, xla_flags

    memory.give_memory_back()
    compile_cache.enable()
    xla_flags.sum_without_ynnpack()
