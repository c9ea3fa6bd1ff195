"""Fetches a file over HTTP: resumes, tries again, and gives up on a server that sends too much or too slowly.

Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

TIMEOUTS_S = (4.0, 30.0)
"""Longest waits to connect (TCP repeats its first packet after 1 s and 3 s), and between packets (for busy mirrors)."""

WAITS_S = (0.5, 1.0, 2.0)
"""Waits before each new attempt: 3.5 s in all, so that without a network the error comes within 5 s."""

LONGEST_RETRY_AFTER_S = 20.0
"""A server that asks for a longer pause gets no second attempt: the user decides when to try again."""

LEAST_BYTES, LEAST_BYTES_PER_S = 64 * 1024, 60.0
"""The least rate, headers included: the attempt ends if a server sends fewer bytes in so many seconds."""

CHUNK_BYTES = 64 * 1024
"""Bytes per read: a cut stream loses up to so many."""

MOST_REDIRECTS = 10


@dataclasses.dataclass(frozen=True)
class Source:
    """The address of a file, and the bounds of its length.

    Attributes:
        url: without user name and password.
        auth: user name and password, or None.
        least_bytes, most_bytes: bounds of its length.
    """

    url: str
    auth: tuple[str, str] | None
    least_bytes: int
    most_bytes: int

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[-1]


class AttemptError(Exception):
    """One attempt failed; another may succeed after ``retry_after_s`` seconds, or never if that is None."""

    def __init__(self, reason: str, retry_after_s: float | None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def fetch(part: BinaryIO, source: Source, is_genuine: Callable[[], bool]) -> None:
    """Fetches until ``part`` holds the whole file.

    Raises:
        AttemptError: when the last attempt failed, or another cannot succeed.
    """
    for _ in range(2):
        fetch_rest_patiently(part, source)
        if is_genuine():
            return
        # The first bytes may be of another version of the file: fetch once more, from the first byte.
        part.truncate(0)
    raise AttemptError(f"what arrived is not the {source.name} of this model (by its SHA-256 or content)", None)


def fetch_rest_patiently(part: BinaryIO, source: Source) -> None:
    """Calls ``fetch_rest`` until it succeeds, with growing waits; each attempt that gets further resets the waits.

    Raises:
        AttemptError: when the last attempt failed, or another cannot succeed.
    """
    waits, furthest = iter(WAITS_S), part.seek(0, os.SEEK_END)
    while True:
        try:
            return fetch_rest(part, source)
        except AttemptError as error:
            if part.tell() >= furthest + LEAST_BYTES:
                waits, furthest = iter(WAITS_S), part.tell()
            wait_s = next(waits, None)
            if wait_s is None or error.retry_after_s is None:
                raise
            time.sleep(max(wait_s, error.retry_after_s))


def fetch_rest(part: BinaryIO, source: Source) -> None:
    """Appends the missing bytes to ``part``, by one request."""
    if part.seek(0, os.SEEK_END) > source.most_bytes:
        part.truncate(0)
    size = part.seek(0, os.SEEK_END)
    reader = Reader(source, {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {}))
    reader.start()
    try:
        response = reader.response()
        check_response(response)
        first, total = read_extent(response)
        if total is not None and not source.least_bytes <= total <= source.most_bytes:
            raise AttemptError(f"what arrived is not the {source.name} of this model: it has {total} bytes", None)
        if first is None and total == size:
            return
        part.seek(part.truncate(first if first == size else 0))
        if first not in (0, size):
            raise AttemptError(f"the server cannot go on from byte {size}", 0.0)
        append_body(part, reader, total, source)
    finally:
        reader.leave()
    if total is not None and part.tell() != total:
        raise AttemptError(f"the stream ended at byte {part.tell()} of {total}", 0.0)


def append_body(part: BinaryIO, reader: Reader, total: int | None, source: Source) -> None:
    """Appends the body of a response, and shows a bar on stderr that counts the bytes of the whole file."""
    with tqdm(desc=f"Fetching {source.name}", total=total, initial=part.tell(), unit="b", unit_scale=True) as bar:
        for chunk in reader.chunks():
            if part.tell() + len(chunk) > source.most_bytes:
                part.truncate(0)
                raise AttemptError(
                    f"what arrived is not the {source.name} of this model: it is longer than {source.most_bytes} bytes",
                    None,
                )
            part.write(chunk)
            bar.update(len(chunk))
    part.flush()


class Reader(threading.Thread):
    """Reads one response in a thread of its own, so that its caller can give up while a slow server still sends.

    Args:
        source: where to read.
        headers: of the request.
    """

    def __init__(self, source: Source, headers: dict[str, str]) -> None:
        super().__init__(daemon=True, name=f"fetch {source.name}")
        self.source = source
        self.headers = headers
        self.items: queue.Queue[Any] = queue.Queue(maxsize=64)
        self.left = threading.Event()
        self.answer: requests.Response | None = None
        self.n_bytes, self.deadline = 0, time.monotonic() + LEAST_BYTES_PER_S

    def run(self) -> None:
        """Puts the response, each chunk of its body and None into the queue; after a failure, the exception instead."""
        try:
            with NoRedirects() as session, open_response(session, self.source, self.headers) as response:
                self.answer = response
                self.put(response)
                for chunk in body_chunks(response):
                    self.put(chunk)
            self.put(None)
        except Exception as error:  # ``take`` raises it in the thread that waits
            self.put(error)

    def put(self, item: Any) -> None:
        """Puts one item into the queue; drops it once the caller has left."""
        while not self.left.is_set():
            with contextlib.suppress(queue.Full):
                self.items.put(item, timeout=0.2)
                return
        if not isinstance(item, BaseException):
            raise ConnectionAbortedError("the caller has left")

    def take(self) -> Any:
        """Waits for the next item.

        Raises:
            AttemptError: when the server fails, or is too slow.
        """
        try:
            item = self.items.get(timeout=max(0.0, self.deadline - time.monotonic()))
        except queue.Empty:
            rate = f"fewer than {LEAST_BYTES} bytes in {LEAST_BYTES_PER_S:g} s"
            raise AttemptError(f"the server is too slow: {rate}", None) from None
        if isinstance(item, (requests.RequestException, urllib3.exceptions.HTTPError, ValueError, OSError, zlib.error)):
            # requests' errors about a URL are ValueErrors; a connection that timed out was tried three times by TCP
            hopeless = isinstance(item, (requests.ConnectTimeout, ValueError))
            raise AttemptError(root_cause(item), None if hopeless else 0.0) from item
        if isinstance(item, BaseException):
            raise item
        return item

    def response(self) -> requests.Response:
        """Waits for the response's status and headers."""
        response: requests.Response = self.take()
        return response

    def chunks(self) -> Iterator[bytes]:
        """Yields the body, chunk by chunk."""
        while (chunk := self.take()) is not None:
            self.n_bytes += len(chunk)
            if self.n_bytes >= LEAST_BYTES:
                self.n_bytes, self.deadline = 0, time.monotonic() + LEAST_BYTES_PER_S
            yield chunk

    def leave(self) -> None:
        """Tells the thread that the caller has left, and shuts down the socket that it may still wait for."""
        self.left.set()
        if self.is_alive() and self.answer is not None:
            with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # urllib3 < 2.3 has none
                self.answer.raw.shutdown()


class NoRedirects(requests.Session):
    """A session that leaves redirects to ``open_response``, because requests reads their bodies, however long."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Returns None: no response redirects."""


def open_response(session: requests.Session, source: Source, headers: dict[str, str]) -> requests.Response:
    """Sends the request, and follows redirects; user name and password go to no other host."""
    url, auth = source.url, source.auth
    for _ in range(MOST_REDIRECTS + 1):
        response = session.get(url, headers=headers, auth=auth, stream=True, timeout=TIMEOUTS_S)
        location = response.headers.get("Location")
        if response.status_code not in (301, 302, 303, 307, 308) or not location:
            return response
        response.close()
        target = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
            raise AttemptError("the server redirects from https to an address that is not", None)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:
            auth = None
        url = target
    raise AttemptError(f"the server redirects more than {MOST_REDIRECTS} times", None)


def body_chunks(response: requests.Response) -> Iterator[bytes]:
    """Yields the body in small chunks, unpacked step by step if compressed: a few bytes may unpack to gigabytes."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise AttemptError(f"the server sent the file packed as {encoding[:40]}", None)
    # read, not stream: http.client bounds the lines between the chunks of a body, urllib3 does not
    packed = iter(lambda: response.raw.read(CHUNK_BYTES, decode_content=False), b"")
    if encoding in ("identity", ""):
        yield from packed
        return
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    for rest in packed:
        while rest and not unpacker.eof:
            yield unpacker.decompress(rest, CHUNK_BYTES)
            rest = unpacker.unconsumed_tail
    yield unpacker.flush()
    if not unpacker.eof:
        raise AttemptError("the stream ended inside its gzip", 0.0)


def check_response(response: requests.Response) -> None:
    """Raises AttemptError when a response is an error or a web page, and not the file."""
    code, status = response.status_code, f"HTTP status {response.status_code} {str(response.reason)[:100]}"
    if code == 429 or code >= 500:
        wish_s = count(response.headers.get("Retry-After", "")) or 0  # It may be a date: then our own waits hold.
        raise AttemptError(status, wish_s if wish_s <= LONGEST_RETRY_AFTER_S else None)
    if code not in (200, 206, 416):
        raise AttemptError(status, None)
    media_type = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if code != 416 and media_type.endswith(("html", "xml")):
        raise AttemptError(f"the server sent a page ({media_type[:40]}) instead of the file", None)


def read_extent(response: requests.Response) -> tuple[int | None, int | None]:
    """Returns the body's first byte in the file (None: not a part of it), and the file's length (None: unknown)."""
    # The headers of a compressed body count its compressed bytes, not the file's.
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    if response.status_code == 200:
        return 0, None if encoded else count(response.headers.get("Content-Length", ""))
    extent = re.fullmatch(
        r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18})", response.headers.get("Content-Range", ""), re.A
    )
    if extent is None or encoded:
        return None, None
    return int(extent[1]) if extent[1] and response.status_code == 206 else None, int(extent[2])


def count(text: str) -> int | None:
    """Reads a number of bytes or seconds in a header; None for other text, such as "²" or 5,000 digits."""
    return int(text) if re.fullmatch(r"\d{1,18}", text.strip(), re.ASCII) else None


def root_cause(error: BaseException) -> str:
    """Returns the first cause of a network error, such as "[Errno 111] Connection refused"."""
    inner = error.__cause__ or next((arg for arg in error.args if isinstance(arg, BaseException)), None)
    return root_cause(inner) if inner else str(error)[:500] or type(error).__name__
