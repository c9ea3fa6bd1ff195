"""Sets how XLA compiles in this process. Knows nothing of models."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
OWN_SUMS = f"{FLAG}=-reduce"


def sum_without_ynnpack() -> None:
    """Makes XLA compute large sums by code of its own, unless the user's ``XLA_FLAGS`` name ``FLAG``.

    XLA 2.21 hands sums of about a million numbers and more to YNNPACK, which prepares them in the first call. Threads
    that make their first calls of one compiled function at the same time then spoil each other's memory, and the
    process may crash. XLA's own sums do not, and are as fast.
    """
    if FLAG not in users_flags():
        from tf_gpt2.runtime.tf_internals import parse_xla_flags  # imports TensorFlow

        parse_xla_flags(OWN_SUMS)


def users_flags() -> str:
    """Returns the flags in ``XLA_FLAGS``, or in the file that it names, as XLA reads them."""
    flags = os.environ.get("XLA_FLAGS", "").lstrip()
    if flags and not flags.startswith("-"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return Path(flags).read_text(encoding="utf-8")
    return flags
