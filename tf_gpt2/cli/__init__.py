"""The command line: parses, calls, prints.

Only results go to stdout. TensorFlow is imported where a command needs it, so that ``--help`` and ``encode`` answer at
once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tf_gpt2._version import package_version
from tf_gpt2.cli.export import add_export
from tf_gpt2.cli.interactive import add_interactive
from tf_gpt2.cli.measure import add_explain, add_perplexity
from tf_gpt2.cli.options import (
    add_generation_options,
    add_model_options,
    add_speed_options,
    find_model,
    generation_settings,
    load_generator,
    positive,
    quiet_tensorflow,
    read_argument,
    write,
)
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.errors import GPT2Error
from tf_gpt2.runtime.memory import collect_seldom, restart_with_huge_pages

FAILURE, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 1 for a failure, 130 after Ctrl-C. Wrong usage exits with 2.
    """
    options = make_parser().parse_args(with_underscores(sys.argv[1:] if arguments is None else arguments))
    if arguments is None and getattr(options, "computes", False):
        restart_with_huge_pages()
        collect_seldom()
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("tf-gpt2: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has gone, as in "tf-gpt2 … | head -1"; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (GPT2Error, ValueError, TypeError, OSError) as error:
        if options.debug:
            raise
        print(f"tf-gpt2: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILURE
    except Exception as error:  # not foreseen, so not in our own words
        if options.debug:
            raise
        reason = " ".join(str(error).split())[:300]
        print(f"tf-gpt2: {type(error).__name__}: {reason} (--debug shows where)", file=sys.stderr)
        return FAILURE
    return 0


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Takes ``--top-k`` for ``--top_k``, up to a bare ``--``, behind which all is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [
        "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument
        for argument in arguments[:end]
        for name, equals, value in [argument.partition("=")]
    ]
    return options + list(arguments[end:])


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser; each command names the function that runs it."""
    parser = argparse.ArgumentParser(prog="tf-gpt2", description="GPT-2 in TensorFlow and Keras.")
    parser.add_argument("--version", action="version", version=f"tf-gpt2 {package_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_generate,
        add_interactive,
        add_perplexity,
        add_explain,
        add_export,
        add_download,
        add_encode,
        add_decode,
        add_info,
    ):
        command = add(commands)
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        command.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``generate``."""
    command = commands.add_parser("generate", help="continue a text", description="Continues PROMPT.")
    command.set_defaults(run=run_generate)
    command.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from standard input")
    add_model_options(command)
    add_generation_options(command)
    command.add_argument(
        "--num_samples", type=positive, default=1, metavar="N", help="texts to print, with seeds S, S+1, …"
    )
    command.add_argument(
        "--overflow",
        choices=("error", "truncate", "slide"),
        default="error",
        help="when the window is full: refuse or end; drop the prompt's beginning; forget the older half and go on",
    )
    command.add_argument("--stream", action="store_true", help="print the text as it comes")
    command.add_argument(
        "--prompt_lookup", action="store_true", help="guess from the text so far: faster where it repeats itself"
    )
    add_speed_options(command)
    return command


def add_download(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``download``."""
    command = commands.add_parser(
        "download", help="fetch OpenAI's files", description="Fetches a model's seven files; goes on where it stopped."
    )
    command.set_defaults(run=run_download)
    command.add_argument("model_size", metavar="SIZE", nargs="?", default="124M", help=", ".join(SIZES))
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="files go to DIR/SIZE")
    return command


def add_encode(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``encode``."""
    command = commands.add_parser("encode", help="text to token ids", description="Prints the token ids of TEXT.")
    command.set_defaults(run=run_encode)
    command.add_argument("text", metavar="TEXT", help="text; - reads it from standard input")
    add_model_options(command)
    return command


def add_decode(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``decode``."""
    command = commands.add_parser("decode", help="token ids to text", description="Prints the text of token ids.")
    command.set_defaults(run=run_decode)
    command.add_argument("ids", metavar="ID", nargs="+", help="token ids; a single - reads them from standard input")
    add_model_options(command)
    return command


def add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds ``info``."""
    command = commands.add_parser("info", help="sizes, parameters, memory", description="Prints a table of the models.")
    command.set_defaults(run=run_info)
    command.add_argument("--models_dir", default="checkpoints", metavar="DIR", help="where the models' folders are")
    return command


def run_generate(options: argparse.Namespace) -> None:
    """Prints completions, with a line ``=== sample 1 ===`` before each if there are several."""
    prompt, folder = read_argument(options.prompt), find_model(options)
    settings = {
        **generation_settings(options),
        "prompt_lookup": options.prompt_lookup,
        "overflow": options.overflow,
    }
    with quiet_tensorflow(show_on_error=options.debug):
        generator = load_generator(folder, options)
        samples: list[Iterable[str]]
        if options.stream:
            seeds = range(options.seed, options.seed + options.num_samples)
            samples = [generator.stream(prompt, seed=seed, **settings) for seed in seeds]
        else:
            texts = generator.generate(prompt, num_samples=options.num_samples, seed=options.seed, **settings)
            samples = [[text] for text in texts]
        for i, pieces in enumerate(samples):
            if len(samples) > 1:
                write(f"=== sample {i + 1} ===\n")
            for piece in pieces:
                write(piece)
            write("\n")


def run_download(options: argparse.Namespace) -> None:
    """Fetches the files and says where they are."""
    from tf_gpt2.checkpoint.download import download_gpt2_files

    folder = Path(options.models_dir) / options.model_size
    download_gpt2_files(options.model_size, folder)
    write(f"{folder}\n")


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
    """Prints each size's hyperparameters, the memory of its weights, and whether it is here."""
    from tf_gpt2.checkpoint.download import embedded_dir, missing_files

    configs = {"tiny": GPT2Config.from_file(embedded_dir() / "hparams.json"), **SIZES}
    write(f"{'size':8}{'layers':>8}{'heads':>8}{'width':>8}{'context':>9}{'vocabulary':>12}{'parameters':>16}")
    write(f"{'float32':>11}{'bfloat16':>11}  here\n")
    for name, config in configs.items():
        is_here = name == "tiny" or not missing_files(Path(options.models_dir) / name)
        numbers = f"{config.n_layer:8}{config.n_head:8}{config.n_embd:8}{config.n_ctx:9}{config.n_vocab:12}"
        sizes = f"{config.n_params:16,}{config.n_params * 4 / 1e6:8.0f} MB{config.n_params * 2 / 1e6:8.0f} MB"
        write(f"{name:8}{numbers}{sizes}  {'yes' if is_here else 'no'}\n")


if __name__ == "__main__":
    sys.exit(main())
