"""From a text file to a folder that generates: the whole way, by Python, the command line, and several workers."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tf_gpt2
from tf_gpt2 import CheckpointError, Encoder, GPT2Config, TextGenerator, cli, save_gpt2_params_to_tf_ckpt
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.training.from_text import Recipe, finetune_text
from tf_gpt2.training.supervisor import free_addresses, supervise

TEXT = "".join(f"The {n}th line of the text says {n * n}.\n" for n in range(60))
SHORT = {"steps": 4, "length": 16, "batch_size": 2, "learning_rate": 2e-2, "save_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of one layer, with the embedded vocabulary: quicker to compile than the embedded one."""
    folder = tmp_path_factory.mktemp("models") / "small"
    config = GPT2Config(n_vocab=1024, n_ctx=32, n_embd=16, n_head=2, n_layer=1)
    save_gpt2_params_to_tf_ckpt(random_params(config), config.to_hparams(), folder)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(embedded_dir() / name, folder)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_rank": 2, "lora_targets": ("c_attn", "mlp.c_proj")},
        {"lora_rank": 2, "dtype": "int8"},
        {"dtype": "bfloat16"},
    ],
    ids=["all weights", "lora", "lora over int8", "bfloat16"],
)
def test_the_result_is_a_folder_that_loads(base, text, tmp_path, options):
    out = tmp_path / "mine"
    history = finetune_text(base, out, Recipe(text=[text], **SHORT, **options), progress=False)
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "checkpoint",
        "encoder.json",
        "hparams.json",
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
        "model.ckpt.meta",
        "vocab.bpe",
    ]
    assert sorted(path.name for path in (out / "training").iterdir()) == ["events", "log.csv", "losses.png"]
    generator = TextGenerator.load(out)
    tuned = generator.perplexity(TEXT[:400], jit_compile=False).nll
    assert tuned < TextGenerator.load(base).perplexity(TEXT[:400], jit_compile=False).nll
    if "lora_rank" in options:
        dtype = options.get("dtype", "float32")
        apart = TextGenerator.load(base, dtype=dtype, adapter=out / "adapter")
        assert apart.perplexity(TEXT[:400], jit_compile=False).nll == pytest.approx(tuned, rel=1e-3)
        words = ["generate", *named(base), "--dtype", dtype, "--adapter", str(out / "adapter")]
        assert cli.main([*words, "--max_new_tokens=2", "The"]) == 0
    with pytest.raises(CheckpointError, match="holds a model already"):
        finetune_text(base, out, Recipe(text=[text], **SHORT, **options), progress=False)


@pytest.mark.parametrize("format", ["huggingface", "gguf", "keras"])
def test_a_model_in_another_format_is_tuned(base, text, tmp_path, format):
    model, encoder = tf_gpt2.load(base)
    tf_gpt2.save(model, encoder, tmp_path / "base", format=format)
    losses = [
        finetune_text(folder, tmp_path / out, Recipe(text=[text], **SHORT), progress=False)["loss"]
        for folder, out in ((base, "tuned"), (tmp_path / "base", "tuned_of_other"))
    ]
    assert losses[0] == losses[1]


def test_an_export_takes_an_adapter(base, tmp_path):
    model, encoder = tf_gpt2.load(base, dtype="int8")
    model.enable_lora(2, alpha=64)
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(3).standard_normal(variable.shape))
    generator = TextGenerator(model, encoder)
    folder = tf_gpt2.export_saved_model(generator, tmp_path, max_new_tokens=4, warm_up="none")
    served = tf.saved_model.load(folder)
    found = served.signatures["logits"](ids=tf.constant([[5, 6, 7]]), lengths=tf.constant([3]))["logits"]
    np.testing.assert_allclose(found, model(np.array([[5, 6, 7]])), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' needs lora_rank"),
        ({"epochs": 1}, "steps=4 and epochs=1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"length": 999}, r"length must be in \[1, 32\]"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"steps": None, "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lora_alpha": 4.0}, "lora_alpha and lora_targets need lora_rank"),
        ({"lora_targets": ("c_proj",)}, "lora_alpha and lora_targets need lora_rank"),
        ({"validation": ["empty"]}, "validation must have at least 2 tokens"),
    ],
)
def test_options_that_do_not_go_together_are_named(base, text, tmp_path, monkeypatch, options, message):
    (tmp_path / "empty").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        finetune_text(base, tmp_path / "out", Recipe(text=[text], **{**SHORT, **options}))


@pytest.mark.parametrize(("name", "message"), [("a.gguf", "holds a model already"), (None, "is a file")])
def test_what_stands_at_the_place_of_the_result_is_left_alone(base, text, tmp_path, name, message):
    out = tmp_path / "out"
    if name is None:
        out.touch()
    else:
        out.mkdir()
        (out / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=message):
        finetune_text(base, out, Recipe(text=[text], **SHORT))


def named(base):
    return ["--models_dir", str(base.parent), "--model_size", base.name]


def arguments(base, text, out, *more):
    options = [f"--{name}={value}" for name, value in {**SHORT, "steps": 12}.items()]
    return ["finetune", "--text", str(text), *named(base), "--out", str(out), *options, *more]


def test_the_command_trains_and_says_how_to_go_on(base, text, tmp_path, capfd):
    assert cli.main(arguments(base, text, tmp_path / "mine", "--accumulate=2", "--remat", "--dropout=0.1")) == 0
    output, shown = capfd.readouterr()
    assert f"--models_dir {tmp_path} --model_size mine" in output
    assert "step 12, loss" in shown
    assert "bits per byte" in shown
    (line,) = [line for line in output.splitlines() if line.startswith("try it")]
    assert (
        cli.main(["generate", "--models_dir", str(tmp_path), "--model_size", "mine", "--max_new_tokens=2", "The"]) == 0
    )
    assert line.endswith('"Once"')


def test_the_command_takes_all_that_it_names(base, tmp_path, capfd):
    lines = [json.dumps({"body": f"{line}\n"}) for line in TEXT.splitlines()]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT[:300], encoding="utf-8")
    out = tmp_path / "mine"
    command = (
        f"finetune --text {tmp_path / 'texts'} --field body --validation {tmp_path / 'other.txt'} --out {out} "
        f"--epochs 1 --batch_size 8 --length 16 --warmup_steps 2 --weight_decay 0 --accumulate 1 --dropout 0.1 "
        f"--dtype int4 --lora_rank 2 --lora_alpha 8 --lora_targets c_attn mlp.c_proj --save_every 3 "
        f"--sample_every 4 --seed 7 --learning_rate 0.001 --remat"
    )
    assert cli.main([*shlex.split(command), *named(base)]) == 0
    shown = capfd.readouterr().err
    encoder = Encoder.from_files(base)
    n_tokens = sum(len(encoder.encode(json.loads(line)["body"])) + 1 for line in lines)
    n_updates = -(-(n_tokens // 16) // 8)  # none is held out: the other file is
    steps = [line.split(",")[0] for line in (out / "training" / "log.csv").read_text().splitlines()[1:]]
    assert [int(step) for step in steps] == [*range(3, n_updates, 3), n_updates]
    assert shown.count("sample: ") == n_updates // 4
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 8, ["c_attn", "mlp.c_proj"])


def test_ctrl_c_says_how_to_go_on_and_another_option_is_refused(base, text, tmp_path):
    command = [sys.executable, "-m", "tf_gpt2", *arguments(base, text, tmp_path / "mine", "--dropout=0.1")]
    command = [part.replace("--steps=12", "--steps=4000") for part in command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: list((tmp_path / "mine" / "training").glob("step-*")), process)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there: give the same command" in shown
    assert not (tmp_path / "mine" / "checkpoint").exists()
    other = [part.replace("--dropout=0.1", "--dropout=0.2") for part in command]
    result = subprocess.run(other, capture_output=True, text=True)
    assert result.returncode == 1
    assert "dropout=0.2, began with 0.1" in result.stderr


def wait_for(condition, process, seconds=90):
    start = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - start < seconds
        time.sleep(0.05)


def test_the_example_trains_a_model_with_a_vocabulary_of_its_own(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    program = Path(__file__).parents[2] / "examples" / "train_checkpoint.py"
    sizes = "--n_vocab 270 --n_ctx 16 --n_embd 8 --n_head 2 --n_layer 1 --batch_size 2 --steps 4 --save_every 2"
    command = [sys.executable, program, "--text", tmp_path / "text.txt", "--out", tmp_path / "out", *sizes.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(r"held-out loss \d\.\d+ bits per byte", result.stdout)
    model, encoder = tf_gpt2.load(tmp_path / "out")
    assert (model.config.n_vocab, model.config.n_layer, len(encoder)) == (270, 1, 270)


# ---- several workers

WORKER = """
import os, signal, sys
from pathlib import Path
import keras
from tf_gpt2 import cli
from tf_gpt2.training import fit, from_text
class Die(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        mark = Path(sys.argv[1])
        checkpoints = list(Path(sys.argv[2]).glob("training/step-*"))
        if not fit.is_chief() and checkpoints and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
plain = from_text.finetune
from_text.finetune = lambda *args, **kwargs: plain(*args, callbacks=[Die()], **kwargs)
sys.exit(cli.main(sys.argv[3:]))
"""


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(base, text, tmp_path):
    options = ["--dropout=0.1"]
    mark, out, alone = tmp_path / "died", tmp_path / "two", tmp_path / "one"
    command = [sys.executable, "-c", WORKER, str(mark), str(out), *arguments(base, text, out, *options)]
    assert supervise(command, free_addresses(2), restarts=2) == 0
    assert mark.exists()
    assert cli.main(arguments(base, text, alone, *options)) == 0
    tables = [(folder / "training" / "log.csv").read_text().splitlines()[1:] for folder in (out, alone)]
    found, wanted = (np.array([line.split(",")[:3] for line in table], float) for table in tables)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_supervisor_gives_up_with_the_exit_code_of_the_worker(tmp_path):
    program = "import os, sys, json; c = json.loads(os.environ['TF_CONFIG']); sys.exit(3 * c['task']['index'])"
    assert supervise([sys.executable, "-c", program], free_addresses(2), restarts=1) == 3
    assert supervise([sys.executable, "-c", program], free_addresses(2), own=[0]) == 0


@pytest.mark.parametrize("document", ["docs/training.md", "examples/multi_worker.md"])
def test_commands_of_the_documents_exist(document):
    text = (Path(__file__).parents[2] / document).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ *(?:.* -- +)?tf-gpt2 ((?:finetune|export) [^…\n]*)$", text, re.M)
    assert commands
    for command in commands:
        cli.make_parser().parse_args(shlex.split(command, comments=True))
