"""Checkpoints of a run: all that an uninterrupted run would hold at that update, whole or not there.

A checkpoint is a folder, written beside and then renamed. Its arrays are those that training changes; what is frozen
comes from the model that the run started from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_gpt2.errors import CheckpointError

KEPT = 2
"""How many checkpoints stay: should the newest be damaged, the one before is there."""

ARRAYS, STATE = "arrays.npz", "state.json"


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        update: updates made so far.
        losses: of the updates since the last line of ``lines``.
        lines: what was measured at the end of each period: ``step``, ``loss``, ``val_loss``, and so on.
        best_loss: the least held-out loss so far; ``None`` before the first.
        best_update: the updates made at that time.
    """

    update: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    lines: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_loss: float | None = None
    best_update: int = 0


def save(folder: Path, progress: Progress, arrays: Iterable[np.ndarray], options: Mapping[str, Any]) -> None:
    """Writes a checkpoint, and removes all but the newest two.

    Args:
        folder: of the run's checkpoints; made if need be.
        progress: how far the run is.
        arrays: what training changes, in an order of the caller's; one at a time is asked for.
        options: what must be the same when the run goes on; JSON can hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with staged(folder / f"step-{progress.update:08d}") as staging:
        write_arrays(staging / ARRAYS, arrays)
        content = {"progress": dataclasses.asdict(progress), "options": dict(options)}
        (staging / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        flush(staging / STATE)
    for old in checkpoints(folder)[KEPT:]:
        shutil.rmtree(old)


def load(folder: Path, options: Mapping[str, Any]) -> tuple[Progress, list[np.ndarray]] | None:
    """Reads the newest checkpoint; ``None`` where there is none.

    Raises:
        CheckpointError: when the run had other options, which the message names; or all checkpoints are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in found:
        try:
            content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            arrays = read_arrays(checkpoint / ARRAYS)
            progress, before = Progress(**content["progress"]), content["options"]
        except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile):  # damaged: the one before
            continue
        check_options(checkpoint, before, options)
        return progress, arrays
    if found:
        raise CheckpointError(f"the checkpoints in {folder} are damaged; remove the folder to start from the beginning")
    return None


def check_options(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the options of a run are those that it began with."""
    now = json.loads(json.dumps(dict(now)))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        what = "; ".join(f"{name}={now.get(name)!r}, began with {before.get(name)!r}" for name in changed)
        raise CheckpointError(
            f"{place} belongs to a run with other options: {what}; give the same, or another folder as out"
        )


def checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of a run's checkpoints, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process has left half written."""
    for part in folder.glob(".*.part*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the target's place at the end, flushed to the disk; or goes, on an error."""
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.part"))
    try:
        yield staging
        flush(staging)
        if target.exists():  # of a run that was killed and has come here again
            shutil.rmtree(target)
        staging.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_arrays(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Writes arrays as ``numpy.savez`` does, but one at a time, to a file beside; flushes it, and renames it."""
    staging = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(staging, "w") as archive:
            for i, array in enumerate(arrays):
                with archive.open(f"arr_{i}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
        flush(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)  # there only after a failure


def read_arrays(path: Path) -> list[np.ndarray]:
    """Reads the arrays that ``write_arrays`` wrote; their checksums are checked."""
    with np.load(path) as file:
        return [file[f"arr_{i}"] for i in range(len(file.files))]


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
