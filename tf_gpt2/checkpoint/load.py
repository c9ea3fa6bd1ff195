"""A model's name -> its vocabulary, hyperparameters and weights. Imports TensorFlow only to read weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tf_gpt2.checkpoint.download import resolve_checkpoint
from tf_gpt2.checkpoint.genuine import VOCABULARY_FILES
from tf_gpt2.checkpoint.params import Tree
from tf_gpt2.config import read_hparams
from tf_gpt2.tokenizer.encoder import Encoder


def load_encoder_hparams_and_params(model_size: str, models_dir: str | Path) -> tuple[Encoder, dict[str, Any], Tree]:
    """Loads a model's vocabulary, hyperparameters and weights; downloads OpenAI's files when they are not there.

    Args:
        model_size: ``"124M"``, ``"355M"``, ``"774M"``, ``"1558M"``, or the name of a folder in ``models_dir`` with the
            seven files; ``"tiny"`` is the embedded checkpoint.
        models_dir: the files are in, or go to, ``{models_dir}/{model_size}``.

    Returns:
        The encoder; ``hparams.json`` as a dict; the parameter tree, leaves float32 arrays.

    Raises:
        CheckpointError: when ``model_size`` names nothing known, or files are damaged.
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
    """Reads the vocabulary in ``{models_dir}/{model_name}``; raises what ``Encoder.from_files`` does."""
    return Encoder.from_files(resolve_checkpoint(model_name, models_dir, needed=VOCABULARY_FILES))
