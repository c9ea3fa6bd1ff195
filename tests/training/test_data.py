"""Files -> windows: exact ids, an order by seed, each kind of file, files that are mapped."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tf_gpt2 import Encoder
from tf_gpt2.checkpoint import vocabulary
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.training import DataError, data, text_dataset

ENCODER = Encoder.from_files(embedded_dir())
END = ENCODER.end_of_text
TEXT = "To be, or not to be.\n\nThat is  the question:\n" * 20


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "a.txt"


def all_ids(files, **options):
    ids = data.read_ids(files, ENCODER, **options)
    return ids.read(0, len(ids)).tolist()


def rows(dataset):
    return [np.concatenate([ids, targets[:, -1:]], axis=1) for ids, targets in dataset.as_numpy_iterator()]


# ---- files


def test_a_text_is_its_ids_and_the_end(file):
    assert all_ids(file) == [*ENCODER.encode(TEXT), END]


def test_documents_are_apart(tmp_path, file):
    lines = [json.dumps({"text": text, "n": 1}) for text in ("One.", "Two.\nlines")]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "ignored.md").write_text("no")
    expected = [*ENCODER.encode(TEXT), END, *ENCODER.encode("One."), END, *ENCODER.encode("Two.\nlines"), END]
    assert all_ids(tmp_path) == all_ids([file, tmp_path / "sub"]) == expected


def test_bins_of_nanogpt_and_llm_c(tmp_path):
    ids = np.array(ENCODER.encode(TEXT), np.uint16)
    ids.tofile(tmp_path / "nano.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "llm.bin").write_bytes(header.tobytes() + ids.tobytes())
    assert all_ids(tmp_path / "nano.bin") == all_ids(tmp_path / "llm.bin") == ids.tolist()
    header[2] += 1
    (tmp_path / "llm.bin").write_bytes(header.tobytes() + ids.tobytes())
    with pytest.raises(DataError, match=f"should have {len(ids) + 1} ids"):
        all_ids(tmp_path / "llm.bin")
    (ids + 1024).tofile(tmp_path / "nano.bin")
    with pytest.raises(DataError, match="is it this model's"):
        all_ids(tmp_path / "nano.bin")


def test_a_vocabulary_may_have_gaps(tmp_path):
    np.array([5, 1500], np.uint16).tofile(tmp_path / "a.bin")
    encoder = Encoder(ENCODER.encoder, vocabulary.merges_of(ENCODER), special_tokens={"<|user|>": 1500})
    assert data.read_ids(tmp_path / "a.bin", encoder).read(0, 2).tolist() == [5, 1500]
    np.array([5, 1501], np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match="has the id 1501, and the vocabulary ids below 1501"):
        data.read_ids(tmp_path / "a.bin", encoder)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=" \n\ta'sé😀x.1", min_size=1, max_size=200), st.integers(1, 40))
def test_a_text_in_parts_has_the_ids_of_the_whole(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHARACTERS_AT_ONCE", size)
        assert all_ids(path) == [*ENCODER.encode(text), END]


def test_large_files_are_mapped_and_found_again(file, monkeypatch):
    wanted = all_ids(file)
    monkeypatch.setattr(data, "MOST_IN_MEMORY", 100)
    assert all_ids(file) == wanted
    (beside,) = file.parent.glob("*.ids")
    assert isinstance(data.read_ids(file, ENCODER).arrays[0], np.memmap)
    monkeypatch.setattr(ENCODER, "encode", None)  # not asked again
    assert all_ids(file) == wanted
    beside.unlink()
    with pytest.raises(TypeError):
        all_ids(file)
    assert not list(file.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", "byte 0xff"),
        ("a.jsonl", b'{"text": 1}\n', "'text' in line 1"),
        ("a.jsonl", b'{"other": "x"}\n', "line 1 of .* the key 'text'"),
        ("a.jsonl", b"[[", "line 1"),
        ("a.txt", b"", "at least 2 tokens"),
        ("none.txt", None, "cannot read"),
        ("a.bin", b"", "at least 2 tokens"),
        ("a.bin", b"abc", "3 bytes, must be"),
        ("a.bin", np.array([data.LLM_C_MAGIC, 1] + [0] * 254, "<i4").tobytes(), "at least 2 tokens"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text_dataset(tmp_path / name, ENCODER, n_ctx=4, batch_size=1)


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no file that ends in"):
        text_dataset(tmp_path, ENCODER, n_ctx=4, batch_size=1)


# ---- windows


def test_each_id_is_a_target_once_per_epoch():
    ids = data.Ids([np.arange(100, dtype=np.uint16)])
    batches = rows(data.shuffled_windows(ids, n_ctx=10, batch_size=5, epochs=3, seed=2))
    assert len(batches) == 6
    for epoch in range(3):
        targets = np.concatenate(batches[2 * epoch : 2 * epoch + 2])[:, 1:]
        assert sorted(targets.ravel().tolist()) == list(range(100))
    assert not np.array_equal(batches[0], batches[2])


def test_the_order_is_a_function_of_the_seed(file):
    options = {"n_ctx": 8, "batch_size": 4, "epochs": 2}
    first, again = (rows(text_dataset(file, ENCODER, seed=1, **options)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, rows(text_dataset(file, ENCODER, seed=2, **options)))
    later = rows(text_dataset(file, ENCODER, seed=1, **options).skip(5))
    np.testing.assert_array_equal(later, first[5:])
    half = len(first) // 2
    assert not np.array_equal(first[:half], first[half : 2 * half])


def test_the_held_out_part_comes_once_in_its_order(file):
    options = {"n_ctx": 8, "batch_size": 2, "n_held_out": 21}
    ids = all_ids(file)
    batches = list(text_dataset(file, ENCODER, part="held_out", **options).as_numpy_iterator())
    targets = np.concatenate([labels for _, labels in batches]).ravel()
    assert targets[targets >= 0].tolist() == ids[-20:]
    assert batches[0][0].ravel().tolist() == ids[-21:-5]
    assert min(inputs.min() for inputs, _ in batches) >= 0
    seen = np.concatenate(rows(text_dataset(file, ENCODER, **options))).ravel()
    training = data.Ids([np.array(ids[:-21])])
    assert len(seen) == len(training) // 8 // 2 * 2 * 9 or len(seen) == -(-(len(training) // 8) // 2) * 2 * 9


def test_a_text_shorter_than_the_window_repeats():
    ids = data.Ids([np.arange(5, dtype=np.uint16)])
    (batch,) = rows(data.shuffled_windows(ids, n_ctx=8, batch_size=1, epochs=1))
    assert (np.diff(batch[0]) % 5 == 1).all()


def test_ids_in_several_arrays_are_one_row():
    whole = np.arange(30, dtype=np.uint16)
    ids = data.Ids([whole[:7], whole[7:8], whole[8:]])
    for start in range(30):
        np.testing.assert_array_equal(ids.read(start, 40), (start + np.arange(40)) % 30)
    np.testing.assert_array_equal(ids.part(5, 12).read(0, 7), whole[5:12])
    assert ids.fingerprint() == data.Ids([whole]).fingerprint() != data.Ids([whole[::-1]]).fingerprint()


def test_another_id_anywhere_makes_another_fingerprint():
    content = np.arange(5000, dtype=np.uint16)
    before = data.Ids([content]).fingerprint()
    assert data.Ids([content[:1234], content[1234:]]).fingerprint() == before
    content[3333] += 1
    assert data.Ids([content]).fingerprint() != before


def test_wrong_numbers_are_named(file):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        text_dataset(file, ENCODER, n_ctx=4, batch_size=0)
    with pytest.raises(ValueError, match="part must be"):
        text_dataset(file, ENCODER, n_ctx=4, batch_size=1, part="test")
