"""What is a record, and what is said of a bad one."""

import hashlib
import json

import pytest

from tf_gpt2.jobs.records import make_record, parse_json, parse_text, seed_of


def parsed(fields):
    return parse_json(json.dumps(fields).encode(), "a.jsonl:3")


def test_a_record_has_id_text_and_options():
    record = parsed({"text": "To be", "top_k": 3, "id": 7, "seed": None})
    assert record == (7, "To be", {"top_k": 3}, None)  # null is not there


@pytest.mark.parametrize("fields", [{"text": "x"}, {"text": "x", "id": None}])
def test_without_an_id_it_is_named_after_its_place(fields):
    assert parsed(fields).id == "a.jsonl:3"


@pytest.mark.parametrize(
    ("line", "code", "record_id"),
    [
        (b"{", "invalid_json", "a:1"),
        (b'{"id": 1, "text": NaN}', "invalid_json", "a:1"),
        (b"[" * 100_000, "invalid_json", "a:1"),
        (b"9" * 10_000, "invalid_json", "a:1"),
        (b'{"id": 1, "text": "\xff"}', "invalid_utf8", "a:1"),
        (b'{"id": 1, "text": "\\ud800"}', "invalid_utf8", 1),
        (b"[]", "invalid_type", "a:1"),
        (b"null", "invalid_type", "a:1"),
        (b'{"id": 1}', "invalid_type", 1),
        (b'{"id": 1, "text": ["x"]}', "invalid_type", 1),
        (b'{"id": 1.5, "text": "x"}', "invalid_type", "a:1"),
        (b'{"id": true, "text": "x"}', "invalid_type", "a:1"),
        (b'{"id": 9223372036854775808, "text": "x"}', "invalid_type", "a:1"),
        (b'{"id": "\\udfff", "text": "x"}', "invalid_type", "a:1"),
        (b'{"id": 1, "text": ""}', "empty_text", 1),
    ],
)
def test_a_bad_line_becomes_an_error_that_can_be_written(line, code, record_id):
    record = parse_json(line, "a:1")
    value = record.error.as_value()
    assert (record.id, value["code"]) == (record_id, code)
    assert len(value["message"].encode("utf-8")) < 2000


def test_a_text_may_be_bytes_and_a_line_may_be_text():
    assert make_record({"text": "é".encode()}, "p").text == "é"
    assert make_record({"text": b"\xff"}, "p").error.code == "invalid_utf8"
    assert parse_text("é".encode(), "a.txt:1") == ("a.txt:1", "é", {}, None)
    assert parse_text(b"", "a.txt:2").error.code == "empty_text"
    assert parse_text(b"\xe9", "a.txt:2").error.code == "invalid_utf8"


def test_a_seed_follows_from_the_jobs_and_the_id():
    assert seed_of(5, "q") == int.from_bytes(hashlib.sha256(b"5:q").digest()[:8], "big")
    assert len({seed_of(seed, record_id) for seed in range(30) for record_id in range(30)}) == 900
    assert seed_of(0, 12) == seed_of(0, "12")
