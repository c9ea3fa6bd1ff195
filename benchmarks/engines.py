"""Lists the engines to compare and the jobs that they do. An engine's name is ``adapter:precision``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.environments import PEERS_DIR

OURS = "tf_gpt2"
REFERENCE = "tf_gpt2:float32"
"""The engine whose greedy ids all others are compared with."""
ANCHORS = (REFERENCE, "tf_gpt2:int8", "tf_gpt2:int4")
"""Our engines that run with each group, so that each peer has ours in its own rounds."""
ENGINES = (
    *ANCHORS,
    "tf_gpt2:bfloat16",
    "huggingface:float32",
    "ctranslate2:float32",
    "ctranslate2:int8",
    "llama_cpp:f32",
    "llama_cpp:q8_0",
    "llama_cpp:q4_0",
    "openvino:float32",
    "openvino:int8",
    "keras_hub:float32",
)
LABELS = {
    "tf_gpt2": "tf_gpt2",
    "huggingface": "Hugging Face",
    "keras_hub": "KerasHub",
    "ctranslate2": "CTranslate2",
    "llama_cpp": "llama.cpp",
    "openvino": "OpenVINO",
}
OWN_FORMAT = ("ctranslate2", "llama_cpp", "openvino")
"""Adapters that must write a file in their own format before they can load."""


class Job(NamedTuple):
    """A generation that an engine is asked for.

    Attributes:
        batch: how many prompts at once.
        prompt: tokens per prompt.
        new: new tokens per prompt; 1 asks for prefill alone.
        ours_only: whether the peers are left out.
    """

    batch: int
    prompt: int
    new: int
    ours_only: bool = False

    def task(self, n_vocab: int) -> dict[str, Any]:
        """Makes the prompts, the same for all engines."""
        prompts = np.random.default_rng(0).integers(n_vocab, size=(self.batch, self.prompt)).tolist()
        return {"task": "generate", "prompts": prompts, "max_new_tokens": self.new}

    @property
    def is_prefill(self) -> bool:
        """Whether the time to the first token counts, instead of that of the others."""
        return self.new == 1


JOBS = {
    "decode": Job(1, 32, 128),
    "batch": Job(8, 32, 64),
    "prefill_512": Job(1, 512, 1),
    "prefill_1000": Job(1, 1000, 1),
    "position_50": Job(1, 24, 52, ours_only=True),
    "position_1000": Job(1, 960, 60, ours_only=True),
}


IN_ONE_ROUND = ("position_50", "position_1000")
"""Jobs whose times are compared with each other."""


def is_ours(engine: str) -> bool:
    return adapter_of(engine) == OURS


def adapter_of(engine: str) -> str:
    return engine.partition(":")[0]


def precision_of(engine: str) -> str:
    return engine.partition(":")[2]


def label(engine: str) -> str:
    """Returns the name that a reader knows: ``llama_cpp:q8_0`` -> ``llama.cpp Q8_0``."""
    precision = precision_of(engine)
    return f"{LABELS[adapter_of(engine)]} {precision.upper() if precision.startswith('q') else precision}"


def python_of(engine: str) -> Path:
    """Returns the path of the interpreter that an engine needs; it may not exist."""
    return Path(sys.executable) if is_ours(engine) else PEERS_DIR.absolute() / adapter_of(engine) / "bin" / "python"


def why_missing(engine: str) -> str | None:
    """Returns the advice how to build the environment of an engine that has none."""
    if python_of(engine).exists():
        return None
    return f"no environment {PEERS_DIR.name}/{adapter_of(engine)}; 'make bench-peers' builds it"


def make_groups(engines: list[str], n_peers: int) -> list[list[str]]:
    """Splits engines into groups that fit in memory: ``ANCHORS`` in each, ``n_peers`` others."""
    anchors = [engine for engine in engines if engine in ANCHORS]
    others = [engine for engine in engines if engine not in ANCHORS]
    return [[*anchors, *others[i : i + n_peers]] for i in range(0, max(1, len(others)), n_peers)]
