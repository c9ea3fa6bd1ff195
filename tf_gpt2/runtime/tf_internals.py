"""Wraps all undocumented parts of TensorFlow that this package uses; read it before an upgrade of TensorFlow.

Each function names the test that fails when a new TensorFlow breaks it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.eager import context


def empty(shape: Sequence[int], dtype: Any) -> tf.Tensor:
    """Allocates a tensor for ``write_in_place``; the system gives it no memory before something is written.

    It holds zeros where each result is looked at, as ``tf.debugging.enable_check_numerics`` does.

    Test: ``tests/model/test_weights.py``, ``test_loading_peaks_near_the_weights``.
    """
    return tf.raw_ops.Empty(shape=shape, dtype=dtype, init=bool(context.context().op_callbacks))


def memory_of(x: tf.Tensor) -> np.ndarray:
    """Returns the memory of a new tensor as an array that can be written to, as long as ``x`` is there.

    Test: ``tests/model/test_weights.py``, ``test_loading_peaks_near_the_weights``.
    """
    shown = np.asarray(x)
    memory = (ctypes.c_uint8 * shown.nbytes).from_address(shown.ctypes.data)
    return np.ctypeslib.as_array(memory).view(shown.dtype).reshape(shown.shape)


def owned_copy(x: tf.Tensor) -> tf.Tensor:
    """Copies a tensor into memory that no other tensor shares, which ``write_in_place`` may then change.

    Test: ``tests/generation/test_cache.py``, ``test_the_plain_loop_leaves_its_input_as_it_is``.
    """
    return tf.raw_ops.DeepCopy(x=x)


def write_in_place(x: tf.Tensor, rows: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Writes into the memory of ``x``, (N, …), at rows, int32 (M,), and returns ``x``. Its other holders see that.

    Outside of XLA, ``tf.tensor_scatter_nd_update`` would copy the whole of ``x``. An index past the end wraps around to
    the first rows, so callers clip.

    Test: ``tests/generation/test_cache.py``, ``test_outside_of_xla_the_cache_is_written_in_place``.
    """
    return tf.raw_ops.InplaceUpdate(x=x, i=rows, v=values)


def not_inlined(function: Callable[..., Any]) -> Any:
    """Returns a ``tf.function`` that TensorFlow keeps as a single node of the graph that calls it.

    Outside of XLA both branches of a ``tf.cond`` are inlined, and each node of the branch not taken still costs a step
    of the executor. As a single node, the branch costs one step. For XLA, see ``once`` in ``model/arithmetic/xla.py``.

    Test: ``tests/model/test_arithmetic.py``, ``test_a_branch_is_one_node_outside_of_xla``.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def of_many_shapes(function: Any) -> Any:
    """Keeps TensorFlow from warning that a ``tf.function`` is traced often: it is meant to be, once for each shape.

    Test: ``tests/training/test_step.py``, ``test_a_new_shape_of_a_large_weight_is_no_reason_to_warn``.
    """
    function._omit_frequent_tracing_warning = True
    return function


def read_without_copy(variable: tf.Variable) -> tf.Tensor:
    """Reads a variable as a tensor that shares its memory, even after a gather from it has switched it to copy-on-read.

    Test: ``tests/generation/test_compiled.py``, ``test_reading_weights_copies_none``.
    """
    tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
    return variable.read_value()


def address(x: tf.Tensor) -> int:
    """Returns the address of a tensor in the CPU's memory.

    TensorFlow writes into a variable's memory only while no tensor shares it. So as long as such a tensor is kept, a
    variable at the same address holds the same values.

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


def ffi_api() -> int | None:
    """Returns the address of XLA's table of functions for foreign ones, or ``None`` where there is none.

    Test: ``tests/model/test_native.py``, ``test_xla_gets_what_the_library_computes``.
    """
    find = native_function("_ZN3xla3ffi12GetXlaFfiApiEv")
    if find is None:
        return None
    find.restype = ctypes.c_void_p
    return find()


def parse_xla_flags(flags: str) -> None:
    """Sets flags of XLA for what is compiled from now on; does nothing where TensorFlow's library has another name.

    ``XLA_FLAGS`` itself stays as it was: another program or library that reads it may not know these flags, and XLA
    ends a process in which it finds an unknown one.

    Test: ``tests/runtime/test_xla_flags.py``, ``test_large_sums_are_not_left_to_ynnpack``.
    """
    parse = native_function("_ZN3xla28ParseDebugOptionFlagsFromEnvEb")
    if parse is None:
        return
    parse.argtypes = [ctypes.c_bool]  # whether to read the environment again
    parse(False)  # the user's own, if nothing was compiled before
    with environment_variable("XLA_FLAGS", flags):
        parse(True)


@contextlib.contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment, and puts it back."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def native_function(name: str) -> Any:
    """Returns a function of TensorFlow's library by its mangled name, or ``None`` where there is none."""
    path = Path(tf.sysconfig.get_lib()) / "libtensorflow_framework.so.2"
    try:
        return getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError):
        return None


def call_foreign(name: str, inputs: Sequence[tf.Tensor], shape: Sequence[int]) -> tf.Tensor:
    """Calls a function that is registered with XLA's foreign function interface; only XLA can compile that.

    Args:
        name: of the function.
        inputs: tensors of known shapes.
        shape: of the result, float32.

    Test: ``tests/model/test_native.py``, ``test_wrong_shapes_are_refused_by_name``.
    """
    dtypes = {tf.bool: "i1", tf.float32: "f32", tf.bfloat16: "bf16", tf.int8: "i8", tf.uint8: "ui8"}
    kinds = [f"tensor<{'x'.join(map(str, x.shape))}x{dtypes[x.dtype]}>" for x in inputs]
    kind = f"tensor<{'x'.join(map(str, shape))}xf32>"
    names = [f"%x{i}" for i in range(len(inputs))]
    parameters = ", ".join(f"{x}: {kind_of_x}" for x, kind_of_x in zip(names, kinds, strict=True))
    module = (  # StableHLO
        f"module @m {{ func.func public @main({parameters}) -> {kind} {{ "
        f"%y = stablehlo.custom_call @{name}({', '.join(names)}) {{api_version = 4 : i32, backend_config = {{}}}} : "
        f"({', '.join(kinds)}) -> {kind} return %y : {kind} }} }}"
    )
    return gen_xla_ops.xla_call_module(
        list(inputs), version=4, module=module, Sout=[list(shape)], Tout=[tf.float32], platforms=["CPU"]
    )[0]
