"""Checks inside the graph the options that a server's client sends per row.

A row with an impossible option gets an error's sentence instead of text, and the other rows get the same as alone. Only
a wrong number of values fails the request. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.options import RULES, Rule
from tf_gpt2.generation.processors import Processing

SERVED_RULES = {
    "max_new_tokens": Rule(0, np.int64, lambda x: x >= 0, "at least 0"),
    **RULES,
    "seed": Rule(0, np.int64, lambda x: x >= 0, "at least 0"),
    "n_tokens": Rule(16, np.int64, lambda x: x >= 1, "at least 1"),
}
"""The rule of each option: those of ``tf_gpt2.generate``, but a seed is below 2**63."""

GENERATE_OPTIONS = tuple(name for name in SERVED_RULES if name != "n_tokens")
NEXT_OPTIONS = ("n_tokens", *GENERATE_OPTIONS)

Options = Mapping[str, tf.Tensor]
"""Each option's values, (B,), by name."""


def option_dtype(name: str) -> tf.DType:
    """Returns the dtype in which clients send an option."""
    if name == "seed":
        return tf.int64
    return tf.float32 if SERVED_RULES[name].dtype is np.float32 else tf.int32


def option_default(name: str, max_new_tokens: int) -> tf.Tensor:
    """Returns the value of an option that a client does not send: one value, (1,), for all rows."""
    value = max_new_tokens if name == "max_new_tokens" else SERVED_RULES[name].default
    return tf.constant([value], option_dtype(name))


def neutral(name: str) -> tf.Tensor:
    """Returns the value that changes nothing, (), for a row that nobody reads."""
    return option_default(name, 0)[0]


class Checked(NamedTuple):
    """Options with a valid value in each row.

    Attributes:
        options: each (B,); the defaults in rows with an error.
        errors: string (B,), a sentence, or "" where the options are valid.
    """

    options: Options
    errors: tf.Tensor


def check_options(sent: Options, n_rows: tf.Tensor) -> Checked:
    """Spreads each option over the rows, and finds the rows that cannot be served.

    Raises:
        tf.errors.InvalidArgumentError: when an option has neither one value nor one per row.
    """
    spread = {name: per_row(name, values, n_rows) for name, values in sent.items()}
    errors = tf.fill([n_rows], "")
    for name, values in spread.items():
        rule = SERVED_RULES[name]
        errors = first_error(errors, rule.holds(values), f"{name} must be {rule.wanted}")
    options = {name: tf.where(errors == "", values, neutral(name)) for name, values in spread.items()}
    return Checked(options, errors)


def per_row(name: str, values: tf.Tensor, n_rows: tf.Tensor) -> tf.Tensor:
    """Returns an option's values for all rows: (B,) or (1,) -> (B,)."""
    n_values = tf.size(values)
    fits = (n_values == 1) | (n_values == n_rows)
    sentence = (f"{name} must have one value, or one per row, got", n_values, "for", n_rows, "rows")
    return tf.broadcast_to(require(values, fits, *sentence), [n_rows])


def require(values: Any, condition: tf.Tensor, *message: str | tf.Tensor) -> Any:
    """Returns the tensors as they are, or fails the request when a condition does not hold.

    Compute with the returned tensors: only they depend on the check. Operations on the given ones run beside it, and
    may fail first with a message that does not help.

    Args:
        values: a tensor, or a tuple of them.
        condition: bool ().
        *message: words and integers.
    """
    words = [word if isinstance(word, str) else tf.strings.as_string(word) for word in message]
    with tf.control_dependencies([tf.debugging.Assert(condition, [tf.strings.join(words, " ")])]):
        return tf.nest.map_structure(tf.identity, values)


def first_error(errors: tf.Tensor, holds: tf.Tensor, sentence: str | tf.Tensor) -> tf.Tensor:
    """Adds a sentence in rows where a condition fails and no other has failed before."""
    # never "not holds": TensorFlow rewrites "not x <= 1" to "x > 1", which is false for NaN
    return tf.where((errors != "") | holds, errors, sentence)


def sampling_from(options: Options, bias: tf.Tensor) -> Sampling:
    """Makes the sampling settings from checked options; ``bias``, float32 (V,), is -inf for ids that are never said."""
    seeds = options["seed"]  # (B,)
    words = tf.stack([seeds & 0xFFFFFFFF, tf.bitwise.right_shift(seeds, tf.constant(32, tf.int64))], axis=1)
    of_rows = {name: options[name] for name in Processing._fields if name in options}
    processing = Processing(bias=bias, bad_words=tf.fill([1, 1], -1), **of_rows)
    settings = {name: options[name] for name in Sampling._fields if name in options}
    settings |= dict.fromkeys(("n_before", "n_new"), tf.zeros_like(options["top_k"]))
    return Sampling(seeds=tf.cast(words, tf.uint32), processing=processing, **settings)
