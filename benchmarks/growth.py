"""Measures how the time of a step grows with the batch, the context and the model, and which parts take it.

Only ours runs, greedily, with random weights. All variants of one model are compiled first and then timed in turn, so
that other work of the machine slows all of them alike. A part of a step is measured by leaving it out: its time is that
of the whole less that without the part.

    python -m benchmarks.growth
    python -m benchmarks.growth --sizes 124M --dtypes int8 --repetitions 3
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf

from benchmarks.ceiling import bytes_per_token
from benchmarks.report import start_report, store
from tf_gpt2 import GPT2Model
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.config import SIZES, GPT2Config
from tf_gpt2.generation.compiled import compiled, compiled_for
from tf_gpt2.generation.loop import bucket, decode, grow, prefill
from tf_gpt2.generation.options import make_request, pad
from tf_gpt2.model import formulas
from tf_gpt2.model.arithmetic import xla
from tf_gpt2.model.formulas import KeyValues, Past, Weights
from tf_gpt2.text.generator import DTYPES

RESULTS = Path(__file__).parent / "results" / "growth.json"
SHAPES = {"30M": GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=384, n_head=6, n_layer=6), **SIZES}
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 128, 256, 512, 1024)
PROMPT = 32
STEPS = 24

Timed = Callable[[], float]
"""Runs some steps and returns the seconds of one."""


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        **start_report("growth", arguments, "sizes", "dtypes", "repetitions"),
        "pages": os.environ.get("GLIBC_TUNABLES", "default"),
        "step_s": [],
    }
    for size in arguments.sizes:
        params = random_params(SHAPES[size])
        for dtype in arguments.dtypes:
            model = GPT2Model(SHAPES[size], **DTYPES[dtype])
            model.set_weights(params)
            facts = {"size": size, "dtype": dtype, "weight_bytes": bytes_per_token(SHAPES[size])}
            timed = {"size": {"size": timed_steps(model, 1, 2 * PROMPT)}}
            if size == "124M":
                timed |= {
                    "batch": {batch: timed_steps(model, batch, 2 * PROMPT) for batch in BATCHES},
                    "context": {context: timed_steps(model, 1, context) for context in CONTEXTS},
                    "without": {part: timed_steps(model, 1, 8 * PROMPT, part) for part in PARTS},
                }
            for question, variants in timed.items():
                times = measure(variants, arguments.repetitions)
                result["step_s"] += [facts | {"question": question, "at": at, "times": s} for at, s in times.items()]
                print_times(f"{size} {dtype}, {question}", times)
    store(result, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["30M", "124M", "355M"], help="whose shapes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "int8"], help="of the weights")
    parser.add_argument("--repetitions", type=int, default=5, help="of each variant, after the first")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def timed_steps(model: GPT2Model, batch: int, context: int, part: str = "nothing") -> Timed:
    """Compiles steps that end at ``context`` tokens, with a part left out; gives what times them."""
    rows = [np.arange(context - STEPS, dtype=np.int32) % model.config.n_vocab] * batch
    request = make_request(model, batch, max_new_tokens=STEPS)
    sampling, limits = request.sampling_of(batch), request.limits_of(rows, model.config)
    state = compiled(prefill, model, jit_compile=True)(*pad(rows, model.config))
    state = grow(state, bucket(context, model.config.n_ctx))
    with PARTS[part]():
        compiled_for.cache_clear()  # what was compiled for the other parts stays with those that time it
        go_on = compiled(decode, model, jit_compile=True, n_rows=batch)
        go_on(state, sampling, limits, tf.constant(1))

    def run() -> float:
        start = time.perf_counter()
        go_on(state, sampling, limits, tf.constant(STEPS)).lengths.numpy()
        return (time.perf_counter() - start) / (STEPS - 1)

    return run


def without_products() -> contextlib.AbstractContextManager[Any]:
    """Takes products for copies of the input's first number."""

    def cheap(x: tf.Tensor, w: Any) -> tf.Tensor:
        return tf.repeat(x[..., :1], w.value.shape[0], axis=-1)

    return mock.patch.object(xla, "product", cheap)


def without_attention() -> contextlib.AbstractContextManager[Any]:
    """Takes attention for the sum of query, key and value, which leaves the cache alone."""

    def attention(
        x: tf.Tensor, w: Weights, past: Past | None, divisor: Any = None, *, n_head: int, ops: Any
    ) -> tuple[tf.Tensor, KeyValues]:
        q, k, v = tf.split(formulas.linear(x, w["c_attn"], ops=ops), 3, axis=-1)
        return formulas.linear(q + k + v, w["c_proj"], ops=ops), KeyValues(past.keys, past.values)

    return mock.patch.object(formulas, "attention", attention)


def without_choosing() -> contextlib.AbstractContextManager[Any]:
    """Takes the first logit for the next id."""

    def choose(logits: tf.Tensor, *_: Any) -> tf.Tensor:
        return tf.cast(tf.clip_by_value(logits[:, 0], 0, 1), tf.int32)

    return mock.patch("tf_gpt2.generation.loop.choose", choose)


PARTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "products": without_products,
    "attention": without_attention,
    "choosing": without_choosing,
}


def measure(variants: dict[Any, Timed], n_repetitions: int) -> dict[Any, list[float]]:
    """Times all variants in turn, again and again; gives each one's seconds per step."""
    times: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(n_repetitions):
        for name, run in variants.items():
            times[name].append(run())
    return times


def print_times(title: str, times: dict[Any, list[float]]) -> None:
    print(title)
    first = median(next(iter(times.values())))
    for name, seconds in times.items():
        print(f"  {name!s:>10}  {median(seconds) * 1e3:8.2f} ms a step  {median(seconds) / first:6.2f}")


if __name__ == "__main__":
    main()
