"""The parameter tree as data: its shapes, checks and counts, and random trees for tests and benchmarks.

The tree has OpenAI's names: nested dicts, ``blocks`` a list, leaves NumPy arrays. Knows nothing of files or TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ParamsError

Tree = Any
"""A leaf, or a dict or list of trees."""


def block_shapes(config: GPT2Config) -> dict[str, Any]:
    """Returns the tree of shapes of one block."""
    c, f = config.n_embd, config.mlp_width
    return {
        "attn": {"c_attn": {"b": (3 * c,), "w": (c, 3 * c)}, "c_proj": {"b": (c,), "w": (c, c)}},
        "ln_1": {"b": (c,), "g": (c,)},
        "ln_2": {"b": (c,), "g": (c,)},
        "mlp": {"c_fc": {"b": (f,), "w": (c, f)}, "c_proj": {"b": (c,), "w": (f, c)}},
    }


def param_shapes(config: GPT2Config) -> dict[str, Any]:
    """Returns the tree of shapes of a whole model; its leaves are tuples."""
    c = config.n_embd
    head = {} if config.tie_word_embeddings else {"lm_head": (config.n_vocab, c)}
    return {
        "blocks": [block_shapes(config) for _ in range(config.n_layer)],
        **head,
        "ln_f": {"b": (c,), "g": (c,)},
        "wpe": (config.n_ctx, c),
        "wte": (config.n_vocab, c),
    }


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ``("blocks/0/attn/c_attn/b", leaf)`` for each leaf, in the tree's own order."""
    if isinstance(tree, dict | list):
        for key, subtree in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(subtree, f"{path}/{key}" if path else str(key))
    else:
        yield path, tree


def map_leaves(function: Callable[[str, Any], Any], tree: Tree, path: str = "") -> Tree:
    """Makes a tree of the same form whose leaves are ``function(path, leaf)``."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value, f"{path}/{key}" if path else key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(function, value, f"{path}/{i}" if path else str(i)) for i, value in enumerate(tree)]
    return function(path, tree)


def check_params(params: Tree, shapes: Tree) -> None:
    """Checks that a tree has exactly the leaves of ``shapes``, each an array of floats of that shape.

    Args:
        params: a parameter tree or subtree; leaves NumPy arrays or anything with ``shape`` and ``dtype``.
        shapes: the tree of expected shapes, as ``param_shapes`` returns it.

    Raises:
        ParamsError: when they differ; the message names the paths of the first ten wrong leaves.
    """
    expected, actual = dict(leaves(shapes)), dict(leaves(params))
    problems = [f"{path}: missing" for path in expected if path not in actual]
    problems += [f"{path}: unexpected" for path in actual if path not in expected]
    for path in expected.keys() & actual.keys():
        problems += leaf_problems(path, expected[path], actual[path])
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise ParamsError(f"wrong parameter tree: {'; '.join(sorted(problems)[:10])}{more}")


def leaf_problems(path: str, shape: tuple[int, ...], leaf: Any) -> list[str]:
    """Describes the error in one leaf's type, shape or dtype; returns an empty list when the leaf is right."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return [f"{path}: expected an array, got {type(leaf).__name__}"]
    if tuple(leaf.shape) != tuple(shape):
        return [f"{path}: expected {tuple(shape)}, got {tuple(leaf.shape)}"]
    # by name, because NumPy does not know bfloat16, nor the dtype objects of TensorFlow and Keras
    if "float" not in getattr(leaf.dtype, "name", str(leaf.dtype)):
        return [f"{path}: expected floats, got {leaf.dtype}"]
    return []


def count_params(tree: Tree) -> int:
    """Counts the numbers in a tree."""
    return sum(int(np.prod(leaf.shape)) for _, leaf in leaves(tree))


def random_params(config: GPT2Config, *, seed: int = 0, bias_scale: float = 0.1) -> dict[str, Any]:
    """Makes a random float32 tree at GPT-2's initial scales, with random biases and gains.

    Biases and gains are random because a test with zero biases and unit gains cannot notice swapped ones.

    Args:
        config: the shapes.
        seed: of NumPy's generator; the same seed gives the same tree.
        bias_scale: standard deviation of biases, and of gains around 1.

    Source: openai/gpt-2, ``src/model.py``: wte 0.02, wpe 0.01, weights 0.02.
    """
    rng = np.random.default_rng(seed)
    scales = {"wte": 0.02, "lm_head": 0.02, "wpe": 0.01, "w": 0.02, "b": bias_scale, "g": bias_scale}

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rsplit("/", 1)[-1]
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(scales[name])
        return values + np.float32(name == "g")

    return map_leaves(draw, param_shapes(config))
