"""Loads vocabulary, hyperparameters and weights by a model's name or folder. Imports TensorFlow only for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tf_gpt2.checkpoint.download import CHOICES, resolve_checkpoint
from tf_gpt2.checkpoint.genuine import VOCABULARY_FILES
from tf_gpt2.checkpoint.index import is_folder
from tf_gpt2.checkpoint.params import Tree
from tf_gpt2.config import SIZES, GPT2Config, read_hparams
from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer.encoder import Encoder


def find_folder(model: str | Path, models_dir: str | Path) -> Path:
    """Finds the folder of a model; downloads OpenAI's files when a size is named and they are not there.

    Args:
        model: ``"124M"``, ``"355M"``, ``"774M"``, ``"1558M"``, ``"tiny"`` (embedded), the name of a folder in
            ``models_dir``, or the path of a folder. A str that can be both counts as the name, a ``Path`` as the path.
        models_dir: holds one folder per model.

    Raises:
        CheckpointError: when there is no such model.
        DownloadError: when files cannot be fetched.
    """
    if not isinstance(model, str | Path):
        raise CheckpointError(f"model must be a name or the path of a folder, got {model!r}; {CHOICES}")
    is_name = isinstance(model, str) and Path(model).name == model and model not in ("", "..")
    if is_name and (model in SIZES or model == "tiny" or is_folder(Path(models_dir, model))):
        return resolve_checkpoint(str(model), models_dir)
    if model != "" and is_folder(Path(model)):
        return Path(model)
    if is_name:
        return resolve_checkpoint(str(model), models_dir)  # raises an error that lists the models
    raise CheckpointError(f"model={str(model)!r} is not a folder; {CHOICES}, or the path of a folder")


def read_encoder_and_config(folder: str | Path) -> tuple[Encoder, GPT2Config]:
    """Reads the vocabulary and the hyperparameters in a folder, and checks that they fit each other.

    Raises:
        CheckpointError: when a file is missing or damaged, or the two do not fit.
    """
    if not is_folder(Path(folder)):
        raise CheckpointError(
            f"folder must hold the seven files of a checkpoint, and {folder} is not a folder; "
            f"download one with 'tf-gpt2 download 124M'"
        )
    encoder, config = Encoder.from_files(folder), GPT2Config.from_file(Path(folder) / "hparams.json")
    if len(encoder) != config.n_vocab or max(encoder.decoder) >= config.n_vocab:
        raise CheckpointError(
            f"the files in {folder} do not fit each other: encoder has {len(encoder)} tokens and model "
            f"n_vocab={config.n_vocab}, ids up to {max(encoder.decoder)}; take both files from one folder"
        )
    return encoder, config


def load_encoder_hparams_and_params(model_size: str, models_dir: str | Path) -> tuple[Encoder, dict[str, Any], Tree]:
    """Loads a model's vocabulary, hyperparameters and weights; downloads OpenAI's files when they are not there.

    Args:
        model_size: ``"124M"``, ``"355M"``, ``"774M"``, ``"1558M"``, or the name of a folder in ``models_dir`` with the
            seven files; ``"tiny"`` is the embedded checkpoint.
        models_dir: holds the folder ``{models_dir}/{model_size}``; missing files are downloaded into that folder.

    Returns:
        The encoder; ``hparams.json`` as a dict; the parameter tree, leaves float32 arrays.

    Raises:
        CheckpointError: when there is no model ``model_size``, or files are damaged.
        DownloadError: when files cannot be fetched.

    Example:
        >>> encoder, hparams, params = load_encoder_hparams_and_params("tiny", "checkpoints")
        >>> params["wte"].shape == (hparams["n_vocab"], hparams["n_embd"])
        True
    """
    from tf_gpt2.checkpoint.openai import load_gpt2_params_from_tf_ckpt  # imports TensorFlow

    folder = resolve_checkpoint(model_size, models_dir)
    hparams = read_hparams(folder / "hparams.json")
    return Encoder.from_files(folder), hparams, load_gpt2_params_from_tf_ckpt(folder, hparams)


def get_encoder(model_name: str, models_dir: str | Path) -> Encoder:
    """Reads the vocabulary in ``{models_dir}/{model_name}``; raises the errors of ``Encoder.from_files``."""
    return Encoder.from_files(resolve_checkpoint(model_name, models_dir, needed=VOCABULARY_FILES))
