"""The process a model runs in: compiled code on disk, memory. Importing it changes nothing."""

from __future__ import annotations

import functools


@functools.cache
def prepare_process() -> None:
    """Switches on the compile cache, and has TensorFlow return freed memory; once per process.

    Called where a model is first made, read or compiled. TensorFlow reads these settings when it runs its first
    operation or lists its devices: a program that has done so before keeps TensorFlow's own settings.
    """
    from tf_gpt2.runtime import compile_cache, memory

    memory.give_memory_back()
    compile_cache.enable()
