"""What a run shows and writes while it goes: a bar, a table in CSV, TensorBoard's events, a picture of the losses."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import tensorflow as tf
from tqdm import tqdm

COLUMNS = ("step", "loss", "val_loss", "val_perplexity", "val_bits_per_byte", "learning_rate")


class Bar:
    """A bar with the loss, tokens per second and the time left.

    Args:
        n_done: tokens trained on before.
        n_total: tokens of the whole run.
        file: where to show it; ``None`` shows none.
    """

    def __init__(self, n_done: int, n_total: int, file: TextIO | None):
        self._bar = tqdm(
            total=n_total,
            initial=n_done,
            desc="Training",
            unit=" tokens",
            unit_scale=True,
            file=file,
            disable=file is None,
            smoothing=0.05,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {rate_fmt}, {remaining} left{postfix}",
        )

    def show(self, n_tokens: int, loss: float) -> None:
        """Moves on by one update."""
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(n_tokens)

    def note(self, text: str) -> None:
        """Shows what goes on between two updates, in the place of the loss."""
        self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.leave = False
        self._bar.close()


def line_of(line: Mapping[str, float]) -> str:
    """Formats what was measured at the end of a period."""
    parts = [f"step {line['step']:.0f}", f"loss {line['loss']:.4f}"]
    if "val_loss" in line:
        parts += [f"held-out loss {line['val_loss']:.4f} nats", f"perplexity {line['val_perplexity']:.2f}"]
    if "val_bits_per_byte" in line:
        parts.append(f"{line['val_bits_per_byte']:.4f} bits per byte")
    return ", ".join(parts)


def write_table(path: Path, lines: Sequence[Mapping[str, float]]) -> None:
    """Writes all lines as CSV, in the place of an older table."""
    staging = path.with_name(f".{path.name}.part")
    with staging.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(lines)
    staging.replace(path)


@contextlib.contextmanager
def open_events(folder: Path | None) -> Iterator[Any]:
    """Yields TensorBoard's writer of a folder; ``None`` for none."""
    if folder is None:
        yield None
        return
    writer = tf.summary.create_file_writer(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def write_events(writer: Any, line: Mapping[str, float]) -> None:
    """Writes a line for TensorBoard."""
    if writer is None:
        return
    values = [tf.compat.v1.Summary.Value(tag=name, simple_value=line[name]) for name in line if name != "step"]
    content = tf.compat.v1.Summary(value=values).SerializeToString()
    with writer.as_default():
        tf.summary.experimental.write_raw_pb(content, step=int(line["step"]))  # needs no package tensorboard
    writer.flush()


def draw_losses(path: Path, lines: Sequence[Mapping[str, float]]) -> bool:
    """Draws the losses as a PNG; returns whether matplotlib, the extra ``train``, is there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, label in (("loss", "training"), ("val_loss", "held out")):
        points = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None)
    axes.set(xlabel="updates", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    staging = path.with_name(f".{path.name}.part")
    figure.savefig(staging, format="png", dpi=120)
    staging.replace(path)
    return True
