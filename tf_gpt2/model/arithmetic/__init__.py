"""How the formulas are computed: one module per place where they run, each with the same functions.

``plain`` is textbook TensorFlow, for eager calls and training; read it first. ``xla`` is what XLA compiles well, and
``graph`` what TensorFlow is fast in without XLA. Each is tested against ``plain``, and ``plain`` against
``tf_gpt2.reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from tf_gpt2.model.weights import AnyMatrix


class Ops(Protocol):
    """What a module of arithmetic offers. Axis letters: B, T, S, C, H, D, V as in ``formulas``; N is B*H."""

    JIT_COMPILE: bool
    """Whether XLA is to compile what is computed with these."""
    SORTS: bool
    """Whether sorting the vocabulary takes less time than finding a threshold by bisection."""

    def prepare(self, weights: Any) -> Any:
        """Returns the tree as a loop wants it; is called once, before the loop."""

    def gather(self, table: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Looks up rows: (V, …), integers -> the shape of ``rows`` and …."""

    def product(self, x: tf.Tensor, w: AnyMatrix) -> tf.Tensor:
        """Computes ``x @ w.T``: floats (..., n_in), (n_out, n_in) -> (..., n_out) in the dtype of ``x``."""

    def norm(self, x: tf.Tensor, g: tf.Tensor, b: tf.Tensor, eps: float) -> tf.Tensor:
        """Normalizes the last axis in float32; returns the dtype of ``x``."""

    def gelu(self, x: tf.Tensor) -> tf.Tensor:
        """Computes gelu's tanh form in float32; returns the dtype of ``x``."""

    def swap_middle(self, x: tf.Tensor) -> tf.Tensor:
        """Transposes (B, T, H, D) to (B, H, T, D)."""

    def attention_weights(self, q: tf.Tensor, k: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Computes softmax(q k' / sqrt(D)): (N, T, D), (N, S, D), bool (N or 1, T, S) -> float32 (N, T, S)."""

    def weighted_sum(self, weights: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Sums values: float32 (N, T, S), (N, S, D) -> (N, T, D) in the dtype of ``v``."""

    def places(self, positions: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """Returns where ``write`` puts entries at positions, int32 (N, T), of a cache ``like`` (N, S, D)."""

    def write(self, part: tf.Tensor, new: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """Writes entries (N, T, D) into keys or values (N, S, D)."""

    def owned(self, part: tf.Tensor) -> tf.Tensor:
        """Returns keys or values that a loop may write to."""

    def first_largest(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the index of each row's largest value, of equals the first: float32 (B, V) -> int32 (B,)."""

    def once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that is traced once and called for all blocks, whose weights alone differ."""

    def branch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a branch of ``tf.cond`` that costs next to nothing where it is not taken."""
