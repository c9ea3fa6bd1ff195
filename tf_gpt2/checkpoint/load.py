"""Loads vocabulary, hyperparameters and weights by a model's name, folder or file, whatever its format.

Imports TensorFlow only for weights in OpenAI's format.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tf_gpt2.checkpoint import huggingface, vocabulary
from tf_gpt2.checkpoint.download import CHOICES, resolve_checkpoint
from tf_gpt2.checkpoint.formats import FORMATS, is_of_others, open_weights, recognize
from tf_gpt2.checkpoint.genuine import HPARAMS, VOCABULARY_FILES
from tf_gpt2.checkpoint.index import is_file, is_folder
from tf_gpt2.checkpoint.params import Tree, map_leaves, param_shapes
from tf_gpt2.config import SIZES, GPT2Config, read_hparams
from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer.encoder import END_OF_TEXT, Encoder

logger = logging.getLogger(__name__)


def read_huggingface_encoder(folder: Path) -> Encoder:
    """Reads a tokenizer whose end of text is that of ``config.json``, without added tokens that the model lacks."""
    keys = huggingface.read_json(folder / huggingface.CONFIG)
    encoder = vocabulary.read_huggingface_encoder(folder, keys.get("eos_token_id"))
    return without_tokens_beyond(encoder, huggingface.config_in(folder, keys).n_vocab)


def without_tokens_beyond(encoder: Encoder, n_vocab: int) -> Encoder:
    """Leaves out the added tokens that a model has no row for, and says so in the log at level WARNING.

    transformers adds a token such as ``[PAD]`` to a tokenizer alone, without the model.
    """
    words = set(encoder.encoder.values())
    beyond = {text for text, token in encoder.special_tokens.items() if n_vocab <= token.id and token.id not in words}
    if not beyond or len(encoder) == 0:
        return encoder
    logger.warning("the model has no embedding of the added tokens %s: they are left out", ", ".join(sorted(beyond)))
    kept = {text: token for text, token in encoder.special_tokens.items() if text not in beyond}
    end = None if encoder.end_of_text is None else encoder.decode([encoder.end_of_text])
    return Encoder(encoder.encoder, vocabulary.merges_of(encoder), special_tokens=kept, end_of_text=end or END_OF_TEXT)


ENCODERS: Mapping[str, Callable[[Path], Encoder]] = MappingProxyType(
    {
        "openai": Encoder.from_files,
        "huggingface": read_huggingface_encoder,
        "keras": lambda path: Encoder.from_files(path if path.is_dir() else path.parent),
        "gguf": vocabulary.read_gguf_encoder,
    }
)
"""Name of a format -> what reads its vocabulary from a folder or file."""


def find_folder(model: str | Path, models_dir: str | Path) -> Path:
    """Finds the folder or file of a model; downloads OpenAI's files when a size is named and they are not there.

    Args:
        model: ``"124M"``, ``"355M"``, ``"774M"``, ``"1558M"``, ``"tiny"`` (embedded), the name of a folder or file in
            ``models_dir``, or the path of a folder or file. A str that can be both counts as the name, a ``Path`` as
            the path.
        models_dir: holds one folder per model.

    Raises:
        CheckpointError: when there is no such model.
        DownloadError: when files cannot be fetched.
    """
    if not isinstance(model, str | Path):
        raise CheckpointError(f"model must be a name or the path of a folder, got {model!r}; {CHOICES}")
    is_name = isinstance(model, str) and Path(model).name == model and model not in ("", "..")
    inside = Path(models_dir, model)
    if is_name and (is_file(inside) or is_of_others(inside)):
        return inside
    if is_name and (model in SIZES or model == "tiny" or is_folder(inside)):
        return resolve_checkpoint(str(model), models_dir)
    if model != "" and (is_folder(Path(model)) or is_file(Path(model))):
        return Path(model)
    if is_name:
        return resolve_checkpoint(str(model), models_dir)  # raises an error that lists the models
    raise CheckpointError(f"model={str(model)!r} is not a folder; {CHOICES}, or the path of a folder or file")


def read_encoder_and_config(folder: str | Path) -> tuple[Encoder, GPT2Config]:
    """Reads the vocabulary and the hyperparameters of a model, and checks that they fit each other.

    A vocabulary may have fewer tokens than the model: the ids above are never chosen. Where the tokenizer is not
    GPT-2's, the encoder is a ``RefusingEncoder``.

    Raises:
        CheckpointError: when a file is missing or damaged, or the two do not fit.
    """
    name, path = recognize(folder)
    encoder, config = ENCODERS[name](path), FORMATS[name].read_config(path)
    if max(encoder.decoder, default=0) >= config.n_vocab:
        raise CheckpointError(
            f"the files in {folder} do not fit each other: encoder has {len(encoder)} tokens and model "
            f"n_vocab={config.n_vocab}, ids up to {max(encoder.decoder)}; take both files from one folder"
        )
    return encoder, config


def load_encoder_hparams_and_params(model_size: str, models_dir: str | Path) -> tuple[Encoder, dict[str, Any], Tree]:
    """Loads a model's vocabulary, hyperparameters and weights; downloads OpenAI's files when they are not there.

    Args:
        model_size: ``"124M"``, ``"355M"``, ``"774M"``, ``"1558M"``, or the name of a folder in ``models_dir`` with a
            model in any format; ``"tiny"`` is the embedded checkpoint.
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
    folder = named_folder(model_size, models_dir)
    if not is_of_others(folder):
        from tf_gpt2.checkpoint.openai import load_gpt2_params_from_tf_ckpt  # imports TensorFlow

        hparams = read_hparams(folder / HPARAMS)
        return Encoder.from_files(folder), hparams, load_gpt2_params_from_tf_ckpt(folder, hparams)
    encoder, _ = read_encoder_and_config(folder)
    config, weights = open_weights(folder)
    arrays = {path: array[:].astype("float32") for path, array in weights}
    return encoder, config.to_hparams(), map_leaves(lambda path, _: arrays[path], param_shapes(config))


def named_folder(name: str, models_dir: str | Path) -> Path:
    """Returns the folder of a model's name; downloads OpenAI's files when they are not there."""
    is_name = isinstance(name, str) and Path(name).name == name
    if is_name and is_of_others(Path(models_dir, name)):
        return Path(models_dir, name)
    return resolve_checkpoint(name, models_dir)


def get_encoder(model_name: str, models_dir: str | Path) -> Encoder:
    """Reads the vocabulary of a model's name, folder or file; raises the errors of ``find_folder``."""
    is_name = isinstance(model_name, str) and Path(model_name).name == model_name
    inside = Path(models_dir, str(model_name))
    if is_name and not is_file(inside) and not is_of_others(inside):
        return Encoder.from_files(resolve_checkpoint(model_name, models_dir, needed=VOCABULARY_FILES))
    name, path = recognize(find_folder(model_name, models_dir))
    return ENCODERS[name](path)
