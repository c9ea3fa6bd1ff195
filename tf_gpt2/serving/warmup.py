"""Writes warm-up records: requests that a server runs while it loads a version, so that no client waits for first runs.

A record that fails makes the load fail, so a version holds only records that its server can run: by default a server
refuses compiled signatures. Knows nothing of models or of their export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tf_gpt2.serving.options import GENERATE_OPTIONS, option_default

if TYPE_CHECKING:
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

RECORDS_PATH = "assets.extra/tf_serving_warmup_requests"
"""The file in a version's folder in which a server looks for the records."""

MOST_RECORDS = 1000
"""The most records: a server refuses to load a version with more.

Source: TensorFlow Serving, ``servables/tensorflow/saved_model_warmup_util.h``.
"""

TEXTS = ("Hello", "The quick brown fox jumps over the lazy dog. " * 3)
"""A short prompt and a longer one: the first run of each sets up parts of the graph that later runs reuse."""

N_TOKENS = 4  # few, but more than one step

ASKED: tuple[Mapping[str, float], ...] = (
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    {"temperature": 0.8, "top_k": 40, "seed": 1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9, "seed": 1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "no_repeat_ngram_size": 3},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "min_new_tokens": 1, "seed": 1},
)
"""Common options: the first request with an option sets up the graph's operations for it."""

IDS = {"ids": np.array([[0, 1, 2]], np.int32), "lengths": np.array([3], np.int32)}
"""A row of ids that any vocabulary has."""

COMPILED = ("serving_default", "generate", "generate_ids", "score", "logits", "embed", "next")
"""Signatures that have a compiled version."""

Request = tuple[str, Mapping[str, np.ndarray]]
"""A signature's name and its inputs; omitted options get the signature's defaults."""


def plain_requests() -> list[Request]:
    """Returns small requests for each signature that is not compiled.

    Each has one row, which a server accepts whatever its batch sizes. ``serving_default`` has one short request,
    because the number of its new tokens was fixed at export.
    """
    requests: list[Request] = [("serving_default", texts_of(TEXTS[0])), ("decode", IDS), ("logits", IDS)]
    for text in TEXTS:
        requests += [(name, texts_of(text)) for name in ("encode", "score", "embed")]
    requests += continuing(TEXTS[1], ASKED[0])
    for asked in ASKED:
        requests += continuing(TEXTS[0], asked)
    return requests


def continuing(text: str, asked: Mapping[str, float]) -> list[Request]:
    """Returns a request for each signature that continues text or ids, all with the same options."""
    options = {}
    for name in GENERATE_OPTIONS:
        default = option_default(name, N_TOKENS).numpy()  # (1,)
        options[name] = np.array([asked.get(name, default[0])], default.dtype)
    nothing_yet = IDS | {"lengths": np.array([0], np.int32), "n_tokens": np.array([N_TOKENS // 2], np.int32)}
    return [
        ("generate", texts_of(text) | options),
        ("generate_ids", IDS | options),
        ("next", texts_of(text) | nothing_yet | options),
    ]


def xla_requests() -> list[Request]:
    """Returns ``plain_requests`` for compiled signatures: for servers with ``--xla_cpu_compilation_enabled=true``."""
    return [(f"{name}_xla", inputs) for name, inputs in plain_requests() if name in COMPILED]


def texts_of(*texts: str) -> dict[str, np.ndarray]:
    """Returns the input of signatures that take text."""
    return {"text": np.array([text.encode() for text in texts], object)}


def write_warmup_records(path: str | Path, model_name: str, requests: Sequence[Request]) -> None:
    """Writes requests as a TFRecord of ``PredictionLog``.

    Args:
        path: the file, ``RECORDS_PATH`` in a version's folder; it is replaced, and its folder is made.
        model_name: the model's name in the server.
        requests: at most 1000.

    Raises:
        ImportError: when the serving protos are not installed.
        ValueError: when there are no requests, or more than 1000, or the name is empty.
    """
    if not model_name:
        raise ValueError("model_name must be the model's name in the server, got ''")
    if not 1 <= len(requests) <= MOST_RECORDS:
        raise ValueError(f"requests must be 1 to {MOST_RECORDS}, got {len(requests)}; a server loads no more")
    logs = [make_log(model_name, name, inputs) for name, inputs in requests]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


def make_log(model_name: str, signature_name: str, inputs: Mapping[str, Any]) -> PredictionLog:
    """Makes the record of one request.

    Raises:
        ImportError: when the serving protos are not installed.
    """
    try:
        from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
    except ImportError as error:
        raise ImportError('warm-up records need the serving protos: pip install "tf_gpt2[serving]"') from error
    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = model_name
    request.model_spec.signature_name = signature_name
    for name, values in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
    return log
