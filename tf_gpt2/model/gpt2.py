"""``GPT2Model``: token ids -> logits, as an ordinary ``keras.Model``.

Knows nothing of text or of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gpt2.checkpoint.openai import iter_variables
from tf_gpt2.checkpoint.params import Tree, leaves
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.model.alike import are_alike, call_alike, hold_tensors
from tf_gpt2.model.layers import Block, LayerCache, LayerNorm
from tf_gpt2.model.loops import value_in_loop
from tf_gpt2.model.param_tree import Leaf, ParamTree, add_matrix, blank_weights, normal, value_of
from tf_gpt2.model.products import product, shape_of
from tf_gpt2.runtime import prepare_process


@keras.saving.register_keras_serializable("tf_gpt2")
class GPT2Model(ParamTree, keras.Model):
    """GPT-2, from token ids to the logits of the next token at each position.

    Args:
        config: the hyperparameters.
        dropout: rate after the embeddings and inside the blocks, active in training only; 0.1 in the paper.
        quantization: ``"int8"`` keeps the matrices as 8-bit integers with a scale per output, for inference only;
            ``set_weights`` then rounds what it is given, and ``get_params`` gives the rounded values.
        dtype: a Keras dtype policy: ``"float32"``, ``"bfloat16"``, ``"mixed_bfloat16"``. Layer norm and softmax
            are float32 in each; logits are given as float32, and rounded to the compute dtype before.

    Call arguments:
        ids: integers (B, T), 1 <= T <= n_ctx, each in [0, n_vocab) -> logits, float32 (B, T, n_vocab).

    Raises:
        ContextLengthError: when T exceeds ``n_ctx``.
        ValueError: when ids are empty, not (B, T), or outside the vocabulary (checked on eager calls); when a quantized
            model is trained.

    Example:
        >>> import numpy as np
        >>> config = GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> GPT2Model(config)(np.array([[1, 2, 3]])).shape
        TensorShape([1, 3, 300])
    """

    def __init__(self, config: GPT2Config, dropout: float = 0.0, quantization: str | None = None, **kwargs: Any):
        if not isinstance(config, GPT2Config):
            raise TypeError(f"config must be a GPT2Config, got {config!r}; make one with GPT2Config.from_hparams")
        prepare_process()  # before the first variable
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.dropout = dropout
        self.quantization = quantization
        c = config.n_embd
        self.blocks = [
            Block(c, config.n_head, dropout, quantization, dtype=self.dtype_policy, name=f"h{i}")
            for i in range(config.n_layer)
        ]
        self.ln_f = LayerNorm(c, dtype=self.dtype_policy, name="ln_f")
        self.embd_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates all weights; their shapes follow from the config alone."""
        config = self.config
        shape = (config.n_vocab, config.n_embd)
        self.wte, self.wte_scale = add_matrix(self, "wte", shape, stddev=0.02, quantization=self.quantization)
        self.wpe = self.add_weight(
            shape=(config.n_ctx, config.n_embd), initializer=normal(0.01), autocast=False, name="wpe"
        )
        for layer in (*self.blocks, self.ln_f):
            layer.build((None, None, config.n_embd))

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **kwargs: Any) -> GPT2Model:
        """Makes a model from a folder with OpenAI's files, one variable at a time to keep the memory low.

        Args:
            folder: holds ``hparams.json`` and the TensorFlow checkpoint.
            **kwargs: as for the constructor.

        Raises:
            CheckpointError: when the folder is not a complete GPT-2 checkpoint.
        """
        config = GPT2Config.from_file(Path(folder) / "hparams.json")
        with blank_weights():
            model = cls(config, **kwargs)
        targets = dict(leaves(model.leaf_tree()))
        for path, array in iter_variables(folder, config):
            targets[path].write(array)
        return model

    def leaf_tree(self) -> Tree:
        """Gives the whole tree, ``{"blocks", "ln_f", "wpe", "wte"}``."""
        return {
            "blocks": [block.leaf_tree() for block in self.blocks],
            "ln_f": self.ln_f.leaf_tree(),
            "wpe": Leaf(self.wpe),
            "wte": Leaf(self.wte, scale=self.wte_scale),
        }

    def call(self, ids: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes logits at every position, float32 (B, T, V)."""
        check_ids(ids, self.config)
        if training and self.quantization:
            raise ValueError(
                f"quantization={self.quantization!r} is for inference only: its weights are integers; train a model "
                f"without, and quantize what get_params() gives"
            )
        logits = self.logits(self.hidden_states(ids, training=training))
        if not tf.is_symbolic_tensor(ids):
            return logits
        # Compiled code can raise nothing, and clamps what lies outside: no number is better than a wrong one.
        is_valid = (ids >= 0) & (ids < self.config.n_vocab) & (tf.shape(ids)[1] <= self.config.n_ctx)  # (B, T)
        return tf.where(tf.reduce_all(is_valid, axis=-1)[:, None, None], logits, float("nan"))

    def hidden_states(
        self,
        ids: tf.Tensor,
        *,
        positions: tf.Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        training: bool | None = None,
    ) -> tf.Tensor:
        """Runs embeddings, blocks and the last layer norm; does not check the ids.

        Args:
            ids: integers (B, T); with positions and a cache also (B,), one of each row.
            positions: integers of the same shape, the place of each id in its sequence; 0, 1, … by default.
            cache: one ``LayerCache`` per block, or ``None``.
            training: switches dropout on.

        Returns:
            Floats (B, T, C), or (B, C), in the compute dtype.
        """
        if positions is None:
            positions = tf.range(shape_of(ids)[1])[None]  # (1, T)
        # gather, not a slice: a slice would compile anew for each position
        look_up = tf.gather if cache is None else gather_bits
        x = self.token_embeddings(ids, look_up)  # (B, T, C)
        x = x + tf.cast(look_up(read(self.wpe), positions), self.compute_dtype)
        x = self.embd_dropout(x, training=training)
        if cache is not None and not tf.executing_eagerly() and are_alike(self.blocks) and hold_tensors(cache):
            return self.ln_f(call_alike(self.blocks, x, cache))
        for i, block in enumerate(self.blocks):
            x = block(x, cache=None if cache is None else cache[i], training=training)
        return self.ln_f(x)

    def token_embeddings(self, ids: tf.Tensor, look_up: Any = tf.gather) -> tf.Tensor:
        """Looks up rows of ``wte``: integers (B, T) -> (B, T, C) in the compute dtype."""
        ids = tf.cast(ids, tf.int32)
        rows = look_up(read(self.wte), ids)  # (B, T, C)
        if self.wte_scale is not None:
            rows = tf.cast(rows, tf.float32) * tf.gather(read(self.wte_scale), ids)[..., None]
        return tf.cast(rows, self.compute_dtype)

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """Multiplies by the token embedding: floats (..., C) -> float32 (..., V)."""
        return tf.cast(product(hidden, self.wte.value, value_of(self.wte_scale)), tf.float32)

    @property
    def input_dtype(self) -> str:
        """What Keras converts and exports inputs as: ids, whatever the policy."""
        return "int32"

    def export(self, filepath: str | Path, *args: Any, input_signature: Any = None, **kwargs: Any) -> None:
        """Writes a SavedModel from ids to logits, as ``keras.Model.export``, also of a model never called.

        Args:
            filepath: the folder to write.
            *args: as in Keras.
            input_signature: int32 (B, T) of any B and T by default.
            **kwargs: as in Keras.
        """
        ids = keras.InputSpec(shape=(None, None), dtype="int32", name="ids")
        super().export(filepath, *args, input_signature=input_signature or [ids], **kwargs)

    def quantize(self, mode: Any = None, *args: Any, **kwargs: Any) -> None:
        """Refuses: the weights of a model that is made can be quantized only into another one.

        Raises:
            NotImplementedError: in any case; says how.
        """
        raise NotImplementedError(
            f"mode={mode!r}: a GPT2Model is quantized when it is made, small = GPT2Model(model.config, "
            f"quantization='int8'), and takes the weights with small.set_weights(model.get_params())"
        )

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Appends the vocabulary."""
        return (*input_shape, self.config.n_vocab)

    def compute_output_spec(self, ids: Any, training: bool | None = None) -> keras.KerasTensor:
        """Describes the logits of a symbolic call: float32 whatever the policy."""
        check_ids(ids, self.config)
        return keras.KerasTensor(self.compute_output_shape(ids.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """Gives the constructor's arguments, the config as a plain dict."""
        own = {"config": self.config.to_hparams(), "dropout": self.dropout, "quantization": self.quantization}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GPT2Model:
        """Makes a model from what ``get_config`` gave."""
        return cls(**{**config, "config": GPT2Config.from_hparams(config["config"])})


def read(variable: keras.Variable) -> tf.Tensor:
    """Gives what a variable holds; once rows are gathered from the variable itself, each later read is a copy."""
    return value_in_loop(variable.value)


def gather_bits(table: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Gathers as ``tf.gather``, without a gradient; XLA makes a float32 copy of a bfloat16 table that is no bits."""
    if table.dtype != tf.bfloat16:
        return tf.gather(table, rows)
    return tf.bitcast(tf.gather(tf.bitcast(table, tf.uint16), rows), tf.bfloat16)


def check_ids(ids: tf.Tensor, config: GPT2Config) -> None:
    """Refuses what compiled code would silently clamp: wrong rank or length, ids outside the vocabulary.

    The values are checked only where they exist: a tensor inside a graph has none.

    Raises:
        ContextLengthError: when the sequence is longer than ``n_ctx``.
        ValueError: for all else.
    """
    if len(ids.shape) != 2:
        raise ValueError(f"ids must have shape (B, T), got {tuple(ids.shape)}; wrap one sequence as [ids]")
    if 0 in tuple(ids.shape):
        raise ValueError(f"ids must not be empty, got shape {tuple(ids.shape)}; start from <|endoftext|> if need be")
    if ids.shape[1] is not None and ids.shape[1] > config.n_ctx:
        raise ContextLengthError(f"ids are {ids.shape[1]} long, the window is n_ctx={config.n_ctx}; cut the sequence")
    if not keras.backend.is_int_dtype(ids.dtype):
        raise ValueError(
            f"ids must be integers, got {keras.backend.standardize_dtype(ids.dtype)}; keras.Input wants dtype='int32'"
        )
    if isinstance(ids, tf.Tensor) and not tf.is_symbolic_tensor(ids):
        values = np.asarray(ids)
        if values.min() < 0 or values.max() >= config.n_vocab:
            raise ValueError(
                f"ids must lie in [0, {config.n_vocab}), got {values.min()} to {values.max()}; "
                f"is this the vocabulary of the checkpoint?"
            )
