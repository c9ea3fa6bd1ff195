"""What a plain loop does otherwise than a compiled one."""

import pytest
import tensorflow as tf

from tf_gpt2.model.loops import as_one_node, compiled_loop, plain_loop


def traced(loop):
    """A function with a branch of many operations, as the loop traces it."""

    def many(x):
        for _ in range(9):
            x = tf.sin(x)
        return x

    def choose(is_taken, x):
        with loop():
            return tf.cond(is_taken, as_one_node(lambda: many(x)), lambda: x)

    return tf.function(choose, autograph=False).get_concrete_function(
        tf.TensorSpec((), tf.bool), tf.TensorSpec((None,), tf.float32)
    )


def branch_of(function):
    """The operations of the branch that is taken, and whether what it calls may be inlined."""
    library = {one.signature.name: one for one in function.graph.as_graph_def().library.function}
    (node,) = [node for node in function.graph.as_graph_def().node if node.op in ("If", "StatelessIf")]
    nodes = library[node.attr["then_branch"].func.name].node_def
    called = [library[node.attr["f"].func.name] for node in nodes if node.op.endswith("PartitionedCall")]
    return [node.op for node in nodes if node.op != "Identity"], [one.attr["_noinline"].b for one in called]


def test_in_a_plain_loop_a_branch_is_one_node_that_is_not_inlined():
    operations, is_noinline = branch_of(traced(lambda: plain_loop([])))
    assert (len(operations), is_noinline) == (1, [True])


def test_xla_gets_the_branch_as_it_is():
    assert branch_of(traced(compiled_loop)) == (["Sin"] * 9, [])


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_branch_gives_the_same_as_one_node(is_taken):
    x = tf.constant([0.5, 2.0])
    wanted = traced(compiled_loop)(tf.constant(is_taken), x).numpy()
    assert traced(lambda: plain_loop([]))(tf.constant(is_taken), x).numpy().tolist() == wanted.tolist()
    assert (wanted != x.numpy()).all() == is_taken
