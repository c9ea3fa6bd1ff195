"""The arithmetic of the formulas: one module per place where they run, each with the same functions.

``plain`` is textbook TensorFlow, for eager calls and training; read it first. ``xla`` has the operations that XLA
compiles well, ``native`` the same with kernels for some products, ``graph`` those that are fast in TensorFlow without
XLA, and ``fused`` those of a training step. All are tested against ``plain``, and ``plain`` against
``tf_gpt2.reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from tf_gpt2.model.weights import AnyMatrix


class Ops(Protocol):
    """The functions of each module of arithmetic. Axis letters: B, T, S, C, H, D, V as in ``formulas``; N is B*H."""

    JIT_COMPILE: bool
    """Whether XLA compiles functions that compute with this module."""
    SORTS: bool
    """Whether sorting the vocabulary takes less time than finding a threshold by bisection."""

    def needs_twins(self, n_rows: int, dtype: str) -> bool:
        """Whether products of so many rows of a dtype need transposed twins of float matrices to be fast."""

    def prepare(self, weights: Any) -> Any:
        """Converts the weights for a decode loop; called once, before the loop."""

    def gather(self, table: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Looks up rows of a table: (V, …), integers (B, T) -> (B, T, …)."""

    def product(self, x: tf.Tensor, w: AnyMatrix) -> tf.Tensor:
        """Computes ``x @ w.T``: floats (..., n_in), (n_out, n_in) -> (..., n_out) in the dtype of ``x``."""

    def norm(self, x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, eps: float) -> tf.Tensor:
        """Normalizes the last axis in float32; returns the dtype of ``x``."""

    def gelu(self, x: tf.Tensor) -> tf.Tensor:
        """Computes gelu's tanh form in float32; returns the dtype of ``x``."""

    def transpose_heads(self, x: tf.Tensor) -> tf.Tensor:
        """Transposes (B, T, H, D) to (B, H, T, D)."""

    def attention_weights(self, q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Computes softmax(q k' / sqrt(D)): (N, T, D), (N, S, D), bool (N or 1, T, S) -> float32 (N, T, S)."""

    def weighted_sum(self, weights: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Sums values: float32 (N, T, S), (N, S, D) -> (N, T, D) in the dtype of ``v``."""

    def places(self, positions: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Returns the places for ``write``, in a cache like ``like`` (N, S, D), of positions int32 (N, T)."""

    def write(self, part: tf.Tensor, new: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Writes entries (N, T, D) into keys or values (N, S, D); returns these."""

    def owned(self, part: tf.Tensor) -> tf.Tensor:
        """Returns keys or values that a loop may write to: the same, or a copy where ``write`` works in place."""

    def first_largest(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the index of each row's largest value; of equal ones, the first: float32 (B, V) -> int32 (B,)."""

    def once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the function of a block: it is traced once, and its graph is called with each block's weights."""

    def branch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a branch of ``tf.cond`` so that it costs next to nothing where it is not taken."""
