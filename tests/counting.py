"""How often functions were compiled, for the tests that bound it."""

from tf_gpt2.generation.compiled import compiled_for
from tf_gpt2.generation.loop import decode, prefill
from tf_gpt2.model.arithmetic import graph, xla


def count_traces(model, *functions, jit_compile=False):
    """How many shapes were met by all models like this one: of prefill and decode, or of other functions."""
    ops = xla if jit_compile else graph
    functions = functions or (prefill, decode)
    return sum(compiled_for(function, model.config, model.compute_dtype, ops).n_traces for function in functions)
