"""Trains a small GPT-2 with a vocabulary of its own on one text file and writes it as OpenAI's seven files.

    python examples/train_checkpoint.py --text shakespeare.txt --out checkpoints/tiny

The last part of the text is held out; the program keeps the weights that predict it best. An interrupted run goes on
when the same command is given again. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import keras
from tokenizers import ByteLevelBPETokenizer

import tf_gpt2
from tf_gpt2.tokenizer.encoder import bytes_to_unicode
from tf_gpt2.training.from_text import Recipe, finetune_text

END_OF_TEXT = "<|endoftext|>"


def main() -> None:
    """Trains the vocabulary and the model, prints the held-out loss, writes the files."""
    options = parse_options()
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        fresh, cut = Path(folder), int(len(text) * (1 - options.held_out))
        parts = {"training.txt": text[:cut], "held_out.txt": text[cut:]}
        for name, part in parts.items():
            (fresh / name).write_text(part, encoding="utf-8")
        write_fresh_model(text[:cut], options, fresh)
        history = finetune_text(fresh, options.out, recipe_of(options, fresh))
    print(f"wrote {options.out}: held-out loss {min(history['val_bits_per_byte']):.3f} bits per byte")


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to learn")
    parser.add_argument("--out", type=Path, required=True, help="folder for the seven files")
    parser.add_argument(
        "--held_out", type=float, default=0.1, help="share of the text, at its end, left out of training"
    )
    parser.add_argument("--n_vocab", type=int, default=1024, help="tokens, end of text included")
    parser.add_argument("--n_ctx", type=int, default=256)
    parser.add_argument("--n_embd", type=int, default=160)
    parser.add_argument("--n_head", type=int, default=5)
    parser.add_argument("--n_layer", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--save_every", type=int, default=100, help="steps between two tests of the held-out loss")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="its peak, after 5 %% of the steps")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def recipe_of(options: argparse.Namespace, folder: Path) -> Recipe:
    """Returns what ``tf-gpt2 finetune`` would be asked for."""
    names = ("dropout", "batch_size", "steps", "save_every", "learning_rate", "weight_decay", "seed")
    return Recipe(
        text=[folder / "training.txt"],
        validation=[folder / "held_out.txt"],
        warmup_steps=options.steps // 20,
        **{name: getattr(options, name) for name in names},
    )


def write_fresh_model(text: str, options: argparse.Namespace, folder: Path) -> None:
    """Writes a folder with a vocabulary learned from the text, and a model with random weights."""
    train_vocabulary(text, options.n_vocab, folder)
    encoder = tf_gpt2.Encoder.from_files(folder)
    sizes = {name: getattr(options, name) for name in ("n_ctx", "n_embd", "n_head", "n_layer")}
    config = tf_gpt2.GPT2Config(n_vocab=len(encoder), **sizes)
    print(f"{config}: {config.n_params} parameters")
    keras.utils.set_random_seed(options.seed)
    tf_gpt2.save_gpt2_params_to_tf_ckpt(tf_gpt2.GPT2Model(config).get_params(), config.to_hparams(), folder)


def train_vocabulary(text: str, n_vocab: int, out: Path) -> None:
    """Learns byte-level merges from ``text`` and writes ``encoder.json`` and ``vocab.bpe`` in OpenAI's form."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=n_vocab - 1, min_frequency=2, show_progress=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges), END_OF_TEXT]
    (out / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
