"""Reads and writes a GPT-2 as a folder of Hugging Face's transformers: ``config.json`` and ``model.safetensors``.

Each key of ``config.json`` is honoured, known to change no logit, or refused by name. Needs no TensorFlow. The files of
the tokenizer are read in ``vocabulary.py``.

Source: transformers 5.24, ``models/gpt2``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.checkpoint.safetensors import StoredTensor, read_tensors, write_tensors
from tf_gpt2.config import GPT2Config, read_text
from tf_gpt2.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TO_CONVERT: Mapping[str, str] = {
    "pytorch_model.bin": "a pickle, which may run any program when it is read; convert it where PyTorch is: "
    "GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder)",
    "pytorch_model.bin.index.json": "pickles, which may run any program when they are read; convert them where PyTorch "
    "is: GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder)",
    "tf_model.h5": "a file of TFGPT2LMHeadModel; convert it with transformers 4 where PyTorch and TensorFlow are: "
    "GPT2LMHeadModel.from_pretrained(folder, from_tf=True).save_pretrained(folder)",
}
"""Files of weights that are not read, and what the error says of each."""
MOST_JSON_BYTES = 1 << 24
ROWS_AT_ONCE = 2048

HONOURED: Mapping[str, str] = {
    "vocab_size": "n_vocab",
    "n_positions": "n_ctx",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
    "n_inner": "n_inner",
    "activation_function": "activation",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Key of ``config.json`` -> name in ``GPT2Config``."""

ALIASES: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names that transformers accepts. Source: ``GPT2Config.attribute_map``."""

DEFAULTS: Mapping[str, Any] = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
"""What transformers takes for a key that is not there; of the other keys, the defaults are the same as ours."""

MUST_BE: Mapping[str, Any] = {
    "model_type": "gpt2",
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "chunk_size_feed_forward": 0,
}
"""Keys of which another value would make another model."""

_WITHOUT_EFFECT = """
    _name_or_path _attn_implementation attn_implementation architectures transformers_version dtype torch_dtype
    reorder_and_upcast_attn n_ctx use_cache gradient_checkpointing output_past output_attentions output_hidden_states
    return_dict torchscript use_bfloat16 tf_legacy_loss is_decoder cross_attention_hidden_size use_return_dict
    resid_pdrop embd_pdrop attn_pdrop initializer_range predict_special_tokens
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    num_labels _num_labels id2label label2id problem_type finetuning_task task_specific_params tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens auto_map
    custom_pipelines license torch_compile _commit_hash _attn_implementation_autoset xla_device
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""Keys that change no logit: names, what transformers computes in, training, other heads, how it generates."""

TABLES: Mapping[str, str] = {"wte": "wte.weight", "wpe": "wpe.weight"}
HEAD, PREFIX = "lm_head.weight", "transformer."
LAST: Mapping[str, str] = {"w": "weight", "g": "weight", "b": "bias"}
"""Last part of a leaf's path -> last part of a tensor's name. Matrices are (n_in, n_out) in both."""

NO_WEIGHT = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)")
"""The causal mask, which older versions stored."""


def is_here(folder: Path) -> bool:
    """Whether a folder has weights in this format, be it in files that must be converted first."""
    names = (WEIGHTS, INDEX, *TO_CONVERT)
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in names)


def tensor_name(path: str) -> str:
    """Returns the name of a leaf's tensor in a base model: ``blocks/3/ln_1/g`` -> ``h.3.ln_1.weight``."""
    if path == "lm_head":
        return HEAD
    if path in TABLES:
        return TABLES[path]
    *parts, last = re.sub(r"^blocks/", "h/", path).split("/")
    return ".".join([*parts, LAST[last]])


def read_config(folder: Path) -> GPT2Config:
    """Reads ``config.json``.

    Raises:
        CheckpointError: when it cannot be read, or has a key or a value that would make another model; names it.
    """
    return config_in(folder, read_json(folder / CONFIG))


def config_in(folder: Path, keys: Mapping[str, Any]) -> GPT2Config:
    """Makes a config from what was read of ``config.json``; raises the errors of ``read_config``."""
    try:
        return config_from(keys)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not of a GPT-2 that can be computed here: {error}") from error


def config_from(keys: Mapping[str, Any]) -> GPT2Config:
    """Makes a config from the content of ``config.json``; raises ValueError or TypeError that names the key."""
    unknown = keys.keys() - HONOURED.keys() - ALIASES.keys() - MUST_BE.keys() - WITHOUT_EFFECT
    if unknown:
        names = ", ".join(sorted(name[:60] for name in unknown)[:10])
        raise ValueError(f"{names}: unknown, and may change what the model computes; remove it if it does not")
    for name, wanted in MUST_BE.items():
        if keys.get(name, wanted) != wanted and (keys[name] or wanted):
            raise ValueError(f"{name} must be {wanted!r}, got {str(keys[name])[:60]!r}")
    values = {**DEFAULTS, **{name: keys[name] for name in HONOURED if name in keys}}
    for alias, name in ALIASES.items():
        if alias in keys and name in keys and keys[alias] != keys[name]:
            raise ValueError(f"{alias} and {name} must be equal, got {str(keys[alias])[:20]}, {str(keys[name])[:20]}")
        if alias in keys:
            values[name] = keys[alias]
    return GPT2Config(**{HONOURED[name]: value for name, value in values.items()})


def config_keys(config: GPT2Config, end_of_text: int | None) -> dict[str, Any]:
    """Returns the content of ``config.json``: every honoured key, and what others need to find the model's class."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, ours) for name, ours in HONOURED.items()},
        "n_ctx": config.n_ctx,  # llama.cpp's converter reads this one
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),  # KerasHub needs the first; the paper's
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object."""
    try:
        content = json.loads(read_text(path, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error)[:300]}; copy it again from its source") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again from its source")
    return content


def open_weights(folder: Path, config: GPT2Config) -> Iterator[tuple[str, StoredTensor]]:
    """Checks a folder's weights, and returns an iterator of them; nothing is read before its rows are asked for.

    Args:
        folder: holds ``model.safetensors``, or several files and their index.
        config: the hyperparameters that the tensors must fit.

    Returns:
        An iterator of ``(path in the tree, tensor of floats)``, each leaf once.

    Raises:
        CheckpointError: at once, when a file is missing or damaged, or tensors are missing, misshapen or unexpected.
    """
    tensors = read_files(folder)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    expected = {name_in(path, prefix): (path, tuple(shape)) for path, shape in leaves(param_shapes(config))}
    if config.tie_word_embeddings and HEAD in tensors:
        head, wte = tensors.pop(HEAD), name_in("wte", prefix)
        # of two names of one tensor, some writers keep the head's
        check_tied(folder, head, tensors.setdefault(wte, head))
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name][1]:
            problems.append(f"{name}: expected {expected[name][1]}, got {tensor.shape}")
        elif name not in expected and not NO_WEIGHT.fullmatch(name):
            problems.append(f"{name[:200]}: unexpected")
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit its {CONFIG}: {'; '.join(sorted(problems)[:10])}{more}; "
            f"take both from one source"
        )
    return ((path, tensors[name]) for name, (path, _) in expected.items())


def read_files(folder: Path) -> dict[str, StoredTensor]:
    """Reads the lists of all files with weights; raises CheckpointError for a tensor that is in two of them."""
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{name[:200]} is in {tensors[name].path} and in {path.name}; copy the folder again from its source"
                )
            tensors[name] = tensor
    return tensors


def name_in(path: str, prefix: str) -> str:
    """Returns a leaf's name in a file; the head stands outside of the base model, and has no prefix."""
    name = tensor_name(path)
    return name if name == HEAD else prefix + name


def check_tied(folder: Path, head: StoredTensor, wte: StoredTensor) -> None:
    """Raises CheckpointError for a stored head that differs from the embedding although the config ties them."""
    if not are_equal(head, wte):
        raise CheckpointError(
            f"{folder} has a {HEAD} that is not the token embedding, and its {CONFIG} ties them; if the model has a "
            f'head of its own, write "tie_word_embeddings": false there'
        )


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same bits; reads some rows at a time."""
    starts = range(0, one.shape[0] if one.shape else 0, ROWS_AT_ONCE)
    same_form = (one.shape, one.dtype) == (other.shape, other.dtype)
    parts = (slice(start, start + ROWS_AT_ONCE) for start in starts)
    return same_form and all(one[part].tobytes() == other[part].tobytes() for part in parts)


def weight_files(folder: Path) -> list[Path]:
    """Lists the files with weights: one, or those that the index names.

    Raises:
        CheckpointError: when there are only files that must be converted, or the index names a file elsewhere.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        found = next((name for name in TO_CONVERT if (folder / name).exists()), None)
        if found is None:
            raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; copy it again from its source")
        raise CheckpointError(f"the weights in {folder} are not read: {found} is {TO_CONVERT[found]}")
    named = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(named.values())) if isinstance(named, dict) and all(map(is_text, named.values())) else []
    if not names:
        raise CheckpointError(f"{folder / INDEX} lists no files; copy it again from its source")
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} names {name[:200]!r}, which is no file of safetensors beside it")
    return [folder / name for name in names]


def is_text(value: Any) -> bool:
    """Whether a value is a str."""
    return isinstance(value, str)


def write(folder: Path, config: GPT2Config, weights: Iterator[tuple[str, np.ndarray]], end_of_text: int | None) -> None:
    """Writes ``config.json`` and ``model.safetensors``.

    Args:
        folder: to write to.
        config: the hyperparameters.
        weights: the leaves in the order of ``param_shapes``, one array at a time.
        end_of_text: the id of ``<|endoftext|>``.
    """
    text = json.dumps(config_keys(config, end_of_text), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    names = [(name_in(path, PREFIX), tuple(shape)) for path, shape in leaves(param_shapes(config))]
    write_tensors(folder / WEIGHTS, names, (array for _, array in weights))
