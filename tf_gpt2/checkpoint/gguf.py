"""Reads and writes a GPT-2 as one file of GGUF, the format of llama.cpp.

Reads F32, F16, BF16, Q8_0 and Q4_0; writes F32, F16 and Q8_0. Every length in the file is checked before it is used: it
may come from anyone. Needs no TensorFlow. The vocabulary, which is in the file, too, is read in ``vocabulary.py``.

Source: ggml-org/ggml, ``docs/gguf.md``, ``src/ggml-quants.c``; llama.cpp, ``gguf-py`` and ``src/models/gpt2.cpp``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tf_gpt2.checkpoint.items import read_items
from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SUFFIX = ".gguf"

TABLES: Mapping[str, str] = {
    "wte": "token_embd.weight",
    "wpe": "position_embd.weight",
    "lm_head": "output.weight",
    "ln_f/g": "output_norm.weight",
    "ln_f/b": "output_norm.bias",
}
PARTS: Mapping[str, str] = {
    "ln_1": "attn_norm",
    "attn/c_attn": "attn_qkv",
    "attn/c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp/c_fc": "ffn_up",
    "mlp/c_proj": "ffn_down",
}
"""Part of a block -> part of a tensor's name; matrices are (n_out, n_in) in the file."""
LAST: Mapping[str, str] = {"w": "weight", "g": "weight", "b": "bias"}

SCALARS: Mapping[int, str] = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
"""Number of a type of metadata -> its form for ``struct``."""
UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5

MOST_ENTRIES, MOST_STRING_BYTES, MOST_ITEMS, MOST_AXES = 1 << 16, 1 << 20, 1 << 24, 4
"""Upper bounds of the lists in a file, far above any GPT-2's."""

BLOCK = 32
"""Numbers that share a scale in Q8_0 and Q4_0."""
FLOATS: Mapping[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
BLOCKS: Mapping[int, np.dtype] = {
    8: np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]),
    2: np.dtype([("scale", "<f2"), ("values", "u1", BLOCK // 2)]),
}
"""Number of a tensor's type -> a block of so many numbers. Source: ``ggml-common.h``."""

WRITTEN: Mapping[str, tuple[int, int]] = {"float32": (0, 0), "float16": (1, 1), "q8_0": (8, 7)}
"""What ``write`` makes of matrices -> the number of the tensor's type, and of the file's."""


def is_here(folder: Path) -> bool:
    """Whether a folder has files in this format."""
    return any(folder.glob(f"*{SUFFIX}"))


def find_file(path: Path) -> Path:
    """Returns the file in a folder; a path of a file as it is.

    Raises:
        CheckpointError: when the folder has several.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(f"{path} must hold one file *{SUFFIX}, and holds {names or 'none'}; name the file itself")
    return files[0]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, read when its rows are asked for: ``tensor[:]``, ``tensor[10:20]``; float32.

    Attributes:
        path: the file.
        kind: the number of its type.
        shape: of the tensor.
        offset: of its first byte in the file.
    """

    path: Path
    kind: int
    shape: tuple[int, ...]
    offset: int
    dtype = np.dtype(np.float32)

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.n_items(math.prod(self.shape)) * self.item_type.itemsize

    @property
    def item_type(self) -> np.dtype:
        """NumPy's dtype of a number, or of a block of numbers."""
        return FLOATS[self.kind] if self.kind in FLOATS else BLOCKS[self.kind]

    def n_items(self, n: int) -> int:
        """Numbers or blocks that ``n`` numbers are stored in."""
        return n if self.kind in FLOATS else n // BLOCK

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Reads rows, that is places on the first axis.

        Raises:
            CheckpointError: when the file cannot be read, or is shorter than it was.
        """
        start, stop, _ = rows.indices(self.shape[0])
        row_size = math.prod(self.shape[1:])
        n_items = self.n_items(max(stop - start, 0) * row_size)
        offset = self.offset + self.n_items(start * row_size) * self.item_type.itemsize
        items = read_items(self.path, self.item_type, n_items, offset)
        return unpack(items, self.kind).reshape(-1, *self.shape[1:])


def unpack(items: np.ndarray, kind: int) -> np.ndarray:
    """Computes the float32 numbers of floats, or of blocks."""
    if kind in FLOATS:
        return items.astype(np.float32)
    values = items["values"]
    if kind == 2:  # four bits each: the first half of a block in the low ones, the second half in the high ones
        values = np.concatenate([values & 15, values >> 4], axis=1).astype(np.int8) - 8
    return (items["scale"].astype(np.float32)[:, None] * values).reshape(-1)


def pack(array: np.ndarray, kind: int) -> np.ndarray:
    """Rounds numbers to a type: the opposite of ``unpack``. Source: ``quantize_row_q8_0_ref``."""
    if kind in FLOATS:
        return array.astype(FLOATS[kind])
    blocks = np.asarray(array, np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    scaled = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    items = np.empty(len(blocks), BLOCKS[kind])
    items["scale"] = scale[:, 0]
    items["values"] = np.trunc(scaled + np.copysign(0.5, scaled))  # halves away from zero, as C's round
    return items


def tensor_name(path: str) -> str:
    """Returns the name of a leaf's tensor: ``blocks/3/ln_1/g`` -> ``blk.3.attn_norm.weight``."""
    if path in TABLES:
        return TABLES[path]
    _, layer, part, last = re.fullmatch(r"(blocks)/(\d+)/(.+)/(\w)", path).groups()  # type: ignore[union-attr]
    return f"blk.{layer}.{PARTS[part]}.{LAST[last]}"


@dataclasses.dataclass(frozen=True)
class Content:
    """The metadata and the tensors of a file."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: Path) -> Content:
    """Reads a file's metadata, and the places of its tensors.

    Raises:
        CheckpointError: when the file cannot be read, is cut short, or its lists lie.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            return Reader(file, path).content()
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"cannot read {path} as GGUF: {str(error)[:500]}; copy it again from its source"
        ) from error


class Reader:
    """Reads a file's lists from its beginning.

    Args:
        file: the file.
        path: its path.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = path.stat().st_size

    def content(self) -> Content:
        """Reads all lists."""
        if self.take(4) != MAGIC:
            raise ValueError("its first bytes are not those of such a file")
        version, n_tensors, n_entries = self.number("<I"), self.number("<Q"), self.number("<Q")
        if version not in (2, VERSION):
            raise ValueError(f"it is of version {version}, and only 2 and 3 are known")
        if max(n_tensors, n_entries) > MOST_ENTRIES:
            raise ValueError(f"it claims to have {n_tensors} tensors and {n_entries} entries")
        metadata = {}
        for _ in range(n_entries):
            key = self.string()
            metadata[key] = self.value(self.number("<I"))
        infos = dict(self.tensor_info() for _ in range(n_tensors))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if len(infos) < n_tensors or type(alignment) is not int or alignment not in [1 << i for i in range(3, 21)]:
            raise ValueError("a tensor's name occurs twice, or general.alignment is no power of two")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {name: self.placed(name, *info, start) for name, info in infos.items()}
        spans = sorted((tensor.offset, tensor.offset + tensor.n_bytes) for tensor in tensors.values())
        if any(end > following for (_, end), (following, _) in itertools.pairwise(spans)):
            raise ValueError("its tensors overlap")
        return Content(metadata, tensors)

    def tensor_info(self) -> tuple[str, tuple[int, tuple[int, ...], int]]:
        """Reads one entry of the list of tensors: its name; its type, shape and place."""
        name, n_axes = self.string(), self.number("<I")
        if n_axes > MOST_AXES:
            raise ValueError(f"{name[:200]} has {n_axes} axes")
        shape = tuple(self.number("<Q") for _ in range(n_axes))[::-1]  # the file counts axes from the last
        kind = self.number("<I")
        return name, (kind, shape, self.number("<Q"))

    def placed(self, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int) -> Tensor:
        """Checks that a tensor lies in the file."""
        if kind not in FLOATS and kind not in BLOCKS:
            raise ValueError(f"{name[:200]} has the type {kind}; known are F32, F16, BF16, Q8_0 and Q4_0")
        if kind in BLOCKS and (not shape or shape[-1] % BLOCK):
            raise ValueError(f"{name[:200]} has rows that are no multiple of {BLOCK}")
        tensor = Tensor(self.path, kind, shape, start + offset)
        if tensor.offset + tensor.n_bytes > self.size:
            raise ValueError(f"{name[:200]} ends behind the end of the file")
        return tensor

    def value(self, kind: int) -> Any:
        """Reads a value of the metadata."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(self.form(kind))
        of, n_items = self.number("<I"), self.number("<Q")
        if n_items > MOST_ITEMS:
            raise ValueError(f"a list claims to have {n_items} items")
        if of == STRING:
            return [self.string() for _ in range(n_items)]
        form = self.form(of)
        return np.frombuffer(self.take(n_items * struct.calcsize(form)), np.dtype(form)).tolist()

    def form(self, kind: int) -> str:
        """Returns the form of a number; raises ValueError for an unknown type."""
        if kind not in SCALARS:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        return SCALARS[kind]

    def string(self) -> str:
        """Reads a string."""
        length = self.number("<Q")
        if length > MOST_STRING_BYTES:
            raise ValueError(f"a string claims to have {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def number(self, form: str) -> Any:
        """Reads one number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, n_bytes: int) -> bytes:
        """Reads so many bytes; raises ValueError at the end of the file, before it allocates them."""
        if n_bytes > self.size - self.file.tell():
            raise ValueError("it is cut short")
        return self.file.read(n_bytes)


def read_config(path: Path) -> GPT2Config:
    """Reads the hyperparameters in a file, or in the only file of a folder.

    Raises:
        CheckpointError: when the file cannot be read, or is not of a GPT-2.
    """
    file = find_file(path)
    content = read(file)
    metadata, table = content.metadata, content.tensors.get(TABLES["wte"])
    if metadata.get("general.architecture") != "gpt2" or table is None:
        raise CheckpointError(
            f"{file} is not of a GPT-2: its general.architecture is {str(metadata.get('general.architecture'))[:60]!r}"
        )
    epsilon = metadata.get("gpt2.attention.layer_norm_epsilon", 1e-5)
    try:
        config = GPT2Config(
            n_vocab=table.shape[0],
            n_ctx=metadata["gpt2.context_length"],
            n_embd=metadata["gpt2.embedding_length"],
            n_head=metadata["gpt2.attention.head_count"],
            n_layer=metadata["gpt2.block_count"],
            n_inner=metadata.get("gpt2.feed_forward_length"),
            layer_norm_epsilon=float(np.format_float_positional(np.float32(epsilon))),  # 1e-5 as the double 1e-5
            tie_word_embeddings=TABLES["lm_head"] not in content.tensors,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a GPT-2: {error}") from error
    check_hyperparameters(file, metadata, config)
    return config


def check_hyperparameters(file: Path, metadata: Mapping[str, Any], config: GPT2Config) -> None:
    """Raises CheckpointError for a hyperparameter that would change what the model computes, and is not read."""
    read = {key for key, _, _ in metadata_of(config, 0)}
    repeated = {"gpt2.vocab_size": config.n_vocab, "gpt2.attention.head_count_kv": config.n_head}
    for key, value in metadata.items():
        if key.startswith("gpt2.") and key not in read and repeated.get(key) != value:
            raise CheckpointError(
                f"{file} has {key[:200]}={str(value)[:60]}, which tf_gpt2 does not know; it is not read"
            )


def open_weights(path: Path, config: GPT2Config) -> Iterator[tuple[str, Any]]:
    """Checks a file's tensors, and returns an iterator that reads one at a time.

    Args:
        path: of a file, or of a folder with one.
        config: the hyperparameters that the tensors must fit.

    Returns:
        An iterator of ``(path in the tree, float32 array or Tensor)``, each leaf once.

    Raises:
        CheckpointError: at once, when tensors are missing, misshapen or unexpected.
    """
    file = find_file(path)
    tensors = read(file).tensors
    expected = {tensor_name(leaf): (leaf, stored_shape(leaf, shape)) for leaf, shape in leaves(param_shapes(config))}
    problems = [f"{name}: missing" for name in expected.keys() - tensors.keys()]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name[:200]}: unexpected")
        elif tensor.shape != expected[name][1]:
            problems.append(f"{name}: expected {expected[name][1]}, got {tensor.shape}")
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise CheckpointError(f"{file} is not a GPT-2 of its shape: {'; '.join(sorted(problems)[:10])}{more}")
    return (
        (leaf, np.ascontiguousarray(tensors[name][:].T) if leaf.endswith("/w") else tensors[name])
        for name, (leaf, _) in expected.items()
    )


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a leaf's tensor."""
    return tuple(shape[::-1]) if path.endswith("/w") else tuple(shape)


def check_expressible(config: GPT2Config, dtype: str) -> None:
    """Raises ValueError for a model that llama.cpp would compute wrongly, or that has no such type.

    Args:
        config: the hyperparameters.
        dtype: one of ``WRITTEN``.
    """
    if dtype not in WRITTEN:
        raise ValueError(f"dtype must be one of {', '.join(WRITTEN)}, got {dtype!r}")
    built_in = {"activation": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, value in built_in.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"format='gguf' cannot express {name}={getattr(config, name)!r}: llama.cpp computes a GPT-2 with "
                f"{value!r}; take format='huggingface'"
            )
    if WRITTEN[dtype][0] in BLOCKS and (config.n_embd % BLOCK or config.mlp_width % BLOCK):
        raise ValueError(
            f"dtype={dtype!r} needs widths that are multiples of {BLOCK}, got n_embd={config.n_embd} and an inner "
            f"width of {config.mlp_width}; take dtype='float16'"
        )


def write(
    file: Path,
    config: GPT2Config,
    weights: Iterator[tuple[str, np.ndarray]],
    dtype: str,
    vocabulary: Sequence[tuple[str, int, Any]] = (),
) -> None:
    """Writes a file.

    Args:
        file: to write.
        config: the hyperparameters.
        weights: the leaves in the order of ``param_shapes``, one array at a time.
        dtype: of the matrices, one of ``WRITTEN``; vectors and positions are always float32.
        vocabulary: entries of the metadata, as ``vocabulary.gguf_entries`` returns them.
    """
    metadata = [*metadata_of(config, WRITTEN[dtype][1]), *vocabulary]
    paths = [(path, stored_shape(path, shape)) for path, shape in leaves(param_shapes(config))]
    tensors = [Tensor(file, kind_of(path, dtype), shape, 0) for path, shape in paths]
    with file.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, kind, value in metadata:
            out.write(packed_string(key) + struct.pack("<I", kind) + packed_value(kind, value))
        offset = 0
        for (path, shape), tensor in zip(paths, tensors, strict=True):
            out.write(packed_string(tensor_name(path)) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]))
            out.write(struct.pack("<IQ", tensor.kind, offset))
            offset += aligned(tensor.n_bytes)
        out.write(bytes(-out.tell() % ALIGNMENT))
        for (path, array), tensor in zip(weights, tensors, strict=True):
            array = array.T if path.endswith("/w") else array
            out.write(pack(np.ascontiguousarray(array), tensor.kind).tobytes())
            out.write(bytes(-out.tell() % ALIGNMENT))


def kind_of(path: str, dtype: str) -> int:
    """Returns the number of the type that a leaf is written in."""
    is_matrix = path in ("wte", "lm_head") or path.endswith("/w")
    return WRITTEN[dtype][0] if is_matrix else 0


def aligned(n_bytes: int) -> int:
    """Rounds up to the places where tensors may begin."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def metadata_of(config: GPT2Config, file_type: int) -> list[tuple[str, int, Any]]:
    """Lists the hyperparameters: key, type, value."""
    return [
        ("general.architecture", STRING, "gpt2"),
        ("general.name", STRING, "gpt2"),
        ("general.file_type", UINT32, file_type),
        ("general.quantization_version", UINT32, 2),
        ("gpt2.context_length", UINT32, config.n_ctx),
        ("gpt2.embedding_length", UINT32, config.n_embd),
        ("gpt2.block_count", UINT32, config.n_layer),
        ("gpt2.feed_forward_length", UINT32, config.mlp_width),
        ("gpt2.attention.head_count", UINT32, config.n_head),
        ("gpt2.attention.layer_norm_epsilon", FLOAT32, config.layer_norm_epsilon),
    ]


def packed_string(text: str) -> bytes:
    """Returns a string as the file has it."""
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def packed_value(kind: int, value: Any) -> bytes:
    """Returns a value as the file has it: a number, a string, or a list of strings or of int32."""
    if kind == STRING:
        return packed_string(value)
    if kind != ARRAY:
        return struct.pack(SCALARS[kind], value)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IQ", STRING, len(value)) + b"".join(map(packed_string, value))
    return struct.pack("<IQ", INT32, len(value)) + np.asarray(value, "<i4").tobytes()
