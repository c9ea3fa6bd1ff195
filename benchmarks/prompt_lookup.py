"""Measures how much faster prompt look-up makes text where it helps, and how much slower where it does not.

Only ours runs, with random weights of a size's shapes or the embedded checkpoint. Ids are compared first.
Runs with and without look-up take turns in each repetition, and the ratio is taken within one. The cases:

- cycle: greedy text that repeats a cycle, as long texts of small models do;
- greedy: the embedded checkpoint's likeliest text;
- drawn: text at temperature 1, which hardly repeats itself;
- traps: four random ids, so that there is always a draft, and mostly a wrong one.

    python -m benchmarks.prompt_lookup
    python -m benchmarks.prompt_lookup --sizes tiny --repetitions 5

A row of ``four rows`` is the time of a step for four texts over that for one: checking a draft takes about as much.
With 8-bit weights it is too much without native kernels, so there look-up is for float32 only.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import start_report, store
from benchmarks.rounds import busy_s
from tf_gpt2 import GPT2Model, TextGenerator
from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.checkpoint.params import random_params
from tf_gpt2.config import SIZES
from tf_gpt2.generation.generate import generate
from tf_gpt2.generation.lookup import LookupRun
from tf_gpt2.generation.options import check_prompts, make_request, pad
from tf_gpt2.runtime import kernels
from tf_gpt2.text.generator import DTYPES

RESULTS = Path(__file__).parent / "results" / "prompt_lookup.json"
PROMPT = "To be, or not to be: that is the question:\n"
BATCHES = (1, 4)
CYCLE = "O, no, no, no, no, no, no, no, no, no, no, no, no, no, no, no"
N_TRAPS = 4
INTEGERS = ("int8",)


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        **start_report("prompt_lookup", arguments, "sizes", "n_tokens", "repetitions"),
        "pages": os.environ.get("GLIBC_TUNABLES", "default"),
        "four_rows": [],
        "cases": [],
    }
    for size in arguments.sizes:
        for dtype in ("float32", *INTEGERS):
            model = load(size, dtype)
            result["four_rows"].append({"size": size, "dtype": dtype, **measure_rows(model, arguments)})
            print("{size:5} {dtype:8} four rows cost {ratio:.2f} rows".format(**result["four_rows"][-1]), flush=True)
            if dtype in INTEGERS and not kernels.are_chosen():
                continue  # look-up is refused
            for name, (prompt, options) in cases(size, model).items():
                for batch in BATCHES:
                    case = measure(model, [prompt] * batch, options, arguments)
                    result["cases"].append({"size": size, "dtype": dtype, "case": name, "batch": batch, **case})
                    print_case(result["cases"][-1])
    store(result, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=("tiny", *SIZES), default=["tiny", "124M"], help="which models")
    parser.add_argument("--n_tokens", type=int, default=200, help="new tokens per text")
    parser.add_argument("--repetitions", type=int, default=7, help="of each way, after the first")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def load(size: str, dtype: str) -> GPT2Model:
    if size == "tiny":
        return TextGenerator.from_checkpoint(embedded_dir(), dtype=dtype).model
    model = GPT2Model(SIZES[size], **DTYPES[dtype])
    model.set_weights(random_params(SIZES[size]))
    return model


def cases(size: str, model: GPT2Model) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """Returns each case's prompt and options."""
    n_vocab, rng = model.config.n_vocab, np.random.default_rng(0)
    prompt, cycle = rng.integers(0, n_vocab, 16).tolist(), list(range(6)) * 5
    if size == "tiny":
        encode = TextGenerator.from_checkpoint(embedded_dir()).encode_prompt
        prompt, cycle = encode(PROMPT), encode(CYCLE)
    allowed = rng.integers(0, n_vocab, N_TRAPS).tolist()
    banned = {i: -float("inf") for i in range(n_vocab) if i not in allowed}
    found = {
        "cycle": (cycle, {}),
        "greedy": (prompt, {}),
        "drawn": (prompt, {"temperature": 1.0}),
        "traps": (prompt, {"temperature": 10.0, "logit_bias": banned}),
    }
    return found if size == "tiny" else {name: case for name, case in found.items() if name != "greedy"}


def measure_rows(model: GPT2Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times a step for four texts and for one."""
    n_tokens = min(arguments.n_tokens, 24)
    times: dict[int, list[float]] = {1: [], 4: []}
    for repetition in range(arguments.repetitions + 1):
        for batch, seconds in times.items():
            timings = generate(model, [[1, 2, 3]] * batch, max_new_tokens=n_tokens).timings
            if repetition:  # the first one compiles
                seconds.append(timings.decode_s / n_tokens)
    ratio = median(four / one for one, four in zip(times[1], times[4], strict=True))
    return {"ratio": ratio, "step_s": times}


def measure(
    model: GPT2Model, prompts: list[list[int]], options: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compares the ids, and times decoding both ways in turn."""
    asked: dict[str, Any] = {"max_new_tokens": arguments.n_tokens, **options}
    seconds: dict[str, list[float]] = {"plain": [], "lookup": []}
    plain, found = (generate(model, prompts, prompt_lookup=way == "lookup", **asked) for way in seconds)
    if plain.ids != found.ids:
        raise SystemExit("look-up gives other ids: there is nothing to time")
    start_s, busy, own = time.perf_counter(), busy_s(), time.process_time()
    for _ in range(arguments.repetitions):
        for way, times in seconds.items():
            times.append(generate(model, prompts, prompt_lookup=way == "lookup", **asked).timings.decode_s)
    available_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
    others_share = max(0.0, busy_s() - busy - (time.process_time() - own)) / available_s
    return {
        "n_tokens": max(map(len, plain.ids)),
        "n_passes": count_passes(model, prompts, asked),
        "ratio": median(one / other for one, other in zip(*seconds.values(), strict=True)),
        "decode_s": seconds,
        "others_share": others_share,
    }


def count_passes(model: GPT2Model, prompts: list[list[int]], asked: dict[str, Any]) -> int:
    """Counts passes with look-up, prefill included, and without the check that the model is large enough."""
    rows = check_prompts(prompts, model.config)
    request = make_request(model, len(rows), **asked)
    sampling, limits = request.sampling_of(len(rows)), request.limits_of(rows, model.config)
    run = LookupRun(model, *pad(rows, model.config), sampling, limits, jit_compile=True)
    while run.goes_on:
        run.advance(model.config.n_ctx)
    return 1 + run.n_passes


def print_case(case: dict[str, Any]) -> None:
    plain, found = (case["n_tokens"] * case["batch"] / median(case["decode_s"][way]) for way in ("plain", "lookup"))
    print(
        f"{case['size']:5} {case['dtype']:8} {case['case']:7} batch {case['batch']}  "
        f"{plain:8.1f} -> {found:8.1f} tokens/s, "
        f"{case['ratio']:5.2f} x; {case['n_passes']} passes for {case['n_tokens']} tokens; "
        f"others took {case['others_share']:.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
