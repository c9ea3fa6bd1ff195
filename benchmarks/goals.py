"""Compares the project's goals with the measured figures."""

from __future__ import annotations

from typing import Any

from benchmarks.engines import precision_of
from benchmarks.summary import Result, ratio, speed_far

FLOAT32, INT8 = "tf_gpt2:float32", "tf_gpt2:int8"


def check_goals(result: Result) -> list[dict[str, Any]]:
    """Returns ``goal``, ``measured``, ``reached`` and ``command`` of each goal.

    ``measured`` and ``reached`` are ``None`` where a peer is missing. ``command`` is the part after
    ``python -m benchmarks.`` of the command that measures that goal alone.
    """
    return [*decode_goals(result), *batch_goals(result), *prefill_goals(result), *own_goals(result)]


def decode_goals(result: Result) -> list[dict[str, Any]]:
    ratios = result["summary"]["ratios"].get("decode", {})
    float32, int8 = ratios.get(FLOAT32, {}), ratios.get(INT8, {})
    int8_peers = [value for peer, value in int8.items() if precision_of(peer) == "int8"]
    to_ceiling = result["summary"]["share_of_ceiling"].get(FLOAT32)

    def to_peer(bound: float, goal: str, ratios: dict[str, float], peer: str, *others: str) -> dict[str, Any]:
        return at_least(bound, f"decode: {goal}", ratios.get(peer), compare("decode", peer, *others))

    return [
        to_peer(1.05, "float32 to CTranslate2 float32", float32, "ctranslate2:float32"),
        to_peer(2, "float32 to KerasHub", float32, "keras_hub:float32"),
        to_peer(2, "float32 to Hugging Face", float32, "huggingface:float32"),
        at_least(0.73, "decode: float32 to the ceiling", to_ceiling, compare("decode", FLOAT32)),
        to_peer(1.2, "int8 to llama.cpp Q8_0", int8, "llama_cpp:q8_0", INT8),
        to_peer(1.05, "int8 to llama.cpp Q4_0", int8, "llama_cpp:q4_0", INT8),
        at_least(
            1.5,
            "decode: int8 to the best of the other int8 peers",
            min(int8_peers, default=None),
            compare("decode", "*:int8"),
        ),
    ]


def batch_goals(result: Result) -> list[dict[str, Any]]:
    peers = result["summary"]["ratios"].get("batch", {}).get(FLOAT32, {})
    best = min(peers.values(), default=None)
    return [
        at_least(1.05, "batch 8: float32 to the best peer in any precision", best, compare("batch", "*")),
        at_least(0.75, "batch 8: int8 to our float32", between_ours(result, "batch"), compare("batch", INT8)),
    ]


def prefill_goals(result: Result) -> list[dict[str, Any]]:
    # the ratios are of speeds, these goals of times
    peers = result["summary"]["ratios"].get("prefill_512", {}).get(FLOAT32, {})
    best = max((1 / value for value in peers.values()), default=None)
    int8 = between_ours(result, "prefill_512")
    return [
        at_most(1.05, "prefill 512: float32's time to the best peer's", best, compare("prefill_512", "*")),
        at_most(1.1, "prefill 512: int8's time to our float32's", int8 and 1 / int8, compare("prefill_512", INT8)),
    ]


def own_goals(result: Result) -> list[dict[str, Any]]:
    facts = {engine: result["engines"].get(engine, {}) for engine in (FLOAT32, INT8)}
    bound_gb = (1.3 * result["weight_bytes"] + 0.5e9) / 1e9
    peak_gb = {engine: one["peak_bytes"] / 1e9 for engine, one in facts.items() if one}
    int8_peak = peak_gb[INT8] / peak_gb[FLOAT32] if len(peak_gb) == len(facts) else None
    positions, both = compare("position_50 position_1000", INT8), compare("decode", INT8)
    goals = [
        at_most(1.25, "position 1000 to 50: float32's time per token", time_far(result, FLOAT32), positions),
        at_most(1.5, "position 1000 to 50: int8's time per token", time_far(result, INT8), positions),
        at_most(bound_gb, "peak memory: float32, GB", peak_gb.get(FLOAT32), both),
        at_most(0.5, "peak memory: int8 to our float32", int8_peak, both),
    ]
    for engine, one in facts.items():
        name, warm = precision_of(engine), one.get("warm", {})
        goals.append(at_most(8, f"first call: {name}, nothing compiled before, s", one.get("first_call_s"), both))
        goals.append(at_most(3, f"first call: {name}, in a second process, s", warm.get("first_call_s"), both))
    return goals


def compare(jobs: str, *engines: str) -> str:
    """Returns the command that does some jobs with ours in float32 and other engines."""
    names = " ".join(f"'{engine}'" if "*" in engine else engine for engine in engines)
    return f"compare --jobs {jobs} --engines {names}"


def between_ours(result: Result, job: str) -> float | None:
    """Returns the speed of int8 as a multiple of that of float32."""
    rates = result["summary"]["tokens_per_s"].get(job, {})
    return ratio(result, job, INT8, FLOAT32) if {INT8, FLOAT32} <= rates.keys() else None


def time_far(result: Result, engine: str) -> float | None:
    """Returns the time per token at position 1000 over that at 50."""
    speed = speed_far(result, engine)
    return speed and 1 / speed


def at_least(bound: float, goal: str, measured: float | None, command: str) -> dict[str, Any]:
    reached = None if measured is None else measured >= bound
    return {"goal": f"{goal} ≥ {bound:.3g}", "measured": measured, "reached": reached, "command": command}


def at_most(bound: float, goal: str, measured: float | None, command: str) -> dict[str, Any]:
    reached = None if measured is None else measured <= bound
    return {"goal": f"{goal} ≤ {bound:.3g}", "measured": measured, "reached": reached, "command": command}
