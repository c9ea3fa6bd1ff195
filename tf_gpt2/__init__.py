"""GPT-2 in TensorFlow and Keras, from OpenAI's own files to generated text.

Names are loaded when first used, so that ``import tf_gpt2`` and the tokenizer do not wait for TensorFlow.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what ``__getattr__`` loads, for editors and type checkers
    from tf_gpt2.checkpoint.download import download_gpt2_files as download_gpt2_files
    from tf_gpt2.checkpoint.load import (
        get_encoder as get_encoder,
    )
    from tf_gpt2.checkpoint.load import (
        load_encoder_hparams_and_params as load_encoder_hparams_and_params,
    )
    from tf_gpt2.checkpoint.openai import (
        load_gpt2_params_from_tf_ckpt as load_gpt2_params_from_tf_ckpt,
    )
    from tf_gpt2.checkpoint.openai import (
        save_gpt2_params_to_tf_ckpt as save_gpt2_params_to_tf_ckpt,
    )
    from tf_gpt2.config import GPT2Config as GPT2Config
    from tf_gpt2.errors import (
        CheckpointError as CheckpointError,
    )
    from tf_gpt2.errors import (
        ContextLengthError as ContextLengthError,
    )
    from tf_gpt2.errors import (
        DownloadError as DownloadError,
    )
    from tf_gpt2.errors import (
        GPT2Error as GPT2Error,
    )
    from tf_gpt2.errors import (
        ParamsError as ParamsError,
    )
    from tf_gpt2.generation.beam import BeamSearchResult as BeamSearchResult
    from tf_gpt2.generation.beam import beam_search as beam_search
    from tf_gpt2.generation.generate import generate as generate
    from tf_gpt2.generation.result import GenerationResult as GenerationResult
    from tf_gpt2.generation.scoring import Score as Score
    from tf_gpt2.model.gpt2 import GPT2Model as GPT2Model
    from tf_gpt2.model.layers import MLP as MLP
    from tf_gpt2.model.layers import Block as Block
    from tf_gpt2.model.layers import CausalSelfAttention as CausalSelfAttention
    from tf_gpt2.serving.export import export_saved_model as export_saved_model
    from tf_gpt2.text.generator import TextGenerator as TextGenerator
    from tf_gpt2.text.perplexity import Perplexity as Perplexity
    from tf_gpt2.text.pieces import Completion as Completion
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
    "GenerationResult": "tf_gpt2.generation.result",
    "Perplexity": "tf_gpt2.text.perplexity",
    "Score": "tf_gpt2.generation.scoring",
    "TextGenerator": "tf_gpt2.text.generator",
    "beam_search": "tf_gpt2.generation.beam",
    "download_gpt2_files": "tf_gpt2.checkpoint.download",
    "export_saved_model": "tf_gpt2.serving.export",
    "generate": "tf_gpt2.generation.generate",
    "get_encoder": "tf_gpt2.checkpoint.load",
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
    if name not in _HOMES:
        raise AttributeError(f"module 'tf_gpt2' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


class _RegisterAfterKeras(importlib.abc.MetaPathFinder):
    """Imports the layers right after Keras, so that ``keras.models.load_model`` knows them; does not import Keras."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "keras":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("keras")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                importlib.import_module("tf_gpt2.model.gpt2")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "keras" in sys.modules:
    importlib.import_module("tf_gpt2.model.gpt2")
else:
    sys.meta_path.insert(0, _RegisterAfterKeras())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
