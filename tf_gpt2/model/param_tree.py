"""Sets the weights of a Keras layer from a parameter tree, and returns them as one.

``set_weights`` accepts OpenAI's nested dict as well as Keras's flat list. Knows nothing of files, or of the formulas
of a layer.
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
from tf_gpt2.model.weights import (
    GROUP,
    ROWS_AT_ONCE,
    AnyMatrix,
    Int4Matrix,
    Int8Matrix,
    LoraMatrix,
    Matrix,
    floats_of,
    is_finite,
    quantize,
    quantize_4,
)
from tf_gpt2.runtime.tf_internals import empty, memory_of

QUANTIZATIONS = ("int8", "int4")
"""How the matrices of a model for inference may be rounded."""

_draws = contextvars.ContextVar("draws", default=True)


@contextlib.contextmanager
def blank_weights() -> Iterator[None]:
    """Lets new layers start with any numbers, for weights that are about to be read.

    Drawing takes longer than reading, and zeros take up the memory of all weights before the first is read.
    """
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


def normal(stddev: float) -> Any:
    """Returns the initializer of a fresh weight: normal, or any numbers inside ``blank_weights``."""
    return keras.initializers.RandomNormal(stddev=stddev) if _draws.get() else empty


def in_memory(array: Any, dtype: Any) -> Any:
    """Reads a ``StoredTensor`` as a tensor, and returns other arrays as they are."""
    if isinstance(array, np.ndarray | tf.Tensor):
        return array
    # some rows at a time, into TensorFlow's memory: it would copy an array of NumPy's twice
    whole = empty(array.shape, dtype)
    memory = memory_of(whole)
    for i in range(0, array.shape[0], ROWS_AT_ONCE):
        memory[i : i + ROWS_AT_ONCE] = array[i : i + ROWS_AT_ONCE]
    return whole


def add_matrix(
    layer: keras.Layer, name: str, shape: tuple[int, int], *, stddev: float, quantization: str | None
) -> tuple[keras.Variable, keras.Variable | None]:
    """Adds a matrix (n_out, n_in) to a layer.

    Returns:
        The matrix; and its scales when it is quantized, else None: see ``Int8Matrix`` and ``Int4Matrix``. A quantized
        matrix is not trained, and starts with zeros.
    """
    if quantization is None:
        return layer.add_weight(shape=shape, initializer=normal(stddev), autocast=False, name=name), None
    if quantization not in QUANTIZATIONS:
        names = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantization must be None or one of {names}, got {quantization!r}")

    def add(name: str, shape: tuple[int, ...], initializer: Any, dtype: str) -> keras.Variable:
        return layer.add_weight(
            shape=shape, initializer=initializer, dtype=dtype, trainable=False, autocast=False, name=name
        )

    n_out, n_in = shape
    if quantization == "int8":
        return add(name, shape, "zeros", "int8"), add(f"{name}_scale", (n_out,), "ones", "float32")
    n_groups = -(-n_in // GROUP)
    zeros = keras.initializers.Constant(0x88)
    matrix = add(name, (n_out, n_groups * GROUP // 2), zeros, "uint8")
    return matrix, add(f"{name}_scale", (n_groups, n_out), "ones", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One variable's place in the tree.

    Attributes:
        variable: the Keras variable.
    """

    variable: keras.Variable

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tree's array."""
        return tuple(self.variable.shape)

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        """The variables that store the leaf."""
        return (self.variable,)

    def weight(self) -> Any:
        """Returns the weight as the formulas take it; copies nothing."""
        return self.variable.value

    def read(self) -> np.ndarray:
        """Returns a copy of the variable as a NumPy array."""
        return np.asarray(self.variable.value).copy()

    def write(self, array: Any) -> None:
        """Assigns an array, a tensor, which is not copied, or a ``StoredTensor``, which is read now.

        All at once: an assignment to some rows would make TensorFlow copy the variable at each later read.
        """
        self.variable.assign(in_memory(array, self.variable.dtype))

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite; the scales of a quantized matrix tell."""
        return all(is_finite(variable.value) for variable in self.variables)


@dataclasses.dataclass(frozen=True)
class MatrixLeaf(Leaf):
    """A matrix's place in the tree; the variable is (n_out, n_in), or that of a quantized matrix.

    Attributes:
        n_in: how many inputs.
        transposed: whether the tree's array is (n_in, n_out).
        scale: the scales of an 8-bit or 4-bit matrix.
        lora: of a matrix with a low-rank addition, ``a``, ``b`` and ``scale`` of ``LoraMatrix``. What is read is the
            sum; what is written is the sum, too: ``b`` becomes zero.
    """

    n_in: int = 0
    transposed: bool = False
    scale: keras.Variable | None = None
    lora: tuple[keras.Variable, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tree's array."""
        n_out = self.variable.shape[0]
        return (self.n_in, n_out) if self.transposed else (n_out, self.n_in)

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        """The matrix, its scales if it is quantized, and its low-rank addition."""
        return (self.variable, *(() if self.scale is None else (self.scale,)), *self.lora)

    def weight(self) -> AnyMatrix | LoraMatrix:
        """Returns the weight as the formulas take it; copies nothing."""
        base = self.base()
        return LoraMatrix(base, *(variable.value for variable in self.lora)) if self.lora else base

    def base(self) -> AnyMatrix:
        """Returns the matrix without a low-rank addition; copies nothing."""
        value = self.variable.value
        if self.scale is None:
            return Matrix(value)
        return (Int8Matrix if self.variable.dtype == "int8" else Int4Matrix)(value, self.scale.value)

    def read(self) -> np.ndarray:
        """Returns a copy of the matrix in the tree's orientation; float32 for a quantized one."""
        array = np.asarray(floats_of(self.base(), self.n_in))
        if self.lora:
            array = with_addition(array, *self.lora)
        return np.ascontiguousarray(array.T) if self.transposed else array.copy()

    def write(self, array: Any) -> None:
        """Assigns an array in the tree's orientation; rounds it, in parts, where the matrix is quantized."""
        dtype = self.variable.dtype if self.scale is None else "float32"
        value = tf.transpose(in_memory(array, dtype)) if self.transposed else array
        if self.scale is not None:
            value, scale = (quantize if self.variable.dtype == "int8" else quantize_4)(value)
            self.scale.assign(scale)
        super().write(value)
        if self.lora:
            self.lora[1].assign(tf.zeros(self.lora[1].shape))


def with_addition(array: np.ndarray, a: keras.Variable, b: keras.Variable, scale: keras.Variable) -> np.ndarray:
    """Adds a low-rank addition to a matrix (n_out, n_in): computed in float64, rounded once to the matrix's dtype."""
    wide_a, wide_b = (np.asarray(part.value).astype(np.float64) for part in (a, b))
    return (array.astype(np.float64) + float(scale.value) * (wide_b @ wide_a)).astype(array.dtype)


class ParamTree:
    """Mixin for Keras layers and models whose weights form a parameter tree."""

    built: bool
    build: Callable[[Any], None]

    def leaf_tree(self) -> Tree:
        """Returns the tree whose leaves are ``Leaf``; the layer must be built."""
        raise NotImplementedError

    def set_weights(self, weights: Mapping[str, Any] | list[np.ndarray]) -> None:
        """Takes the layer's weights from a parameter tree, or from a flat list as in Keras.

        Args:
            weights: the tree or subtree with this layer's names, its leaves arrays of any float dtype (they are cast to
                the variables' dtype); or a list in the order and shapes of ``get_weights()``.

        Raises:
            ParamsError: when leaves are missing, unexpected or misshapen; names them, and assigns nothing.
            TypeError: when ``weights`` is neither a tree nor a list.

        Example:
            >>> import tf_gpt2
            >>> from tf_gpt2.checkpoint.params import random_params
            >>> config = tf_gpt2.GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
            >>> model = tf_gpt2.GPT2Model(config)
            >>> model.set_weights(random_params(config))
        """
        if not isinstance(weights, (Mapping, list, tuple)):
            raise TypeError(f"weights must be a parameter tree, or a list as get_weights() returns it, got {weights!r}")
        if not isinstance(weights, Mapping):
            super().set_weights(weights)  # type: ignore[misc]
            return
        self.ensure_built()
        targets = self.leaf_tree()
        check_params(weights, map_leaves(lambda _, leaf: leaf.shape, targets))
        sources = dict(leaves(weights))
        for path, leaf in leaves(targets):
            leaf.write(np.asarray(sources[path]))

    def weights_tree(self) -> Tree:
        """Returns the weights as the formulas take them, in the types of ``model/weights.py``; copies nothing."""
        return map_leaves(lambda _, leaf: leaf.weight(), self.leaf_tree())

    def get_params(self) -> Tree:
        """Returns the weights as a parameter tree of NumPy arrays, in the variables' dtype, bit for bit."""
        self.ensure_built()
        return map_leaves(lambda _, leaf: leaf.read(), self.leaf_tree())

    def ensure_built(self) -> None:
        """Builds the layer if no call has done so; all shapes are known from its arguments."""
        if not self.built:
            self.build((None, None, None))

    def get_config(self) -> dict[str, Any]:
        """Returns Keras's part of the constructor's arguments, and the paths of frozen layers and variables."""
        config = super().get_config()  # type: ignore[misc]
        frozen = frozen_parts(self) if self.built else {}
        return {**config, "frozen": frozen} if any(frozen.values()) else config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes a layer from the dict of ``get_config``; frozen layers and variables stay frozen."""
        config = dict(config)
        frozen = config.pop("frozen", None)
        layer = super().from_config(config)  # type: ignore[misc]
        if frozen:
            freeze(layer, frozen)
        return layer


def parts_of(layer: keras.Layer, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Yields all layers inside a layer, with their paths, such as ``"blocks/0/attn"``."""
    parts = [(name, value) for name, value in vars(layer).items() if isinstance(value, keras.Layer)]
    parts += [(f"blocks/{i}", block) for i, block in enumerate(vars(layer).get("blocks", ()))]
    for name, part in parts:
        yield path + name, part
        yield from parts_of(part, f"{path}{name}/")


def frozen_parts(layer: Any) -> dict[str, list[str]]:
    """Returns the paths of layers and variables that are not trained, but for quantized matrices, which never are."""
    return {
        "layers": [path for path, part in parts_of(layer) if not part.trainable],
        "variables": [path for path, leaf in trainable_leaves(layer) if not leaf.variable.trainable],
    }


def freeze(layer: Any, frozen: Mapping[str, Sequence[str]]) -> None:
    """Freezes the layers and variables that ``frozen_parts`` listed of another layer of the same form."""
    layer.ensure_built()
    for path, part in parts_of(layer):
        if path in frozen["layers"]:
            part.trainable = False
    for path, leaf in trainable_leaves(layer):
        leaf.variable.trainable = path not in frozen["variables"]


def trainable_leaves(layer: Any) -> Iterator[tuple[str, Leaf]]:
    """Yields the leaves that a user may train or freeze."""
    for path, leaf in leaves(layer.leaf_tree()):
        if len(leaf.variables) == 1:
            yield path, leaf
