"""The command ``convert``, which writes a model in another format. Imports TensorFlow only when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from tf_gpt2.cli.options import Commands
from tf_gpt2.cli.streams import open_terminal, quiet_tensorflow, write_names


def add_convert(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``convert``."""
    command = commands.add_parser(
        "convert",
        help="write a model in another format",
        description="Reads the model SRC in any format, and writes it to DST with the same numbers.",
    )
    command.set_defaults(run=run_convert, computes=True)
    command.add_argument("source", metavar="SRC", help="124M, tiny, or a folder or file in any format")
    command.add_argument("target", metavar="DST", help="folder to write, or a file that ends in .gguf")
    command.add_argument(
        "--to", required=True, choices=("openai", "huggingface", "keras", "gguf"), help="the format of DST"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "q8_0"),
        default="float32",
        help="of the matrices; other than float32 only to gguf",
    )
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="folder of the models' folders")
    command.add_argument("--overwrite", action="store_true", help="replace DST")
    return command


def run_convert(options: argparse.Namespace) -> None:
    """Writes the model, and prints where; weights alone, and says so, when the vocabulary cannot be read."""
    from tf_gpt2.checkpoint.load import find_folder

    source = find_folder(options.source, options.models_dir)
    with open_terminal() as terminal, quiet_tensorflow(show_on_error=options.debug):
        from tf_gpt2.text.generator import TextGenerator
        from tf_gpt2.text.saving import save
        from tf_gpt2.tokenizer.refusing import RefusingEncoder

        generator = TextGenerator.from_checkpoint(source)
        encoder = generator.encoder
        if isinstance(encoder, RefusingEncoder):
            terminal.tell(f"writes the weights without a vocabulary: {encoder.reason}")
        made = save(
            generator.model,
            None if isinstance(encoder, RefusingEncoder) else encoder,
            Path(options.target),
            options.to,
            dtype=options.dtype,
            overwrite=options.overwrite,
        )
    write_names(f"{made}\n")
