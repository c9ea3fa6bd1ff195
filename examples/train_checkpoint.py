"""Trains a small GPT-2 on one text file and writes it as OpenAI's seven files.

    python examples/train_checkpoint.py --text shakespeare.txt --out checkpoints/tiny

The last part of the text is held out; the program keeps the weights that predict it best. Needs the extra ``train``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tokenizers import ByteLevelBPETokenizer

import tf_gpt2
from tf_gpt2.checkpoint.params import count_params
from tf_gpt2.tokenizer.encoder import bytes_to_unicode

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids of the two parts of the text, and the size of the held-out part in bytes of UTF-8."""

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int


def main() -> None:
    """Trains the vocabulary and the model, prints the held-out loss, writes the files."""
    options = parse_options()
    keras.utils.set_random_seed(options.seed)
    text = options.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - options.held_out))
    options.out.mkdir(parents=True, exist_ok=True)
    train_vocabulary(text[:cut], options.n_vocab, options.out)
    encoder = tf_gpt2.Encoder.from_files(options.out)
    texts = Texts(
        np.array(encoder.encode(text[:cut]), np.int32),
        np.array(encoder.encode(text[cut:]), np.int32),
        len(text[cut:].encode()),
    )
    config = tf_gpt2.GPT2Config(
        n_vocab=len(encoder.encoder),
        n_ctx=options.n_ctx,
        n_embd=options.n_embd,
        n_head=options.n_head,
        n_layer=options.n_layer,
    )
    print(f"{len(texts.train)} training tokens, {len(texts.held_out)} held out; {config}; {config.n_params} parameters")
    model = train_model(config, texts, options)
    tf_gpt2.save_gpt2_params_to_tf_ckpt(model.get_params(), config.to_hparams(), options.out)
    print(f"wrote {options.out}: {count_params(model.get_params())} parameters")
    print(f"held-out loss: {held_out_bits_per_byte(model, texts):.3f} bits per byte")


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
    parser.add_argument("--steps_per_epoch", type=int, default=100, help="steps between two tests of the held-out loss")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="its peak, after 5 %% of the steps")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_vocabulary(text: str, n_vocab: int, out: Path) -> None:
    """Learns byte-level merges from ``text`` and writes ``encoder.json`` and ``vocab.bpe`` in OpenAI's form."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=n_vocab - 1, min_frequency=2, show_progress=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges), END_OF_TEXT]
    (out / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_model(config: tf_gpt2.GPT2Config, texts: Texts, options: argparse.Namespace) -> tf_gpt2.GPT2Model:
    """Fits a fresh model; keeps the weights with the least held-out loss."""
    model = tf_gpt2.GPT2Model(config, dropout=options.dropout)
    warmup = options.steps // 20
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, options.steps - warmup, alpha=0.02, warmup_target=options.learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=options.weight_decay, beta_2=0.99, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["b", "g", "wpe"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    best = options.out / "best.weights.h5"
    model.fit(
        random_windows(texts.train, config.n_ctx, options.batch_size, options.seed),
        epochs=options.steps // options.steps_per_epoch,
        steps_per_epoch=options.steps_per_epoch,
        validation_data=even_windows(texts.held_out, config.n_ctx, options.batch_size),
        callbacks=[keras.callbacks.ModelCheckpoint(best, save_best_only=True, save_weights_only=True)],
        verbose=2,
    )
    model.load_weights(best)
    best.unlink()
    return model


def random_windows(ids: np.ndarray, n_ctx: int, batch_size: int, seed: int) -> tf.data.Dataset:
    """Returns endless batches of windows at random places, each with the same window one token later as its targets."""
    rng = np.random.default_rng(seed)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        starts = rng.integers(0, len(ids) - n_ctx - 1, batch_size)
        windows = ids[starts[:, None] + np.arange(n_ctx + 1)]
        return windows[:, :-1], windows[:, 1:]

    spec = tf.TensorSpec((batch_size, n_ctx), tf.int32)
    return tf.data.Dataset.from_generator(lambda: iter(draw, None), output_signature=(spec, spec)).prefetch(2)


def even_windows(ids: np.ndarray, n_ctx: int, batch_size: int) -> tf.data.Dataset:
    """Returns batches of consecutive windows and their targets; a last part that does not fill a batch is dropped."""
    windows = tf.data.Dataset.from_tensor_slices(ids).batch(n_ctx + 1, drop_remainder=True)
    return windows.map(lambda window: (window[:-1], window[1:])).batch(batch_size, drop_remainder=True)


def held_out_bits_per_byte(model: tf_gpt2.GPT2Model, texts: Texts) -> float:
    """Scores every held-out token but the first, each with half a window of context or more where the text has it."""
    ids, n_ctx = texts.held_out, model.config.n_ctx
    nats, scored = 0.0, 1
    while scored < len(ids):
        start = max(0, min(scored - n_ctx // 2, len(ids) - n_ctx - 1))
        window = ids[start : start + n_ctx + 1]
        log_probs = tf.nn.log_softmax(model(window[None, :-1]))[0].numpy()  # (T, V)
        losses = -log_probs[np.arange(len(window) - 1), window[1:]]
        nats += float(losses[scored - start - 1 :].sum())
        scored = start + len(window)
    return nats / math.log(2) / texts.held_out_bytes


if __name__ == "__main__":
    main()
