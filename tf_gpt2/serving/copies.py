"""Transposed twins of a model's matrices in variables of a graph: what ``generation.compiled`` keeps for Python.

The files of a SavedModel hold them empty; the first request that wants them fills them.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.generation.compiled import matrices, transpose
from tf_gpt2.model.network import Network


class TwinsInGraph:
    """A network's float matrices transposed, made when a graph first asks for them; the weights must not change.

    Args:
        network: whose weights are variables.

    Attributes:
        exist: whether there are any: 8-bit matrices have none.
    """

    def __init__(self, network: Network):
        self._dtype = network.dtype
        self._matrices = [matrix.value for matrix in matrices(network.weights)]
        self._twins = [tf.Variable(tf.zeros((0, 0)), shape=[None, None], trainable=False) for _ in self._matrices]
        self._is_filled = tf.Variable(False, trainable=False)
        self.exist = bool(self._matrices)

    def __call__(self) -> tuple[tf.Tensor, ...]:
        """Returns float32 (n_in, n_out) for each matrix, in the order of the tree."""
        twins = tf.cond(self._is_filled, self._read, self._fill)
        return tuple(tf.ensure_shape(twin, w.shape[::-1]) for twin, w in zip(twins, self._matrices, strict=True))

    def _read(self) -> tuple[tf.Tensor, ...]:
        return tuple(variable.read_value() for variable in self._twins)

    def _fill(self) -> tuple[tf.Tensor, ...]:
        twins = tuple(transpose(w, self._dtype) for w in self._matrices)
        filled = [variable.assign(twin, read_value=False) for variable, twin in zip(self._twins, twins, strict=True)]
        with tf.control_dependencies(filled):  # requests may come at the same time
            self._is_filled.assign(True, read_value=False)
        return twins
