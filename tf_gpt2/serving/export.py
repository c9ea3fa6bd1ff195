"""``export_saved_model``: writes a generator as one folder that TensorFlow Serving loads.

The folder appears whole or not at all. Its functions are in ``signatures``. A killed export leaves a folder
``.VERSION-xxxxxxxx`` beside the versions; a later export removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tf_gpt2._version import package_version
from tf_gpt2.checkpoint.params import leaves
from tf_gpt2.checkpoint.vocabulary import write_openai
from tf_gpt2.errors import ParamsError
from tf_gpt2.generation.options import check_counts
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.weights import is_finite
from tf_gpt2.serving.prompts import PromptReader
from tf_gpt2.serving.signatures import ServedFunctions
from tf_gpt2.serving.warmup import RECORDS_PATH, Request, plain_requests, write_warmup_records, xla_requests
from tf_gpt2.text.generator import TextGenerator

OnStep = Callable[[str], None]
WARM_UP = ("plain", "xla", "none")
MOST_VERSION = 2**63 - 1
LEFT_OVER = re.compile(r"\.\d+-\w+")
"""Names of the folders in which an export works until it is whole."""
LEFT_OVER_AFTER_S = 24 * 3600
"""Age in seconds from which such a folder counts as left by a killed export, if no living process holds it."""
OWNED = "owned"
"""A file in such a folder, locked as long as the exporting process lives."""


def export_saved_model(
    generator: TextGenerator,
    folder: str | Path,
    *,
    version: int = 1,
    max_new_tokens: int = 40,
    xla: bool = False,
    warm_up: str = "plain",
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Path:
    """Writes a SavedModel that takes text and returns text, and needs only TensorFlow's C++ runtime.

    Args:
        generator: the generator to export; its weights keep their dtype.
        folder: holds the versions of the model; is made if need be.
        version: the name of the folder to write inside; a server loads the highest.
        max_new_tokens: of ``serving_default``, and of requests that do not say; in [1, n_ctx - 1].
        xla: whether to write also signatures that XLA compiles, named ``…_xla``; a server must be started with
            ``--xla_cpu_compilation_enabled=true`` to run them.
        warm_up: which signatures a server runs once while it loads: ``"plain"``, those without XLA, if the extra
            ``serving`` is installed; ``"xla"``, the compiled ones as well, with which a server without XLA cannot load
            the version; ``"none"``.
        overwrite: whether to replace an existing version.
        on_step: called with a line of text before each step.

    Returns:
        ``folder / version``.

    Raises:
        CheckpointError: when the generator's vocabulary cannot be used.
        FileExistsError: when the version exists, or another process made it meanwhile.
        ImportError: when ``warm_up="xla"`` and the extra ``serving`` is not installed.
        ParamsError: when weights hold NaN or infinity, for which a server would return empty texts.
        ValueError: when a number is out of range, ``warm_up`` is another value, or TensorFlow would read the path of
            ``folder`` as a pattern.

    Example:
        >>> from tf_gpt2.checkpoint.download import embedded_dir
        >>> generator = TextGenerator.from_checkpoint(embedded_dir())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     served = tf.saved_model.load(export_saved_model(generator, folder, max_new_tokens=4))
        >>> text = served.signatures["serving_default"](text=tf.constant(["To be"]))["text"]
        >>> text.numpy()[0].decode() == generator.generate("To be", max_new_tokens=4)
        True
    """
    version, max_new_tokens = check_counts(version=version, max_new_tokens=max_new_tokens)
    if version > MOST_VERSION:
        raise ValueError(f"version must be at most {MOST_VERSION}, which servers count up to, got {version}")
    n_ctx = generator.model.config.n_ctx
    if max_new_tokens >= n_ctx:
        raise ValueError(f"max_new_tokens must leave room for a prompt in n_ctx={n_ctx}, got {max_new_tokens}")
    requests = requests_for(warm_up, xla=xla)
    check_path(folder)
    check_weights(generator.model)
    generator.encoder.encode("")  # raises where there is no vocabulary
    target = Path(folder) / str(version)
    if target.exists() and not overwrite:
        raise already_there(target)
    tell = on_step or (lambda line: None)
    with new_folder(target, overwrite=overwrite) as made:
        signatures = trace_signatures(generator, max_new_tokens, xla, tell)
        tell("writing the graph and the weights")
        tf.saved_model.save(make_module(generator.model, signatures), str(made), signatures=signatures)
        tell("writing the assets")
        write_assets(generator, made / "assets", max_new_tokens, signatures)
        if requests:
            tell("writing requests that warm a server up")
            write_warmup_records(made / RECORDS_PATH, model_name_of(folder), requests)
        elif warm_up != "none":
            tell('no requests that warm a server up: they need pip install "tf_gpt2[serving]"')
    return target


def check_path(folder: str | Path) -> None:
    """Raises ValueError for folders that TensorFlow would write to, and then not find: it reads paths as patterns.

    Only the given path counts: where a folder above has such a name, a relative path that begins below it works.
    """
    path = os.fspath(folder)
    if re.search(r"\\|\[[^/]+\]", path):
        raise ValueError(
            f"folder must have no backslash and no [...] in its path, got {path!r}: TensorFlow takes them for a "
            "pattern of file names, and could not load the model from there; choose another name"
        )
    if not is_utf8(path):
        raise ValueError(f"folder must be named in UTF-8, as TensorFlow requires, got {path!r}; choose another name")


def is_utf8(path: str) -> bool:
    """Whether all bytes of a path are UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def model_name_of(folder: str | Path) -> str:
    """Returns the name of the model in servers: that of the folder, also where it is given as ``.`` or ``..``."""
    path = Path(folder)
    return (path.resolve() if path.name in ("", "..") else path).name or "gpt2"


def check_weights(model: GPT2Model) -> None:
    """Raises ParamsError when weights hold NaN or infinity."""
    for variable in model.weights:
        if not is_finite(variable.value):
            raise ParamsError(
                f"model must have finite weights, and {variable.path} holds NaN or infinity; train it again"
            )


def requests_for(warm_up: str, *, xla: bool) -> list[Request]:
    """Returns the warm-up requests; none for "plain" where the protos to write them are not installed."""
    if warm_up not in WARM_UP or (warm_up == "xla" and not xla):
        raise ValueError(f"warm_up must be one of {', '.join(WARM_UP)}, and xla only with xla=True, got {warm_up!r}")
    is_installed = importlib.util.find_spec("tensorflow_serving") is not None
    if warm_up == "none" or (warm_up == "plain" and not is_installed):
        return []
    return plain_requests() + (xla_requests() if warm_up == "xla" else [])


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to fill, and moves it to the target if no error occurs.

    Servers watch the parent folder: a number is a version to them, and they ignore other names.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch, own(Path(scratch)):
        made = Path(scratch) / "new"
        made.mkdir()
        yield made
        if overwrite and target.exists():
            target.rename(Path(scratch) / "old")
        try:
            made.rename(target)  # fails if another process made it meanwhile
        except OSError as error:
            if target.exists():
                raise already_there(target) from error
            raise


def remove_left_over(parent: Path) -> None:
    """Removes the folders that killed exports left: those older than a day that no living process holds.

    A folder with the only copy of a version stays: its export was killed while it replaced that version.
    """
    for path in parent.iterdir():
        if not LEFT_OVER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        version = path.name[1:].partition("-")[0]
        is_only_copy = (path / "old").exists() and not (parent / version).exists()
        with contextlib.suppress(OSError):  # another export may remove it at the same time
            if time.time() - path.stat().st_mtime > LEFT_OVER_AFTER_S and not is_only_copy and not is_owned(path):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Shows other processes, by a lock, that this one still works in a folder; the lock ends with the process."""
    with (folder / OWNED).open("wb") as file:
        lock(file.fileno())
        yield


def is_owned(folder: Path) -> bool:
    """Whether a living process, possibly this one, works in a folder."""
    path = folder / OWNED
    if not path.exists():
        return False
    with path.open("rb") as file:
        return not lock(file.fileno())


def lock(descriptor: int) -> bool:
    """Locks an open file until it is closed; returns False when another holder has locked it."""
    if sys.platform == "win32":  # no flock there; an open file cannot be removed either
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def already_there(target: Path) -> FileExistsError:
    """Returns the error for a version that exists."""
    return FileExistsError(f"version {target.name} exists already: {target}; choose a higher version, or overwrite it")


def trace_signatures(generator: TextGenerator, max_new_tokens: int, xla: bool, tell: OnStep) -> dict[str, Any]:
    """Makes the graph of each signature."""
    functions: dict[str, Any] = {}
    reader = PromptReader(generator.encoder, generator.model.config.n_ctx)
    for is_compiled in (False, True) if xla else (False,):
        served = ServedFunctions(generator, reader, max_new_tokens=max_new_tokens, xla=is_compiled)
        functions |= served.signatures()
    signatures = {}
    for name, function in functions.items():
        tell(f"tracing {name}")
        signatures[name] = traced(function)
    return signatures


def traced(function: Any) -> Any:
    """Returns a function of the same parameters that calls the graph of ``function``.

    When TensorFlow saves a function, it traces it once more; this one it traces in no time.
    """
    graph, signature = function.get_concrete_function(), inspect.signature(function.python_function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return graph(**signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__name__ = function.__name__
    call.traced = function  # type: ignore[attr-defined]  # it alone holds the variables of its own
    return tf.function(call, input_signature=function.input_signature, autograph=False)


def make_module(model: GPT2Model, signatures: Mapping[str, Any]) -> tf.Module:
    """Makes the module that TensorFlow saves beside the functions; it has all variables, the model's and theirs."""
    module = tf.Module(name="tf_gpt2")
    module.variables_by_name = {variable.path: variable.value for variable in model.weights}
    of_model = {id(variable) for variable in module.variables_by_name.values()}
    graphs = [function.get_concrete_function().graph for function in signatures.values()]
    read = {id(variable): variable for graph in graphs for variable in graph.variables}  # functions share variables
    module.of_functions = [variable for key, variable in read.items() if key not in of_model]
    return module


def write_assets(generator: TextGenerator, folder: Path, max_new_tokens: int, signatures: Mapping[str, Any]) -> None:
    """Writes the model's description for people and programs: hyperparameters, vocabulary, manifest."""
    folder.mkdir(exist_ok=True)
    write_json(generator.model.config.to_hparams(), folder / "hparams.json")
    write_openai(generator.encoder, folder)
    model = generator.model
    manifest = {
        "tf_gpt2": package_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "dtype": model.quantization or model.dtype_policy.name,
        "n_params": model.config.n_params,
        "max_new_tokens": max_new_tokens,
        "signatures": sorted(signatures),
        "sha256": {
            **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
            "weights": hash_weights(model),
        },
    }
    write_json(manifest, folder / "manifest.json")


def write_json(value: Any, path: Path) -> None:
    """Writes JSON; indents short values, for people."""
    path.write_text(json.dumps(value, indent=None if len(value) > 100 else 2) + "\n", encoding="utf-8")


def hash_weights(model: GPT2Model) -> str:
    """Computes one SHA-256 of all weights as stored, in the order of the parameter tree."""
    digest = hashlib.sha256()
    for path, leaf in leaves(model.leaf_tree()):
        for variable in leaf.variables:
            digest.update(path.encode())
            digest.update(tf.io.serialize_tensor(variable.value).numpy())
    return digest.hexdigest()


def size_bytes(folder: Path) -> int:
    """Adds up the sizes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
