"""Compares the project's goals with the measured figures."""

from __future__ import annotations

from typing import Any

from benchmarks.engines import ANCHORS, precision_of
from benchmarks.summary import Result, speed_far

FLOAT32, INT8, INT4 = ANCHORS
FLOAT32_NAMES = ("float32", "f32")


def check_goals(result: Result) -> list[dict[str, Any]]:
    """Returns ``goal``, ``kind``, ``measured``, ``reached`` and ``command`` of each goal.

    ``kind`` is the processor's. ``measured`` and ``reached`` are ``None`` where a peer is missing. ``command`` is the
    part after ``python -m benchmarks.`` of the command that measures that goal alone.
    """
    goals = [*decode_goals(result), *batch_goals(result), *prefill_goals(result), *own_goals(result)]
    return [{"kind": result["machine"]["kind"], **goal} for goal in goals]


def decode_goals(result: Result) -> list[dict[str, Any]]:
    ratios, own_shares = result["summary"]["ratios"].get("decode", {}), result["summary"]["share_of_own_ceiling"]

    def to_peer(bound: float, goal: str, ours: str, peer: str) -> dict[str, Any]:
        measured = ratios.get(ours, {}).get(peer)
        return at_least(bound, f"decode: {goal}", measured, compare("decode", ours, peer))

    return [
        to_peer(1.1, "int8 to llama.cpp Q8_0", INT8, "llama_cpp:q8_0"),
        at_least(0.85, "decode: int8 to the ceiling of its own bytes", own_shares.get(INT8), compare("decode", INT8)),
        to_peer(1, "int4 to llama.cpp Q4_0", INT4, "llama_cpp:q4_0"),
        to_peer(1.05, "float32 to CTranslate2 float32", FLOAT32, "ctranslate2:float32"),
        to_peer(1.05, "float32 to OpenVINO float32", FLOAT32, "openvino:float32"),
    ]


def batch_goals(result: Result) -> list[dict[str, Any]]:
    ratios = result["summary"]["ratios"].get("batch", {})
    best = best_to_best(ratios)
    return [at_least(1.1, "batch 8: best of ours to the best peer in any precision", best, compare("batch", "*"))]


def prefill_goals(result: Result) -> list[dict[str, Any]]:
    # the ratios are of speeds, these goals of times
    ratios = result["summary"]["ratios"].get("prefill_512", {})
    float32 = {peer: value for peer, value in ratios.get(FLOAT32, {}).items() if precision_of(peer) in FLOAT32_NAMES}
    best, best_float32 = best_to_best(ratios), best_to_best({FLOAT32: float32})
    name, command = "prefill 512: time of {} to that of the best {}", compare("prefill_512", "*")
    return [
        at_most(1, name.format("best of ours", "peer"), best and 1 / best, command),
        at_most(1, name.format("float32", "float32 peer"), best_float32 and 1 / best_float32, command),
    ]


def own_goals(result: Result) -> list[dict[str, Any]]:
    peaks = {engine: result["engines"].get(engine, {}).get("peak_bytes") for engine in (FLOAT32, INT8)}
    peak = peaks[INT8] / peaks[FLOAT32] if all(peaks.values()) else None
    speed = speed_far(result, INT8)
    positions = compare("position_50 position_1000", INT8)
    return [
        at_most(1.25, "position 1000 to 50: int8's time per token", speed and 1 / speed, positions),
        at_most(0.5, "peak memory: int8 to our float32", peak, compare("decode", INT8)),
    ]


def best_to_best(ratios: dict[str, dict[str, float]]) -> float | None:
    """Returns the largest of our engines' ratios, each to the peer that is hardest for it; only if it met all peers."""
    peers = {peer for of_ours in ratios.values() for peer in of_ours}
    worst = [min(of_ours.values()) for of_ours in ratios.values() if peers and of_ours.keys() == peers]
    return max(worst, default=None)


def compare(jobs: str, *engines: str) -> str:
    """Returns the command that does some jobs with ours in float32 and other engines."""
    names = " ".join(f"'{engine}'" if "*" in engine else engine for engine in engines)
    return f"compare --jobs {jobs} --engines {names}"


def at_least(bound: float, goal: str, measured: float | None, command: str) -> dict[str, Any]:
    reached = None if measured is None else measured >= bound
    return {"goal": f"{goal} ≥ {bound:.3g}", "measured": measured, "reached": reached, "command": command}


def at_most(bound: float, goal: str, measured: float | None, command: str) -> dict[str, Any]:
    reached = None if measured is None else measured <= bound
    return {"goal": f"{goal} ≤ {bound:.3g}", "measured": measured, "reached": reached, "command": command}
