"""Computes the MLP's activation by its name.

Only OpenAI's, gelu's tanh form, differs between the modules of arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import tensorflow as tf

from tf_gpt2.model.arithmetic import Ops


def activate(x: tf.Tensor, name: str, ops: Ops) -> tf.Tensor:
    """Applies an activation in float32; returns the dtype of ``x``.

    Args:
        x: floats of any shape.
        name: one of ``tf_gpt2.config.ACTIVATIONS``, in our spelling.
        ops: the arithmetic, which computes ``"gelu_new"``.
    """
    if name == "gelu_new":
        return ops.gelu(x)
    return tf.cast(OTHERS[name](tf.cast(x, tf.float32)), x.dtype)


def exact_gelu(x: tf.Tensor) -> tf.Tensor:
    """Computes ``x / 2 * (1 + erf(x / sqrt(2)))``.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    return 0.5 * x * (1 + tf.math.erf(x / math.sqrt(2)))


def silu(x: tf.Tensor) -> tf.Tensor:
    """Computes ``x * sigmoid(x)``, as a quotient, which XLA does not compute again for each output of a product."""
    # exp(80) is finite in float32, and from there on the quotient is 0 up to rounding
    return x / (1.0 + tf.exp(tf.minimum(-x, 80.0)))


OTHERS: Mapping[str, Callable[[tf.Tensor], tf.Tensor]] = MappingProxyType(
    {"gelu": exact_gelu, "relu": tf.nn.relu, "silu": silu, "tanh": tf.tanh}
)
"""The activations that are not OpenAI's. Source: transformers 5, ``activations.py``."""
