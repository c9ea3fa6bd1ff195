"""Finds special tokens in texts inside a TensorFlow graph: the one that begins first, of those the longest.

Each name is compared with the text at all places at once; a loop over the places that match leaves out those that
begin inside another. Knows nothing of merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from tf_gpt2.tokenizer.encoder import Encoder


class SpecialTable(NamedTuple):
    """The special tokens to look for.

    Attributes:
        names: the code points of each name, shorter names first.
        symbols: the number of the symbol that stands for each.
    """

    names: Sequence[Sequence[int]]
    symbols: Sequence[int]

    @classmethod
    def of(cls, encoder: Encoder, allowed: Sequence[str], n_symbols: int) -> SpecialTable:
        """Makes the table of some special tokens, whose symbols are numbered from ``n_symbols`` on.

        Raises:
            ValueError: when a token takes white space beside it, or is looked for later than others: only ``Encoder``
                can find those.
        """
        tokens = [encoder.special_tokens[name] for name in allowed]
        if any(token.lstrip or token.rstrip or token.single_word for token in tokens):
            raise ValueError("allowed_special has tokens that take or mind what is beside them; Encoder can find them")
        if len({token.first for token in tokens}) > 1:
            raise ValueError("allowed_special has tokens of which some come before others; Encoder can find them")
        numbers = {name: n_symbols + i for i, name in enumerate(encoder.special_tokens)}
        names = sorted(allowed, key=len)
        return cls([[*map(ord, name)] for name in names], [numbers[name] for name in names])


class Special(NamedTuple):
    """Where special tokens are.

    Attributes:
        symbols: int32 (N,), the symbol of the token that each character belongs to; -1 outside of tokens.
        begins: bool (N,), whether a token begins at a character.
        segments: int32 (N,), numbers the parts of texts between tokens, and the tokens.
    """

    symbols: tf.Tensor
    begins: tf.Tensor
    segments: tf.Tensor


def find_special(characters: tf.Tensor, rows: tf.Tensor, table: SpecialTable) -> Special:
    """Finds special tokens.

    Args:
        characters: int32 (N,); the code points of all texts, one text behind the other.
        rows: integers (N,); the text that each character belongs to.
        table: the tokens.
    """
    n_characters = tf.size(characters)
    lengths = symbols = tf.zeros_like(characters)  # of the longest token that matches at each place, 0 for none
    for name, symbol in zip(table.names, table.symbols, strict=True):
        ahead = tf.pad(characters, [[0, len(name)]], constant_values=-1)
        last = tf.minimum(tf.range(n_characters) + len(name) - 1, n_characters - 1)
        matches = tf.equal(tf.gather(rows, last), rows)
        for i, code_point in enumerate(name):
            matches &= tf.equal(ahead[i : i + n_characters], code_point)
        lengths, symbols = tf.where(matches, len(name), lengths), tf.where(matches, symbol, symbols)
    places = tf.cast(tf.where(lengths > 0)[:, 0], tf.int32)
    places = tf.boolean_mask(places, _apart(places, tf.gather(lengths, places)))
    ends = places + tf.gather(lengths, places)
    begins = _marked(places, n_characters + 1)[:-1]
    cuts = tf.cast(_marked(tf.concat([places, ends], axis=0), n_characters + 1)[:-1], tf.int32)
    opened = tf.cumsum(tf.cast(begins, tf.int32))
    closed = tf.cumsum(tf.cast(_marked(ends, n_characters + 1)[:-1], tf.int32))
    own = tf.gather(tf.concat([[-1], tf.gather(symbols, places)], axis=0), opened)
    segments = tf.cumsum(tf.cast(_row_changes(rows) | (cuts > 0), tf.int32))
    return Special(tf.where(opened > closed, own, -1), begins, segments)


def _apart(places: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Returns which of the places, ascending, begin behind the end of the last one that was taken: bool (M,)."""
    n_places = tf.size(places)

    def step(i: tf.Tensor, end: tf.Tensor, taken: tf.TensorArray) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray]:
        is_taken = places[i] >= end
        return i + 1, tf.where(is_taken, places[i] + lengths[i], end), taken.write(i, is_taken)

    state = (0, 0, tf.TensorArray(tf.bool, n_places, element_shape=[]))
    return tf.while_loop(lambda i, *_: i < n_places, step, state)[2].stack()


def _marked(places: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
    """Returns which of ``n`` places are among some: int32 (M,) -> bool (n,)."""
    return tf.scatter_nd(places[:, None], tf.ones_like(places), [n]) > 0


def _row_changes(rows: tf.Tensor) -> tf.Tensor:
    """Returns which places begin a text: bool (N,)."""
    return tf.not_equal(rows, tf.concat([rows[:1] - 1, rows[:-1]], axis=0))
