"""Answers -> files: JSONL or Parquet, under their names only when they are whole.

Imports no TensorFlow.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tf_gpt2.jobs.inputs import NEED_PYARROW
from tf_gpt2.jobs.kinds import Columns
from tf_gpt2.jobs.records import Answer

FORMATS = JSONL, PARQUET = "jsonl", "parquet"
UNFINISHED = ".tmp"
"""The ending of a file that is being written; its name begins with a dot, so that no engine reads it."""


def part_path(folder: Path, index: int, format: str) -> Path:
    """Returns where the answers of a part are when they are whole."""
    return folder / f"part-{index:06}.{format}"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path beside a file to write to; gives the file its name when all of it is on the disk.

    Two processes that write the same file do not disturb each other: the last one counts.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes files that killed processes were writing."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def write_answers(path: Path, answers: Sequence[Answer], columns: Columns) -> None:
    """Writes a part, in the format that the path's ending names.

    Args:
        path: of the file.
        answers: of a part.
        columns: all of them with their types, ``id`` and ``error`` included.
    """
    with whole_file(path) as beside:
        if path.suffix == f".{PARQUET}":
            write_parquet(beside, answers, columns)
        else:
            beside.write_bytes(b"".join(map(json_line, answers)))


def json_line(answer: Answer) -> bytes:
    """Returns a line of JSONL: id and error of a bad record, all but the error of another."""
    is_bad = answer["error"] is not None
    fields = {name: value for name, value in answer.items() if (name in ("id", "error")) == is_bad or name == "id"}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def write_parquet(path: Path, answers: Sequence[Answer], columns: Columns) -> None:
    """Writes a Parquet file; ids become text where the column is text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(NEED_PYARROW) from None
    table = pyarrow.Table.from_pylist(rows_of(answers, columns), schema=arrow_schema(columns))
    pyarrow.parquet.write_table(table, path)


def rows_of(answers: Sequence[Answer], columns: Columns) -> list[Answer]:
    """Returns answers as a table has them: all ids of one type."""
    if columns["id"] != "STRING":
        return list(answers)
    return [{**answer, "id": str(answer["id"])} for answer in answers]


def arrow_schema(columns: Columns) -> Any:
    """Returns pyarrow's schema of some columns."""
    import pyarrow

    of_name = {
        "STRING": pyarrow.string(),
        "INT": pyarrow.int32(),
        "BIGINT": pyarrow.int64(),
        "FLOAT": pyarrow.float32(),
        "DOUBLE": pyarrow.float64(),
    }

    def type_of(name: str) -> Any:
        if name.startswith("ARRAY<"):
            return pyarrow.list_(of_name[name[6:-1]])
        if name.startswith("STRUCT<"):
            fields = [field.split(": ") for field in name[7:-1].split(", ")]
            return pyarrow.struct([(field, of_name[kind]) for field, kind in fields])
        return of_name[name]

    return pyarrow.schema([(name, type_of(kind)) for name, kind in columns.items()])
