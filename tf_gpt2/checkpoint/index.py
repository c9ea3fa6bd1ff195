"""Reads the list of a TensorFlow checkpoint's variables, from its small files ``checkpoint`` and ``<prefix>.index``.

An index is a table of variable names. Knows nothing of GPT-2, and needs no TensorFlow, so that a folder can be checked
before TensorFlow starts.

Source: tensorflow, ``core/protobuf/tensor_bundle.proto``, ``python/training/checkpoint_state.proto``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from pathlib import Path

from tf_gpt2.checkpoint.tables import messages, number, read_fields, read_table
from tf_gpt2.errors import CheckpointError

MOST_INDEX_BYTES = 1 << 22
"""Upper bound of an index's length; it has some 40 bytes per variable: 21 kB for the largest GPT-2."""

MOST_STATE_BYTES = 1 << 20
"""Upper bound of the file ``checkpoint``; that of a long training run names each checkpoint that was kept."""

DTYPES = {1: "float32", 2: "float64", 3: "int32", 7: "string", 9: "int64", 14: "bfloat16", 19: "float16"}
"""The number of a dtype in TensorFlow's ``types.proto`` -> its name."""


@dataclasses.dataclass(frozen=True)
class StoredVariable:
    """The place of a variable's numbers in the data files.

    Attributes:
        dtype: such as ``"float32"``.
        shape: as stored.
        shard: number of the data file; None when the variable is stored in slices.
        offset, n_bytes: its place in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: int | None
    offset: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Index:
    """The table of a checkpoint: number of its data files, and name to variable."""

    n_shards: int
    variables: dict[str, StoredVariable]


def find_prefix(folder: str | Path) -> Path:
    """Finds a checkpoint's path without its ending.

    Args:
        folder: holds the file ``checkpoint``, which names the newest checkpoint; or is the path of a checkpoint without
            its ending. A name with another machine's folders is looked up in ``folder``.

    Raises:
        CheckpointError: when there is no checkpoint.
    """
    folder = Path(folder)
    if not is_folder(folder):
        if has_index(folder):
            return folder
        raise CheckpointError(f"no checkpoint at {folder}: it is neither a folder nor the path of one without .index")
    named = named_prefix(read_small_file(folder / "checkpoint", MOST_STATE_BYTES, missing=f"no checkpoint in {folder}"))
    if named is None:
        raise CheckpointError(f"no checkpoint in {folder}: its file 'checkpoint' has no model_checkpoint_path")
    beside = folder / re.split(r"[/\\]" if re.match(r"[A-Za-z]:|\\", named) else "/", named)[-1]
    for prefix in (beside, folder / named) if Path(named).is_absolute() else (folder / named, beside):
        if has_index(prefix):
            return prefix
    raise CheckpointError(
        f"no checkpoint in {folder}: its file 'checkpoint' names {named[:200]!r}, "
        f"and {beside.name[:200]}.index is not there"
    )


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False, too, for a path that the system refuses, such as one that is too long."""
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False


def is_file(path: Path) -> bool:
    """Whether a path is a file's; False for one that no file can have."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def has_index(prefix: Path) -> bool:
    """Whether a checkpoint of this path has an index."""
    with contextlib.suppress(OSError):
        return prefix.name != "" and index_path(prefix).is_file()
    return False


def index_path(prefix: Path) -> Path:
    """Returns the path of a checkpoint's index."""
    return prefix.with_name(f"{prefix.name}.index")


def shard_path(prefix: Path, shard: int, n_shards: int) -> Path:
    """Returns the path of a data file."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{n_shards:05d}")


def read_small_file(path: Path, most_bytes: int, *, missing: str = "the checkpoint is not complete") -> bytes:
    """Reads a regular file whole.

    Args:
        path: the file.
        most_bytes: the length of the longest file to accept.
        missing: the first words of the error's message: what it means that the file cannot be read.

    Raises:
        CheckpointError: when there is no such file, or it is too long.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{missing}: {path} is not a file")
        with path.open("rb") as file:
            body = file.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{missing}: {path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{missing}: cannot read {path}: {error.strerror}") from error
    if len(body) > most_bytes:
        raise CheckpointError(f"{missing}: {path} is longer than {most_bytes} bytes; no such file is")
    return body


def named_prefix(state: bytes) -> str | None:
    """Returns the ``model_checkpoint_path`` in the text of a file ``checkpoint``; None when it has no such line."""
    match = re.search(rb"""^[ \t]*model_checkpoint_path[ \t]*:[ \t]*(["'])((?:[^\\\n]|\\.)+?)\1""", state, re.MULTILINE)
    if match is None:
        return None
    try:  # Bytes outside ASCII are written as they are, or as octal numbers.
        text = match[2].decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return None
    return text.decode("utf-8", "surrogateescape")


def read_index(prefix: Path) -> Index:
    """Reads the index of a checkpoint.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    path = index_path(prefix)
    body = read_small_file(path, MOST_INDEX_BYTES)
    try:
        return parse_index(body)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not the index of a checkpoint: {error}") from error


def parse_index(body: bytes) -> Index:
    """Reads an index from the bytes of its file.

    Raises:
        ValueError, IndexError: when it is damaged.
    """
    variables, n_shards = {}, None
    for name, entry in read_table(body):
        if name == b"":  # the header comes first
            n_shards = read_header(entry)
        elif not name.startswith(b"\0"):  # the other names are slices, which belong to another entry
            variables[name.decode("utf-8")] = read_entry(entry)
    if n_shards is None:
        raise ValueError("it has no header")
    return Index(n_shards, variables)


def read_header(entry: bytes) -> int:
    """Returns the number of data files, from the bytes of the header."""
    fields = read_fields(entry)
    if number(fields, 2):
        raise ValueError("its numbers are big-endian")
    return number(fields, 1)


def read_entry(entry: bytes) -> StoredVariable:
    """Reads the place and shape of one variable."""
    fields = read_fields(entry)
    dims = [read_fields(dim) for dim in messages(read_fields(b"".join(messages(fields, 2))), 2)]
    dtype = number(fields, 1)
    return StoredVariable(
        dtype=DTYPES.get(dtype, f"dtype {dtype}"),
        shape=tuple(number(dim, 1) for dim in dims),
        shard=None if 7 in fields else number(fields, 3),
        offset=number(fields, 4),
        n_bytes=number(fields, 5),
    )


def places_that_lack_bytes(prefix: Path, index: Index, names: list[str]) -> str | None:
    """Describes the first data file that is missing, or too short for these variables; returns None when all fit."""
    ends: dict[int, int] = {}
    for name in names:
        variable = index.variables[name]
        if variable.shard is not None:
            ends[variable.shard] = max(ends.get(variable.shard, 0), variable.offset + variable.n_bytes)
            if variable.n_bytes != 4 * math.prod(variable.shape):
                return f"{name} takes {variable.n_bytes} bytes, which does not fit its shape"
    for shard, end in sorted(ends.items()):
        path = shard_path(prefix, shard, index.n_shards)
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size < end:
            return f"{path.name} has {path.stat().st_size} bytes and must have {end} or more"
    return None
