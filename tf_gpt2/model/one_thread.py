"""Graphs whose nodes run one after the other in one thread: what many small operations are fastest as, outside of XLA.

TensorFlow's usual executor finds out after each node which others may run now, wakes threads for them, and hands what a
loop carries from node to node; where a node computes for a microsecond, that is most of the time. Another executor of
it runs a graph in an order that is fixed beforehand. Products inside still use all cores. It knows neither branches
nor loops, nor other devices, so all must be on the processor; and a function that is a node of its own would keep the
thread waiting for another one, of which many requests at a time leave none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_gpt2.model.loops import kept_apart

EXECUTOR = "SINGLE_THREADED_EXECUTOR"
"""Source: tensorflow, ``core/common_runtime/single_threaded_executor.cc``."""


def on_processor() -> tf.Tensor:
    """Says whether a graph runs on the processor, when it runs: bool ()."""
    return tf.raw_ops.DeviceIndex(device_names=["CPU"]) == 0


def in_one_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of tensors, in any structure, as a graph that runs in one thread."""
    graph = kept_apart(function).get_concrete_function(*tf.nest.map_structure(spec_of, args))
    outputs = run(graph, [*tf.nest.flatten(args), *graph.captured_inputs])
    return tf.nest.pack_sequence_as(graph.structured_outputs, outputs)


def spec_of(x: tf.Tensor) -> tf.TensorSpec:
    """Describes a tensor."""
    return tf.TensorSpec(x.shape, x.dtype)


def run(graph: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Runs a graph in one thread; takes all inputs, what it has captured as well."""
    specs = tf.nest.flatten(graph.structured_outputs)
    is_stateful = any(x.dtype == tf.resource for x in inputs)
    call = tf.raw_ops.StatefulPartitionedCall if is_stateful else tf.raw_ops.PartitionedCall
    outputs = call(
        args=inputs, Tout=[spec.dtype for spec in specs], f=graph, executor_type=EXECUTOR, config_proto=unfused()
    )
    return with_shapes(outputs, specs)


def unfused() -> bytes:
    """Gives settings by which TensorFlow leaves a product and its bias apart."""
    settings = tf.compat.v1.ConfigProto()
    settings.graph_options.rewrite_options.remapping = 2
    return settings.SerializeToString()


def with_shapes(tensors: Sequence[tf.Tensor], specs: Sequence[tf.TensorSpec]) -> list[tf.Tensor]:
    """Tells TensorFlow shapes that it does not find out from an operation."""
    for tensor, spec in zip(tensors, specs, strict=True):
        tensor.set_shape(spec.shape)
    return list(tensors)
