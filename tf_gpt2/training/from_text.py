"""From text files and a model's folder to the folder of a fine-tuned model: what ``tf-gpt2 finetune`` calls."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import tensorflow as tf

from tf_gpt2.checkpoint.formats import is_of_others
from tf_gpt2.checkpoint.load import read_encoder_and_config
from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt
from tf_gpt2.checkpoint.vocabulary import check_openai, write_openai
from tf_gpt2.errors import CheckpointError
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.lora import save_lora
from tf_gpt2.tokenizer.encoder import Encoder
from tf_gpt2.training.data import DataError, Ids, held_out_windows, read_ids, shuffled_windows, windows_per_epoch
from tf_gpt2.training.fit import CHECKPOINTS, check_numbers, finetune, fingerprint, is_chief, remove_checkpoints

DTYPES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "mixed_bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
"""What each name means for a ``GPT2Model`` that is trained."""

HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 1 << 16
"""The part of the text's end that is held out, and most tokens of it: measuring should take little of the time."""

TOKENS_PER_BATCH = 2048
"""Tokens of a batch where no size is given."""

EPOCHS, FEWEST_STEPS, MOST_STEPS = 3, 100, 2000
"""What ``steps`` is by default: three epochs, but not so few that a short text is hardly read, nor very many."""

RATE, LORA_RATE = 1e-4, 1e-3
"""The learning rate by default, of all weights and of LoRA's: those begin at zero, and bear a higher one."""

LORA_TARGETS = ("c_attn",)
"""What LoRA is added to by default, as in PEFT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train on, and how. ``None`` stands for a default that depends on the text or the model.

    Attributes:
        text: files and folders, as for ``text_dataset``.
        validation: files to measure the held-out loss on; by default the end of the text.
        field: the key of the text in JSONL.
        steps: updates of the weights.
        epochs: instead of ``steps``, how often to read the text.
        batch_size: windows per batch.
        length: tokens of a window; the model's ``n_ctx`` by default.
        learning_rate: the highest.
        warmup_steps: updates until it is reached.
        weight_decay: of matrices.
        accumulate: batches per update.
        dropout: rate.
        dtype: ``"float32"``, ``"bfloat16"`` for mixed precision, ``"int8"`` and ``"int4"`` for LoRA over such weights.
        remat: compute each block again for its gradients, to keep less memory.
        lora_rank: of LoRA; ``None`` trains all weights.
        lora_alpha: its scale times the rank.
        lora_targets: its matrices.
        save_every: updates between two checkpoints.
        sample_every: updates between two samples; 0 for none.
        seed: of the order, dropout and samples.
    """

    text: Sequence[Path]
    validation: Sequence[Path] = ()
    field: str = "text"
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    length: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    accumulate: int = 1
    dropout: float = 0.1
    dtype: str = "float32"
    remat: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: Sequence[str] = LORA_TARGETS
    save_every: int | None = None
    sample_every: int = 0
    seed: int = 0


def finetune_text(
    folder: str | Path, out: str | Path, recipe: Recipe, *, progress: bool | TextIO = True
) -> dict[str, Any]:
    """Fine-tunes the model in a folder, and writes the result as OpenAI's seven files.

    An interrupted call goes on when it is made again. With LoRA, ``out/adapter`` holds the adapter in PEFT's format,
    and the seven files the sum.

    Args:
        folder: holds the seven files of the model to start from.
        out: the folder of the result; ``out/training`` holds checkpoints meanwhile, and tables and pictures.
        recipe: what to train on, and how.
        progress: as for ``finetune``.

    Returns:
        What the last and the best period measured: Keras's history as a dict.

    Raises:
        CheckpointError: when ``out`` has a model already, or the run of another recipe.
        DataError: when a text cannot be read.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
        ValueError: when an option is out of range.
    """
    folder, out = Path(folder), Path(out)
    check_recipe(recipe)
    check_out(out)
    encoder, config = read_encoder_and_config(folder)
    check_openai(encoder)  # before the hours of training: the result is written with this vocabulary
    training, held_out = read_parts(recipe, encoder)
    length = config.n_ctx if recipe.length is None else recipe.length
    if not 1 <= length <= config.n_ctx:
        raise ValueError(f"length must be in [1, {config.n_ctx}], the model's window, got {length}")
    batch_size = max(1, TOKENS_PER_BATCH // length) if recipe.batch_size is None else recipe.batch_size
    sizes = {"n_ctx": length, "batch_size": batch_size}
    steps = count_updates(recipe, windows_per_epoch(training, length), sizes["batch_size"])
    with strategy_scope():
        model = GPT2Model.from_checkpoint(folder, dropout=recipe.dropout, **DTYPES[recipe.dtype])
        if recipe.lora_rank is not None:
            model.enable_lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets, recipe.seed)
        history = finetune(
            model,
            shuffled_windows(training, seed=recipe.seed, **sizes),
            steps=steps,
            validation=held_out_windows(held_out, **sizes) if len(held_out) > 1 else None,
            encoder=encoder,
            out=out,
            learning_rate=default_rate(recipe) if recipe.learning_rate is None else recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            accumulate=recipe.accumulate,
            remat=recipe.remat,
            seed=recipe.seed,
            save_every=max(1, min(100, steps // 5)) if recipe.save_every is None else recipe.save_every,
            sample_every=recipe.sample_every,
            about=about(recipe, model, training, held_out),
            progress=progress,
        )
        if is_chief():
            write_result(model, encoder, folder.name, out)
            remove_checkpoints(out)
    return dict(history.history)


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError for options that do not go together."""
    if recipe.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {recipe.dtype!r}")
    if "quantization" in DTYPES[recipe.dtype] and recipe.lora_rank is None:
        raise ValueError(
            f"dtype={recipe.dtype!r} needs lora_rank: integers cannot be trained, what LoRA adds to them can"
        )
    if recipe.steps is not None and recipe.epochs is not None:
        raise ValueError(
            f"steps={recipe.steps} and epochs={recipe.epochs} both say how long to train; give one of them"
        )
    if recipe.lora_rank is None and (recipe.lora_alpha is not None or tuple(recipe.lora_targets) != LORA_TARGETS):
        raise ValueError("lora_alpha and lora_targets need lora_rank: without it all weights are trained")
    numbers = {name: getattr(recipe, name) for name in ("steps", "epochs", "batch_size", "accumulate")}
    check_numbers(**{name: number for name, number in numbers.items() if number is not None})
    if not 0 <= recipe.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {recipe.dropout}")


def check_out(out: Path) -> None:
    """Raises CheckpointError when a folder holds a model and no run that could go on."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"out={out} is a file; name a folder")
    has_model = (out / "hparams.json").exists() or is_of_others(out)
    if has_model and not list((out / CHECKPOINTS).glob("step-*")):
        raise CheckpointError(f"out={out} holds a model already; name another folder, or remove this one first")


def read_parts(recipe: Recipe, encoder: Any) -> tuple[Ids, Ids]:
    """Reads the text to train on, and the text to measure the held-out loss on."""
    ids = read_ids(recipe.text, encoder, field=recipe.field)
    if recipe.validation:
        held_out = read_ids(recipe.validation, encoder, field=recipe.field)
        if len(held_out) < 2:
            raise DataError(f"validation must have at least 2 tokens to measure with, got {len(held_out)}")
        return ids, held_out
    return ids.split(min(int(len(ids) * HELD_OUT_SHARE), MOST_HELD_OUT))


def count_updates(recipe: Recipe, n_windows: int, batch_size: int) -> int:
    """Returns the updates of a run."""
    if recipe.steps is not None:
        return recipe.steps
    in_epochs = -(-n_windows * (recipe.epochs or EPOCHS) // (batch_size * recipe.accumulate))
    return in_epochs if recipe.epochs else min(max(in_epochs, FEWEST_STEPS), MOST_STEPS)


def default_rate(recipe: Recipe) -> float:
    """Returns the learning rate where none is given."""
    return RATE if recipe.lora_rank is None else LORA_RATE


def about(recipe: Recipe, model: GPT2Model, training: Ids, held_out: Ids) -> dict[str, Any]:
    """Returns what must be the same when a run goes on, beside what ``finetune`` compares."""
    return {
        "text": training.fingerprint(),
        "validation": held_out.fingerprint() if len(held_out) else None,
        "trained_weights": fingerprint(variable.numpy() for variable in model.trainable_weights),
        "quantization": DTYPES[recipe.dtype].get("quantization"),
    }


def write_result(model: GPT2Model, encoder: Encoder, base: str, out: Path) -> None:
    """Writes the seven files, the vocabulary's first: the folder is a model only when it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    if model.lora is not None:
        save_lora(model, out / "adapter", base=base)
    write_openai(encoder, out)
    save_gpt2_params_to_tf_ckpt(model.get_params(), model.config.to_hparams(), out)


@contextlib.contextmanager
def strategy_scope() -> Iterator[None]:
    """Enters the strategy of several workers where ``TF_CONFIG`` names a cluster."""
    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster")
    if not cluster:
        yield
        return
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        yield
