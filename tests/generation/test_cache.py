"""The key/value cache: what it holds, what it shows, and that XLA updates it in place, without copying a weight either.

The proof is the optimized program of the decode loop; that the check can fail is shown by loops that do copy.
"""

import re

import numpy as np
import pytest
import tensorflow as tf
from asking import make_limits, make_sampling
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.compiled import compiled
from tf_gpt2.generation.loop import decode, grow, prefill
from tf_gpt2.model.arithmetic import graph, plain, xla
from tf_gpt2.model.formulas import KeyValues
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import network_of
from tf_gpt2.runtime import kernels
from tf_gpt2.runtime.tf_internals import address

# two heads of width 32, 24 or 64 places: no weight has the shape of the cache; test_lookup.py has a loop of two layers
CONFIG = GPT2Config(n_vocab=200, n_ctx=72, n_embd=64, n_head=2, n_layer=1)
N_SLOTS = 48
MATRICES = [(200, 64), (192, 64), (64, 64), (256, 64), (64, 256)]
WEIGHTS = [*MATRICES, (72, 64)]
FORMS = {*WEIGHTS, *((n_in, n_out) for n_out, n_in in WEIGHTS), *((n_out // 2, n_in) for n_out, n_in in WEIGHTS)}


def numbers(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).standard_normal(shape), tf.float32)


# ---- what it holds


ALL = {"plain": plain, "graph": graph, "xla": xla}


@pytest.mark.parametrize("ops", ALL.values(), ids=ALL)
@pytest.mark.parametrize("positions", [[[2], [0], [6]], [[2, 3], [0, 1], [5, 6]]], ids=["one token", "two tokens"])
def test_decode_writes_each_row_at_its_place_and_shows_what_is_up_to_there(positions, ops):
    n_head, n_fed = 2, len(positions[0])
    before = numbers(6, 7, 5).numpy(), numbers(6, 7, 5, seed=1).numpy()
    new = numbers(6, n_fed, 5, seed=2), numbers(6, n_fed, 5, seed=3)
    network = network_of(GPT2Model(CONFIG), ops)
    (past,) = network._place(tf.constant(positions), [KeyValues(*map(tf.constant, before))])
    after = [ops.write(part.numpy(), x, past.places).numpy() for part, x in zip(past[:2], new, strict=True)]
    mask = np.broadcast_to(past.mask, (6, n_fed, 7))
    for row in range(6):
        places = positions[row // n_head]
        for x_after, x_before, x_new in zip(after, before, new, strict=True):
            np.testing.assert_array_equal(x_after[row, places], x_new[row])
            np.testing.assert_array_equal(np.delete(x_after[row], places, 0), np.delete(x_before[row], places, 0))
        assert mask[row].tolist() == [[slot <= place for slot in range(7)] for place in places]


def test_outside_of_xla_the_cache_is_written_in_place():
    keys = numbers(6, 7, 5)
    places = graph.places(tf.constant([[2], [2], [0], [0], [6], [6]]), keys)
    assert address(graph.write(keys, numbers(6, 1, 5, seed=2), places)) == address(keys)


def test_what_is_written_behind_a_full_row_goes_into_no_other():
    before = numbers(6, 7, 5).numpy()
    places = graph.places(tf.constant([[2], [2], [9], [9], [7], [7]]), tf.constant(before))
    after = graph.write(tf.constant(before), numbers(6, 1, 5, seed=2), places).numpy()
    np.testing.assert_array_equal(np.delete(after[:2], 2, 1), np.delete(before[:2], 2, 1))
    np.testing.assert_array_equal(after[2:, :-1], before[2:, :-1])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_plain_loop_leaves_its_input_as_it_is(jit_compile):
    """A state can be continued twice: the loop writes into a cache of its own."""
    model = GPT2Model(CONFIG)
    model.set_weights(lively_params(CONFIG))
    sampling = make_sampling(2, CONFIG, temperature=1.0, seed=3)
    limits = make_limits([np.ones(4)] * 2, 20, (), CONFIG)
    read = compiled(prefill, model, jit_compile=jit_compile)
    go_on = compiled(decode, model, jit_compile=jit_compile, n_rows=2)
    state = grow(read(tf.ones((2, 16), tf.int32), tf.fill([2], 4), 1, 0), N_SLOTS)
    before = [x.numpy().copy() for x in tf.nest.flatten(state)]
    first, second = (go_on(state, sampling, limits, tf.constant(9)) for _ in range(2))
    for x, was in zip(tf.nest.flatten(state), before, strict=True):
        np.testing.assert_array_equal(x, was)
    for x, y in zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(first.cache[0].keys, before[-2])


# ---- that it stays where it is


def loop_body(text):
    """Instructions, ``(name, dtype, shape, operation)``, of a program's outermost loop and of what it calls."""
    blocks = {match[1]: match[0] for match in re.finditer(r"^(?:ENTRY )?(%[\w.-]+) \(.*?^}", text, re.S | re.M)}
    entry = next(block for block in blocks.values() if block.startswith("ENTRY"))
    waiting, instructions = re.findall(r" while\(.*?body=(%[\w.-]+)", entry), []
    assert len(waiting) == 1
    for name in waiting:  # grows
        for line in blocks[name].splitlines()[1:-1]:
            waiting += re.findall(r" (?:call\(.*?to_apply|while\(.*?body)=(%[\w.-]+)", line)
            match = re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line)
            if match:
                name, dtype, shape, operation = match.groups()
                instructions.append((name, dtype, tuple(int(n) for n in shape.split(",") if n), operation))
    return instructions


def made_anew(instructions, shapes):
    """Names of what the loop computes or copies at each step in one of the shapes, updates in place apart."""
    views = ("parameter", "get-tuple-element", "bitcast")
    return [
        name
        for name, _, shape, operation in instructions
        if shape in shapes and operation not in views and not re.search(r"scatter|dynamic.update.slice", name)
    ]


PROGRAMS = {
    "one row": (1, {}, ""),
    "two rows": (2, {}, ""),
    "int8": (1, {"quantization": "int8"}, ""),
    "int8, two rows": (2, {"quantization": "int8"}, ""),
    "int8 without kernels": (1, {"quantization": "int8"}, "xla"),
    "int8, nine rows, without kernels": (9, {"quantization": "int8"}, "xla"),
    "int4": (1, {"quantization": "int4"}, ""),
    "bfloat16": (1, {"dtype": "bfloat16"}, ""),
}


@pytest.fixture(scope="module", params=PROGRAMS.values(), ids=PROGRAMS)
def program(request):
    """The decode loop as XLA runs it, its arguments, the number of rows, the dtype that matrices are stored in."""
    n_rows, options, kernels = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_GPT2_KERNELS", kernels)
        return compile_loop(n_rows, options)


def compile_loop(n_rows, options):
    model = GPT2Model(CONFIG, **options)
    model.set_weights(lively_params(CONFIG))
    sampling = make_sampling(n_rows, CONFIG, temperature=1.0, top_k=5, top_p=0.9, seed=0)
    limits = make_limits([np.ones(4)] * n_rows, 36, (), CONFIG)
    ids, lengths = tf.ones((n_rows, 16), tf.int32), tf.fill([n_rows], 4)
    state = grow(compiled(prefill, model, jit_compile=False)(ids, lengths), N_SLOTS)
    bound = compiled(decode, model, jit_compile=True, n_rows=n_rows)
    arguments = *bound.args, state, sampling, limits, tf.constant(9)
    text = bound.func.function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    return text, tf.nest.flatten(arguments), n_rows, model.blocks[0].mlp.c_fc.w.dtype


def test_the_loop_copies_no_cache(program):
    text, _, n_rows, _ = program
    cache = (n_rows * CONFIG.n_head, N_SLOTS, CONFIG.n_embd // CONFIG.n_head)
    body = loop_body(text)
    updates = [name for name, _, shape, _ in body if shape == cache and "scatter" in name]
    assert len(updates) == 2 * CONFIG.n_layer
    assert made_anew(body, [cache]) == []


def test_the_loop_copies_no_weight(program):
    text, _, n_rows, stored = program
    body = loop_body(text)
    shapes = {shape for _, _, shape, _ in body}
    kept = [(200, 64), (192, 32), (64, 32), (256, 32), (64, 128)] if stored == "uint8" else WEIGHTS
    assert all(weight in shapes or weight[::-1] in shapes for weight in kept)
    # one matrix at a time, in memory that the next one takes over; 4-bit ones where there are no kernels
    widens = (stored == "int8" and n_rows > 8) or (stored == "uint8" and not kernels.are_chosen())
    assert widens or made_anew(body, FORMS) == []
    # and the loop is given no wider copy of them, made before it
    given = [(shape, dtype) for _, dtype, shape, operation in body if operation == "get-tuple-element"]
    wide = {shape for shape, dtype in given if shape in FORMS and dtype == "f32"}
    assert stored == "float32" or wide <= {(72, 64)}  # with int8, the positions stay float32


def test_every_argument_is_data(program):
    """A tensor that the program needs as a constant would be no parameter of it, and each value would compile anew."""
    text, arguments, *_ = program
    n_parameters = len(re.findall(r"^ENTRY .*?^}", text, re.S | re.M)[0].split(" parameter(")) - 1
    assert n_parameters == len(
        [part for part in arguments if part is not None and 0 not in part.shape]
    )  # XLA drops what is empty


def optimized(function, *arguments):
    return tf.function(function, jit_compile=True).experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")


def test_the_check_sees_a_copied_cache():
    """Attends first and writes after, as the loop must not."""

    def attend_then_write(keys, query):
        def body(step, keys, query):
            scores = tf.linalg.matvec(keys, query)
            slots = tf.stack([tf.range(4), tf.repeat(step, 4)], axis=1)
            return step + 1, tf.tensor_scatter_nd_update(keys, slots, query), query + scores[:, :32]

        return tf.while_loop(lambda step, *_: step < 40, body, (tf.constant(0), keys, query))

    text = optimized(attend_then_write, numbers(4, 48, 32), numbers(4, 32))
    assert made_anew(loop_body(text), [(4, 48, 32)])


def test_the_check_sees_a_copied_weight():
    def turn_at_each_step(weight, x):
        def body(step, x):
            return step + 1, tf.matmul(x, tf.roll(weight, step, axis=0))

        return tf.while_loop(lambda step, _: step < 40, body, (tf.constant(0), x))

    assert made_anew(loop_body(optimized(turn_at_each_step, numbers(64, 64), numbers(2, 64))), [(64, 64)])
