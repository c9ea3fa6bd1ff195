"""The index of a checkpoint, read without TensorFlow: what TensorFlow reads in it, and what nobody should."""

import contextlib
import os
import struct
import subprocess
import sys
import time

import pytest
import tensorflow as tf
from hypothesis import example, given, settings, strategies as st

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.index import find_prefix, parse_index, read_index
from tf_gpt2.checkpoint.tables import masked_crc32c
from tf_gpt2.errors import CheckpointError

TINY = (embedded_dir() / "model.ckpt.index").read_bytes()
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
HEADER = b"\x08\x01\x1a\x02\x08\x01"
FLOAT_3 = b"\x08\x01\x12\x04\x12\x02\x08\x03\x28\x0c"


def varint(value):
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def entry(name, value, n_shared=0):
    return varint(n_shared) + varint(len(name)) + varint(len(value)) + name + value


def block(entries, kind=0):
    """One block with a good checksum."""
    body = b"".join(entries) + struct.pack("<II", 0, 1)
    return body + bytes([kind]) + struct.pack("<I", masked_crc32c(body + bytes([kind])))


def table(blocks, handles=None):
    """A table of blocks; ``handles`` are those in its index, those of the blocks by default."""
    starts = [sum(map(len, blocks[:i])) for i in range(len(blocks) + 1)]
    handles = handles or [(start, len(one) - 5) for start, one in zip(starts, blocks, strict=False)]
    places = block([entry(b"%09d" % i, varint(start) + varint(size)) for i, (start, size) in enumerate(handles)])
    footer = (b"\0\0" + varint(starts[-1]) + varint(len(places) - 5)).ljust(40, b"\0") + MAGIC
    return b"".join(blocks) + places + footer


def test_it_finds_what_tensorflow_finds():
    index, reader = read_index(embedded_dir() / "model.ckpt"), tf.train.load_checkpoint(str(embedded_dir()))
    assert {name: list(one.shape) for name, one in index.variables.items()} == reader.get_variable_to_shape_map()
    assert {one.dtype for one in index.variables.values()} == {"float32"}
    data = (embedded_dir() / "model.ckpt.data-00000-of-00001").read_bytes()
    for name, one in index.variables.items():
        assert data[one.offset : one.offset + one.n_bytes] == reader.get_tensor(name).tobytes()


def test_a_table_of_many_blocks_is_read_as_tensorflow_reads_it(tmp_path):
    names = [f"a/{'long name' * (i % 40)}/{i}" for i in range(3000)]
    prefix = tmp_path / "many"
    tensors = [tf.zeros([i % 5, 2], [tf.float32, tf.int64, tf.bfloat16][i % 3]) for i in range(3000)]
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * 3000, tensors=tensors)
    found = read_index(prefix).variables
    assert found.keys() == set(names)
    for name, tensor in zip(names, tensors, strict=True):
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype.name)


def test_it_needs_no_tensorflow():
    program = (
        "import sys; from tf_gpt2.checkpoint.variables import find_weights; from tf_gpt2.config import GPT2Config\n"
        "folder = sys.argv[1]; find_weights(folder, GPT2Config.from_file(folder + '/hparams.json'))\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, embedded_dir()], timeout=60).returncode == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_noticed(data):
    start = data.draw(st.integers(0, len(TINY) - 1))
    end = data.draw(st.integers(start, min(len(TINY), start + 60)))
    damaged = TINY[:start] + data.draw(st.binary(max_size=60)) + TINY[end:]
    with contextlib.suppress(ValueError, IndexError):
        assert parse_index(damaged) == parse_index(TINY)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 200))
@example(b"a", b"\x12\x02\x12\x05", 0)
def test_any_entry_with_a_good_checksum_is_read_or_refused(name, value, n_shared):
    body = table([block([entry(b"", HEADER), entry(b"m", FLOAT_3), entry(name, value, n_shared)])])
    try:
        index = parse_index(body)
    except (ValueError, IndexError):
        return
    assert index.n_shards == 1
    assert index.variables["m"].shape == (3,)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"\0" * 5000,
        MAGIC * 6,
        table([block([entry(b"m", FLOAT_3)])]),  # no header
        table([block([entry(b"", HEADER), entry(b"b", FLOAT_3), entry(b"a", FLOAT_3)])]),
        table([block([entry(b"", HEADER), entry(b"a", FLOAT_3), entry(b"a", FLOAT_3)])]),
        table([block([entry(b"", HEADER)], kind=1)]),
        table([block([entry(b"", HEADER)])], [(0, 2**62)]),
        table([block([entry(b"", HEADER)]), block([entry(b"a", FLOAT_3)])], [(0, 18), (0, 18)]),
        table([block([entry(b"", HEADER + b"\x10\x01")])]),
        table([block([entry(b"", HEADER), entry(b"a", b"\xff" * 30)])]),
        table([block([entry(b"", HEADER), entry(b"a", b"\x12" * 30)])]),
        table([block([entry(b"", HEADER), entry(b"\xff", FLOAT_3)])]),
        table([block([entry(b"", HEADER), entry(b"a", FLOAT_3[:-1])])]),
    ],
)
def test_what_is_no_index_is_a_checkpoint_error_in_one_line(body, tmp_path):
    (tmp_path / "model.index").write_bytes(body)
    with pytest.raises(CheckpointError, match=r"^.*model\.index is not the index of a checkpoint: [^\n]+$"):
        read_index(tmp_path / "model")


def test_small_files_cannot_take_much_time_or_memory(tmp_path):
    long_names = block([entry(b"", HEADER), entry(b"x" * 50_000, FLOAT_3)] + [entry(b"y", b"", 50_000)] * 99_000)
    with open(tmp_path / "long.index", "wb") as file:  # noqa: PTH123
        file.truncate(1 << 40)
    (tmp_path / "names.index").write_bytes(table([long_names]))
    os.mkfifo(tmp_path / "pipe.index")
    started = time.monotonic()
    for name in ("long", "names", "pipe"):
        with pytest.raises(CheckpointError, match=name):
            read_index(tmp_path / name)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("path", ["x" * 5000, "no/thing", "\0", "a\nb"])
def test_no_path_is_a_raw_error(path, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_prefix(tmp_path / path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_prefix(path)
