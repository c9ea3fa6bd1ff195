"""Files of safetensors: what is read, and that a file that lies is a ``CheckpointError`` and costs nothing."""

import json
import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tf_gpt2.checkpoint.safetensors import read_dtypes, read_tensors, write_tensors
from tf_gpt2.errors import CheckpointError

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5, -2, 7], np.float16),
    "c": np.array([[0.5], [3]], ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
    "ids": np.array([1, 2, 3]),
}


def with_length(header):
    return len(header).to_bytes(8, "little") + header


def write_raw(path, header, data=b""):
    path.write_bytes(with_length(json.dumps(header).encode()) + data)
    return path


def entry(shape=(2, 3), start=0, end=24, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_what_the_package_writes_is_read(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path / "x.safetensors")
    assert tensors.keys() == {"a", "b", "c", "empty"}
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (ARRAYS[name].shape, ARRAYS[name].dtype)
        assert tensor[:].tobytes() == ARRAYS[name].tobytes()
    assert tensors["a"][1:2].tolist() == [[4, 5, 6, 7]]
    assert np.asarray(tensors["a"]).shape == (3, 4)
    dtypes = {"a": "F32", "b": "F16", "c": "BF16", "empty": "F32", "ids": "I64"}
    assert read_dtypes(tmp_path / "x.safetensors") == dtypes


def test_what_is_written_the_package_reads(tmp_path):
    floats = {"a": ARRAYS["a"], "b": ARRAYS["b"].astype(np.float32)}
    write_tensors(tmp_path / "x", [(name, array.shape) for name, array in floats.items()], iter(floats.values()))
    found = load_file(tmp_path / "x")
    assert all(np.array_equal(found[name], array) for name, array in floats.items())


LIES = {
    "cut length": b"\x01\x02",
    "long header": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": b"\x05\0\0\0\0\0\0\0{hell",
    "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "list": b"\x02\0\0\0\0\0\0\0[]",
    "behind the end": {"a": entry(end=2400, shape=(200, 3))},
    "far behind the end": {"a": entry(start=2**60, end=2**60 + 24)},
    "too long for its shape": {"a": entry(shape=(2, 2))},
    "backwards": {"a": entry(start=24, end=0)},
    "negative": {"a": entry(start=-24, end=0)},
    "huge shape": {"a": entry(shape=(2**62, 2**62))},
    "negative shape": {"a": entry(shape=(-2, -3))},
    "many axes": {"a": entry(shape=[1] * 100_000, end=4)},
    "overlap": {"a": entry(), "b": entry(start=12, end=36)},
    "same place": {"a": entry(), "b": entry()},
    "floats for offsets": {"a": {**entry(), "data_offsets": [0.0, 24.0]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "no dtype": {"a": {**entry(), "dtype": 5}},
    "number": {"a": 7},
    "twice": with_length(b'{"a":%s,"a":%s}' % (2 * (json.dumps(entry(shape=[0], end=0)).encode(),))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_lies_is_refused(tmp_path, lie):
    path, content = tmp_path / "x.safetensors", LIES[lie]
    path.write_bytes(content) if isinstance(content, bytes) else write_raw(path, content, bytes(48))
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors as safetensors") as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("lie", ["cut length", "no JSON", "list", "no dtype", "number", "twice"])
def test_dtypes_of_a_list_that_lies_are_refused(tmp_path, lie):
    path, content = tmp_path / "x.safetensors", LIES[lie]
    path.write_bytes(content) if isinstance(content, bytes) else write_raw(path, content, bytes(48))
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors as safetensors"):
        read_dtypes(path)


def test_no_file_and_no_regular_file(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="it is not a file"):
            read_tensors(path)


def test_a_file_that_became_shorter(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry()}, bytes(24))
    tensor = read_tensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        tensor[:]


def test_damaged_files_are_read_or_refused_and_never_allocate_what_they_claim(tmp_path):
    save_file({name: ARRAYS[name] for name in "abc"}, tmp_path / "whole")
    whole, rng, path = (tmp_path / "whole").read_bytes(), random.Random(3), tmp_path / "x"
    tracemalloc.start()
    n_refused = 0
    for _ in range(1500):
        body = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(min(len(body), 250))] = rng.randrange(256)
        path.write_bytes(body[: rng.choice([len(body), rng.randrange(len(body))])])
        try:
            for tensor in read_tensors(path).values():
                assert tensor[:].nbytes <= len(whole)
        except CheckpointError:
            n_refused += 1
    assert n_refused > 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(whole) + 2_000_000
