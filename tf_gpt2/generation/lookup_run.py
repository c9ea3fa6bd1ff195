"""Prompt look-up as a ``Run``: when its loops are called, and with which weights. Knows nothing of text."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_gpt2.generation.compiled import Compiled, once_per_model
from tf_gpt2.generation.lookup import decode, scout, start
from tf_gpt2.generation.run import Run
from tf_gpt2.generation.state import State
from tf_gpt2.generation.transposed import over_copies, transposed_of
from tf_gpt2.model.gpt2 import GPT2Model

SMALLEST = 3_000_000
"""Parameters from which on look-up is used: a step of a smaller model is too short to gain what the rest costs."""


class LookupRun(Run):
    """A ``Run`` that gives the same and may need fewer passes; the arguments are those of ``Run``.

    Once drafts pay, it uses a transposed copy of the weights: a product of a few rows is 1.5 times as fast with it.
    """

    def __init__(self, model: GPT2Model, *arguments: Any, jit_compile: bool, **kwargs: Any):
        super().__init__(model, *arguments, jit_compile=jit_compile, **kwargs)
        self._lookup_loop = lookup_loop_of(model, jit_compile=jit_compile)
        self._lookup = start(self.state)
        self._transposed = transposed_of(model)
        self._checks = False

    @property
    def n_passes(self) -> int:
        """Passes over the model since the prompts were read."""
        return int(self._lookup.n_passes)

    def _decode(self, state: State, n_steps: tf.Tensor) -> State:
        lookup, loop = self._lookup._replace(state=state), self._lookup_loop
        copies = self._transposed() if self._checks or len(state.lengths) > 1 else ()
        if self._checks:
            lookup = loop.decode(lookup, self._sampling, self.limits, n_steps, copies)
        else:
            lookup, is_worth_it = loop.scout(lookup, self._sampling, self.limits, n_steps, copies)
            self._checks = bool(is_worth_it)
        self._lookup = lookup
        return lookup.state


def check_lookup(model: GPT2Model, *, prompt_lookup: bool, overflow: str, n_top: int = 0) -> None:
    """Refuses look-up where it would be slower, and choose other tokens, or does not know what else is asked for.

    Raises:
        ValueError: in these cases.
    """
    if not prompt_lookup:
        return
    if overflow == "slide" or n_top:
        raise ValueError("prompt_lookup must be False with top_logprobs and with overflow='slide'")
    if model.quantization is not None or model.compute_dtype != "float32":
        raise ValueError(
            f"prompt_lookup must be False for a model that computes in {model.compute_dtype} with "
            f"quantization={model.quantization!r}: it pays only in float32, without quantization"
        )


def is_large_enough(model: GPT2Model) -> bool:
    """Says whether look-up can make the model faster."""
    return model.config.n_params >= SMALLEST


class LookupLoop:
    """One model's ``scout`` and ``decode`` as ``tf.function``s, which keep what they have compiled.

    Args:
        model: referred to weakly.
        jit_compile: whether XLA compiles them.
    """

    def __init__(self, model: GPT2Model, *, jit_compile: bool):
        self.scout = Compiled(over_copies(scout), model, jit_compile=jit_compile)
        self.decode = Compiled(over_copies(decode), model, jit_compile=jit_compile)

    @property
    def n_traces(self) -> int:
        """How often a new shape was met: under XLA the number of compilations."""
        return self.scout.n_traces + self.decode.n_traces


@once_per_model
def lookup_loop_of(model: GPT2Model, *, jit_compile: bool) -> LookupLoop:
    """Gives a model's compiled loop."""
    return LookupLoop(model, jit_compile=jit_compile)
