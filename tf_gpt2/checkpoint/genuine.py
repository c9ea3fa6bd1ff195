"""Lists the names, lengths and hashes of OpenAI's seven files, and checks whether a file can be one of them.

Knows nothing of networks, nor of TensorFlow.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import BinaryIO

from tf_gpt2.checkpoint.index import MOST_INDEX_BYTES, named_prefix, parse_index
from tf_gpt2.checkpoint.tables import messages, read_fields
from tf_gpt2.checkpoint.variables import expected_variables, misfits
from tf_gpt2.config import GPT2Config

FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
)
"""OpenAI's seven files, in the order of fetching. Source: openai/gpt-2, ``download_model.py``."""

CHECKPOINT, ENCODER, HPARAMS, DATA, INDEX, META, MERGES = FILES

VOCABULARY_FILES = (ENCODER, MERGES)
"""The files that the tokenizer reads."""

WEIGHT_FILES = (CHECKPOINT, DATA, INDEX, META)
"""The files that TensorFlow's saver wrote; the last one is not needed to read the weights."""

PREFIX = "model.ckpt"
"""The name of OpenAI's checkpoint in its folder, without an ending."""

SHA256: Mapping[str, str] = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""SHA-256 of the files that are equal for all sizes. Source: openai/tiktoken, ``openai_public.py``."""

LENGTHS: Mapping[str, tuple[int, int]] = {
    CHECKPOINT: (1, 4096),
    ENCODER: (1_042_301, 1_042_301),
    HPARAMS: (1, 4096),
    INDEX: (1, MOST_INDEX_BYTES),
    META: (1, 1 << 24),
    MERGES: (456_318, 456_318),
}
"""Fewest and most bytes of each file; OpenAI's longest index has 21 kB, the longest graph 1.9 MB."""


def length_bounds(name: str, config: GPT2Config) -> tuple[int, int]:
    """Returns the fewest and the most bytes of a file; the data file has 4 bytes per weight, and no others."""
    return LENGTHS[name] if name in LENGTHS else (4 * config.n_params, 4 * config.n_params)


def is_genuine(file: BinaryIO, name: str, config: GPT2Config) -> bool:
    """Whether a file can be the file ``name`` of a model of shape ``config``: by length, SHA-256 or content."""
    least, most = length_bounds(name, config)
    if not least <= file.seek(0, io.SEEK_END) <= most:
        return False
    if name == DATA:
        return True
    file.seek(0)
    body = file.read()
    if name in SHA256:
        return hashlib.sha256(body).hexdigest() == SHA256[name]
    try:
        return CHECKS[name](body, config)
    except (ValueError, TypeError, IndexError, RecursionError):
        return False


def names_the_model(body: bytes, config: GPT2Config) -> bool:
    """Whether a file ``checkpoint`` names OpenAI's checkpoint."""
    named = named_prefix(body)
    return named is not None and PurePath(named).name == PREFIX


def is_of_shape(body: bytes, config: GPT2Config) -> bool:
    """Whether the bytes of ``hparams.json`` describe a model of this shape."""
    return GPT2Config.from_hparams(json.loads(body)) == config


def has_the_weights(body: bytes, config: GPT2Config) -> bool:
    """Whether an index lists all weights, inside one data file of just their bytes."""
    index, expected = parse_index(body), expected_variables(config)
    stored = [index.variables[name] for name in expected if name in index.variables]
    fits = sum(variable.n_bytes for variable in stored) == 4 * config.n_params
    inside = all(v.shard == 0 and v.offset + v.n_bytes <= 4 * config.n_params for v in stored)
    return index.n_shards == 1 and fits and inside and not misfits(index, expected)


def is_meta_graph(body: bytes, config: GPT2Config) -> bool:
    """Whether a file has the form of a ``MetaGraphDef`` that holds a graph with nodes."""
    fields = read_fields(body)
    graphs = messages(fields, 2)
    return fields.keys() <= set(range(1, 8)) and bool(graphs) and bool(messages(read_fields(graphs[-1]), 1))


CHECKS = {CHECKPOINT: names_the_model, HPARAMS: is_of_shape, INDEX: has_the_weights, META: is_meta_graph}
