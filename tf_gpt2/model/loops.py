"""What is traced may be the body of a loop, out of which work can be moved: copies of weights that are made once."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import tensorflow as tf


class Loop(NamedTuple):
    """The loop around what is traced.

    Attributes:
        is_compiled: whether XLA compiles it.
        copies: of weights (n_out, n_in), by their ``id``, as the loop multiplies by them: where XLA compiles it,
            transposed ones, float32 (n_in, n_out), for several rows; where not, float32 ones of 8-bit weights.
        values: what variables hold, by their ``id``, where that was read before the loop.
    """

    is_compiled: bool
    copies: Mapping[int, tf.Tensor]
    values: Mapping[int, tf.Tensor] = MappingProxyType({})


_loop: contextvars.ContextVar[Loop | None] = contextvars.ContextVar("loop", default=None)


def loop_around() -> Loop | None:
    """Gives the loop whose body is being traced, if any."""
    return _loop.get()


def is_plain() -> bool:
    """Says whether what is being traced is the body of a loop that XLA does not compile, or as one."""
    loop = loop_around()
    return loop is not None and not loop.is_compiled


@contextlib.contextmanager
def inside(loop: Loop | None) -> Iterator[None]:
    """Says that what is traced inside is a loop's body."""
    token = _loop.set(loop)
    try:
        yield
    finally:
        _loop.reset(token)


def compiled_loop(copies: Mapping[int, tf.Tensor] | None = None) -> contextlib.AbstractContextManager[None]:
    """Says that what is traced inside is the body of a loop that XLA compiles.

    Args:
        copies: transposed weights; where there are none, XLA makes them before the loop.
    """
    return inside(Loop(is_compiled=True, copies=copies or {}))


def plain_loop(weights: Iterable[tf.Variable]) -> contextlib.AbstractContextManager[None]:
    """Says that what is traced inside is the body of a loop that XLA does not compile.

    The float32 copies of 8-bit weights are made here, once, and live as long as the loop; they would be made at each
    step.
    """
    return inside(
        Loop(is_compiled=False, copies={id(w): tf.cast(w, tf.float32) for w in weights if w.dtype == tf.int8})
    )


def value_in_loop(variable: Any) -> tf.Tensor:
    """Gives what a variable holds: as read before the loop around, or read now."""
    loop = loop_around()
    value = loop.values.get(id(variable)) if loop else None
    return tf.convert_to_tensor(variable) if value is None else value


def kept_apart(function: Callable[..., Any]) -> Any:
    """Gives a function that TensorFlow is not to dissolve in the graph that calls it: a call of it is one node."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def as_one_node(branch: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a branch of ``tf.cond`` that costs next to nothing where it is not taken.

    Outside of XLA TensorFlow makes one graph of both branches, and each node of the one that is not taken is told that
    there is nothing to do, loops within it too. A function that is not inlined is one node.
    """
    return kept_apart(branch) if is_plain() else branch


def copy_of(weight: Any) -> tf.Tensor | None:
    """Gives the copy that the loop around has of a weight, if any."""
    loop = loop_around()
    return loop.copies.get(id(weight)) if loop else None


def with_copies(weights: Iterable[Any], copies: Iterable[tf.Tensor | None]) -> contextlib.AbstractContextManager[None]:
    """Goes on in the same loop with other tensors for weights, and for ``copy_of`` them."""
    loop = loop_around()
    known = {id(w): copy for w, copy in zip(weights, copies, strict=True) if copy is not None}
    return inside(loop and loop._replace(copies=known))
