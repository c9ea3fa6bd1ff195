"""``save_lora`` and ``load_lora``: a model's LoRA additions as PEFT's folder."""

from __future__ import annotations

from tf_gpt2.model.lora import load_lora, save_lora

__all__ = ["load_lora", "save_lora"]
