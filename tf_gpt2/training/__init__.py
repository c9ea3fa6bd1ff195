"""Fine-tunes GPT-2: data, losses, one training step for any number of devices, exact resumption, LoRA.

The public names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tf_gpt2.model.lora import load_lora as load_lora, save_lora as save_lora
    from tf_gpt2.training.data import DataError as DataError, text_dataset as text_dataset
    from tf_gpt2.training.fit import finetune as finetune
    from tf_gpt2.training.losses import NextTokenLoss as NextTokenLoss

_HOMES = {
    "DataError": "tf_gpt2.training.data",
    "NextTokenLoss": "tf_gpt2.training.losses",
    "finetune": "tf_gpt2.training.fit",
    "load_lora": "tf_gpt2.model.lora",
    "save_lora": "tf_gpt2.model.lora",
    "text_dataset": "tf_gpt2.training.data",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tf_gpt2.training' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
