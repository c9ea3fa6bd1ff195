"""``GPT2Model``: token ids -> logits, as an ordinary ``keras.Model``.

Knows nothing of text or of sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_gpt2.checkpoint.formats import open_weights
from tf_gpt2.checkpoint.params import Tree, leaves
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError, ContextLengthError
from tf_gpt2.model import formulas, lora
from tf_gpt2.model.arithmetic import plain
from tf_gpt2.model.arithmetic.shapes import shape_of
from tf_gpt2.model.layers import Block, LayerNorm
from tf_gpt2.model.param_tree import Leaf, MatrixLeaf, ParamTree, add_matrix, blank_weights, freeze, normal
from tf_gpt2.runtime import prepare_process


@keras.saving.register_keras_serializable("tf_gpt2")
class GPT2Model(ParamTree, keras.Model):
    """GPT-2, from token ids to the logits of the next token at each position.

    Args:
        config: the hyperparameters.
        dropout: rate after the embeddings and inside the blocks, active in training only; 0.1 in the paper.
        quantization: ``"int8"`` keeps the matrices as 8-bit integers with a scale per output, ``"int4"`` those of the
            blocks as 4-bit integers with a scale per output and 32 inputs, for inference only; ``set_weights`` then
            rounds the given weights, and ``get_params`` returns the rounded values.
        dtype: a Keras dtype policy: ``"float32"``, ``"bfloat16"``, ``"mixed_bfloat16"``. Each computes layer norm and
            softmax in float32; the logits are rounded to the compute dtype, and returned as float32.

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
        self.lora: lora.Lora | None = None
        self.blocks = [self._make_block(i) for i in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype=self.dtype_policy, name="ln_f")
        self.embd_dropout = keras.layers.Dropout(dropout, dtype=self.dtype_policy)
        self.build((None, None))

    def _make_block(self, layer: int) -> Block:
        config = self.config
        return Block(
            config.n_embd,
            config.n_head,
            self.dropout,
            self.quantization,
            n_inner=config.n_inner,
            activation=config.activation,
            layer_norm_epsilon=config.layer_norm_epsilon,
            score_divisor=config.score_divisor(layer),
            dtype=self.dtype_policy,
            name=f"h{layer}",
        )

    def build(self, input_shape: Any) -> None:
        """Creates all weights; their shapes follow from the config alone."""
        config = self.config
        shape = (config.n_vocab, config.n_embd)
        # rows of the token embedding are looked up, too, and 8 bits hold them; nobody has measured 4 bits there
        quantization = "int8" if self.quantization == "int4" else self.quantization
        # TensorFlow keeps 35 kB for ever for each new name of a variable, and Keras's names number the models
        with tf.name_scope("gpt2/"):
            self.wte, self.wte_scale = add_matrix(self, "wte", shape, stddev=0.02, quantization=quantization)
            self.wpe = self.add_weight(
                shape=(config.n_ctx, config.n_embd), initializer=normal(0.01), autocast=False, name="wpe"
            )
            if not config.tie_word_embeddings:
                self.lm_head, self.lm_head_scale = add_matrix(
                    self, "lm_head", shape, stddev=0.02, quantization=quantization
                )
            for layer in (*self.blocks, self.ln_f):
                layer.build((None, None, config.n_embd))

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        """Returns what ``tf.train.Checkpoint`` saves, the blocks among it: it does not look into Keras's lists.

        Test: ``tests/model/test_keras.py``, ``test_a_training_checkpoint_has_every_variable``.
        """
        blocks = {f"h{i}": block for i, block in enumerate(self.blocks)}
        return {**super()._trackable_children(save_type, **kwargs), **blocks}

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **kwargs: Any) -> GPT2Model:
        """Makes a model from a folder or file in any known format, one variable at a time to keep the memory low.

        Args:
            folder: holds OpenAI's or Hugging Face's files, or is or holds a file of Keras or of GGUF.
            **kwargs: as for the constructor.

        Raises:
            CheckpointError: when the folder is not a complete GPT-2 checkpoint, or holds NaN or infinity.
        """
        config, variables = open_weights(folder)
        with blank_weights():
            model = cls(config, **kwargs)
        targets = dict(leaves(model.leaf_tree()))
        for path, array in variables:
            targets[path].write(array)
            if not targets[path].is_finite():
                raise CheckpointError(
                    f"{folder} holds NaN or infinity in {path}: its training has failed, or the file is damaged; "
                    f"load_encoder_hparams_and_params reads it as it is"
                )
        return model

    def leaf_tree(self) -> Tree:
        """Returns the whole tree, ``{"blocks", "ln_f", "wpe", "wte"}``, and ``"lm_head"`` where there is one."""
        head = {} if self.config.tie_word_embeddings else {"lm_head": self._head_leaf()}
        return {
            "blocks": [block.leaf_tree() for block in self.blocks],
            **head,
            "ln_f": self.ln_f.leaf_tree(),
            "wpe": Leaf(self.wpe),
            "wte": self._wte_leaf(),
        }

    def _wte_leaf(self) -> MatrixLeaf:
        return MatrixLeaf(self.wte, self.config.n_embd, scale=self.wte_scale)

    def _head_leaf(self) -> MatrixLeaf:
        if self.config.tie_word_embeddings:
            return self._wte_leaf()
        return MatrixLeaf(self.lm_head, self.config.n_embd, scale=self.lm_head_scale)

    def call(self, ids: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes logits at every position, float32 (B, T, V)."""
        if is_mean_of_replicas(ids):
            ids = tf.cast(ids, tf.int32)
        check_ids(ids, self.config)
        if training and self.quantization and self.lora is None:
            raise ValueError(
                f"quantization={self.quantization!r} is for inference only: its weights are integers; train a model "
                f"without, and quantize the weights that its get_params() returns; or call enable_lora, and train "
                f"that"
            )
        logits = self.logits(self.hidden_states(ids, training=training))
        if not tf.is_symbolic_tensor(ids):
            return logits
        # Compiled code cannot raise and clamps bad ids; NaN logits are better than wrong ones.
        return logits * one_or_nan(ids, self.config)

    def enable_lora(
        self, rank: int = 8, alpha: float | None = None, targets: Sequence[str] = ("c_attn",), seed: int = 0
    ) -> None:
        """Freezes all weights, and adds ``alpha / rank * b @ a`` to each named matrix: ``a`` and ``b`` are trained.

        The model computes as before until they are: ``b`` starts with zeros. A compiled model must be compiled again.

        Args:
            rank: of the additions.
            alpha: their scale, times the rank; the rank by default.
            targets: matrices of each block: ``"c_attn"``, ``"c_fc"``, ``"c_proj"`` for both of that name, or one of
                them, as ``"mlp.c_proj"``.
            seed: of ``a``.

        Raises:
            ValueError: when LoRA is on already, a name is none of these, or a number is out of range.

        Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
        """
        lora.enable(self, rank=rank, alpha=alpha, targets=targets, seed=seed)

    def merge_lora(self) -> None:
        """Adds what ``enable_lora`` added, as trained since, to the matrices themselves; all weights train again.

        Raises:
            ValueError: when LoRA is not on, or the matrices are quantized, and cannot hold the sum.
        """
        lora.merge(self)

    def hidden_states(self, ids: tf.Tensor, *, training: bool | None = None) -> tf.Tensor:
        """Runs embeddings, blocks and the last layer norm; does not check the ids.

        Args:
            ids: integers (B, T).
            training: switches dropout on.

        Returns:
            Floats (B, T, C) in the compute dtype.
        """
        positions = tf.range(shape_of(ids)[1])[None]  # (1, T)
        x = self.token_embeddings(ids) + tf.cast(plain.gather(self.wpe, positions), self.compute_dtype)  # (B, T, C)
        x = self.embd_dropout(x, training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return self.ln_f(x)

    def token_embeddings(self, ids: tf.Tensor) -> tf.Tensor:
        """Looks up rows of ``wte``: integers (B, T) -> (B, T, C) in the compute dtype."""
        ids = tf.cast(ids, tf.int32)
        return formulas.embed_tokens(ids, self._wte_leaf().base(), dtype=self.compute_dtype, ops=plain)

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """Multiplies by the token embedding, or a head of its own: floats (..., C) -> float32 (..., V)."""
        return formulas.logits(hidden, self._head_leaf().base(), ops=plain)

    @property
    def input_dtype(self) -> str:
        """The dtype to which Keras converts inputs, and in which it exports them: that of ids, whatever the policy."""
        return "int32"

    def export(self, filepath: str | Path, *args: Any, input_signature: Any = None, **kwargs: Any) -> None:
        """Writes a SavedModel from ids to logits, as ``keras.Model.export`` does; the model need not have been called.

        Args:
            filepath: the folder to write.
            *args: as in Keras.
            input_signature: by default int32 (B, T) of any B and T.
            **kwargs: as in Keras.
        """
        ids = keras.InputSpec(shape=(None, None), dtype="int32", name="ids")
        super().export(filepath, *args, input_signature=input_signature or [ids], **kwargs)

    def quantize(self, mode: Any = None, *args: Any, **kwargs: Any) -> None:
        """Raises in any case: the weights of an existing model can be quantized only into another model.

        Raises:
            NotImplementedError: in any case; the message says how to make the other model.
        """
        raise NotImplementedError(
            f"mode={mode!r}: a GPT2Model is quantized when it is made, small = GPT2Model(model.config, "
            f"quantization='int8' or 'int4'), and takes the weights with small.set_weights(model.get_params())"
        )

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns the input's shape with the axis V appended."""
        return (*input_shape, self.config.n_vocab)

    def compute_output_spec(self, ids: Any, training: bool | None = None) -> keras.KerasTensor:
        """Describes the logits of a symbolic call: float32 whatever the policy."""
        check_ids(ids, self.config)
        return keras.KerasTensor(self.compute_output_shape(ids.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, the config as a plain dict."""
        arguments = {"config": self.config.to_hparams(), "dropout": self.dropout, "quantization": self.quantization}
        of_lora = {} if self.lora is None else {"lora": dataclasses.asdict(lora.described(self))}
        return {**super().get_config(), **arguments, **of_lora}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> GPT2Model:
        """Makes a model from the dict of ``get_config``; frozen layers and variables stay frozen."""
        arguments = {**config, "config": GPT2Config.from_hparams(config["config"])}
        frozen, of_lora = arguments.pop("frozen", None), arguments.pop("lora", None)
        model = cls(**arguments)
        if of_lora:
            model.enable_lora(**of_lora)
        if frozen:
            freeze(model, frozen)
        return model


def one_or_nan(ids: tf.Tensor, config: GPT2Config) -> tf.Tensor:
    """Returns 1 for rows of valid ids, NaN for others: integers (B, T) -> float32 (B, 1, 1).

    Computes NaN only in rows that get it, so that ``tf.debugging.enable_check_numerics`` reports nothing on valid ids.
    """
    wide = tf.cast(ids, tf.int64)  # in the ids' own dtype n_vocab may wrap around, as 256 does to 0 in uint8
    is_valid = (wide >= 0) & (wide < config.n_vocab) & (tf.shape(ids)[1] <= config.n_ctx)  # (B, T)
    is_valid = tf.reduce_all(is_valid, axis=-1)[:, None, None]  # (B, 1, 1)
    return tf.sqrt(tf.where(is_valid, 1.0, -1.0))


def is_mean_of_replicas(ids: tf.Tensor) -> bool:
    """Whether ids are the mean of several replicas' batches, from which Keras's ``fit`` infers shapes first."""
    is_whole = tf.distribute.in_cross_replica_context() and tf.distribute.get_strategy().num_replicas_in_sync > 1
    return is_whole and ids.dtype in (tf.float32, tf.float64)


def check_ids(ids: tf.Tensor, config: GPT2Config) -> None:
    """Raises on ids that compiled code would silently clamp: of wrong rank or length, or outside the vocabulary.

    The values are checked only on eager calls: a tensor inside a graph has none yet.

    Raises:
        ContextLengthError: when the sequence is longer than ``n_ctx``.
        ValueError: in all other cases.
    """
    if len(ids.shape) != 2:
        raise ValueError(f"ids must have shape (B, T), got {tuple(ids.shape)}; wrap one sequence as [ids]")
    if 0 in tuple(ids.shape):
        raise ValueError(f"ids must not be empty, got shape {tuple(ids.shape)}; start from <|endoftext|> if need be")
    if ids.shape[1] is not None and ids.shape[1] > config.n_ctx:
        raise ContextLengthError(f"ids are {ids.shape[1]} long, the window is n_ctx={config.n_ctx}; cut the sequence")
    if not keras.backend.is_int_dtype(ids.dtype):
        raise ValueError(
            f"ids must be integers, got {keras.backend.standardize_dtype(ids.dtype)}; "
            f"a functional or Sequential model begins with keras.Input((None,), dtype='int32')"
        )
    if isinstance(ids, tf.Tensor) and not tf.is_symbolic_tensor(ids):
        values = np.asarray(ids)
        if values.min() < 0 or values.max() >= config.n_vocab:
            raise ValueError(
                f"ids must lie in [0, {config.n_vocab}), got {values.min()} to {values.max()}; "
                f"is this the vocabulary of the checkpoint?"
            )
