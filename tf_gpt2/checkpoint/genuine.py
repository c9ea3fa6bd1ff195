"""OpenAI's seven files: their names, lengths and hashes, and whether a file can be the one that its name says.

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
"""In the order in which they are fetched. Source: openai/gpt-2, ``download_model.py``."""

CHECKPOINT, ENCODER, HPARAMS, DATA, INDEX, META, MERGES = FILES

VOCABULARY_FILES = (ENCODER, MERGES)
"""What the tokenizer needs."""

WEIGHT_FILES = (CHECKPOINT, DATA, INDEX, META)
"""What TensorFlow's saver wrote; weights are read without the last one."""

PREFIX = "model.ckpt"
"""The path of OpenAI's checkpoints without ending, in their folder."""

SHA256: Mapping[str, str] = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""The same for all sizes. Source: openai/tiktoken, ``openai_public.py``."""

LENGTHS: Mapping[str, tuple[int, int]] = {
    CHECKPOINT: (1, 4096),
    ENCODER: (1_042_301, 1_042_301),
    HPARAMS: (1, 4096),
    INDEX: (1, MOST_INDEX_BYTES),
    META: (1, 1 << 24),
    MERGES: (456_318, 456_318),
}
"""Fewest and most bytes; OpenAI's longest index has 21 kB, the longest graph 1.9 MB."""


def length_bounds(name: str, config: GPT2Config) -> tuple[int, int]:
    """Returns the fewest and the most bytes of a file; the data are the float32 weights and nothing else."""
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
    """Whether ``hparams.json`` describes this model."""
    return GPT2Config.from_hparams(json.loads(body)) == config


def has_the_weights(body: bytes, config: GPT2Config) -> bool:
    """Whether an index has all weights, inside a data file that holds nothing else."""
    index, expected = parse_index(body), expected_variables(config)
    stored = [index.variables[name] for name in expected if name in index.variables]
    fits = sum(one.n_bytes for one in stored) == 4 * config.n_params
    inside = all(one.shard == 0 and one.offset + one.n_bytes <= 4 * config.n_params for one in stored)
    return index.n_shards == 1 and fits and inside and not misfits(index, expected)


def is_meta_graph(body: bytes, config: GPT2Config) -> bool:
    """Whether a file has the form of a ``MetaGraphDef`` that holds a graph with nodes."""
    fields = read_fields(body)
    graphs = messages(fields, 2)
    return fields.keys() <= set(range(1, 8)) and bool(graphs) and bool(messages(read_fields(graphs[-1]), 1))


CHECKS = {CHECKPOINT: names_the_model, HPARAMS: is_of_shape, INDEX: has_the_weights, META: is_meta_graph}
