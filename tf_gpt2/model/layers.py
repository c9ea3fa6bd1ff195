"""The parts of GPT-2 as Keras layers: ``Linear``, ``LayerNorm``, ``CausalSelfAttention``, ``MLP``, ``Block``.

Axis letters: B batch, T query positions, S key positions, C width, H heads, D head width, F MLP width. The layers know
nothing of sampling or of how a key/value cache is kept: a ``cache`` is any object with
``update(k, v) -> (keys, values, mask)``.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2, ``src/model.py``.
"""

from __future__ import annotations

from typing import Any, Protocol

import keras
import tensorflow as tf

from tf_gpt2.checkpoint.params import Tree
from tf_gpt2.config import LAYER_NORM_EPS, known_activation
from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.arithmetic.activations import activate
from tf_gpt2.model.param_tree import Leaf, MatrixLeaf, ParamTree, add_matrix

INIT_STDDEV = 0.02
"""Standard deviation of fresh weights. Source: openai/gpt-2, ``src/model.py``, ``conv1d``."""


class LayerCache(Protocol):
    """The interface of one layer's key/value cache, as attention calls it."""

    def update(self, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Adds keys and values (B*H, T, D); returns all there are, (B*H, S, D), and a mask, (B*H or 1, T, S)."""


@keras.saving.register_keras_serializable("tf_gpt2")
class Linear(ParamTree, keras.layers.Layer):
    """Computes ``x @ w + b``; stores ``w`` transposed.

    The tree holds ``w`` as ``(n_in, n_out)``, the variable as ``(n_out, n_in)``: a one-row product then reads one
    contiguous run of memory per output, which is faster than strided columns.

    Args:
        n_in: width of the input.
        n_out: width of the output.
        quantization: ``"int8"`` or ``"int4"`` keeps ``w`` as 8-bit or 4-bit integers, for inference only.

    Call arguments:
        x: floats (..., n_in) -> (..., n_out).
    """

    def __init__(self, n_in: int, n_out: int, quantization: str | None = None, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.n_in = n_in
        self.n_out = n_out
        self.quantization = quantization

    def build(self, input_shape: Any) -> None:
        """Creates ``w`` and ``b``."""
        shape = (self.n_out, self.n_in)
        self.w, self.w_scale = add_matrix(self, "w", shape, stddev=INIT_STDDEV, quantization=self.quantization)
        self.b = self.add_weight(shape=(self.n_out,), initializer="zeros", autocast=False, name="b")
        self.lora_a = self.lora_b = self.lora_scale = None

    def leaf_tree(self) -> Tree:
        """Returns the tree ``{"b", "w"}``."""
        lora = () if self.lora_a is None else (self.lora_a, self.lora_b, self.lora_scale)
        matrix = MatrixLeaf(self.w, self.n_in, transposed=True, scale=self.w_scale, lora=lora)
        return {"b": Leaf(self.b), "w": matrix}

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Computes ``x @ w + b`` in the layer's compute dtype."""
        return formulas.linear(tf.cast(x, self.compute_dtype), self.weights_tree(), ops=plain)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the input's shape with ``n_out`` as its last axis."""
        return (*input_shape[:-1], self.n_out)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "n_in": self.n_in, "n_out": self.n_out, "quantization": self.quantization}


@keras.saving.register_keras_serializable("tf_gpt2")
class LayerNorm(ParamTree, keras.layers.Layer):
    """Layer norm over the last axis, in float32 whatever the policy; biased variance.

    Args:
        n_embd: width, C.
        epsilon: added to the variance.

    Call arguments:
        x: floats (..., C) -> (..., C) in the compute dtype.
    """

    def __init__(self, n_embd: int, epsilon: float = LAYER_NORM_EPS, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.n_embd = n_embd
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        """Creates the gain ``g`` and the bias ``b``."""
        self.g = self.add_weight(shape=(self.n_embd,), initializer="ones", autocast=False, name="g")
        self.b = self.add_weight(shape=(self.n_embd,), initializer="zeros", autocast=False, name="b")

    def leaf_tree(self) -> Tree:
        """Returns the tree ``{"b", "g"}``."""
        return {"b": Leaf(self.b), "g": Leaf(self.g)}

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Normalizes in float32; returns the compute dtype."""
        x = tf.cast(x, tf.float32)
        return tf.cast(formulas.norm(x, self.weights_tree(), ops=plain, epsilon=self.epsilon), self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "n_embd": self.n_embd, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("tf_gpt2")
class CausalSelfAttention(ParamTree, keras.layers.Layer):
    """Multi-head attention in which a position sees itself and earlier ones.

    Args:
        n_embd: width, C.
        n_head: heads, H; must divide ``n_embd``.
        dropout: rate on attention weights and on the output, active in training only.
        quantization: as in ``Linear``.
        score_divisor: divides the scores, beside the usual sqrt(D).

    Call arguments:
        x: floats (B, T, C) -> (B, T, C).
        cache: ``LayerCache`` of earlier keys and values; ``None`` attends within ``x``.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float = 0.0,
        quantization: str | None = None,
        *,
        score_divisor: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        if n_embd % n_head:
            raise ValueError(f"n_head must divide n_embd, got n_head={n_head} and n_embd={n_embd}")
        self.n_embd = n_embd
        self.n_head = n_head
        self.dropout = dropout
        self.quantization = quantization
        self.score_divisor = score_divisor
        self.c_attn = Linear(n_embd, 3 * n_embd, quantization, dtype=self.dtype_policy, name="c_attn")
        self.c_proj = Linear(n_embd, n_embd, quantization, dtype=self.dtype_policy, name="c_proj")
        self.attn_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)
        self.resid_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        """Builds both linear layers."""
        self.c_attn.build(input_shape)
        self.c_proj.build(input_shape)

    def leaf_tree(self) -> Tree:
        """Returns the tree ``{"c_attn", "c_proj"}``."""
        return {"c_attn": self.c_attn.leaf_tree(), "c_proj": self.c_proj.leaf_tree()}

    def call(self, x: tf.Tensor, cache: LayerCache | None = None, training: bool | None = None) -> tf.Tensor:
        """Attends within ``x``, or to the cache that ``x`` extends."""
        out, _ = formulas.attend(
            self.c_attn(x),
            n_head=self.n_head,
            ops=plain,
            divisor=None if self.score_divisor == 1 else self.score_divisor,
            extend=None if cache is None else cache.update,
            drop=lambda weights: self.attn_dropout(weights, training=training),
        )
        return self.resid_dropout(self.c_proj(out), training=training)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("n_embd", "n_head", "dropout", "quantization", "score_divisor")
        arguments = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **arguments}


@keras.saving.register_keras_serializable("tf_gpt2")
class MLP(ParamTree, keras.layers.Layer):
    """Two linear layers with an activation between.

    Args:
        n_embd: width, C.
        dropout: rate on the output, active in training only.
        quantization: as in ``Linear``.
        n_inner: width between the two, F; 4 C by default.
        activation: as in ``GPT2Config``; OpenAI's is ``"gelu_new"``.

    Call arguments:
        x: floats (B, T, C) -> (B, T, C).
    """

    def __init__(
        self,
        n_embd: int,
        dropout: float = 0.0,
        quantization: str | None = None,
        *,
        n_inner: int | None = None,
        activation: str = "gelu_new",
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.n_embd = n_embd
        self.dropout = dropout
        self.quantization = quantization
        self.n_inner = 4 * n_embd if n_inner is None else n_inner
        self.activation = known_activation(activation)
        self.c_fc = Linear(n_embd, self.n_inner, quantization, dtype=self.dtype_policy, name="c_fc")
        self.c_proj = Linear(self.n_inner, n_embd, quantization, dtype=self.dtype_policy, name="c_proj")
        self.resid_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        """Builds both linear layers."""
        self.c_fc.build(input_shape)
        self.c_proj.build(input_shape)

    def leaf_tree(self) -> Tree:
        """Returns the tree ``{"c_fc", "c_proj"}``."""
        return {"c_fc": self.c_fc.leaf_tree(), "c_proj": self.c_proj.leaf_tree()}

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Widens, applies the activation, narrows."""
        x = activate(self.c_fc(x), self.activation, plain)  # (B, T, F)
        return self.resid_dropout(self.c_proj(x), training=training)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("n_embd", "dropout", "quantization", "n_inner", "activation")
        arguments = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **arguments}


@keras.saving.register_keras_serializable("tf_gpt2")
class Block(ParamTree, keras.layers.Layer):
    """One transformer block: attention and MLP, each with a layer norm before it and a residual sum around it.

    Args:
        n_embd: width, C.
        n_head: heads, H; must divide ``n_embd``.
        dropout: rate inside attention and MLP, active in training only.
        quantization: as in ``Linear``.
        n_inner: as in ``MLP``.
        activation: as in ``MLP``.
        layer_norm_epsilon: of both layer norms.
        score_divisor: as in ``CausalSelfAttention``.

    Call arguments:
        x: floats (B, T, C) -> (B, T, C).
        cache: as in ``CausalSelfAttention``.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float = 0.0,
        quantization: str | None = None,
        *,
        n_inner: int | None = None,
        activation: str = "gelu_new",
        layer_norm_epsilon: float = LAYER_NORM_EPS,
        score_divisor: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.n_embd = n_embd
        self.n_head = n_head
        self.dropout = dropout
        self.quantization = quantization
        self.n_inner = 4 * n_embd if n_inner is None else n_inner
        self.activation = activation
        self.layer_norm_epsilon = layer_norm_epsilon
        self.score_divisor = score_divisor
        common = {"dtype": self.dtype_policy}
        self.ln_1 = LayerNorm(n_embd, layer_norm_epsilon, **common, name="ln_1")
        self.attn = CausalSelfAttention(
            n_embd, n_head, dropout, quantization, score_divisor=score_divisor, **common, name="attn"
        )
        self.ln_2 = LayerNorm(n_embd, layer_norm_epsilon, **common, name="ln_2")
        self.mlp = MLP(n_embd, dropout, quantization, n_inner=n_inner, activation=activation, **common, name="mlp")

    def build(self, input_shape: Any) -> None:
        """Builds the four parts."""
        for part in (self.ln_1, self.attn, self.ln_2, self.mlp):
            part.build(input_shape)

    def leaf_tree(self) -> Tree:
        """Returns the tree ``{"attn", "ln_1", "ln_2", "mlp"}``."""
        return {name: getattr(self, name).leaf_tree() for name in ("attn", "ln_1", "ln_2", "mlp")}

    def call(self, x: tf.Tensor, cache: LayerCache | None = None, training: bool | None = None) -> tf.Tensor:
        """Adds attention's and the MLP's contributions to ``x``."""
        x = tf.cast(x, self.compute_dtype)
        x = x + self.attn(self.ln_1(x), cache=cache, training=training)
        return x + self.mlp(self.ln_2(x), training=training)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        names = ("n_embd", "n_head", "dropout", "quantization", "n_inner", "activation", "layer_norm_epsilon")
        arguments = {name: getattr(self, name) for name in (*names, "score_divisor")}
        return {**super().get_config(), **arguments}
