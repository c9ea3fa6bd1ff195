"""What a user asks of generation -> checked tensors, one value per row or one table for all.

Every refusal names the argument, what it got and what it wants. Knows nothing of how tokens are chosen.
"""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.choose import Sampling
from tf_gpt2.generation.loop import Limits
from tf_gpt2.generation.processors import Processing

if TYPE_CHECKING:
    from typing_extensions import Unpack

STOP_IDS_BUCKET = 8
TOP_BUCKET = 8
WORDS_BUCKET, WORD_LENGTH_BUCKET = 8, 4
LARGEST_INT = np.iinfo(np.int32).max
LARGEST_BIAS = 1e6

KINDS = {"int64": ("iu", "an integer"), "float32": ("iuf", "a number"), "object": ("O", "an integer")}
"""For each dtype, the kinds of NumPy array that are taken for it, and what to call them."""


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
        dtype: to check it in.
        holds: says for each value of an array, or of a tensor, whether it is right.
        wanted: the same in words, after "must be".
    """

    default: float
    dtype: type
    holds: Callable[[np.ndarray], np.ndarray]
    wanted: str


def is_seed(values: np.ndarray) -> np.ndarray:
    """Says which objects are seeds."""
    return np.array([is_integer(value) and 0 <= value < 2**64 for value in values])


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
    "seed": Rule(0, object, is_seed, "an integer in [0, 2**64)"),
    "no_repeat_ngram_size": Rule(0, np.int64, lambda x: x >= 0, "at least 0 (0 allows all)"),
    "min_new_tokens": Rule(0, np.int64, lambda x: x >= 0, "at least 0"),
}


def make_sampling(
    n_prompts: int, config: GPT2Config, n_samples: int = 1, **options: Unpack[SamplingOptions]
) -> Sampling:
    """Checks the options and spreads each over the prompts' samples; a table of all ids holds what is for all rows."""
    given: dict[str, Any] = dict(options)
    check_names(given)
    values = {name: per_row(name, given.get(name, rule.default), n_prompts, rule) for name, rule in RULES.items()}
    seeds = [[seed & 0xFFFFFFFF, seed >> 32] for seed in sample_seeds(values.pop("seed"), n_samples)]
    tensors = {name: tf.constant(np.repeat(in_32_bits(value), n_samples)) for name, value in values.items()}
    words = check_words(given.get("bad_words_ids", ()), config)
    bias = make_bias(given.get("logit_bias", {}), given.get("suppress", ()), words, config)
    of_rows = {name: tensors.pop(name) for name in Processing._fields if name in tensors}
    processing = Processing(bias=tf.constant(bias), bad_words=tf.constant(pad_words(words)), **of_rows)
    tensors |= dict.fromkeys(("n_before", "n_new"), tf.zeros(len(seeds), tf.int32))
    return Sampling(seeds=tf.constant(np.array(seeds, np.uint32)), processing=processing, **tensors)


def sample_seeds(seeds: np.ndarray, n_samples: int) -> list[int]:
    """Gives each prompt's samples seeds that follow one another."""
    all_seeds = [int(seed) + i for seed in seeds for i in range(n_samples)]
    if max(all_seeds, default=0) >= 2**64:
        raise ValueError(f"seed must be at most 2**64 - {n_samples} for {n_samples} samples, got {max(seeds)}")
    return all_seeds


def check_names(options: Mapping[str, Any], *functions: Callable[..., Any], without: Sequence[str] = ()) -> None:
    """Refuses what is neither in ``SamplingOptions`` nor an argument by name of the functions that take them."""
    if options.keys() <= SamplingOptions.__annotations__.keys():
        return
    parameters = [parameter for one in functions for parameter in inspect.signature(one).parameters.values()]
    own = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in without]
    names = list(dict.fromkeys([*own, *SamplingOptions.__annotations__]))
    for name in options:
        if name not in names:
            meant = "".join(f", did you mean {near!r}" for near in difflib.get_close_matches(name, names, 1))
            raise TypeError(f"{name!r} is no option of generation{meant}; there are {', '.join(names)}")


def per_row(name: str, value: object, n_rows: int, rule: Rule) -> np.ndarray:
    """Checks a setting and spreads it over the rows, if there is not one value per row."""
    kinds, what = KINDS[np.dtype(rule.dtype).name]
    try:
        array: np.ndarray = np.asarray(value, object if rule.dtype is object else None)
        has_bool = any(isinstance(x, bool) for x in np.asarray(value, object).flat)
    except ValueError:  # ragged
        array, has_bool = np.array(""), False
    if array.dtype.kind not in kinds or has_bool:
        raise ValueError(f"{name} must be {what}, or one per prompt, got {value!r}")
    with np.errstate(over="ignore"):
        array = array.astype(rule.dtype)
    if array.ndim > 0 and array.shape != (n_rows,):
        raise ValueError(f"{name} must be a number or have one value per prompt ({n_rows}), got {value!r}")
    array = np.broadcast_to(array, (n_rows,))
    if not rule.holds(array).all():
        raise ValueError(f"{name} must be {rule.wanted}, got {value!r}")
    return array


def in_32_bits(array: np.ndarray) -> np.ndarray:
    """Takes an integer beyond int32 for the largest there: no row is so long, no vocabulary so large."""
    return array if array.dtype == np.float32 else np.minimum(array, LARGEST_INT).astype(np.int32)


def make_bias(
    logit_bias: Mapping[int, float], suppress: Iterable[int], words: list[list[int]], config: GPT2Config
) -> np.ndarray:
    """Gives what is added to each id's logit, float32 (V,): -inf for what is never said."""
    if not isinstance(logit_bias, Mapping):
        raise TypeError(f"logit_bias must be a dict from ids to numbers, got {logit_bias!r}")
    ids = check_ids("logit_bias", logit_bias, config)
    bias = np.zeros(config.n_vocab, np.float32)
    for i, value in zip(ids, logit_bias.values(), strict=True):
        if isinstance(value, bool) or np.asarray(value).dtype.kind not in "iuf" or np.ndim(value):
            raise TypeError(f"logit_bias must have numbers as values, got {value!r} for id {i}")
        if not abs(value) <= LARGEST_BIAS and value != -np.inf:
            raise ValueError(f"logit_bias must have values in [-1e6, 1e6], or -inf for a ban, got {value!r} for id {i}")
        bias[i] = value
    bias[check_ids("suppress", suppress, config)] = -np.inf
    bias[[word[0] for word in words if len(word) == 1]] = -np.inf
    if not np.isfinite(bias).any():
        raise ValueError(
            f"suppress, logit_bias and bad_words_ids must leave one id of {config.n_vocab}: all are banned"
        )
    return bias


def check_words(words: Iterable[Sequence[int]], config: GPT2Config) -> list[list[int]]:
    """Checks the sequences that are not to be said."""
    if isinstance(words, (str, bytes, Mapping)) or not isinstance(words, Iterable):
        raise TypeError(f"bad_words_ids must be a list of lists of ids, got {words!r}")
    checked = [check_ids(f"bad_words_ids[{i}]", word, config) for i, word in enumerate(words)]
    if [] in checked:
        raise ValueError(f"bad_words_ids[{checked.index([])}] must have at least one id, got {words!r}")
    return checked


def pad_words(words: list[list[int]]) -> np.ndarray:
    """Puts the sequences of two ids and more into int32 (N, M), ends aligned, -1 elsewhere.

    Powers of two, since another shape compiles anew.
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
    """Checks a list of ids of any integer type."""
    listed = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)) else [None]
    if not all(map(is_integer, listed)):
        raise TypeError(f"{name} must be a list of ids, got {ids!r}")
    checked = [operator.index(i) for i in listed]  # type: ignore[arg-type]
    outside = [i for i in checked if not 0 <= i < config.n_vocab]
    if outside:
        raise ValueError(f"{name} must lie in [0, {config.n_vocab}), got {outside}")
    return checked


def check_row(name: str, ids: Sequence[int], config: GPT2Config) -> np.ndarray:
    """Checks one row and gives it as int32 (T,)."""
    try:
        row = np.asarray(ids)
    except ValueError:  # ragged: a list of lists
        row = np.empty((0, 0))
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be a list of integers, got {ids!r}; wrap one list of ids as [ids]")
    if row.size and (row.min() < 0 or row.max() >= config.n_vocab):
        raise ValueError(f"{name} must have ids in [0, {config.n_vocab}), got {row.min()} to {row.max()}")
    return row.astype(np.int32)


def is_integer(value: object) -> bool:
    """Says whether a value is an integer, of Python's or NumPy's, and no bool."""
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_)) and np.ndim(value) == 0  # type: ignore[arg-type]


def check_counts(**counts: int) -> None:
    """Refuses what is no integer from 1 on."""
    for name, value in counts.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_top(top_logprobs: int, config: GPT2Config) -> int:
    """Checks how many alternatives are wanted; gives how many to keep, as another number compiles anew."""
    if not is_integer(top_logprobs) or not 0 <= top_logprobs <= config.n_vocab:
        raise ValueError(f"top_logprobs must be an integer in [0, n_vocab={config.n_vocab}], got {top_logprobs!r}")
    return min(power_of_two(int(top_logprobs), TOP_BUCKET), config.n_vocab) if top_logprobs else 0


def check_max_new_tokens(max_new_tokens: int) -> int:
    """Gives an integer of any type as Python's; refuses what is none from 0 on."""
    if not is_integer(max_new_tokens):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    return operator.index(max_new_tokens)


def make_limits(rows: list[np.ndarray], max_new_tokens: int, stop_ids: Sequence[int], config: GPT2Config) -> Limits:
    """Says when rows end; pads the stop ids with -1 to a power of two, as another number compiles anew."""
    max_new_tokens = check_max_new_tokens(max_new_tokens)
    ids = check_ids("stop_ids", stop_ids, config)
    padding = [-1] * (power_of_two(len(ids), STOP_IDS_BUCKET) - len(ids))
    lengths = [min(len(row) + min(max_new_tokens, config.n_ctx), config.n_ctx) for row in rows]
    return Limits(lengths=tf.constant(lengths, tf.int32), stop_ids=tf.constant(ids + padding, tf.int32))
