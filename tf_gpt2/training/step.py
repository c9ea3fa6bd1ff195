"""One update of the weights: gradients of one or more micro-batches, clipped after the sum, then AdamW.

The same step serves one device, ``MirroredStrategy`` and ``MultiWorkerMirroredStrategy``. Each device takes its rows of
the batch; losses, weights of labels and gradients are summed over devices and micro-batches before anything is divided
or clipped, and dropout depends on a row's place in the whole batch. So the result does not depend on how many devices
there are, but for rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import fused
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import weights_of
from tf_gpt2.model.weights import floats_of
from tf_gpt2.training.forward import hidden_states, keys_of_rows
from tf_gpt2.training.losses import head_loss
from tf_gpt2.training.optimizer import AdamW, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What decides how an update is made.

    Attributes:
        schedule: the learning rate.
        weight_decay: of matrices.
        clip_norm: the largest norm of all gradients together; ``None`` for any.
        accumulate: micro-batches per update.
        remat: whether blocks are computed again for their gradients.
        seed: of dropout.
    """

    schedule: Schedule
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    accumulate: int = 1
    remat: bool = False
    seed: int = 0


class Batch(NamedTuple):
    """The micro-batches of one update: K of them, each with B rows of T ids.

    Attributes:
        ids: int32 (K, B, T).
        labels: int32 (K, B, T); those below 0 are left out.
        weights: float32 (K, B, T), of each label; 0 where it is left out.
    """

    ids: tf.Tensor
    labels: tf.Tensor
    weights: tf.Tensor


class TrainingStep:
    """Updates a model's trainable weights.

    Args:
        model: made under the strategy that is current; its compute dtype is that of the step.
        options: see ``StepOptions``.

    Attributes:
        optimizers: AdamW for each device of this process; all hold the same numbers.

    Raises:
        ValueError: when the model has no trainable weights, or weights that are not float32, or a changed layer.
    """

    def __init__(self, model: GPT2Model, options: StepOptions):
        weights_of(model)  # raises when a layer was changed: the formulas would compute something else
        self._model, self._options = model, options
        self._trained = [variable.value for variable in model.trainable_variables]
        check_trained(self._trained)
        paths = [variable.path for variable in model.trainable_variables]
        self._place_of_wte = paths.index(model.wte.path) if model.wte.path in paths else None
        self._strategy = tf.distribute.get_strategy()
        copies = [self._strategy.experimental_local_results(variable) for variable in self._trained]
        self.optimizers = [
            AdamW(variables, weight_decay=options.weight_decay) for variables in zip(*copies, strict=True)
        ]
        self._gradients = tf.function(self._run, autograph=False)
        self._losses = tf.function(self._held_out_sums, autograph=False)
        self._meet = tf.function(lambda: self._strategy.run(add_up_ones), autograph=False)

    def update(self, batch: Batch, number: int) -> float:
        """Makes an update; returns the mean loss of its labels, before it, in nats.

        Args:
            batch: as many micro-batches as ``accumulate``.
            number: of the update, counted from 0: with the seed it decides dropout.

        Raises:
            FloatingPointError: when the loss or a gradient is not finite; the weights are then as before.
        """
        results = self._gradients(batch, tf.constant(number % 2**32, tf.uint32))
        of_devices = [self._strategy.experimental_local_results(result) for result in tf.nest.flatten(results)]
        total, weight, norm = (float(result[0]) for result in of_devices[:3])
        if not (abs(total) < float("inf") and norm < float("inf")):
            raise FloatingPointError(
                f"the loss of update {number} is {total / max(weight, 1e-30)}, the norm of its gradients {norm}; "
                f"lower learning_rate, or raise warmup_steps, and give another folder as out"
            )
        scale = 1 / max(weight, 1e-30)
        if self._options.clip_norm is not None:
            scale *= min(1.0, self._options.clip_norm / max(norm * scale, 1e-30))
        rate = self._options.schedule.rate(number)
        for optimizer, *gradients in zip(self.optimizers, *of_devices[3:], strict=True):
            optimizer.update(gradients, scale=tf.constant(scale, tf.float32), rate=rate, number=number)
        return total / max(weight, 1e-30)

    def wait_for_all(self) -> None:
        """Waits until all workers have come here; a process alone does not wait."""
        if self._strategy.num_replicas_in_sync > 1:
            self._meet()

    def loss_sums(self, batch: Batch) -> tuple[float, float]:
        """Returns the weighted sum of the losses, without dropout, and the sum of the weights."""
        total, weight = self._losses(batch)
        return float(total), float(weight)

    def gradients(self, batch: Batch, number: int) -> tuple[float, list[tf.Tensor]]:
        """Returns the mean loss and its gradients by the trainable weights, of the first device, not clipped."""
        total, weight, _, *gradients = (
            self._strategy.experimental_local_results(result)[0]
            for result in tf.nest.flatten(self._gradients(batch, tf.constant(number, tf.uint32)))
        )
        return float(total / weight), [gradient / weight for gradient in gradients]

    def _run(self, batch: Batch, number: tf.Tensor) -> Any:
        return self._strategy.run(self._sums_of_replica, args=(batch, number))

    def _sums_of_replica(self, batch: Batch, number: tf.Tensor) -> list[tf.Tensor]:
        """Returns loss, weight of the labels, norm of the gradients, and the gradients, summed over all devices."""
        context = tf.distribute.get_replica_context()
        n_replicas = context.num_replicas_in_sync
        n_batches, n_rows, n_positions = batch.ids.shape
        n_own = n_rows // n_replicas
        first = context.replica_id_in_sync_group * n_own
        own = Batch(*(tf.slice(part, (0, first, 0), (n_batches, n_own, n_positions)) for part in batch))
        keys = keys_of_rows(
            tf.constant(self._options.seed % 2**32, tf.uint32),
            number,
            tf.cast(tf.range(n_batches)[:, None] * n_rows + first + tf.range(n_own), tf.uint32),
        )  # (K, B)
        sums = self._sums_of_batches(own, keys)
        if n_replicas > 1:
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, sums)
        return [*sums[:2], tf.linalg.global_norm(sums[2:]), *sums[2:]]

    def _sums_of_batches(self, batch: Batch, keys: tf.Tensor) -> list[tf.Tensor]:
        """Adds up loss, weight and gradients of all micro-batches; one after the other, to hold one set of each."""
        if batch.ids.shape[0] == 1:
            return self._sums(Batch(*(part[0] for part in batch)), keys[0])
        trained = [variable.shape for variable in self._trained]
        start = [tf.constant(0), tf.constant(0.0), tf.constant(0.0), *(tf.zeros(shape) for shape in trained)]

        def add(i: tf.Tensor, *sums: tf.Tensor) -> list[tf.Tensor]:
            more = self._sums(Batch(*(part[i] for part in batch)), keys[i])
            return [i + 1, *(one + other for one, other in zip(sums, more, strict=True))]

        n_batches = batch.ids.shape[0]
        return list(tf.while_loop(lambda i, *_: i < n_batches, add, start, parallel_iterations=1)[1:])

    def _sums(self, batch: Batch, row_keys: tf.Tensor) -> list[tf.Tensor]:
        """Computes loss, weight and gradients of one micro-batch, (B, T)."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self._trained)
            weights = tf.nest.map_structure(read, self._model.weights_tree())  # each variable once
            with tape.stop_recording():
                tokens = formulas.embed_tokens(batch.ids, weights["wte"], dtype=self._model.compute_dtype, ops=fused)
            tape.watch(tokens)
            total = self._total(batch, weights, tokens, rate=self._model.dropout, row_keys=row_keys)
        *gradients, of_tokens = tape.gradient(total, [*self._trained, tokens], unconnected_gradients="zero")
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        if (place := self._place_of_wte) is not None:
            gradients[place] = with_rows(gradients[place], batch.ids, of_tokens)
        return [total, tf.reduce_sum(batch.weights), *gradients]

    def _held_out_sums(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        model, totals = self._model, []
        weights = weights_of(model)
        for i in range(batch.ids.shape[0]):
            one = Batch(*(part[i] for part in batch))
            tokens = formulas.embed_tokens(one.ids, weights["wte"], dtype=model.compute_dtype, ops=fused)
            totals.append(self._total(one, weights, tokens, rate=0.0, row_keys=None))
        return tf.add_n(totals), tf.reduce_sum(batch.weights)

    def _total(
        self, batch: Batch, weights: Any, tokens: tf.Tensor, *, rate: float, row_keys: tf.Tensor | None
    ) -> tf.Tensor:
        """Computes the weighted sum of the losses of one micro-batch, (B, T), from its embedded tokens, (B, T, C)."""
        model = self._model
        x = hidden_states(
            tokens,
            weights,
            config=model.config,
            rate=rate,
            row_keys=row_keys,
            remat=self._options.remat,
        )
        rows = tf.reshape(x, (-1, x.shape[-1]))  # (B*T, C)
        return head_loss(
            rows,
            floats_of(formulas.head_of(weights), x.shape[-1]),
            tf.reshape(batch.labels, [-1]),
            tf.reshape(batch.weights, [-1]),
        )


def read(leaf: Any) -> Any:
    """Returns a weight as a tensor, a variable as that of the current device; ``None`` for ``None``."""
    return None if leaf is None else tf.convert_to_tensor(leaf)


def with_rows(table: tf.Tensor, ids: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Adds rows (B, T, C) to those of a table (V, C) that ids (B, T) name.

    TensorFlow's own gradient of a table that is both looked up and multiplied by makes several copies of it.
    """
    places = tf.reshape(ids, (-1, 1))
    return tf.tensor_scatter_nd_add(table, places, tf.cast(tf.reshape(rows, (-1, table.shape[1])), table.dtype))


def add_up_ones() -> tf.Tensor:
    """Adds up a one of each device, which needs all of them."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.ones(()))


def check_trained(variables: Sequence[tf.Variable]) -> None:
    """Raises unless there are variables to train, all float32."""
    if not variables:
        raise ValueError("model has no trainable weights; set trainable, or call enable_lora")
    for variable in variables:
        if variable.dtype != tf.float32:
            raise ValueError(
                f"model has weights of {variable.dtype.name}, in which small updates are lost; make it with "
                f"dtype='mixed_bfloat16', which keeps them in float32"
            )
