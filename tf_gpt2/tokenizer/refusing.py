"""``RefusingEncoder``: stands in the place of a vocabulary that cannot be used, and says why when it is asked."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NoReturn, SupportsIndex

from tf_gpt2.errors import CheckpointError
from tf_gpt2.tokenizer.encoder import Encoder, bytes_to_unicode


class RefusingEncoder(Encoder):
    """Has no tokens; whoever gives it text or ids gets the reason as a ``CheckpointError``.

    Args:
        reason: a sentence that says what is wrong, and what to do.

    Attributes:
        reason: as given.
    """

    def __init__(self, reason: str) -> None:
        super().__init__({symbol: i for i, symbol in enumerate(bytes_to_unicode().values())}, [])
        self.encoder, self.decoder = {}, {}
        self.reason = reason

    @property
    def end_of_text(self) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(self.reason)

    def encode(self, text: str, *, allowed_special: str | Collection[str] = ()) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(self.reason)

    def encode_batch(self, texts: Iterable[str], *, allowed_special: str | Collection[str] = ()) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(self.reason)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(self.reason)

    def bpe(self, token: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(self.reason)
