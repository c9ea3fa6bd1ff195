"""``Conversation``: a text that a user and the model write in turns. Knows nothing of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tf_gpt2.generation.session import Session
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.text.options import check_stops, check_text
from tf_gpt2.text.pieces import TextPieces

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tf_gpt2.generation.options import SamplingOptions


class Conversation:
    """Continues a text turn by turn, and reads only what is new.

    The text of each turn is encoded by itself, and what the model wrote keeps the ids that the model chose. Where that
    is also how the whole text is encoded, a turn's completion is that of ``generator.stream`` for the whole text so
    far; where a turn begins in the middle of a word, say, it may not be.

    Args:
        generator: model and vocabulary.
        jit_compile: whether XLA compiles.

    Attributes:
        session: the ids, ``finish_reason`` of the last turn, and how much was dropped when the window was full.

    Example:
        >>> from tf_gpt2.checkpoint.download import embedded_dir
        >>> generator = TextGenerator.from_checkpoint(embedded_dir())
        >>> conversation = Conversation(generator)
        >>> first = "".join(conversation.add("To be", max_new_tokens=5))
        >>> second = "".join(conversation.add(" or", max_new_tokens=5))
        >>> conversation.text == "To be" + first + " or" + second
        True
    """

    def __init__(self, generator: TextGenerator, *, jit_compile: bool = True):
        self.generator = generator
        self.session = Session(generator.model, jit_compile=jit_compile)
        self._starts: list[int] = []

    @property
    def text(self) -> str:
        """What both have written, as far as it is remembered."""
        return self.generator.encoder.decode(self.session.ids)

    def add(
        self,
        text: str,
        *,
        max_new_tokens: int = 40,
        stop: str | Sequence[str] = (),
        stop_at_end_of_text: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Appends a text and continues; yields the completion in pieces, each as soon as it is certain.

        Closing the iterator, or an interrupt, ends the turn there: what the pieces showed is remembered, and no more,
        but for a stop string, which the pieces leave out. Another turn ends this one, too, and so does ``undo``.

        Args:
            text: the user's; ``""`` goes on where the last turn ended, or starts from nothing.
            max_new_tokens: most new tokens.
            stop: strings that end the turn.
            stop_at_end_of_text: whether ``<|endoftext|>`` ends it.
            **options: how to choose, as for ``tf_gpt2.generate``; "prompt" is all that was before.

        Raises:
            ContextLengthError: when the text alone fills the window; at once, like the other errors.
            TypeError: when the text is not a str, or an option is unknown.
            ValueError: when an option is out of range.
        """
        check_text("text", text)
        generator, session = self.generator, self.session
        pieces = TextPieces(generator.encoder, check_stops(stop))
        ids = generator.encoder.encode(text) if session.ids else generator.encode_prompt(text)
        stop_ids = generator.stop_ids(stop_at_end_of_text)
        allowed = generator.without_unknown(options)
        chunks = session.add(ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, **allowed)

        def texts() -> Iterator[str]:
            self._starts.append(session.n_dropped + len(session.ids))
            for chunk in chunks:
                turn, n_before = session.turn, len(session.ids) - len(chunk) - pieces.n_ids
                text = pieces.take(chunk)
                # all is settled before the text is given, as nobody may ask for more
                if pieces.is_stopped:
                    session.show(n_before + pieces.n_ids)
                    session.finish_reason = "stop"
                elif session.finish_reason is not None:
                    text += pieces.close()
                else:
                    n_given, rest = pieces.given()
                    session.show(n_before + n_given, generator.encoder.encode(rest))
                if text:
                    yield text
                if pieces.is_stopped or turn != session.turn:
                    return
            if text := pieces.close():
                yield text

        return texts()

    def undo(self) -> bool:
        """Forgets the last turn that left anything; returns whether there was one that is remembered whole."""
        n_written = self.session.n_dropped + len(self.session.ids)
        while self._starts and self._starts[-1] >= n_written:  # interrupted before it was read
            self._starts.pop()
        if not self._starts or self._starts[-1] < self.session.n_dropped:
            return False
        self.session.keep(self._starts.pop() - self.session.n_dropped)
        return True

    def reset(self) -> None:
        """Forgets all."""
        self.session.keep(0)
        self._starts.clear()
