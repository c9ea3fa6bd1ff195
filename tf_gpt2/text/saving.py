"""``save``: writes a model and its vocabulary in any format that ``load`` reads.

The folder or file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_gpt2.checkpoint import gguf, huggingface, keras_files, vocabulary
from tf_gpt2.checkpoint.formats import with_bar
from tf_gpt2.checkpoint.genuine import HPARAMS
from tf_gpt2.checkpoint.params import leaves, map_leaves, param_shapes
from tf_gpt2.config import GPT2Config
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.tokenizer.encoder import Encoder

FORMATS = ("openai", "huggingface", "keras", "gguf")
GGUF_FILE = f"model{gguf.SUFFIX}"


def save(
    model: GPT2Model,
    encoder: Encoder | None,
    folder: str | Path,
    format: str = "openai",
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Writes a model and its vocabulary; what the format cannot express is refused before anything is written.

    Args:
        model: the model; 8-bit and 4-bit matrices, and those with LoRA, are written as the floats that they stand for,
            but for 8-bit ones in a ``.keras`` file.
        encoder: its vocabulary; None writes weights and hyperparameters only.
        folder: to write to; with ``format="gguf"`` also a file's path that ends in ``.gguf``.
        format: ``"openai"``, the seven files, which other tools read if the architecture is OpenAI's;
            ``"huggingface"``, a folder for transformers; ``"keras"``, ``model.keras`` with the vocabulary beside it;
            ``"gguf"``, one file for llama.cpp.
        dtype: of the matrices in a file of GGUF: ``"float32"``, ``"float16"`` or ``"q8_0"``; elsewhere ``"float32"``,
            in a ``.keras`` file the model's own.
        overwrite: whether to replace the folder or file, with all that is in it.

    Returns:
        The folder, or the file.

    Raises:
        FileExistsError: when it exists, and is no empty folder.
        ValueError: when the format is unknown, or cannot express the model or its vocabulary.

    Example:
        >>> from tf_gpt2.text.generator import load
        >>> model, encoder = load("tiny")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again, _ = load(save(model, encoder, folder, format="huggingface"))
        >>> bool(np.all(again.wte.numpy() == model.wte.numpy()))
        True
    """
    check(model.config, encoder, format, dtype)
    target = Path(folder)
    is_file = format == "gguf" and target.suffix == gguf.SUFFIX
    with replacing(target, overwrite=overwrite) as made:
        if is_file:
            write_gguf(made, model, encoder, dtype)
        else:
            made.mkdir()
            WRITERS[format](made, model, encoder, dtype)
    return target


def check(config: GPT2Config, encoder: Encoder | None, format: str, dtype: str) -> None:
    """Raises ValueError for what a format cannot express."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "gguf":
        gguf.check_expressible(config, dtype)
    elif dtype != "float32":
        raise ValueError(f"dtype must be 'float32' with format={format!r}, got {dtype!r}")
    if encoder is None:
        return
    if len(encoder) == 0:
        raise ValueError("encoder has no tokens that could be written; save with encoder=None")
    if max(encoder.decoder) >= config.n_vocab:
        raise ValueError(f"encoder has ids up to {max(encoder.decoder)} and model n_vocab={config.n_vocab}")
    if format in ("openai", "keras"):
        vocabulary.check_openai(encoder)
    elif format == "huggingface":
        vocabulary.named_vocabulary(encoder)
    else:
        vocabulary.check_gguf(encoder)


@contextlib.contextmanager
def replacing(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a path to write to, and moves what is there to the target if no error occurs.

    Raises:
        FileExistsError: when the target exists, and is no empty folder, and may not be replaced.
    """
    target = target.absolute()  # "." has neither name nor parent
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not overwrite and not is_empty:
        raise FileExistsError(f"{target} exists already; choose another name, or overwrite it")
    if target.exists() and not target.is_dir() and not target.is_file():
        raise FileExistsError(f"{target} is a device or a pipe; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, because a move must not cross file systems
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / "new"
        yield made
        if target.is_dir() and not made.is_dir():
            raise FileExistsError(f"{target} is a folder; name a file")
        take_place(made, target, Path(scratch) / "old")


def take_place(made: Path, target: Path, aside: Path) -> None:
    """Moves what was made to the target; what is there goes aside, and comes back on an error or an interruption.

    No system call that Python knows swaps two folders. A process that is killed between the two moves leaves both of
    them, whole, in the scratch folder beside the target.
    """
    if not made.is_dir():
        made.replace(target)  # a file takes another's place in one step
        return
    try:
        if target.exists():
            target.rename(aside)
        made.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def arrays_of(model: GPT2Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the model's leaves, one copy at a time, in the order of ``param_shapes``; shows a bar if it takes long."""
    own = dict(leaves(model.leaf_tree()))
    arrays = ((path, own[path].read()) for path, _ in leaves(param_shapes(model.config)))
    return with_bar(arrays, model.config, "Saving")


def write_openai(folder: Path, model: GPT2Model, encoder: Encoder | None, dtype: str) -> None:
    """Writes the seven files."""
    from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt

    arrays = dict(arrays_of(model))
    params = map_leaves(lambda path, _: arrays[path], param_shapes(model.config))
    save_gpt2_params_to_tf_ckpt(params, model.config.to_hparams(), folder)
    if encoder is not None:
        vocabulary.write_openai(encoder, folder)


def write_huggingface(folder: Path, model: GPT2Model, encoder: Encoder | None, dtype: str) -> None:
    """Writes a folder for transformers."""
    end = None if encoder is None else encoder.end_of_text
    huggingface.write(folder, model.config, arrays_of(model), end)
    if encoder is not None:
        vocabulary.write_huggingface(encoder, folder, model.config.n_ctx)


def write_keras(folder: Path, model: GPT2Model, encoder: Encoder | None, dtype: str) -> None:
    """Writes ``model.keras``, hyperparameters for people, and the vocabulary."""
    # load knows neither additions nor 4-bit matrices in such a file
    is_readable = model.lora is None and model.quantization != "int4"
    keras_files.write(folder, model if is_readable else as_floats(model))
    (folder / HPARAMS).write_text(json.dumps(model.config.to_hparams()) + "\n", encoding="utf-8")
    if encoder is not None:
        vocabulary.write_openai(encoder, folder)


def as_floats(model: GPT2Model) -> GPT2Model:
    """Makes a float32 model of the numbers that a model computes with."""
    floats = GPT2Model(model.config, model.dropout)
    floats.set_weights(model.get_params())
    return floats


def write_gguf(file: Path, model: GPT2Model, encoder: Encoder | None, dtype: str) -> None:
    """Writes a file for llama.cpp."""
    entries = [] if encoder is None else vocabulary.gguf_entries(encoder, model.config.n_vocab)
    gguf.write(file, model.config, arrays_of(model), dtype, entries)


WRITERS: Mapping[str, Any] = {
    "openai": write_openai,
    "huggingface": write_huggingface,
    "keras": write_keras,
    "gguf": lambda folder, *args: write_gguf(folder / GGUF_FILE, *args),
}
