"""Keeps the transposed twins of a model's matrices in variables of a graph, as ``generation.compiled`` does in Python.

A SavedModel stores these variables empty; the first request that needs them fills them.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.generation.compiled import matrices, transpose
from tf_gpt2.model.network import Network


class TwinsInGraph:
    """The transposed twins of a network's float matrices, made when first needed; the weights must not change after.

    Args:
        network: the model; its weights are variables.

    Attributes:
        exist: whether there are twins: 8-bit matrices have none.
    """

    def __init__(self, network: Network):
        self._dtype = network.dtype
        self._matrices = [matrix.value for matrix in matrices(network.weights)]
        self._twins = [tf.Variable(tf.zeros((0, 0)), shape=[None, None], trainable=False) for _ in self._matrices]
        self._is_filled = tf.Variable(False, trainable=False)
        self.exist = bool(self._matrices)

    def __call__(self) -> tuple[tf.Tensor, ...]:
        """Returns the twin of each matrix, float32 (n_in, n_out), in the order of the tree."""
        twins = tf.cond(self._is_filled, self._read, self._fill)
        return tuple(tf.ensure_shape(twin, w.shape[::-1]) for twin, w in zip(twins, self._matrices, strict=True))

    def _read(self) -> tuple[tf.Tensor, ...]:
        return tuple(variable.read_value() for variable in self._twins)

    def _fill(self) -> tuple[tf.Tensor, ...]:
        twins = tuple(transpose(w, self._dtype) for w in self._matrices)
        filled = [variable.assign(twin, read_value=False) for variable, twin in zip(self._twins, twins, strict=True)]
        with tf.control_dependencies(filled):  # first the twins, then the mark: requests may run at the same time
            self._is_filled.assign(True, read_value=False)
        return twins
