"""Measures how long 124M takes from a safetensors file to a ready model, and how much memory, beside the peers.

Each engine loads the same folder of Hugging Face's with random weights, and computes the logits of one token, because a
mapped file is read only then; in a process of its own, several times in turn.
Memory is the process's peak less what it held before, when its framework was imported and had computed something; it
is told as a multiple of the weights' bytes in float32. Pages of a mapped file count. Engines without an environment
(see ``environments``) are left out.

    python -m benchmarks.loading
    python -m benchmarks.loading --engines tf_gpt2 tf_gpt2_int8 --repetitions 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environments import PEERS_DIR
from benchmarks.report import start_report, store
from tf_gpt2.checkpoint import huggingface, vocabulary
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.params import leaves, random_params
from tf_gpt2.config import SIZES
from tf_gpt2.tokenizer.encoder import Encoder

RESULTS = Path(__file__).parent / "results" / "loading.json"
CONFIG = SIZES["124M"]

MEASURE = """
import json, os, sys, time

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

folder = sys.argv[1]
{imports}
before = memory("VmRSS")
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
print(json.dumps({{"load_s": seconds, "peak_bytes": memory("VmHWM") - before, "held_bytes": memory("VmRSS") - before}}))
"""
"""The program of each engine."""

OURS = "import tensorflow as tf, tf_gpt2\ntf_gpt2.GPT2Model\nfloat(tf.reduce_sum(tf.ones((8, 8)) @ tf.ones((8, 8))))"
PROGRAMS = {
    "tf_gpt2": (OURS, "model = tf_gpt2.GPT2Model.from_checkpoint(folder)\nmodel(tf.constant([[1]]))"),
    "tf_gpt2_int8": (
        OURS,
        "model = tf_gpt2.GPT2Model.from_checkpoint(folder, quantization='int8')\nmodel(tf.constant([[1]]))",
    ),
    "huggingface": (
        "import torch\nfrom transformers import GPT2LMHeadModel\nfloat((torch.ones(8, 8) @ torch.ones(8, 8)).sum())",
        "model = GPT2LMHeadModel.from_pretrained(folder)\nwith torch.no_grad():\n    model(torch.tensor([[1]]))",
    ),
    "keras_hub": (
        "os.environ['KERAS_BACKEND'] = 'tensorflow'\nimport keras_hub, tensorflow as tf\n"
        "float(tf.reduce_sum(tf.ones((8, 8)) @ tf.ones((8, 8))))",
        "model = keras_hub.models.GPT2Backbone.from_preset(folder)\n"
        "hidden = model({'token_ids': tf.constant([[1]]), 'padding_mask': tf.constant([[1]])})\n"
        "model.token_embedding(hidden, reverse=True)",
    ),
}
"""Engine -> what it imports and computes first; how it loads a folder, and reads all weights once."""


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {**start_report("loading", arguments, "engines", "repetitions"), "engines": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        huggingface.write(folder, CONFIG, leaves(random_params(CONFIG)), None)
        vocabulary.write_huggingface(Encoder.from_files(embedded_dir()), folder, CONFIG.n_ctx)
        runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in arguments.engines}
        for _ in range(arguments.repetitions):
            for engine in arguments.engines:
                if python_of(engine).exists():
                    runs[engine].append(run(engine, folder))
    for engine, of_engine in runs.items():
        if all(of_engine) and of_engine:
            figures = {name: median(one[name] for one in of_engine) for name in of_engine[0]}
            figures["peak_weights"] = figures["peak_bytes"] / (4 * CONFIG.n_params)
            result["engines"][engine] = figures
            print(f"{engine:14} {figures['load_s']:6.2f} s   peak {figures['peak_weights']:5.2f} x the weights")
    store(result, arguments.output)


def python_of(engine: str) -> Path:
    return Path(sys.executable) if engine.startswith("tf_gpt2") else PEERS_DIR.absolute() / engine / "bin" / "python"


def run(engine: str, folder: Path) -> dict[str, float]:
    imports, load = PROGRAMS[engine]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    command = [str(python_of(engine)), "-c", MEASURE.format(imports=imports, load=load), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        print(f"{engine:14} failed: {result.stderr.strip().splitlines()[-1][:300]}")
        return {}
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), help="what loads")
    parser.add_argument("--repetitions", type=int, default=3, help="of each engine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
