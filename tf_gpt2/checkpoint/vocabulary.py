"""Reads and writes a vocabulary in each format: OpenAI's two files, Hugging Face's, and GGUF's metadata.

A tokenizer that is not GPT-2's byte-level BPE becomes a ``RefusingEncoder``. Needs no TensorFlow.

Source: huggingface/tokenizers; transformers 5.24, ``models/gpt2/tokenization_gpt2.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tf_gpt2.checkpoint import gguf
from tf_gpt2.checkpoint.genuine import ENCODER, MERGES as OPENAI_MERGES
from tf_gpt2.checkpoint.huggingface import read_json
from tf_gpt2.config import read_text
from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer.encoder import END_OF_TEXT, MOST_BYTES, Encoder, Pair, SpecialToken
from tf_gpt2.tokenizer.refusing import RefusingEncoder

TOKENIZER, TOKENIZER_CONFIG, SPECIAL, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARY, MERGES = "vocab.json", "merges.txt"
OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
"""Files of tokenizers that are not byte-level BPE."""

ROLES = (
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    *("additional_special_tokens", "extra_special_tokens"),
)
"""Keys of ``tokenizer_config.json`` and ``special_tokens_map.json`` that name special tokens."""

CUTTING = ("type", "add_prefix_space", "use_regex")
"""Keys of ``pre_tokenizer`` that decide the ids."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""GPT-2's way to cut text, in ``tokenizer.json``."""


class OtherTokenizerError(ValueError):
    """The tokenizer is not GPT-2's byte-level BPE; the message says in what it differs."""


def read_huggingface_encoder(folder: Path, end_id: object = None) -> Encoder:
    """Reads the vocabulary in a folder of Hugging Face's.

    Args:
        folder: the folder.
        end_id: the id of the token between documents, ``eos_token_id`` of ``config.json``; by default the tokenizer's
            own.

    Returns:
        The encoder; a ``RefusingEncoder`` where the tokenizer is missing, or is of another kind.

    Raises:
        CheckpointError: when a file is damaged.
    """
    try:
        vocabulary, merges, listed = read_parts(folder)
        settings, named = read_if_there(folder / TOKENIZER_CONFIG), read_if_there(folder / SPECIAL)
        if settings.get("add_prefix_space"):
            raise OtherTokenizerError("its tokenizer_config.json asks for a space before each text (add_prefix_space)")
        special = with_others(listed, vocabulary, [*settings_tokens(folder, settings), *named_tokens(settings, named)])
        end = token_text(named.get("eos_token")) or token_text(settings.get("eos_token")) or END_OF_TEXT
        vocabulary = without_names(vocabulary, special)
        encoder = Encoder(vocabulary, merges, special_tokens=special, end_of_text=end)
        if isinstance(end_id, int) and end_id in encoder.decoder and end_id != encoder.end_of_text:
            end = encoder.decode([end_id])
            encoder = Encoder(vocabulary, merges, special_tokens=special, end_of_text=end)
        return encoder
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return RefusingEncoder(
            f"{folder} has no tokenizer that can be used here: {error}. Its weights can: pass ids, which the model's "
            f"own tokenizer makes of text"
        )


def read_parts(folder: Path) -> tuple[dict[str, int], list[Pair], dict[str, SpecialToken]]:
    """Returns the vocabulary, the merges and the special tokens; raises ValueError for another kind of tokenizer."""
    if (folder / TOKENIZER).exists():
        return parts_of_tokenizer(read_json(folder / TOKENIZER))
    if (folder / VOCABULARY).exists() and (folder / MERGES).exists():
        vocabulary = read_json(folder / VOCABULARY)
        return checked_vocabulary(vocabulary), read_merges(folder / MERGES), {}
    found = next((name for name in OTHERS if (folder / name).exists()), None)
    raise OtherTokenizerError(f"{found} is of another kind" if found else f"{TOKENIZER} is missing")


def parts_of_tokenizer(content: Mapping[str, Any]) -> tuple[dict[str, int], list[Pair], dict[str, SpecialToken]]:
    """Returns the parts of ``tokenizer.json``; raises ValueError where it is not GPT-2's byte-level BPE."""
    model, cutting = content.get("model"), content.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise OtherTokenizerError("it is not byte-pair encoding")
    if not isinstance(cutting, dict) or any(cutting.get(key, BYTE_LEVEL[key]) != BYTE_LEVEL[key] for key in CUTTING):
        raise OtherTokenizerError("it does not cut text as GPT-2 does (pre_tokenizer)")
    if "SpecialToken" in json.dumps(content.get("post_processor")):
        raise OtherTokenizerError("it adds special tokens to each text (post_processor)")
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    set_options = [name for name in options if model.get(name)]
    if content.get("normalizer") is not None or set_options:
        raise OtherTokenizerError(f"it has {', '.join(set_options) or 'a normalizer'}, which GPT-2's has not")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in merges):
        raise OtherTokenizerError("its merges are not pairs")
    special = {}
    for entry in content.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise OtherTokenizerError("its added_tokens are damaged")
        if entry["content"]:  # the tokenizers package passes over empty ones, too
            special[entry["content"]] = special_token(entry.get("id"), entry)
    return checked_vocabulary(model.get("vocab")), merges, special  # type: ignore[return-value]


def checked_vocabulary(vocabulary: object) -> dict[str, int]:
    """Returns a vocabulary; raises ValueError when its values are no ids."""
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise OtherTokenizerError("its vocabulary is no object whose values are ids")
    return vocabulary


def special_token(token_id: object, flags: Mapping[str, Any]) -> SpecialToken:
    """Makes a special token of an entry with Hugging Face's flags."""
    if type(token_id) is not int:
        raise OtherTokenizerError("an added token has no id")
    names = ("lstrip", "rstrip", "single_word")
    return SpecialToken(
        token_id,
        **{name: bool(flags.get(name)) for name in names},
        first=not flags.get("normalized", False),
        control=bool(flags.get("special", True)),
    )


def read_merges(path: Path) -> list[Pair]:
    """Reads ``merges.txt``: a pair per line, behind a line ``#version`` that may be missing."""
    try:
        lines = read_text(path, MOST_BYTES).rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy it again from its source") from error
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return pairs_of([line for line in lines if line])


Listed = tuple[str, int | None, Mapping[str, Any]]
"""A special token in a list: its text, its id if the list tells it, its flags."""


def settings_tokens(folder: Path, settings: Mapping[str, Any]) -> list[Listed]:
    """Lists the special tokens in ``added_tokens.json`` and ``added_tokens_decoder``, the flags of the latter first."""
    decoder = (settings.get("added_tokens_decoder") or {}).items()
    listed: list[Listed] = [(entry["content"], int(key), entry) for key, entry in decoder]
    return listed + [(text, token_id, {}) for text, token_id in read_if_there(folder / ADDED).items()]


def named_tokens(settings: Mapping[str, Any], named: Mapping[str, Any]) -> list[Listed]:
    """Lists the special tokens that have a role, in the order in which transformers numbers new ones."""
    listed: list[Listed] = [(END_OF_TEXT, None, {})]
    for role in ROLES:
        for value in (named.get(role), settings.get(role)):
            for entry in value if isinstance(value, list) else [value]:
                if text := token_text(entry):
                    listed.append((text, None, entry if isinstance(entry, dict) else {}))
    return listed


def with_others(
    special: Mapping[str, SpecialToken], vocabulary: Mapping[str, int], others: list[Listed]
) -> dict[str, SpecialToken]:
    """Adds special tokens to those of ``tokenizer.json``: with the vocabulary's id, their own, or the next one.

    A token that the vocabulary has keeps the vocabulary's id in any case, as in the tokenizers package.
    """
    found = {text: dataclasses.replace(token, id=vocabulary.get(text, token.id)) for text, token in special.items()}
    following = max([*vocabulary.values(), *(token.id for token in found.values())], default=-1) + 1
    for text, token_id, flags in others:
        if text in found or (text == END_OF_TEXT and token_id is None and text not in vocabulary):
            continue
        token = special_token(vocabulary.get(text, following if token_id is None else token_id), flags)
        found[text], following = token, max(following, token.id + 1)
    return found


def without_names(vocabulary: Mapping[str, int], special: Mapping[str, SpecialToken]) -> dict[str, int]:
    """Leaves out special tokens that stand in a vocabulary as their text, which is not the form of other tokens."""
    names = {text for text in special if any(not "!" <= character <= "~" for character in text)}
    return {token: token_id for token, token_id in vocabulary.items() if token not in names}


def token_text(entry: object) -> str | None:
    """Returns the text of a special token, which stands alone or as ``content``."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def read_if_there(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no file."""
    return read_json(path) if path.exists() else {}


def write_huggingface(encoder: Encoder, folder: Path, n_ctx: int) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, and the two older files.

    Args:
        encoder: the vocabulary.
        folder: to write to.
        n_ctx: the longest text of the model, which transformers warns of.
    """
    added = {
        text: {
            "content": text,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": not token.first,
            "special": token.control,
        }
        for text, token in sorted(encoder.special_tokens.items(), key=lambda item: item[1].id)
    }
    ids = {text: encoder.special_tokens[text].id for text in added}
    vocabulary = named_vocabulary(encoder)
    write_json(
        folder / TOKENIZER, tokenizer_of(encoder, vocabulary, [{"id": ids[text], **added[text]} for text in added])
    )
    end = None if encoder.end_of_text is None else encoder.decode([encoder.end_of_text])
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        **named,
        "model_max_length": n_ctx,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(ids[text]): added[text] for text in added},
    }
    write_json(folder / TOKENIZER_CONFIG, settings)
    write_json(folder / SPECIAL, {name: text for name, text in named.items() if text is not None})
    write_json(folder / VOCABULARY, vocabulary)
    lines = ["#version: 0.2", *merge_lines(encoder)]
    (folder / MERGES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def named_vocabulary(encoder: Encoder) -> dict[str, int]:
    """Returns the vocabulary with each special token as its text: of others, the tokenizers package counts new ids.

    Raises:
        ValueError: when the text of a special token is that of another token, too.
    """
    ids = {token.id: text for text, token in encoder.special_tokens.items()}
    vocabulary = {ids.get(i, encoder.decoder[i]): i for i in sorted(encoder.decoder)}
    if len(vocabulary) < len(encoder.decoder):
        twice = [text for i, text in ids.items() if encoder.encoder.get(text, i) != i]
        raise ValueError(
            f"tokenizer.json cannot express the special tokens {', '.join(twice[:10])}: others have the same names"
        )
    return vocabulary


def tokenizer_of(encoder: Encoder, vocabulary: dict[str, int], added: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of ``tokenizer.json``."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [line.split(" ") for line in merge_lines(encoder)],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": {**BYTE_LEVEL, "trim_offsets": False},
        "decoder": BYTE_LEVEL,
        "model": model,
    }


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in GGUF. Source: llama.cpp, ``gguf-py``, ``TokenType``."""


def read_gguf_encoder(path: Path) -> Encoder:
    """Reads the vocabulary in a file of GGUF; a ``RefusingEncoder`` where it is not GPT-2's kind.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    file = gguf.find_file(path)
    metadata = gguf.read(file).metadata
    try:
        return encoder_from_gguf(metadata)
    except (KeyError, TypeError, ValueError) as error:
        return RefusingEncoder(
            f"{file} has no tokenizer that can be used here: {error}. Its weights can: pass ids, which the model's own "
            f"tokenizer makes of text"
        )


def encoder_from_gguf(metadata: Mapping[str, Any]) -> Encoder:
    """Makes the encoder; raises ValueError, TypeError or KeyError for another kind of tokenizer."""
    kind, cutting = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cutting not in ("gpt-2", "gpt2"):
        raise OtherTokenizerError(f"it is of the kind {str(kind)[:40]!r}, {str(cutting)[:40]!r}")
    if metadata.get("tokenizer.ggml.add_bos_token") or metadata.get("tokenizer.ggml.add_eos_token"):
        raise OtherTokenizerError("it adds special tokens to each text (add_bos_token, add_eos_token)")
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    rows = list(enumerate(zip(tokens, kinds, strict=True)))
    vocabulary = {token: i for i, (token, kind) in rows if kind == NORMAL}
    special = {
        token: SpecialToken(i, control=kind == CONTROL) for i, (token, kind) in rows if kind in (CONTROL, USER_DEFINED)
    }
    end_id = metadata.get("tokenizer.ggml.eos_token_id")
    end = next((text for text, token in special.items() if token.id == end_id), END_OF_TEXT)
    return Encoder(vocabulary, pairs_of(merges), special_tokens=special, end_of_text=end)


def pairs_of(lines: list[str]) -> list[Pair]:
    """Returns the pairs that stand in lines; raises ValueError for other lines."""
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    if any(not left or not right or " " in right for left, right in pairs):
        raise OtherTokenizerError("its merges are not pairs")
    return pairs


def gguf_entries(encoder: Encoder, n_vocab: int) -> list[tuple[str, int, Any]]:
    """Lists the vocabulary as entries of GGUF's metadata: key, type, value; ids that it lacks are marked as unused."""
    texts = {token.id: text for text, token in encoder.special_tokens.items()}
    kinds = dict.fromkeys(encoder.decoder, NORMAL)
    kinds |= {token.id: CONTROL if token.control else USER_DEFINED for token in encoder.special_tokens.values()}
    tokens = [texts.get(i, encoder.decoder.get(i, f"[unused{i}]")) for i in range(n_vocab)]
    end = encoder.end_of_text
    ids = ("bos", "eos") if end is not None else ()
    return [
        ("tokenizer.ggml.model", gguf.STRING, "gpt2"),
        ("tokenizer.ggml.pre", gguf.STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", gguf.ARRAY, tokens),
        ("tokenizer.ggml.token_type", gguf.ARRAY, [kinds.get(i, UNUSED) for i in range(n_vocab)]),
        ("tokenizer.ggml.merges", gguf.ARRAY, merge_lines(encoder)),
        *((f"tokenizer.ggml.{name}_token_id", gguf.UINT32, end) for name in ids),
        ("tokenizer.ggml.add_bos_token", gguf.BOOL, False),
    ]


def check_gguf(encoder: Encoder) -> None:
    """Raises ValueError for special tokens that take or mind what is beside them, which GGUF has no place for."""
    tokens = encoder.special_tokens.items()
    flagged = [text for text, token in tokens if token.lstrip or token.rstrip or token.single_word]
    if flagged:
        raise ValueError(
            f"format='gguf' cannot express lstrip, rstrip and single_word of the special tokens "
            f"{', '.join(flagged[:10])}; take format='huggingface'"
        )


def merges_of(encoder: Encoder) -> list[Pair]:
    """Returns the merges in their order."""
    return sorted(encoder.bpe_ranks, key=encoder.bpe_ranks.__getitem__)


def merge_lines(encoder: Encoder) -> list[str]:
    """Returns the merges in their order, each as a line."""
    return [" ".join(pair) for pair in merges_of(encoder)]


def check_openai(encoder: Encoder) -> None:
    """Raises ValueError for a vocabulary that would be another one when it is read from OpenAI's two files."""
    again = None
    vocabulary = {token: token_id for token_id, token in encoder.decoder.items()}
    if len(vocabulary) == len(encoder.decoder):
        again = Encoder(vocabulary, encoder.bpe_ranks)
    # whether a token is a mark or a word has no effect here
    wanted = {text: dataclasses.replace(token, control=True) for text, token in encoder.special_tokens.items()}
    if again is None or again.special_tokens != wanted or again.end_of_text != encoder.end_of_text:
        raise ValueError(
            "encoder.json and vocab.bpe cannot express the special tokens of this vocabulary "
            f"({', '.join(list(encoder.special_tokens)[:10])}); take format='huggingface'"
        )


def write_openai(encoder: Encoder, folder: Path) -> None:
    """Writes ``encoder.json`` and ``vocab.bpe`` in OpenAI's form."""
    vocabulary = {encoder.decoder[token_id]: token_id for token_id in sorted(encoder.decoder)}
    (folder / ENCODER).write_text(json.dumps(vocabulary) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *merge_lines(encoder)]
    (folder / OPENAI_MERGES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Writes JSON, in UTF-8 as it stands."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
