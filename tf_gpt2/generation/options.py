"""What a user asks of generation -> checked values; prompts -> checked rows, cut to the window if asked, padded.

Every error names the argument, the value and what is wanted. Knows nothing of text and of how tokens are chosen.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.loop import Limits, bucket
from tf_gpt2.generation.processors import EXCLUDED, Processing
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.runtime import kernels

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOP_IDS_BUCKET = 8
"""Stop ids are padded to 8, 16, … ids: another number of them compiles anew."""
TOP_BUCKET = 8
"""The likeliest ids are kept 8, 16, … at a time, for the same reason."""
WORDS_BUCKET, WORD_LENGTH_BUCKET = 8, 4
"""Bad words are padded to 8, 16, … words of 4, 8, … ids, for the same reason."""
LARGEST_INT = np.iinfo(np.int32).max
"""Larger integers mean the same: no row is so long, no vocabulary so large."""
LARGEST_BIAS = 1e6
"""A logit far above all others that still adds up without overflow in float32."""
OVERFLOWS = ERROR, TRUNCATE, SLIDE = "error", "truncate", "slide"
"""What to do with a text that is too long for the window; ``generate`` defines them."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen, as keyword arguments: one value for all rows, or one per row; the last three are for all.

    They apply in this order, which is Hugging Face's: ``logit_bias``, ``repetition_penalty``, ``presence_penalty`` and
    ``frequency_penalty``, ``no_repeat_ngram_size``, ``bad_words_ids``, ``min_new_tokens``, ``suppress``; and for a draw
    ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``typical_p``, each on what the one before left. When bans leave a
    row nothing at all to say, that one token is chosen from the model's own logits.

    Attributes:
        temperature: at least 0; 0, the default, takes the likeliest token after penalties and bans.
        top_k: draw from the k likeliest tokens only, of equals the lower id; 0 for all.
        top_p: in (0, 1]; draw from the smallest set of likeliest tokens whose mass reaches p (Holtzman et al. 2020).
        min_p: in [0, 1]; draw from tokens at least p times as likely as the likeliest; 0 for all (Nguyen et al. 2024).
        typical_p: in (0, 1]; draw from the smallest set of tokens whose mass reaches p and whose information is
            nearest the entropy, with all that are equally near; 1 for all (Meister et al. 2022).
        repetition_penalty: in [0.01, 100]; logits of ids in the prompt or the new text are divided by it if positive,
            multiplied if not; above 1 discourages repetition (Keskar et al. 2019).
        presence_penalty: in [-100, 100]; is subtracted from the logit of each id in the new text (OpenAI's API).
        frequency_penalty: in [-100, 100]; is subtracted as often as the id is in the new text (OpenAI's API).
        seed: in [0, 2**64); the same seed gives the same ids.
        no_repeat_ngram_size: no n ids in a row are said twice, those of the prompt included; 0 for no such rule.
        min_new_tokens: no stop id is chosen before there are so many new tokens.
        logit_bias: from id to what is added to its logit, at most 1e6 either way; -inf bans the id.
        bad_words_ids: sequences of ids that are not said: their last id is banned where the others come before it.
        suppress: ids that are not said.
    """

    temperature: float | Sequence[float]
    top_k: int | Sequence[int]
    top_p: float | Sequence[float]
    min_p: float | Sequence[float]
    typical_p: float | Sequence[float]
    repetition_penalty: float | Sequence[float]
    presence_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    seed: int | Sequence[int]
    no_repeat_ngram_size: int | Sequence[int]
    min_new_tokens: int | Sequence[int]
    logit_bias: Mapping[int, float]
    bad_words_ids: Sequence[Sequence[int]]
    suppress: Sequence[int]


class Rule(NamedTuple):
    """What a setting that each row may have its own of must be.

    Attributes:
        default: the value that changes nothing.
        dtype: to check it in: float32, or for integers int64, or object where they may be larger.
        holds: returns for each value of an array, or of a tensor, whether it is right.
        wanted: the same in words, after "must be".
    """

    default: float
    dtype: type
    holds: Callable[[np.ndarray], np.ndarray]
    wanted: str


PENALTY = Rule(0.0, np.float32, lambda x: abs(x) <= 100, "in [-100, 100] (0 changes nothing)")
RULES = {
    "temperature": Rule(0.0, np.float32, lambda x: (x >= 0) & (x < np.inf), "finite and at least 0"),
    "top_k": Rule(0, np.int64, lambda x: x >= 0, "at least 0 (0 keeps all)"),
    "top_p": Rule(1.0, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1] (1 keeps all)"),
    "min_p": Rule(0.0, np.float32, lambda x: (x >= 0) & (x <= 1), "in [0, 1] (0 keeps all)"),
    "typical_p": Rule(1.0, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1] (1 keeps all)"),
    "repetition_penalty": Rule(
        1.0, np.float32, lambda x: (x >= 0.01) & (x <= 100), "in [0.01, 100] (1 changes nothing)"
    ),
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "seed": Rule(0, object, lambda x: (x >= 0) & (x < 2**64), "an integer in [0, 2**64)"),
    "no_repeat_ngram_size": Rule(0, np.int64, lambda x: x >= 0, "at least 0 (0 allows all)"),
    "min_new_tokens": Rule(0, np.int64, lambda x: x >= 0, "at least 0"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SamplingValues:
    """``SamplingOptions``, checked.

    Attributes:
        per_prompt: each option of ``RULES`` by name, one value for all prompts, (), or one per prompt, (n,): float32 or
            int32, but seeds as objects, Python's integers.
        bias: float32 (V,), is added to each row's logits; ``EXCLUDED`` for ids that are not said.
        bad_words: int32 (N, M), the sequences of two ids and more that are not said, see ``pad_words``.
    """

    per_prompt: Mapping[str, np.ndarray]
    bias: np.ndarray
    bad_words: np.ndarray

    @property
    def names(self) -> list[str]:
        """The options that have one value per prompt."""
        return [name for name, values in self.per_prompt.items() if values.ndim]

    @property
    def n_values(self) -> int | None:
        """How many values these have; ``None`` if there is no such option."""
        return next((len(self.per_prompt[name]) for name in self.names), None)

    def of_prompts(self, places: Sequence[int]) -> SamplingValues:
        """Picks the values of some prompts, so that the first of ``places`` is the first prompt, and so on."""
        picked = {name: self.per_prompt[name][list(places)] for name in self.names}
        return dataclasses.replace(self, per_prompt={**self.per_prompt, **picked})

    def spread(self, n_prompts: int, n_samples: int = 1) -> Sampling:
        """Makes tensors with one value per row; a prompt's samples differ in their seeds, which follow one another."""
        arrays = {name: np.broadcast_to(values, (n_prompts,)) for name, values in self.per_prompt.items()}
        seeds = [seed + i for seed in arrays.pop("seed") for i in range(n_samples)]
        tensors = {name: tf.constant(np.repeat(values, n_samples)) for name, values in arrays.items()}
        of_processing = {name: tensors.pop(name) for name in Processing._fields if name in tensors}
        return Sampling(
            seeds=tf.constant(np.array([[seed & 0xFFFFFFFF, seed >> 32] for seed in seeds], np.uint32)),
            processing=Processing(bias=tf.constant(self.bias), bad_words=tf.constant(self.bad_words), **of_processing),
            n_before=tf.zeros(len(seeds), tf.int32),
            n_new=tf.zeros(len(seeds), tf.int32),
            **tensors,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """All that a user asks of one generation, checked: ``make_request`` makes it. ``generate`` defines the options.

    Attributes:
        max_new_tokens: most new tokens per row, at least 0.
        stop_ids: int32 (K,), ids that end a row, padded with -1.
        num_samples: how many rows each prompt has, at least 1.
        top_logprobs: how many of the likeliest ids to return beside each new id, in [0, n_vocab].
        overflow: one of ``OVERFLOWS``.
        prompt_lookup: whether to guess the next tokens from the text so far.
        jit_compile: whether XLA compiles.
        sampling: how to choose.
    """

    max_new_tokens: int
    stop_ids: np.ndarray
    num_samples: int
    top_logprobs: int
    overflow: str
    prompt_lookup: bool
    jit_compile: bool
    sampling: SamplingValues

    def of_prompts(self, places: Sequence[int]) -> Request:
        """Returns the request for some of the prompts."""
        return dataclasses.replace(self, sampling=self.sampling.of_prompts(places))

    def sampling_of(self, n_prompts: int) -> Sampling:
        """Makes tensors of how the rows of ``n_prompts`` prompts choose: B * num_samples rows."""
        return self.sampling.spread(n_prompts, self.num_samples)

    def limits_of(self, rows: list[np.ndarray], config: GPT2Config) -> Limits:
        """Makes tensors of when rows end, one row per sample."""
        return make_limits(rows, self.max_new_tokens, self.stop_ids, config)


def make_request(
    model: GPT2Model,
    n_prompts: int | None,
    *,
    max_new_tokens: int = 40,
    stop_ids: Sequence[int] = (),
    num_samples: int = 1,
    top_logprobs: int = 0,
    overflow: str = ERROR,
    prompt_lookup: bool = False,
    jit_compile: bool = True,
    **options: Unpack[SamplingOptions],
) -> Request:
    """Checks all that a user asks, but the prompts and the options' names.

    Args:
        model: the model that is asked.
        n_prompts: how many prompts there are; ``None`` if nobody knows yet: as many as the first option has values that
            has one per prompt.
        max_new_tokens: as for ``generate``, like all that follows.
        stop_ids: ids that end a row.
        num_samples: how many texts per prompt.
        top_logprobs: how many of the likeliest ids to return beside each new id.
        overflow: what to do with a row that is too long for the window.
        prompt_lookup: whether to guess the next tokens.
        jit_compile: whether XLA compiles.
        **options: how to choose; their names are taken as valid.

    Raises:
        TypeError: when an option is of a wrong type.
        ValueError: when an option is out of range, or the model cannot do what is asked.
    """
    config = model.config
    max_new_tokens = check_max_new_tokens(max_new_tokens)
    check_overflow(overflow)
    (num_samples,) = check_counts(num_samples=num_samples)
    request = Request(
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        top_logprobs=check_top(top_logprobs, config),
        overflow=overflow,
        prompt_lookup=prompt_lookup,
        jit_compile=jit_compile,
        sampling=check_sampling(n_prompts, config, num_samples, **options),
        stop_ids=check_stop_ids(stop_ids, config),
    )
    if prompt_lookup:
        check_lookup(model, request)
    return request


def check_lookup(model: GPT2Model, request: Request) -> None:
    """Raises ValueError where look-up is slower, could change tokens, or is not implemented."""
    if request.overflow == SLIDE or request.top_logprobs:
        raise ValueError("prompt_lookup must be False with top_logprobs and with overflow='slide'")
    reads_weights_once = model.quantization is None or (request.jit_compile and kernels.are_chosen())
    if model.compute_dtype != "float32" or not reads_weights_once:
        raise ValueError(
            f"prompt_lookup must be False for a model that computes in {model.compute_dtype} with "
            f"quantization={model.quantization!r}: it pays only in float32, and with quantization only where XLA and "
            "native kernels compute (tf-gpt2 info tells)"
        )


def check_sampling(
    n_prompts: int | None, config: GPT2Config, n_samples: int = 1, **options: Unpack[SamplingOptions]
) -> SamplingValues:
    """Checks how to choose; options that all rows share become one table with a number per id."""
    asked: dict[str, Any] = dict(options)
    if n_prompts is None:
        n_prompts = next((len(value) for name, value in asked.items() if name in RULES and has_values(value)), 1)
    per_prompt = {
        name: check_values(name, asked.get(name, rule.default), n_prompts, rule) for name, rule in RULES.items()
    }
    check_sample_seeds(per_prompt["seed"], n_samples)
    words = check_words(asked.get("bad_words_ids", ()), config)
    bias = make_bias(asked.get("logit_bias", {}), asked.get("suppress", ()), words, config)
    return SamplingValues(per_prompt=per_prompt, bias=bias, bad_words=pad_words(words))


def check_sample_seeds(seeds: np.ndarray, n_samples: int) -> None:
    """Raises ValueError when a seed leaves no room for those of a prompt's other samples, which follow it."""
    largest = max(seeds.flat, default=0)
    if largest + n_samples > 2**64:
        raise ValueError(f"seed must be at most 2**64 - {n_samples} for {n_samples} samples, got {largest}")


def check_names(options: Mapping[str, Any], *functions: Callable[..., Any], without: Sequence[str] = ()) -> None:
    """Raises TypeError unless each name is in ``SamplingOptions`` or is a keyword argument of one of the functions."""
    if options.keys() <= SamplingOptions.__annotations__.keys():
        return
    parameters = [parameter for one in functions for parameter in inspect.signature(one).parameters.values()]
    own = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in without]
    names = list(dict.fromkeys([*own, *SamplingOptions.__annotations__]))
    for name in options:
        if name not in names:
            meant = "".join(f", did you mean {near!r}" for near in difflib.get_close_matches(name, names, 1))
            raise TypeError(f"{name!r} is no option of generation{meant}; there are {', '.join(names)}")


def has_values(value: object) -> bool:
    """Whether an option is a list or an array."""
    return len(getattr(value, "shape", ())) > 0 or (isinstance(value, Sequence) and not isinstance(value, str))


def check_values(name: str, value: object, n_prompts: int, rule: Rule) -> np.ndarray:
    """Checks a setting; returns its only value, (), or one per prompt, (n_prompts,)."""
    is_number = rule.dtype is np.float32
    array = numbers(value) if is_number else integers(value, rule.dtype)
    if array is None:
        raise ValueError(
            f"{name} must be {'a number' if is_number else 'an integer'}, or one per prompt, got {value!r}"
        )
    if array.ndim > 0 and array.shape != (n_prompts,):
        raise ValueError(f"{name} must be a number or have one value per prompt ({n_prompts}), got {value!r}")
    if not np.all(rule.holds(array)):
        raise ValueError(f"{name} must be {rule.wanted}, got {value!r}")
    return in_32_bits(array)


def numbers(value: object) -> np.ndarray | None:
    """Converts numbers of any types to float32; returns ``None`` when a value is not a number, or is a bool."""
    try:
        array = np.asarray(value)
        has_bool = any(isinstance(x, (bool, np.bool_)) for x in np.asarray(value, object).flat)
    except ValueError:  # ragged
        return None
    if array.dtype.kind not in "iuf" or has_bool:
        return None
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def integers(value: object, dtype: type) -> np.ndarray | None:
    """Converts integers of any types, one by one, to a dtype; returns ``None`` when one is no integer or too large."""
    try:
        array = np.asarray(value, object)
        converted = [integer_of(x) for x in array.flat]
        return None if None in converted else np.array(converted, dtype).reshape(array.shape)
    except (ValueError, OverflowError):  # ragged, or too large
        return None


def integer_of(value: object) -> int | None:
    """Converts an integer of Python, NumPy or TensorFlow to Python's; returns ``None`` for all else, bool included.

    Compare and count with the returned integer: small types overflow, and tensors refuse numbers of other types.
    """
    if type(value) is int:
        return value
    try:
        scalar = np.asarray(value, object)
        if scalar.ndim or isinstance(scalar.item(), (bool, np.bool_)):
            return None
        return operator.index(scalar.item())
    except (TypeError, ValueError, NotImplementedError):  # the last from tensors without a value
        return None


def items_of(values: object) -> list[Any] | None:
    """Lists what several values hold; returns ``None`` for a text, a mapping, a scalar of NumPy or TensorFlow, …."""
    if isinstance(values, (str, bytes, Mapping)):
        return None
    try:
        return list(values)  # type: ignore[call-overload]
    except TypeError:
        return None


def in_32_bits(array: np.ndarray) -> np.ndarray:
    """Converts int64 to int32, and what is too large to the largest there; leaves other dtypes as they are."""
    return np.minimum(array, LARGEST_INT).astype(np.int32) if array.dtype == np.int64 else array


def make_bias(
    logit_bias: Mapping[int, float], suppress: Iterable[int], words: list[list[int]], config: GPT2Config
) -> np.ndarray:
    """Returns what is added to each id's logit, float32 (V,): ``EXCLUDED`` for ids that are never said."""
    if not isinstance(logit_bias, Mapping):
        raise TypeError(f"logit_bias must be a dict from ids to numbers, got {logit_bias!r}")
    ids = check_ids("logit_bias", list(logit_bias), config)
    bias = np.zeros(config.n_vocab, np.float32)
    for i, value in zip(ids, logit_bias.values(), strict=True):
        number = np.asarray(value)
        if number.dtype.kind not in "iuf" or number.ndim:
            raise TypeError(f"logit_bias must have numbers as values, got {value!r} for id {i}")
        if not abs(float(number)) <= LARGEST_BIAS and number != -np.inf:
            raise ValueError(f"logit_bias must have values in [-1e6, 1e6], or -inf for a ban, got {value!r} for id {i}")
        bias[i] = max(float(number), EXCLUDED)
    bias[check_ids("suppress", suppress, config)] = EXCLUDED
    bias[[word[0] for word in words if len(word) == 1]] = EXCLUDED
    if (bias == EXCLUDED).all():
        raise ValueError(
            f"suppress, logit_bias and bad_words_ids must leave one id of {config.n_vocab}: all are banned"
        )
    return bias


def check_words(words: Iterable[Sequence[int]], config: GPT2Config) -> list[list[int]]:
    """Returns the sequences that are not to be said as lists of ids."""
    listed = items_of(words)
    if listed is None:
        raise TypeError(f"bad_words_ids must be a list of lists of ids, got {words!r}")
    checked = [check_ids(f"bad_words_ids[{i}]", word, config) for i, word in enumerate(listed)]
    if [] in checked:
        raise ValueError(f"bad_words_ids[{checked.index([])}] must have at least one id, got {words!r}")
    return checked


def pad_words(words: list[list[int]]) -> np.ndarray:
    """Puts the sequences of two ids and more into int32 (N, M), ends aligned, -1 elsewhere.

    N and M are powers of two, since another shape compiles anew.
    """
    longer = [word for word in words if len(word) > 1]
    shape = power_of_two(len(longer), WORDS_BUCKET), power_of_two(max(map(len, longer), default=0), WORD_LENGTH_BUCKET)
    padded = np.full(shape, -1, np.int32)
    for row, word in zip(padded, longer, strict=False):
        row[-len(word) :] = word
    return padded


def power_of_two(number: int, smallest: int) -> int:
    """Rounds up to a power of two, at least ``smallest``."""
    return max(smallest, 1 << (number - 1).bit_length() if number else 0)


def check_ids(name: str, ids: Iterable[int], config: GPT2Config) -> list[int]:
    """Returns ids of any integer type as Python's integers; each must be in the vocabulary."""
    listed = items_of(ids)
    checked = [] if listed is None else [i for i in map(integer_of, listed) if i is not None]
    if listed is None or len(checked) < len(listed):
        raise TypeError(f"{name} must be a list of ids, got {ids!r}")
    outside = [i for i in checked if not 0 <= i < config.n_vocab]
    if outside:
        raise ValueError(f"{name} must lie in [0, {config.n_vocab}), got {outside}")
    return checked


def check_row(name: str, ids: Sequence[int], config: GPT2Config) -> np.ndarray:
    """Checks one row and returns it as int32 (T,)."""
    row: np.ndarray | None
    try:
        row = np.asarray(ids)
    except ValueError:  # ragged: a list of lists
        row = None
    if row is not None and row.dtype.kind not in "iu":  # as of integers of several types
        row = integers(ids, object)
    if row is None or row.ndim != 1:
        raise TypeError(f"{name} must be a list of integers, got {ids!r}; wrap one list of ids as [ids]")
    if row.size and (row.min() < 0 or row.max() >= config.n_vocab):
        raise ValueError(f"{name} must have ids in [0, {config.n_vocab}), got {row.min()} to {row.max()}")
    return row.astype(np.int32)


def check_counts(**counts: object) -> list[int]:
    """Returns the values as Python's integers, in order; raises ValueError unless each is an integer of at least 1."""
    checked = []
    for name, value in counts.items():
        count = integer_of(value)
        if count is None or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        checked.append(count)
    return checked


def check_top(top_logprobs: object, config: GPT2Config) -> int:
    """Returns how many alternatives are wanted, as Python's integer."""
    n = integer_of(top_logprobs)
    if n is None or not 0 <= n <= config.n_vocab:
        raise ValueError(f"top_logprobs must be an integer in [0, n_vocab={config.n_vocab}], got {top_logprobs!r}")
    return n


def top_to_keep(top_logprobs: int, config: GPT2Config) -> int:
    """Rounds up the number of alternatives, as another number compiles anew."""
    return min(power_of_two(top_logprobs, TOP_BUCKET), config.n_vocab) if top_logprobs else 0


def check_stride(stride: object, config: GPT2Config) -> int:
    """Returns by how many tokens a window moves on, as Python's integer."""
    n = integer_of(stride)
    if n is None or not 1 <= n <= config.n_ctx:
        raise ValueError(f"stride must be an integer in [1, n_ctx={config.n_ctx}], got {stride!r}")
    return n


def check_max_new_tokens(max_new_tokens: object) -> int:
    """Returns an integer of any type as Python's; raises TypeError or ValueError unless it is at least 0."""
    n = integer_of(max_new_tokens)
    if n is None:
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if n < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {n}")
    return n


def check_stop_ids(stop_ids: Sequence[int], config: GPT2Config) -> np.ndarray:
    """Returns the stop ids as int32 (K,), padded with -1 to a power of two, as another number compiles anew."""
    ids = check_ids("stop_ids", stop_ids, config)
    return np.array(ids + [-1] * (power_of_two(len(ids), STOP_IDS_BUCKET) - len(ids)), np.int32)


def make_limits(rows: list[np.ndarray], max_new_tokens: int, stop_ids: np.ndarray, config: GPT2Config) -> Limits:
    """Makes tensors of when rows end: where the window does, at the latest."""
    lengths = [min(len(row) + min(max_new_tokens, config.n_ctx), config.n_ctx) for row in rows]
    return Limits(lengths=tf.constant(lengths, tf.int32), stop_ids=tf.constant(stop_ids))


def fit_rows(rows: list[np.ndarray], request: Request, config: GPT2Config) -> tuple[list[np.ndarray], list[int]]:
    """Returns the prompts, and how many tokens at the beginning of each the model will not see.

    With ``"truncate"`` these are cut off. With ``"slide"`` the rows stay whole: the window moves over them.
    """
    if request.overflow == SLIDE:
        return rows, [window_start(len(row), config.n_ctx) for row in rows]
    n_kept = max(1, config.n_ctx - max(1, request.max_new_tokens)) if request.overflow == TRUNCATE else config.n_ctx
    return [row[-n_kept:] for row in rows], [max(0, len(row) - n_kept) for row in rows]


def window_start(length: int, n_ctx: int) -> int:
    """Computes where the window begins from which the token behind a text of ``length`` is chosen.

    It moves on by half as soon as it is full, and so depends on the text's length alone, not on what was read when.
    """
    stride = n_ctx - n_ctx // 2
    return 0 if length < n_ctx else stride * ((length - n_ctx) // stride + 1)


def check_prompts(prompts: Sequence[Sequence[int]], config: GPT2Config, *, overflow: str = ERROR) -> list[np.ndarray]:
    """Returns the prompts as arrays; those longer than the window pass only if ``overflow`` can handle them."""
    listed = items_of(prompts) if hasattr(prompts, "__len__") else None
    if not listed:
        raise ValueError(f"prompts must be a non-empty list of lists of ids, got {prompts!r}")
    return [check_prompt(f"prompts[{i}]", prompt, config, overflow=overflow) for i, prompt in enumerate(listed)]


def check_prompt(name: str, prompt: Sequence[int], config: GPT2Config, *, overflow: str) -> np.ndarray:
    """Checks one prompt and returns it as int32 (T,)."""
    row = check_row(name, prompt, config)
    if row.size == 0:
        raise ValueError(f"{name} is empty; start from the id of <|endoftext|> for text from nothing")
    if row.size >= config.n_ctx and (overflow == ERROR or config.n_ctx == 1):
        raise ContextLengthError(
            f"{name} has {row.size} tokens, which leaves no room in the window of n_ctx={config.n_ctx}; "
            f"cut it to {config.n_ctx - 1} or fewer, or let generate do so with overflow='truncate' or 'slide'"
        )
    return row


def check_overflow(overflow: str) -> None:
    """Raises ValueError unless ``overflow`` is one of ``OVERFLOWS``."""
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)}, got {overflow!r}")


def pad(rows: list[np.ndarray], config: GPT2Config) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns ragged rows as int32 (B, T), T a bucket, and their lengths, int32 (B,)."""
    longest = max(map(len, rows))
    return tf.constant(pad_rows(rows, bucket(longest, config.n_ctx))), tf.constant([len(row) for row in rows], tf.int32)


def pad_rows(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Puts ragged rows, each (T, …), into (B, T, …), zeros behind; there is no padding token, lengths tell."""
    padded = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for wide, row in zip(padded, rows, strict=True):
        wide[: len(row)] = row
    return padded
