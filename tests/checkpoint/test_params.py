"""The parameter tree as data: its shapes, the check that names what is wrong, the random trees."""

import copy

import ml_dtypes
import numpy as np
import pytest

from tf_gpt2.checkpoint.params import (
    block_shapes,
    check_params,
    count_params,
    leaves,
    map_leaves,
    param_shapes,
    random_params,
)
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.errors import GPT2Error, ParamsError

CONFIG = GPT2Config(n_vocab=11, n_ctx=7, n_embd=6, n_head=3, n_layer=2)
BLOCK = {
    "attn/c_attn/b": (18,),
    "attn/c_attn/w": (6, 18),
    "attn/c_proj/b": (6,),
    "attn/c_proj/w": (6, 6),
    "ln_1/b": (6,),
    "ln_1/g": (6,),
    "ln_2/b": (6,),
    "ln_2/g": (6,),
    "mlp/c_fc/b": (24,),
    "mlp/c_fc/w": (6, 24),
    "mlp/c_proj/b": (6,),
    "mlp/c_proj/w": (24, 6),
}


def changed(path, leaf):
    """A right tree in which one leaf is another; ``...`` takes it out."""
    tree = random_params(CONFIG)
    *parents, name = path.split("/")
    place = tree
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if leaf is ...:
        del place[name]
    else:
        place[name] = leaf
    return tree


def problems(tree):
    with pytest.raises(ParamsError) as caught:
        check_params(tree, param_shapes(CONFIG))
    return str(caught.value)


def test_the_tree_has_the_original_names_and_shapes():
    expected = {"wte": (11, 6), "wpe": (7, 6), "ln_f/b": (6,), "ln_f/g": (6,)}
    expected |= {f"blocks/{i}/{path}": shape for i in range(2) for path, shape in BLOCK.items()}
    assert dict(leaves(param_shapes(CONFIG))) == expected
    assert dict(leaves(block_shapes(CONFIG))) == BLOCK
    assert isinstance(param_shapes(CONFIG)["blocks"], list)


@pytest.mark.parametrize("config", [CONFIG, GPT2Config(n_vocab=1, n_ctx=1, n_embd=1, n_head=1, n_layer=1)])
def test_counts_agree(config):
    assert count_params(random_params(config)) == config.n_params


@pytest.mark.parametrize("size", SIZES)
def test_counts_of_the_sizes_agree(size):
    assert sum(int(np.prod(shape)) for _, shape in leaves(param_shapes(SIZES[size]))) == SIZES[size].n_params


def test_mapping_keeps_the_form_and_tells_the_path(assert_same_bits):
    tree = random_params(CONFIG)
    paths = map_leaves(lambda path, _: path, tree)
    assert paths["blocks"][1]["mlp"]["c_fc"]["w"] == "blocks/1/mlp/c_fc/w"
    assert [path for path, _ in leaves(tree)] == [path for _, path in leaves(paths)]
    assert_same_bits(map_leaves(lambda _, leaf: leaf.copy(), tree), tree)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_any_floats_are_right(dtype):
    check_params(map_leaves(lambda _, leaf: leaf.astype(dtype), random_params(CONFIG)), param_shapes(CONFIG))


def test_the_order_of_names_does_not_matter():
    tree = random_params(CONFIG)
    check_params(dict(reversed(tree.items())), param_shapes(CONFIG))


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("blocks/1/attn/c_attn/w", np.zeros((18, 6)), "blocks/1/attn/c_attn/w: expected (6, 18), got (18, 6)"),
        ("blocks/0/mlp/c_proj/w", np.zeros((1, 24, 6)), "blocks/0/mlp/c_proj/w: expected (24, 6), got (1, 24, 6)"),
        ("wte", np.zeros((12, 6)), "wte: expected (11, 6), got (12, 6)"),
        ("ln_f/b", np.float32(0), "ln_f/b: expected (6,), got ()"),
        ("ln_f/g", ..., "ln_f/g: missing"),
        ("g", np.zeros(6), "g: unexpected"),
        ("blocks/1/ln_1/gamma", np.zeros(6), "blocks/1/ln_1/gamma: unexpected"),
        ("ln_f/b", None, "ln_f/b: expected an array, got NoneType"),
        ("ln_f/b", 0.0, "ln_f/b: expected an array, got float"),
        ("ln_f/b", (6,), "ln_f/b: expected an array, got tuple"),
        ("ln_f/b", np.zeros(6, np.int64), "ln_f/b: expected floats, got int64"),
        ("ln_f/b", np.zeros(6, bool), "ln_f/b: expected floats, got bool"),
        ("ln_f/b", np.zeros(6, complex), "ln_f/b: expected floats, got complex128"),
        ("ln_f/b", np.array(["x"] * 6), "ln_f/b: expected floats, got <U1"),
        ("ln_f/b", np.zeros(6, object), "ln_f/b: expected floats, got object"),
        ("ln_f/b", np.zeros(6, [("x", "f4")]), "ln_f/b: expected floats, got [('x', '<f4')]"),
        ("ln_f/b", np.zeros(6, "V4"), "ln_f/b: expected floats, got |V4"),
        ("ln_f/b", np.zeros(6, ml_dtypes.int4), "ln_f/b: expected floats, got int4"),
    ],
)
def test_one_wrong_leaf_is_named(path, leaf, message):
    assert problems(changed(path, leaf)) == f"wrong parameter tree: {message}"


def test_blocks_must_be_as_many_as_layers():
    tree = random_params(CONFIG)
    assert "blocks/2/attn/c_attn/b: unexpected" in problems({**tree, "blocks": [*tree["blocks"], tree["blocks"][0]]})
    assert "blocks/1/attn/c_attn/b: missing" in problems({**tree, "blocks": tree["blocks"][:1]})


def test_the_first_ten_of_many_problems_are_told_and_the_others_counted():
    message = problems({})
    assert message.count(": missing") == 10
    assert message.endswith("(and 18 more)")


@pytest.mark.parametrize("tree", [{}, [], None, 5, "wte", np.zeros(3)])
def test_what_is_no_tree_is_refused(tree):
    assert "wte: missing" in problems(tree) or "(and " in problems(tree)


def test_the_error_is_a_value_error_of_ours():
    assert issubclass(ParamsError, GPT2Error)
    assert issubclass(ParamsError, ValueError)


def test_checking_changes_nothing(assert_same_bits):
    tree = random_params(CONFIG)
    before = copy.deepcopy(tree)
    check_params(tree, param_shapes(CONFIG))
    assert_same_bits(tree, before)


def test_random_trees_repeat_and_have_no_trivial_leaf(assert_same_bits):
    tree = random_params(CONFIG, seed=3)
    assert_same_bits(tree, random_params(CONFIG, seed=3))
    flat = dict(leaves(tree))
    other = dict(leaves(random_params(CONFIG, seed=4)))
    for path, leaf in flat.items():
        assert leaf.dtype == np.float32
        assert np.unique(leaf).size == leaf.size, path
        assert not np.array_equal(leaf, other[path])


def test_random_trees_have_the_original_scales():
    flat = dict(leaves(random_params(GPT2Config(n_vocab=500, n_ctx=500, n_embd=64, n_head=1, n_layer=1))))
    for path, scale in {"wte": 0.02, "wpe": 0.01, "blocks/0/attn/c_attn/w": 0.02, "blocks/0/mlp/c_fc/b": 0.1}.items():
        assert np.std(flat[path]) == pytest.approx(scale, rel=0.2)
        assert abs(np.mean(flat[path])) < scale / 4
    assert np.mean(flat["ln_f/g"]) == pytest.approx(1, abs=0.1)
