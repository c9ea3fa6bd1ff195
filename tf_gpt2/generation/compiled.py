"""What is compiled: once for all models of one shape, whose weights are arguments.

Knows nothing of what it computes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tf_gpt2.checkpoint.params import map_leaves
from tf_gpt2.config import GPT2Config
from tf_gpt2.model.arithmetic import Ops, graph, native, xla
from tf_gpt2.model.formulas import Weights
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network, weights_of
from tf_gpt2.model.weights import Matrix
from tf_gpt2.runtime import kernels, prepare_process
from tf_gpt2.runtime.tf_internals import address, call_flat, read_without_copy, watches_operations


class Compiled:
    """A function of a network and tensors as a ``tf.function``, which keeps what it has compiled.

    Args:
        function: takes a ``Network``, tensors and integers; another shape or another integer is compiled by itself.
        config: the hyperparameters of the models that it is for.
        dtype: what they compute in.
        ops: the arithmetic.
    """

    def __init__(self, function: Callable[..., Any], config: GPT2Config, dtype: str, ops: Ops):
        prepare_process()

        def call(weights: Weights, *args: Any) -> Any:
            return function(Network(ops.prepare(weights), config, dtype, ops), *args)

        self.function = tf.function(call, jit_compile=ops.JIT_COMPILE, autograph=False)
        self._traced: dict[tuple[Any, ...], Any] = {}

    def __call__(self, weights: Weights, *args: Any) -> Any:
        """Calls it without TensorFlow's warning of frequent tracing: another shape is meant to trace."""
        if tf.config.functions_run_eagerly():  # someone looks for a fault
            return self.function(weights, *args)
        flat_weights = [x for x in tf.nest.flatten(weights) if x is not None]
        flat_args = tf.nest.flatten(args)
        of_weights = tuple((x.dtype, x.shape) for x in flat_weights)  # shapes, because LoRA's have any rank
        of_args = tuple(x if isinstance(x, int) else (tuple(x.shape), x.dtype) for x in flat_args)
        if (of_weights, of_args) not in self._traced:
            with without_collector():
                self._traced[of_weights, of_args] = self.function.get_concrete_function(weights, *args)
        handles = [x.handle if isinstance(x, tf.Variable) else x for x in flat_weights]
        tensors = [x for x in flat_args if not isinstance(x, int)]
        return call_flat(self._traced[of_weights, of_args], [*handles, *tensors])

    @property
    def n_traces(self) -> int:
        """How often a new shape was met: under XLA the number of compilations."""
        return int(self.function.experimental_get_tracing_count())


@functools.cache
def compiled_for(function: Callable[..., Any], config: GPT2Config, dtype: str, ops: Ops) -> Compiled:
    """Returns the one ``Compiled`` of a function for all models of one shape and dtype."""
    return Compiled(function, config, dtype, ops)


def compiled(
    function: Callable[..., Any], model: GPT2Model, *, jit_compile: bool, n_rows: int = 1
) -> Callable[..., Any]:
    """Returns a compiled function with a model's weights.

    Args:
        function: takes a ``Network``, tensors and integers.
        model: whose weights to compute with; a later change of them counts, but in transposed twins.
        jit_compile: whether XLA compiles; it does not while ``tf.debugging.enable_check_numerics`` is on.
        n_rows: how many rows its products have: for several XLA's products use transposed twins of the weights.

    Raises:
        ImportError: when ``TF_GPT2_KERNELS`` demands kernels that cannot be used.
        ValueError: when a layer of the model has been replaced or changed.
    """
    jit_compile = jit_compile and not watches_operations()
    ops = arithmetic(jit_compile=jit_compile)
    weights = weights_of(model)
    if model.quantization is None and ops.needs_twins(n_rows, model.compute_dtype):
        weights = twins_of(model).add_to(weights)
    return functools.partial(compiled_for(function, model.config, model.compute_dtype, ops), weights)


def arithmetic(*, jit_compile: bool) -> Any:
    """Returns the module of arithmetic for this machine: XLA's, with the native kernels where they can be used."""
    if not jit_compile:
        return graph
    return native if kernels.are_chosen() else xla


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keeps Python from looking for garbage meanwhile: tracing makes very many objects, and they stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class TransposedTwins:
    """Transposed copies of a model's matrices, made when first asked for, and anew when one has changed since.

    A product of a few rows is 1.5 times as fast with them. Memory that is fresh at each call can cost more than what is
    computed in it: a virtual machine may have to ask its host for each page. So it is taken once.

    Args:
        dtype: what the model computes in: XLA multiplies numbers rounded to it.
    """

    def __init__(self, dtype: str):
        self._dtype = dtype
        self._lock = threading.Lock()
        self._originals: Sequence[tf.Tensor] = ()
        self._twins: Sequence[tf.Tensor] = ()

    def add_to(self, weights: Weights) -> Weights:
        """Returns the tree with twins; as it is where another device than the processor holds a matrix."""
        variables = [leaf.value for leaf in matrices(weights)]
        if not all("CPU" in variable.device for variable in variables):
            return weights
        with self._lock, tf.device("CPU"):
            originals = [read_without_copy(variable) for variable in variables]
            if [*map(address, originals)] != [*map(address, self._originals)]:
                self._twins = self._originals = ()  # their memory first
                self._twins = [transpose(original, self._dtype) for original in originals]
                self._originals = originals
            return with_twins(weights, self._twins)


def matrices(weights: Weights) -> list[Matrix]:
    """Returns the float matrices of a tree, in its order."""
    found: list[Matrix] = []
    map_leaves(lambda _, leaf: found.append(leaf) if isinstance(leaf, Matrix) else None, weights)
    return found


def with_twins(weights: Weights, twins: Sequence[tf.Tensor]) -> Weights:
    """Returns the tree whose float matrices have twins, float32 (n_in, n_out) in the tree's order."""
    rest = iter(twins)
    return map_leaves(
        lambda _, leaf: leaf._replace(transposed=next(rest)) if isinstance(leaf, Matrix) else leaf, weights
    )


def transpose(w: tf.Tensor, dtype: str) -> tf.Tensor:
    """Transposes a matrix whose numbers are rounded to a dtype: (n_out, n_in) -> float32 (n_in, n_out)."""
    return tf.transpose(tf.cast(tf.cast(w, dtype), tf.float32))


_twins: weakref.WeakKeyDictionary[GPT2Model, TransposedTwins] = weakref.WeakKeyDictionary()


def twins_of(model: GPT2Model) -> TransposedTwins:
    """Returns a model's transposed twins, the same for all that ask; they go when the model goes."""
    return _twins.setdefault(model, TransposedTwins(model.compute_dtype))
