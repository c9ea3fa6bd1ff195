"""The seven files of a checkpoint: found on disk, or fetched, checked, and never half there.

A file has its final name only once it is whole. Until then it is ``<file>.part``, which a later call resumes. Knows
nothing of what the weights mean, nor of TensorFlow.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tqdm import tqdm

from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    import requests

FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
)
"""In the order in which they are fetched. Source: openai/gpt-2, ``download_model.py``."""

VOCABULARY_FILES = ("encoder.json", "vocab.bpe")
"""What the tokenizer needs."""

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
"""What comes before ``/{size}/{file}``; the environment variable ``TF_GPT2_BASE_URL`` replaces it (mirrors)."""

SHA256: Mapping[str, str] = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""The same for all sizes. Source: openai/tiktoken, ``openai_public.py``."""

PAPER_NAMES: Mapping[str, str] = {"117M": "124M", "345M": "355M"}
"""Radford et al. 2019 miscounted the parameters; the files have the right names."""

TIMEOUTS_S = (4.0, 30.0)
"""To connect (TCP repeats its first packet after 1 s and 3 s), and between two packets (a mirror may be busy)."""

WAITS_S = (0.5, 1.0, 2.0)
"""Before each new attempt; growing, and 3.5 s in all, so that without a network the error comes within 5 s."""

LONGEST_RETRY_AFTER_S = 20.0
"""A server that asks for a longer pause gets no second attempt: the user decides when to come back."""

CHOICES = f'model_size is {", ".join(SIZES)}, "tiny" (embedded), or the name of a complete folder in models_dir'


class AttemptError(Exception):
    """One attempt failed; another makes sense after ``retry_after_s`` seconds, never if None. Stays in this module."""

    def __init__(self, reason: str, retry_after_s: float | None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def embedded_dir() -> Path:
    """Gives the folder of the embedded checkpoint "tiny": in the package (a wheel), or beside it (a checkout)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "checkpoints" / "tiny"
    return inside if inside.is_dir() else package.parent / "checkpoints" / "tiny"


def resolve_checkpoint(model_size: str, models_dir: str | Path, *, needed: Sequence[str] = FILES) -> Path:
    """Gives the folder of a checkpoint, downloading it if need be.

    A folder ``{models_dir}/{model_size}`` with all seven files is taken as it is, whatever its name: a fine-tuned model
    needs no network and need not have OpenAI's hashes.

    Args:
        model_size: "124M", "355M", "774M", "1558M", "tiny" (embedded), or the name of a complete folder.
        models_dir: the folder that holds one folder per model.
        needed: which of the seven files must be there; only these are downloaded.

    Raises:
        CheckpointError: when there is no such model.
        DownloadError: when a file cannot be fetched.
    """
    if not isinstance(model_size, str) or Path(model_size).name != model_size or model_size in ("", ".."):
        raise CheckpointError(f"model_size must be a plain name, not a path, got {model_size!r}; {CHOICES}")
    folder = Path(models_dir) / model_size
    missing = missing_files(folder, needed)
    if missing and model_size == "tiny":
        return embedded_dir()
    if missing and model_size not in SIZES and os.access(folder, os.F_OK):
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; add them or take another model: {CHOICES}")
    if missing:
        download_gpt2_files(model_size, folder, needed=needed)
    return folder


def missing_files(folder: Path, needed: Sequence[str] = FILES) -> list[str]:
    """Lists which of the needed files a folder lacks: all of them when it cannot be looked into."""
    with contextlib.suppress(OSError):
        return [name for name in needed if not (folder / name).is_file()]
    return list(needed)


def download_gpt2_files(model_size: str, model_dir: str | Path, *, needed: Sequence[str] = FILES) -> None:
    """Fetches OpenAI's files of one size, except those that are there already; a later call resumes a cut download.

    Args:
        model_size: "124M", "355M", "774M" or "1558M".
        model_dir: the folder for the seven files, such as "checkpoints/124M"; made if need be.
        needed: which of the seven files to fetch.

    Raises:
        CheckpointError: when ``model_size`` is not one of OpenAI's.
        DownloadError: when a file cannot be fetched or written, or is not what it should be.

    Source: openai/gpt-2, ``download_model.py``; jaymody/picoGPT, ``utils.py``.
    """
    if model_size in PAPER_NAMES:
        size = PAPER_NAMES[model_size]
        raise CheckpointError(f"{model_size} is the paper's name for {size}: use model_size={size!r}")
    if model_size == "tiny":
        raise CheckpointError('model_size="tiny" is embedded and needs no download; use it as it is')
    if model_size not in SIZES:
        raise CheckpointError(f"there is no model_size={model_size!r} to download; {CHOICES}")
    base_url = os.environ.get("TF_GPT2_BASE_URL") or BASE_URL
    for name in missing_files(Path(model_dir), needed):
        fetch_file(f"{base_url.rstrip('/')}/{model_size}/{name}", Path(model_dir) / name, SIZES[model_size])


def fetch_file(url: str, path: Path, config: GPT2Config) -> None:
    """Fetches one file; ``path`` exists afterwards, whole and checked, or not at all.

    Raises:
        DownloadError: one line with the URL, the folder, the reason and the way to work offline.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_part(path) as part:
            if path.is_file():  # Another process finished it before the lock was ours.
                part.truncate(0)
                return
            fill(part, url, path.name, config)
            os.fsync(part.fileno())
            if sys.platform == "win32":  # Elsewhere the lock must outlast the renaming.
                part.close()
            Path(part.name).replace(path)
    except (AttemptError, OSError) as error:
        raise DownloadError(
            f"cannot download {url} into {path.parent}: {' '.join(str(error).split())}; run again to go on where it "
            'stopped, or work offline with the embedded checkpoint: model_size="tiny" (--model_size tiny)'
        ) from error


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[BinaryIO]:
    """Opens the file that becomes ``path``, for this thread alone.

    It is ``<file>.part`` with what an earlier run left in it, and stays for a later one unless it is empty. While that
    belongs to another thread or process, it is a new file of unique name, gone at the end.
    """
    shared = open_locked(path.with_name(f"{path.name}.part"))
    with shared or path.with_name(f"{path.name}.{uuid.uuid4().hex}.part").open("a+b") as part:
        try:
            yield part
        finally:
            if shared is None:
                part.close()
            if shared is None or part.seek(0, os.SEEK_END) == 0:
                Path(part.name).unlink(missing_ok=True)


def open_locked(path: Path) -> BinaryIO | None:
    """Opens a file for appending, locked until it is closed; None when the lock cannot be had."""
    if sys.platform == "win32":  # No flock there, and an open file cannot be renamed.
        return None
    import fcntl

    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have renamed or removed it between our open and our lock.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except OSError:
        pass
    file.close()
    return None


def fill(part: BinaryIO, url: str, name: str, config: GPT2Config) -> None:
    """Fetches until ``part`` holds the whole file ``name`` of a model of shape ``config``."""
    for _ in range(2):
        length_known = fetch_rest_patiently(part, url)
        if is_genuine(Path(part.name), name, config, length_known):
            return
        # It may have been resumed from another version of the file: once more, from the first byte.
        part.truncate(0)
    raise AttemptError(f"what arrived is not the {name} of this model (by its length, SHA-256 or content)", None)


def is_genuine(body: Path, name: str, config: GPT2Config, length_known: bool) -> bool:
    """Says whether ``body`` can be the file ``name`` of a model of shape ``config``."""
    if name in SHA256:
        return hashlib.sha256(body.read_bytes()).hexdigest() == SHA256[name]
    if name == "hparams.json":
        with contextlib.suppress(CheckpointError):
            return GPT2Config.from_file(body) == config
        return False
    # Without a length, nothing else tells a cut stream of float32 weights from a whole one.
    least_bytes = 4 * config.n_params if name.startswith("model.ckpt.data") and not length_known else 1
    return body.stat().st_size >= least_bytes


def fetch_rest_patiently(part: BinaryIO, url: str) -> bool:
    """Calls ``fetch_rest`` until it succeeds, with growing waits; an attempt that got further starts the waits anew."""
    waits, furthest = iter(WAITS_S), part.seek(0, os.SEEK_END)
    while True:
        try:
            return fetch_rest(part, url)
        except AttemptError as error:
            if part.tell() > furthest:
                waits, furthest = iter(WAITS_S), part.tell()
            wait_s = next(waits, None)
            if wait_s is None or error.retry_after_s is None:
                raise
            time.sleep(max(wait_s, error.retry_after_s))


def fetch_rest(part: BinaryIO, url: str) -> bool:
    """Appends what ``part`` lacks, by one request; returns whether the server told the length of the whole file."""
    import requests  # Here, for it takes longer to import than the rest of the command line.

    size = part.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS_S) as response:
            check_response(response)
            first, total = read_extent(response)
            if first is None and total == size:
                return True
            part.seek(part.truncate(first if first == size else 0))
            if first not in (0, size):
                raise AttemptError(f"the server cannot go on from byte {size}", 0.0)
            append_body(part, response, total, f"Fetching {url.rsplit('/', 1)[-1]}")
    except requests.RequestException as error:
        # requests' errors about a URL itself are ValueErrors; a connection that timed out has been tried three times.
        hopeless = isinstance(error, (requests.ConnectTimeout, ValueError))
        raise AttemptError(root_cause(error), None if hopeless else 0.0) from error
    if total is not None and part.tell() != total:
        raise AttemptError(f"the stream ended at byte {part.tell()} of {total}", 0.0)
    return total is not None


def check_response(response: requests.Response) -> None:
    """Raises AttemptError unless a response is about the file: no error, no page."""
    code, status = response.status_code, f"HTTP status {response.status_code} {response.reason}"
    if code == 429 or code >= 500:
        wish = response.headers.get("Retry-After", "")
        wish_s = float(wish) if wish.isdigit() else 0.0  # It may be a date: then our own waits hold.
        raise AttemptError(status, wish_s if wish_s <= LONGEST_RETRY_AFTER_S else None)
    if code not in (200, 206, 416):
        raise AttemptError(status, None)
    media_type = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if code != 416 and media_type.endswith(("html", "xml")):
        raise AttemptError(f"the server sent a page ({media_type}) instead of the file", None)


def read_extent(response: requests.Response) -> tuple[int | None, int | None]:
    """Reads at which byte of the file a body starts (None: is no part of it), and the file's length (None: unknown)."""
    # The lengths of an encoded body are not those of what we write.
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() and not encoded else None
    extent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if extent is None or encoded:
        return None, None
    return int(extent[1]) if extent[1] and response.status_code == 206 else None, int(extent[2])


def append_body(part: BinaryIO, response: requests.Response, total: int | None, description: str) -> None:
    """Appends the body of a response, with a bar on stderr that counts the bytes of the whole file."""
    with tqdm(desc=description, total=total, initial=part.tell(), unit="b", unit_scale=True) as bar:
        for chunk in response.iter_content(64 * 1024):  # A cut stream loses up to one chunk.
            part.write(chunk)
            bar.update(len(chunk))
    part.flush()


def root_cause(error: BaseException) -> str:
    """Says what lies at the bottom of a network error, such as "[Errno 111] Connection refused"."""
    inner = error.__cause__ or next((arg for arg in error.args if isinstance(arg, BaseException)), None)
    return root_cause(inner) if inner else str(error) or type(error).__name__
