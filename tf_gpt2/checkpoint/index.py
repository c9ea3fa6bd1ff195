"""What a TensorFlow checkpoint holds, read from its small files ``checkpoint`` and ``<prefix>.index``.

An index is a sorted table of variable names: blocks of entries, each block with a checksum, and a footer. Knows nothing
of GPT-2, and needs no TensorFlow, so that a folder can be judged before TensorFlow starts.

Source of the formats: tensorflow ``core/lib/io/table_format.txt``, ``core/protobuf/tensor_bundle.proto``,
``python/training/checkpoint_state.proto``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

from tf_gpt2.errors import CheckpointError

FOOTER_BYTES, TRAILER_BYTES = 48, 5
MAGIC = bytes.fromhex("57fb808b247547db")
"""The last bytes of a table."""

MOST_INDEX_BYTES = 1 << 22
"""An index has some 40 bytes per variable: 21 kB for the largest GPT-2."""

MOST_NAME_BYTES = 1 << 25
"""Of all names together: an entry of a few bytes can repeat a long part of the name before it."""

MOST_STATE_BYTES = 1 << 20
"""The file ``checkpoint`` of a long training run names all that were kept."""

DTYPES = {1: "float32", 2: "float64", 3: "int32", 7: "string", 9: "int64", 14: "bfloat16", 19: "float16"}
"""Names of the numbers in TensorFlow's ``types.proto``."""

Fields = dict[int, list["int | bytes"]]
"""A protocol buffer: number of a field to its values, in their order."""


@dataclasses.dataclass(frozen=True)
class StoredVariable:
    """Where a variable's numbers are.

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
        folder: holds the file ``checkpoint``, which names the newest one; or is the path of one without its ending.
            A name with another machine's folders is looked for in ``folder``.

    Raises:
        CheckpointError: when there is none.
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
    """Whether a path is a folder that can be looked at; one that is too long is none."""
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False


def has_index(prefix: Path) -> bool:
    """Whether there is a table for a checkpoint of this path."""
    with contextlib.suppress(OSError):
        return prefix.name != "" and index_path(prefix).is_file()
    return False


def index_path(prefix: Path) -> Path:
    """Returns the path of a checkpoint's table."""
    return prefix.with_name(f"{prefix.name}.index")


def shard_path(prefix: Path, shard: int, n_shards: int) -> Path:
    """Returns the path of a data file."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{n_shards:05d}")


def read_small_file(path: Path, most_bytes: int, *, missing: str = "the checkpoint is not complete") -> bytes:
    """Reads a regular file whole, unless it is longer than any of its kind.

    Raises:
        CheckpointError: when there is no such file, or it is too long; ``missing`` says what that means.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{missing}: {path} is no file")
        with path.open("rb") as file:
            body = file.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{missing}: {path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{missing}: cannot read {path}: {error.strerror}") from error
    if len(body) > most_bytes:
        raise CheckpointError(f"{missing}: {path} is longer than {most_bytes} bytes, which no such file is")
    return body


def named_prefix(state: bytes) -> str | None:
    """Returns the ``model_checkpoint_path`` in the text of a file ``checkpoint``; None when there is none."""
    found = re.search(rb"""^[ \t]*model_checkpoint_path[ \t]*:[ \t]*(["'])((?:[^\\\n]|\\.)+?)\1""", state, re.MULTILINE)
    if found is None:
        return None
    try:  # Bytes that are no ASCII are written as they are, or as octal numbers.
        text = found[2].decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return None
    return text.decode("utf-8", "surrogateescape")


def read_index(prefix: Path) -> Index:
    """Reads the table of a checkpoint.

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
    """Reads a table from the bytes of its file.

    Raises:
        ValueError, IndexError: when it is damaged.
    """
    if len(body) < FOOTER_BYTES or body[-len(MAGIC) :] != MAGIC:
        raise ValueError("it does not end as one")
    footer = body[-FOOTER_BYTES:]
    place = read_handle(footer, read_handle(footer, 0)[2])
    variables, n_shards, end, last, n_name_bytes = {}, None, 0, None, 0
    for _, handle in read_block(body, *place[:2]):
        offset, size, _ = read_handle(handle, 0)
        if offset < end:
            raise ValueError("its blocks overlap")
        end = offset + size
        for name, entry in read_block(body, offset, size):
            n_name_bytes += len(name)
            if n_name_bytes > MOST_NAME_BYTES or (last is not None and name <= last):
                raise ValueError("its names are too long, or not in order")
            last = name
            if name == b"":  # the header comes first
                n_shards = read_header(entry)
            elif not name.startswith(b"\0"):  # that is a slice, and belongs to another entry
                variables[name.decode("utf-8")] = read_entry(entry)
    if n_shards is None:
        raise ValueError("it has no header")
    return Index(n_shards, variables)


def read_block(body: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the entries of one block; each name repeats the first bytes of the one before."""
    block, trailer = body[offset : offset + size], body[offset + size : offset + size + TRAILER_BYTES]
    if len(trailer) < TRAILER_BYTES or size < 4:
        raise ValueError("it is cut short")
    if int.from_bytes(trailer[1:], "little") != masked_crc32c(block + trailer[:1]):
        raise ValueError("a checksum is wrong")
    if trailer[0]:
        raise ValueError("it is compressed, which TensorFlow's checkpoints are not")
    end = size - 4 * (1 + int.from_bytes(block[-4:], "little"))  # Behind the entries are restart points.
    at, name = 0, b""
    while at < end:
        n_shared, at = read_varint(block, at)
        n_new, at = read_varint(block, at)
        n_value, at = read_varint(block, at)
        if n_shared > len(name) or at + n_new + n_value > end:
            raise ValueError("an entry is damaged")
        name = name[:n_shared] + block[at : at + n_new]
        at += n_new + n_value
        yield name, block[at - n_value : at]


def read_header(entry: bytes) -> int:
    """Returns the number of data files."""
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


def read_fields(message: bytes) -> Fields:
    """Reads the fields of a protocol buffer."""
    fields: Fields = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = read_varint(message, at)
            fields.setdefault(tag >> 3, []).append(value)
            continue
        size, at = read_varint(message, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, len(message)), at)
        if at + size > len(message) or tag < 8:
            raise ValueError("a message is damaged")
        fields.setdefault(tag >> 3, []).append(message[at : at + size])
        at += size
    return fields


def number(fields: Fields, key: int) -> int:
    """Returns an integer field, 0 when it is not there."""
    value = fields.get(key, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("a message is damaged")
    return value


def messages(fields: Fields, key: int) -> list[bytes]:
    """Returns the values of a field that holds messages."""
    values = [value for value in fields.get(key, []) if isinstance(value, bytes)]
    if len(values) < len(fields.get(key, [])):
        raise ValueError("a message is damaged")
    return values


def read_handle(body: bytes, at: int) -> tuple[int, int, int]:
    """Reads the offset and size of a block, and where the next handle starts."""
    offset, at = read_varint(body, at)
    size, at = read_varint(body, at)
    return offset, size, at


def read_varint(body: bytes, at: int) -> tuple[int, int]:
    """Reads an integer of seven bits per byte, and where the next one starts."""
    value = 0
    for shift in range(0, 70, 7):
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


@functools.cache
def crc32c_table() -> list[int]:
    """Computes the checksum of each byte: CRC-32 with Castagnoli's polynomial."""
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ 0x82F63B78 * (crc & 1) for crc in table]
    return table


def masked_crc32c(body: bytes) -> int:
    """Computes a checksum as tables store it: rotated, so that it differs from that of data with checksums inside."""
    table, crc = crc32c_table(), 0xFFFFFFFF
    for byte in body:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def places_that_lack_bytes(prefix: Path, index: Index, names: list[str]) -> str | None:
    """Describes the first data file that is missing or too short for some of these variables; None when all is well."""
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
