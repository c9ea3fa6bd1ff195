"""Text files -> batches of token ids to train on: packed windows, in an order that is a function of the seed alone.

All documents stand in one long row of ids, each followed by ``<|endoftext|>``; training cuts it into windows without
padding. The row may be longer than memory: ids of large files are kept in a file beside them and mapped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tensorflow as tf
from tqdm import tqdm

from tf_gpt2.tokenizer.encoder import Encoder

SUFFIXES = (".txt", ".jsonl", ".bin")
"""Endings of the files that are read in a folder."""

LLM_C_MAGIC, LLM_C_HEADER = 20240520, 256
"""The first number of llm.c's files of ids, and the header's length in int32. Source: llm.c, ``data_common.py``."""

CHARACTERS_AT_ONCE = 1 << 20
"""Characters of a text file that are encoded at once."""

MOST_IN_MEMORY = 1 << 24
"""Text files of more bytes get a file of ids beside them, which is mapped, and found again by the next run."""

SAFE_CUT = regex.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
"""Matches where a text can be cut so that its two parts, encoded by themselves, have the ids of the whole.

Before a single space, and behind a single line feed: the encoder's pattern begins a new piece there in any case.
"""


class DataError(ValueError):
    """A file to train on is missing, empty or not what its ending says."""


@dataclasses.dataclass(frozen=True)
class Ids:
    """One long row of ids, in several arrays that may be mapped files.

    Attributes:
        arrays: uint16 or uint32, each (n,).
    """

    arrays: Sequence[np.ndarray]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.arrays else 0

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(array) for array in self.arrays])

    def read(self, start: int, n: int) -> np.ndarray:
        """Returns ``n`` ids from ``start`` on, int32; behind the last comes the first again."""
        parts, length = [], len(self)
        while n > 0:
            start %= length
            i = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[i - 1]) if i else 0
            part = self.arrays[i][start - first : start - first + n]
            parts.append(part)
            start, n = start + len(part), n - len(part)
        return np.concatenate(parts).astype(np.int32)

    def part(self, start: int, end: int) -> Ids:
        """Returns the ids in [start, end); copies nothing."""
        firsts = self._ends - [len(array) for array in self.arrays]
        parts = [
            array[max(0, start - first) : max(0, end - first)]
            for array, first in zip(self.arrays, firsts.tolist(), strict=True)
        ]
        return Ids([part for part in parts if len(part)])

    def split(self, n_held_out: int) -> tuple[Ids, Ids]:
        """Returns all but the last ``n_held_out`` ids, and these."""
        cut = len(self) - n_held_out
        return self.part(0, cut), self.part(cut, len(self))

    def fingerprint(self) -> str:
        """Returns a name for the content: another text has another, however it is cut into arrays."""
        digest = hashlib.sha256()
        for array in self.arrays:
            for start in range(0, len(array), MOST_IN_MEMORY):
                digest.update(array[start : start + MOST_IN_MEMORY].astype("<i4").tobytes())
        return digest.hexdigest()[:16]


def text_dataset(
    files: str | Path | Iterable[str | Path],
    encoder: Encoder,
    *,
    n_ctx: int,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = 1,
    field: str = "text",
    n_held_out: int = 0,
    part: str = "training",
) -> tf.data.Dataset:
    """Makes a dataset of packed windows for ``model.fit`` and ``finetune``.

    Window i of epoch e is a function of the seed, e and i alone. Each epoch starts its windows at another id, so that
    their borders differ; each id is the target of one window per epoch, but for fewer than ``n_ctx`` of them.

    Args:
        files: a file, a folder, or several: ``.txt`` in UTF-8, ``.jsonl`` with the text in ``field``, and ``.bin``, ids
            as nanoGPT or llm.c write them. A folder stands for all such files in it and below, sorted by name.
        encoder: the vocabulary.
        n_ctx: length of a window in tokens.
        batch_size: windows per batch.
        seed: of the order.
        epochs: how often each window comes, in another order each time; ``None`` for ever.
        field: the key of the text in ``.jsonl``.
        n_held_out: how many ids at the end to hold out.
        part: ``"training"``, shuffled and for ``epochs``; or ``"held_out"``: the ids held out, once, in order, the last
            window filled up with labels of -1.

    Returns:
        A dataset of ``(ids, targets)``, both int32 (batch_size, n_ctx); targets are the ids moved by one.

    Raises:
        DataError: when a file is missing, empty, of an unknown kind, or has ids that are not in the vocabulary.
        ValueError: when a number is out of range.

    Example:
        >>> from tf_gpt2.checkpoint.download import embedded_dir
        >>> encoder = Encoder.from_files(embedded_dir())
        >>> dataset = text_dataset(embedded_dir() / "README.md", encoder, n_ctx=16, batch_size=2)
        >>> ids, targets = next(iter(dataset))
        >>> bool((ids[:, 1:] == targets[:, :-1]).numpy().all())
        True
    """
    if part not in ("training", "held_out"):
        raise ValueError(f"part must be 'training' or 'held_out', got {part!r}")
    training, held_out = read_ids(files, encoder, field=field).split(n_held_out)
    if part == "held_out":
        return held_out_windows(held_out, n_ctx=n_ctx, batch_size=batch_size)
    return shuffled_windows(training, n_ctx=n_ctx, batch_size=batch_size, seed=seed, epochs=epochs)


# ---- ids -> windows


def shuffled_windows(
    ids: Ids, *, n_ctx: int, batch_size: int, seed: int = 0, epochs: int | None = None
) -> tf.data.Dataset:
    """Makes the training part of ``text_dataset`` from ids."""
    check_sizes(ids, n_ctx=n_ctx, batch_size=batch_size)
    n_windows = windows_per_epoch(ids, n_ctx)
    n_batches = np.iinfo(np.int64).max if epochs is None else -(-n_windows * epochs // batch_size)

    def batch(number: np.ndarray) -> np.ndarray:
        first = int(number) * batch_size
        return np.stack([window(ids, n_ctx, seed, first + row) for row in range(batch_size)])

    return batches(batch, int(n_batches), (batch_size, n_ctx))


def held_out_windows(ids: Ids, *, n_ctx: int, batch_size: int) -> tf.data.Dataset:
    """Makes the held-out part of ``text_dataset`` from ids: each id but the first is a target once."""
    check_sizes(ids, n_ctx=n_ctx, batch_size=batch_size)
    n_targets = len(ids) - 1
    n_batches = -(-n_targets // (n_ctx * batch_size))

    def batch(number: np.ndarray) -> np.ndarray:
        first = int(number) * batch_size * n_ctx
        rows = ids.read(first, min(batch_size * n_ctx + 1, len(ids) - first))
        rows = np.pad(rows, (0, batch_size * n_ctx + 1 - len(rows)), constant_values=-1)
        return np.stack([rows[i * n_ctx : (i + 1) * n_ctx + 1] for i in range(batch_size)])

    return batches(batch, n_batches, (batch_size, n_ctx))


def batches(batch: Callable[[np.ndarray], np.ndarray], n: int, shape: tuple[int, int]) -> tf.data.Dataset:
    """Makes a dataset of ``(ids, targets)`` from a function of the batch's number; ids below 0 are read as 0."""

    def of_number(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        windows = tf.ensure_shape(tf.numpy_function(batch, [number], tf.int32), (shape[0], shape[1] + 1))
        return tf.maximum(windows[:, :-1], 0), windows[:, 1:]

    return tf.data.Dataset.range(n).map(of_number).prefetch(2)


def window(ids: Ids, n_ctx: int, seed: int, number: int) -> np.ndarray:
    """Returns a window and the id behind it, int32 (n_ctx + 1,); windows are numbered through all epochs."""
    epoch, i = divmod(number, windows_per_epoch(ids, n_ctx))
    start, order = order_of(windows_per_epoch(ids, n_ctx), n_ctx, seed, epoch)
    return ids.read(start + int(order[i]) * n_ctx, n_ctx + 1)


@functools.lru_cache(maxsize=4)
def order_of(n_windows: int, n_ctx: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """Returns at which id the first window of an epoch starts, and the order of its windows."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(n_ctx)), rng.permutation(n_windows)


def windows_per_epoch(ids: Ids, n_ctx: int) -> int:
    """Returns how many windows an epoch has."""
    return max(1, len(ids) // n_ctx)


def check_sizes(ids: Ids, *, n_ctx: int, batch_size: int) -> None:
    """Raises unless there are ids, and the numbers are at least 1."""
    for name, value in (("n_ctx", n_ctx), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(ids) < 2:
        raise DataError(f"files must have at least 2 tokens to train on or to test with, got {len(ids)}")


# ---- files -> ids


def read_ids(files: str | Path | Iterable[str | Path], encoder: Encoder, *, field: str = "text") -> Ids:
    """Reads files as ``text_dataset`` does, as one row of ids."""
    paths = list(find_files([files] if isinstance(files, str | Path) else files))
    if not paths:
        raise DataError("files must name at least one file, got none")
    return Ids([array for path in paths if len(array := read_file(path, encoder, field))])


def find_files(files: Iterable[str | Path]) -> Iterator[Path]:
    """Yields the files that are named, and those in the folders that are named."""
    for path in map(Path, files):
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not inside:
            raise DataError(f"files: the folder {path} has no file that ends in {', '.join(SUFFIXES)}")
        yield from inside


def read_file(path: Path, encoder: Encoder, field: str) -> np.ndarray:
    """Returns a file's ids, (n,), mapped where it is large."""
    try:
        size = path.stat().st_size
        if path.suffix == ".bin":
            return read_bin(path, max(encoder.decoder) + 1)
        if size <= MOST_IN_MEMORY:
            return encoded(path, encoder, field, size)
        return mapped(path, encoder, field, size)
    except OSError as error:
        raise DataError(f"files: cannot read {path}: {error.strerror or error}") from error


def read_bin(path: Path, n_vocab: int) -> np.ndarray:
    """Maps a file of ids: nanoGPT's bare uint16, or llm.c's with its header."""
    header, size = np.fromfile(path, "<i4", LLM_C_HEADER), path.stat().st_size
    is_llm_c = len(header) == LLM_C_HEADER and header[0] == LLM_C_MAGIC
    if is_llm_c and header[1] != 1:
        raise DataError(f"files: {path} has ids of llm.c's version {header[1]}, must be 1, which is GPT-2's")
    offset = 4 * LLM_C_HEADER if is_llm_c else 0
    if size % 2:
        raise DataError(f"files: {path} has {size} bytes, must be ids of two bytes each; copy or make it again")
    if size == offset:
        return np.zeros(0, np.uint16)  # what is empty cannot be mapped
    ids = np.memmap(path, "<u2", "r", offset=offset)
    if is_llm_c and len(ids) != header[2]:
        raise DataError(f"files: {path} should have {header[2]} ids and has {len(ids)}; copy it again")
    largest = max(int(ids[i : i + MOST_IN_MEMORY].max()) for i in range(0, len(ids), MOST_IN_MEMORY))
    if largest >= n_vocab:
        raise DataError(
            f"files: {path} has the id {largest}, and the vocabulary ids below {n_vocab}; is it this model's?"
        )
    return ids


def encoded(path: Path, encoder: Encoder, field: str, size: int) -> np.ndarray:
    """Encodes a file in memory."""
    parts = list(ids_of_file(path, encoder, field, size))
    return np.concatenate(parts) if parts else np.zeros(0, dtype_of(encoder))


def mapped(path: Path, encoder: Encoder, field: str, size: int) -> np.ndarray:
    """Encodes a file into a file of ids beside it, unless that is there, and maps it."""
    state = json.dumps([path.stat().st_mtime_ns, size, field, sorted(encoder.encoder.items())])
    target = path.with_name(f"{path.name}.{hashlib.sha256(state.encode()).hexdigest()[:12]}.ids")
    if not target.exists():
        staging = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            with staging.open("wb") as file:
                for ids in ids_of_file(path, encoder, field, size):
                    file.write(ids.tobytes())
            staging.replace(target)
        finally:
            staging.unlink(missing_ok=True)
    return np.memmap(target, dtype_of(encoder), "r")


def dtype_of(encoder: Encoder) -> Any:
    """Returns the smallest dtype that holds all ids."""
    return np.uint16 if len(encoder) <= 1 << 16 else np.uint32


def ids_of_file(path: Path, encoder: Encoder, field: str, size: int) -> Iterator[np.ndarray]:
    """Yields the ids of a file part by part, each document's followed by ``<|endoftext|>``; shows a bar."""
    end = [] if encoder.end_of_text is None else [encoder.end_of_text]
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"Encoding {path.name}", unit="B", unit_scale=True, delay=1, leave=False) as bar,
    ):
        texts = documents(file, path, field) if path.suffix == ".jsonl" else parts_of_text(file, path)
        for text, is_end in texts:
            yield np.array(encoder.encode(text) + (end if is_end else []), dtype_of(encoder))
            bar.update(file.tell() - bar.n)


def documents(file: Any, path: Path, field: str) -> Iterator[tuple[str, bool]]:
    """Yields the documents of a JSONL file."""
    for number, line in enumerate(iter(file.readline, b""), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"files: line {number} of {path} is no JSON object with the key {field!r}; name the key with field"
            ) from None
        if not isinstance(text, str):
            raise DataError(f"files: {field!r} in line {number} of {path} must be text, got {type(text).__name__}")
        yield text, True


def parts_of_text(file: Any, path: Path) -> Iterator[tuple[str, bool]]:
    """Yields a text in parts whose ids, one behind the other, are those of the whole; the last is marked."""
    rest, is_first = b"", True
    while block := file.read(CHARACTERS_AT_ONCE):
        if is_first:
            block, is_first = block.removeprefix(b"\xef\xbb\xbf"), False
        rest += block
        text = decoded(rest[: whole_characters(rest)], path)
        cut = last_cut(text)
        if cut:
            yield text[:cut], False
            rest = rest[len(text[:cut].encode()) :]
    if rest:
        yield decoded(rest, path), True


def whole_characters(data: bytes) -> int:
    """Returns how many bytes remain when a character that is cut off at the end is left out."""
    for n in range(1, min(4, len(data)) + 1):
        byte = data[-n]
        if byte >= 0xC0:  # begins a character of several bytes
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - n if n < length else len(data)
        if byte < 0x80:
            break
    return len(data)


def last_cut(text: str) -> int:
    """Returns the last place where ``SAFE_CUT`` allows to cut; 0 where there is none.

    The last characters are left out: what follows them decides whether a cut is safe.
    """
    found = 0
    for size in (1000, len(text)):
        for match in SAFE_CUT.finditer(text, max(0, len(text) - size), max(0, len(text) - 2)):
            found = match.start()
        if found:
            break
    return found


def decoded(data: bytes, path: Path) -> str:
    """Decodes UTF-8, with a line feed at each line's end as in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"files: {path} must be text in UTF-8, and has the byte 0x{data[error.start]:02x}, which is not; "
            f"convert it, as with iconv -t UTF-8"
        ) from None
