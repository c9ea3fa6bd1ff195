"""Low-rank additions to a model's matrices: made, merged, saved and loaded as PEFT has them.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_gpt2.checkpoint.peft import Adapter, read_adapter, write_adapter
from tf_gpt2.errors import CheckpointError

PLACES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""The matrices of a block."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """What was added to a model.

    Attributes:
        rank: r.
        alpha: the additions' scale times the rank.
        targets: names of matrices, as for ``GPT2Model.enable_lora``.
    """

    rank: int
    alpha: float
    targets: Sequence[str]

    @property
    def places(self) -> tuple[str, ...]:
        """The matrices of each block that ``targets`` names."""
        return tuple(place for place in PLACES if is_target(place, self.targets))


def is_target(place: str, targets: Sequence[str]) -> bool:
    """Whether a matrix such as ``"attn.c_proj"`` is named, in full or by the end of its name."""
    return any(place == target or place.endswith(f".{target}") for target in targets)


def check_lora(rank: Any, alpha: Any, targets: Any) -> Lora:
    """Returns the checked arguments of ``enable_lora``.

    Raises:
        ValueError: when one is out of range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha!r}")
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [name for name in names if not any(is_target(place, [name]) for place in PLACES)]
    if unknown or not names:
        raise ValueError(f"targets must be among c_attn, c_fc, c_proj, {', '.join(PLACES)}, got {unknown or names!r}")
    return Lora(rank, float(alpha), names)


def linears(model: Any, places: Sequence[str]) -> list[tuple[str, Any]]:
    """Returns the layers of the named matrices in all blocks, with names such as ``"h.0.attn.c_attn"``."""
    return [
        (f"h.{i}.{place}", getattr(getattr(block, part), name))
        for i, block in enumerate(model.blocks)
        for place in places
        for part, _, name in [place.partition(".")]
    ]


def enable(model: Any, *, rank: int, alpha: float | None, targets: Sequence[str], seed: int) -> None:
    """Adds to a model what ``GPT2Model.enable_lora`` says."""
    lora = check_lora(rank, alpha, targets)
    if model.lora is not None:
        raise ValueError(f"LoRA is on already, with {model.lora}; call merge_lora first")
    for variable in model.variables:
        variable.trainable = False
    rng = np.random.default_rng(seed)
    for _, linear in linears(model, lora.places):
        add_to(linear, lora, rng)
    model.lora = lora
    forget_compiled(model)


def forget_compiled(model: Any) -> None:
    """Lets ``fit``, ``evaluate`` and ``predict`` be traced again: they would go on with the variables of before."""
    model.train_function = model.test_function = model.predict_function = None


def add_to(linear: Any, lora: Lora, rng: np.random.Generator) -> None:
    """Adds ``a``, uniform in ±1/sqrt(n_in) as PEFT has it, ``b``, zeros, and the scale to a layer."""
    bound = linear.n_in**-0.5
    linear._tracker.unlock()  # Keras adds no variables to a built layer otherwise; its own enable_lora does the same
    try:
        linear.lora_a = add_float(linear, "lora_a", (lora.rank, linear.n_in))
        linear.lora_b = add_float(linear, "lora_b", (linear.n_out, lora.rank))
        linear.lora_scale = add_float(linear, "lora_scale", (), trainable=False)
    finally:
        linear._tracker.lock()
    linear.lora_a.assign(rng.uniform(-bound, bound, linear.lora_a.shape).astype(np.float32))
    linear.lora_scale.assign(np.float32(lora.alpha / lora.rank))


def add_float(linear: Any, name: str, shape: tuple[int, ...], *, trainable: bool = True) -> keras.Variable:
    """Adds a float32 variable of zeros, whatever the dtype of the layer: small updates would be lost in bfloat16."""
    return linear.add_weight(
        shape=shape, initializer="zeros", dtype="float32", trainable=trainable, autocast=False, name=name
    )


def merge(model: Any) -> None:
    """Does what ``GPT2Model.merge_lora`` says."""
    if model.lora is None:
        raise ValueError("LoRA is not on; call enable_lora first")
    if model.quantization is not None:
        raise ValueError(
            f"quantization={model.quantization!r}: integers cannot hold the sum; load the adapter into a float model"
        )
    for _, linear in linears(model, model.lora.places):
        leaf = linear.leaf_tree()["w"]
        leaf.write(leaf.read())
        remove_from(linear)
    model.lora = None
    for variable in model.weights:  # not ``variables``, which has the seeds of Keras's own dropout
        variable.trainable = True
    forget_compiled(model)


def described(model: Any) -> Lora:
    """Returns ``model.lora`` with the alpha of the scale in use: ``load_weights`` brings that of another model."""
    lora = model.lora
    _, linear = linears(model, lora.places)[0]
    scale = np.asarray(linear.lora_scale.value)
    if scale == np.float32(lora.alpha / lora.rank):
        return lora
    return dataclasses.replace(lora, alpha=float(scale * np.float32(lora.rank)))


def remove_from(linear: Any) -> None:
    """Removes the additions of a layer."""
    for name in ("lora_a", "lora_b", "lora_scale"):
        linear._untrack_variable(getattr(linear, name))
        setattr(linear, name, None)


# ---- PEFT's folder


def save_lora(model: Any, folder: str | Path, *, base: str | None = None) -> None:
    """Writes what ``enable_lora`` added to a model as a folder that PEFT loads.

    Args:
        model: a ``GPT2Model`` with LoRA on.
        folder: made if need be; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the name of the model without the additions, for PEFT, such as ``"gpt2"``.

    Raises:
        ValueError: when LoRA is not on.

    Example:
        >>> import tempfile, tf_gpt2
        >>> config = tf_gpt2.GPT2Config(n_vocab=300, n_ctx=16, n_embd=8, n_head=2, n_layer=1)
        >>> model, other = tf_gpt2.GPT2Model(config), tf_gpt2.GPT2Model(config)
        >>> model.enable_lora(4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(model, folder)
        ...     load_lora(other, folder)
        >>> other.lora.rank
        4
    """
    if model.lora is None:
        raise ValueError("model has no LoRA; call enable_lora and train it first")
    pairs = {
        name: (np.asarray(linear.lora_a.value), np.asarray(linear.lora_b.value))
        for name, linear in linears(model, model.lora.places)
    }
    lora = described(model)
    write_adapter(Adapter(lora.rank, lora.alpha, lora.targets, pairs), folder, base=base)


def load_lora(model: Any, folder: str | Path) -> None:
    """Enables LoRA with the additions in a folder that PEFT or ``save_lora`` wrote.

    Args:
        model: a ``GPT2Model`` without LoRA.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: when a file is missing or damaged, the additions do not fit the model, or the config asks for
            what is not supported.
        ValueError: when LoRA is on already.
    """
    layers = dict(linears(model, PLACES))
    adapter = read_adapter(folder, list(layers))
    for name, (a, b) in adapter.pairs.items():
        linear = layers[name]
        if (a.shape[1], b.shape[0]) != (linear.n_in, linear.n_out):
            raise CheckpointError(
                f"{folder} has {name} in the shapes {a.shape} and {b.shape}; the model's matrix has the shape "
                f"({linear.n_out}, {linear.n_in}): is this its adapter?"
            )
    enable(model, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=0)
    for name, (a, b) in adapter.pairs.items():
        layers[name].lora_a.assign(a)
        layers[name].lora_b.assign(b)
