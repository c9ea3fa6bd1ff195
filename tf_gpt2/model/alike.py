"""Calls layers that differ in their weights only: one is traced, and its graph is called for all.

Tracing twelve blocks takes Python twelve times as long as one, at each first call. What XLA compiles is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_gpt2.model.layers import MLP, Block, CausalSelfAttention, LayerNorm, Linear
from tf_gpt2.model.loops import copy_of, value_in_loop, with_copies

OWN = {Block, CausalSelfAttention, MLP, LayerNorm, Linear, keras.layers.Dropout}
WRAPPED_BY_KERAS = {"build", "quantize"}


def call_alike(layers: Sequence[keras.Layer], x: tf.Tensor, caches: Sequence[Any]) -> tf.Tensor:
    """Calls layers one after the other, as ``x = layer(x, cache=cache)`` for each.

    Args:
        layers: alike, see ``are_alike``.
        x: what the first one takes.
        caches: one per layer, see ``hold_tensors``; their attributes change as the layers change them.
    """
    first = layers[0]

    @tf.function(autograph=False)
    def call_one(weights: list[Any], copies: list[Any], x: tf.Tensor, attributes: dict[str, Any]) -> Any:
        cache = copy.copy(caches[0])
        vars(cache).update(attributes)
        scope = keras.StatelessScope(list(zip(first.variables, weights, strict=True)))
        with scope, with_copies(values_of(first), copies):  # in this order: the scope changes the values
            return first(x, cache=cache), vars(cache)

    for layer, cache in zip(layers, caches, strict=True):
        weights = values_of(layer)
        x, attributes = call_one([value_in_loop(w) for w in weights], [copy_of(w) for w in weights], x, vars(cache))
        vars(cache).update(attributes)
    return x


def values_of(layer: keras.Layer) -> list[Any]:
    """Gives what a layer computes with, in the order of its variables."""
    return [variable.value for variable in layer.variables]


def hold_tensors(caches: Sequence[Any]) -> bool:
    """Says whether caches, of one class, can go through a graph: whether their attributes are tensors, all of them."""
    is_one_class = len({type(cache) for cache in caches}) == 1
    return is_one_class and all(
        hasattr(cache, "__dict__") and is_made_of_tensors(*vars(cache).values()) for cache in caches
    )


def is_made_of_tensors(*parts: Any) -> bool:
    """Says whether all parts are tensors, or tuples of tensors; lists may be appended to."""
    return all(tf.is_tensor(part) or (isinstance(part, tuple) and is_made_of_tensors(*part)) for part in parts)


def are_alike(layers: Sequence[keras.Layer]) -> bool:
    """Says whether several layers differ in their weights only, also when someone has changed one of them."""
    first, *others = map(traits, layers)
    return bool(others) and all(other == first for other in others)


def traits(layer: keras.Layer) -> Any:
    """Gives all that a layer's graph depends on but the values of weights; someone's own layer is like no other.

    Such a layer may do anything, keep a state for instance, which one graph for all would lose.
    """
    if type(layer) not in OWN:
        return layer
    parts = {name: traits(part) for name, part in parts_of(layer).items()}
    settings = {**layer.get_config(), "name": None}
    return type(layer), settings, overridden(layer), parts, [(w.shape, w.dtype) for w in layer.variables]


def is_own(layer: keras.Layer) -> bool:
    """Says whether a layer, with its parts, is the package's own and nobody has changed what it does."""
    return type(layer) in OWN and not overridden(layer) and all(map(is_own, parts_of(layer).values()))


def overridden(layer: keras.Layer) -> dict[str, Any]:
    """Gives the attributes that hide some of the layer's class, by name."""
    own = vars(layer)
    return {name: own[name] for name in own.keys() & vars(type(layer)).keys() - WRAPPED_BY_KERAS}


def parts_of(layer: keras.Layer) -> dict[str, keras.Layer]:
    """Gives the layers that are attributes of a layer, by name."""
    return {name: part for name, part in vars(layer).items() if isinstance(part, keras.Layer)}
