"""Weights of a Keras layer as a parameter tree: set from it, given back as it.

``set_weights`` takes OpenAI's nested dict next to Keras's flat list. Knows nothing of files or of what a layer
computes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gpt2.checkpoint.params import Tree, check_params, leaves, map_leaves
from tf_gpt2.model.quantization import dequantize, quantize

_draws = contextvars.ContextVar("draws", default=True)


@contextlib.contextmanager
def blank_weights() -> Iterator[None]:
    """Leaves the weights of new layers undefined, for those about to be set: memory not written to costs nothing."""
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


def normal(stddev: float) -> Callable[..., tf.Tensor]:
    """Gives the initializer of a fresh weight."""
    return keras.initializers.RandomNormal(stddev=stddev) if _draws.get() else _undefined


def add_matrix(
    layer: keras.Layer, name: str, shape: tuple[int, int], *, stddev: float, quantization: str | None
) -> tuple[keras.Variable, keras.Variable | None]:
    """Adds a matrix (n_out, n_in) to a layer.

    Returns:
        The matrix; and its scales, (n_out,), when it is quantized. Quantized ones are not trained, and start from
        zeros.
    """
    if quantization is None:
        return layer.add_weight(shape=shape, initializer=normal(stddev), autocast=False, name=name), None
    if quantization != "int8":
        raise ValueError(f"quantization must be None or 'int8', got {quantization!r}")
    matrix = layer.add_weight(
        shape=shape, initializer="zeros", dtype="int8", trainable=False, autocast=False, name=name
    )
    scale = layer.add_weight(
        shape=shape[:1], initializer="ones", dtype="float32", trainable=False, autocast=False, name=f"{name}_scale"
    )
    return matrix, scale


def value_of(variable: keras.Variable | None) -> tf.Tensor | None:
    """Gives a variable's tensor, or ``None`` for none."""
    return None if variable is None else variable.value


def _undefined(shape: Sequence[int], dtype: Any = None, **_: Any) -> tf.Tensor:
    return tf.raw_ops.Empty(shape=shape, dtype=keras.backend.standardize_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One variable's place in the tree.

    Attributes:
        variable: the Keras variable.
        transposed: whether the variable holds the transpose of the tree's array.
        scale: the scales of a quantized variable, (n_out,).
    """

    variable: keras.Variable
    transposed: bool = False
    scale: keras.Variable | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tree's array."""
        shape = tuple(self.variable.shape)
        return shape[::-1] if self.transposed else shape

    def read(self) -> np.ndarray:
        """Copies the variable out, in the tree's orientation; a quantized one as float32."""
        value = self.variable.value
        array = np.asarray(value if self.scale is None else dequantize(value, self.scale.value))
        return np.ascontiguousarray(array.T) if self.transposed else array.copy()

    def write(self, array: np.ndarray | tf.Tensor) -> None:
        """Assigns an array that is in the tree's orientation; a tensor of the same dtype is taken without a copy."""
        value = tf.transpose(array) if self.transposed else array
        if self.scale is not None:
            value, scale = quantize(value)
            self.scale.assign(scale)
        self.variable.assign(value)


class ParamTree:
    """Mixin for Keras layers and models whose weights form a parameter tree."""

    built: bool
    build: Callable[[Any], None]

    def leaf_tree(self) -> Tree:
        """Gives the tree whose leaves are ``Leaf``; the layer must be built."""
        raise NotImplementedError

    def set_weights(self, weights: Mapping[str, Any] | list[np.ndarray]) -> None:
        """Takes the layer's weights from a parameter tree, or from a flat list as in Keras.

        Args:
            weights: the tree or subtree with this layer's names, leaves floating-point arrays of any float dtype (they
                are cast to the variables' dtype); or a list in the order and shapes of ``get_weights()``.

        Raises:
            ParamsError: naming each leaf that is missing, unexpected or misshapen; then nothing is assigned.
            TypeError: when it is neither a tree nor a list.

        Example:
            >>> import tf_gpt2
            >>> from tf_gpt2.checkpoint.params import random_params
            >>> config = tf_gpt2.GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
            >>> model = tf_gpt2.GPT2Model(config)
            >>> model.set_weights(random_params(config))
        """
        if not isinstance(weights, (Mapping, list, tuple)):
            raise TypeError(f"weights must be a parameter tree, or a list as get_weights() gives it, got {weights!r}")
        if not isinstance(weights, Mapping):
            super().set_weights(weights)  # type: ignore[misc]
            return
        self.ensure_built()
        targets = self.leaf_tree()
        check_params(weights, map_leaves(lambda _, leaf: leaf.shape, targets))
        sources = dict(leaves(weights))
        for path, leaf in leaves(targets):
            leaf.write(np.asarray(sources[path]))

    def get_params(self) -> Tree:
        """Gives the weights back as a parameter tree of NumPy arrays, in the variables' dtype, bit for bit."""
        self.ensure_built()
        return map_leaves(lambda _, leaf: leaf.read(), self.leaf_tree())

    def ensure_built(self) -> None:
        """Builds the layer if no call has done so; all shapes are known from its arguments."""
        if not self.built:
            self.build((None, None, None))
