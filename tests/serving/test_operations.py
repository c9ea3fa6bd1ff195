"""What of TensorFlow an exported graph needs: no XLA in plain signatures, and nothing that older servers lack."""

import json
from pathlib import Path

import pytest
from loader import read_meta_graph, read_signatures

STORED = Path(__file__).with_name("operations.json")
"""Each operation with its attributes; TensorFlow 2.12 has them all, and so reads them."""
OLDEST_GRAPH_VERSION = 1395
"""Of TensorFlow 2.12. Source: ``tf.version.GRAPH_DEF_VERSION`` there."""
PLAIN = ["serving_default", "generate", "generate_ids", "next", "score", "embed", "logits", "encode", "decode"]
COMPILED = [
    "serving_default_xla",
    "generate_xla",
    "generate_ids_xla",
    "next_xla",
    "score_xla",
    "embed_xla",
    "logits_xla",
]


@pytest.fixture(scope="module")
def meta_graph(exported):
    return read_meta_graph(exported)


def reachable(graph, outputs):
    """Gives the nodes that outputs depend on, those inside functions too, and the functions."""
    library = {function.signature.name: function for function in graph.library.function}
    nodes = {node.name: node for node in graph.node}
    names, found, called = list(outputs), {}, {}
    while names:
        name = names.pop().lstrip("^").partition(":")[0]
        if name not in found:
            found[name] = nodes[name]
            names += nodes[name].input
    waiting = list(found.values())
    every = []
    while waiting:
        node = waiting.pop()
        every.append(node)
        for name in functions_of(node, library) - called.keys():
            called[name] = library[name]
            waiting += library[name].node_def
    return every, list(called.values())


def functions_of(node, library):
    values = node.attr.values()
    named = [value.func.name for value in values] + [one.name for value in values for one in value.list.func]
    return {name for name in (*named, node.op) if name in library}


def xla_in(meta_graph, signature):
    """Gives what of XLA a signature can reach."""
    outputs = [info.name for info in meta_graph.signature_def[signature].outputs.values()]
    nodes, functions = reachable(meta_graph.graph_def, outputs)
    assert len(nodes) > 100
    assert functions
    compiled = [one.attr["_XlaMustCompile"].b for one in (*nodes, *functions) if "_XlaMustCompile" in one.attr]
    return {node.op for node in nodes if node.op.lstrip("_").startswith("Xla")} | {flag for flag in compiled if flag}


def operations(meta_graph):
    """Gives the attributes that are set, by operation, in the graph and its functions; not those for the run time."""
    graph = meta_graph.graph_def
    found = {}
    for node in (*graph.node, *(node for function in graph.library.function for node in function.node_def)):
        found.setdefault(node.op, set()).update(name for name in node.attr if not name.startswith("_"))
    return {name: sorted(attributes) for name, attributes in sorted(found.items())}


def test_these_are_all_signatures(exported):
    assert sorted(read_signatures(exported)) == sorted(PLAIN + COMPILED)


@pytest.mark.parametrize("signature", PLAIN)
def test_a_plain_signature_holds_nothing_of_xla(meta_graph, signature):
    assert xla_in(meta_graph, signature) == set()


@pytest.mark.parametrize("signature", COMPILED)
def test_a_twin_is_compiled(meta_graph, signature):
    assert xla_in(meta_graph, signature) == {True}


def test_a_twin_decodes_one_row_by_products_of_its_own(meta_graph, generator):
    """They take each matrix in halves; a shape that gets lost on the way loses them, and half the speed."""
    outputs = [info.name for info in meta_graph.signature_def["generate_ids_xla"].outputs.values()]
    _, functions = reachable(meta_graph.graph_def, outputs)
    by_name = {function.signature.name: function for function in functions}

    def count_products(function):
        called = [by_name[node.attr["f"].func.name] for node in function.node_def if "PartitionedCall" in node.op]
        return sum(node.op == "MatMul" for node in function.node_def) + sum(map(count_products, called))

    n_matrices = 4 * generator.model.config.n_layer + 1
    loops = [count_products(function) for name, function in by_name.items() if "while_body" in name]
    assert {n for n in loops if n} == {n_matrices, 2 * n_matrices}


def test_no_operation_is_newer_than_the_oldest_server(meta_graph):
    """A new one may be too new: try 'tests/peers/test_old_tensorflow.py', then add it to the file."""
    found, stored = operations(meta_graph), json.loads(STORED.read_text(encoding="utf-8"))
    new = {name: sorted(set(found[name]) - set(stored.get(name, ()))) for name in found}
    assert {name: attributes for name, attributes in new.items() if attributes or name not in stored} == {}


def test_the_oldest_server_may_read_the_graph(meta_graph):
    versions = meta_graph.graph_def.versions
    assert versions.min_consumer <= OLDEST_GRAPH_VERSION
    assert OLDEST_GRAPH_VERSION not in versions.bad_consumers
    assert meta_graph.meta_info_def.stripped_default_attrs  # else attributes that are newer stand everywhere
