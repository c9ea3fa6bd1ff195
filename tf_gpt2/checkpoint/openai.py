"""Reads OpenAI's TensorFlow-1 checkpoint as the parameter tree, and writes the tree as such a checkpoint.

Knows nothing of Keras layers; the names of the variables stand in ``variables.py``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_gpt2.checkpoint.params import Tree, check_params, leaves, map_leaves, param_shapes
from tf_gpt2.checkpoint.variables import find_weights, stored_shape, variable_name
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError
from tf_gpt2.runtime import prepare_process

logger = logging.getLogger(__name__)

PREFIX = "model.ckpt"

STATE = f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'
"""The content of OpenAI's file ``checkpoint``, which has relative names."""

PATTERN_SIGNS = re.compile(rb"[*?\[\\]")
"""Characters that make TensorFlow read a path as a pattern of file names."""


def open_checkpoint(folder: str | Path, config: GPT2Config) -> Iterator[tuple[str, tf.Tensor]]:
    """Checks a checkpoint, and returns an iterator that reads one variable at a time.

    Other variables than weights, such as an optimizer's state, are ignored, and named in the log at level DEBUG.

    Args:
        folder: holds ``checkpoint`` and the files that it names; or is the path of a checkpoint without its ending.
        config: the hyperparameters that the variables must fit.

    Returns:
        An iterator of ``(path in the tree, float32 tensor in the tree's shape)``, each variable once. They are tensors,
        because assigning a tensor to a variable copies nothing.

    Raises:
        CheckpointError: at once, when the checkpoint is not complete or its weights are not exactly those of a GPT-2
            of this config; during iteration, at a variable whose bytes are damaged.
    """
    prepare_process()
    prefix, ignored = find_weights(folder, config)
    if ignored:
        names = ", ".join(name[:200] for name in ignored)
        logger.debug("%s has %d variables that are no weights, ignored: %s", prefix, len(ignored), names)
    return read_variables(prefix, config)


def read_variables(prefix: Path, config: GPT2Config) -> Iterator[tuple[str, tf.Tensor]]:
    """Yields the variables of a checkpoint that ``find_weights`` has checked; see ``open_checkpoint``."""
    try:
        with path_without_signs(prefix) as path:
            for leaf, shape in leaves(param_shapes(config)):
                (tensor,) = tf.raw_ops.RestoreV2(
                    prefix=path, tensor_names=[variable_name(leaf)], shape_and_slices=[""], dtypes=[tf.float32]
                )
                # reshape, not squeeze: it removes the convolution's axis, but no axis of the tree that has size 1
                yield leaf, tf.reshape(tensor, shape)
    except tf.errors.OpError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {prefix}: {str(error).splitlines()[0]}; "
            f"copy the whole folder again from its source"
        ) from error


@contextlib.contextmanager
def path_without_signs(prefix: Path) -> Iterator[bytes]:
    """Yields a path that TensorFlow does not read as a pattern: its own, or that of links in a new folder."""
    if not PATTERN_SIGNS.search(os.fsencode(prefix)):
        yield os.fsencode(prefix)  # as bytes, because a name need not be UTF-8
        return
    with tempfile.TemporaryDirectory() as folder:
        if PATTERN_SIGNS.search(os.fsencode(folder)):
            raise CheckpointError(
                f"cannot read the checkpoint {prefix}: TensorFlow takes its path for a pattern, and that of the folder "
                f"for temporary files, too; set TMPDIR to a path without * ? [ and backslash"
            )
        for file in prefix.absolute().parent.iterdir():
            if file.name.startswith((f"{prefix.name}.index", f"{prefix.name}.data-")):
                Path(folder, PREFIX + file.name.removeprefix(prefix.name)).symlink_to(file)
        yield os.fsencode(Path(folder, PREFIX))


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
    arrays = {path: tensor.numpy() for path, tensor in open_checkpoint(tf_ckpt_path, config)}
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
        OSError: when the files cannot be written.
    """
    config = GPT2Config.from_hparams(hparams)
    check_params(params, param_shapes(config))
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    # inside model_dir, because it may be a file system of its own, and a move must not cross file systems
    with tempfile.TemporaryDirectory(dir=model_dir, prefix=".") as staging:
        write_checkpoint(params, Path(staging))
        (Path(staging) / "hparams.json").write_text(json.dumps(dict(hparams)), encoding="utf-8")
        # 'checkpoint' names the others, so it is removed first and moved last: in between the folder holds no model
        (model_dir / "checkpoint").unlink(missing_ok=True)
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.name == "checkpoint"):
            file.replace(model_dir / file.name)


def write_checkpoint(params: Tree, folder: Path) -> None:
    """Writes ``checkpoint`` and ``model.ckpt.{data-00000-of-00001,index,meta}`` as TensorFlow 1's saver does."""
    stored = {
        variable_name(path): np.asarray(leaf, dtype=np.float32).reshape(stored_shape(path, leaf.shape))
        for path, leaf in leaves(params)
    }
    # not the saver itself, which accepts only UTF-8 paths
    try:
        tf.raw_ops.SaveV2(
            prefix=os.fsencode(folder / PREFIX),
            tensor_names=list(stored),
            shape_and_slices=[""] * len(stored),
            tensors=list(stored.values()),
        )
    except tf.errors.ResourceExhaustedError as error:  # TensorFlow's word for a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
    with tf.Graph().as_default():
        variables = [
            tf.compat.v1.get_variable(
                name, initializer=tf.compat.v1.placeholder(tf.float32, value.shape), use_resource=False
            )
            for name, value in stored.items()
        ]
        graph = tf.compat.v1.train.Saver(variables).export_meta_graph()
    (folder / f"{PREFIX}.meta").write_bytes(graph.SerializeToString())
    (folder / "checkpoint").write_text(STATE, encoding="utf-8")
