"""The command ``export``, which writes a SavedModel. Imports TensorFlow only when it runs."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tf_gpt2.cli.options import Commands, add_model_options, add_speed_options, find_model, load_generator, positive
from tf_gpt2.cli.streams import open_terminal, quiet_tensorflow, write_names

HOW_TO_CALL = """\
serve it   docker run --rm -p 127.0.0.1:8501:8501 -v {mount} -e MODEL_NAME=gpt2 \\
               tensorflow/serving:2.21.0 --rest_api_timeout_in_ms=300000
call it    curl -d '{{"instances": ["To be"]}}' http://localhost:8501/v1/models/gpt2:predict
"""


def add_export(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``export``."""
    command = commands.add_parser(
        "export",
        help="write a SavedModel for TensorFlow Serving",
        description="Writes DIR/VERSION, a SavedModel that takes text and returns text.",
    )
    command.set_defaults(run=run_export)
    command.add_argument("folder", metavar="DIR", help="folder of the model's versions")
    add_model_options(command)
    command.add_argument("--version", type=positive, default=1, metavar="N", help="servers load the highest")
    command.add_argument(
        "--max_new_tokens", type=positive, default=40, metavar="N", help="most new tokens, where a request does not say"
    )
    command.add_argument("--xla", action="store_true", help="also write signatures that XLA compiles, named …_xla")
    command.add_argument(
        "--warm_up",
        choices=("plain", "xla", "none"),
        default="plain",
        help="signatures that a server runs once while it loads; xla fails in a server without XLA",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing version")
    add_speed_options(command)
    return command


def run_export(options: argparse.Namespace) -> None:
    """Writes the folder; reports each step on standard error, and prints the folder and how to serve it."""
    model_folder = find_model(options)
    with open_terminal() as terminal, quiet_tensorflow(show_on_error=options.debug):
        from tf_gpt2.serving.export import export_saved_model, size_bytes

        terminal.tell("loading the model")
        made = export_saved_model(
            load_generator(model_folder, options),
            options.folder,
            version=options.version,
            max_new_tokens=options.max_new_tokens,
            xla=options.xla,
            warm_up=options.warm_up,
            overwrite=options.overwrite,
            on_step=terminal.tell,
        )
        write_names(f"made       {made} ({size_bytes(made) / 1e6:.0f} MB, {options.dtype})\n")
        write_names(HOW_TO_CALL.format(mount=shlex.quote(f"{Path(options.folder).resolve()}:/models/gpt2:ro")))
