"""Graphs that run in one thread give what they give otherwise."""

import numpy as np
import pytest
import tensorflow as tf

from tf_gpt2.model.one_thread import EXECUTOR, in_one_thread, on_processor


def test_it_gives_what_the_function_gives():
    """In the same structure, with what the function has captured, and with shapes as far as they are known."""
    outside = tf.Variable([10.0, 20.0])

    def function(x, pair):
        return {"sum": x + outside, "pair": (pair[0] * 2, tf.reduce_sum(pair[1]))}

    @tf.function(input_signature=[tf.TensorSpec([None, 2]), (tf.TensorSpec([], tf.int32), tf.TensorSpec([3]))])
    def run(x, pair):
        found = in_one_thread(function, x, pair)
        assert found["sum"].shape.as_list() == [None, 2]
        return found

    found = run(tf.constant([[1.0, 2.0], [3.0, 4.0]]), (tf.constant(7), tf.constant([1.0, 2.0, 3.0])))
    assert found["sum"].numpy().tolist() == [[11, 22], [13, 24]]
    assert [int(x) for x in found["pair"]] == [14, 6]
    outside.assign([0.0, 0.0])
    assert run(tf.ones((1, 2)), (tf.constant(7), tf.ones(3)))["sum"].numpy().tolist() == [[1, 1]]


@pytest.mark.parametrize("has_variable", [False, True])
def test_the_graph_says_how_it_is_to_be_run(has_variable):
    """A call without variables has no state, so that TensorFlow may run two beside each other."""
    variable = tf.Variable(1.0)

    @tf.function(input_signature=[tf.TensorSpec([])])
    def run(x):
        return in_one_thread(lambda x: x + (variable if has_variable else 1.0), x)

    calls = [op for op in run.get_concrete_function().graph.get_operations() if "PartitionedCall" in op.type]
    assert [op.type for op in calls] == ["StatefulPartitionedCall" if has_variable else "PartitionedCall"]
    assert calls[0].get_attr("executor_type") == EXECUTOR.encode()
    assert float(run(2.0)) == 3


def test_a_product_and_its_bias_stay_apart():
    """TensorFlow would make one operation of them, which turns the weight at each call."""
    w, b = (np.random.default_rng(i).normal(size=(40, 40)[i:]).astype(np.float32) for i in range(2))

    @tf.function(input_signature=[tf.TensorSpec([None, 40])])
    def run(x):
        return in_one_thread(lambda x: tf.matmul(x, w) + b, x)

    x = np.random.default_rng(2).normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_allclose(run(x), x @ w + b, rtol=1e-4, atol=1e-4)
    (call,) = [op for op in run.get_concrete_function().graph.get_operations() if "PartitionedCall" in op.type]
    settings = tf.compat.v1.ConfigProto.FromString(call.get_attr("config_proto"))
    assert settings.graph_options.rewrite_options.remapping == 2  # OFF


def test_it_knows_where_it_runs():
    assert bool(on_processor())
    assert bool(tf.function(on_processor)())
