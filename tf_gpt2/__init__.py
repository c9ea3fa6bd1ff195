"""GPT-2 in TensorFlow and Keras, from OpenAI's own files to generated text.

The public names are loaded when first used, so that ``import tf_gpt2`` and the tokenizer do not wait for TensorFlow.
The import does nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names that ``__getattr__`` loads, for editors and type checkers
    from tf_gpt2.checkpoint.download import download_gpt2_files as download_gpt2_files
    from tf_gpt2.checkpoint.load import (
        get_encoder as get_encoder,
        load_encoder_hparams_and_params as load_encoder_hparams_and_params,
    )
    from tf_gpt2.checkpoint.openai import (
        load_gpt2_params_from_tf_ckpt as load_gpt2_params_from_tf_ckpt,
        save_gpt2_params_to_tf_ckpt as save_gpt2_params_to_tf_ckpt,
    )
    from tf_gpt2.config import GPT2Config as GPT2Config
    from tf_gpt2.errors import (
        CheckpointError as CheckpointError,
        ContextLengthError as ContextLengthError,
        DownloadError as DownloadError,
        GPT2Error as GPT2Error,
        ParamsError as ParamsError,
    )
    from tf_gpt2.generation.beam import BeamSearchResult as BeamSearchResult, beam_search as beam_search
    from tf_gpt2.generation.generate import generate as generate
    from tf_gpt2.generation.run import GenerationResult as GenerationResult
    from tf_gpt2.generation.scoring import Score as Score
    from tf_gpt2.model.gpt2 import GPT2Model as GPT2Model
    from tf_gpt2.model.layers import MLP as MLP, Block as Block, CausalSelfAttention as CausalSelfAttention
    from tf_gpt2.serving.export import export_saved_model as export_saved_model
    from tf_gpt2.text.generator import TextGenerator as TextGenerator, load as load
    from tf_gpt2.text.perplexity import Perplexity as Perplexity
    from tf_gpt2.text.pieces import Completion as Completion
    from tf_gpt2.text.saving import save as save
    from tf_gpt2.tokenizer.encoder import Encoder as Encoder

_HOMES = {
    "CausalSelfAttention": "tf_gpt2.model.layers",
    "MLP": "tf_gpt2.model.layers",
    "Block": "tf_gpt2.model.layers",
    "GPT2Model": "tf_gpt2.model.gpt2",
    "GPT2Config": "tf_gpt2.config",
    "BeamSearchResult": "tf_gpt2.generation.beam",
    "Encoder": "tf_gpt2.tokenizer.encoder",
    "Completion": "tf_gpt2.text.pieces",
    "GenerationResult": "tf_gpt2.generation.run",
    "Perplexity": "tf_gpt2.text.perplexity",
    "Score": "tf_gpt2.generation.scoring",
    "TextGenerator": "tf_gpt2.text.generator",
    "beam_search": "tf_gpt2.generation.beam",
    "download_gpt2_files": "tf_gpt2.checkpoint.download",
    "export_saved_model": "tf_gpt2.serving.export",
    "generate": "tf_gpt2.generation.generate",
    "get_encoder": "tf_gpt2.checkpoint.load",
    "load": "tf_gpt2.text.generator",
    "save": "tf_gpt2.text.saving",
    "load_encoder_hparams_and_params": "tf_gpt2.checkpoint.load",
    "load_gpt2_params_from_tf_ckpt": "tf_gpt2.checkpoint.openai",
    "save_gpt2_params_to_tf_ckpt": "tf_gpt2.checkpoint.openai",
    "GPT2Error": "tf_gpt2.errors",
    "CheckpointError": "tf_gpt2.errors",
    "ContextLengthError": "tf_gpt2.errors",
    "DownloadError": "tf_gpt2.errors",
    "ParamsError": "tf_gpt2.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("tf_gpt2._version").package_version()
    if name == "training":  # ``tf_gpt2.training.finetune`` without another import
        return importlib.import_module("tf_gpt2.training")
    if name not in _HOMES:
        raise AttributeError(f"module 'tf_gpt2' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
