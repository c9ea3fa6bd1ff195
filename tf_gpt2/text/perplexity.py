"""How well does a model predict a text? Perplexity per token and per word, bits per byte, and how they were measured.

Such figures mean nothing without the protocol, so ``Perplexity`` carries it: a sliding window, as in Hugging Face's
"Perplexity of fixed-length models", and sums over exactly the tokens that were scored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.options import check_stride
from tf_gpt2.generation.scoring import Progress, sliding_logprobs
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.text.options import check_text
from tf_gpt2.tokenizer.encoder import Encoder

LARGEST_EXPONENT = 709.0
"""Beyond it, exp is more than a float holds."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A text's negative log-likelihood, what it is divided by, and the protocol.

    The text's first token is not scored: nothing is before it. Words and bytes count all of the text all the same.

    Attributes:
        n_tokens: of the whole text.
        n_scored: tokens that were scored: all but the first; with ``stride == window``, all but the first of each
            window.
        n_words: what white space separates.
        n_bytes: of UTF-8.
        nll: negative log-likelihood of the scored tokens together, in nats.
        window: tokens that the model sees at once, ``n_ctx``.
        stride: by how many tokens the window moves on.
    """

    n_tokens: int
    n_scored: int
    n_words: int
    n_bytes: int
    nll: float
    window: int
    stride: int

    @property
    def per_token(self) -> float:
        """Perplexity per scored token."""
        return exp_of_ratio(self.nll, self.n_scored)

    @property
    def per_word(self) -> float:
        """Perplexity per word; NaN where there is none."""
        return exp_of_ratio(self.nll, self.n_words)

    @property
    def bits_per_byte(self) -> float:
        """Bits that an ideal code built on the model spends per byte; 8 is that of a model that knows nothing."""
        return self.nll / math.log(2) / self.n_bytes


def exp_of_ratio(nll: float, n: int) -> float:
    """Computes ``exp(nll / n)``; NaN for none, infinity for more than a float holds."""
    if n == 0:
        return math.nan
    return math.exp(nll / n) if nll / n < LARGEST_EXPONENT else math.inf


def measure_perplexity(
    model: GPT2Model,
    encoder: Encoder,
    text: str,
    *,
    stride: int | None = None,
    jit_compile: bool = True,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Scores a text; arguments and errors as for ``TextGenerator.perplexity``."""
    stride = default_stride(model.config) if stride is None else check_stride(stride, model.config)
    ids = encoder.encode(check_text("text", text))
    logprobs = sliding_logprobs(model, ids, stride=stride, jit_compile=jit_compile, on_progress=on_progress)
    return make_perplexity(encoder, text, ids, logprobs, window=model.config.n_ctx, stride=stride)


def default_stride(config: GPT2Config) -> int:
    """Returns by how many tokens the window moves on where nobody says: half of it."""
    return max(1, config.n_ctx // 2)


def make_perplexity(
    encoder: Encoder, text: str, ids: Sequence[int], logprobs: np.ndarray, *, window: int, stride: int
) -> Perplexity:
    """Makes the figures of a text from the log-probabilities of its scored tokens."""
    return Perplexity(
        n_tokens=len(ids),
        n_scored=len(logprobs),
        n_words=len(text.split()),
        n_bytes=len(encoder.decode_bytes(ids)),
        nll=-math.fsum(logprobs),
        window=window,
        stride=stride,
    )
