"""Prepares the process that a model runs in: its compile cache and its memory. Importing it changes nothing."""

from __future__ import annotations

import functools


@functools.cache
def prepare_process() -> None:
    """Switches the compile cache on, and makes TensorFlow return freed memory to the system; once per process.

    Called where a model is first made, read or compiled. TensorFlow reads these settings when it runs its first
    operation or lists its devices: a program that does so before this call keeps TensorFlow's own settings.
    """
    from tf_gpt2.runtime import compile_cache, memory

    memory.give_memory_back()
    compile_cache.enable()
