"""Measures how far a run of ``tf-gpt2 finetune`` lowers the held-out loss on a text.

The model has the embedded checkpoint's shape and vocabulary, and random weights; the last part of the text is held out.
Float32, mixed bfloat16 and accumulated halves of a batch see the same tokens in the same order, so they should learn
alike. Exits with 1 when one ends more than 2 % above float32, or above half the perplexity of chance.

    python -m benchmarks.learning --text tinyshakespeare.txt
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import start_report, store
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.genuine import VOCABULARY_FILES
from tf_gpt2.checkpoint.openai import save_gpt2_params_to_tf_ckpt
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.config import GPT2Config, read_hparams
from tf_gpt2.training.from_text import Recipe, finetune_text

RESULTS = Path(__file__).parent / "results" / "learning.json"
BATCH = 16
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"batch_size": BATCH},
    "bfloat16": {"batch_size": BATCH, "dtype": "bfloat16"},
    "accumulated": {"batch_size": BATCH // 2, "accumulate": 2},
}
MARGIN = 0.02


def main() -> int:
    arguments = parse_arguments()
    result: dict[str, Any] = {**start_report("learning", arguments, "steps", "learning_rate"), "ways": {}}
    result["text"] = {"name": arguments.text.name, "bytes": arguments.text.stat().st_size}
    for name, options in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            result["ways"][name] = measure(Path(folder), options, arguments)
        losses = result["ways"][name]["val_loss"]
        print(f"{name:12} {losses[0]:.3f} -> {losses[-1]:.3f} nats  {result['ways'][name]['seconds']:6.1f} s")
    store(result, arguments.output)
    return int(not all(learns(way, result["ways"]["float32"]) for way in result["ways"].values()))


def learns(way: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a run's perplexity is below half of chance's, and its loss is that of float32."""
    chance = math.log(read_hparams(embedded_dir() / "hparams.json")["n_vocab"])
    last = way["val_loss"][-1]
    return last < chance - math.log(2) and last < (1 + MARGIN) * best["val_loss"][-1]


def measure(folder: Path, options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    hparams = read_hparams(embedded_dir() / "hparams.json")
    save_gpt2_params_to_tf_ckpt(random_params(GPT2Config.from_hparams(hparams)), hparams, folder / "fresh")
    for name in VOCABULARY_FILES:
        shutil.copy(embedded_dir() / name, folder / "fresh" / name)
    recipe = Recipe(
        text=[arguments.text],
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        save_every=max(1, arguments.steps // 10),
        **options,
    )
    start = time.perf_counter()
    history = finetune_text(folder / "fresh", folder / "out", recipe, progress=False)
    return {"val_loss": history["val_loss"], "seconds": time.perf_counter() - start}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to learn")
    parser.add_argument("--steps", type=int, default=300, help="updates")
    parser.add_argument("--learning_rate", "--learning-rate", type=float, default=1.5e-3, help="its peak")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
