"""How often functions were compiled, for the tests that bound it."""

from tf_gpt2.generation.compiled import arithmetic, compiled_for
from tf_gpt2.generation.loop import decode, prefill


def count_traces(model, *functions, jit_compile=False):
    """How many shapes were met by all models like this one: of prefill and decode, or of other functions."""
    ops = arithmetic(jit_compile=jit_compile)
    functions = functions or (prefill, decode)
    return sum(compiled_for(function, model.config, model.compute_dtype, ops).n_traces for function in functions)
