"""Decodes ids to text inside the graph, without a last character that later ids may change. Knows nothing of models."""

from __future__ import annotations

import tensorflow as tf

from tf_gpt2.tokenizer.in_graph import InGraphEncoder, repair_utf8

LONGEST_CHARACTER = 4


def certain_text(in_graph: InGraphEncoder, ids: tf.Tensor, lengths: tf.Tensor, is_whole: tf.Tensor) -> tf.Tensor:
    """Turns ids into texts, without a character at the end that the next id may complete.

    Args:
        in_graph: the vocabulary; an id that it lacks becomes U+FFFD.
        ids: int32 (B, N), right-padded.
        lengths: int32 (B,).
        is_whole: bool (B,), whether no more ids come, so that all of the text is certain.

    Returns:
        string (B,), UTF-8.
    """
    encoded = in_graph.decode_bytes(tf.RaggedTensor.from_tensor(ids, lengths))
    n_held = tf.where(is_whole, 0, unfinished(encoded))
    return repair_utf8(tf.strings.substr(encoded, tf.zeros_like(n_held), tf.strings.length(encoded) - n_held))


def unfinished(encoded: tf.Tensor) -> tf.Tensor:
    """Counts the bytes at the end that are the beginning of a character: string (B,) -> int32 (B,)."""
    n_bytes = tf.strings.length(encoded)
    n_tail = tf.minimum(n_bytes, LONGEST_CHARACTER - 1)
    tail = tf.strings.substr(encoded, n_bytes - n_tail, n_tail)
    tail = tf.cast(tf.io.decode_raw(tail, tf.uint8, fixed_length=LONGEST_CHARACTER), tf.int32)  # zeros on the right
    n_held = tf.zeros_like(n_bytes)
    for n in range(1, LONGEST_CHARACTER):  # a lead byte n from the end, of a character of more than n bytes
        lead = tf.gather(tail, tf.maximum(n_tail - n, 0), batch_dims=1)
        n_needed = 2 + tf.cast(lead >= 0xE0, tf.int32) + tf.cast(lead >= 0xF0, tf.int32)
        is_lead = (lead >= 0xC2) & (lead <= 0xF4) & (n_tail >= n)
        n_held = tf.where((n_held == 0) & is_lead & (n_needed > n), n, n_held)
    return n_held
