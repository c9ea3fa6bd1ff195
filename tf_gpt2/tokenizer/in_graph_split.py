r"""Cuts text into pieces inside a TensorFlow graph: ``PATTERN`` as operations on whole arrays of characters.

TensorFlow's own regular expressions (RE2) have no look-ahead, and another version of Unicode. But the pattern hardly
needs an engine. Each character is of one of four classes: letter, number, white space, other. A piece starts

- at the first character of a text, and where the class changes: ``\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+`` and ``\s+``;
- not, however, behind a plain space, which leads the piece instead: ``' ?'`` before the first three alternatives;
- at the last of several white spaces, if another character follows: ``\s+(?!\S)`` leaves that white space to the next
  piece or, where it cannot lead one (a line feed cannot), to ``\s+``.

The remaining alternatives are the contractions, ``'s|'t|'re|'ve|'m|'ll|'d``. The pattern tries them first, but only
where a piece starts. An apostrophe, of class other, starts no piece behind a character of the same class, whose piece
takes it along, nor behind a plain space, which leads it. Everywhere else it starts a piece, so contractions begin only
there. They end in letters, so they never overlap. They change two things: no piece starts inside a contraction, and one
starts right behind it.

No rule looks further than one character back and three ahead, so no text needs a loop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import regex
import tensorflow as tf

OTHER, LETTER, NUMBER, SPACE, NONE = range(5)
"""Classes of characters; NONE is before and after a text."""

RANGES = r"(\p{L}+)|(\p{N}+)|(\s+)"
"""One group for each of the classes LETTER, NUMBER, SPACE."""

N_CODE_POINTS = 0x110000


class CharacterClasses(NamedTuple):
    """The class of every code point, by ranges.

    Attributes:
        first: int32 (R,); the first code point of each range, upwards from 0.
        classes: int32 (R,); the class of each range.
    """

    first: tf.Tensor
    classes: tf.Tensor


def character_classes() -> CharacterClasses:
    """Returns the class of every code point by ``regex``, which ``Encoder`` uses, so that the two agree."""
    classes = np.full(N_CODE_POINTS, OTHER, np.int32)
    for match in regex.finditer(RANGES, "".join(map(chr, range(N_CODE_POINTS)))):
        classes[slice(*match.span())] = match.lastindex
    first = np.flatnonzero(np.diff(classes, prepend=NONE))
    return CharacterClasses(tf.constant(first, tf.int32), tf.constant(classes[first]))


def piece_starts(characters: tf.Tensor, rows: tf.Tensor, table: CharacterClasses) -> tf.Tensor:
    """Returns which characters start a piece.

    Args:
        characters: int32 (N,); the code points of all texts, one text behind the other.
        rows: int32 (N,); the text that each character belongs to.
        table: the class of every code point.

    Returns:
        bool (N,).
    """
    # The neighbours of each place, as on a ring. Not tf.roll, which calls other threads even for the smallest array
    # and so makes encoding as a whole five times slower.
    places = tf.range(tf.size(rows))
    before, after = (places - 1) % tf.size(rows), (places + 1) % tf.size(rows)
    is_first = tf.not_equal(rows, tf.gather(rows, before)) | tf.equal(places, 0)
    is_last = tf.gather(is_first, after)

    kind = tf.gather(table.classes, tf.searchsorted(table.first, characters, side="right") - 1)
    kind_before = tf.where(is_first, NONE, tf.gather(kind, before))
    kind_after = tf.where(is_last, NONE, tf.gather(kind, after))
    is_led = tf.gather(tf.equal(characters, ord(" ")), before) & ~is_first
    in_spaces = tf.equal(kind, SPACE) & tf.equal(kind_before, SPACE)
    splits_off = in_spaces & tf.not_equal(kind_after, SPACE) & tf.not_equal(kind_after, NONE)
    starts = (tf.not_equal(kind, kind_before) & ~is_led) | splits_off

    one_on = tf.where(is_last, 0, tf.gather(characters, after))
    two_on = tf.where(is_last, 0, tf.gather(one_on, after))
    may_contract = tf.equal(characters, ord("'")) & tf.not_equal(kind_before, OTHER) & ~is_led
    two_long = may_contract & _is_in(one_on, "stmd")
    three_long = may_contract & (
        (_is_in(one_on, "rv") & _is_in(two_on, "e")) | (_is_in(one_on, "l") & _is_in(two_on, "l"))
    )
    # Inside a contraction, the letters are of one class, so only the first looks like a start. Behind it, a piece of
    # the same text starts, or else another text.
    is_inside = tf.gather(two_long | three_long, before)
    is_behind = tf.gather(two_long | tf.gather(three_long, before), tf.gather(before, before))
    return (starts & ~is_inside) | is_behind


def _is_in(characters: tf.Tensor, wanted: str) -> tf.Tensor:
    return tf.reduce_any(tf.equal(characters[:, tf.newaxis], [ord(letter) for letter in wanted]), axis=1)
