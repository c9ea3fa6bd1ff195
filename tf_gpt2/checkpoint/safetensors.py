"""Reads and writes files of safetensors: a list of tensors in JSON, then their bytes. Knows nothing of GPT-2.

Everything in the list is checked against the file's length before anything is read or allocated: the file may come from
anyone. A tensor's rows are read when they are asked for, and not mapped, so that no more of the file is in memory.

Source: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tf_gpt2.checkpoint.items import read_items
from tf_gpt2.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The name of a dtype of floats in a file -> NumPy's dtype."""

MOST_HEADER_BYTES = 1 << 24
"""Upper bound of the list's length; that of the largest GPT-2 has 60 kB."""

MOST_AXES = 8
LENGTH_BYTES = 8
"""The file begins with the length of the list."""


class StoredTensor:
    """A tensor in a file, read when its rows are asked for: ``tensor[:]``, ``tensor[10:20]``.

    Args:
        path: the file.
        dtype: of the numbers in it.
        shape: of the tensor.
        offset: of its first byte in the file.

    Attributes:
        shape, dtype: as given.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int):
        self.path, self.dtype, self.shape, self.offset = path, dtype, shape, offset

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Reads rows, that is places on the first axis, as an array.

        Raises:
            CheckpointError: when the file cannot be read, or is shorter than it was.
        """
        start, stop, _ = rows.indices(self.shape[0])
        n_rows, row_size = max(stop - start, 0), math.prod(self.shape[1:])
        offset = self.offset + start * row_size * self.dtype.itemsize
        return read_items(self.path, self.dtype, n_rows * row_size, offset).reshape(n_rows, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of it."""
        array = self[:]
        return array if dtype is None else array.astype(dtype, copy=False)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Reads the list of a file's tensors; those that are no floats are left out.

    Raises:
        CheckpointError: when the file cannot be read, is cut short, or its list lies.
    """
    with named_errors(path):
        header, n_bytes = read_header(path)
        return {
            name: stored_tensor(path, name[:200], entry, n_bytes, len(header))
            for name, entry in entries(header)
            if dtype_of(entry) in DTYPES
        }


def read_dtypes(path: Path) -> dict[str, str]:
    """Returns the names of all tensors of a file, those that are no floats, too, and of their dtypes: ``"I64"``.

    Raises:
        CheckpointError: as ``read_tensors``.
    """
    with named_errors(path):
        header, _ = read_header(path)
        return {name: dtype_of(entry) for name, entry in entries(header)}


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns what a damaged file raises into a CheckpointError that names the file."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path} as safetensors: {str(error)[:500]}; copy it again from its source"
        ) from error


def read_header(path: Path) -> tuple[bytes, int]:
    """Returns the list as it stands, and the number of bytes behind it."""
    if not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise ValueError("it is cut short")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"its list of tensors is longer than {MOST_HEADER_BYTES} bytes")
        return file.read(length), size - LENGTH_BYTES - length


def entries(header: bytes) -> list[tuple[str, Any]]:
    """Parses the list of tensors; raises ValueError for a name that occurs twice, and for tensors that share bytes."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    parsed = json.loads(header, object_pairs_hook=without_twins)
    if not isinstance(parsed, dict):
        raise ValueError("its list of tensors is no JSON object")
    parsed.pop("__metadata__", None)
    spans = sorted(span_of(name, entry) for name, entry in parsed.items())
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError("its tensors overlap")
    return list(parsed.items())


def span_of(name: str, entry: Any) -> tuple[int, int]:
    """Returns the first byte of a tensor, and the one behind its last, counted from the end of the list."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise ValueError(f"{name[:200]} has no place in it")
    return offsets[0], offsets[1]


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 0."""
    return type(value) is int and value >= 0


def dtype_of(entry: Mapping[str, Any]) -> str:
    """Returns the name of a tensor's dtype; raises ValueError when it is no text."""
    dtype = entry.get("dtype")
    if not isinstance(dtype, str):
        raise ValueError("a tensor has no dtype")
    return dtype


def stored_tensor(path: Path, name: str, entry: Mapping[str, Any], n_bytes: int, n_header: int) -> StoredTensor:
    """Checks one entry of the list."""
    shape, dtype = entry.get("shape"), DTYPES[entry["dtype"]]
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(is_count(size) for size in shape):
        raise ValueError(f"{name} has no shape")
    start, end = span_of(name, entry)
    if end > n_bytes:
        raise ValueError(f"{name} ends behind the end of the file")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes, which is not what its shape needs")
    return StoredTensor(path, dtype, tuple(shape), LENGTH_BYTES + n_header + start)


def write_tensors(path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]], arrays: Iterator[np.ndarray]) -> None:
    """Writes a file of float32 tensors, one at a time.

    Args:
        path: the file to write.
        tensors: the name and the shape of each.
        arrays: their numbers, in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, transformers refuses the file
    end = 0
    for name, shape in tensors:
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array, "<f4").data)
