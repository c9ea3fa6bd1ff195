"""Converts text to ids and back inside a TensorFlow graph, with the same results as ``Encoder`` for any string.

It is for a SavedModel that takes and returns text, in a server that has only TensorFlow. So it uses only operations of
TensorFlow's core: no Python function, no regular expression, no table that is filled when the model is loaded. All
texts of a batch are processed together: their characters, in one flat array, are cut into pieces (``in_graph_split``),
and the bytes of all pieces are merged at once (``in_graph_merge``). For merges in the order of learning, the time grows
with the length of the texts, not with its square, whatever they contain. The memory grows with their bytes and their
number, never with the number times the longest text: nothing here is padded.

XLA cannot handle strings: call these functions outside of compiled code.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tensorflow as tf

from tf_gpt2.tokenizer.encoder import Encoder
from tf_gpt2.tokenizer.in_graph_merge import merge, merge_table
from tf_gpt2.tokenizer.in_graph_special import SpecialTable, find_special
from tf_gpt2.tokenizer.in_graph_split import character_classes, piece_starts


class InGraphEncoder(tf.Module):
    """An ``Encoder`` as TensorFlow operations.

    It holds only constants, 4.4 MB of them for OpenAI's vocabulary, so that a SavedModel of a function that calls it is
    complete. Inside ``tf.function`` it is several times faster than outside.

    Args:
        encoder: its vocabulary and merges are copied; its ``errors`` counts as ``"replace"``.

    Raises:
        ValueError: when an id does not fit into int32.

    Example:
        >>> from tf_gpt2.tokenizer.encoder import bytes_to_unicode
        >>> vocabulary = {symbol: id for id, symbol in enumerate(bytes_to_unicode().values())} | {"hi": 256}
        >>> in_graph = InGraphEncoder(Encoder(vocabulary, [("h", "i")]))
        >>> ids = in_graph.encode(tf.constant(["hi, hi", ""]))
        >>> ids.to_list()
        [[256, 11, 220, 256], []]
        >>> in_graph.decode(ids).numpy()
        array([b'hi, hi', b''], dtype=object)
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        ids = sorted(encoder.decoder)
        limits = np.iinfo(np.int32)
        if ids[0] < limits.min or ids[-1] > limits.max:
            raise ValueError(f"encoder has ids from {ids[0]} to {ids[-1]}; number them within int32")
        bytes_first = [encoder.byte_encoder[byte] for byte in range(256)]
        symbols = list(dict.fromkeys([*bytes_first, *map("".join, encoder.bpe_ranks)]))
        self._encoder = encoder
        self._n_symbols = len(symbols)
        # a symbol for each special token, which no merge uses
        of_special = [f" {text}" for text in encoder.special_tokens]
        self._classes = character_classes()
        self._merges = merge_table([*symbols, *of_special], encoder.bpe_ranks)
        special_ids = [token.id for token in encoder.special_tokens.values()]
        self._symbol_ids = tf.constant([*(encoder.encoder[symbol] for symbol in symbols), *special_ids], tf.int32)
        self._known_ids = tf.constant(ids, tf.int64)
        # An array of objects, because an array of byte strings would drop a NUL at the end.
        self._tokens = tf.constant(np.array([encoder.decode_bytes([token_id]) for token_id in ids], object))

    def encode(self, texts: tf.Tensor, allowed_special: str | Collection[str] = ()) -> tf.RaggedTensor:
        """Turns texts into ids, as ``Encoder.encode`` does, by default never into special ones.

        Args:
            texts: string (B,), UTF-8; other bytes become U+FFFD, as in ``bytes.decode(errors="replace")``.
            allowed_special: the special tokens whose names become their ids, or ``"all"``.

        Returns:
            int32 (B, T), T ragged.

        Raises:
            ValueError: when ``allowed_special`` names a token that is not special, or that takes white space beside it.
        """
        allowed = self._encoder.allowed_special_tokens(allowed_special) if allowed_special else ()
        texts = repair_utf8(texts)
        characters = tf.strings.unicode_decode(texts, "UTF-8")
        rows = rows_of_values(characters)
        symbols = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(texts), tf.uint8), tf.int32)
        is_first_byte = tf.not_equal(symbols & 0b1100_0000, 0b1000_0000)
        places = _number(is_first_byte)  # the character of each byte
        if allowed:
            table = SpecialTable.of(self._encoder, allowed, self._n_symbols)
            special = find_special(characters.flat_values, rows, table)
            # what is between two special tokens is cut as a text of its own
            starts = piece_starts(characters.flat_values, special.segments, self._classes)
            starts = (starts & (special.symbols < 0)) | special.begins
            symbols = tf.where(tf.gather(special.begins, places), tf.gather(special.symbols, places), symbols)
            stays = (tf.gather(special.symbols, places) < 0) | (is_first_byte & tf.gather(special.begins, places))
            symbols, places = tf.boolean_mask(symbols, stays), tf.boolean_mask(places, stays)
        else:
            starts = piece_starts(characters.flat_values, rows, self._classes)
        symbols, pieces = merge(symbols, tf.gather(_number(starts), places), self._merges)
        rows = tf.gather(tf.gather(rows, tf.where(starts)[:, 0]), pieces)
        row_splits = tf.searchsorted(rows, tf.range(tf.size(texts) + 1), out_type=tf.int64)
        return tf.RaggedTensor.from_row_splits(tf.gather(self._symbol_ids, symbols), row_splits, validate=False)

    def decode(self, ids: tf.RaggedTensor | tf.Tensor, lengths: tf.Tensor | None = None) -> tf.Tensor:
        """Turns ids into texts, as ``Encoder.decode`` does; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: int32 or int64 (B, T), ragged, or dense with ``lengths``.
            lengths: int32 (B,); ids past a row's length are ignored. By default each row counts whole.

        Returns:
            string (B,), UTF-8.

        Raises:
            tf.errors.InvalidArgumentError: when the vocabulary has no such id.
        """
        if not isinstance(ids, tf.RaggedTensor):
            ids = tf.RaggedTensor.from_tensor(ids, lengths)
        flat_ids = tf.cast(ids.flat_values, tf.int64)
        is_known = self._places(flat_ids)[1]
        message = ["ids has", tf.boolean_mask(flat_ids, ~is_known), "which the vocabulary lacks; its ids run from"]
        limits = [self._known_ids[0], "to", self._known_ids[-1]]
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(is_known), [*message, *limits], summarize=1)]):
            return repair_utf8(self.decode_bytes(ids))

    def decode_bytes(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """Turns ids into bytes, which need not be UTF-8: ragged (B, T) -> string (B,); 0xFF for an unknown id."""
        places, is_known = self._places(tf.cast(ids.flat_values, tf.int64))
        tokens = tf.where(is_known, tf.gather(self._tokens, places), b"\xff")
        return tf.strings.unsorted_segment_join(tokens, rows_of_values(ids), ids.nrows())

    def _places(self, flat_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns each id's place in the vocabulary, and whether it has one: int64 (N,) -> int32 (N,), bool (N,)."""
        places = tf.minimum(tf.searchsorted(self._known_ids, flat_ids), tf.size(self._known_ids) - 1)
        return places, tf.equal(tf.gather(self._known_ids, places), flat_ids)


def rows_of_values(ragged: tf.RaggedTensor) -> tf.Tensor:
    """Returns the row of each value, (N,), like ``value_rowids`` but without its array of (rows, longest row)."""
    places = tf.range(tf.size(ragged.flat_values, ragged.row_splits.dtype))
    return tf.searchsorted(ragged.row_splits, places, side="right") - 1


def _number(starts: tf.Tensor) -> tf.Tensor:
    """Returns for each place the number of the last start up to it, counted from 0: bool (N,) -> int32 (N,)."""
    return tf.cumsum(tf.cast(starts, tf.int32)) - 1


def repair_utf8(texts: tf.Tensor) -> tf.Tensor:
    """Replaces bytes that are not UTF-8 by U+FFFD, exactly as ``bytes.decode(errors="replace")`` does: string (B,)."""
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace", replacement_char=0xFFFD)
