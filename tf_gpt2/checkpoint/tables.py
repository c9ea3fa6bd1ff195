"""Parses the two binary forms in a TensorFlow checkpoint's small files: sorted tables, and protocol buffers.

A table has blocks of entries (name -> bytes), each block with a checksum; an index of the blocks; a footer. The file
may come from anyone: its length bounds the time and memory of reading it.

Source: tensorflow, ``core/lib/io/table_format.txt``, ``core/lib/hash/crc32c.h``; protobuf.dev, "Encoding".
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

FOOTER_BYTES, TRAILER_BYTES = 48, 5
MAGIC = bytes.fromhex("57fb808b247547db")
"""The last bytes of a table."""

MOST_NAME_BYTES = 1 << 25
"""Upper bound of all names together: an entry of a few bytes can repeat a long part of the name before it."""

Fields = dict[int, list["int | bytes"]]
"""A protocol buffer: the number of a field -> its values, in order."""


def read_table(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the names and values of a table, given the bytes of its file.

    Raises:
        ValueError, IndexError: when the table is damaged.
    """
    if len(body) < FOOTER_BYTES or body[-len(MAGIC) :] != MAGIC:
        raise ValueError("its last bytes are not those of a table")
    footer = body[-FOOTER_BYTES:]
    offset, size, _ = read_handle(footer, read_handle(footer, 0)[2])
    end, n_name_bytes, last = 0, 0, None
    for _, handle in read_block(body, offset, size):
        offset, size, _ = read_handle(handle, 0)
        if offset < end:
            raise ValueError("its blocks overlap")
        end = offset + size
        for name, value in read_block(body, offset, size):
            n_name_bytes += len(name)
            if n_name_bytes > MOST_NAME_BYTES or (last is not None and name <= last):
                raise ValueError("its names are too long, or not in order")
            last = name
            yield name, value


def read_block(body: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the entries of one block; each name repeats the first bytes of the one before."""
    block, trailer = body[offset : offset + size], body[offset + size : offset + size + TRAILER_BYTES]
    if len(trailer) < TRAILER_BYTES or size < 4:
        raise ValueError("it is cut short")
    if int.from_bytes(trailer[1:], "little") != masked_crc32c(block + trailer[:1]):
        raise ValueError("a checksum is wrong")
    if trailer[0]:
        raise ValueError("it is compressed, which TensorFlow's checkpoints are not")
    end = size - 4 * (1 + int.from_bytes(block[-4:], "little"))  # restart points follow the entries
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


def read_handle(body: bytes, at: int) -> tuple[int, int, int]:
    """Returns the offset and size of a block, and the place of the next handle."""
    offset, at = read_varint(body, at)
    size, at = read_varint(body, at)
    return offset, size, at


def read_varint(body: bytes, at: int) -> tuple[int, int]:
    """Returns an integer that is stored as seven bits per byte, and the place behind it."""
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
    """Computes CRC-32C as tables store it: rotated, so that data that contain checksums get another one."""
    table, crc = crc32c_table(), 0xFFFFFFFF
    for byte in body:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_fields(message: bytes) -> Fields:
    """Reads the fields of a protocol buffer from its bytes."""
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
    """Returns the value of an integer field; 0 when the message lacks it."""
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
