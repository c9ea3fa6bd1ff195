"""Reads and writes a LoRA adapter as PEFT's folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Knows nothing of models: an adapter is a rank, a scale and two matrices for each name such as ``"h.0.attn.c_attn"``.
What PEFT's config asks for and this package lacks is refused by its key.

Source: PEFT 0.21, ``LoraConfig``, ``utils/save_and_load.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_gpt2.checkpoint.safetensors import DTYPES, read_dtypes, read_tensors, write_tensors
from tf_gpt2.config import read_text
from tf_gpt2.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, ROOT = "base_model.model.", "transformer."
"""What PEFT puts before a name, and what the name begins with in ``GPT2LMHeadModel``; in ``GPT2Model`` nothing."""
MOST_CONFIG_BYTES = 1 << 20

READ = ("r", "lora_alpha", "target_modules", "use_rslora")
"""Keys whose values decide what the adapter computes."""

NEEDED = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (True,),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
"""Keys that may have these values only. GPT-2's matrices are (n_in, n_out) in Hugging Face: ``fan_in_fan_out``."""

WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""Keys that change nothing of what a loaded adapter computes."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        rank: r.
        alpha: the scale times the rank.
        targets: names of matrices, or the ends of them, as in PEFT's ``target_modules``.
        pairs: ``a``, floats (r, n_in), and ``b``, (n_out, r), of each matrix, by names such as ``"h.0.attn.c_attn"``.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_adapter(adapter: Adapter, folder: str | Path, *, base: str | None = None) -> None:
    """Writes an adapter's folder; each file is written beside and then renamed, the config last.

    Args:
        adapter: the adapter.
        folder: made if need be; files of the same names are replaced.
        base: the name of the model that it belongs to, for PEFT's ``base_model_name_or_path``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in adapter.pairs.items():
        tensors[f"{PREFIX}{ROOT}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{ROOT}{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "target_modules": list(adapter.targets),
        "fan_in_fan_out": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / CONFIG).unlink(missing_ok=True)  # in between the folder holds no adapter
    shapes = [(name, array.shape) for name, array in tensors.items()]
    replace(folder / WEIGHTS, lambda path: write_tensors(path, shapes, iter(tensors.values())))
    replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2), encoding="utf-8"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside, and renames it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def read_adapter(folder: str | Path, names: Sequence[str]) -> Adapter:
    """Reads an adapter's folder.

    Args:
        folder: as ``write_adapter``, or PEFT's ``save_pretrained``, makes it.
        names: of the matrices that the model could adapt, such as ``"h.0.attn.c_attn"``.

    Raises:
        CheckpointError: when a file is missing or damaged, the config asks for what is not supported, which its key
            tells, or a matrix lacks its pair.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    rank, alpha = number_in(config, "r", int, folder), number_in(config, "lora_alpha", (int, float), folder)
    found = read_dtypes(folder / WEIGHTS)
    root = "" if any(key.startswith(f"{PREFIX}h.") for key in found) else ROOT
    targets, adapted = resolve_targets(config.get("target_modules"), names, folder, root)
    keys = {name: [f"{PREFIX}{root}{name}.lora_{half}.weight" for half in "AB"] for name in adapted}
    check_keys(folder, [key for pair in keys.values() for key in pair], found)
    tensors, pairs = read_tensors(folder / WEIGHTS), {}
    for name, (key_a, key_b) in keys.items():
        a, b = tensors[key_a], tensors[key_b]
        if len(a.shape) != 2 or a.shape[0] != rank or b.shape[1:] != (rank,):
            raise CheckpointError(
                f"{folder / WEIGHTS} has {name} in the shapes {a.shape} and {b.shape}, which do not fit r={rank}"
            )
        pairs[name] = a[:].astype(np.float32), b[:].astype(np.float32)
    return Adapter(rank, alpha * rank**0.5 if config.get("use_rslora") else alpha, targets, pairs)


def read_config(path: Path) -> dict[str, Any]:
    """Reads ``adapter_config.json`` and checks that nothing in it asks for more than is supported."""
    try:
        config = json.loads(read_text(path, MOST_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; name a folder that PEFT or save_lora has written"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object; name a folder that PEFT or save_lora has written")
    for key, value in config.items():
        is_default = value in (None, False, 0, "", [], {})
        if key in NEEDED:
            is_accepted = any(value is one or (isinstance(one, str) and value == one) for one in NEEDED[key])
        else:
            is_accepted = is_default or key in READ or key in WITHOUT_EFFECT
        if not is_accepted:
            raise CheckpointError(
                f"{path} has {key}={value!r}, which tf_gpt2 does not support; merge it with PEFT first"
            )
    if config.get("peft_type") != "LORA" or "fan_in_fan_out" not in config:
        raise CheckpointError(f"{path} must have peft_type='LORA' and fan_in_fan_out=True, got {sorted(config)}")
    return config


def number_in(config: Mapping[str, Any], key: str, kind: Any, folder: Path) -> Any:
    """Returns a number above 0 of the config."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
        raise CheckpointError(f"{folder / CONFIG} has {key}={value!r}, must be a number above 0")
    return value


def resolve_targets(targets: Any, names: Sequence[str], folder: Path, root: str) -> tuple[list[str], list[str]]:
    """Returns the places of a block, such as ``"attn.c_attn"``, and the matrices that PEFT's ``target_modules`` names.

    A list has whole names or ends of names, a string is a pattern for whole names, or ``"all-linear"``. Whole names
    begin with ``root``. Each block must have the same.
    """
    if isinstance(targets, str):
        adapted = [name for name in names if matches(targets, root + name, folder)]
        unknown = []
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        adapted = [name for name in names if any(is_named(root + name, target) for target in targets)]
        unknown = [target for target in targets if not any(is_named(root + name, target) for name in names)]
    else:
        adapted, unknown = [], []
    places = sorted({place_of(name) for name in adapted})
    if unknown or not adapted or adapted != [name for name in names if place_of(name) in places]:
        raise CheckpointError(
            f"{folder / CONFIG} has target_modules={unknown or targets!r}, must name matrices of GPT-2's blocks, the "
            f"same in each"
        )
    return places, adapted


def matches(pattern: str, name: str, folder: Path) -> bool:
    """Whether a pattern matches a name."""
    try:
        return pattern == "all-linear" or re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(f"{folder / CONFIG} has target_modules={pattern!r}: {error}") from error


def is_named(name: str, target: str) -> bool:
    """Whether a target is a matrix's whole name in Hugging Face's model, or the end of it."""
    return f".{name}".endswith(f".{target}")


def place_of(name: str) -> str:
    """Returns a matrix's name in its block: ``"h.0.attn.c_attn"`` -> ``"attn.c_attn"``."""
    return name.split(".", 2)[2]


def check_keys(folder: Path, expected: Sequence[str], found: Mapping[str, str]) -> None:
    """Raises CheckpointError unless a file has exactly the tensors that its config promises, and they are floats.

    Args:
        folder: of the file.
        expected: the names of the tensors.
        found: the names of all tensors in the file, and of their dtypes.
    """
    for key in expected:
        if key not in found:
            raise CheckpointError(f"{folder / WEIGHTS} has no {key}, which target_modules in {CONFIG} asks for")
        if found[key] not in DTYPES:
            raise CheckpointError(
                f"{folder / WEIGHTS} has {key} as {found[key][:20]}, must be one of {', '.join(DTYPES)}; save the "
                f"adapter in floats"
            )
    for key in found:
        if key not in expected:
            raise CheckpointError(f"{folder / WEIGHTS} has {key[:200]}, which target_modules in {CONFIG} does not name")
