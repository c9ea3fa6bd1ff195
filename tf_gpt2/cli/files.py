"""The commands ``download``, ``encode``, ``decode`` and ``info``, which do without TensorFlow."""

from __future__ import annotations

import argparse
from pathlib import Path

from tf_gpt2.cli.options import Commands, add_model_options
from tf_gpt2.cli.streams import read_argument, write, write_names
from tf_gpt2.config import SIZES, GPT2Config


def add_download(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``download``."""
    command = commands.add_parser(
        "download", help="fetch OpenAI's files", description="Fetches a model's seven files; resumes a cut download."
    )
    command.set_defaults(run=run_download)
    command.add_argument("model_size", metavar="SIZE", nargs="?", default="124M", help=", ".join(SIZES))
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="files go to DIR/SIZE")
    return command


def add_encode(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``encode``."""
    command = commands.add_parser("encode", help="text to token ids", description="Prints the token ids of TEXT.")
    command.set_defaults(run=run_encode)
    command.add_argument("text", metavar="TEXT", help="text; - reads it from standard input")
    add_model_options(command)
    return command


def add_decode(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``decode``."""
    command = commands.add_parser("decode", help="token ids to text", description="Prints the text of token ids.")
    command.set_defaults(run=run_decode)
    command.add_argument("ids", metavar="ID", nargs="+", help="token ids; a single - reads them from standard input")
    add_model_options(command)
    return command


def add_info(commands: Commands) -> argparse.ArgumentParser:
    """Adds ``info``."""
    command = commands.add_parser(
        "info",
        help="sizes, parameters, memory; processor",
        description="Prints a table of the models, and what this machine computes with.",
    )
    command.set_defaults(run=run_info)
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="folder of the models' folders")
    return command


def run_download(options: argparse.Namespace) -> None:
    """Fetches the files, and prints their folder."""
    from tf_gpt2.checkpoint.download import download_gpt2_files

    folder = Path(options.models_dir) / options.model_size
    download_gpt2_files(options.model_size, folder)
    write_names(f"{folder}\n")


def run_encode(options: argparse.Namespace) -> None:
    """Prints the ids, separated by spaces."""
    from tf_gpt2.checkpoint.load import get_encoder

    encoder = get_encoder(options.model_size, options.models_dir)
    write(" ".join(map(str, encoder.encode(read_argument(options.text)))) + "\n")


def run_decode(options: argparse.Namespace) -> None:
    """Prints the text."""
    from tf_gpt2.checkpoint.load import get_encoder

    words = read_argument("-").split() if options.ids == ["-"] else options.ids
    encoder = get_encoder(options.model_size, options.models_dir)
    try:
        ids = [int(word) for word in words]
    except ValueError:
        raise ValueError(f"ID must be integers, got {' '.join(words)!r}") from None
    write(encoder.decode(ids) + "\n")


def run_info(options: argparse.Namespace) -> None:
    """Prints each size's hyperparameters, the memory of its weights, and whether it is here; then the machine."""
    from tf_gpt2.checkpoint.download import embedded_dir, missing_files

    configs = {"tiny": GPT2Config.from_file(embedded_dir() / "hparams.json"), **SIZES}
    write(f"{'size':8}{'layers':>8}{'heads':>8}{'width':>8}{'context':>9}{'vocabulary':>12}{'parameters':>16}")
    write(f"{'float32':>11}{'bfloat16':>11}  here\n")
    for name, config in configs.items():
        is_here = name == "tiny" or not missing_files(Path(options.models_dir) / name)
        numbers = f"{config.n_layer:8}{config.n_head:8}{config.n_embd:8}{config.n_ctx:9}{config.n_vocab:12}"
        sizes = f"{config.n_params:16,}{config.n_params * 4 / 1e6:8.0f} MB{config.n_params * 2 / 1e6:8.0f} MB"
        write(f"{name:8}{numbers}{sizes}  {'yes' if is_here else 'no'}\n")
    write("\n" + "".join(f"{name:16}{value}\n" for name, value in describe_machine().items()))


def describe_machine() -> dict[str, str]:
    """Returns what computes here: the processor, the kernels' instruction sets, and what computes for each dtype."""
    from tf_gpt2.runtime import kernels

    why_not = kernels.why_missing()
    sets = kernels.instruction_sets()
    if kernels.chosen() in ("off", "xla"):
        used = f"XLA's, as {kernels.ENV_VAR}={kernels.chosen()} demands"
    elif why_not and kernels.chosen() == "native":
        used = f"none: {kernels.ENV_VAR}=native demands the kernels, and {why_not}"
    elif why_not:
        used = f"XLA's, which are slower: {why_not}"
    elif sets[0] == kernels.PORTABLE and kernels.chosen() != "native":
        used = "XLA's: the native kernels have no instruction set of this processor"
    else:
        used = f"native, {sets[0]}"
    is_native = used.startswith("native")
    of_floats = f"{used}; of more than {kernels.MOST_FLOAT_ROWS} rows XLA's" if is_native else used
    attention = f"{used}; of more than {kernels.MOST_POSITIONS} new positions, and without a cache, XLA's"
    return {
        "processor": kernels.processor(),
        "native kernels": ", ".join(sets) or "none",
        "products of": "",
        "  int8, int4": used,
        "  float32": of_floats,
        "  bfloat16": "XLA's",
        "attention": attention if is_native else used,
    }
