"""The environment of Hugging Face's GPT-2, and weights that show a difference."""

import os
from pathlib import Path

import numpy as np
import pytest

from tf_gpt2.checkpoint.params import map_leaves, random_params

PEERS_DIR = os.environ.get("TF_GPT2_PEERS_DIR", "")
PYTHON = Path(PEERS_DIR, "huggingface", "bin", "python")
pytestmark = pytest.mark.skipif(
    not PEERS_DIR or not PYTHON.exists(),
    reason="TF_GPT2_PEERS_DIR names no folder with huggingface/bin/python; 'make test-peers' makes one",
)


def lively_params(config):
    """Random biases and gains; weights so large that gelu and softmax curve, positions that weigh more than tokens."""
    scales = {"w": 0.9 / (0.02 * np.sqrt(config.n_embd)), "wpe": 5}
    params = random_params(config, seed=7, bias_scale=0.3)
    return map_leaves(lambda path, leaf: leaf * np.float32(scales.get(path.rpartition("/")[2], 1)), params)
