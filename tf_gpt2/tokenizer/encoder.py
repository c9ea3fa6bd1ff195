"""Converts text to token ids and back by GPT-2's byte-level byte-pair encoding, exact for any text and any merges.

Text is cut into pieces (``PATTERN``: a word with its leading space, a number, a run of punctuation, of white space).
The UTF-8 bytes of a piece become symbols, one visible character per byte, and neighbouring symbols are merged in the
order of ``vocab.bpe`` until no merge applies. ``encoder.json`` lists the id of each remaining symbol.

Special tokens, such as ``<|endoftext|>``, are no pieces of text: they are ids that ``encode`` makes of their names only
where it is allowed to.

Knows nothing of models, of batches or of TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise, repeat
from pathlib import Path
from typing import SupportsIndex

import regex

from tf_gpt2.config import read_text
from tf_gpt2.errors import CheckpointError

END_OF_TEXT = "<|endoftext|>"
"""The token between documents. Source: openai/gpt-2, ``encoder.json``."""

PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""Cuts text into pieces. Source: openai/gpt-2, ``src/encoder.py``."""

ASCII_PATTERN = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
"""Cuts text of ASCII characters as ``PATTERN`` does, twice as fast."""

WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
r"""The characters that ``\s`` matches in ``PATTERN``; in ``re`` it matches U+001C to U+001F, too. Source: Unicode."""

CHUNK = re.compile(f"[{WHITE_SPACE}]*[^{WHITE_SPACE}]+|[{WHITE_SPACE}]+")
"""Cuts text before each run of white space, where a piece always ends: white space only begins a piece."""

WORD, SPACES = regex.compile(r"\w"), re.compile(f"[{WHITE_SPACE}]+")
"""A character of a word; white space, without U+001C to U+001F, which ``str.strip`` takes, too."""

MAX_CACHE_ENTRIES = 1 << 17
"""The cache is emptied when it has so many entries: about 20 MB for English, 100 MB for the worst text."""

MAX_CACHED_LENGTH = 64
"""Most characters and ids of one cache entry, together: longer strings seldom recur, and would fill the memory."""

MAX_ID = 2**31 - 1
"""The largest id: models take ids as int32."""

MOST_BYTES = 1 << 28
"""Upper bound of either file's length; OpenAI's have about 1 MB."""

REMEDY = "download the checkpoint again, as with tf_gpt2.download_gpt2_files"
COPY = "copy it from the checkpoint that the weights were trained from, or download it with tf_gpt2.download_gpt2_files"

SHORT = 32
"""Most symbols of a piece for which looking through all ranks at each merge is faster than keeping them in order."""

NEVER = MAX_ID + 1
"""The rank of a pair that does not merge."""

Pair = tuple[str, str]


def bytes_to_unicode() -> dict[int, str]:
    """Returns a visible character for each byte: its Latin-1 character if that is visible, else one from U+0100 on.

    So a token is a string without blanks or control characters, whatever its bytes: a space becomes ``Ġ``. The order
    is that of the first 256 ids of OpenAI's vocabulary.

    Source: openai/gpt-2, ``src/encoder.py``.
    """
    visible = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD)]
    invisible = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(invisible)}


@dataclasses.dataclass(frozen=True)
class SpecialToken:
    """A token that stands for itself, and is not made by merges.

    Attributes:
        id: its id.
        lstrip, rstrip: whether it takes the white space on its left, on its right, too.
        single_word: whether it counts only where no letter or digit is beside it.
        first: whether it is looked for before those that are not ``first``.
        control: whether it is a mark, which other programs may leave out of text, and not a word that was added.

    Source: huggingface/tokenizers, ``AddedToken``; ``first`` is the opposite of ``normalized``,
    ``control`` is ``special``.
    """

    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    first: bool = True
    control: bool = True


class Encoder:
    """A vocabulary with its merges: ``encode`` text to ids, ``decode`` ids to text.

    Threads may share an encoder.

    Args:
        encoder: token, in the form of ``bytes_to_unicode``, to id; the content of ``encoder.json``, not copied.
        bpe_merges: pairs of tokens, in the order in which to merge them; the content of ``vocab.bpe``.
        errors: how ``decode`` treats bytes that are not UTF-8, as for ``bytes.decode``.
        special_tokens: text of a special token to its id, or to a ``SpecialToken``; they need not be in ``encoder``. By
            default those in ``encoder`` that no merge makes, such as ``<|endoftext|>``.
        end_of_text: the special token between documents.

    Attributes:
        encoder, decoder: token to id, id to token; ``decoder`` has the special tokens, too.
        special_tokens: text to ``SpecialToken``.
        bpe_ranks: pair of tokens to its place in ``bpe_merges``.
        cache: ids of strings seen before, at most ``MAX_CACHE_ENTRIES``.
        byte_encoder, byte_decoder: byte to visible character, visible character to byte.
        errors, pat: as given; ``PATTERN``, compiled.

    Raises:
        ValueError: when a byte or the result of a merge has no id, two tokens share an id, or a token is not bytes.

    Example:
        >>> vocabulary = {symbol: id for id, symbol in enumerate(bytes_to_unicode().values())} | {"hi": 256}
        >>> Encoder(vocabulary, [("h", "i")]).encode("hi, hi")
        [256, 11, 220, 256]

    Source: openai/gpt-2, ``src/encoder.py``; Sennrich et al. 2016, section 3.2.
    """

    def __init__(
        self,
        encoder: dict[str, int],
        bpe_merges: Iterable[Pair],
        errors: str = "replace",
        *,
        special_tokens: Mapping[str, int | SpecialToken] | None = None,
        end_of_text: str = END_OF_TEXT,
    ) -> None:
        self.encoder = encoder
        self.decoder = {token_id: token for token, token_id in encoder.items()}
        self.bpe_ranks: dict[Pair, int] = {(left, right): rank for rank, (left, right) in enumerate(bpe_merges)}
        self.cache: dict[str, tuple[int, ...]] = {}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {symbol: byte for byte, symbol in self.byte_encoder.items()}
        self.errors = errors
        self.pat = regex.compile(PATTERN)
        self._check()
        of_text = self._special_by_default() if special_tokens is None else special_tokens
        self.special_tokens = {
            text: token if isinstance(token, SpecialToken) else SpecialToken(token) for text, token in of_text.items()
        }
        self._end_of_text = end_of_text
        self._patterns: dict[tuple[str, ...], regex.Pattern[str]] = {}
        self._add_special_tokens()

    @classmethod
    def from_files(cls, folder: str | Path) -> Encoder:
        """Reads ``encoder.json`` and ``vocab.bpe`` in a folder.

        Raises:
            CheckpointError: when a file is missing or has other content, or when the two do not fit each other.
        """
        folder = Path(folder)
        vocabulary, merges = _read_vocabulary(folder / "encoder.json"), _read_merges(folder / "vocab.bpe")
        try:
            encoder = cls(vocabulary, merges)
            encoder._check_complete()
        except ValueError as error:
            raise CheckpointError(f"encoder.json and vocab.bpe in {folder} do not fit: {error}; {REMEDY}") from error
        return encoder

    def __len__(self) -> int:
        return len(self.decoder)

    @property
    def end_of_text(self) -> int | None:
        """The id of ``<|endoftext|>``, or of the token in its place; None when the vocabulary has no such token."""
        token = self.special_tokens.get(self._end_of_text)
        return self.encoder.get(self._symbols(self._end_of_text)) if token is None else token.id

    def encode(self, text: str, *, allowed_special: str | Collection[str] = ()) -> list[int]:
        """Turns text into ids: by default never into special ones, ``<|endoftext|>`` is thirteen ordinary characters.

        ``decode`` returns the same text, unless it has surrogates, which UTF-8 cannot express: a pair becomes the
        character that it stands for, a lone one becomes U+FFFD.

        Args:
            text: the text.
            allowed_special: the special tokens whose names become their ids, such as ``{"<|endoftext|>"}``; ``"all"``
                allows all. Do not allow them in text that others wrote.

        Raises:
            TypeError: when ``text`` is not a str.
            ValueError: when ``allowed_special`` names a token that is not special.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}; use encode_batch for a list")
        allowed = self.allowed_special_tokens(allowed_special) if allowed_special else ()
        try:
            return self._encode_with(text, allowed)
        except UnicodeEncodeError:
            return self._encode_with(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), allowed)

    def encode_batch(self, texts: Iterable[str], *, allowed_special: str | Collection[str] = ()) -> list[list[int]]:
        """Turns each text into ids, as ``encode`` does; raises TypeError for a single str."""
        if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a list of str, got {texts!r}; encode takes one str")
        return [self.encode(text, allowed_special=allowed_special) for text in texts]

    def allowed_special_tokens(self, allowed_special: str | Collection[str]) -> tuple[str, ...]:
        """Returns the special tokens that ``allowed_special`` names, sorted; raises ValueError for others."""
        if isinstance(allowed_special, str) and allowed_special != "all":
            raise ValueError(f'allowed_special must be "all" or a set of tokens, got {allowed_special!r}')
        names = list(self.special_tokens if allowed_special == "all" else allowed_special)
        if unknown := sorted(str(name) for name in names if name not in self.special_tokens):
            known = ", ".join(list(self.special_tokens)[:20]) or "none"
            raise ValueError(f"allowed_special has {', '.join(unknown[:10])}; the special tokens are: {known}")
        return tuple(sorted(names))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Turns ids into text; bytes that are not UTF-8 become U+FFFD, or are treated as ``errors`` says.

        Args:
            ids: integers of any type, (T,).

        Raises:
            TypeError: when an id is not an integer.
            ValueError: when the vocabulary has no such id.
        """
        return self.decode_bytes(ids).decode("utf-8", self.errors)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Turns ids into the bytes that they stand for, which may end inside a character; else like ``decode``."""
        if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
            raise TypeError(f"ids must be a list of integers, got {ids!r}")
        return bytes([self.byte_decoder[symbol] for token_id in ids for symbol in self._token(token_id)])

    def bpe(self, token: str) -> str:
        """Returns the tokens of a piece, joined by spaces: shows how it is merged.

        Args:
            token: a piece in the form of ``bytes_to_unicode``; ``Ġcapes``, for example, becomes ``Ġcap es``.

        Raises:
            ValueError: when a character of ``token`` does not stand for a byte.
        """
        if foreign := set(token) - self.byte_decoder.keys():
            raise ValueError(f"token has {min(foreign)!r}, which stands for no byte; write it with bytes_to_unicode()")
        return " ".join(_merge(list(token), self.bpe_ranks))

    def _encode_with(self, text: str, allowed: tuple[str, ...]) -> list[int]:
        """Encodes text in which some special tokens count: those that are ``first``, then the others in the rest."""
        if not allowed:
            return self._encode(text)
        parts: list[str | int] = [text]
        for is_first in (True, False):
            names = tuple(name for name in allowed if self.special_tokens[name].first is is_first)
            if names:
                parts = [piece for part in parts for piece in self._cut_out(part, names)]
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode(part)
        return ids

    def _cut_out(self, part: str | int, names: tuple[str, ...]) -> list[str | int]:
        """Puts ids in the places of special tokens: the one that begins first, of those the longest."""
        if isinstance(part, int):
            return [part]
        pieces: list[str | int] = []
        end = 0
        for match in self._special_pattern(names).finditer(part):
            token = self.special_tokens[match[0]]
            start, stop = match.span()
            if token.single_word and (WORD.match(part, start - 1, start) or WORD.match(part, stop)):
                continue
            if token.lstrip:
                while start > end and SPACES.match(part, start - 1):
                    start -= 1
                start = max(start, end)
            if token.rstrip and (spaces := SPACES.match(part, stop)):
                stop = spaces.end()
            # white space that the token before took leaves nothing of this one
            pieces += [part[end:start], token.id] if start < stop else []
            end = stop
        return [*pieces, part[end:]]

    def _special_pattern(self, names: tuple[str, ...]) -> regex.Pattern[str]:
        if names not in self._patterns:
            longest_first = sorted(names, key=len, reverse=True)
            self._patterns[names] = regex.compile("|".join(map(regex.escape, longest_first)))
        return self._patterns[names]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        seen = self.cache.get
        for chunk in CHUNK.findall(text):
            ids += seen(chunk) or self._encode_chunk(chunk)
        return ids

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        # Pieces and chunks share the cache: a piece that is a text by itself is again one piece.
        pieces = ASCII_PATTERN.findall(chunk) if chunk.isascii() else self.pat.findall(chunk)
        if len(pieces) == 1:
            return self._encode_piece(chunk)
        ids: list[int] = []
        for piece in pieces:
            ids += self.cache.get(piece) or self._encode_piece(piece)
        return self._remember(chunk, tuple(ids))

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        symbols = [self.byte_encoder[byte] for byte in piece.encode("utf-8")]
        return self._remember(piece, tuple([self.encoder[symbol] for symbol in _merge(symbols, self.bpe_ranks)]))

    def _remember(self, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        # Needs no lock: at worst, threads drop each other's entries, or exceed the limit by a few.
        if len(text) + len(ids) <= MAX_CACHED_LENGTH:
            if len(self.cache) >= MAX_CACHE_ENTRIES:
                self.cache.clear()
            self.cache[text] = ids
        return ids

    def _token(self, token_id: SupportsIndex) -> str:
        try:
            return self.decoder[operator.index(token_id)]
        except TypeError:
            raise TypeError(f"ids has a {type(token_id).__name__}, not an integer; decode one row at a time") from None
        except KeyError:
            id_range = f"the ids of the {len(self)} tokens run from {min(self.decoder)} to {max(self.decoder)}"
            raise ValueError(f"ids has {token_id}, which the vocabulary lacks; {id_range}") from None

    def _check(self) -> None:
        if missing := [symbol for symbol in self.byte_decoder if symbol not in self.encoder]:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, the first is {missing[0]!r}")
        if len(self.decoder) < len(self.encoder):
            twice = next(token for token, token_id in self.encoder.items() if self.decoder[token_id] != token)
            raise ValueError(f"the tokens {twice!r} and {self.decoder[self.encoder[twice]]!r} have the same id")
        if foreign := set().union(*self.encoder) - self.byte_decoder.keys():
            raise ValueError(f"the vocabulary has a token with {min(foreign)!r}, which stands for no byte")
        for left, right in self.bpe_ranks:
            if not left or not right or left + right not in self.encoder:
                raise ValueError(f"merging {left!r} and {right!r} gives a token that the vocabulary lacks")

    def _check_complete(self) -> None:
        # PATTERN cuts special tokens into pieces. A merge makes each other token; if not, vocab.bpe was cut short.
        for token in self._unmade_tokens():
            if self.pat.fullmatch(self._bytes(token).decode("utf-8", "replace")):
                raise ValueError(f"no merge makes the token {token!r}")

    def _unmade_tokens(self) -> list[str]:
        """Returns the tokens that are no byte, and that no merge makes, in the order of their ids."""
        made = {left + right for left, right in self.bpe_ranks} | self.byte_decoder.keys()
        return sorted(self.encoder.keys() - made, key=self.encoder.__getitem__)

    def _special_by_default(self) -> dict[str, int]:
        """Returns the texts and ids of the tokens that no merge makes; a part of a character is no text."""
        special = {}
        for token in self._unmade_tokens():
            with contextlib.suppress(UnicodeDecodeError):
                special[self._bytes(token).decode("utf-8")] = self.encoder[token]
        return special

    def _bytes(self, token: str) -> bytes:
        return bytes([self.byte_decoder[symbol] for symbol in token])

    def _symbols(self, text: str) -> str:
        return "".join(self.byte_encoder[byte] for byte in text.encode("utf-8"))

    def _add_special_tokens(self) -> None:
        for text, token in self.special_tokens.items():
            if not isinstance(text, str) or not text:
                raise ValueError(f"special_tokens must have texts as names, got {text!r}")
            is_of_vocabulary = self.encoder.get(self._symbols(text)) == token.id
            if not is_of_vocabulary and (type(token.id) is not int or not 0 <= token.id <= MAX_ID):
                raise ValueError(f"special_tokens must have ids in [0, {MAX_ID}], got {token.id!r} for {text!r}")
            symbols = self._symbols(text)
            if self.decoder.setdefault(token.id, symbols) != symbols:
                raise ValueError(f"the special token {text!r} and {self.decoder[token.id]!r} have the same id")


def _merge(symbols: list[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Merges neighbours: each round takes the pair of lowest rank and merges it wherever it stands, left to right.

    A round ends before the pairs that it made are merged, so any order of ranks is right.

    Args:
        symbols: of one piece, (n,); the list is changed.
        ranks: the ranks of the pairs that may merge, all different.
    """
    return _merge_short(symbols, ranks) if len(symbols) <= SHORT else _merge_long(symbols, ranks)


def _merge_short(symbols: list[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Looks through all ranks for each merge, so that the work grows with the square of the length."""
    rank_of = ranks.get
    rank_at = [
        *map(rank_of, pairwise(symbols), repeat(NEVER)),
        NEVER,
    ]  # The rank of the pair that begins at each place.
    while (rank := min(rank_at)) != NEVER:
        while rank in rank_at:  # From left to right; what a round makes has other ranks.
            place = rank_at.index(rank)
            both = symbols[place] = symbols[place] + symbols.pop(place + 1)
            del rank_at[place]
            if place:
                rank_at[place - 1] = rank_of((symbols[place - 1], both), NEVER)
            if place + 1 < len(symbols):
                rank_at[place] = rank_of((both, symbols[place + 1]), NEVER)
    return symbols


def _merge_long(symbols: list[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Keeps a linked list over ``symbols`` and the places of each rank: the work grows with the number of merges."""
    rank_at = [*map(ranks.get, pairwise(symbols)), None]  # The rank of the pair that begins at each place.
    before, after = list(range(-1, len(symbols))), [*range(1, len(symbols) + 1), -1]
    symbols.append("")  # A symbol that never merges: behind the last one and, as index -1, before the first.
    places: dict[int, list[int]] = {}
    for place, rank in enumerate(rank_at):
        if rank is not None:
            places.setdefault(rank, []).append(place)
    waiting = sorted(places)  # A sorted list is a heap.
    while waiting:
        rank = heapq.heappop(waiting)
        # The places are in order, as "aaa" needs: one round makes all copies of a symbol, from left to right.
        for left in places.pop(rank):
            if rank_at[left] != rank:
                continue  # An earlier merge took one of the two, as in the middle of "aaa".
            right = after[left]
            symbols[left], symbols[right] = symbols[left] + symbols[right], ""
            after[left], rank_at[right] = after[right], None
            before[after[left]] = left
            for place in (before[left], left):
                made = rank_at[place] = ranks.get((symbols[place], symbols[after[place]]))
                if made is not None:
                    if made not in places:
                        heapq.heappush(waiting, made)
                    places.setdefault(made, []).append(place)
    return [symbol for symbol in symbols if symbol]


def _read_vocabulary(path: Path) -> dict[str, int]:
    text = _read_text(path)
    try:
        vocabulary = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for an integer of too many digits, and for deeply nested lists
        raise CheckpointError(f"{path} is not JSON: {error}; {REMEDY}") from error
    if not isinstance(vocabulary, dict) or any(type(token_id) is not int for token_id in vocabulary.values()):
        raise CheckpointError(f"{path} is not a vocabulary, an object whose values are integers; {REMEDY}")
    if any(not 0 <= token_id <= MAX_ID for token_id in vocabulary.values()):
        raise CheckpointError(f"{path} has ids outside [0, {MAX_ID}]; {REMEDY}")
    return vocabulary


def _read_merges(path: Path) -> list[Pair]:
    header, *lines = _read_text(path).rstrip("\n").split("\n")
    if not header.startswith("#version"):
        raise CheckpointError(f"{path} is not a list of merges, it starts with {header[:40]!r}; {REMEDY}")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    for left, right in merges:
        if not left or not right or " " in right:
            raise CheckpointError(f"{path} has {f'{left} {right}'[:40]!r} where a pair of tokens must be; {REMEDY}")
    return merges


def _read_text(path: Path) -> str:
    try:
        return read_text(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {COPY}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {REMEDY}") from error
