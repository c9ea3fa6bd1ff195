"""GPT-2 in seventy lines of NumPy: token ids -> logits. Read this first.

It takes one row of ids at a time, computes the whole attention matrix in float64, keeps no cache, and imports nothing
of the package. All faster code is tested against it. ``params`` is the parameter tree under OpenAI's names, as
``tf_gpt2.load_gpt2_params_from_tf_ckpt`` returns it. Axis letters: T positions, C width, D head width, V vocabulary.

Sources: Radford et al. 2019 (GPT-2), Vaswani et al. 2017 (attention), Ba et al. 2016 (layer norm), Hendrycks and Gimpel
2016 (gelu).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def logits(
    ids: Sequence[int],
    params: Mapping[str, Any],
    n_head: int,
    *,
    activation: str = "gelu_new",
    layer_norm_epsilon: float = 1e-5,
    scale_attn_weights: bool = True,
    scale_attn_by_inverse_layer_idx: bool = False,
) -> np.ndarray:
    """Computes the logits of the next token at each position: T ids -> float64 (T, V).

    OpenAI's models have the default options; others are as in ``tf_gpt2.GPT2Config``.
    """
    x = as_float64(params["wte"])[ids] + as_float64(params["wpe"])[: len(ids)]  # (T, C)
    for i, w in enumerate(params["blocks"]):
        divisor = np.sqrt(x.shape[1] / n_head) if scale_attn_weights else 1.0
        divisor *= i + 1 if scale_attn_by_inverse_layer_idx else 1
        x = block(x, w, n_head, divisor, activation, layer_norm_epsilon)
    head = params.get("lm_head", params["wte"])
    return layer_norm(x, params["ln_f"], layer_norm_epsilon) @ as_float64(head).T  # (T, V)


def block(
    x: np.ndarray,
    w: Mapping[str, Any],
    n_head: int,
    divisor: float | None = None,
    activation: str = "gelu_new",
    epsilon: float = 1e-5,
) -> np.ndarray:
    """Adds attention's and the MLP's output to each position: (T, C) -> (T, C)."""
    x = x + attention(layer_norm(x, w["ln_1"], epsilon), w["attn"], n_head, divisor)
    return x + mlp(layer_norm(x, w["ln_2"], epsilon), w["mlp"], activation)


def attention(x: np.ndarray, w: Mapping[str, Any], n_head: int, divisor: float | None = None) -> np.ndarray:
    """Mixes into each position the values of itself and of earlier positions: (T, C) -> (T, C)."""
    n_positions, width = x.shape
    is_later = np.triu(np.ones((n_positions, n_positions), bool), k=1)  # the causal mask: query row, key column
    queries, keys, values = np.split(linear(x, w["c_attn"]), 3, axis=1)  # each (T, C)
    heads = []
    for q, k, v in zip(*(np.split(part, n_head, axis=1) for part in (queries, keys, values)), strict=True):  # (T, D)
        scores = q @ k.T / (divisor or np.sqrt(width / n_head))  # (T, T)
        heads.append(softmax(np.where(is_later, -np.inf, scores)) @ v)  # (T, D)
    return linear(np.concatenate(heads, axis=1), w["c_proj"])


def mlp(x: np.ndarray, w: Mapping[str, Any], activation: str = "gelu_new") -> np.ndarray:
    """Transforms each position by itself: (T, C) -> (T, F) -> (T, C); F is 4 C in OpenAI's models."""
    return linear(ACTIVATIONS[activation](linear(x, w["c_fc"])), w["c_proj"])


def linear(x: np.ndarray, w: Mapping[str, Any]) -> np.ndarray:
    """Multiplies by a matrix and adds a bias: (T, n_in) -> (T, n_out)."""
    return x @ as_float64(w["w"]) + as_float64(w["b"])


def layer_norm(x: np.ndarray, w: Mapping[str, Any], epsilon: float = 1e-5) -> np.ndarray:
    """Brings each position to mean 0 and variance 1, then applies gain and bias: (T, C) -> (T, C)."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * as_float64(w["g"]) + as_float64(w["b"])


def gelu(x: np.ndarray) -> np.ndarray:
    """Computes gelu in the tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """Computes gelu by the normal distribution itself."""
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / np.sqrt(2)))


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": gelu,
    "gelu": exact_gelu,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def softmax(x: np.ndarray) -> np.ndarray:
    """Turns scores into weights that sum to 1 along the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def as_float64(x: Any) -> np.ndarray:
    """Returns an array of any float type in float64."""
    return np.asarray(x).astype(np.float64)
