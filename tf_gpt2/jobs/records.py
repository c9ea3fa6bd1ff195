"""Records: an id, a text and options of its own; a bad one becomes an answer with an error in the record's place.

Knows nothing of models and files, and imports no TensorFlow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

RecordId: TypeAlias = str | int
Answer: TypeAlias = dict[str, Any]
"""One line of the output: ``id``, what the job computes, and ``error``, which is ``None`` unless the record is bad."""

INVALID_JSON, INVALID_UTF8, INVALID_TYPE = "invalid_json", "invalid_utf8", "invalid_type"
EMPTY_TEXT, TOO_SHORT, TOO_LONG = "empty_text", "too_short", "context_length_exceeded"
UNKNOWN_OPTION, INVALID_OPTION = "unknown_option", "invalid_option"
CODES = (INVALID_JSON, INVALID_UTF8, INVALID_TYPE, EMPTY_TEXT, TOO_SHORT, TOO_LONG, UNKNOWN_OPTION, INVALID_OPTION)
"""What can be wrong with a record; ``error["code"]`` is one of them."""
MOST_SHOWN = 200
"""Characters that an error's message quotes of a record."""
ID_BITS = 63
"""Integers as ids fit into a signed column of 64 bits."""


class RecordError(ValueError):
    """What is wrong with one record.

    Args:
        code: one of ``CODES``.
        message: a sentence for people.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def as_value(self) -> dict[str, str]:
        """Returns what stands in the output under ``error``."""
        return {"code": self.code, "message": shown(str(self), 3 * MOST_SHOWN)}


class Record(NamedTuple):
    """One line of the input.

    Attributes:
        id: the user's, or the name of the file and the number of the line, as in ``"prompts.jsonl:17"``.
        text: what to continue, score or embed.
        options: those of this record alone; without those that are ``None``.
        error: what is wrong with it, or ``None``; then text and options mean nothing.
    """

    id: RecordId
    text: str
    options: Mapping[str, Any]
    error: RecordError | None = None


def shown(value: object, length: int = MOST_SHOWN) -> str:
    """Returns a value as a message quotes it: a str as it is, others by ``repr``, cut, and without lone surrogates."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= length else f"{text[:length]} … ({len(text) - length} more characters)"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def parse_json(line: bytes, place: str) -> Record:
    """Reads a line of JSONL.

    Args:
        line: bytes, without the line's end.
        place: the id of a record that has none.
    """
    try:
        fields = json.loads(decode(line), parse_constant=refuse_constant)
    except RecordError as error:
        return Record(place, "", {}, error)
    except (ValueError, RecursionError) as error:
        return Record(place, "", {}, RecordError(INVALID_JSON, f"the line must be JSON: {error}"))
    return make_record(fields, place)


def parse_text(line: bytes, place: str) -> Record:
    """Reads a line of text, whose id is its place."""
    try:
        return make_record({"text": decode(line)}, place)
    except RecordError as error:
        return Record(place, "", {}, error)


def make_record(fields: object, place: str) -> Record:
    """Makes a record of a mapping with ``text``, and perhaps ``id`` and options; a bad one has an error.

    Args:
        fields: as parsed; what is ``None`` counts as not there. A text may be bytes in UTF-8.
        place: the id of a record that has none, or none that is valid.
    """
    if not isinstance(fields, Mapping):
        message = f'a record must be an object such as {{"id": 1, "text": "To be"}}, got {shown(fields)}'
        return Record(place, "", {}, RecordError(INVALID_TYPE, message))
    options = {name: value for name, value in fields.items() if name not in ("id", "text") and value is not None}
    record_id = place
    try:
        record_id = check_id(fields.get("id"), place)
        return Record(record_id, check_text(fields.get("text")), options)
    except RecordError as error:
        return Record(record_id, "", {}, error)


def check_id(value: object, place: str) -> Any:
    """Returns an id: a str, an int, or the place where there is none."""
    if value is None:
        return place
    if isinstance(value, str) and is_unicode(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << ID_BITS) <= value < 1 << ID_BITS:
        return value
    raise RecordError(INVALID_TYPE, f"id must be a str or an integer of 64 bits, got {shown(value)}")


def check_text(value: object) -> str:
    """Returns a text that is not empty, and can be written as UTF-8."""
    text = decode(value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise RecordError(INVALID_TYPE, f"text must be a str, got {shown(text)}")
    if not is_unicode(text):
        raise RecordError(INVALID_UTF8, "text must be Unicode, and has half of a surrogate pair")
    if not text:
        raise RecordError(EMPTY_TEXT, "text must not be empty")
    return text


def decode(line: bytes) -> str:
    """Decodes UTF-8; raises RecordError for other bytes."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"text must be UTF-8, and has the byte 0x{line[error.start]:02x} at {error.start}"
        raise RecordError(INVALID_UTF8, message) from None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair, which JSON can escape, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else True


def refuse_constant(name: str) -> None:
    """Refuses NaN and infinities, which Python's JSON reads and no standard knows."""
    raise ValueError(f"{name} is not JSON")


def seed_of(seed: int, record_id: RecordId) -> int:
    """Computes a record's seed, in [0, 2**64), of the job's seed and the record's id; 7 and "7" are one id.

    Example:
        >>> seed_of(0, "7") == seed_of(0, 7) != seed_of(1, 7)
        True
    """
    digest = hashlib.sha256(f"{seed}:{record_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
