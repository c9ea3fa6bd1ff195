"""Measures the machine's limits: how fast it can read weights, and multiply matrices.

Decoding one token of one sequence reads every weight once, so memory bandwidth bounds it. The bound is right only if no
program reads faster, so one loop is not enough to measure it: a small C program (compiled on the spot; without a
compiler, NumPy) reads a buffer of the weights' size with all threads in several patterns, 1 to 16 streams per thread,
with and without prefetching. Passes of the patterns alternate; a pattern's bandwidth is that of its median pass, and
the machine's is that of the best pattern. Both small and huge pages are measured.

    python -m benchmarks.ceiling
    python -m benchmarks.ceiling --size 355M --threads 1
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import mmap
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.processors import describe_processor
from tf_gpt2.checkpoint.params import block_shapes, leaves
from tf_gpt2.config import SIZES, GPT2Config

PAGE_SIZES = ("small", "huge")
STREAMS = (1, 2, 4, 8, 16)
AHEAD_BYTES = (0, 1024, 4096)
HUGE_PAGE_BYTES = 2 << 20
DTYPES = ("float32", "bfloat16", "int8", "int4")
"""What our weights may be kept as."""
INT4_GROUP = 32
"""How many 4-bit weights have one scale, a bfloat16."""
MADV_NOHUGEPAGE = 15
"""A constant that Python's ``mmap`` lacks. Source: Linux, ``mman-common.h``."""


class Pattern(NamedTuple):
    """The way in which a thread reads.

    Attributes:
        streams: how many runs of memory it reads side by side.
        ahead_bytes: how far ahead of use it prefetches a line; 0 leaves that to the processor.
    """

    streams: int
    ahead_bytes: int


def main() -> None:
    arguments = parse_arguments()
    n_bytes = bytes_per_token(SIZES[arguments.size])
    result: dict[str, Any] = {"machine": describe_machine(), "bytes_per_token": n_bytes, "threads": arguments.threads}
    print(f"{arguments.size}, float32: {n_bytes / 1e6:.1f} MB read per token, {arguments.threads} threads")
    for pages in PAGE_SIZES:
        found = Reader(n_bytes, huge_pages=pages == "huge", n_threads=arguments.threads).measure(arguments.passes)
        result[pages] = found
        print(f"{pages:5} pages {found['bytes_per_s'] / 1e9:7.1f} GB/s  {found['bytes_per_s'] / n_bytes:6.1f} tokens/s")
        print(
            f"            best of: {', '.join(f'{name} {rate / 1e9:.1f}' for name, rate in found['patterns'].items())}"
        )
    result["gemm_flop_per_s"] = measure_gemm()
    print(f"matrix products {result['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s")
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="124M", help="size of model whose float32 weights to read")
    parser.add_argument("--threads", type=int, default=available_cores(), help="reading threads")
    parser.add_argument("--passes", type=int, default=9, help="passes per pattern")
    return parser.parse_args()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_per_token(config: GPT2Config, dtype: str = "float32") -> int:
    """Counts the bytes of our weights that one decoded token reads: all of them, but only one row of ``wpe``.

    Matrices in the blocks and ``wte`` have ``dtype``, but for int4 ``wte`` has int8; all else is float32.
    """
    shapes = [shape for _, shape in leaves(block_shapes(config))]
    matrices = [shape for shape in shapes if len(shape) == 2]
    n_matrix = config.n_layer * sum(math.prod(shape) for shape in matrices)
    n_scales = config.n_layer * sum(n_out for _, n_out in matrices)
    n_vector = config.n_layer * sum(math.prod(shape) for shape in shapes if len(shape) == 1) + 2 * config.n_embd
    n_head = config.n_vocab * config.n_embd
    matrix_bytes = {
        "float32": 4 * (n_matrix + n_head),
        "bfloat16": 2 * (n_matrix + n_head),
        "int8": n_matrix + n_head + 4 * (n_scales + config.n_vocab),
        "int4": n_matrix // 2 + 2 * (n_matrix // INT4_GROUP) + n_head + 4 * config.n_vocab,
    }
    return matrix_bytes[dtype] + 4 * n_vector


class Reader:
    """A buffer in memory, and the fastest ways to read it.

    Args:
        n_bytes: size of the buffer.
        huge_pages: whether to ask the kernel for pages of 2 MiB.
        n_threads: how many threads read.
    """

    def __init__(self, n_bytes: int, *, huge_pages: bool, n_threads: int):
        self.n_threads = n_threads
        self.memory, self.buffer = allocate(n_bytes, huge_pages=huge_pages)
        self.read_pass = compile_reader()
        self.patterns = [Pattern(*pair) for pair in itertools.product(STREAMS, AHEAD_BYTES)]
        if self.read_pass is None:
            self.patterns = [Pattern(1, 0)]

    def measure(self, n_passes: int = 5) -> dict[str, Any]:
        """Measures all patterns; returns the best one's ``bytes_per_s`` and, under ``patterns``, that of each."""
        times_s: dict[Pattern, list[float]] = {pattern: [] for pattern in self.patterns}
        for _ in range(n_passes):
            for pattern in self.patterns:
                times_s[pattern].append(self.time_pass(pattern))
        rates = {pattern: self.buffer.nbytes / statistics.median(times) for pattern, times in times_s.items()}
        return {
            "bytes_per_s": max(rates.values()),
            "method": "numpy" if self.read_pass is None else "c",
            "patterns": {f"{p.streams}+{p.ahead_bytes}": rate for p, rate in rates.items()},
        }

    def time_pass(self, pattern: Pattern) -> float:
        """Returns the seconds of one pass."""
        if self.read_pass is None:
            return time_numpy_pass(self.buffer, self.n_threads)
        return self.read_pass(
            self.buffer.ctypes.data, self.buffer.nbytes, self.n_threads, *pattern, ctypes.byref(ctypes.c_float())
        )


def allocate(n_bytes: int, *, huge_pages: bool) -> tuple[mmap.mmap, np.ndarray]:
    """Maps new memory; returns it and, within it, a float32 array of ones that starts at a huge page's border."""
    kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, **kind)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else MADV_NOHUGEPAGE)
    whole = np.frombuffer(memory, np.float32)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES // 4
    array = whole[start : start + n_bytes // 4]
    array.fill(1)
    return memory, array


def compile_reader() -> Callable[..., float] | None:
    """Compiles ``ceiling.c`` for this processor and returns its ``read_pass``; ``None`` without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceiling.so"
        source = Path(__file__).with_suffix(".c")
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-w", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            read_pass = ctypes.CDLL(str(library)).read_pass
        except (OSError, subprocess.CalledProcessError):
            return None
    read_pass.restype = ctypes.c_double
    read_pass.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.POINTER(ctypes.c_float)]
    return read_pass


def time_numpy_pass(buffer: np.ndarray, n_threads: int) -> float:
    """Reads the buffer once with NumPy, which leaves other threads free to do the same."""
    with ThreadPoolExecutor(n_threads) as pool:
        start = time.perf_counter()
        list(pool.map(np.max, np.array_split(buffer, n_threads)))
        return time.perf_counter() - start


def measure_gemm(n: int = 2048, n_repetitions: int = 5) -> float:
    """Measures the float32 operations per second of NumPy's product of two square matrices, on all cores."""
    a = np.ones((n, n), np.float32)
    times_s = []
    for _ in range(n_repetitions + 1):
        start = time.perf_counter()
        a @ a
        times_s.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times_s[1:])


def describe_machine() -> dict[str, Any]:
    """Describes the machine that the figures depend on: processor, cores, memory, kernel."""
    return {
        **describe_processor(),
        "n_cores": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
