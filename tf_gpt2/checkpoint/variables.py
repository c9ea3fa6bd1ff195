"""Names the variables of a GPT-2's TensorFlow checkpoint, and checks that a checkpoint has them all.

The only module that knows the names: ``model/wte``, ``model/h0/attn/c_attn/w``, … Needs no TensorFlow.
"""

from __future__ import annotations

import re
from pathlib import Path

from tf_gpt2.checkpoint.index import Index, find_prefix, places_that_lack_bytes, read_index
from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError

LEAF = (
    r"model/(?:wte|wpe|lm_head(?!/[bw]$)|(?:ln_f|h\d+/ln_[12])/[bg]"
    r"|h\d+/(?:attn/c_(?:attn|proj)|mlp/c_(?:fc|proj))/[bw])"
)

NO_WEIGHT = re.compile(rf"(?!model/).*|{LEAF}/.+|(?:.*/)?(?:global_step|beta[12]_power)(?:_\d+)?", re.DOTALL)
"""Names of variables that a training run keeps beside the weights: those outside ``model/``, an optimizer's state of a
weight (``model/wte/Adam``), and counters."""


def variable_name(path: str) -> str:
    """Returns the name of a leaf's variable: ``blocks/3/ln_1/g`` -> ``model/h3/ln_1/g``."""
    return "model/" + re.sub(r"^blocks/", "h", path)


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a leaf's variable: (1, n_in, n_out) for a ``w``, the kernel of a convolution of width 1."""
    return (1, *shape) if path.endswith("/w") else shape


def expected_variables(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Lists the names and stored shapes of all weights of a model."""
    return {variable_name(path): stored_shape(path, shape) for path, shape in leaves(param_shapes(config))}


def find_weights(folder: str | Path, config: GPT2Config) -> tuple[Path, list[str]]:
    """Finds a checkpoint, and checks that it has all weights of a model and the files that hold them.

    Args:
        folder: holds ``checkpoint`` and the files that it names; or is the path of a checkpoint without its ending.
        config: the hyperparameters that the variables must fit.

    Returns:
        The path of the checkpoint without its ending, and the names of its other variables, e.g. an optimizer's state.

    Raises:
        CheckpointError: when a file is missing, damaged or too short, or a weight missing, misshapen or unexpected.
    """
    prefix = find_prefix(folder)
    index = read_index(prefix)
    expected = expected_variables(config)
    if problems := misfits(index, expected):
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{prefix} does not fit its hparams: {'; '.join(problems[:10])}{more}; "
            f"take the hparams.json of these weights, or copy the whole folder again from its source"
        )
    if problem := places_that_lack_bytes(prefix, index, list(expected)):
        raise CheckpointError(
            f"the checkpoint {prefix} is not complete: {problem}; copy the whole folder again from its source"
        )
    return prefix, sorted(index.variables.keys() - expected.keys())


def misfits(index: Index, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Describes, sorted, the differences of an index from the weights of a model; ignores ``NO_WEIGHT`` variables."""
    stored = index.variables
    problems = [f"{name}: missing" for name in expected if name not in stored]
    problems += [
        f"{name[:200]}: unexpected" for name in stored if name not in expected and not NO_WEIGHT.fullmatch(name)
    ]
    for name in expected.keys() & stored.keys():
        if stored[name].shape != expected[name]:
            problems.append(f"{name}: expected {expected[name]}, got {stored[name].shape}")
        elif stored[name].dtype != "float32":
            problems.append(f"{name}: expected float32, got {stored[name].dtype}")
    return sorted(problems)
