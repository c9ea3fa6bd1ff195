"""The variables of a GPT-2's TensorFlow checkpoint: their names and shapes, and whether a checkpoint has them.

The only module that knows the names: ``model/wte``, ``model/h0/attn/c_attn/w``, … Needs no TensorFlow.
"""

from __future__ import annotations

import re
from pathlib import Path

from tf_gpt2.checkpoint.index import Index, find_prefix, places_that_lack_bytes, read_index
from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import CheckpointError

LEAF = r"model/(?:wte|wpe|(?:ln_f|h\d+/ln_[12])/[bg]|h\d+/(?:attn/c_(?:attn|proj)|mlp/c_(?:fc|proj))/[bw])"

NO_WEIGHT = re.compile(rf"(?!model/).*|{LEAF}/.+|(?:.*/)?(?:global_step|beta[12]_power)(?:_\d+)?", re.DOTALL)
"""What a training run keeps beside the weights: names outside ``model/``, what an optimizer remembers of a weight
(``model/wte/Adam``), counters."""


def variable_name(path: str) -> str:
    """Returns the checkpoint's name of a leaf: ``blocks/3/ln_1/g`` -> ``model/h3/ln_1/g``."""
    return "model/" + re.sub(r"^blocks/", "h", path)


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a leaf's shape in the checkpoint: each ``w`` was the kernel of a convolution of width 1."""
    return (1, *shape) if path.endswith("/w") else shape


def expected_variables(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Lists the names and stored shapes of all weights of a model."""
    return {variable_name(path): stored_shape(path, shape) for path, shape in leaves(param_shapes(config))}


def find_weights(folder: str | Path, config: GPT2Config) -> tuple[Path, list[str]]:
    """Finds a checkpoint that has all weights of a model, with the files that hold them.

    Args:
        folder: holds ``checkpoint`` and what that names; or the path of a checkpoint without its ending.
        config: the hyperparameters that the variables must fit.

    Returns:
        The path of the checkpoint without its ending, and the names of what is no weight, such as an optimizer's state.

    Raises:
        CheckpointError: when a file is missing, damaged or too short, a weight missing, misshapen or one too many.
    """
    prefix = find_prefix(folder)
    index = read_index(prefix)
    expected = expected_variables(config)
    if problems := misfits(index, expected):
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{prefix} does not fit its hparams: {'; '.join(problems[:10])}{more}; "
            f"take the hparams.json of these weights, or the whole folder anew from where it came"
        )
    if problem := places_that_lack_bytes(prefix, index, list(expected)):
        raise CheckpointError(
            f"the checkpoint {prefix} is not complete: {problem}; take the whole folder anew from where it came"
        )
    return prefix, sorted(index.variables.keys() - expected.keys())


def misfits(index: Index, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Describes, sorted, how an index differs from the weights of a model; what is no weight is no difference."""
    found = index.variables
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [
        f"{name[:200]}: unexpected" for name in found if name not in expected and not NO_WEIGHT.fullmatch(name)
    ]
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name]:
            problems.append(f"{name}: expected {expected[name]}, got {found[name].shape}")
        elif found[name].dtype != "float32":
            problems.append(f"{name}: expected float32, got {found[name].dtype}")
    return sorted(problems)
