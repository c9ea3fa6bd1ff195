"""Input files -> parts of some records each: JSONL, text (both plain or gzip) and Parquet.

A plan reads every file once, to count, to hash and to see that it can be read. A part then says where its records are,
so that any process on any machine that sees the files can read them. Imports no TensorFlow.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tf_gpt2.jobs.kinds import Job
from tf_gpt2.jobs.records import Record, make_record, parse_json, parse_text

JSONL, TEXT, PARQUET = "jsonl", "text", "parquet"
ENDINGS = {".jsonl": JSONL, ".ndjson": JSONL, ".json": JSONL, ".txt": TEXT, ".parquet": PARQUET}
"""What a file holds, by the end of its name; ``.gz`` may follow but for Parquet."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BYTES_PER_PART = 64 << 20
"""Text after which a part ends before it has all its records, so that a worker's memory stays bounded."""
ROWS_AT_ONCE = 1024
"""Rows of Parquet that are decoded together."""
NEED_PYARROW = "Parquet needs pyarrow; pip install 'tf_gpt2[parquet]'"

OnRead = Callable[[int], None]
"""Is told how many bytes were read since the last call."""


@dataclasses.dataclass(frozen=True)
class InputFile:
    """One file of the input.

    Attributes:
        path: where it is.
        name: its path below the folder that all files share; ids of records that have none begin with it.
        format: ``"jsonl"``, ``"text"`` or ``"parquet"``.
    """

    path: Path
    name: str
    format: str

    @property
    def is_gzip(self) -> bool:
        """Whether its lines are compressed."""
        return self.path.suffix == ".gz"


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of one file, which make one file of the output.

    Attributes:
        index: which of all parts it is, from 0.
        file: where the records are.
        first: the number of the first line, or row, from 0.
        offset: where that line begins, in bytes; 0 where lines are compressed, or in Parquet.
        n_records: how many there are.
    """

    index: int
    file: InputFile
    first: int
    offset: int
    n_records: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All parts of all files.

    Attributes:
        parts: in the order of files and lines.
        hashes: SHA-256 of each file's bytes, by its name.
    """

    parts: list[Part]
    hashes: dict[str, str]

    @property
    def n_records(self) -> int:
        """How many records there are."""
        return sum(part.n_records for part in self.parts)


def find_files(patterns: Iterable[str | Path], output: Path | None = None) -> list[InputFile]:
    """Finds the files that patterns such as ``"prompts-*.jsonl"`` name, each once, in the order of their paths.

    Args:
        patterns: paths, or patterns.
        output: the job's own folder, in which patterns find nothing: ``"**/*.jsonl"`` would name its parts on resuming.

    Raises:
        FileNotFoundError: when a pattern names no file.
        ValueError: when a file's name does not tell what it holds.
    """
    paths: set[Path] = set()
    for pattern in patterns:
        is_name = Path(pattern).is_file()  # perhaps with brackets in it
        found = [str(pattern)] if is_name else glob.glob(str(pattern), recursive=True)  # noqa: PTH207  # absolute, too
        files = [Path(os.path.abspath(path)) for path in found if Path(path).is_file()]  # noqa: PTH100  # without ".."
        files = [path for path in files if is_name or output not in path.parents]
        if not files:
            hint = f"; it is a folder, name its files as {pattern}/*.jsonl" if Path(pattern).is_dir() else ""
            raise FileNotFoundError(f"input names no file: {str(pattern)!r}{hint}")
        paths.update(files)
    in_order = sorted(paths)
    root = Path(os.path.commonpath([path.parent for path in in_order])) if in_order else Path()
    return [InputFile(path, str(path.relative_to(root)), format_of(path)) for path in in_order]


def format_of(path: Path) -> str:
    """Returns what a file holds, by its name."""
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending not in ENDINGS or (path.suffix == ".gz" and ENDINGS[ending] == PARQUET):
        raise ValueError(
            f"input must end in {', '.join(ENDINGS)}, or .gz behind one of lines, got {path.name!r}; rename it"
        )
    return ENDINGS[ending]


def plan(files: Sequence[InputFile], job: Job, part_size: int, on_read: OnRead = lambda n_bytes: None) -> Plan:
    """Reads all files once, and cuts them into parts.

    Args:
        files: as found.
        job: whose options Parquet's columns must be.
        part_size: most records of one part.
        on_read: told of the bytes read.

    Raises:
        ImportError: when a file is Parquet and pyarrow is missing.
        OSError: when a file cannot be read.
        ValueError: when gzip or Parquet is damaged, a column is no option, or there are no records.
    """
    hashes, cuts = {}, []
    for file in files:
        hashes[file.name] = hash_of(file.path, on_read)
        found = cut_rows(file, job, part_size) if file.format == PARQUET else cut_lines(file, part_size)
        cuts += [(file, *cut) for cut in found]
    if not cuts:
        raise ValueError(f"input has no records: {', '.join(file.name for file in files)}")
    return Plan([Part(i, *cut) for i, cut in enumerate(cuts)], hashes)


def hash_of(path: Path, on_read: OnRead = lambda n_bytes: None) -> str:
    """Computes the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            on_read(len(block))
    return digest.hexdigest()


def open_lines(file: InputFile) -> BinaryIO:
    """Opens a file of lines, compressed or not."""
    return gzip.open(file.path, "rb") if file.is_gzip else file.path.open("rb")  # type: ignore[return-value]


def cut_lines(file: InputFile, part_size: int) -> Iterator[tuple[int, int, int]]:
    """Yields ``(first, offset, n_records)`` of each part."""
    first = offset = position = n_records = 0
    with open_lines(file) as lines:
        for number, line in enumerate(readable(file, lines)):
            if n_records == part_size or (n_records and position - offset > BYTES_PER_PART):
                yield first, offset, n_records
                first, n_records = number, 0
                offset = 0 if file.is_gzip else position
            if not n_records and not is_record(file, line):
                first, offset = number + 1, 0 if file.is_gzip else position + len(line)
            n_records += is_record(file, line)
            position += len(line)
    if n_records:
        yield first, offset, n_records


def is_record(file: InputFile, line: bytes) -> bool:
    """Whether a line is a record: blank lines of JSONL are none, those of text are empty ones."""
    return file.format == TEXT or bool(line.strip())


def readable(file: InputFile, lines: BinaryIO) -> Iterator[bytes]:
    """Yields lines; raises ValueError where they are compressed and damaged."""
    try:
        yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"input {file.path} is not whole gzip: {error}; compress or fetch it again") from None


def open_parquet(path: Path) -> Any:
    """Opens a Parquet file.

    Raises:
        ImportError: when pyarrow is missing.
        ValueError: when the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(NEED_PYARROW) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"input {path} is not Parquet: {error}") from None


def cut_rows(file: InputFile, job: Job, part_size: int) -> Iterator[tuple[int, int, int]]:
    """Yields ``(first, 0, n_records)`` of each part."""
    with open_parquet(file.path) as table:
        check_columns(file.name, table.schema_arrow.names, job)
        n_rows = table.metadata.num_rows
    for first in range(0, n_rows, part_size):
        yield first, 0, min(part_size, n_rows - first)


def check_columns(source: str, names: Sequence[str], job: Job) -> None:
    """Raises ValueError unless a table's columns are ``text``, perhaps ``id``, and options of a record."""
    if "text" not in names:
        raise ValueError(f"{source} must have a column 'text', and has {', '.join(names)}")
    for name in names:
        if name not in ("id", "text", *job.per_record):
            raise ValueError(f"{source} has the column {name!r}: {job.no_option(name)}; leave it out")


def read_part(part: Part) -> list[Record]:
    """Reads the records of a part."""
    return list(read_rows(part) if part.file.format == PARQUET else read_lines(part))


def read_lines(part: Part) -> Iterator[Record]:
    """Yields the records of a part of lines."""
    file = part.file
    parse = parse_text if file.format == TEXT else parse_json
    with open_lines(file) as lines:
        lines.seek(part.offset)
        n_before = part.first if file.is_gzip else 0
        numbered = enumerate(itertools.islice(readable(file, lines), n_before, None), part.first)
        records = ((number, line) for number, line in numbered if is_record(file, line))
        for number, line in itertools.islice(records, part.n_records):
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
            yield parse(line.removesuffix(b"\n").removesuffix(b"\r"), f"{file.name}:{number + 1}")


def read_rows(part: Part) -> Iterator[Record]:
    """Yields the records of a part of Parquet: opens only its row groups, and reads few rows at once."""
    end, position = part.first + part.n_records, 0
    with open_parquet(part.file.path) as table:
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if position < end and position + n_rows > part.first:
                batches = whole(table.iter_batches(ROWS_AT_ONCE, [group]), part.file.path)
                for number, fields in rows_between(batches, part.first - position, end - position):
                    yield make_record(fields, f"{part.file.name}:{position + number + 1}")
            position += n_rows


def whole(batches: Iterable[Any], path: Path) -> Iterator[Any]:
    """Yields Arrow's batches; raises ValueError where the file is damaged."""
    try:
        yield from batches
    except OSError as error:
        raise ValueError(f"input {path} is damaged: {error}; fetch or write it again") from None


def rows_between(batches: Iterable[Any], first: int, end: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows from ``first`` up to ``end`` of Arrow's batches, with their numbers."""
    position = 0
    for batch in batches:
        start = max(0, first - position)
        if start < batch.num_rows:
            yield from enumerate(rows_of(batch.slice(start, max(0, end - position - start))), position + start)
        position += batch.num_rows
        if position >= end:
            return


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Returns Arrow's rows as dicts; a text that is not UTF-8, which Parquet may hold, as bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [{name: value_of(batch[name][i]) for name in batch.schema.names} for i in range(batch.num_rows)]


def value_of(scalar: Any) -> Any:
    """Returns one of Arrow's values as Python's; bytes where it has text that is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer()) if hasattr(scalar, "as_buffer") else repr(scalar.type).encode()


def id_type(part: Part) -> str:
    """Returns the type of a part's ids in a table: integers if Parquet's column has nothing else, else text."""
    if part.file.format != PARQUET:
        return "STRING"
    with open_parquet(part.file.path) as table:
        names = table.schema_arrow.names
        if "id" not in names or not str(table.schema_arrow.field("id").type).startswith("int"):
            return "STRING"
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]  # a struct has several
        found = [column.statistics for column in columns if column.path_in_schema == "id"]
        has_all = all(one is not None and one.null_count == 0 for one in found)
        return "BIGINT" if has_all else "STRING"
