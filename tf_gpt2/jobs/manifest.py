"""What a job in a folder is: its options, its input's and its model's hashes, so that no other job continues it.

Imports no TensorFlow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tf_gpt2.errors import GPT2Error
from tf_gpt2.jobs.inputs import Plan, hash_of
from tf_gpt2.jobs.kinds import Job
from tf_gpt2.jobs.outputs import whole_file

NAME = "manifest.json"
VERSION = 1


class ResumeError(GPT2Error, ValueError):
    """A folder holds another job than the one that is to be continued there."""


def make_manifest(job: Job, plan: Plan, model: Path, *, dtype: str, format: str, part_size: int) -> dict[str, Any]:
    """Describes a job, by all that its answers and its parts depend on; not by workers and batch sizes."""
    return {
        "version": VERSION,
        "job": job.name,
        "options": job.options(),
        "model": {"sha256": model_hash(model), "dtype": dtype},
        "input": plan.hashes,
        "output_format": format,
        "part_size": part_size,
        "n_records": plan.n_records,
        "n_parts": len(plan.parts),
    }


def model_hash(model: Path) -> str:
    """Computes one SHA-256 of a model's file, or of the names and the contents of all files in its folder."""
    if model.is_file():
        return hash_of(model)
    digest = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.is_file() and not path.name.startswith(".")):
        digest.update(f"{path.name}\0{hash_of(path)}\0".encode())
    return digest.hexdigest()


def start_folder(folder: Path, manifest: Mapping[str, Any], *, resume: bool) -> None:
    """Makes the folder of a job, or checks that it holds this job.

    Args:
        folder: of the output.
        manifest: of the job.
        resume: whether the folder may hold a part of the job.

    Raises:
        ResumeError: when the folder holds something else; names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    if path.exists():
        if not resume:
            raise ResumeError(f"output {folder} holds a job; continue it with --resume, or name another folder")
        check_same(read_manifest(path), manifest)
        return
    if any(not one.name.startswith(".") for one in folder.iterdir()):
        raise ResumeError(f"output {folder} must be a new or an empty folder, or one of a job to resume")
    with whole_file(path) as beside:
        beside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Any:
    """Reads a manifest; raises ResumeError when it is none."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ResumeError(f"{path} is damaged: {error}; name another folder") from None


def check_same(stored: Any, wanted: Mapping[str, Any]) -> None:
    """Raises ResumeError when two manifests differ, with the names and values of what does."""
    before, now = flat(stored), flat(json.loads(json.dumps(wanted)))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(
            f"{name} was {json.dumps(before.get(name))} and is {json.dumps(now.get(name))}" for name in names
        )
        raise ResumeError(f"--resume must have the job's own options and input: {changes}")


def flat(value: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the leaves of nested dicts by their joined names; those of options by their own."""
    if not isinstance(value, dict):
        return {".".join(name for name in names if name != "options"): value}
    return {name: leaf for key, one in value.items() for name, leaf in flat(one, [*names, key]).items()}
