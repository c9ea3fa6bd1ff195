"""This project's own model, as a peer among peers: see ``protocol``.

python -m benchmarks.peers.tf_gpt2
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks.peers.protocol import Generated, serve
from tf_gpt2 import GPT2Model
from tf_gpt2.generation.options import check_prompts, make_request, pad
from tf_gpt2.generation.run import Run
from tf_gpt2.text.generator import DTYPES


class TFGPT2:
    """``GPT2Model`` from the OpenAI checkpoint in a folder."""

    def __init__(self, folder: Path, precision: str, n_threads: int):
        tf.config.threading.set_intra_op_parallelism_threads(n_threads)
        self.model = GPT2Model.from_checkpoint(folder, **DTYPES[precision])

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Computes float32 (B, T, V)."""
        return self.model(ids).numpy()

    def generate(self, prompts: np.ndarray, max_new_tokens: int) -> Generated:
        """Does what ``tf_gpt2.generate`` does, and looks at the clock when there is a first token."""
        config, (n_rows, length) = self.model.config, prompts.shape
        request = make_request(self.model, n_rows, max_new_tokens=max_new_tokens)
        sampling = request.sampling_of(n_rows)
        start = time.perf_counter()
        rows = check_prompts(prompts, config)
        limits = request.limits_of(rows, config)
        run = Run(self.model, *pad(rows, config), sampling, limits, jit_compile=True)
        run.advance(1)
        first = time.perf_counter()
        while run.goes_on:
            run.advance(config.n_ctx)
        new_ids = run.state.ids.numpy()
        end = time.perf_counter()
        return Generated(
            new_ids[:, length : length + max_new_tokens].tolist(), prefill_s=first - start, decode_s=end - first
        )


if __name__ == "__main__":
    serve(TFGPT2, ("tensorflow", "keras", "numpy"))
