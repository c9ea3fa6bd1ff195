"""``feature_model``: hidden states and attention weights of a GPT-2, as a functional ``keras.Model``."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.layers import Block
from tf_gpt2.model.param_tree import MatrixLeaf, add_matrix, normal


@keras.saving.register_keras_serializable("tf_gpt2")
class Embedding(keras.layers.Layer):
    """Adds token and position embeddings.

    Args:
        n_vocab: V.
        n_ctx: longest sequence.
        n_embd: C.
        quantization: ``"int8"`` keeps the token embedding as 8-bit integers.

    Call arguments:
        ids: integers (B, T) -> (B, T, C) in the compute dtype.
    """

    def __init__(self, n_vocab: int, n_ctx: int, n_embd: int, quantization: str | None = None, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.n_vocab, self.n_ctx, self.n_embd, self.quantization = n_vocab, n_ctx, n_embd, quantization

    @classmethod
    def of(cls, model: GPT2Model) -> Embedding:
        """Makes the layer with a model's own variables, not copies."""
        sizes = (model.config.n_vocab, model.config.n_ctx, model.config.n_embd)
        quantization = None if model.wte_scale is None else "int8"  # the tables of a 4-bit model, too
        layer = cls(*sizes, quantization, dtype=model.dtype_policy, name="embd")
        layer.wte, layer.wte_scale, layer.wpe = model.wte, model.wte_scale, model.wpe
        layer.built = True
        return layer

    def build(self, input_shape: Any) -> None:
        """Creates both tables."""
        shape = (self.n_vocab, self.n_embd)
        self.wte, self.wte_scale = add_matrix(self, "wte", shape, stddev=0.02, quantization=self.quantization)
        self.wpe = self.add_weight(
            shape=(self.n_ctx, self.n_embd), initializer=normal(0.01), autocast=False, name="wpe"
        )

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        """Looks up rows of both tables."""
        weights = {"wte": MatrixLeaf(self.wte, n_in=self.n_embd, scale=self.wte_scale).base(), "wpe": self.wpe.value}
        positions = tf.range(shape_of(ids)[1])[None]  # (1, T)
        return formulas.embed(tf.cast(ids, tf.int32), positions, weights, dtype=self.compute_dtype, ops=plain)

    def compute_output_spec(self, ids: Any) -> keras.KerasTensor:
        """Describes the embeddings of symbolic ids."""
        return keras.KerasTensor((*ids.shape, self.n_embd), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        arguments = {name: getattr(self, name) for name in ("n_vocab", "n_ctx", "n_embd", "quantization")}
        return {**super().get_config(), **arguments}


@keras.saving.register_keras_serializable("tf_gpt2")
class AttentionWeights(keras.layers.Layer):
    """Computes how much each position of a block looks at each other one.

    Args:
        block: the block, whose variables it reads.

    Call arguments:
        x: floats (B, T, C), the input of the block -> float32 (B, H, T, S), each row of sum 1.
    """

    def __init__(self, block: Block, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.block = block

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Computes queries, keys and their softmax, as the block itself does."""
        attn, n_positions = self.block.attn, shape_of(x)[1]
        qkv = attn.c_attn(self.block.ln_1(x))  # (B, T, 3C)
        q, k, _ = (formulas.split_heads(part, attn.n_head, plain) for part in tf.split(qkv, 3, axis=-1))  # (N, T, D)
        q = q / tf.cast(attn.score_divisor, q.dtype)
        weights = plain.attention_weights(q, k, formulas.causal_mask(n_positions))  # (N, T, S)
        return tf.reshape(weights, (-1, attn.n_head, n_positions, n_positions))

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        """Describes the weights of symbolic hidden states."""
        return keras.KerasTensor((x.shape[0], self.block.n_head, x.shape[1], x.shape[1]), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's argument."""
        return {**super().get_config(), "block": keras.saving.serialize_keras_object(self.block)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AttentionWeights:
        """Makes the layer from the dict of ``get_config``."""
        return cls(**{**config, "block": keras.saving.deserialize_keras_object(config["block"])})


def feature_model(model: GPT2Model, *, attentions: bool = False) -> keras.Model:
    """Makes a functional model from ids to hidden states; it has the model's own layers and weights.

    Args:
        model: the model.
        attentions: whether to add each block's attention weights.

    Returns:
        A model from integers (B, T) to a dict: ``"embd"``, ``"h0"``, ``"h1"``, … and ``"ln_f"``, floats (B, T, C): the
        embeddings, what leaves each block, and what the logits are computed from; with ``attentions`` also
        ``"attn0"``, …, float32 (B, H, T, S). Hugging Face's ``hidden_states`` are these in this order, without what
        leaves the last block.

    Example:
        >>> from tf_gpt2 import GPT2Config
        >>> model = GPT2Model(GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=2))
        >>> sorted(feature_model(model, attentions=True).output)
        ['attn0', 'attn1', 'embd', 'h0', 'h1', 'ln_f']
    """
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = Embedding.of(model)(ids)
    features = {"embd": x}
    x = model.embd_dropout(x)
    for i, block in enumerate(model.blocks):
        if attentions:
            features[f"attn{i}"] = AttentionWeights(block, dtype=block.dtype_policy, name=f"attn{i}")(x)
        features[f"h{i}"] = x = block(x)
    features["ln_f"] = model.ln_f(x)
    return keras.Model(ids, features, name="features")
