"""Reads a ``GPT2Model`` that Keras saved: ``model.keras``, or ``*.weights.h5`` with ``hparams.json`` beside it.

The files are read as data: nothing that they name is imported or run. Needs h5py, which Keras brings, and no
TensorFlow. The vocabulary lies beside the file, as OpenAI's two files.

Source: keras 3.15, ``saving/saving_lib.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import MOST_HPARAMS_BYTES, GPT2Config
from tf_gpt2.errors import CheckpointError

MODEL, WEIGHTS, HPARAMS = "model.keras", "model.weights.h5", "hparams.json"
SUFFIX, WEIGHTS_SUFFIX = ".keras", ".weights.h5"
REGISTERED_NAME = "tf_gpt2>GPT2Model"

LOCAL_HEADER_BYTES = 30
"""Bytes before a member's name in a zip file; the last four tell the lengths of the name and of what follows it."""

LAST: Mapping[str, int] = {"w": 0, "g": 0, "b": 1}
"""Last part of a leaf's path -> its place among the variables of its layer, which Keras numbers."""
LAST_INT8: Mapping[str, int] = {"b": 0, "w": 1}
"""The same in a layer with an 8-bit matrix, whose scales follow it."""
TABLES: Mapping[str, int] = {"wte": 0, "wpe": 1, "lm_head": 2}
TABLES_INT8: Mapping[str, int] = {"wpe": 0, "wte": 1, "lm_head": 3}
STORED_AS: Mapping[str, np.dtype] = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""Dtypes that HDF5 does not know -> NumPy's; Keras writes their bits, and the name beside them."""


def is_here(folder: Path) -> bool:
    """Whether a folder has files in this format."""
    has_weights = any(folder.glob(f"*{WEIGHTS_SUFFIX}")) and (folder / HPARAMS).exists()
    return has_weights or any(folder.glob(f"*{SUFFIX}"))


def find_file(path: Path) -> Path:
    """Returns the file in a folder; a path of a file as it is.

    Raises:
        CheckpointError: when the folder has several.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob(f"*{SUFFIX}")) or sorted(path.glob(f"*{WEIGHTS_SUFFIX}"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{path} must hold one file of Keras's, and holds {names}; name the file itself")
    return files[0]


def read_config(path: Path) -> GPT2Config:
    """Reads the hyperparameters.

    Raises:
        CheckpointError: when a file cannot be read, or is of another model.
    """
    file = find_file(path)
    if file.name.endswith(SUFFIX):
        try:
            return GPT2Config.from_hparams(model_arguments(file)["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} does not describe a GPT-2: {error}") from error
    return GPT2Config.from_file(file.parent / HPARAMS)


def model_arguments(file: Path) -> dict[str, Any]:
    """Reads the constructor's arguments in a ``.keras`` file.

    Raises:
        CheckpointError: when the file cannot be read, or is of another class.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open("config.json") as stream:
            text = stream.read(MOST_HPARAMS_BYTES + 1)
        description = json.loads(text)
        name, arguments = description["registered_name"], description["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, NotImplementedError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; save the model again") from error
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; save the model again") from error
    if name != REGISTERED_NAME or not isinstance(arguments, dict):
        raise CheckpointError(
            f"{file} has a model of the class {str(name)[:60]!r}, not {REGISTERED_NAME!r}; load it by keras.saving"
        )
    return arguments


def open_weights(path: Path, config: GPT2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Checks a file's arrays, and returns an iterator that reads one at a time.

    Args:
        path: of a file, or of a folder with one.
        config: the hyperparameters that the arrays must fit.

    Returns:
        An iterator of ``(path in the tree, array)``, each leaf once; floats for an 8-bit matrix.

    Raises:
        CheckpointError: at once, when an array is missing or misshapen; during iteration, where it is damaged.
    """
    file = find_file(path)
    with opened(file) as store:
        problems = [problem for leaf, shape in leaves(param_shapes(config)) for problem in misfits(store, leaf, shape)]
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise CheckpointError(f"{file} is not a GPT-2 of its shape: {'; '.join(problems[:10])}{more}")
    return read_all(file, config)


def read_all(file: Path, config: GPT2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the leaves of a file that ``open_weights`` has checked."""
    with opened(file) as store:
        for leaf, _ in leaves(param_shapes(config)):
            yield leaf, read_leaf(store, leaf)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Opens the arrays, also those inside a ``.keras`` file.

    Raises:
        CheckpointError: when they cannot be read.
    """
    import h5py  # Here, for it takes longer to import than the rest.

    try:
        with contextlib.ExitStack() as stack:
            source: Any = file
            if file.name.endswith(SUFFIX):
                source = open_member(file, stack)
            yield stack.enter_context(h5py.File(source, "r"))
    except (
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        EOFError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(f"cannot read {file}: {str(error)[:300]}; save the model again") from error


def open_member(file: Path, stack: contextlib.ExitStack) -> Any:
    """Opens the weights inside a ``.keras`` file; a file object that may seek.

    Keras does not compress them, so they are read where they stand: zipfile would read all that is before, each time.
    """
    archive = stack.enter_context(zipfile.ZipFile(file))
    info = archive.getinfo(WEIGHTS)
    if info.compress_type != zipfile.ZIP_STORED:
        return stack.enter_context(archive.open(info))
    whole = stack.enter_context(file.open("rb"))
    whole.seek(info.header_offset + LOCAL_HEADER_BYTES - 4)
    n_name, n_extra = struct.unpack("<HH", whole.read(4))
    return Region(whole, info.header_offset + LOCAL_HEADER_BYTES + n_name + n_extra, info.file_size)


class Region(io.RawIOBase):
    """A part of an open file as a file.

    Args:
        file: the whole.
        start: the part's first byte.
        size: its length in bytes.
    """

    def __init__(self, file: BinaryIO, start: int, size: int):
        super().__init__()
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the place of the next read, and returns it."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        """Returns the place of the next read."""
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer; returns how many bytes were there."""
        view = memoryview(buffer).cast("B")
        n_bytes = min(len(view), max(self.size - self.at, 0))
        self.file.seek(self.start + self.at)
        body = self.file.read(n_bytes)
        view[: len(body)] = body
        self.at += len(body)
        return len(body)


def places(store: Any, leaf: str) -> tuple[str, str | None]:
    """Returns the names of a leaf's array, and of its scales if it is an 8-bit matrix."""
    *parts, last = leaf.split("/")
    if not parts:
        is_int8 = "vars/3" in store or ("vars/2" in store and len(store["vars/2"].shape) == 1)
        return numbered("vars", (TABLES_INT8 if is_int8 else TABLES)[last], is_int8 and last != "wpe")
    if parts[0] == "blocks":
        layer = "/".join(["blocks", "block" if parts[1] == "0" else f"block_{parts[1]}", *parts[2:], "vars"])
    else:
        layer = "layers/layer_norm/vars"  # ln_f, the only layer norm of the model itself
    is_int8 = f"{layer}/2" in store
    return numbered(layer, (LAST_INT8 if is_int8 else LAST)[last], is_int8 and last == "w")


def numbered(group: str, number: int, has_scale: bool) -> tuple[str, str | None]:
    """Returns the name of a variable, and of the one behind it."""
    return f"{group}/{number}", f"{group}/{number + 1}" if has_scale else None


def misfits(store: Any, leaf: str, shape: tuple[int, ...]) -> list[str]:
    """Describes what is wrong with a leaf's arrays; an empty list when they are right."""
    stored = shape[::-1] if leaf.endswith("/w") else shape
    name, scale = places(store, leaf)
    wanted = {name: tuple(stored)} | ({scale: (stored[0],)} if scale else {})
    problems = []
    for key, size in wanted.items():
        if not is_inside(store, key):
            problems.append(f"{leaf}: missing")
        elif tuple(store[key].shape) != size:
            problems.append(f"{leaf}: expected {size}, got {tuple(store[key].shape)}")
        elif store[key].id.get_storage_size() < store[key].nbytes:
            # HDF5 reads numbers that were never written as zeros, however many the file claims to have
            problems.append(f"{leaf}: is compressed, or lacks numbers")
    return problems


def is_inside(store: Any, name: str) -> bool:
    """Whether a file has an array itself; HDF5 can also refer to other files, which are not read."""
    import h5py

    group = store
    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            return False
        group = group[part]
    return isinstance(group, h5py.Dataset) and not group.is_virtual and group.external is None


def read_leaf(store: Any, leaf: str) -> np.ndarray:
    """Reads one leaf in the tree's orientation."""
    name, scale = places(store, leaf)
    array = store[name][()]
    of_bits = STORED_AS.get(store[name].attrs.get("dtype", ""))
    if of_bits is not None:
        array = array.view(of_bits)
    if scale is not None:
        array = array.astype(np.float32) * store[scale][()][:, None]
    if "float" not in array.dtype.name:
        raise ValueError(f"{leaf} has {array.dtype}, not floats")
    return np.ascontiguousarray(array.T) if leaf.endswith("/w") else array


def write(folder: Path, model: Any) -> None:
    """Writes ``model.keras``.

    Args:
        folder: to write to.
        model: a ``GPT2Model``.
    """
    model.save(folder / MODEL)
