"""How the lean loop chooses: the likeliest id or a draw, as ``sampling.choose`` does, but without branches."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tf_gpt2.generation.filters import Cut
from tf_gpt2.generation.processors import asks_for_processing
from tf_gpt2.generation.random import gumbel
from tf_gpt2.generation.sampling import Sampling, temperature_of
from tf_gpt2.model.one_thread import in_one_thread


class Likeliest(NamedTuple):
    """Takes the likeliest id of each row."""

    def noise(self, lengths: tf.Tensor, n_steps: int, n_vocab: int) -> tuple[tuple[()], ...]:
        """Needs none."""
        del lengths, n_vocab
        return ((),) * n_steps

    def choose(self, logits: tf.Tensor, noise: tuple[()]) -> tf.Tensor:
        """Chooses: float32 (B, V) -> int32 (B,)."""
        del noise
        return tf.argmax(logits, axis=-1, output_type=tf.int32)


class Draw(NamedTuple):
    """Draws an id for each row, which asks for no more than temperature, top-k, top-p and min-p; see ``Sampling``.

    Attributes:
        temperature: float32 (B, 1), above 0.
        cut: what may be drawn; of rows that take their likeliest id only that.
        seeds: uint32 (B, 2).
        n_before: int32 (B,).
    """

    temperature: tf.Tensor
    cut: Cut
    seeds: tf.Tensor
    n_before: tf.Tensor

    @classmethod
    def of(cls, sampling: Sampling, n_vocab: int) -> Draw:
        """Gives what a draw needs of the settings."""
        s = sampling
        top_k = tf.where(s.temperature > 0, s.top_k, 1)
        return cls(
            temperature=temperature_of(s)[:, None],
            cut=Cut.of(top_k, s.top_p, s.min_p, n_vocab),
            seeds=s.seeds,
            n_before=s.n_before,
        )

    def noise(self, lengths: tf.Tensor, n_steps: int, n_vocab: int) -> tuple[tf.Tensor, ...]:
        """Draws what is added to the logits in steps from texts of these lengths on: n times float32 (B, V).

        It depends on no logits, so that it can be computed beside a step that comes before.
        """

        def of_steps(positions: tf.Tensor) -> list[tf.Tensor]:
            return [gumbel(self.seeds, positions + i, n_vocab) for i in range(n_steps)]

        return tuple(in_one_thread(of_steps, self.n_before + lengths))

    def choose(self, logits: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """Chooses: twice float32 (B, V) -> int32 (B,)."""
        logits = logits / self.temperature
        noisy = tf.where(self.cut.keeps(logits), logits + noise, -float("inf"))
        return tf.argmax(noisy, axis=-1, output_type=tf.int32)


Choice = Likeliest | Draw


def asks_for_no_more(sampling: Sampling) -> tf.Tensor:
    """Says whether ``Draw`` gives each row all it asks for: bool ()."""
    return tf.reduce_all(sampling.typical_p >= 1) & ~asks_for_processing(sampling.processing)
