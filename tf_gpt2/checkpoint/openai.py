"""OpenAI's TensorFlow-1 checkpoint <-> the parameter tree.

The only module that knows the checkpoint's variable names: ``model/wte``, ``model/h0/attn/c_attn/w``, … Knows nothing
of Keras layers.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gpt2.checkpoint.params import Tree, check_params, leaves, map_leaves, param_shapes
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError
from tf_gpt2.runtime import prepare_process

PREFIX = "model.ckpt"


def variable_name(path: str) -> str:
    """Gives the checkpoint's name of a leaf: ``blocks/3/ln_1/g`` -> ``model/h3/ln_1/g``."""
    return "model/" + re.sub(r"^blocks/", "h", path)


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Gives a leaf's shape in the checkpoint: each ``w`` was the kernel of a convolution of width 1."""
    return (1, *shape) if path.endswith("/w") else shape


def iter_variables(folder: str | Path, config: GPT2Config) -> Iterator[tuple[str, tf.Tensor]]:
    """Reads a checkpoint one variable at a time.

    Args:
        folder: holds ``checkpoint`` and ``model.ckpt.*``; or the path of a checkpoint without its ending.
        config: the hyperparameters that the variables must fit.

    Yields:
        ``(path in the tree, float32 tensor in the tree's shape)``, each variable once. Tensors, because a variable
        takes one over without a copy.

    Raises:
        CheckpointError: before the first variable when the checkpoint cannot be opened or its variables are not
            exactly those of a GPT-2 of this config; at a variable whose bytes are damaged.
    """
    prepare_process()
    prefix = checkpoint_prefix(folder)
    shapes = dict(leaves(param_shapes(config)))
    try:
        reader = tf.train.load_checkpoint(prefix)
        check_variables(reader, shapes, prefix)
        for path, shape in shapes.items():
            # reshape, not squeeze: it takes off the convolution's axis and no true axis of size 1
            name = variable_name(path)
            (tensor,) = tf.raw_ops.RestoreV2(
                prefix=prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[tf.float32]
            )
            yield path, tf.reshape(tensor, shape)
    except (tf.errors.OpError, RuntimeError, ValueError, IndexError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"cannot read the checkpoint {prefix}: {reason}; delete its folder and download it again"
        ) from error


def checkpoint_prefix(folder: str | Path) -> str:
    """Finds a checkpoint's path without its ending.

    Raises:
        CheckpointError: when there is none.
    """
    path = Path(folder)
    if not path.is_dir():
        if not Path(f"{path}.index").is_file():
            raise CheckpointError(f"no checkpoint at {path}: there is neither such a folder nor {path}.index")
        return str(path)
    try:
        prefix = tf.train.latest_checkpoint(str(path))
    except (tf.errors.OpError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path / 'checkpoint'}: {str(error).splitlines()[0]}") from error
    if prefix is None:
        raise CheckpointError(
            f"no checkpoint in {path}: its file 'checkpoint' is missing or names files that are not there"
        )
    return prefix


def check_variables(reader: Any, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    """Checks that a checkpoint has every variable exactly once, float32 and of the right shape, and no other."""
    found = reader.get_variable_to_shape_map()
    dtypes = reader.get_variable_to_dtype_map()
    expected = {variable_name(path): stored_shape(path, shape) for path, shape in shapes.items()}
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if tuple(found[name]) != expected[name]:
            problems.append(f"{name}: expected {expected[name]}, got {tuple(found[name])}")
        elif dtypes[name] != tf.float32:
            problems.append(f"{name}: expected float32, got {dtypes[name].name}")
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{prefix} does not fit its hparams: {'; '.join(sorted(problems)[:10])}{more}; "
            f"check hparams.json, or download the folder again"
        )


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str | Path, hparams: Mapping[str, Any]) -> Tree:
    """Reads a checkpoint as the parameter tree.

    Args:
        tf_ckpt_path: the checkpoint's folder, or its path without ending (``…/model.ckpt``).
        hparams: the dict from ``hparams.json``.

    Returns:
        Nested dicts with OpenAI's names, ``blocks`` a list, leaves float32 arrays.

    Raises:
        CheckpointError: when files are missing or damaged, or variables are missing, extra or misshapen.
        ValueError: when ``hparams`` does not describe a GPT-2.
    """
    config = GPT2Config.from_hparams(hparams)
    arrays = {path: tensor.numpy() for path, tensor in iter_variables(tf_ckpt_path, config)}
    return map_leaves(lambda path, _: arrays[path], param_shapes(config))


def save_gpt2_params_to_tf_ckpt(params: Tree, hparams: Mapping[str, Any], model_dir: str | Path) -> None:
    """Writes ``hparams.json`` and a checkpoint with the names, shapes and files of OpenAI's.

    The files are written in a temporary folder beside ``model_dir`` and then moved, so a failure leaves no half
    checkpoint. The vocabulary is not part of the tree: copy ``encoder.json`` and ``vocab.bpe`` to complete the seven
    files.

    Args:
        params: the parameter tree; leaves are saved as float32.
        hparams: the dict for ``hparams.json``; the tree must fit it.
        model_dir: folder to write to; made if need be, files of the same names are replaced.

    Raises:
        ParamsError: when the tree does not fit ``hparams``.
        ValueError: when ``hparams`` does not describe a GPT-2.
    """
    config = GPT2Config.from_hparams(hparams)
    check_params(params, param_shapes(config))
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    # inside the folder, which may be a file system of its own
    with tempfile.TemporaryDirectory(dir=model_dir, prefix=".") as staging:
        write_checkpoint(params, Path(staging))
        (Path(staging) / "hparams.json").write_text(json.dumps(dict(hparams)), encoding="utf-8")
        # 'checkpoint' names the others, so it goes first and comes last: until then the folder holds no model
        (model_dir / "checkpoint").unlink(missing_ok=True)
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.name == "checkpoint"):
            file.replace(model_dir / file.name)


def write_checkpoint(params: Tree, folder: Path) -> None:
    """Writes ``checkpoint`` and ``model.ckpt.{data-00000-of-00001,index,meta}`` with TensorFlow 1's saver."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        feeds = {}
        for path, leaf in leaves(params):
            value = np.asarray(leaf, dtype=np.float32)
            placeholder = tf.compat.v1.placeholder(tf.float32, stored_shape(path, value.shape))
            variable = tf.compat.v1.get_variable(
                variable_name(path), initializer=placeholder, use_resource=False, validate_shape=True
            )
            feeds[path] = (variable, placeholder, value)
        for variable, placeholder, value in feeds.values():
            session.run(variable.initializer, {placeholder: value.reshape(placeholder.shape)})
        saver = tf.compat.v1.train.Saver([variable for variable, _, _ in feeds.values()])
        saver.save(session, str(folder / PREFIX))
    # the saver wrote the temporary folder's name; OpenAI's file has relative names
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n', encoding="utf-8"
    )
