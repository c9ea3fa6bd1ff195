"""Sets how XLA compiles in this process. Knows nothing of models."""

from __future__ import annotations

import os

from tf_gpt2.runtime.tf_internals import parse_xla_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
OWN_SUMS = f"{FLAG}=-reduce"


def sum_without_ynnpack() -> None:
    """Makes XLA compute large sums by code of its own, unless the user's ``XLA_FLAGS`` name ``FLAG``.

    XLA 2.21 hands sums of about a million numbers and more to YNNPACK, which prepares them in the first call. Threads
    that make their first calls of one compiled function at the same time then spoil each other's memory, and the
    process may crash. XLA's own sums do not, and are as fast.
    """
    if FLAG not in os.environ.get("XLA_FLAGS", ""):
        parse_xla_flags(OWN_SUMS)
