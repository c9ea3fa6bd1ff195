"""``finetune``: trains a model on a dataset, writes checkpoints, and goes on after an interruption, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf

from tf_gpt2.errors import CheckpointError
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.lora import described
from tf_gpt2.model.weights import is_finite
from tf_gpt2.text.generator import TextGenerator
from tf_gpt2.tokenizer.encoder import Encoder
from tf_gpt2.training import reports, state
from tf_gpt2.training.losses import label_weights
from tf_gpt2.training.optimizer import Schedule
from tf_gpt2.training.state import Progress
from tf_gpt2.training.step import Batch, StepOptions, TrainingStep

CHECKPOINTS, BEST = "training", "best.npz"
"""The folder inside ``out`` for all but the result, and the file of the best weights in it."""

SAMPLE_TOKENS = 40
"""Tokens of a sample of text, or fewer where the window is shorter."""


def finetune(
    model: GPT2Model,
    dataset: tf.data.Dataset,
    *,
    steps: int | None = None,
    validation: tf.data.Dataset | None = None,
    encoder: Encoder | None = None,
    out: str | Path | None = None,
    learning_rate: float = 1e-4,
    warmup_steps: int | None = None,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
    remat: bool = False,
    seed: int = 0,
    save_every: int = 100,
    sample_every: int = 0,
    about: Mapping[str, Any] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    progress: bool | TextIO = True,
) -> keras.callbacks.History:
    """Trains a model's trainable weights with AdamW, a warm-up and a cosine; leaves the best weights in the model.

    Under a strategy of ``tf.distribute`` each device takes its rows of each batch. With ``out``, an interrupted run
    goes on from its last checkpoint when it is called again with the same arguments: losses and weights are then those
    of a run without interruption, bit for bit on one machine.

    Args:
        model: made under the current strategy. Its ``dropout`` is used; dtype ``"float32"`` or ``"mixed_bfloat16"``.
        dataset: batches of ``(ids, targets)`` or ``(ids, targets, sample_weight)`` of one shape (B, T), the same at
            each iteration, as ``text_dataset`` makes them. Targets below 0 are left out.
        steps: updates of the weights; by default as many as the dataset has batches for.
        validation: batches to measure the held-out loss with, every ``save_every`` updates.
        encoder: the vocabulary; for samples of text, and bits per byte.
        out: a folder for checkpoints, tables and pictures, in ``out/training``; ``None`` writes nothing.
        learning_rate: the highest; it falls to a tenth.
        warmup_steps: updates until it is reached; by default a twentieth of ``steps``, at most 200.
        weight_decay: of matrices; vectors do not decay.
        clip_norm: the largest norm of all gradients together; ``None`` for any.
        accumulate: batches per update.
        remat: keep less memory: each block is computed again for its gradients.
        seed: of dropout, and of samples.
        save_every: updates between two checkpoints, which are also the periods of the history.
        sample_every: updates between two samples of text, shown above the bar; 0 for none.
        about: what else must be the same when the run goes on, such as the fingerprint of the text; JSON can hold it.
        callbacks: Keras's; a period of ``save_every`` updates is what they call an epoch, an update a batch. What they
            remember themselves is not in a checkpoint.
        progress: whether a bar is shown on standard error, or the file to show it on.

    Returns:
        Keras's history: ``loss``, ``learning_rate`` and, with ``validation``, ``val_loss``, ``val_perplexity`` and
        ``val_bits_per_byte`` of each period; ``epoch`` has the updates made at its end.

    Raises:
        CheckpointError: when ``out`` has a run with other arguments; they are named.
        FloatingPointError: when the loss is not finite; the checkpoints are from before.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
        ValueError: when an argument is out of range.
    """
    check_numbers(accumulate=accumulate, save_every=save_every)
    check_numbers(at_least=0, sample_every=sample_every)
    check_above_0(learning_rate=learning_rate)
    if clip_norm is not None:
        check_above_0(clip_norm=clip_norm)
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
    steps = count_steps(dataset, accumulate) if steps is None else steps
    check_numbers(steps=steps)
    warmup_steps = min(200, steps // 20) if warmup_steps is None else warmup_steps
    check_numbers(at_least=0, warmup_steps=warmup_steps)
    options = StepOptions(
        schedule=Schedule(learning_rate=learning_rate, warmup_steps=warmup_steps, steps=steps),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        accumulate=accumulate,
        remat=remat,
        seed=seed,
    )
    run = Run(
        model,
        TrainingStep(model, options),
        options,
        validation=validation,
        encoder=encoder,
        folder=None if out is None else Path(out) / CHECKPOINTS,
        about={
            **settings(model, dataset, options, save_every),
            **({} if out is None else fingerprints(model, dataset, validation)),
            **(about or {}),
        },
    )
    history = keras.callbacks.History()
    calls = keras.callbacks.CallbackList(
        [*callbacks, history], model=model, steps=save_every, epochs=-(-steps // save_every)
    )
    file = sys.stderr if progress is True else progress or None
    run.go(dataset, calls, save_every=save_every, sample_every=sample_every, file=file)
    history.history, history.epoch = columns(run.progress.lines), [int(line["step"]) for line in run.progress.lines]
    return history


class Run:
    """A run of training: what is trained, how far it is, and where its checkpoints are.

    Args:
        model: the model.
        step: updates its weights.
        options: of the step.
        validation: as for ``finetune``.
        encoder: as for ``finetune``.
        folder: of the checkpoints, or ``None``.
        about: what must be the same when the run goes on.
    """

    def __init__(
        self,
        model: GPT2Model,
        step: TrainingStep,
        options: StepOptions,
        *,
        validation: tf.data.Dataset | None,
        encoder: Encoder | None,
        folder: Path | None,
        about: Mapping[str, Any],
    ):
        self.progress = Progress()
        self._model, self._step, self._options = model, step, options
        self._validation, self._encoder = validation, encoder
        self._folder, self._about = folder, about
        self._best: list[np.ndarray] | None = None
        self._bytes = None if encoder is None else bytes_of_tokens(encoder)
        self._writes = folder is not None and is_chief()

    def go(
        self,
        dataset: tf.data.Dataset,
        calls: keras.callbacks.CallbackList,
        *,
        save_every: int,
        sample_every: int,
        file: TextIO | None,
    ) -> None:
        """Trains to the end, from the last checkpoint on if there is one; then takes the best weights."""
        self._restore()
        steps, accumulate = self._options.schedule.steps, self._options.accumulate
        n_tokens = math.prod(batch_shape(dataset)) * accumulate
        bar = reports.Bar(self.progress.update * n_tokens, steps * n_tokens, file)
        batches = iter(dataset.skip(self.progress.update * accumulate).batch(accumulate, drop_remainder=True))
        self._model.stop_training = False  # a callback sets it
        calls.on_train_begin()
        with contextlib.closing(bar), interrupts() as interrupted, self._events() as events:
            while self.progress.update < steps and not self._model.stop_training:
                batch = next_batch(batches, self.progress.update)
                check_ids(batch, self._model.config.n_vocab)
                loss = self._one_update(batch, calls, save_every)
                bar.show(n_tokens, loss)
                done = self.progress.update
                if done % save_every == 0 or done == steps:
                    self._end_period(calls, events, bar)
                if sample_every and done % sample_every == 0 and self._encoder is not None:
                    bar.say(self._sample(self._encoder))
                if interrupted():
                    self._save(bar)
                    self._draw()
                    raise KeyboardInterrupt(f"saved at update {done} of {steps}; the same call goes on from there")
        self._draw()
        self._take_best()
        self._step.wait_for_all()  # the first worker may remove the checkpoints behind this
        calls.on_train_end()

    def _one_update(self, batch: Batch, calls: keras.callbacks.CallbackList, save_every: int) -> float:
        number = self.progress.update
        period, place = divmod(number, save_every)
        if place == 0:
            calls.on_epoch_begin(period)
        calls.on_train_batch_begin(place)
        loss = self._step.update(batch, number)
        self.progress.update += 1
        self.progress.losses.append(loss)
        calls.on_train_batch_end(place, {"loss": loss})
        return loss

    def _end_period(self, calls: keras.callbacks.CallbackList, events: Any, bar: reports.Bar) -> None:
        """Measures the held-out loss, keeps the weights if they are the best, and writes a checkpoint."""
        progress = self.progress
        rate = self._options.schedule.rate(progress.update - 1)
        line = {"step": progress.update, "loss": float(np.mean(progress.losses)), "learning_rate": rate}
        progress.losses = []
        if self._validation is not None:
            line |= self._measure(self._validation, bar)
        self._refuse_ruins(line)
        if "val_loss" in line and (progress.best_loss is None or line["val_loss"] < progress.best_loss):
            progress.best_loss, progress.best_update = line["val_loss"], progress.update
            self._keep_best()
        progress.lines.append(line)
        bar.say(reports.line_of(line))
        self._save(bar)
        if self._writes and self._folder is not None:
            reports.write_table(self._folder / "log.csv", progress.lines)
            reports.write_events(events, line)
        calls.on_epoch_end(len(progress.lines) - 1, {name: value for name, value in line.items() if name != "step"})

    def _draw(self) -> None:
        """Draws the losses so far; at the end, because a picture takes as long as many updates of a small model."""
        if self._writes and self._folder is not None and self.progress.lines:
            reports.draw_losses(self._folder / "losses.png", self.progress.lines)

    def _refuse_ruins(self, line: Mapping[str, float]) -> None:
        """Raises FloatingPointError when the last update has left weights that no checkpoint should have."""
        weights = self._step.optimizers[0].variables
        if not math.isfinite(line.get("val_loss", 0.0)) or not all(map(is_finite, weights)):
            raise FloatingPointError(
                f"after update {line['step']} weights or losses are not finite; lower learning_rate, or raise "
                f"warmup_steps, and give another folder as out"
            )

    def _measure(self, validation: tf.data.Dataset, bar: reports.Bar) -> dict[str, float]:
        """Returns the held-out loss per token in nats, the perplexity and, with a vocabulary, bits per byte."""
        nats = weight = n_bytes = 0.0
        for i, elements in enumerate(validation):
            bar.note(f"held-out batch {i + 1}")
            batch = as_batch([part[None] for part in elements])
            check_ids(batch, self._model.config.n_vocab)
            sums = self._step.loss_sums(batch)
            nats, weight = nats + sums[0], weight + sums[1]
            if self._bytes is not None:
                labels = batch.labels.numpy()
                n_bytes += float(self._bytes[labels[labels >= 0]].sum())
        loss = nats / max(weight, 1e-30)
        measured = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        return {**measured, "val_bits_per_byte": nats / math.log(2) / n_bytes} if n_bytes else measured

    def _sample(self, encoder: Encoder) -> str:
        """Returns a text that the model writes after ``<|endoftext|>``."""
        n_tokens = min(SAMPLE_TOKENS, self._model.config.n_ctx - 1)
        generator, seed = TextGenerator(self._model, encoder), self._options.seed
        text = generator.generate(
            "", max_new_tokens=n_tokens, temperature=0.8, top_p=0.95, seed=seed, jit_compile=False
        )
        return "sample: " + text.strip().replace("\n", "\n        ")

    # ---- weights and checkpoints

    def _variables(self) -> list[list[tf.Variable]]:
        """Returns all that training changes, for each device of this process: weights, then AdamW's slots."""
        return [[*optimizer.variables, *optimizer.slots] for optimizer in self._step.optimizers]

    def _save(self, bar: reports.Bar) -> None:
        if self._writes and self._folder is not None:
            bar.note("saving")
            arrays = (variable.numpy() for variable in self._variables()[0])
            state.save(self._folder, self.progress, arrays, self._about)

    def _restore(self) -> None:
        if self._folder is None:
            return
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            state.remove_unfinished(self._folder)
        found = state.load(self._folder, self._about)
        if found is None:
            return
        self.progress, arrays = found
        for variables in self._variables():
            assign(variables, arrays, self._folder)

    def _keep_best(self) -> None:
        best = (variable.numpy() for variable in self._step.optimizers[0].variables)
        if self._folder is None:
            self._best = list(best)
        elif self._writes:
            state.write_arrays(self._folder / BEST, best)

    def _take_best(self) -> None:
        """Assigns the weights with the least held-out loss to the model, where that was measured."""
        if self.progress.best_loss is None or self.progress.best_update == self.progress.update:
            return
        best = self._best if self._folder is None else state.read_arrays(self._folder / BEST)
        for optimizer in self._step.optimizers:
            assign(optimizer.variables, best or [], self._folder)

    @contextlib.contextmanager
    def _events(self) -> Iterator[Any]:
        with reports.open_events(self._folder / "events" if self._writes and self._folder else None) as writer:
            yield writer


def remove_checkpoints(out: str | Path) -> None:
    """Removes the checkpoints of a run that has ended and whose result is written; tables and pictures stay."""
    folder = Path(out) / CHECKPOINTS
    for checkpoint in state.checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / BEST).unlink(missing_ok=True)


def assign(variables: Sequence[tf.Variable], arrays: Sequence[np.ndarray], place: Path | None) -> None:
    """Assigns arrays to variables; raises CheckpointError when their shapes differ."""
    if [tuple(variable.shape) for variable in variables] != [array.shape for array in arrays]:
        raise CheckpointError(f"{place} has weights of other shapes than the model; give another folder as out")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


# ---- batches


def next_batch(batches: Iterator[Any], update: int) -> Batch:
    """Returns the micro-batches of one update.

    Raises:
        ValueError: when the dataset has ended.
    """
    elements = next(batches, None)
    if elements is None:
        raise ValueError(f"dataset has ended after {update} updates; lower steps, or make the dataset with more epochs")
    return as_batch(elements)


def as_batch(elements: Sequence[tf.Tensor]) -> Batch:
    """Makes a batch of ``(ids, targets)`` or ``(ids, targets, sample_weight)``, each (K, B, …)."""
    ids, labels, *rest = elements
    labels = tf.cast(labels, tf.int32)
    if not rest:
        return Batch(tf.cast(ids, tf.int32), labels, label_weights(labels))
    given = rest[0]
    weight = given if given.shape.rank == labels.shape.rank else given[..., None]  # (K, B, T) or (K, B, 1)
    return Batch(tf.cast(ids, tf.int32), labels, label_weights(labels, tf.broadcast_to(weight, labels.shape)))


def check_ids(batch: Batch, n_vocab: int) -> None:
    """Raises ValueError for ids outside the vocabulary: compiled code would compute a loss of them without a word."""
    lowest, highest = (int(find(batch.ids)) for find in (tf.reduce_min, tf.reduce_max))
    for name, value in (("ids", lowest), ("ids", highest), ("targets", max(0, int(tf.reduce_max(batch.labels))))):
        if not 0 <= value < n_vocab:
            raise ValueError(f"dataset has {value} among its {name}, must be in the vocabulary, [0, {n_vocab})")


def batch_shape(dataset: tf.data.Dataset) -> tuple[int, int]:
    """Returns B and T of a dataset; raises ValueError unless its batches have one known shape."""
    spec = dataset.element_spec
    shape = tuple(spec[0].shape) if isinstance(spec, tuple) and len(spec) in (2, 3) else ()
    if len(shape) != 2 or None in shape:
        raise ValueError(
            f"dataset must have batches of (ids, targets) of one known shape (B, T), got {spec}; make it with "
            f"text_dataset, or batch with drop_remainder=True"
        )
    n_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if shape[0] % n_replicas:
        raise ValueError(f"dataset has batches of {shape[0]} rows, which {n_replicas} devices cannot share evenly")
    return shape


def count_steps(dataset: tf.data.Dataset, accumulate: int) -> int:
    """Returns how many updates a dataset has batches for."""
    n_batches = int(dataset.cardinality())
    if n_batches < 0 or n_batches > 2**62:
        raise ValueError("steps must be given for a dataset that has no known end")
    if n_batches < accumulate:
        raise ValueError(f"dataset has {n_batches} batches, fewer than accumulate={accumulate}")
    return n_batches // accumulate


def settings(model: GPT2Model, dataset: tf.data.Dataset, options: StepOptions, save_every: int) -> dict[str, Any]:
    """Returns what decides the numbers of a run, as JSON can hold it."""
    shape = batch_shape(dataset)
    if shape[1] > model.config.n_ctx:
        raise ValueError(f"dataset has rows of {shape[1]} ids, the model's window has {model.config.n_ctx}; cut them")
    schedule = dataclasses.asdict(options.schedule)
    others = {name: value for name, value in vars(options).items() if name != "schedule"}
    return {
        **model.config.to_hparams(),
        **schedule,
        **others,
        "dropout": model.dropout,
        "dtype": model.dtype_policy.name,
        "batch_size": shape[0],
        "length": shape[1],
        "save_every": save_every,
        "trained": [list(variable.shape) for variable in model.trainable_variables],
        "lora": None if model.lora is None else dataclasses.asdict(described(model)),
    }


def fingerprints(
    model: GPT2Model, dataset: tf.data.Dataset, validation: tf.data.Dataset | None
) -> dict[str, str | None]:
    """Returns names for the weights that are not trained, and for the first batches."""
    return {
        "frozen_weights": fingerprint(variable.numpy() for variable in model.weights if not variable.trainable),
        "first_batch": fingerprint_of_first(dataset),
        "first_held_out_batch": None if validation is None else fingerprint_of_first(validation),
    }


def fingerprint_of_first(dataset: tf.data.Dataset) -> str:
    """Returns a name for a dataset's first batch."""
    return fingerprint(part.numpy() for part in next(iter(dataset), ()))


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Returns a name for the numbers in arrays."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


# ---- the process


def is_chief() -> bool:
    """Whether this process writes: the only one, or the first of several workers."""
    resolver = tf.distribute.get_strategy().cluster_resolver
    return resolver is None or not resolver.task_id


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed: the update under way ends first. A second one interrupts at once."""
    pressed = threading.Event()

    def note(*_: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in no other
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# ---- numbers


def check_numbers(*, at_least: int = 1, **numbers: int) -> None:
    """Raises ValueError for a number that is too low, by its name."""
    for name, value in numbers.items():
        if value < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_above_0(**numbers: float) -> None:
    """Raises ValueError for a number that is not above 0 or not finite, by its name."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value}")


def bytes_of_tokens(encoder: Encoder) -> np.ndarray:
    """Returns how many bytes of text each id stands for, int64 (V,); 0 for ``<|endoftext|>``."""
    sizes = np.zeros(max(encoder.decoder) + 1, np.int64)
    for token_id, token in encoder.decoder.items():
        sizes[token_id] = 0 if token_id == encoder.end_of_text else len(token)
    return sizes


def columns(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Turns the lines of a run into the columns of Keras's history."""
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    return {name: [line[name] for line in lines if name in line] for name in names}
