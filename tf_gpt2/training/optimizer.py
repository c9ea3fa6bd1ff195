"""AdamW in one pass over memory, and the learning rate: a linear warm-up, then half a cosine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf

from tf_gpt2.runtime.tf_internals import of_many_shapes

FINAL_SHARE = 0.1
"""The learning rate at the end, as a share of the highest. Source: nanoGPT, ``train.py``."""

LARGE = 1 << 18
"""Variables of at least so many numbers are changed one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of each update.

    Attributes:
        learning_rate: the highest, reached after the warm-up.
        warmup_steps: updates of the warm-up.
        steps: all updates.
    """

    learning_rate: float
    warmup_steps: int
    steps: int

    def rate(self, update: int) -> float:
        """Returns the learning rate of an update, counted from 0."""
        if update < self.warmup_steps:
            return self.learning_rate * (update + 1) / (self.warmup_steps + 1)
        share = min(1.0, (update - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def make_slots(variables: Sequence[tf.Variable]) -> list[tf.Variable]:
    """Returns two variables of zeros for each variable, on its device."""
    slots = []
    for variable in variables:
        with tf.device(variable.device):
            slots += [tf.Variable(tf.zeros(variable.shape), trainable=False) for _ in range(2)]
    return slots


class AdamW:
    """Adam with decoupled weight decay on what has two axes; epsilon is added to the corrected root, as in PyTorch.

    Args:
        variables: the weights of one device; float32.
        weight_decay: times the learning rate, by which matrices shrink at each update.
        beta_1: of the mean of gradients.
        beta_2: of the mean of their squares.
        epsilon: added to the root.

    Attributes:
        slots: the two means of each variable, in turn.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; nanoGPT's rule of what decays.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        *,
        weight_decay: float,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
    ):
        self.variables = list(variables)
        # in a thread of its own, which is under no strategy: one would copy each variable to all devices
        with ThreadPoolExecutor(max_workers=1) as thread:
            self.slots = thread.submit(make_slots, self.variables).result()
        self._betas = beta_1, beta_2
        self._epsilon = epsilon
        self._decays = [weight_decay if len(variable.shape) > 1 else 0.0 for variable in self.variables]
        # one device: XLA makes one pass over a large variable's memory; many small ones it would compile for seconds
        is_alone = not tf.distribute.has_strategy()
        update_large = of_many_shapes(tf.function(self._apply, jit_compile=is_alone, autograph=False))
        update_small = tf.function(self._apply, autograph=False)
        sizes = [variable.shape.num_elements() for variable in self.variables]
        small = [i for i, size in enumerate(sizes) if size < LARGE]
        # which function changes which variables: a large one alone, to need no memory for many copies
        self._calls = [(update_large, [i]) for i, size in enumerate(sizes) if size >= LARGE]
        self._calls += [(update_small, small)] if small else []

    def update(self, gradients: Sequence[tf.Tensor], *, scale: Any, rate: float, number: int) -> None:
        """Changes the variables.

        Args:
            gradients: one per variable.
            scale: float32 (), by which the gradients are multiplied first.
            rate: the learning rate.
            number: of the update, counted from 0.
        """
        corrections = [1 - beta ** (number + 1) for beta in self._betas]
        numbers = tf.constant([rate / corrections[0], 1 / math.sqrt(corrections[1])], tf.float32)
        for function, group in self._calls:
            parts = [[self.variables[i], *self.slots[2 * i : 2 * i + 2], gradients[i]] for i in group]
            decays = tf.constant([rate * self._decays[i] for i in group], tf.float32)
            function(parts, decays, tf.convert_to_tensor(scale), numbers)

    def _apply(self, parts: Sequence[Sequence[Any]], decays: tf.Tensor, scale: tf.Tensor, numbers: tf.Tensor) -> None:
        step_size, root_scale = tf.unstack(numbers)
        beta_1, beta_2 = self._betas
        for i, (variable, mean, square, gradient) in enumerate(parts):
            gradient = gradient * scale
            new_mean = mean + (gradient - mean) * (1 - beta_1)
            new_square = square + (gradient * gradient - square) * (1 - beta_2)
            root = tf.sqrt(new_square) * root_scale + self._epsilon
            variable.assign(variable * (1 - decays[i]) - step_size * new_mean / root)
            mean.assign(new_mean)
            square.assign(new_square)
