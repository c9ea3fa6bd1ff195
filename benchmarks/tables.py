"""Prints a comparison of engines as tables."""

from __future__ import annotations

from typing import Any

from benchmarks.engines import ENGINES, REFERENCE, is_ours
from benchmarks.summary import Result

PREFILLS = ("prefill_512", "prefill_1000")


def print_result(result: Result) -> None:
    """Prints the table of engines, the first differing ids, our times at two positions, and the goals."""
    settings, summary = result["settings"], result["summary"]
    print(f"\n{settings['size']} shapes, {settings['threads']} threads, {settings['pages']} pages, medians")
    print("                      tokens/s     × our      of  batch 8   seconds to the first token    start +  peak")
    print("                        decode   float32 ceiling tokens/s   of 512  of 1000  first call, s    GB")
    engines = [engine for engine in ENGINES if engine in result["engines"]]
    for engine in sorted(engines, key=lambda e: -summary["tokens_per_s"].get("decode", {}).get(e, 0)):
        print(f"{engine:20}", *table_row(result, engine))
    for pages, rate in summary["ceilings_tokens_per_s"].items():
        print(f"{f'ceiling, {pages} pages':20} {rate:9.1f}   (float32 weights read once per token)")
    print(f"products {result['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s, on all cores")
    for engine, reason in result["skipped"].items():
        print(f"{engine}: skipped, {reason}")
    print_partings(result)
    if result["n_disturbed"]:
        print(f"other programs disturbed {result['n_disturbed']} of {result['n_rounds']} rounds: run again in quiet")
    print_ours(result)
    print(f"\ngoals, on {result['machine']['cpu']} ({result['machine']['kind']})")
    for goal in result["goals"]:
        word = {True: "reached", False: f"missed on {goal['kind']}", None: "not measured"}[goal["reached"]]
        measured = "" if goal["measured"] is None else f"{goal['measured']:.2f}"
        print(f"  {goal['goal']:66} {measured:>6}  {word}")


def table_row(result: Result, engine: str) -> list[str]:
    """Returns the cells of an engine's row."""
    summary, facts = result["summary"], result["engines"][engine]
    rates = {job: rates.get(engine) for job, rates in summary["tokens_per_s"].items()}
    ratio = relative_to_reference(summary, engine)
    return [
        cell(rates.get("decode"), "9.1f"),
        cell(ratio, "9.2f"),
        cell(summary["share_of_ceiling"].get(engine), "7.0%"),
        cell(rates.get("batch"), "8.1f"),
        *(cell(summary["seconds"].get(job, {}).get(engine), "8.2f") for job in PREFILLS),
        f"{facts['ready_s']:7.1f} + {facts['first_call_s']:4.1f}",
        cell(facts["peak_bytes"] / 1e9, "6.2f"),
    ]


def relative_to_reference(summary: dict[str, Any], engine: str) -> float | None:
    """Returns an engine's decoding speed over that of ours in float32."""
    if is_ours(engine):
        rates = summary["tokens_per_s"].get("decode", {})
        return rates[engine] / rates[REFERENCE] if engine in rates else None
    found = summary["ratios"].get("decode", {}).get(REFERENCE, {}).get(engine)
    return 1 / found if found else None


def cell(value: float | None, form: str) -> str:
    return format("-", f">{form.split('.')[0]}") if value is None else format(value, form)


def print_partings(result: Result) -> None:
    """Describes where an engine's greedy ids differ from ours in float32."""
    print(
        "\ngreedy ids beside our float32's: row and new token where they first part, and how far apart our logits are"
    )
    partings: dict[str, list[str]] = {}
    for group in result["groups"]:
        for job, measured in group["jobs"].items():
            for engine, parting in measured["parting"].items():
                where = parting and f"{job} {parting['row']}:{parting['new_token']} ({parting['logit_gap']:.2g})"
                partings.setdefault(engine, []).append(where or "")
    for engine, places in partings.items():
        print(f"  {engine:20} {', '.join(filter(None, places)) or 'agree'}")


def print_ours(result: Result) -> None:
    """Describes the figures that only ours has: a second process, and the time per token at two positions."""
    for engine, facts in result["engines"].items():
        if "warm" in facts:
            warm = facts["warm"]
            print(f"{engine}, second process: {warm['ready_s']:.1f} + {warm['first_call_s']:.1f} s", end="")
            times = [
                1e3 / rates[engine]
                for job, rates in result["summary"]["tokens_per_s"].items()
                if job.startswith("position") and engine in rates
            ]
            print(f"; ms per token near and far: {', '.join(f'{ms:.1f}' for ms in times)}" if times else "")
