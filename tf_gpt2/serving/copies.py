"""Transposed copies of a model's weights in variables of a graph: what ``generation.transposed`` keeps for Python.

The files of a SavedModel hold them empty; the first request that wants them fills them.
"""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.generation.transposed import Copies, matrices, transpose
from tf_gpt2.model.gpt2 import GPT2Model


class CopiesInGraph:
    """A model's ``matrices`` transposed, made when a graph first asks for them; the weights must not change.

    Args:
        model: must outlive what is made of it.
    """

    def __init__(self, model: GPT2Model):
        self._model = model
        n_copies = 0 if model.quantization else len(matrices(model))
        self._copies = [tf.Variable(tf.zeros((0, 0)), shape=[None, None], trainable=False) for _ in range(n_copies)]
        self._is_filled = tf.Variable(False, trainable=False)

    def __call__(self) -> Copies:
        """Gives the copies; none of integers."""
        if not self._copies:
            return ()
        copies = tf.cond(self._is_filled, self._read, self._fill)
        shapes = [w.shape[::-1] for w in matrices(self._model)]
        return tuple(tf.ensure_shape(copy, shape) for copy, shape in zip(copies, shapes, strict=True))

    def _read(self) -> Copies:
        return tuple(variable.read_value() for variable in self._copies)

    def _fill(self) -> Copies:
        copies = tuple(transpose(w, self._model.compute_dtype) for w in matrices(self._model))
        filled = [variable.assign(copy, read_value=False) for variable, copy in zip(self._copies, copies, strict=True)]
        with tf.control_dependencies(filled):  # requests may come at the same time
            self._is_filled.assign(True, read_value=False)
        return copies
