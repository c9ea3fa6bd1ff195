"""Files of GGUF: what is read and written, and that a file that lies is a ``CheckpointError`` and costs nothing."""

import dataclasses
import random
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from tf_gpt2.checkpoint import gguf
from tf_gpt2.checkpoint.params import leaves, random_params
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError

CONFIG = GPT2Config(n_vocab=11, n_ctx=6, n_embd=32, n_head=2, n_layer=2, n_inner=64)
PARAMS = random_params(CONFIG, seed=3)


@pytest.fixture
def file(tmp_path):
    gguf.write(tmp_path / "model.gguf", CONFIG, leaves(PARAMS), "float32")
    return tmp_path / "model.gguf"


def q4_0_by_hand(row):
    """Packs 32 numbers: the largest in magnitude becomes -8 steps."""
    largest = row[np.argmax(np.abs(row))]
    scale = np.float32(largest / -8)
    q = np.clip(np.floor(row / scale + 8.5), 0, 15).astype(np.uint8) if scale else np.full(32, 8, np.uint8)
    return np.float16(scale).tobytes() + (q[:16] | q[16:] << 4).tobytes(), (q.astype(np.float32) - 8) * np.float16(
        scale
    )


def test_weights_come_back(file, tmp_path):
    assert gguf.read_config(file) == gguf.read_config(tmp_path) == CONFIG
    expected = dict(leaves(PARAMS))
    for path, array in gguf.open_weights(file, CONFIG):
        assert np.asarray(array[:]).tobytes() == expected.pop(path).tobytes()
    assert not expected


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("q8_0", 5e-3)])
def test_smaller_types_are_within_their_rounding(tmp_path, dtype, tolerance):
    gguf.write(tmp_path / "x.gguf", CONFIG, leaves(PARAMS), dtype)
    expected = dict(leaves(PARAMS))
    for path, array in gguf.open_weights(tmp_path / "x.gguf", CONFIG):
        wanted = expected[path]
        assert np.abs(np.asarray(array[:]) - wanted).max() <= tolerance * np.abs(wanted).max(), path
        if wanted.ndim == 1 or path == "wpe":
            assert np.array_equal(np.asarray(array[:]), wanted)
    assert (tmp_path / "x.gguf").stat().st_size < 0.75 * sum(4 * leaf.size for leaf in expected.values())


def test_blocks_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.standard_normal((5, 32)), np.zeros((1, 32))]).astype(np.float32)
    packed = gguf.pack(rows, 8)
    for row, item in zip(rows, packed, strict=True):
        scale = np.float16(np.abs(row).max() / 127)
        wanted = np.round(row / (np.abs(row).max() / 127 or 1))
        assert item["scale"] == scale
        assert np.abs(item["values"] - wanted).max() == 0
    raw, values = zip(*map(q4_0_by_hand, rows), strict=True)
    items = np.frombuffer(b"".join(raw), gguf.BLOCKS[2])
    np.testing.assert_array_equal(gguf.unpack(items, 2).reshape(rows.shape), np.stack(values))


def test_brain_floats_are_read():
    array = np.array([1.5, -3, 0.1], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(gguf.unpack(array, 30), array.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change, name):
    with pytest.raises(ValueError, match=f"cannot express {name}"):
        gguf.check_expressible(dataclasses.replace(CONFIG, **change), "float32")


def test_other_widths_and_types_are_refused():
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, q8_0"):
        gguf.check_expressible(CONFIG, "q4_0")
    with pytest.raises(ValueError, match="multiples of 32"):
        gguf.check_expressible(dataclasses.replace(CONFIG, n_inner=40), "q8_0")


def test_other_models_are_named(file):
    file.write_bytes(file.read_bytes().replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0mpt2", 1))
    with pytest.raises(CheckpointError, match=r"its general.architecture is 'mpt2'"):
        gguf.read_config(file)


def test_hyperparameters_that_are_not_read_are_named(tmp_path):
    def write(*entries):
        gguf.write(tmp_path / "x.gguf", CONFIG, leaves(PARAMS), "float32", list(entries))
        return tmp_path / "x.gguf"

    repeated = [("gpt2.vocab_size", gguf.UINT32, 11), ("gpt2.attention.head_count_kv", gguf.UINT32, 2)]
    assert gguf.read_config(write(("general.author", gguf.STRING, "me"), *repeated)) == CONFIG
    for key, value in (("gpt2.rope.freq_base", 7), ("gpt2.vocab_size", 12), ("gpt2.attention.head_count_kv", 1)):
        with pytest.raises(CheckpointError, match=rf"has {key}={value}, which tf_gpt2 does not know"):
            gguf.read_config(write((key, gguf.UINT32, value)))


def test_several_files_must_be_named(file):
    (file.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="must hold one file"):
        gguf.read_config(file.parent)


def test_counts_that_lie(file):
    body = bytearray(file.read_bytes())
    for offset in (8, 16):
        for claim in (2**63, 10**9, 2**40):
            lying = body[:offset] + struct.pack("<Q", claim) + body[offset + 8 :]
            file.write_bytes(lying)
            with pytest.raises(CheckpointError, match="cannot read"):
                gguf.read(file)


def test_a_file_that_became_shorter_or_went_away(file):
    tensor = gguf.read(file).tensors["blk.1.ffn_down.weight"]
    file.write_bytes(file.read_bytes()[: tensor.offset + 100])
    with pytest.raises(CheckpointError, match="became shorter"):
        tensor[:]
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.gguf: .*No such file"):
        tensor[:]


def test_damaged_files_are_read_or_refused_and_never_allocate_what_they_claim(file):
    whole, rng = file.read_bytes(), random.Random(3)
    n_lists = whole.index(b"output_norm.bias") + 100
    tracemalloc.start()
    n_refused = 0
    for _ in range(800):
        body = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(n_lists)] = rng.choice([rng.randrange(256), 255, 0])
        file.write_bytes(body[: rng.choice([len(body), rng.randrange(len(body))])])
        try:
            for _, array in gguf.open_weights(file, gguf.read_config(file)):
                assert array[:].nbytes <= 16 * len(whole)
        except CheckpointError:
            n_refused += 1
    assert n_refused > 500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * len(whole) + 2_000_000
