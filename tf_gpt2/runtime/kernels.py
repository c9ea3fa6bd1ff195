"""Finds the native kernels, products with 8-bit, 4-bit and float weights and attention, and makes them known to XLA.

They are a library that pip compiles from ``runtime/native`` where there is a compiler; without it XLA's own products
are used. The environment variable ``TF_GPT2_KERNELS`` chooses: ``native`` demands the kernels, ``xla`` and ``off`` do
without; by default they are used where they are. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

ENV_VAR = "TF_GPT2_KERNELS"
CHOICES = ("off", "xla", "native")
MOST_FLOAT_ROWS = 16
"""The kernels multiply up to so many rows by floats; with more, XLA's products, of blocks of a matrix, catch up."""
MOST_POSITIONS = 8
"""The kernels compute attention of up to so many new positions of a row at a time."""
PORTABLE = "portable"
"""The instruction set that every processor has, too slow to be chosen unasked."""
BUILD = "install g++ 12 or newer, and then tf_gpt2 again by pip install --force-reinstall --no-cache-dir"


def are_chosen() -> bool:
    """Whether functions that are compiled from now on use the kernels.

    Raises:
        ImportError: when ``TF_GPT2_KERNELS`` demands kernels that cannot be used; says why.
        ValueError: when it has an unknown value.
    """
    choice = chosen()
    if choice in ("off", "xla"):
        return False
    if choice == "":
        return instruction_sets()[:1] not in ((), (PORTABLE,)) and not why_not_registered()
    why_not = why_missing() or why_not_registered()
    if why_not:
        raise ImportError(f"{ENV_VAR}=native, but {why_not}")
    return True


def chosen() -> str:
    """Returns the value of ``TF_GPT2_KERNELS``, "" by default.

    Raises:
        ValueError: when it is unknown.
    """
    choice = os.environ.get(ENV_VAR, "")
    if choice not in ("", *CHOICES):
        raise ValueError(f"{ENV_VAR} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def find_library() -> Path | None:
    """Returns the compiled library's path, or ``None``."""
    return next(iter(sorted(Path(__file__).parent.glob("_kernels*.so"))), None)


@functools.cache
def load_library() -> ctypes.CDLL:
    """Loads the library, once per process.

    Raises:
        ImportError: when it is not there, or cannot be loaded; says why, and what to do.
    """
    path = find_library()
    if path is None:
        raise ImportError(f"the native kernels were not compiled; {BUILD}")
    try:
        library = ctypes.CDLL(str(path))
        library.tf_gpt2_instruction_sets.restype = None
        library.tf_gpt2_register.restype = None
        library.tf_gpt2_register.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    except (OSError, AttributeError) as error:
        raise ImportError(f"the native kernels cannot be loaded ({error}); {BUILD}") from None
    return library


def why_missing() -> str:
    """Returns why there is no library, and what to do; "" if there is one."""
    try:
        load_library()
    except ImportError as error:
        return str(error)
    return ""


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Returns the instruction sets of this processor that there are kernels for, the fastest first."""
    if why_missing():
        return ()
    names = ctypes.create_string_buffer(256)
    load_library().tf_gpt2_instruction_sets(names, ctypes.c_size_t(len(names)))
    return tuple(names.value.decode().split())


@functools.cache
def why_not_registered() -> str:
    """Makes the kernels known to XLA, once per process; returns why that failed, or ""."""
    from tf_gpt2.runtime.tf_internals import ffi_api

    api = ffi_api()
    if api is None:
        return "this TensorFlow has no foreign function interface of XLA"
    why_not = ctypes.create_string_buffer(512)
    load_library().tf_gpt2_register(api, why_not, len(why_not))
    return why_not.value.decode()


def processor() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
