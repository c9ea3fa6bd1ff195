"""Describes the processor, and tells kinds apart: makers and instruction sets that decide which products are fast."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MAKERS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
LEVELS = {
    "amx_int8": "amx",
    "avx512_vnni": "avx512",
    "avx_vnni": "avxvnni",
    "avx2": "avx2",
    "i8mm": "i8mm",
    "asimddp": "dotprod",
}
"""Instruction sets that decide how fast 8-bit products are, the fastest first, and what a kind is called after them."""
SHOWN = (*LEVELS, "amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512_bf16", "fma", "asimd", "bf16", "sve")
"""Instruction sets to name in a result, if the processor has them."""


def describe_processor() -> dict[str, str | list[str]]:
    """Returns ``cpu``, its name; ``kind``, such as ``amd-avx512``; ``instruction_sets``, as Linux names them."""
    facts = read_cpuinfo()
    flags = facts.get("flags", facts.get("Features", "")).split()
    maker = MAKERS.get(facts.get("vendor_id", ""), "arm" if platform.machine() in ("aarch64", "arm64") else "other")
    return {
        "cpu": facts.get("model name") or platform.processor(),
        "kind": kind_of(maker, flags),
        "instruction_sets": [name for name in SHOWN if name in flags],
    }


def read_cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """Reads what Linux tells of the first core; nothing elsewhere."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def kind_of(maker: str, flags: list[str]) -> str:
    """Returns the name of a kind of processor: its maker and the best of ``LEVELS``."""
    return f"{maker}-{next((level for flag, level in LEVELS.items() if flag in flags), 'base')}"
