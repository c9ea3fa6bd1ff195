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


MOST: Mapping[str, int] = MappingProxyType({"n_vocab": 1 << 24, "n_ctx": 1 << 24, "n_embd": 1 << 20, "n_layer": 1000})
"""Upper bounds, far above any GPT-2: a file with a billion layers is damaged, and building the model would not end."""

MOST_PARAMS = 1 << 40
"""Upper bound of a model's parameters: 4 TiB of float32."""

MOST_HPARAMS_BYTES = 1 << 20
"""Upper bound of the file's length; OpenAI's has about 90 bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Hyperparameters under OpenAI's names.

    Attributes:
        n_vocab: number of tokens, V.
        n_ctx: longest sequence in tokens.
        n_embd: width of the residual stream, C.
        n_head: attention heads per block, H; must divide ``n_embd``.
        n_layer: number of blocks, L.

    Raises:
        TypeError: when a value is not an integer.
        ValueError: when a value is below 1 or above ``MOST``, or ``n_head`` does not divide ``n_embd``.

    Example:
        >>> GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12).n_params
        124439808
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field.name} must be an int, got {reprlib.repr(value)}")
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {shown(value)}")
            if value > MOST.get(field.name, value):
                raise ValueError(f"{field.name} must be at most {MOST[field.name]}, got {shown(value)}")
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
        """Makes a config from the dict in ``hparams.json``; keys that GPT-2 does not know are ignored.

        Raises:
            TypeError: when ``hparams`` is not a dict, or a hyperparameter is not an integer.
            ValueError: when a hyperparameter is missing or out of range.
        """
        if not isinstance(hparams, Mapping):
            raise TypeError(
                f"hparams must be the dict in hparams.json, got {reprlib.repr(hparams)}; from_file reads one"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in hparams]
        if missing:
            raise ValueError(f"hparams lacks {', '.join(missing)}; it needs {', '.join(names)}")
        return cls(**{name: hparams[name] for name in names})

    @classmethod
    def from_file(cls, path: str | Path) -> GPT2Config:
        """Reads ``hparams.json``.

        Raises:
            CheckpointError: when the file is missing, is not JSON, or does not describe a GPT-2.
        """
        return cls.from_hparams(read_hparams(path))

    def to_hparams(self) -> dict[str, int]:
        """Returns the hyperparameters as a plain dict, in OpenAI's order of keys."""
        return dataclasses.asdict(self)

    @property
    def head_width(self) -> int:
        """Width of one attention head, D."""
        return self.n_embd // self.n_head

    @property
    def n_params(self) -> int:
        """Number of parameters; the output head is the token embedding and counts once."""
        per_block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (self.n_vocab + self.n_ctx + 2) * self.n_embd + self.n_layer * per_block


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
