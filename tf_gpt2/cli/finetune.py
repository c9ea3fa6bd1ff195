"""The command ``finetune``. Imports TensorFlow only when it runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tf_gpt2.cli.options import Commands, add_model_options, find_model, natural, positive
from tf_gpt2.cli.streams import open_terminal, quiet_tensorflow, write_names

HOW_TO_USE = """\
made       {out}
try it     tf-gpt2 generate --models_dir {parent} --model_size {name} "Once"
measured   {out}/training/log.csv, losses.png; tensorboard --logdir {out}/training/events
"""

SIZES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "steps": (positive, "N", "updates of the weights (default: three epochs, at least 100, at most 2000)"),
    "epochs": (positive, "N", "instead of --steps: how often to read the text"),
    "batch_size": (positive, "N", "windows per batch (default: 2048 tokens)"),
    "length": (positive, "T", "tokens of a window (default: the model's)"),
    "learning_rate": (float, "R", "the highest (default: 1e-4; 1e-3 with LoRA)"),
    "warmup_steps": (natural, "N", "updates until it is reached (default: a twentieth, at most 200)"),
    "save_every": (positive, "N", "updates between two checkpoints (default: a fifth, at most 100)"),
    "lora_rank": (positive, "R", "train additions of this rank, not the weights"),
    "lora_alpha": (float, "A", "their scale times the rank (default: the rank)"),
}
"""Type, name of the value and help of options whose default depends on the text or the model."""


def add_finetune(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``finetune``."""
    command = commands.add_parser(
        "finetune",
        help="train a model on texts",
        description="Trains a model on texts, and writes a folder with the seven files. The same command goes on after "
        "an interruption.",
    )
    command.set_defaults(run=run_finetune, computes=True)
    command.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help=".txt, .jsonl, .bin of ids, or folders"
    )
    command.add_argument("--validation", type=Path, nargs="+", default=[], metavar="FILE", help="text to measure with")
    command.add_argument("--field", default="text", metavar="KEY", help="the text's key in .jsonl")
    add_model_options(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the result")
    for name, (kind, value, text) in SIZES.items():
        command.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=value, help=text)
    command.add_argument(
        "--lora_targets", nargs="+", default=["c_attn"], metavar="NAME", help="c_attn, c_fc, c_proj, mlp.c_proj, …"
    )
    command.add_argument("--weight_decay", type=float, default=0.1, metavar="R", help="of matrices")
    command.add_argument("--accumulate", type=positive, default=1, metavar="N", help="batches per update")
    command.add_argument("--dropout", type=float, default=0.1, metavar="P", help="rate")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "int4"),
        default="float32",
        help="bfloat16 is mixed precision, int8 and int4 need --lora_rank",
    )
    command.add_argument("--remat", action="store_true", help="less memory, more time: compute each block twice")
    command.add_argument(
        "--sample_every", type=natural, default=0, metavar="N", help="updates between two samples of text; 0 for none"
    )
    command.add_argument("--seed", type=natural, default=0, metavar="S", help="of order, dropout and samples")
    command.add_argument("--threads", type=positive, metavar="N", help="cores to compute on; all by default")
    return command


def run_finetune(options: argparse.Namespace) -> None:
    """Trains with a bar, and prints the folder and how to use it."""
    folder = find_model(options)
    with open_terminal() as terminal, quiet_tensorflow(show_on_error=options.debug):
        from tf_gpt2.model import require_tensorflow_backend

        require_tensorflow_backend()  # before TensorFlow's own import
        import tensorflow as tf

        from tf_gpt2.training.from_text import finetune_text

        if options.threads is not None:
            tf.config.threading.set_intra_op_parallelism_threads(options.threads)
        try:
            finetune_text(folder, options.out, recipe_of(options), progress=terminal.file if shows() else False)
        except KeyboardInterrupt as interruption:
            if interruption.args:
                terminal.tell(f"{interruption}: give the same command")
            raise
    out = options.out
    if shows():
        write_names(HOW_TO_USE.format(out=out, parent=out.parent, name=out.name))


def recipe_of(options: argparse.Namespace) -> Any:
    """Returns the options as a ``Recipe``."""
    import dataclasses

    from tf_gpt2.training.from_text import Recipe

    names = [field.name for field in dataclasses.fields(Recipe)]
    return Recipe(**{name: value for name, value in vars(options).items() if name in names})


def shows() -> bool:
    """Whether this process shows the bar: the only one, or the first of several workers."""
    task = json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {})
    return not task.get("index")
