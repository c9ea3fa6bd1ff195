"""Merges byte pairs inside a TensorFlow graph: all pieces of all texts at once, with the result of one merge at a time.

By definition (``Encoder.bpe``) each round merges, in a piece, the pair of lowest rank wherever it stands, from left to
right. A word of 20,000 random letters needs thousands of such rounds. So a round here also merges every pair that no
merge of lower rank can touch; then such a word needs five rounds.

Why that is exact
-----------------

Let every merge that makes a token have a lower rank than all merges that use the token, as when each merge was learnt
from the tokens made before (``_is_in_order``). Then the result of a merge is merged again at higher ranks only: the
definition goes through the ranks once, upwards. Take a pair (y, z) of rank r somewhere in a piece.

*The pair keeps its y if no merge on the left takes y before.* Such a merge is (t, y), where t is the symbol x now on
the left, or has grown leftwards and ends with x. The former has the rank of (x, y). The latter has at least the lowest
rank of any merge (t, y) with a t longer than x that ends with x: the left *rival* of (x, y). It also comes after the
symbol on the left of x has taken x, to which the same applies. So y is not taken from the left at a rank below

    threat(x, y) = min(rank(x, y), max(rival(x, y), threat(w, x)))      where w is on the left of x.

The rival alone in place of the last ``threat`` gives a lower bound, too; ``_threat`` takes it after ``DEPTH`` steps.
The same holds for z, with everything mirrored.

*Copies.* If y is z, pairs overlap, and in a run y y y y rank r merges the pairs at every second place from the left. If
the threat from the left to the first copy is above r, the run will not begin earlier, nor is any copy taken from the
left, because the first stands in between. If the threat from the right to a pair's second copy is not below r, no copy
up to there is taken from the right, and the rest of the run does not matter. Any other pair is a run of one; so one
rule serves for both: threat from the left above r where the run begins, threat from the right at least r.

*A pair that will be merged may be merged now.* Until rank r, the two symbols would not change. The token in their place
does not change either, because it is merged at ranks above r only. So all other symbols are merged as before.

Each round also merges the pairs of lowest rank, as defined. So there are never more rounds than ranks that occur in a
piece; and if the merges are in another order, a round does only that. Its work grows with the number of symbols.

Knows nothing of text or ids: symbols are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

NEVER = 2**31 - 1
"""The rank of a pair that does not merge."""

DEPTH = 2
"""Steps of ``_threat``. 20,000 random letters need 400 rounds with depth 0, 50 with depth 1, 5 with depth 2."""

Pair = tuple[str, str]


class MergeTable(NamedTuple):
    """The merges and rivals of each pair of neighbouring symbols.

    Attributes:
        n_symbols: int64 (); ``left * n_symbols + right`` is the key of a pair.
        keys: int64 (K,); the keys of the pairs that merge or have rivals, ascending; the last is above all keys.
        entries: int32 (K, 4); each pair's rank, left and right rival, and merged symbol; last, those of any other pair.
        is_in_order: whether merges that make a token have lower ranks than those that use it.
    """

    n_symbols: tf.Tensor
    keys: tf.Tensor
    entries: tf.Tensor
    is_in_order: bool


def merge_table(symbols: list[str], ranks: Mapping[Pair, int]) -> MergeTable:
    """Makes the table of all pairs.

    Args:
        symbols: all tokens that are bytes or that a merge makes; a symbol's number is its place.
        ranks: the ranks of the pairs that merge, all different.
    """
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    # A merge of a token that no merge makes never applies.
    ranks = {pair: rank for pair, rank in ranks.items() if pair[0] in numbers and pair[1] in numbers}
    left, right = _left_rivals(ranks, numbers), _right_rivals(ranks, numbers)
    rows = sorted(
        (
            numbers[pair[0]] * len(symbols) + numbers[pair[1]],
            ranks.get(pair, NEVER),
            left.get(pair, NEVER),
            right.get(pair, NEVER),
            numbers.get("".join(pair), 0),
        )
        for pair in {**ranks, **left, **right}
    )
    table = np.array([*rows, (len(symbols) ** 2, NEVER, NEVER, NEVER, 0)], np.int64)
    keys, entries = tf.constant(table[:, 0]), tf.constant(table[:, 1:], tf.int32)
    return MergeTable(tf.constant(len(symbols), tf.int64), keys, entries, _is_in_order(ranks))


def merge(symbols: tf.Tensor, pieces: tf.Tensor, table: MergeTable) -> tuple[tf.Tensor, tf.Tensor]:
    """Merges the symbols of each piece until no merge applies.

    Args:
        symbols: int32 (N,); the symbols of all pieces, one piece behind the other.
        pieces: int32 (N,); the piece of each symbol, numbered from 0 without gaps.
        table: the merges.

    Returns:
        the symbols after all merges and the piece of each, both int32 (M,).
    """
    # One more symbol, in a piece of its own, closes the ring: no other code has to handle the ends of arrays.
    n_pieces = tf.reduce_max(tf.concat([[-1], pieces], axis=0)) + 2
    symbols, pieces = tf.concat([symbols, [0]], axis=0), tf.concat([pieces, [n_pieces - 1]], axis=0)
    _, symbols, pieces = tf.while_loop(
        lambda has_changed, *_: has_changed,
        lambda _, symbols, pieces: _merge_round(symbols, pieces, n_pieces, table),
        (tf.constant(True), symbols, pieces),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None]), tf.TensorShape([None])),
    )
    return symbols[:-1], pieces[:-1]


def _merge_round(
    symbols: tf.Tensor, pieces: tf.Tensor, n_pieces: tf.Tensor, table: MergeTable
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Does one round; returns first whether it merged a pair. Each pair is at the place of its left symbol."""
    places = tf.range(tf.size(symbols))
    # As on a ring; tf.roll would call other threads for the smallest array.
    before, after = (places - 1) % tf.size(symbols), (places + 1) % tf.size(symbols)
    rank, left_rival, right_rival, merged = _look_up(symbols, pieces, after, table)
    # ``first``: where the run of each pair begins.
    begins = tf.not_equal(rank, tf.gather(rank, before)) | tf.equal(rank, NEVER)
    first = tf.gather(tf.boolean_mask(places, begins), tf.cumsum(tf.cast(begins, tf.int32)) - 1)

    merges = tf.equal(rank, tf.gather(tf.math.unsorted_segment_min(rank, pieces, n_pieces), pieces))
    if table.is_in_order:
        left_is_safe = tf.gather(_threat(rank, left_rival, before), tf.gather(before, first)) > rank
        right_is_safe = tf.gather(_threat(rank, right_rival, after), after) >= rank
        merges |= left_is_safe & right_is_safe
    merges &= (rank < NEVER) & tf.equal((places - first) % 2, 0)

    stays = ~tf.gather(merges, before)
    symbols = tf.where(merges, merged, symbols)
    return tf.reduce_any(merges), tf.boolean_mask(symbols, stays), tf.boolean_mask(pieces, stays)


def _look_up(symbols: tf.Tensor, pieces: tf.Tensor, after: tf.Tensor, table: MergeTable) -> list[tf.Tensor]:
    """Looks up the table's columns for each symbol and the next; a pair across two pieces never merges."""
    left = tf.cast(symbols, tf.int64)
    keys = left * table.n_symbols + tf.gather(left, after)
    entries = tf.searchsorted(table.keys, keys)
    is_known = tf.equal(tf.gather(table.keys, entries), keys) & tf.equal(pieces, tf.gather(pieces, after))
    return tf.unstack(tf.gather(table.entries, tf.where(is_known, entries, tf.size(table.keys) - 1)), axis=1)


def _threat(rank: tf.Tensor, rival: tf.Tensor, beyond: tf.Tensor) -> tf.Tensor:
    """Returns a rank below which no pair, even a longer one, takes the pair's inner symbol.

    Args:
        rank: int32 (N,); the rank of each pair.
        rival: int32 (N,); the rival of each pair on that side.
        beyond: int32 (N,); the place of the next pair outwards: the one before, for threats from the left.
    """
    threat = tf.minimum(rank, rival)
    for _ in range(DEPTH):
        threat = tf.minimum(rank, tf.maximum(rival, tf.gather(threat, beyond)))
    return threat


def _is_in_order(ranks: Mapping[Pair, int]) -> bool:
    """Whether every merge that makes a token has a lower rank than all merges that use it."""
    made: dict[str, int] = {}
    for (left, right), rank in ranks.items():
        made[left + right] = max(rank, made.get(left + right, rank))
    return all(made.get(part, -1) < rank for pair, rank in ranks.items() for part in pair)


def _left_rivals(ranks: Mapping[Pair, int], symbols: Mapping[str, int]) -> dict[Pair, int]:
    """Returns, for neighbours (x, y), the lowest rank of a merge (t, y) where t is longer than x and ends with it."""
    rivals: dict[Pair, int] = {}
    for (left, right), rank in ranks.items():
        for ending in (left[start:] for start in range(1, len(left))):
            if ending in symbols:
                rivals[ending, right] = min(rank, rivals.get((ending, right), rank))
    return rivals


def _right_rivals(ranks: Mapping[Pair, int], symbols: Mapping[str, int]) -> dict[Pair, int]:
    """Returns, for neighbours (x, y), the lowest rank of a merge (x, t) where t is longer than y and begins with it."""
    rivals: dict[Pair, int] = {}
    for (left, right), rank in ranks.items():
        for beginning in (right[:end] for end in range(1, len(right))):
            if beginning in symbols:
                rivals[left, beginning] = min(rank, rivals.get((left, beginning), rank))
    return rivals
