"""What is compiled for a model: made once, kept for as long as the model lives. Knows nothing of what it computes."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tensorflow as tf

from tf_gpt2.model.gpt2 import GPT2Model

T = TypeVar("T")


class Compiled:
    """A function of a model and tensors as a ``tf.function``, which keeps what it has compiled.

    Args:
        function: takes the model, tensors and integers; another shape or another integer is compiled by itself.
        model: referred to weakly, so that it can be freed while its functions are remembered.
        jit_compile: whether XLA compiles.

    Attributes:
        function: the ``tf.function``.
    """

    def __init__(self, function: Callable[..., Any], model: GPT2Model, *, jit_compile: bool):
        self.function = tf.function(bind_weakly(function, model), jit_compile=jit_compile, autograph=False)
        self._traced: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Calls it without TensorFlow's warning of frequent tracing: another shape is meant to trace."""
        if tf.config.functions_run_eagerly():  # someone looks for a fault
            return self.function(*args)
        key = tuple(x if isinstance(x, int) else (tuple(x.shape), x.dtype) for x in tf.nest.flatten(args))
        if key not in self._traced:  # TensorFlow looks longer for it
            with without_collector():
                self._traced[key] = self.function.get_concrete_function(*args)
        return self._traced[key](*args)

    @property
    def n_traces(self) -> int:
        """How often a new shape was met: under XLA the number of compilations."""
        return int(self.function.experimental_get_tracing_count())


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


def bind_weakly(function: Callable[..., Any], model: GPT2Model) -> Callable[..., Any]:
    """Fixes the first argument without keeping it alive."""
    reference = weakref.ref(model)

    def bound(*args: Any) -> Any:
        return function(reference(), *args)

    return bound


def once_per_model(make: Callable[..., T]) -> Callable[..., T]:
    """Makes ``make(model, jit_compile=…)`` give the same each time: compiling takes seconds, and belongs to the model.

    What is made may refer to the model only weakly, see ``Compiled``, or the model is never freed.
    """
    made: weakref.WeakKeyDictionary[GPT2Model, dict[bool, T]] = weakref.WeakKeyDictionary()

    @functools.wraps(make)
    def of_model(model: GPT2Model, *, jit_compile: bool) -> T:
        known = made.setdefault(model, {})
        if jit_compile not in known:
            known[jit_compile] = make(model, jit_compile=jit_compile)
        return known[jit_compile]

    return of_model
