"""Transposed copies of a model's weights, for loops over several rows: kept for as long as the weights stay the same.

Memory that is fresh at each call can cost more than what is computed in it: a virtual machine may have to ask its host
for each page. So it is taken once. Knows nothing of ids.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.compiled import Compiled
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.layers import Linear
from tf_gpt2.model.loops import compiled_loop

Copies = tuple[tf.Tensor, ...]
"""Float32 (n_in, n_out) for each of ``matrices``, or nothing."""


def matrices(model: GPT2Model) -> list[tf.Variable]:
    """Gives all that products are taken with, each (n_out, n_in); not what is inside someone's own layers."""
    layers = [layer for b in model.blocks for layer in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    return [model.wte.value, *(layer.w.value for layer in layers if isinstance(layer, Linear))]


class TransposedWeights:
    """A model's ``matrices`` transposed, made when first asked for, and anew when one has changed since.

    Args:
        model: referred to weakly.
    """

    def __init__(self, model: GPT2Model):
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._originals: Sequence[np.ndarray] = ()
        self._copies: Copies = ()

    def __call__(self) -> Copies:
        """Gives the copies; none of integers, or of what another device than the processor holds."""
        model: Any = self._model()  # alive: it is being run
        variables = matrices(model)
        if model.quantization or not all("CPU" in variable.device for variable in variables):
            return ()
        with self._lock, tf.device("CPU"):
            # these share the variables' memory; TensorFlow writes to such memory only while nobody else refers to it,
            # so a variable that is still in the same place has not changed
            originals = [np.asarray(read_in_place(variable)) for variable in variables]
            if addresses(originals) != addresses(self._originals):
                self._copies = self._originals = ()  # their memory first
                self._copies = tuple(transpose(array, model.compute_dtype) for array in originals)
                self._originals = originals
            return self._copies


def read_in_place(variable: tf.Variable) -> tf.Tensor:
    """Reads without a copy, also after rows were gathered from the variable itself, when TensorFlow would copy."""
    tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
    return variable.read_value()


def addresses(arrays: Sequence[np.ndarray]) -> list[int]:
    """Says where arrays lie in memory."""
    return [array.ctypes.data for array in arrays]


def transpose(array: np.ndarray, dtype: str) -> tf.Tensor:
    """Transposes, as XLA multiplies numbers of the dtype: in float32."""
    return tf.transpose(tf.cast(tf.cast(array, dtype), tf.float32))


_known: weakref.WeakKeyDictionary[GPT2Model, TransposedWeights] = weakref.WeakKeyDictionary()


def transposed_of(model: GPT2Model) -> TransposedWeights:
    """Gives a model's transposed weights, the same for all that ask."""
    return _known.setdefault(model, TransposedWeights(model))


def over_copies(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Has a loop that XLA compiles multiply several rows by ``Copies``, a last argument; where empty, by its own."""

    @functools.wraps(loop)
    def loop_over_copies(model: GPT2Model, *arguments: Any) -> Any:
        *others, copies = arguments
        known = dict(zip(map(id, matrices(model)), copies, strict=False))
        with compiled_loop(known):
            return loop(model, *others)

    return loop_over_copies


class CompiledOverCopies(Compiled):
    """A loop over a state with a cache, compiled by XLA: for several rows with transposed weights.

    Args:
        loop: takes the model, a state, and other tensors.
        model: referred to weakly.
    """

    def __init__(self, loop: Callable[..., Any], model: GPT2Model):
        super().__init__(over_copies(loop), model, jit_compile=True)
        self._n_head = model.config.n_head
        self._transposed = transposed_of(model)

    def __call__(self, state: Any, *others: Any) -> Any:
        """Runs the loop."""
        has_several = state.keys[0].shape[0] > self._n_head  # (B*H, S, D)
        return super().__call__(state, *others, self._transposed() if has_several else ())
