"""Encodes texts inside the graph to ids that fit the window; a row that does not fit gets an error's sentence instead.

Knows nothing of models.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tf_gpt2.serving.options import first_error, require
from tf_gpt2.tokenizer.encoder import Encoder
from tf_gpt2.tokenizer.in_graph import InGraphEncoder

MOST_BYTES = 2**22
"""Most bytes of text in one request: encoding them takes some 0.7 GB."""
MOST_POSITIONS = 2**15
"""Most rows times positions of one request: 32 rows of 1,024 tokens. With 124M's shapes they take some 8 GB."""


class Rows(NamedTuple):
    """Rows of ids.

    Attributes:
        ids: int32 (B, T), right-padded.
        lengths: int32 (B,).
        errors: string (B,), a sentence for a row that is not served, whose length is then 0; else "".
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    errors: tf.Tensor


class PromptReader:
    """Reads texts for a model.

    Args:
        encoder: the vocabulary.
        n_ctx: the window.
    """

    def __init__(self, encoder: Encoder, n_ctx: int):
        self.in_graph = InGraphEncoder(encoder)
        self.end_of_text = encoder.end_of_text
        self.n_ctx = n_ctx
        # A text of more bytes has too many tokens in any case, so the server need not encode megabytes to know it.
        self.most_bytes = n_ctx * max(len(encoder.decode_bytes([token_id])) for token_id in encoder.decoder)

    def read(self, texts: tf.Tensor, most_tokens: tf.Tensor, *, keep_end: bool = False) -> Rows:
        """Encodes texts.

        Args:
            texts: string (B,).
            most_tokens: int32 (), at least 1.
            keep_end: whether to take the end of a longer text; otherwise a longer text is an error.
        """
        texts = check_positions(texts, tf.size(texts), 1)  # a lower bound, checked before any tensor is made per row
        n_bytes = tf.strings.length(texts)
        is_long = n_bytes > self.most_bytes
        if keep_end:
            texts = tf.strings.substr(texts, tf.maximum(n_bytes - self.most_bytes, 0), n_bytes)
        else:
            texts = tf.where(is_long, "", texts)
        ids = self.encode(texts)
        lengths = tf.cast(ids.row_lengths(), tf.int32)  # (B,)
        if keep_end:
            starts, errors = tf.maximum(lengths - most_tokens, 0), tf.fill(tf.shape(lengths), "")
        else:
            starts, errors = tf.zeros_like(lengths), self.errors(lengths, is_long, most_tokens)
        n_kept = tf.where(errors == "", tf.minimum(lengths, most_tokens), 0)
        n_kept = check_positions(n_kept, tf.size(n_kept), longest(n_kept))
        return Rows(cut(ids, starts, n_kept), n_kept, errors)

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turns texts into ids: string (B,) -> int32 (B, T), T ragged; fails the request when texts are too long."""
        n_bytes = tf.reduce_sum(tf.cast(tf.strings.length(texts), tf.int64))
        sentence = ("text has", n_bytes, f"bytes in all rows, at most {MOST_BYTES} are possible; send less at once")
        return self.in_graph.encode(require(texts, n_bytes <= MOST_BYTES, *sentence))

    def errors(self, lengths: tf.Tensor, is_long: tf.Tensor, most_tokens: tf.Tensor) -> tf.Tensor:
        """Returns an error's sentence for each text that is too long, else "": string (B,)."""
        n_tokens = tf.where(is_long, "too many", tf.strings.as_string(lengths))
        sentence = tf.strings.join(
            ["text has ", n_tokens, " tokens, at most ", tf.strings.as_string(most_tokens), " are possible; shorten it"]
        )
        return first_error(tf.fill(tf.shape(lengths), ""), ~is_long & (lengths <= most_tokens), sentence)

    def start_empty(self, rows: Rows) -> Rows:
        """Lets empty texts start after ``<|endoftext|>``, as ``TextGenerator`` does."""
        is_empty = (rows.lengths == 0) & (rows.errors == "")
        if self.end_of_text is None:
            sentence = "text must not be empty: this vocabulary has no <|endoftext|> to start from"
            return rows._replace(errors=first_error(rows.errors, ~is_empty, sentence))
        ids = tf.pad(rows.ids, [[0, 0], [0, tf.cast(tf.shape(rows.ids)[1] == 0, tf.int32)]])
        first = tf.range(tf.shape(ids)[1])[None] == 0  # (1, T)
        ids = tf.where(is_empty[:, None] & first, self.end_of_text, ids)
        return rows._replace(ids=ids, lengths=tf.where(is_empty, 1, rows.lengths))


def longest(lengths: tf.Tensor) -> tf.Tensor:
    """Returns the largest length, 0 for no rows: int32 (B,) -> int32 ()."""
    return tf.reduce_max(tf.concat([lengths, [0]], axis=0))


def places_of(n_rows: tf.Tensor, width: tf.Tensor | int) -> tf.Tensor:
    """Returns rows times width, int64 (); 0 counts as 1 in both, because a row without ids takes memory, too."""
    return tf.cast(tf.maximum(n_rows, 1), tf.int64) * tf.cast(tf.maximum(width, 1), tf.int64)


def check_positions(x: tf.Tensor, n_rows: tf.Tensor, n_positions: tf.Tensor | int) -> tf.Tensor:
    """Returns ``x``, or fails the request when rows times positions exceed ``MOST_POSITIONS``."""
    n_places = places_of(n_rows, n_positions)
    sentence = f"a request must have at most {MOST_POSITIONS} positions, rows times tokens: send fewer rows; got"
    return require(x, n_places <= MOST_POSITIONS, sentence, n_places)


def cut(ids: tf.RaggedTensor, starts: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Takes a part of each row, zero-padded: ragged int32, twice int32 (B,) -> int32 (B, T)."""
    columns = tf.range(longest(lengths))[None]  # (1, T)
    places = tf.cast(ids.row_starts(), tf.int32)[:, None] + starts[:, None] + columns  # (B, T)
    is_inside = columns < lengths[:, None]
    padded = tf.concat([ids.flat_values, [0]], axis=0)
    return tf.where(is_inside, tf.gather(padded, tf.where(is_inside, places, 0)), 0)


def one_length_per_row(ids: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns both, or fails the request when there is not one length per row of ids."""
    n_lengths, n_rows = tf.size(lengths), tf.shape(ids)[0]
    sentence = ("lengths must have one value per row of ids, got", n_lengths, "for", n_rows, "rows")
    return require((ids, lengths), n_lengths == n_rows, *sentence)


def check_sent_ids(
    ids: tf.Tensor, lengths: tf.Tensor, *, n_vocab: int, most_tokens: int, least_tokens: int = 0
) -> Rows:
    """Checks rows of ids that a client sent: int32 (B, T), int32 (B,).

    The request's positions are those of ``ids``, whatever ``lengths`` says: the tensors computed here have that shape.
    """
    ids, lengths = one_length_per_row(check_positions(ids, tf.shape(ids)[0], tf.shape(ids)[1]), lengths)
    width = tf.shape(ids)[1]
    limit = tf.minimum(width, most_tokens)
    sentence = tf.strings.join(
        [
            f"lengths must lie in [{least_tokens}, ",
            tf.strings.as_string(limit),
            "], got ",
            tf.strings.as_string(lengths),
        ]
    )
    errors = first_error(tf.fill(tf.shape(lengths), ""), (lengths >= least_tokens) & (lengths <= limit), sentence)
    is_inside = tf.range(width)[None] < lengths[:, None]
    is_valid = tf.reduce_all(~is_inside | ((ids >= 0) & (ids < n_vocab)), axis=1)
    errors = first_error(errors, is_valid, f"ids must lie in [0, {n_vocab})")
    lengths = tf.where(errors == "", lengths, 0)
    ids = tf.where(tf.range(width)[None] < lengths[:, None], ids, 0)
    return Rows(ids[:, : longest(lengths)], lengths, errors)


def join(first: Rows, second: Rows, *, most_tokens: int) -> Rows:
    """Puts ids behind texts, row by row; the errors of the texts count before those of the ids."""
    n_first, n_second = tf.size(first.lengths), tf.size(second.lengths)
    sentence = ("ids must have one row per text, got", n_second, "for", n_first, "texts")
    first, second = require((first, second), n_first == n_second, *sentence)
    errors = first_error(first.errors, second.errors == "", second.errors)
    lengths = first.lengths + second.lengths
    n_tokens = tf.strings.as_string(lengths)
    sentence = tf.strings.join(["text and ids have ", n_tokens, f" tokens, at most {most_tokens} are possible"])
    errors = first_error(errors, lengths <= most_tokens, sentence)
    lengths = tf.where(errors == "", lengths, 0)
    joined = tf.concat([first.ids, second.ids], axis=1)  # (B, T1 + T2)
    columns = tf.range(tf.shape(joined)[1])[None]
    is_first = columns < first.lengths[:, None]
    places = tf.where(is_first, columns, columns - first.lengths[:, None] + tf.shape(first.ids)[1])
    places = tf.where(columns < lengths[:, None], places, 0)
    ids = tf.where(columns < lengths[:, None], tf.gather(joined, places, batch_dims=1), 0)
    return Rows(ids, lengths, errors)
