"""Computes the numbers of an explanation: each token's probability and rank, likelier tokens, every head's attention.

Knows nothing of HTML or of images.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import unicodedata

import numpy as np
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.model.attention_maps import logits_and_attention
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.text.options import check_text
from tf_gpt2.tokenizer.encoder import Encoder

MAX_TOKENS = 256
"""Most tokens of a text: attention grows with their square, and a larger picture is hard to read."""

N_ALTERNATIVES = 5

PALETTE = ("#f5a873", "#fbd9b6", "#f3f1ec", "#cfe0f1", "#97c1e8")
"""From improbable to probable: distinct for the colour-blind, too, and light enough for black text."""

LEAST_PROBABILITY = 1e-4
"""The probability at the palette's first colour; the scale is logarithmic and ends at 1."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that the model might have chosen.

    Attributes:
        label: its text, as ``visible`` shows it.
        id: its id.
        probability: given the tokens before.
    """

    label: str
    id: int
    probability: float


@dataclasses.dataclass(frozen=True)
class ExplainedToken:
    """A token of the text.

    Attributes:
        label: its text, as ``visible`` shows it.
        id: its id.
        probability: given the tokens before; None for the first of all.
        rank: its place among all tokens, 1 for the likeliest, of equal ones the lower id first; None for the first of
            all.
        likeliest: the likeliest tokens at its place, itself possibly among them.
    """

    label: str
    id: int
    probability: float | None
    rank: int | None
    likeliest: tuple[Candidate, ...]

    @property
    def colour(self) -> str:
        """The background for its probability; white for the first token, which has none."""
        return "#ffffff" if self.probability is None else colour_of(self.probability)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A text and the model's expectations at each token.

    Attributes:
        config: of the model.
        tokens: the T tokens; the first has no probability: it is ``<|endoftext|>``, or, in a vocabulary without that,
            the text's first.
        attention: float32 (L, H, T, S), how much each token looks at each.
    """

    config: GPT2Config
    tokens: list[ExplainedToken]
    attention: np.ndarray


def explain(generator: TextGenerator, text: str) -> Explanation:
    """Computes the model's expectations at each token of a text.

    Args:
        generator: model and vocabulary.
        text: of 1 to ``MAX_TOKENS`` tokens, and fewer than ``n_ctx``.

    Raises:
        ContextLengthError: when the text is longer.
        TypeError: when it is not a str.
        ValueError: when it is empty.

    Example:
        >>> from tf_gpt2.checkpoint.download import embedded_dir
        >>> explanation = explain(TextGenerator.from_checkpoint(embedded_dir()), "To be")
        >>> [token.label for token in explanation.tokens]
        ['<|endoftext|>', 'To', ' be']
    """
    encoder, config = generator.encoder, generator.model.config
    ids = encoder.encode(check_text("text", text))
    most = min(MAX_TOKENS, config.n_ctx - 1)
    if not ids:
        raise ValueError("text must not be empty: there is nothing to explain")
    if len(ids) > most:
        raise ContextLengthError(f"text has {len(ids)} tokens, the most to explain is {most}; cut it")
    if encoder.end_of_text is not None:
        ids = [encoder.end_of_text, *ids]
    logits, attention = logits_and_attention(generator.model, tf.constant([ids], tf.int32))
    logprobs = tf.nn.log_softmax(logits).numpy()  # (T, V)
    first = ExplainedToken(visible(encoder.decode_bytes(ids[:1])), ids[0], None, None, ())
    later_tokens = [explain_token(encoder, ids[i], logprobs[i - 1]) for i in range(1, len(ids))]
    return Explanation(config=config, tokens=[first, *later_tokens], attention=attention)


def explain_token(encoder: Encoder, token_id: int, logprobs: np.ndarray) -> ExplainedToken:
    """Ranks one token among all, given their log-probabilities, (V,)."""
    logprob = logprobs[token_id]
    n_before = np.count_nonzero(logprobs > logprob) + np.count_nonzero(logprobs[:token_id] == logprob)
    ranked = map(int, np.argsort(-logprobs, kind="stable"))
    tokens = (i for i in ranked if i in encoder.decoder)  # the model may have ids that stand for no token
    likeliest = itertools.islice(tokens, N_ALTERNATIVES)
    return ExplainedToken(
        label=visible(encoder.decode_bytes([token_id])),
        id=token_id,
        probability=probability_of(logprob),
        rank=1 + int(n_before),
        likeliest=tuple(
            Candidate(visible(encoder.decode_bytes([i])), i, probability_of(logprobs[i])) for i in likeliest
        ),
    )


def probability_of(logprob: float) -> float:
    """Computes the probability; rounding may have put the logarithm above 0."""
    return min(1.0, math.exp(logprob))


def visible(token: bytes) -> str:
    r"""Returns a token's text; characters without a shape, and halves of one, as escapes such as ``\x00``, ``\u202e``.

    Blank, tab and line feed stay: the page and the picture each show them in their own way.
    """
    text = token.decode("utf-8", "backslashreplace")
    return "".join(char if has_shape(char) or char in " \t\n" else escape(char) for char in text)


def has_shape(char: str) -> bool:
    """Whether a character has a shape: it is not a control, format, private, unassigned or blank character."""
    return unicodedata.category(char)[0] not in "CZ"


def escape(char: str) -> str:
    r"""Writes a character as in Python's source: ``\u200b``."""
    return char.encode("unicode_escape").decode("ascii") if ord(char) > 127 or ord(char) < 32 else f"\\x{ord(char):02x}"


def colour_of(probability: float) -> str:
    """Returns the palette's colour for a probability, as in "#f5a873"."""
    place = 1 - math.log(max(probability, LEAST_PROBABILITY)) / math.log(LEAST_PROBABILITY)
    lower, part = divmod(place * (len(PALETTE) - 1), 1)
    pair = PALETTE[int(lower)], PALETTE[min(int(lower) + 1, len(PALETTE) - 1)]
    channels = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in pair]
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(*channels, strict=True))
