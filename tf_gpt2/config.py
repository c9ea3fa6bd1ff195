"""The hyperparameters of a GPT-2: frozen, validated, read from OpenAI's ``hparams.json``.

Knows nothing of TensorFlow, of weights or of any other file.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tf_gpt2.errors import CheckpointError

LAYER_NORM_EPS = 1e-5
"""Added to the variance in every layer norm. Source: openai/gpt-2, ``src/model.py``, ``norm``."""


MOST: Mapping[str, int] = MappingProxyType(
    {"n_vocab": 1 << 24, "n_ctx": 1 << 24, "n_embd": 1 << 20, "n_layer": 1000, "n_inner": 1 << 22}
)
"""Upper bounds, far above any GPT-2: a file with a billion layers is damaged, and building the model would not end."""

MOST_PARAMS = 1 << 40
"""Upper bound of a model's parameters: 4 TiB of float32."""

MOST_HPARAMS_BYTES = 1 << 20
"""Upper bound of the file's length; OpenAI's has about 90 bytes."""


ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in ("gelu_new", "gelu", "relu", "silu", "tanh")},
        **dict.fromkeys(("gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu_new"),
        "gelu_python": "gelu",
        "swish": "silu",
    }
)
"""Hugging Face's name of an activation -> ours: several names mean the same function. Source: transformers 5,
``activations.py``."""

ORIGINAL = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
"""OpenAI's hyperparameters, in their order; ``hparams.json`` has just these for a model of OpenAI's architecture."""

WITHOUT_EFFECT = frozenset({"precision", "dtype", "embd_dropout", "attn_dropout", "res_dropout"})
"""Keys that programs for training add to ``hparams.json``, and that change no logit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Hyperparameters: OpenAI's five, and what others vary, under Hugging Face's names.

    Attributes:
        n_vocab: number of tokens, V.
        n_ctx: longest sequence in tokens.
        n_embd: width of the residual stream, C.
        n_head: attention heads per block, H; must divide ``n_embd``.
        n_layer: number of blocks, L.
        n_inner: width inside the MLP, F; ``None`` means 4 C, and 4 C becomes ``None``.
        activation: of the MLP: ``"gelu_new"`` (the tanh form), ``"gelu"`` (exact), ``"relu"``, ``"silu"``, ``"tanh"``,
            or another name in ``ACTIVATIONS``, which becomes one of these.
        layer_norm_epsilon: added to the variance in every layer norm.
        scale_attn_weights: whether attention's scores are divided by the square root of the head's width.
        scale_attn_by_inverse_layer_idx: whether they are also divided by the block's number, counted from 1.
        tie_word_embeddings: whether the head is the token embedding; otherwise it is a matrix of its own, ``lm_head``.

    Raises:
        TypeError: when a value is of another type.
        ValueError: when a value is below 1 or above ``MOST``, ``n_head`` does not divide ``n_embd``, or the activation
            is unknown.

    Example:
        >>> GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12).n_params
        124439808
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int
    n_inner: int | None = None
    activation: str = "gelu_new"
    layer_norm_epsilon: float = LAYER_NORM_EPS
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ORIGINAL:
            check_count(name, getattr(self, name))
        if self.n_inner is not None:
            check_count("n_inner", self.n_inner)
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {reprlib.repr(getattr(self, name))}")
        # equal models get equal configs
        if self.n_inner == 4 * self.n_embd:
            object.__setattr__(self, "n_inner", None)
        object.__setattr__(self, "activation", known_activation(self.activation))
        object.__setattr__(self, "layer_norm_epsilon", checked_epsilon(self.layer_norm_epsilon))
        self._check_together()

    def _check_together(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head must divide n_embd, got n_head={shown(self.n_head)} and n_embd={self.n_embd}; "
                f"GPT-2 uses heads of width 64"
            )
        if self.n_params > MOST_PARAMS:
            raise ValueError(
                f"n_embd={self.n_embd} with n_layer={self.n_layer} and n_vocab={self.n_vocab} makes {self.n_params} "
                f"parameters, must be at most {MOST_PARAMS}"
            )

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> GPT2Config:
        """Makes a config from the dict in ``hparams.json``.

        Raises:
            TypeError: when ``hparams`` is not a dict, or a hyperparameter is of another type.
            ValueError: when a hyperparameter is missing, unknown or out of range.
        """
        if not isinstance(hparams, Mapping):
            raise TypeError(
                f"hparams must be the dict in hparams.json, got {reprlib.repr(hparams)}; from_file reads one"
            )
        missing = [name for name in ORIGINAL if name not in hparams]
        if missing:
            raise ValueError(f"hparams lacks {', '.join(missing)}; it needs {', '.join(ORIGINAL)}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name)[:40] for name in hparams if name not in names and name not in WITHOUT_EFFECT]
        if unknown:
            raise ValueError(
                f"hparams has {', '.join(unknown[:10])}, which may change what the model computes; known are "
                f"{', '.join(names)}"
            )
        return cls(**{name: hparams[name] for name in names if name in hparams})

    @classmethod
    def from_file(cls, path: str | Path) -> GPT2Config:
        """Reads ``hparams.json``.

        Raises:
            CheckpointError: when the file is missing, is not JSON, or does not describe a GPT-2.
        """
        return cls.from_hparams(read_hparams(path))

    def to_hparams(self) -> dict[str, Any]:
        """Returns the hyperparameters as a plain dict: OpenAI's five, in their order, and others that differ."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name in ORIGINAL or value != defaults[name]}

    @property
    def head_width(self) -> int:
        """Width of one attention head, D."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP, F."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def n_params(self) -> int:
        """Number of parameters; an output head that is the token embedding counts once."""
        c, f = self.n_embd, self.mlp_width
        per_block = 4 * c**2 + 2 * c * f + 9 * c + f
        n_tables = 1 if self.tie_word_embeddings else 2
        return (n_tables * self.n_vocab + self.n_ctx + 2) * c + self.n_layer * per_block

    def score_divisor(self, layer: int) -> float:
        """Returns what the queries of a block, counted from 0, are divided by, beside the usual sqrt(D)."""
        divisor = 1.0 if self.scale_attn_weights else self.head_width**-0.5
        return divisor * (layer + 1) if self.scale_attn_by_inverse_layer_idx else divisor


def check_count(name: str, value: object) -> None:
    """Raises unless a hyperparameter is an integer from 1 to ``MOST``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {reprlib.repr(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(value)}")
    if value > MOST.get(name, value):
        raise ValueError(f"{name} must be at most {MOST[name]}, got {shown(value)}")


def known_activation(name: object) -> str:
    """Returns our name of an activation; raises for an unknown one."""
    if not isinstance(name, str):
        raise TypeError(f"activation must be a str, got {reprlib.repr(name)}")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {reprlib.repr(name)}")
    return ACTIVATIONS[name]


def checked_epsilon(value: object) -> float:
    """Returns the epsilon of layer norms; raises unless it is a number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"layer_norm_epsilon must be a float, got {reprlib.repr(value)}")
    if not 0 < value < 1:
        raise ValueError(f"layer_norm_epsilon must lie between 0 and 1, got {reprlib.repr(value)}")
    return float(value)


def shown(value: int) -> str:
    """Returns an integer as messages show it: Python refuses to write one of more than 4,300 digits."""
    return str(value) if abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"


def read_hparams(path: str | Path) -> dict[str, Any]:
    """Reads ``hparams.json`` as a plain dict and checks that it describes a GPT-2.

    Raises:
        CheckpointError: when the file is missing, is not JSON, or does not describe a GPT-2.
    """
    try:
        hparams = json.loads(read_text(Path(path), MOST_HPARAMS_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; delete it and download the checkpoint again") from error
    try:
        GPT2Config.from_hparams(hparams)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a GPT-2: {error}") from error
    return hparams


def read_text(path: Path, most_bytes: int) -> str:
    """Reads a regular file of UTF-8 text, with a line feed at the end of each line.

    Args:
        path: the file.
        most_bytes: the length of the longest file to accept.

    Raises:
        OSError: when the file cannot be read, or is a pipe or a device.
        ValueError: when the file is longer, or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as file:
        body = file.read(most_bytes + 1)
    if len(body) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes} bytes")
    return body.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


SIZES: Mapping[str, GPT2Config] = MappingProxyType(
    {
        "124M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12),
        "355M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=1024, n_head=16, n_layer=24),
        "774M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=1280, n_head=20, n_layer=36),
        "1558M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48),
    }
)
"""The four released sizes. Source: the ``hparams.json`` of each, and Radford et al. 2019, table 2."""
