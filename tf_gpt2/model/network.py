"""``Network``: a model as data, for functions that are compiled once for all models of one shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import Ops
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.formulas import KeyValues, Past, Weights
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.layers import MLP, Block, CausalSelfAttention, LayerNorm, Linear
from tf_gpt2.model.param_tree import parts_of

OWN_LAYERS = {GPT2Model, Block, CausalSelfAttention, MLP, LayerNorm, Linear, keras.layers.Dropout}
FORMULAS = ("call", "hidden_states", "logits", "token_embeddings")
"""Methods that decide what a model computes; a subclass may override any other method."""
SETTINGS: dict[type, Callable[[GPT2Config, int], dict[str, Any]]] = {
    LayerNorm: lambda config, _: {"epsilon": config.layer_norm_epsilon},
    CausalSelfAttention: lambda config, i: {"n_head": config.n_head, "score_divisor": config.score_divisor(i)},
    MLP: lambda config, _: {"activation": config.activation},
}
"""What the formulas take from the config for each kind of layer in a block, by the block's number."""
WRAPPED_BY_KERAS = {"build", "quantize"}
"""Methods that Keras stores as attributes of each layer instance."""


@dataclasses.dataclass(frozen=True)
class Network:
    """GPT-2 with its weights as tensors, and the arithmetic to compute with.

    Attributes:
        weights: the parameter tree, as ``formulas`` takes it.
        config: the hyperparameters.
        dtype: the compute dtype.
        ops: a module of ``arithmetic``.
    """

    weights: Weights
    config: GPT2Config
    dtype: str
    ops: Ops

    def hidden_states(
        self, ids: tf.Tensor, positions: tf.Tensor | None = None, past: Sequence[KeyValues] | None = None
    ) -> tuple[tf.Tensor, tuple[KeyValues, ...]]:
        """Runs all but the head.

        The cache's entries at later positions are not seen, whatever they hold, such as those of tokens that were
        taken back.

        Args:
            ids: int32 (B, T).
            positions: int32 (B, T), ascending, for ids that follow those in the cache; padding ids may have equal
                positions.
            past: a cache per block, (N, S, D).

        Returns:
            The hidden states that the logits are computed from, (B, T, C); each block's keys and values: those of
            ``ids``, (N, T, D), or the whole cache with them.
        """
        return formulas.hidden_states(
            ids,
            self.weights,
            config=self.config,
            dtype=self.dtype,
            ops=self.ops,
            positions=positions,
            past=None if past is None else self._place(positions, past),
        )

    def _place(self, positions: tf.Tensor, cache: Sequence[KeyValues]) -> list[Past]:
        """Returns each block's cache with the places of positions, int32 (B, T), in it."""
        like = cache[0].keys
        of_heads = tf.tile(positions, (1, self.config.n_head))
        of_heads = tf.reshape(of_heads, (-1, shape_of(positions)[1]))  # (N, T)
        mask = tf.range(shape_of(like)[1]) <= tf.expand_dims(of_heads, -1)  # (N, T, S)
        places = self.ops.places(of_heads, like)
        return [Past(*key_values, places, mask) for key_values in cache]

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """Computes logits: floats (..., C) -> float32 (..., V)."""
        return formulas.logits(hidden, formulas.head_of(self.weights), ops=self.ops)


def network_of(model: GPT2Model, ops: Ops) -> Network:
    """Returns a model's network, whose weights are the model's variables."""
    return Network(weights_of(model), model.config, model.compute_dtype, ops)


def weights_of(model: GPT2Model) -> Weights:
    """Returns a model's variables as the tree that the formulas take; copies nothing.

    Raises:
        ValueError: when a layer was replaced or changed, so that the formulas would compute something else.
    """
    for path, layer in [("model", model), *parts_of(model)]:
        check_own(path, layer, model.compute_dtype)
        check_settings(path, layer, model.config)
    weights = model.weights_tree()
    is_mirrored = isinstance(model.wpe.value, tf.distribute.DistributedValues)
    return tf.nest.map_structure(first_replica, weights) if is_mirrored else weights


def first_replica(variable: Any) -> Any:
    """Returns one device's copy of a variable that a distribution strategy has mirrored; ``None`` for ``None``."""
    return None if variable is None else variable.distribute_strategy.experimental_local_results(variable)[0]


def check_own(path: str, layer: keras.Layer, dtype: str) -> None:
    """Raises ValueError for a layer that computes something else than the formulas."""
    kind = type(layer)
    if isinstance(layer, GPT2Model):
        is_own = all(getattr(kind, name) is getattr(GPT2Model, name) for name in FORMULAS)
    else:
        is_own = kind in OWN_LAYERS
    changed = vars(layer).keys() & vars(kind).keys() - WRAPPED_BY_KERAS
    what = ", ".join(sorted(changed)) if is_own else f"its class {kind.__name__}"
    if not is_own or changed:
        raise ValueError(
            f"{path} has been replaced or changed ({what}): generation computes with the package's own layers, and "
            f"its results would differ from those of model(ids); put the layer back, or call model(ids) for each token"
        )
    if layer.compute_dtype != dtype:
        raise ValueError(
            f"{path} computes in {layer.compute_dtype} and the model in {dtype}: generation has one dtype; give all "
            f"layers the model's policy"
        )


def check_settings(path: str, layer: keras.Layer, config: GPT2Config) -> None:
    """Raises ValueError for a layer whose settings are not those of the config."""
    if type(layer) not in SETTINGS:
        return
    number = int(path.split("/")[1]) if path.startswith("blocks/") else 0
    for name, value in SETTINGS[type(layer)](config, number).items():
        if getattr(layer, name) != value:
            raise ValueError(
                f"{path} has {name}={getattr(layer, name)!r} and the model's config {value!r}: generation goes by the "
                f"config, and its results would differ from those of model(ids); make the model with another config"
            )
