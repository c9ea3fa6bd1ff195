"""Measures what rounding costs on a text that the embedded checkpoint was not trained on.

Bits per byte, and how often the likeliest token is that of float32, with the products that this machine chooses and
with XLA's alone.

    python -m benchmarks.quality --text tinyshakespeare.txt
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from tf_gpt2 import TextGenerator
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.generation.compiled import arithmetic
from tf_gpt2.model.network import network_of
from tf_gpt2.runtime import kernels

DTYPES = ("float32", "bfloat16", "int8", "int4")
ROWS = 8
"""Windows at a time."""


def main() -> None:
    arguments = parse_arguments()
    text = arguments.text.read_text(encoding="utf-8")
    text = text[int(len(text) * (1 - arguments.held_out)) :]
    print(f"{'dtype':10}{'products':10}{'bits per byte':>15}{'of float32':>12}{'likeliest token':>17}")
    wanted, bits = None, None
    for dtype in DTYPES:
        for choice in ("", "xla") if kernels.instruction_sets() else ("xla",):
            os.environ[kernels.ENV_VAR] = choice
            generator = TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype)
            found = generator.perplexity(text).bits_per_byte
            likeliest = likeliest_tokens(generator, text)
            if wanted is None or bits is None:
                wanted, bits = likeliest, found
            agreement = (likeliest == wanted).mean()
            print(f"{dtype:10}{choice or 'native':10}{found:15.4f}{found / bits:12.4f}{agreement:17.2%}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare, which the checkpoint read")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of the text, at its end, to measure on")
    return parser.parse_args()


def likeliest_tokens(generator: TextGenerator, text: str) -> np.ndarray:
    """Returns the likeliest next token at each position of the text's whole windows."""
    config, ids = generator.model.config, np.array(generator.encoder.encode(text))
    n_windows = len(ids) // (ROWS * config.n_ctx) * ROWS
    windows = ids[: n_windows * config.n_ctx].reshape(-1, ROWS, config.n_ctx)
    network = network_of(generator.model, arithmetic(jit_compile=True))

    @tf.function(jit_compile=True)
    def likeliest(ids: tf.Tensor) -> tf.Tensor:
        return tf.argmax(network.logits(network.hidden_states(ids)[0]), axis=-1)

    return np.concatenate([likeliest(tf.constant(part, tf.int32)).numpy() for part in windows])


if __name__ == "__main__":
    main()
