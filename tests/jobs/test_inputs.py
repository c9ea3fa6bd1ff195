"""Files -> parts: every record once, in its place, whatever the format and however it is cut."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tf_gpt2.jobs.inputs import find_files, id_type, plan, read_part
from tf_gpt2.jobs.kinds import Embed, Generate

LINES = [json.dumps({"id": f"r{i}", "text": "x" * i}) for i in range(1, 24)]


def read_all(path, part_size, job=None):
    planned = plan(find_files([path]), job or Generate(), part_size)
    parts = [read_part(part) for part in planned.parts]
    assert [len(records) for records in parts] == [part.n_records for part in planned.parts]
    assert all(0 < len(records) <= part_size for records in parts)
    return [record for records in parts for record in records]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".ndjson"])
@pytest.mark.parametrize("part_size", [1, 5, 100])
def test_lines_of_json_are_read_once_and_blank_ones_are_none(tmp_path, ending, part_size):
    path = tmp_path / f"a{ending}"
    text = "\n\n" + "\n \r\n".join(LINES) + "\n\nno json"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    records = read_all(path, part_size)
    assert [record.id for record in records[:-1]] == [f"r{i}" for i in range(1, 24)]
    assert [len(record.text) for record in records[:-1]] == [*range(1, 24)]
    assert (records[-1].id, records[-1].error.code) == (f"a{ending}:{text.count(chr(10)) + 1}", "invalid_json")


@pytest.mark.parametrize("part_size", [1, 2, 100])
def test_lines_of_text_are_records_even_if_empty(tmp_path, part_size):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo words")
    records = read_all(tmp_path / "a.txt", part_size)
    assert [(record.id, record.text) for record in records] == [
        ("a.txt:1", "one"),
        ("a.txt:2", ""),
        ("a.txt:3", "two words"),
    ]
    assert records[1].error.code == "empty_text"


@pytest.mark.parametrize("part_size", [1, 7, 100])
def test_rows_of_parquet_are_read_across_row_groups(tmp_path, part_size, monkeypatch):
    path = tmp_path / "a.parquet"
    ids, top_k = [*range(1, 24)], [3 if i % 2 else None for i in range(23)]
    table = pyarrow.table({"text": ["x" * i for i in ids], "id": ids, "top_k": top_k})
    pyarrow.parquet.write_table(table, path, row_group_size=5)
    monkeypatch.setattr("tf_gpt2.jobs.inputs.ROWS_AT_ONCE", 2)
    records = read_all(path, part_size)
    assert [(record.id, len(record.text)) for record in records] == [(i, i) for i in ids]
    assert [record.options for record in records] == [{"top_k": 3} if i % 2 else {} for i in range(23)]
    part = plan(find_files([path]), Generate(), 9).parts[0]
    assert id_type(part) == "BIGINT"
    with pytest.raises(ValueError, match="'top_k' is no option of a record in embed"):
        read_all(path, part_size, Embed())


def test_text_of_parquet_that_is_not_utf8_is_a_bad_record_alone(tmp_path):
    buffers = [None, pyarrow.py_buffer(np.array([0, 1, 2, 3], "<i4")), pyarrow.py_buffer(b"a\xffb")]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"id": [7, 8, 9], "text": texts}), tmp_path / "a.parquet")
    (part,) = plan(find_files([tmp_path / "a.parquet"]), Generate(), 5).parts
    records = read_part(part)
    assert [(record.id, record.text) for record in records] == [(7, "a"), (8, ""), (9, "b")]
    assert [record.error and record.error.code for record in records] == [None, "invalid_utf8", None]


def test_ids_of_parquet_are_integers_only_where_none_is_missing(tmp_path):
    table = {"stop": [{"x": 1, "y": 2}] * 2, "id": [1, None], "text": ["a", "b"]}  # the struct makes two columns
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    (part,) = plan(find_files([tmp_path / "a.parquet"]), Generate(), 5).parts
    assert id_type(part) == "STRING"


def test_damaged_pages_of_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    (part,) = plan(find_files([path]), Generate(), 5).parts
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_part(part)


def test_a_part_ends_when_it_has_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr("tf_gpt2.jobs.inputs.BYTES_PER_PART", 100)
    (tmp_path / "a.txt").write_text("x" * 60 + "\n" + ("y" * 60 + "\n") * 4)
    assert [part.n_records for part in plan(find_files([tmp_path / "a.txt"]), Generate(), 100).parts] == [2, 2, 1]


def test_files_are_found_once_in_order_and_named_below_their_folder(tmp_path):
    for name in ("b/x.jsonl", "a/x.jsonl", "a/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    files = find_files([tmp_path / "*" / "x.jsonl", tmp_path / "a" / "*"])
    assert [file.name for file in files] == ["a/x.jsonl", "a/y.txt", "b/x.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"x", "a.csv"),
        ("a.parquet.gz", b"x", "a.parquet.gz"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 999, mtime=0)[:-9], "not whole gzip"),
        ("a.jsonl.gz", b"{}", "not whole gzip"),
        ("a.parquet", b"{}", "not Parquet"),
        ("a.jsonl", b"\n\n", "no records"),
    ],
)
def test_what_cannot_be_read_is_named_before_the_job(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_all(tmp_path / name, 5)


def test_one_file_by_several_names_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1].txt").write_text("1")
    named = ["a[1].txt", "./a[1].txt", f"../{tmp_path.name}/a[1].txt", str(tmp_path / "*.txt")]
    assert [file.name for file in find_files(named)] == ["a[1].txt"]


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-"):
        find_files([tmp_path / "nothing-*.jsonl"])
