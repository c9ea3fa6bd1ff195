"""``finetune``: what it learns, what it reports and writes, and that an interruption changes nothing."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2 import CheckpointError, Encoder, GPT2Config, GPT2Model, TextGenerator, generate
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.training import data, finetune, state
from tf_gpt2.training.losses import NextTokenLoss

CONFIG = GPT2Config(n_vocab=53, n_ctx=8, n_embd=8, n_head=2, n_layer=2)
SAVE_EVERY = 3  # of the program
PROGRAM = Path(__file__).with_name("interrupted.py")
IDS = data.Ids([np.random.default_rng(0).integers(0, 53, 200).astype(np.uint16)])


def make_model(dropout=0.0):
    model = GPT2Model(CONFIG, dropout=dropout)
    model.set_weights(random_params(CONFIG))
    return model


def small_generator():
    """A random model of one layer with the embedded vocabulary."""
    config = GPT2Config(n_vocab=1024, n_ctx=64, n_embd=16, n_head=2, n_layer=1)
    model = GPT2Model(config)
    model.set_weights(random_params(config))
    return TextGenerator(model, Encoder.from_files(embedded_dir()))


def train(model=None, **options):
    dataset = data.shuffled_windows(IDS, n_ctx=8, batch_size=2, epochs=options.pop("epochs", 1))
    return finetune(model or make_model(), dataset, **{"progress": False, "save_every": 4, **options})


# ---- learning


def test_four_sentences_are_learned_by_heart():
    encoder = Encoder.from_files(embedded_dir())
    sentences = ["The cat sat on the mat.", "A rose is a rose.", "Who goes there?", "All the world's a stage."]
    rows = [[*encoder.encode(sentence), encoder.end_of_text] for sentence in sentences]
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    labels = np.array([row + [-100] * (length - len(row)) for row in rows], np.int32)
    config = GPT2Config(n_vocab=len(encoder), n_ctx=length, n_embd=32, n_head=2, n_layer=1)
    keras.utils.set_random_seed(0)
    model = GPT2Model(config)
    dataset = tf.data.Dataset.from_tensors((ids[:, :-1], labels[:, 1:])).repeat(150)
    history = finetune(model, dataset, learning_rate=0.02, weight_decay=0.0, save_every=50, progress=False)
    assert history.history["loss"][-1] < 0.15  # after the first token nothing is to be guessed but the sentence
    for row in rows:
        n_known = next(n for n in range(1, len(row)) if sum(other[:n] == row[:n] for other in rows) == 1)
        assert (
            generate(model, [row[:n_known]], max_new_tokens=len(row) - n_known, jit_compile=False).ids[0]
            == row[n_known:]
        )


def test_the_best_weights_are_kept():
    validation = data.held_out_windows(data.Ids([np.arange(40, dtype=np.uint16)]), n_ctx=8, batch_size=2)
    model = make_model()
    history = train(model, epochs=6, learning_rate=0.3, validation=validation).history
    assert min(history["val_loss"]) < history["val_loss"][-1]
    nats = NextTokenLoss(reduction="sum")
    sums = [(float(nats(y, model(x))), int((y.numpy() >= 0).sum())) for x, y in validation]
    found = sum(nats for nats, _ in sums) / sum(n for _, n in sums)
    assert found == pytest.approx(min(history["val_loss"]), rel=1e-4)
    assert np.exp(history["val_loss"][0]) == pytest.approx(history["val_perplexity"][0])


def test_bits_per_byte_are_those_of_the_generator():
    generator = small_generator()
    text = "To be, or not to be: that is the question."
    ids = data.Ids([np.array(generator.encoder.encode(text), np.uint16)])
    validation = data.held_out_windows(ids, n_ctx=64, batch_size=1)
    dataset = data.shuffled_windows(ids, n_ctx=8, batch_size=1, epochs=None)
    options = {"validation": validation, "encoder": generator.encoder, "progress": False}
    history = finetune(generator.model, dataset, steps=1, learning_rate=1e-12, **options).history
    wanted = generator.perplexity(text, jit_compile=False)
    assert history["val_loss"][0] == pytest.approx(wanted.nll / wanted.n_scored, rel=1e-3)
    n_first = len(generator.encoder.decode_bytes(generator.encoder.encode(text)[:1]))
    n_bytes = wanted.n_bytes - n_first  # the first token is no target
    assert history["val_bits_per_byte"][0] == pytest.approx(wanted.nll / np.log(2) / n_bytes, rel=1e-3)


def test_what_is_frozen_stays():
    model = make_model()
    model.blocks[0].trainable = False
    model.wte.trainable = False
    before = model.get_params()
    train(model)
    after = model.get_params()
    np.testing.assert_array_equal(after["wte"], before["wte"])
    np.testing.assert_array_equal(after["blocks"][0]["mlp"]["c_fc"]["w"], before["blocks"][0]["mlp"]["c_fc"]["w"])
    assert np.abs(after["wpe"] - before["wpe"]).max() > 0


# ---- what is reported


def test_history_callbacks_tables_and_picture(tmp_path, capfd):
    seen = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, logs["loss"]))

    with (tmp_path / "shown").open("w") as file:
        history = train(out=tmp_path, callbacks=[Note()], progress=file, steps=10, learning_rate=0.01)
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert history.history["loss"] == [loss for _, loss in seen]
    assert history.epoch == [4, 8, 10]
    folder = tmp_path / "training"
    lines = (folder / "log.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,val_loss")
    assert [line.split(",")[0] for line in lines[1:]] == ["4", "8", "10"]
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "events").glob("events*"))
    assert "step 8, loss" in (tmp_path / "shown").read_text()
    assert "tokens/s" in (tmp_path / "shown").read_text()


def test_samples_of_text_are_shown(tmp_path):
    generator = small_generator()
    dataset = data.shuffled_windows(IDS, n_ctx=8, batch_size=1, epochs=None)
    with (tmp_path / "shown").open("w") as file:
        finetune(generator.model, dataset, steps=2, sample_every=2, encoder=generator.encoder, progress=file)
    assert (tmp_path / "shown").read_text().count("sample: ") == 1


# ---- Keras's own fit


@pytest.mark.parametrize("jit_compile", [False, True])
def test_plain_fit_with_labels_left_out_and_weights(jit_compile):
    model = GPT2Model(CONFIG)
    model.set_weights(lively_params(CONFIG))
    ids = np.random.default_rng(0).integers(0, 53, (4, 9)).astype(np.int32)
    labels, weights = ids[:, 1:].copy(), np.array([1.0, 2.0, 0.0, 0.5], np.float32)
    labels[0, 2:5], labels[1, 3] = -1, -100
    log_probs = tf.nn.log_softmax(model(ids[:, :-1])).numpy()
    counted = (labels >= 0) * weights[:, None]
    losses = -np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    model.compile(keras.optimizers.SGD(0.1), NextTokenLoss(), jit_compile=jit_compile)
    history = model.fit(ids[:, :-1], labels, sample_weight=weights, epochs=3, batch_size=4, verbose=0).history["loss"]
    assert history[0] == pytest.approx((losses * counted).sum() / counted.sum(), rel=1e-4)
    assert history[-1] < history[0]


def test_the_dataset_is_one_for_plain_fit():
    model = make_model()
    model.compile(keras.optimizers.Adam(0.01), NextTokenLoss(), jit_compile=False)
    history = model.fit(data.shuffled_windows(IDS, n_ctx=8, batch_size=5, epochs=4), verbose=0)
    assert np.isfinite(history.history["loss"]).all()


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"steps": 99}, "dataset has ended after 13 updates"),
        ({"accumulate": 99}, "fewer than accumulate=99"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"learning_rate": -1e-3}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"sample_every": -1}, "sample_every must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_batches_of_changing_shape_are_refused():
    dataset = tf.data.Dataset.from_tensors((np.ones((2, 9), np.int32),) * 2)
    with pytest.raises(ValueError, match="rows of 9 ids, the model's window has 8"):
        finetune(make_model(), dataset, steps=1)
    dataset = tf.data.Dataset.from_tensor_slices(np.ones((5, 8), np.int32)).batch(2)
    with pytest.raises(ValueError, match="one known shape"):
        finetune(make_model(), dataset.map(lambda x: (x, x)), steps=1)


@pytest.mark.parametrize("with_validation", [True, False])
def test_weights_that_the_last_update_has_ruined_are_no_result(tmp_path, with_validation):
    """Its loss was measured before it, and no update follows that would notice."""
    windows = data.held_out_windows(data.Ids([np.arange(40, dtype=np.uint16)]), n_ctx=8, batch_size=2)
    options = {"validation": windows} if with_validation else {}
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(out=tmp_path, learning_rate=3e38, warmup_steps=0, weight_decay=0.0, steps=2, save_every=1, **options)
    assert not state.checkpoints(tmp_path / "training")


@pytest.mark.parametrize(("part", "value"), [(0, 53), (0, -1), (1, 53)])
def test_ids_outside_the_vocabulary_are_refused(part, value):
    parts = [np.ones((2, 8), np.int32), np.ones((2, 8), np.int32)]
    parts[part][1, 3] = value
    with pytest.raises(ValueError, match=f"{value} among its {('ids', 'targets')[part]}.*53"):
        finetune(make_model(), tf.data.Dataset.from_tensors(tuple(parts)), progress=False)


# ---- interruption


def run_program(out, *arguments):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, PROGRAM, out, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process):
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    return output.splitlines()


@pytest.mark.parametrize(
    ("rank", "dtype", "stops"),
    [
        (0, "float32", (signal.SIGKILL, signal.SIGINT)),
        (0, "bfloat16", (signal.SIGKILL,)),
        (2, "float32", (signal.SIGKILL,)),
        (2, "int4", (signal.SIGKILL,)),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, rank, dtype, stops):
    """Killed at random places, then ended by Ctrl-C, then finished: losses and weights are bit for bit those."""
    whole = finished(run_program(tmp_path / "whole", rank, dtype))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng, n_updates = random.Random(seed), 0
    for stop in stops:
        process = run_program(tmp_path / "cut", rank, dtype)
        n_lines = rng.randrange(0, 16)
        for i, line in enumerate(process.stdout):  # noqa: B007
            if i == n_lines:
                time.sleep(rng.random() * 0.01)
                process.send_signal(stop)
                break
        _, errors = process.communicate(timeout=100)
        assert "saved at update" in errors or stop == signal.SIGKILL or process.returncode == 0
        kept = state.checkpoints(tmp_path / "cut" / "training")
        assert len(kept) <= state.KEPT
        assert i == n_lines
        assert line.startswith("loss")
        n_updates += i + 1  # made at least
        n_kept = int(kept[0].name.removeprefix("step-")) if kept else 0
        assert n_kept >= n_updates - SAVE_EVERY
        n_updates = n_kept
    rest = finished(run_program(tmp_path / "cut", rank, dtype))
    assert rest[-3:] == whole[-3:]
    losses = [line for line in rest if line.startswith("loss")]
    assert losses == [line for line in whole if line.startswith("loss")][-len(losses) :]
    assert len(losses) == 40 - n_updates


def test_other_options_are_refused_by_name(tmp_path):
    train(out=tmp_path, steps=4)
    with pytest.raises(CheckpointError, match=r"learning_rate=0.5, began with 0.0001") as error:
        train(out=tmp_path, steps=4, learning_rate=0.5)
    assert "steps" not in str(error.value)
    with pytest.raises(CheckpointError, match="text='b', began with None"):
        train(out=tmp_path, steps=4, about={"text": "b"})
    larger = GPT2Model(GPT2Config(n_vocab=53, n_ctx=8, n_embd=16, n_head=2, n_layer=2))
    with pytest.raises(CheckpointError, match="n_embd=16, began with 8"):
        train(larger, out=tmp_path, steps=4)


def test_another_dataset_and_other_frozen_weights_are_refused_by_name(tmp_path):
    def model_with(alpha=4.0, bias=0.0):
        model = make_model()
        model.ln_f.b.assign_add([bias] * 8)
        model.enable_lora(2, alpha=alpha)
        return model

    held_out = data.held_out_windows(IDS.part(0, 40), n_ctx=8, batch_size=2)
    train(model_with(), out=tmp_path, steps=4, validation=held_out)
    with pytest.raises(
        CheckpointError, match=r"lora={'rank': 2, 'alpha': 8\.0, .*began with {'rank': 2, 'alpha': 4\.0"
    ):
        train(model_with(alpha=8.0), out=tmp_path, steps=4, validation=held_out)
    with pytest.raises(CheckpointError, match="other options: frozen_weights='"):
        train(model_with(bias=1.0), out=tmp_path, steps=4, validation=held_out)
    with pytest.raises(CheckpointError, match="other options: first_held_out_batch=None, began with '"):
        train(model_with(), out=tmp_path, steps=4)
    other = data.shuffled_windows(IDS, n_ctx=8, batch_size=2, seed=1)
    with pytest.raises(CheckpointError, match="other options: first_batch='"):
        finetune(model_with(), other, validation=held_out, out=tmp_path, steps=4, save_every=4, progress=False)


def test_arrays_are_written_one_at_a_time(tmp_path):
    made = []

    def arrays():
        for i in range(3):
            assert all(reference() is None for reference in made[:-1])  # the last one is still the loop's
            array = np.full((i, 2), i, np.float32)
            made.append(weakref.ref(array))
            yield array
            del array

    state.write_arrays(tmp_path / "arrays.npz", arrays())
    assert [array.tolist() for array in state.read_arrays(tmp_path / "arrays.npz")] == [[], [[1, 1]], [[2, 2]] * 2]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    whole = train(out=tmp_path / "a", steps=12).history["loss"]
    train(out=tmp_path / "b", steps=12)
    newest, before = state.checkpoints(tmp_path / "b" / "training")
    assert re.search("12$", newest.name)
    body = bytearray((newest / state.ARRAYS).read_bytes())
    body[len(body) // 2] ^= 1
    (newest / state.ARRAYS).write_bytes(body)
    model = make_model()
    assert train(model, out=tmp_path / "b", steps=12).history["loss"] == whole
    assert before.name.endswith("08")


@pytest.mark.parametrize("name", [state.ARRAYS, state.STATE])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"PK\x03\x04"])
def test_whatever_stands_in_a_damaged_checkpoint(tmp_path, name, content):
    for update in (1, 2):
        state.save(tmp_path, state.Progress(update=update), [np.ones(3)], {})
    (state.checkpoints(tmp_path)[0] / name).write_bytes(content)
    progress, (array,) = state.load(tmp_path, {})
    assert progress.update == 1
    assert array.tolist() == [1, 1, 1]


def test_arrays_that_do_not_fit_the_disk_leave_nothing(tmp_path, monkeypatch):
    def fail(file, *_, **__):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="No space left"):
        state.write_arrays(tmp_path / "arrays.npz", [np.ones(3)])
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(state, "write_arrays", fail)
    with pytest.raises(OSError, match="disk full"):
        train(out=tmp_path, steps=4)
    assert not state.checkpoints(tmp_path / "training")
    assert not [path for path in (tmp_path / "training").iterdir() if "part" in path.name]
