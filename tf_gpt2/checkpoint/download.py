"""Finds OpenAI's seven files of a checkpoint on disk, or fetches and checks them.

A file gets its final name only once it is whole. Until then it is ``<file>.part``, which a later call resumes. Knows
nothing of the meaning of weights, nor of TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from tf_gpt2.checkpoint.genuine import (
    CHECKPOINT,
    FILES,
    HPARAMS,
    META,
    PREFIX,
    VOCABULARY_FILES,
    WEIGHT_FILES,
    is_genuine,
    length_bounds,
)
from tf_gpt2.checkpoint.index import is_folder
from tf_gpt2.checkpoint.variables import find_weights
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.errors import CheckpointError, DownloadError

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
"""The address before ``/{size}/{file}``; the environment variable ``TF_GPT2_BASE_URL`` replaces it (for mirrors)."""

PAPER_NAMES: Mapping[str, str] = {"117M": "124M", "345M": "355M"}
"""The paper's name of a size -> the files': Radford et al. 2019 miscounted the parameters."""

READ_FIRST = (CHECKPOINT, HPARAMS, *VOCABULARY_FILES)
"""The files that a folder of any model has; ``checkpoint`` names the others."""

CHOICES = f'model_size is {", ".join(SIZES)}, "tiny" (embedded), or the name of a complete folder in models_dir'


def embedded_dir() -> Path:
    """Returns the folder of the embedded checkpoint "tiny": in the package (a wheel), or beside it (a checkout)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "checkpoints" / "tiny"
    return inside if inside.is_dir() else package.parent / "checkpoints" / "tiny"


def resolve_checkpoint(model_size: str, models_dir: str | Path, *, needed: Sequence[str] = FILES) -> Path:
    """Returns the folder of a checkpoint, and downloads the checkpoint if need be.

    A folder ``{models_dir}/{model_size}`` with a readable vocabulary, hyperparameters and weights is used as it is,
    whatever its name: a fine-tuned model needs no network and need not have OpenAI's hashes. In the folder of one of
    OpenAI's sizes, a file that cannot be OpenAI's is fetched anew.

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
    if model_size in SIZES:
        if missing_files(folder, [name for name in needed if name != META]):
            download_gpt2_files(model_size, folder, needed=needed)
        return folder
    absent = absent_files(folder, [name for name in needed if name in READ_FIRST])
    if absent and model_size == "tiny":
        return embedded_dir()
    if absent and is_folder(folder):
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; add them or take another model: {CHOICES}")
    if absent:
        download_gpt2_files(model_size, folder, needed=needed)  # raises: there is no such size
    return folder


def absent_files(folder: Path, needed: Sequence[str]) -> list[str]:
    """Lists the needed files that are not in a folder: all of them when the folder cannot be read."""
    with contextlib.suppress(OSError):
        return [name for name in needed if not (folder / name).is_file()]
    return list(needed)


def missing_files(folder: Path, needed: Sequence[str] = FILES, config: GPT2Config | None = None) -> list[str]:
    """Lists the needed files that a folder lacks, or has with a content that cannot belong to that name.

    Readable weights count as complete, whatever the names of their files, such as ``model-25541.index`` of a training
    run. Any vocabulary counts: a fine-tuned model need not have OpenAI's.

    Args:
        folder: holds the files.
        needed: which of the seven files must be there.
        config: the shape of the wanted size; by default of the size that the folder is named after.
    """
    absent = absent_files(folder, needed)
    stored_config = None
    with contextlib.suppress(CheckpointError):
        stored_config = GPT2Config.from_file(folder / HPARAMS)
        prefix, _ = find_weights(folder, stored_config)
        is_whole = META in absent or META not in needed or file_is_genuine(folder / META, stored_config)
        lacking = absent if is_whole else [*absent, META]
        return lacking if prefix.name == PREFIX else [name for name in lacking if name not in WEIGHT_FILES]
    config = config or SIZES.get(folder.name)
    if config is None or stored_config not in (None, config):  # a user's own model: its files are not replaced
        return absent
    return [
        name
        for name in needed
        if name in absent or (name not in VOCABULARY_FILES and not file_is_genuine(folder / name, config))
    ]


def file_is_genuine(path: Path, config: GPT2Config) -> bool:
    """Whether a file exists, and can be OpenAI's file of that name."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return is_genuine(file, path.name, config)
    return False


def download_gpt2_files(model_size: str, model_dir: str | Path, *, needed: Sequence[str] = FILES) -> None:
    """Fetches OpenAI's files of one size, except those that are there already; a later call resumes a cut download.

    Args:
        model_size: "124M", "355M", "774M" or "1558M".
        model_dir: the folder for the seven files, such as "checkpoints/124M"; made if need be.
        needed: which of the seven files to fetch.

    Raises:
        CheckpointError: when ``model_size`` is not one of OpenAI's.
        DownloadError: when a file cannot be fetched or written, or the server sends another file.

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
    for name in missing_files(Path(model_dir), needed, SIZES[model_size]):
        fetch_file(f"{base_url.rstrip('/')}/{model_size}/{name}", Path(model_dir) / name, SIZES[model_size])


def fetch_file(url: str, path: Path, config: GPT2Config) -> None:
    """Fetches one file; ``path`` exists afterwards, whole and checked, or not at all.

    Raises:
        DownloadError: one line with the URL, the folder, the reason and the way to work offline.
    """
    from tf_gpt2.checkpoint import transfer  # Here, for requests takes longer to import than the rest.

    url, auth = split_secret(url)
    source = transfer.Source(url, auth, *length_bounds(path.name, config))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_part(path) as part:
            if file_is_genuine(path, config):  # Another process finished it before the lock was ours.
                part.truncate(0)
                return
            transfer.fetch(part, source, lambda: is_genuine(part, path.name, config))
            os.fsync(part.fileno())
            if sys.platform == "win32":  # Elsewhere the lock must outlast the renaming.
                part.close()
            Path(part.name).replace(path)
    except (transfer.AttemptError, OSError) as error:
        raise DownloadError(
            f"cannot download {url} into {path.parent}: {' '.join(str(error).split())}; run again to go on where it "
            'stopped, or work offline with the embedded checkpoint: model_size="tiny" (--model_size tiny)'
        ) from error


def split_secret(url: str) -> tuple[str, tuple[str, str] | None]:
    """Takes user name and password out of a URL, so that nothing prints them.

    Raises:
        DownloadError: when it has an ``@`` and no host behind it: any part of it may then belong to a password.
    """
    try:
        parts = urlsplit(url)
        userinfo, _, host = parts.netloc.rpartition("@")
        plain = parts._replace(netloc=host).geturl()
        is_sound = host != "" and (parts.port is None or parts.port >= 0)
    except ValueError:
        is_sound = False
    if "@" in url and (not is_sound or (userinfo and "@" in plain)):
        raise DownloadError(
            f"cannot download ***@{url.rpartition('@')[2]}: this is no address such as https://name:secret@host/path; "
            f"check TF_GPT2_BASE_URL, and write / and @ in a password as %2F and %40"
        )
    if not is_sound or not userinfo:
        return url, None
    user, _, password = userinfo.partition(":")
    return plain, (unquote(user), unquote(password))


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[BinaryIO]:
    """Opens the file that becomes ``path``, for this thread alone.

    It is ``<file>.part`` with the bytes of an earlier run, and stays for a later run unless it is empty. While another
    thread or process holds that file, it is a new file of unique name, which is removed at the end.
    """
    shared = open_locked(path.with_name(f"{path.name}.part"))
    with shared or path.with_name(f"{path.name}.{uuid.uuid4().hex}.part").open("x+b") as part:
        try:
            yield part
        finally:
            if shared is None:
                part.close()
            if shared is None or part.seek(0, os.SEEK_END) == 0:
                Path(part.name).unlink(missing_ok=True)


def open_locked(path: Path) -> BinaryIO | None:
    """Opens a file for appending, locked until it is closed; None when the lock is taken, or it is not a plain file.

    A link is not followed, so that a planted one cannot make this write outside the folder.
    """
    if sys.platform == "win32":  # No flock there, and an open file cannot be renamed.
        return None
    import fcntl

    def open_plainly(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    try:
        file = open(path, "a+b", opener=open_plainly)  # noqa: SIM115
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(file.fileno())
        # Its last owner may have renamed or removed it between our open and our lock.
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and os.path.samestat(status, path.lstat()):
            return file
    except OSError:
        pass
    file.close()
    return None
