"""Defines the functions of a SavedModel: they take text, ids and options, and return text, ids and numbers.

Each takes tensors whose first axis is the rows of a batch, and returns named tensors. A row, however wrong, changes no
other row. The plain functions do not use XLA, which is off in a server by default; each function that XLA compiles has
the inputs and outputs of a plain one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.generation.loop import Limits
from tf_gpt2.generation.options import make_bias
from tf_gpt2.serving.graph_loop import Continued, GraphLoop, Prompts
from tf_gpt2.serving.options import (
    GENERATE_OPTIONS,
    NEXT_OPTIONS,
    Options,
    check_options,
    first_error,
    neutral,
    option_default,
    option_dtype,
    require,
    sampling_from,
)
from tf_gpt2.serving.prompts import (
    PromptReader,
    Rows,
    check_positions,
    check_sent_ids,
    cut,
    join,
    longest,
    one_length_per_row,
    places_of,
)
from tf_gpt2.serving.text import certain_text
from tf_gpt2.text.generator import TextGenerator

MOST_LOGITS = 2**26
"""Most numbers that ``logits`` returns, enough for a window of OpenAI's: 0.8 GB as tensors, 1.5 GB more as JSON."""
MOST_IDS = 2**22
"""Most rows times ids of the longest row that ``encode`` returns and ``decode`` takes; an empty row counts as 1."""

Outputs = dict[str, tf.Tensor]
TEXT = tf.TensorSpec([None], tf.string, "text")
IDS = tf.TensorSpec([None, None], tf.int32, "ids")
LENGTHS = tf.TensorSpec([None], tf.int32, "lengths")


class Generated(NamedTuple):
    """The generated ids, without the padding.

    Attributes:
        ids: int32 (B, N), the new ids, zero-padded.
        lengths: int32 (B,), how many.
        logprobs: float32 (B, N), under the unmodified model; zero-padded.
        finish_reason: string (B,).
    """

    ids: tf.Tensor
    lengths: tf.Tensor
    logprobs: tf.Tensor
    finish_reason: tf.Tensor


class ServedFunctions:
    """A generator's functions for one graph.

    Args:
        generator: must outlive the functions.
        reader: reads with the generator's vocabulary; plain and compiled functions share one, and its tables.
        max_new_tokens: for ``serving_default``, and for clients that do not say.
        xla: whether XLA compiles them.
    """

    def __init__(self, generator: TextGenerator, reader: PromptReader, *, max_new_tokens: int, xla: bool):
        self.config = generator.model.config
        self.max_new_tokens = max_new_tokens
        self.reader = reader
        self.stop_ids = generator.stop_ids(stop_at_end_of_text=True) or [-1]
        self.bias = make_bias({}, generator.unknown_ids, [], self.config)
        self.loop = GraphLoop(generator.model, xla=xla)

    def signatures(self) -> dict[str, Any]:
        """Returns each function as a ``tf.function`` with its input signature, by name."""
        suffix = "_xla" if self.loop.xla else ""
        inputs: dict[str, tuple[Callable[..., Outputs], Sequence[tf.TensorSpec], Sequence[str]]] = {
            "serving_default": (self.continue_text, [TEXT], ()),
            "generate": (self.generate, [TEXT], GENERATE_OPTIONS),
            "generate_ids": (self.generate_ids, [IDS, LENGTHS], GENERATE_OPTIONS),
            "next": (self.next, [TEXT, IDS, LENGTHS], NEXT_OPTIONS),
            "score": (self.score, [TEXT], ()),
            "embed": (self.embed, [TEXT], ()),
            "logits": (self.logits, [IDS, LENGTHS], ()),
        }
        if not self.loop.xla:
            inputs |= {"encode": (self.encode, [TEXT], ()), "decode": (self.decode, [IDS, LENGTHS], ())}
        return {name + suffix: self._as_signature(*parts) for name, parts in inputs.items()}

    def _as_signature(
        self, function: Callable[..., Outputs], specs: Sequence[tf.TensorSpec], options: Sequence[str]
    ) -> Any:
        """Adds options to a function's parameters, behind the inputs, with defaults that a SavedModel keeps."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(spec.name, kind) for spec in specs]
        for name in options:
            default = option_default(name, self.max_new_tokens)
            parameters.append(inspect.Parameter(name, kind, default=default))
        signature = inspect.Signature(parameters)

        def named(*args: Any, **kwargs: Any) -> Outputs:
            arguments = signature.bind(*args, **kwargs).arguments
            inputs = [arguments.pop(spec.name) for spec in specs]
            return function(*inputs, **arguments)

        named.__signature__ = signature  # type: ignore[attr-defined]
        named.__name__ = function.__name__
        option_specs = [tf.TensorSpec([None], option_dtype(name), name) for name in options]
        return tf.function(named, input_signature=[*specs, *option_specs], autograph=False)

    def continue_text(self, text: tf.Tensor) -> Outputs:
        """Continues texts greedily; of a text that is too long, only the end."""
        most_tokens = tf.constant(max(1, self.config.n_ctx - self.max_new_tokens))
        rows = self.reader.start_empty(self.reader.read(text, most_tokens, keep_end=True))
        options = {name: option_default(name, self.max_new_tokens) for name in GENERATE_OPTIONS}
        return {"text": self._text(self._generate(rows, rows.lengths, options))}

    def generate(self, text: tf.Tensor, **options: tf.Tensor) -> Outputs:
        """Continues texts as each row's options say."""
        rows = self.reader.start_empty(self.reader.read(text, tf.constant(self.config.n_ctx - 1)))
        generated = self._generate(rows, rows.lengths, options)
        return {"text": self._text(generated), **name_outputs(generated), "prompt_length": rows.lengths}

    def generate_ids(self, ids: tf.Tensor, lengths: tf.Tensor, **options: tf.Tensor) -> Outputs:
        """Continues rows of ids."""
        n_vocab, most_tokens = self.config.n_vocab, self.config.n_ctx - 1
        rows = check_sent_ids(ids, lengths, n_vocab=n_vocab, most_tokens=most_tokens, least_tokens=1)
        return name_outputs(self._generate(rows, rows.lengths, options))

    def next(self, text: tf.Tensor, ids: tf.Tensor, lengths: tf.Tensor, **options: tf.Tensor) -> Outputs:
        """Appends the next tokens to those that a client got before, for clients that show text as it comes."""
        prompts = self.reader.start_empty(self.reader.read(text, tf.constant(self.config.n_ctx - 1)))
        earlier = check_sent_ids(ids, lengths, n_vocab=self.config.n_vocab, most_tokens=self.config.n_ctx)
        generated = self._generate(join(prompts, earlier, most_tokens=self.config.n_ctx), prompts.lengths, options)
        return {
            "ids": generated.ids,
            "lengths": generated.lengths,
            "text": self._text(generated),
            "finish_reason": generated.finish_reason,
        }

    def score(self, text: tf.Tensor) -> Outputs:
        """Computes each token's log-probability, given the tokens before it; of the first, given ``<|endoftext|>``."""
        rows = self.reader.read(text, tf.constant(self.config.n_ctx))
        n_rows = tf.shape(text)[0]
        targets = self._pad(rows.ids)  # (B', T)
        start = -1 if self.reader.end_of_text is None else self.reader.end_of_text
        context = tf.concat([tf.fill([tf.shape(targets)[0], 1], max(start, 0)), targets[:, :-1]], axis=1)
        if start < 0:  # no token can stand before the first one, so that gets 0; the others are scored as usual
            context = targets
            targets = tf.pad(targets[:, 1:], [[0, 0], [0, 1]])
        logprobs = self.loop.logprobs(context, targets)
        if start < 0:
            logprobs = tf.pad(logprobs[:, :-1], [[0, 0], [1, 0]])
        columns = tf.range(tf.shape(rows.ids)[1])[None]
        logprobs = tf.where(columns < rows.lengths[:, None], logprobs[:n_rows, : tf.shape(rows.ids)[1]], 0.0)
        return {
            "ids": rows.ids,
            "logprobs": logprobs,
            "lengths": rows.lengths,
            "total": tf.reduce_sum(logprobs, axis=1),
            "error": rows.errors,
        }

    def embed(self, text: tf.Tensor) -> Outputs:
        """Returns the last hidden state: its mean over the text, and its value at the last token."""
        rows = self.reader.start_empty(self.reader.read(text, tf.constant(self.config.n_ctx)))
        n_rows = tf.shape(text)[0]
        hidden = self.loop.hidden_states(self._pad(rows.ids))[:n_rows]  # (B, T, C)
        is_inside = tf.range(tf.shape(hidden)[1])[None] < rows.lengths[:, None]  # (B, T)
        total = tf.reduce_sum(tf.where(is_inside[..., None], hidden, 0.0), axis=1)
        mean = total / tf.cast(tf.maximum(rows.lengths, 1), tf.float32)[:, None]
        last = tf.gather(hidden, tf.maximum(rows.lengths - 1, 0), batch_dims=1)
        is_right = (rows.errors == "")[:, None]
        return {"mean": tf.where(is_right, mean, 0.0), "last": tf.where(is_right, last, 0.0), "error": rows.errors}

    def logits(self, ids: tf.Tensor, lengths: tf.Tensor) -> Outputs:
        """Computes the logits at each position; 0 behind a row's length, and in a row with an error."""
        n_vocab, n_ctx = self.config.n_vocab, self.config.n_ctx
        n_rows, width = tf.shape(ids)[0], tf.shape(ids)[1]
        ids = at_most(ids, MOST_LOGITS // n_vocab)
        rows = check_sent_ids(ids, lengths, n_vocab=n_vocab, most_tokens=n_ctx)
        logits = self.loop.logits(self._pad(rows.ids))[:n_rows]  # (B, T', V)
        logits = tf.pad(logits, [[0, 0], [0, tf.maximum(width - tf.shape(logits)[1], 0)], [0, 0]])[:, :width]
        is_inside = tf.range(width)[None] < rows.lengths[:, None]  # (B, T)
        return {"logits": tf.where(is_inside[..., None], logits, 0.0), "error": rows.errors}

    def encode(self, text: tf.Tensor) -> Outputs:
        """Turns texts into ids."""
        ids = self.reader.encode(
            check_encoded(text, tf.size(text), 1)
        )  # too many rows are refused before they are read
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        lengths = check_encoded(lengths, tf.size(lengths), longest(lengths))
        return {"ids": cut(ids, tf.zeros_like(lengths), lengths), "lengths": lengths}

    def decode(self, ids: tf.Tensor, lengths: tf.Tensor) -> Outputs:
        """Turns ids into texts; an unknown id becomes U+FFFD. A length beyond the ids counts as their number."""
        ids, lengths = one_length_per_row(at_most(ids, MOST_IDS), lengths)
        lengths = tf.clip_by_value(lengths, 0, tf.shape(ids)[1])
        return {"text": certain_text(self.reader.in_graph, ids, lengths, tf.fill(tf.shape(lengths), True))}

    def _text(self, generated: Generated) -> tf.Tensor:
        return certain_text(self.reader.in_graph, generated.ids, generated.lengths, generated.finish_reason != "")

    def _pad(self, ids: tf.Tensor, n_positions: tf.Tensor | None = None) -> tf.Tensor:
        """Pads rows to a shape that the model runs on; fails if that is too large: (B, T) -> (B', T')."""
        n_rows = self.loop.n_rows(tf.shape(ids)[0])
        width = self.loop.n_positions(tf.shape(ids)[1])
        ids = check_positions(ids, n_rows, width if n_positions is None else n_positions)
        return tf.pad(ids, [[0, n_rows - tf.shape(ids)[0]], [0, width - tf.shape(ids)[1]]])

    def _generate(self, rows: Rows, prompt_lengths: tf.Tensor, options: Options) -> Generated:
        """Continues rows as their options say; rows with an error stay as they are."""
        n_rows = tf.shape(rows.ids)[0]
        options, errors = check_options(options, n_rows)
        errors = first_error(rows.errors, errors == "", errors)
        is_right = errors == ""
        n_new = tf.minimum(options["max_new_tokens"], self.config.n_ctx)
        ends = tf.minimum(prompt_lengths + n_new, self.config.n_ctx)  # (B,), where rows end
        limits = ends
        if "n_tokens" in options:
            limits = tf.minimum(ends, rows.lengths + tf.minimum(options["n_tokens"], self.config.n_ctx))
        limits = tf.where(is_right, tf.maximum(limits, rows.lengths), 0)
        continued = self._continue(rows, prompt_lengths, options, limits)
        reason = tf.where(continued.lengths < ends, "", tf.where(prompt_lengths + n_new <= ends, "length", "context"))
        reason = tf.where(continued.stopped, "stop", reason)
        starts = tf.where(is_right, prompt_lengths, continued.lengths)
        n_new = continued.lengths - starts
        columns = tf.range(longest(n_new))[None]  # (1, N)
        is_new = columns < n_new[:, None]
        places = tf.where(is_new, starts[:, None] + columns, 0)
        return Generated(
            ids=tf.where(is_new, tf.gather(continued.ids, places, batch_dims=1), 0),
            lengths=n_new,
            logprobs=tf.where(is_new, tf.gather(continued.logprobs, places, batch_dims=1), 0.0),
            finish_reason=tf.where(is_right, reason, tf.strings.join(["error: ", errors])),
        )

    def _continue(self, rows: Rows, prompt_lengths: tf.Tensor, options: Options, limits: tf.Tensor) -> Continued:
        """Pads the rows to shapes that the loop runs on, and cuts the padding off the result."""
        n_rows = tf.shape(rows.ids)[0]
        width = tf.reduce_max(tf.concat([rows.lengths, limits], axis=0))
        ids = self._pad(rows.ids[:, : self.config.n_ctx], self.loop.n_positions(width))
        padding = [[0, tf.shape(ids)[0] - n_rows]]

        def pad(x: tf.Tensor) -> tf.Tensor:
            return tf.pad(x, padding)

        lengths = tf.maximum(pad(rows.lengths), 1)
        prompts = Prompts(ids, lengths, tf.minimum(pad(prompt_lengths), lengths))
        spread = {name: tf.pad(x, padding, constant_values=neutral(name)) for name, x in options.items()}
        sampling = sampling_from(spread, tf.constant(self.bias))
        continued = self.loop.generate(prompts, sampling, Limits(pad(limits), tf.constant(self.stop_ids)))
        return Continued(*(x[:n_rows] for x in continued))


def check_encoded(x: tf.Tensor, n_rows: tf.Tensor, width: tf.Tensor | int) -> tf.Tensor:
    """Returns ``x``, or fails the request when ``encode`` would return more ids than ``MOST_IDS``."""
    n_places = places_of(n_rows, width)
    sentence = ("text gives", n_places, f"ids, rows times the longest, at most {MOST_IDS} are possible")
    return require(x, n_places <= MOST_IDS, *sentence)


def at_most(ids: tf.Tensor, most_places: int) -> tf.Tensor:
    """Returns ids, int32 (B, T), or fails the request when they have more than ``most_places`` places."""
    n_places = places_of(tf.shape(ids)[0], tf.shape(ids)[1])
    return require(ids, n_places <= most_places, f"ids must have at most {most_places} places in all, got", n_places)


def name_outputs(generated: Generated) -> Outputs:
    """Returns the outputs of a generation under the names that clients see."""
    return {
        "ids": generated.ids,
        "logprobs": generated.logprobs,
        "finish_reason": generated.finish_reason,
        "completion_length": generated.lengths,
    }
