"""Text -> text: ``TextGenerator`` ties the encoder to the model. Knows nothing of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from tf_gpt2.checkpoint.load import find_folder, read_encoder_and_config
from tf_gpt2.generation.beam import beam_search
from tf_gpt2.generation.generate import stream_row, warm_up
from tf_gpt2.generation.options import SamplingOptions, check_counts, check_names, check_prompt, items_of, make_request
from tf_gpt2.generation.scoring import Progress, Score, score
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.lora import load_lora
from tf_gpt2.text.batches import check_texts, complete_many, encode_prompt
from tf_gpt2.text.options import BeamOptions, CompletionOptions, check_several, check_stops, check_text
from tf_gpt2.text.perplexity import Perplexity, measure_perplexity
from tf_gpt2.text.pieces import Completion, TextPieces, texts_of
from tf_gpt2.tokenizer.encoder import Encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

Answer = TypeVar("Answer")

DTYPES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
"""What each name means for ``GPT2Model``."""


class TextGenerator:
    """Continues text with a GPT-2.

    Args:
        model: the model.
        encoder: its vocabulary; ids of the model that it lacks are never chosen.

    Raises:
        ValueError: when the vocabulary has ids that the model lacks.

    Example:
        >>> from tf_gpt2.checkpoint.download import embedded_dir
        >>> generator = TextGenerator.from_checkpoint(embedded_dir())
        >>> text = generator.generate("To be", max_new_tokens=5)
    """

    def __init__(self, model: GPT2Model, encoder: Encoder):
        n_vocab = model.config.n_vocab
        if max(encoder.decoder, default=0) >= n_vocab:
            raise ValueError(
                f"encoder has {len(encoder)} tokens and model n_vocab={n_vocab}; take both from one folder"
            )
        self.model = model
        self.encoder = encoder
        self.unknown_ids = [i for i in range(n_vocab) if i not in encoder.decoder] if len(encoder) else []

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, dtype: str = "float32", adapter: str | Path | None = None
    ) -> TextGenerator:
        """Makes a generator from a folder or file in any known format.

        Args:
            folder: such as ``"checkpoints/tiny"``: holds OpenAI's or Hugging Face's files, or is or holds a file of
                Keras or of GGUF.
            dtype: of the weights and of the arithmetic, ``"float32"`` or ``"bfloat16"``; ``"int8"`` keeps the
                matrices as 8-bit integers, and ``"int4"`` those of the blocks as 4-bit ones; both compute in float32,
                and round what they multiply to 8 bits where that is faster.
            adapter: a folder with a LoRA adapter, as ``tf_gpt2.training.save_lora`` or PEFT writes it. In float32 it
                is merged into the weights; in other dtypes it is kept apart, because they would round the sum.

        Raises:
            CheckpointError: when a file is missing or damaged, or the adapter does not fit.
            ValueError: when ``dtype`` is another.
        """
        check_dtype(dtype)
        encoder, _ = read_encoder_and_config(folder)  # first: a vocabulary is read faster than weights
        model = GPT2Model.from_checkpoint(folder, **DTYPES[dtype])
        if adapter is not None:
            load_lora(model, adapter)
            if dtype == "float32":
                model.merge_lora()
        return cls(model, encoder)

    @classmethod
    def load(
        cls,
        model: str | Path,
        models_dir: str | Path = "checkpoints",
        dtype: str = "float32",
        *,
        adapter: str | Path | None = None,
    ) -> TextGenerator:
        """Makes a generator from a model's name or folder; downloads OpenAI's files when they are not there.

        Args:
            model: ``"124M"``, ``"355M"``, ``"774M"``, ``"1558M"``, ``"tiny"`` (embedded), the name of a folder or
                file in ``models_dir``, or the path of a folder or file, in any known format.
            models_dir: holds one folder per model; downloads go there.
            dtype: as for ``from_checkpoint``.
            adapter: as for ``from_checkpoint``.

        Raises:
            CheckpointError: when there is no such model, a file is damaged, or the adapter does not fit.
            DownloadError: when files cannot be fetched.
            ValueError: when ``dtype`` is another.

        Example:
            >>> text = TextGenerator.load("tiny").generate("To be", max_new_tokens=5)
        """
        check_dtype(dtype)  # before a download
        return cls.from_checkpoint(find_folder(model, models_dir), dtype=dtype, adapter=adapter)

    # a str is an iterable of str, too: the first overload that fits counts
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, num_samples: None = None, **options: Unpack[CompletionOptions]
    ) -> str: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, num_samples: int, **options: Unpack[CompletionOptions]
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompts: Iterable[str], *, num_samples: None = None, **options: Unpack[CompletionOptions]
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompts: Iterable[str], *, num_samples: int, **options: Unpack[CompletionOptions]
    ) -> list[list[str]]: ...
    def generate(
        self, prompts: str | Iterable[str], *, num_samples: int | None = None, **options: Unpack[CompletionOptions]
    ) -> str | Sequence[str | list[str]]:
        """Continues a text, or any number of texts; returns the new text only.

        Args:
            prompts: one str, or several: a list, or any iterable such as a generator.
            num_samples: how many texts per prompt.
            **options: as for ``complete_many``: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``, …

        Returns:
            A str for a str, a list of str for several; with ``num_samples`` a list of str in each str's place.
        """
        return answer(
            prompts, lambda several: map(texts_of, self.complete_many(several, num_samples=num_samples, **options))
        )

    @overload
    def complete(  # type: ignore[overload-overlap]
        self, prompts: str, *, num_samples: None = None, **options: Unpack[CompletionOptions]
    ) -> Completion: ...
    @overload
    def complete(  # type: ignore[overload-overlap]
        self, prompts: str, *, num_samples: int, **options: Unpack[CompletionOptions]
    ) -> list[Completion]: ...
    @overload
    def complete(
        self, prompts: Iterable[str], *, num_samples: None = None, **options: Unpack[CompletionOptions]
    ) -> list[Completion]: ...
    @overload
    def complete(
        self, prompts: Iterable[str], *, num_samples: int, **options: Unpack[CompletionOptions]
    ) -> list[list[Completion]]: ...
    def complete(
        self, prompts: str | Iterable[str], *, num_samples: int | None = None, **options: Unpack[CompletionOptions]
    ) -> Completion | Sequence[Completion | list[Completion]]:
        """Continues a text, or any number of texts; returns ids, log-probabilities, finish reasons and durations, too.

        Args:
            prompts: one str, or several.
            num_samples: how many texts per prompt.
            **options: as for ``complete_many``, whose errors are raised here, too.

        Returns:
            A ``Completion`` for a str, a list of them for several; with ``num_samples`` a list of them in each str's
            place.
        """
        return answer(prompts, lambda several: self.complete_many(several, num_samples=num_samples, **options))

    @overload
    def complete_many(
        self, prompts: Iterable[str], *, num_samples: None = None, **options: Unpack[CompletionOptions]
    ) -> Iterator[Completion]: ...
    @overload
    def complete_many(
        self, prompts: Iterable[str], *, num_samples: int, **options: Unpack[CompletionOptions]
    ) -> Iterator[list[Completion]]: ...
    @overload
    def complete_many(
        self, prompts: Iterable[str], *, num_samples: int | None, **options: Unpack[CompletionOptions]
    ) -> Iterator[Completion] | Iterator[list[Completion]]: ...
    def complete_many(
        self,
        prompts: Iterable[str],
        *,
        max_new_tokens: int = 40,
        stop: str | Sequence[str] = (),
        stop_at_end_of_text: bool = True,
        num_samples: int | None = None,
        top_logprobs: int = 0,
        overflow: str = "error",
        batch_size: int = 16,
        progress: bool = True,
        jit_compile: bool = True,
        prompt_lookup: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Completion] | Iterator[list[Completion]]:
        """Continues any number of texts; yields the completions in the order of the prompts, as they are done.

        Text from nothing (``""``) starts after ``<|endoftext|>``, as between two documents of the training text.

        A list is checked as a whole first; another iterable is read as it is needed, some batches ahead, and
        the prompts before a wrong one are completed before its error is raised.
        Memory does not grow with the number of prompts. A text does not depend on how the batches are cut.

        Args:
            prompts: several str.
            max_new_tokens: most new tokens per text.
            stop: strings that end a text and are not part of it.
            stop_at_end_of_text: end a text where the model puts ``<|endoftext|>``.
            num_samples: how many texts per prompt, which is read only once; the first has the prompt's seed, the second
                the next seed, and so on. Each completion is then a list of so many, even of 1.
            top_logprobs: how many of the likeliest ids to return beside each new id.
            overflow: what to do with a text that is too long for the window: ``"error"`` refuses a prompt that leaves
                no room, and ends the text when the window is full; ``"truncate"`` drops the prompt's beginning
                (``Completion.n_truncated``); ``"slide"`` goes on in a new window, see ``tf_gpt2.generate``.
            batch_size: most texts at once. More are faster together and take more memory; more than this are cut into
                batches of this size, which XLA compiles at most twice for each power of two up to ``n_ctx``.
            progress: whether a bar on standard error shows how far several batches are.
            jit_compile: whether XLA compiles the loop.
            prompt_lookup: guess the next tokens from the text so far: the same text, faster where it repeats itself.
            **options: how to choose (``temperature``, ``top_k``, ``top_p``, ``seed``, …), as for ``tf_gpt2.generate``.

        Raises:
            ContextLengthError: when a prompt fills the model's window.
            TypeError: when a prompt is not a str, or an option is unknown.
            ValueError: when an option is out of range, or there are no prompts.
        """
        check_names(options, self.complete_many)
        check_several("prompts", prompts)
        stops = check_stops(stop)
        (batch_size,) = check_counts(batch_size=batch_size)
        request = make_request(
            self.model,
            len(prompts) if isinstance(prompts, Sized) else None,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids(stop_at_end_of_text),
            num_samples=1 if num_samples is None else num_samples,
            top_logprobs=top_logprobs,
            overflow=overflow,
            prompt_lookup=prompt_lookup,
            jit_compile=jit_compile,
            **self.without_unknown(options),
        )
        completions = complete_many(
            self.model, self.encoder, prompts, request, stops=stops, batch_size=batch_size, progress=progress
        )
        return (only for (only,) in completions) if num_samples is None else completions

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 40,
        stop: str | Sequence[str] = (),
        stop_at_end_of_text: bool = True,
        overflow: str = "error",
        jit_compile: bool = True,
        prompt_lookup: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Continues a text; yields the new text in pieces, each as soon as it is certain.

        Joined they are what ``generate`` returns. Nothing is computed while nobody asks for more.

        Args:
            prompt: one str.
            max_new_tokens: as for ``complete``, like all that follows.
            stop: strings that end the text.
            stop_at_end_of_text: whether ``<|endoftext|>`` ends it.
            overflow: what to do with a text that is too long for the window.
            jit_compile: whether XLA compiles the loop.
            prompt_lookup: whether to guess the next tokens from the text so far.
            **options: how to choose.

        Raises:
            ContextLengthError: as ``complete``, and at once, like the other errors.
            TypeError: as ``complete``.
            ValueError: as ``complete``.

        Example:
            >>> from tf_gpt2.checkpoint.download import embedded_dir
            >>> generator = TextGenerator.from_checkpoint(embedded_dir())
            >>> "".join(generator.stream("To be")) == generator.generate("To be")
            True
        """
        check_text("prompt", prompt)
        check_names(options, self.stream)
        pieces = TextPieces(self.encoder, check_stops(stop))
        row = check_prompt("prompts[0]", self.encode_prompt(prompt), self.model.config, overflow=overflow)
        request = make_request(
            self.model,
            1,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids(stop_at_end_of_text),
            overflow=overflow,
            prompt_lookup=prompt_lookup,
            jit_compile=jit_compile,
            **self.without_unknown(options),
        )
        return pieces.texts(stream_row(self.model, row, request))

    @overload
    def beam_search(  # type: ignore[overload-overlap]
        self, prompts: str, *, stop_at_end_of_text: bool = True, **options: Unpack[BeamOptions]
    ) -> list[tuple[str, float]]: ...
    @overload
    def beam_search(
        self, prompts: Iterable[str], *, stop_at_end_of_text: bool = True, **options: Unpack[BeamOptions]
    ) -> list[list[tuple[str, float]]]: ...
    def beam_search(
        self, prompts: str | Iterable[str], *, stop_at_end_of_text: bool = True, **options: Unpack[BeamOptions]
    ) -> Sequence[tuple[str, float] | list[tuple[str, float]]]:
        """Continues a text, or each text of a list, in the likeliest ways that beam search finds.

        Args:
            prompts: one str, or several.
            stop_at_end_of_text: end a text where the model puts ``<|endoftext|>``.
            **options: as for ``tf_gpt2.beam_search``: ``num_beams``, ``num_return_sequences``, ``length_penalty``, …

        Returns:
            For a str its ``(text, score)`` pairs, best first, only the new text; for several a list of such lists.

        Raises:
            ContextLengthError: when a prompt fills the model's window.
            TypeError: when a prompt is not a str, or an option is unknown.
            ValueError: when an option is out of range.
        """

        def search(several: Iterable[str]) -> Iterator[list[tuple[str, float]]]:
            rows = [self.encode_prompt(text) for text in check_texts("prompts", several)]
            asked = self.without_unknown({"suppress": options.get("suppress", ())})
            allowed: BeamOptions = {**options, **asked}  # type: ignore[typeddict-unknown-key]
            result = beam_search(self.model, rows, stop_ids=self.stop_ids(stop_at_end_of_text), **allowed)
            for ids, scores in zip(result.ids, result.scores, strict=True):
                yield list(zip(map(self.encoder.decode, ids), scores, strict=True))

        return answer(prompts, search)

    def without_unknown(self, options: SamplingOptions) -> SamplingOptions:
        """Returns options that also keep the model from ids that the vocabulary lacks."""
        asked = items_of(options.get("suppress", ()))
        if not self.unknown_ids or asked is None:  # None: make_request says what is wrong
            return options
        return {**options, "suppress": [*asked, *self.unknown_ids]}

    def stop_ids(self, stop_at_end_of_text: bool) -> list[int]:
        """Returns the ids that end a text."""
        end = self.encoder.end_of_text
        return [end] if stop_at_end_of_text and end is not None else []

    def warmup(self, *, prompt_length: int = 16, max_new_tokens: int = 40, n_prompts: int = 1) -> None:
        """Compiles what a call of ``generate`` of that size needs, so that the first call is as fast as the next.

        Args:
            prompt_length: tokens of the prompts to come; much shorter ones may need a smaller cache, and compile.
            max_new_tokens: as for ``generate``.
            n_prompts: how many texts at once; another number compiles anew.

        Raises:
            ContextLengthError: when the prompt leaves no room in the model's window.
            ValueError: when a number is out of range.
        """
        warm_up(self.model, prompt_length=prompt_length, max_new_tokens=max_new_tokens, n_prompts=n_prompts)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns a prompt's ids, ``<|endoftext|>`` for an empty one."""
        return encode_prompt(self.encoder, text)

    @overload
    def score(  # type: ignore[overload-overlap]
        self, texts: str, *, after_end_of_text: bool = True, jit_compile: bool = True
    ) -> Score: ...
    @overload
    def score(
        self, texts: Iterable[str], *, after_end_of_text: bool = True, jit_compile: bool = True
    ) -> list[Score]: ...
    def score(
        self, texts: str | Iterable[str], *, after_end_of_text: bool = True, jit_compile: bool = True
    ) -> Score | Sequence[Score]:
        """Computes how likely the model finds a text, or each text of a list.

        Args:
            texts: one str, or several, each of up to ``n_ctx`` tokens.
            after_end_of_text: score the first token as one that follows ``<|endoftext|>``, as in the training text.
                Otherwise it is context only and its logprob NaN, as in Hugging Face's loss.
            jit_compile: whether XLA compiles.

        Returns:
            A ``Score`` for a str, a list of them for several.

        Raises:
            ContextLengthError: when a text is longer than the window; ``perplexity`` takes any length.
            TypeError: when a text is not a str.
            ValueError: when there is no ``<|endoftext|>`` in the vocabulary and ``after_end_of_text`` asks for it.

        Example:
            >>> from tf_gpt2.checkpoint.download import embedded_dir
            >>> generator = TextGenerator.from_checkpoint(embedded_dir())
            >>> likely, unlikely = generator.score(["To be, or not to be", "To be, or not to bee"])
            >>> likely.total > unlikely.total
            True
        """
        start_id = self.encoder.end_of_text if after_end_of_text else None
        if after_end_of_text and start_id is None:
            raise ValueError("after_end_of_text must be False: this vocabulary has no <|endoftext|>")

        def score_all(several: Iterable[str]) -> list[Score]:
            rows = self.encoder.encode_batch(check_texts("texts", several))
            return score(self.model, rows, start_id=start_id, jit_compile=jit_compile)

        return answer(texts, score_all)

    def perplexity(
        self, text: str, *, stride: int | None = None, jit_compile: bool = True, on_progress: Progress | None = None
    ) -> Perplexity:
        """Measures how well the model predicts a text of any length, with a sliding window.

        Args:
            text: at least two tokens.
            stride: in [1, n_ctx], by how many tokens the window moves on; half the window by default, 512 with OpenAI's
                models. Each token then has at least ``n_ctx - stride`` before it: less is better predicted and slower.
            jit_compile: whether XLA compiles.
            on_progress: called from time to time with the number of tokens scored so far, and of all to score.

        Raises:
            TypeError: when ``text`` is not a str.
            ValueError: when it has fewer than two tokens, or the stride is out of range.
        """
        return measure_perplexity(
            self.model, self.encoder, text, stride=stride, jit_compile=jit_compile, on_progress=on_progress
        )


def load(
    model: str | Path, models_dir: str | Path = "checkpoints", dtype: str = "float32"
) -> tuple[GPT2Model, Encoder]:
    """Reads a model and its vocabulary; arguments and errors as for ``TextGenerator.load``.

    Example:
        >>> model, encoder = load("tiny")
        >>> len(encoder) == model.config.n_vocab
        True
    """
    generator = TextGenerator.load(model, models_dir, dtype)
    return generator.model, generator.encoder


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless ``dtype`` is one of ``DTYPES``."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def answer(texts: str | Iterable[str], several: Callable[[Iterable[str]], Iterable[Answer]]) -> Answer | list[Answer]:
    """Answers for several texts; for one str as for a list of it, whose only answer it returns."""
    if isinstance(texts, str):
        (only,) = several([texts])
        return only
    return list(several(texts))
