"""Computes figures from raw rounds: rates, ratios within rounds, shares of the ceiling, and losses of speed.

Works on the stored JSON alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.ceiling import PAGE_SIZES
from benchmarks.engines import ANCHORS, IN_ONE_ROUND, JOBS, REFERENCE, is_ours, precision_of
from benchmarks.processors import describe_processor
from benchmarks.report import fallen
from benchmarks.rounds import count_disturbed

Result = dict[str, Any]
"""The JSON that ``compare`` stores: ``groups``, each with ``jobs``, each with ``rounds``; ``bytes_per_token``."""
FIRST_CALL_MARGIN = 0.3


def summarize(result: Result) -> dict[str, Any]:
    """Computes the medians.

    Returns:
        ``tokens_per_s`` and ``seconds``, by job and engine; ``ratios``, by job, engine of ours and peer: our speed as a
        multiple of the peer's, where they ran in the same rounds; ``ceilings_tokens_per_s`` by size of pages;
        ``share_of_ceiling`` by engine: the speed of decoding over that of reading the float32 weights;
        ``share_of_own_ceiling`` by engine of ours: over that of reading the weights as they are kept.
    """
    found = [job for job in JOBS if any(job in group["jobs"] for group in result["groups"])]
    engines = {job: sorted({engine for one in rounds_of(result, job) for engine in one["replies"]}) for job in found}
    return {
        "tokens_per_s": {job: {e: median(rates(result, job, e)) for e in engines[job]} for job in found},
        "seconds": {job: {e: median(seconds(result, job, e)) for e in engines[job]} for job in found},
        "ratios": {
            job: {
                ours: {
                    peer: value
                    for peer in engines[job]
                    if not is_ours(peer) and not math.isnan(value := ratio(result, job, ours, peer))
                }
                for ours in engines[job]
                if is_ours(ours)
            }
            for job in found
            if not JOBS[job].ours_only
        },
        **summarize_ceiling(result, engines.get("decode", [])),
    }


def summarize_ceiling(result: Result, engines: list[str]) -> dict[str, Any]:
    bandwidths = [by_pages for one in rounds_of(result, "decode") for by_pages in one["ceilings"]]
    shares = {engine: share_of_ceiling(result, engine) for engine in engines}
    return {
        "ceilings_tokens_per_s": {
            pages: median([by_pages[pages] for by_pages in bandwidths]) / result["bytes_per_token"]
            for pages in PAGE_SIZES
        },
        "share_of_ceiling": shares,
        "share_of_own_ceiling": {
            engine: share * result["bytes_per_token_of"][precision_of(engine)] / result["bytes_per_token"]
            for engine, share in shares.items()
            if is_ours(engine)
        },
    }


def rounds_of(result: Result, job: str) -> Iterator[dict[str, Any]]:
    for group in result["groups"]:
        yield from group["jobs"].get(job, {"rounds": []})["rounds"]


def seconds(result: Result, job: str, engine: str) -> list[float]:
    """Returns, per round, the time that counts: to the first token, or of all the others."""
    part = 0 if JOBS[job].is_prefill else 1
    return [one["replies"][engine][part] for one in rounds_of(result, job) if engine in one["replies"]]


def rates(result: Result, job: str, engine: str) -> list[float]:
    """Returns the tokens per second, all rows together, per round."""
    return [n_tokens(job) / s for s in seconds(result, job, engine)]


def n_tokens(job: str) -> int:
    """Counts the tokens that are generated in ``seconds``."""
    asked = JOBS[job]
    return asked.batch * (asked.prompt if asked.is_prefill else asked.new - 1)


def ratio(result: Result, job: str, fast: str, slow: str) -> float:
    """Returns one engine's speed as a multiple of another's: the median over the rounds that both ran in."""
    part = 0 if JOBS[job].is_prefill else 1
    both = [one["replies"] for one in rounds_of(result, job) if {fast, slow} <= one["replies"].keys()]
    return median([replies[slow][part] / replies[fast][part] for replies in both])


def share_of_ceiling(result: Result, engine: str) -> float:
    """Returns the decoding rate over the mean of the ceilings before and after: the median over rounds."""
    shares = []
    for one in rounds_of(result, "decode"):
        if engine in one["replies"]:
            i = list(one["replies"]).index(engine)
            around = [by_pages[pages_of(result)] for by_pages in one["ceilings"][i : i + 2]]
            ceiling = np.mean(around) / result["bytes_per_token"]
            shares.append(n_tokens("decode") / one["replies"][engine][1] / ceiling)
    return median(shares)


def speed_far(result: Result, engine: str) -> float | None:
    """Returns the speed at position 1000 over that at 50: the median over the rounds with both."""
    near, far = (rates(result, job, engine) for job in IN_ONE_ROUND)
    return median([b / a for a, b in zip(near, far, strict=True)]) if near and far else None


def pages_of(result: Result) -> str:
    """Returns the size of pages that the engines ran with."""
    return "huge" if result["settings"]["pages"] == "huge" else "small"


def median(values: list[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def find_slower(stored: Result, found: Result, margin: float) -> list[str]:
    """Describes our figures that got worse by more than ``margin``, or are missing.

    Speeds are relative to each peer's and to the ceiling, int8 to float32, far positions to near ones, memory to the
    weights. The first call, of which a run has only one, may get ``FIRST_CALL_MARGIN`` slower.
    """
    worse = fallen(comparable(stored), comparable(found), margin)
    return worse + fallen(first_calls(stored), first_calls(found), max(margin, FIRST_CALL_MARGIN))


def check_alike(stored: Result, settings: dict[str, Any]) -> None:
    """Raises when a run to come would be measured with other settings than a stored one, or on another processor.

    Raises:
        ValueError: when a setting or the kind of processor differs; names it.
    """
    found = settings | {"kind": describe_processor()["kind"]}
    for name, value in {**stored["settings"], "kind": stored["machine"]["kind"]}.items():
        if name != "repetitions" and value != found[name]:
            raise ValueError(f"{name} must be {value!r} as in the stored result, got {found[name]!r}")


def join(earlier: Result, later: Result) -> Result:
    """Puts the groups of two runs side by side; a job of an earlier group goes if a peer in it has done it again."""
    again = {(job, peer) for group in later["groups"] for job in group["jobs"] for peer in peers_in(group)}
    kept = [
        group
        | {"jobs": {job: one for job, one in group["jobs"].items() if not again & {(job, p) for p in peers_in(group)}}}
        for group in earlier["groups"]
    ]
    groups = [*(group for group in kept if group["jobs"]), *later["groups"]]
    engines = earlier["engines"] | later["engines"]
    skipped = {e: why for e, why in (earlier["skipped"] | later["skipped"]).items() if e not in engines}
    return {
        **later,
        "jobs": earlier["jobs"] | later["jobs"],
        "duration_s": earlier["duration_s"] + later["duration_s"],
        "labels": earlier["labels"] | later["labels"],
        "skipped": skipped,
        "engines": engines,
        "groups": groups,
        **count_disturbed(groups),
    }


def peers_in(group: dict[str, Any]) -> list[str]:
    """Returns the engines of a group that are not in each; in a group of those alone, all."""
    return [engine for engine in group["engines"] if engine not in ANCHORS] or group["engines"]


def comparable(result: Result) -> dict[str, float]:
    """Returns all figures that do not depend on the machine's speed, by name; larger ones are better."""
    summary = result["summary"]
    by_job = summary["tokens_per_s"]
    ratios = {
        f"{job}, {ours} to {peer}": value
        for job, by_ours in summary["ratios"].items()
        for ours, by_peer in by_ours.items()
        for peer, value in by_peer.items()
    }
    shares = {
        f"decode, {engine} to the ceiling": value
        for engine, value in summary["share_of_ceiling"].items()
        if is_ours(engine)
    }
    to_float32 = {
        f"{job}, {engine} to {REFERENCE}": ratio(result, job, engine, REFERENCE)
        for job, by_engine in by_job.items()
        for engine in by_engine
        if is_ours(engine) and engine != REFERENCE
    }
    by_position = {
        f"position 1000 to 50, {engine}": speed
        for engine in by_job.get("position_50", {})
        if (speed := speed_far(result, engine))
    }
    memory = {
        f"weights in float32 to peak memory, {engine}": result["weight_bytes"] / facts["peak_bytes"]
        for engine, facts in result["engines"].items()
        if is_ours(engine)
    }
    return ratios | shares | to_float32 | by_position | memory


def first_calls(result: Result) -> dict[str, float]:
    """Returns KerasHub's time to its first text over ours; TensorFlow compiles both."""
    peer = result["engines"].get("keras_hub:float32")
    if peer is None:
        return {}
    ours = {engine: facts for engine, facts in result["engines"].items() if is_ours(engine)}
    first = {f"first call, {engine}": facts for engine, facts in ours.items()}
    warm = {f"first call, second process, {engine}": facts["warm"] for engine, facts in ours.items() if "warm" in facts}
    return {name: seconds_to_first(peer) / seconds_to_first(facts) for name, facts in (first | warm).items()}


def seconds_to_first(facts: dict[str, Any]) -> float:
    """Adds the times of the start and the first call."""
    return facts["ready_s"] + facts["first_call_s"]
