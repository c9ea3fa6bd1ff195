"""All that this package needs of TensorFlow beyond its documented interface: what to read before an upgrade.

Each function names the test that fails when a new TensorFlow changes what it relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context


def owned_copy(x: tf.Tensor) -> tf.Tensor:
    """Copies a tensor into memory that no other tensor shares, which ``write_in_place`` may then change.

    Test: ``tests/generation/test_cache.py``, ``test_the_plain_loop_leaves_its_input_as_it_is``.
    """
    return tf.raw_ops.DeepCopy(x=x)


def write_in_place(x: tf.Tensor, rows: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Writes into the memory of ``x``, (N, …), at rows, int32 (M,), and returns it. Whoever else holds ``x`` sees it.

    ``tf.tensor_scatter_nd_update`` copies the whole of ``x`` outside of XLA. An index past the end would be taken from
    the beginning; callers clip.

    Test: ``tests/generation/test_cache.py``, ``test_outside_of_xla_the_cache_is_written_in_place``.
    """
    return tf.raw_ops.InplaceUpdate(x=x, i=rows, v=values)


def not_inlined(function: Callable[..., Any]) -> Any:
    """Returns a ``tf.function`` that TensorFlow keeps as a single node of the graph that calls it.

    Outside of XLA both branches of a ``tf.cond`` are inlined, and each node of the branch that is not taken still costs
    a step of the executor; one node costs one.

    Test: ``tests/model/test_arithmetic.py``, ``test_a_branch_is_one_node_outside_of_xla``.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def read_without_copy(variable: tf.Variable) -> tf.Tensor:
    """Reads a variable as a tensor that shares its memory, also after a gather from the variable made reads copy.

    Test: ``tests/generation/test_compiled.py``, ``test_reading_weights_copies_none``.
    """
    tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
    return variable.read_value()


def address(x: tf.Tensor) -> int:
    """Returns where a tensor on the processor lies in memory.

    TensorFlow writes into a variable's memory only while no tensor shares it; so while one is kept, a variable at the
    same address holds the same values.

    Test: ``tests/generation/test_compiled.py``, ``test_transposed_weights_follow_a_change``.
    """
    return int(np.asarray(x).ctypes.data)


def call_flat(concrete: Any, inputs: Sequence[tf.Tensor]) -> Any:
    """Calls a concrete function with its tensors in a flat list, variables by their handles.

    The documented call checks the type of each of a model's 150 weights anew, which takes 5 ms.

    Test: ``tests/generation/test_compiled.py``, ``test_a_flat_call_is_an_ordinary_call``.
    """
    return concrete._call_flat(list(inputs), concrete.captured_inputs)


def watches_operations() -> bool:
    """Whether someone looks at each operation, as ``tf.debugging.enable_check_numerics`` does: XLA cannot compile that.

    Test: ``tests/model/test_keras.py``, ``test_checks_of_numbers_find_nothing_in_a_sound_model``.
    """
    return bool(context.context().op_callbacks)
