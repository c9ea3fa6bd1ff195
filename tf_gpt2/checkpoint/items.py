"""Reads a run of numbers, or of blocks of numbers, from any place in a file. Knows no format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tf_gpt2.errors import CheckpointError


def read_items(path: Path, dtype: np.dtype, n: int, offset: int) -> np.ndarray:
    """Reads ``n`` items that begin at a byte of a file, as an array (n,).

    Raises:
        CheckpointError: when the file cannot be read, or is shorter than it was when its lists were checked.
    """
    try:
        items = np.fromfile(path, dtype, n, offset=offset)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if items.size < n:
        raise CheckpointError(f"{path} became shorter while it was read; copy it again from its source")
    return items
