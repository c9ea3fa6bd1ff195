"""Recognizes the format of a folder or file by its content, and reads hyperparameters and weights whatever it is.

Knows nothing of vocabularies. Imports TensorFlow only for weights in OpenAI's format.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tqdm import tqdm

from tf_gpt2.checkpoint import gguf, huggingface, keras_files
from tf_gpt2.checkpoint.genuine import CHECKPOINT, HPARAMS
from tf_gpt2.checkpoint.index import is_file, is_folder
from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError

logger = logging.getLogger(__name__)

Weights = Iterator[tuple[str, Any]]
"""Pairs of a leaf's path in the tree and its array, each leaf once; an array has ``shape``, ``dtype`` and rows."""


class Format(NamedTuple):
    """How the files of one format are recognized and read.

    Attributes:
        is_here: whether a folder has such files.
        read_config: folder or file -> hyperparameters.
        open_weights: folder or file, hyperparameters -> weights, one at a time.
        file: the name of a file that stands for the format, by which a user chooses it.
    """

    is_here: Callable[[Path], bool]
    read_config: Callable[[Path], GPT2Config]
    open_weights: Callable[[Path, GPT2Config], Weights]
    file: str


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder has hyperparameters and a TensorFlow checkpoint."""
    return (folder / HPARAMS).exists() and ((folder / CHECKPOINT).exists() or any(folder.glob("*.index")))


def open_openai(folder: Path, config: GPT2Config) -> Weights:
    """Opens OpenAI's checkpoint; see ``openai.open_checkpoint``."""
    opened: Weights = importlib.import_module("tf_gpt2.checkpoint.openai").open_checkpoint(folder, config)
    return opened


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "openai": Format(has_checkpoint, lambda folder: GPT2Config.from_file(folder / HPARAMS), open_openai, HPARAMS),
        "huggingface": Format(
            huggingface.is_here, huggingface.read_config, huggingface.open_weights, huggingface.CONFIG
        ),
        "keras": Format(keras_files.is_here, keras_files.read_config, keras_files.open_weights, keras_files.MODEL),
        "gguf": Format(gguf.is_here, gguf.read_config, gguf.open_weights, f"*{gguf.SUFFIX}"),
    }
)
"""The formats, in the order in which they are looked for."""

OF_FOLDERS = ("openai", "huggingface")
"""Formats of several files, which are read from a folder."""

OF_FILES: Mapping[str, str] = MappingProxyType(
    {
        gguf.SUFFIX: "gguf",
        keras_files.SUFFIX: "keras",
        keras_files.WEIGHTS_SUFFIX: "keras",
        f"/{huggingface.WEIGHTS}": "huggingface",
        f"/{huggingface.CONFIG}": "huggingface",
        f"/{HPARAMS}": "openai",
    }
)
"""The end of a file's path -> its format."""


def recognize(path: str | Path) -> tuple[str, Path]:
    """Returns the name of the format of a folder or file, and the path to read.

    A folder without any known files counts as OpenAI's: its reader says what is missing. Of several formats in a
    folder, the first of ``FORMATS`` is taken, and the log says so at level WARNING.

    Raises:
        CheckpointError: when ``path`` is neither a folder nor a file of a known format.
    """
    path = Path(path)
    if is_folder(path):
        found = [name for name, one in FORMATS.items() if one.is_here(path)] or ["openai"]
        if len(found) > 1:
            tell_of_several(path, tuple(found))
        return found[0], path
    name = next((name for ending, name in OF_FILES.items() if f"/{path.name}".endswith(ending)), None)
    if name is None or not is_file(path):
        raise CheckpointError(
            f"no model at {path}: it is not a folder, and not a file named {HPARAMS}, {huggingface.CONFIG}, "
            f"{huggingface.WEIGHTS}, *.keras, *.weights.h5 or *.gguf; download a model with 'tf-gpt2 download 124M'"
        )
    return name, path.parent if name in OF_FOLDERS else path


@functools.cache
def tell_of_several(folder: Path, found: tuple[str, ...]) -> None:
    """Logs, once, which of several formats is taken."""
    choices = ", ".join(str(folder / FORMATS[name].file) for name in found)
    holds = "%s holds a model as %s; takes %s; to choose, name a file: %s"
    logger.warning(holds, folder, ", ".join(found), found[0], choices)


def is_of_others(folder: Path) -> bool:
    """Whether a folder holds a model in another format than OpenAI's, and none in OpenAI's."""
    if not is_folder(folder) or has_checkpoint(folder):
        return False
    return any(one.is_here(folder) for one in FORMATS.values())


def read_config(path: str | Path) -> GPT2Config:
    """Reads the hyperparameters of a model in any format; raises CheckpointError when it cannot."""
    name, path = recognize(path)
    return FORMATS[name].read_config(path)


def open_weights(path: str | Path) -> tuple[GPT2Config, Weights]:
    """Reads the hyperparameters of a model, and checks its weights.

    Returns:
        The hyperparameters; and an iterator of the weights, which reads one at a time, and shows a bar on stderr when
        that takes more than a second.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    name, path = recognize(path)
    config = FORMATS[name].read_config(path)
    weights = FORMATS[name].open_weights(path, config)  # first: no model is built for a checkpoint that does not fit
    return config, with_bar(weights, config, "Loading")


def with_bar(weights: Weights, config: GPT2Config, what: str) -> Weights:
    """Yields the weights, and shows how many bytes of them are done when that takes more than a second."""
    sizes = {path: 4 * math.prod(shape) for path, shape in leaves(param_shapes(config))}
    with tqdm(total=sum(sizes.values()), desc=what, unit="B", unit_scale=True, leave=False, delay=1.0) as bar:
        for path, array in weights:
            yield path, array
            bar.update(sizes[path])
