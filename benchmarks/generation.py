"""How fast does GPT-2 generate here, beside Hugging Face's on the same weights and beside what the memory allows?

Random float32 weights, greedy, no early stop. Each peer is a process of its own that is idle while another runs; the
machine's read bandwidth, then ours, the bandwidth, Hugging Face, the bandwidth. Machines drift, so ratios are taken
within such a round, and their median counts. A round in which other programs took more than a twentieth of the
processor's time is repeated. All that with huge pages for everyone, and again with the default pages.

Prefill ends with the first new token. What XLA compiles goes to a new folder, so that the first call compiles; a second
process of ours then finds it there. Prints medians, and stores every single time as JSON.

    python -m benchmarks.generation
    python -m benchmarks.generation --batch 8 --new 64 --output batch8.json

Needs Hugging Face's environment, which 'make bench' makes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tf_gpt2
from benchmarks.ceiling import Reader, available_cores, bytes_per_token, describe_machine, measure_gemm
from benchmarks.peers.protocol import ROOT, Worker, write_model
from tf_gpt2.checkpoint.params import leaves, random_params
from tf_gpt2.config import SIZES, GPT2Config

RESULTS = Path(__file__).parent / "results" / "generation.json"
OURS, PEER = "tf_gpt2", "huggingface"
PAGES = {"huge": "glibc.malloc.hugetlb=1", "default": "glibc.malloc.hugetlb=0"}
"""What ``GLIBC_TUNABLES`` is for all processes: whether ``malloc`` asks the kernel for huge pages."""
QUIET = 0.05
"""The share of the processor's time that others may take."""
PATIENCE_S = 60
MOST_TRIES = 3


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported, to write the checkpoint
    config = SIZES[arguments.size]
    shape = arguments.batch, arguments.prompt
    prompts = np.random.default_rng(0).integers(config.n_vocab, size=shape).tolist()
    result: dict[str, Any] = {
        "benchmark": "generation",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": {name: getattr(arguments, name) for name in ("size", "prompt", "new", "batch", "repetitions")},
        "threads": arguments.threads,
        "bytes_per_token": bytes_per_token(config),
        "gemm_flop_per_s": measure_gemm(),
        "pages": {},
    }
    print(f"{arguments.size}, float32, batch {shape[0]}: {shape[1]} prompt tokens + {arguments.new} new, greedy")
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(config, Path(folder))
        for pages in PAGES:
            measured = compare(Path(folder), config, prompts, pages, arguments)
            result["pages"][pages] = measured
            print_comparison(pages, measured)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="124M", help="whose shapes")
    parser.add_argument("--prompt", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens per prompt, at least 2")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds, after the first call")
    parser.add_argument("--threads", type=int, default=available_cores(), help="for each")
    parser.add_argument(
        "--peers_dir",
        "--peers-dir",
        type=Path,
        default=os.environ.get("TF_GPT2_PEERS_DIR", ROOT / ".peers"),
        help="holds huggingface/bin/python",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    if min(arguments.prompt, arguments.new - 1, arguments.batch, arguments.repetitions, arguments.threads) < 1:
        parser.error("--prompt, --batch, --repetitions and --threads must be at least 1, --new at least 2")
    if arguments.prompt + arguments.new > SIZES[arguments.size].n_ctx:
        parser.error(f"--prompt and --new must fit the window of {SIZES[arguments.size].n_ctx} tokens")
    arguments.pythons = {OURS: sys.executable, PEER: arguments.peers_dir.absolute() / PEER / "bin" / "python"}
    if not arguments.pythons[PEER].exists():
        parser.error(f"--peers_dir has no {PEER}/bin/python, got {arguments.peers_dir}; 'make bench' makes it")
    return arguments


def write_random_model(config: GPT2Config, folder: Path) -> None:
    """Writes one set of weights twice: as OpenAI's checkpoint, which ours loads, and as peers read it."""
    params = random_params(config)
    tf_gpt2.save_gpt2_params_to_tf_ckpt(params, config.to_hparams(), folder)
    write_model(folder, config.to_hparams(), dict(leaves(params)))


def compare(
    folder: Path, config: GPT2Config, prompts: list[list[int]], pages: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Starts all peers with one kind of pages, compares their ids, times them in turn."""
    environment = {"GLIBC_TUNABLES": PAGES[pages]}
    cache = {"TF_GPT2_COMPILE_CACHE": str(folder / f"compiled_{pages}")}
    job = {"task": "generate", "prompts": prompts, "max_new_tokens": arguments.new}

    def start(name: str) -> Worker:
        return Worker(
            arguments.pythons[name], name, folder, n_threads=arguments.threads, environment=environment | cache
        )

    wait_until_quiet()
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(start(name)) for name in arguments.pythons}
        firsts = {name: worker.ask(**job) for name, worker in workers.items()}
        parting = find_parting(workers[OURS], prompts, firsts[OURS]["ids"], firsts[PEER]["ids"])
        reader = Reader(bytes_per_token(config), huge_pages=pages == "huge", n_threads=arguments.threads)
        rounds = measure(workers, job, reader, arguments.repetitions)
    peers = {
        name: describe(worker.loaded, firsts[name], [r["replies"][i] for r in rounds], prompts, arguments.new)
        for i, (name, worker) in enumerate(workers.items())
    }
    with start(OURS) as again:
        peers[OURS]["second_process"] = {"ready_s": again.loaded["ready_s"]} | without_ids(again.ask(**job))
    rates = compare_rates(peers, rounds, bytes_per_token(config) / len(prompts))
    return {"environment": environment, "ids_part": parting, "peers": peers} | rates


def compare_rates(
    peers: dict[str, dict[str, Any]], rounds: list[dict[str, list[Any]]], n_bytes: float
) -> dict[str, Any]:
    """Puts rates beside each other and beside the ceiling of ``n_bytes`` per token, in each round; gives medians."""
    ceilings = np.array([r["ceilings"] for r in rounds])  # (rounds, peers + 1)
    per_s = ceilings / n_bytes
    return {
        "others_share": [r["others_share"] for r in rounds],
        "ceiling_bytes_per_s": ceilings.tolist(),
        "ceiling_tokens_per_s": float(np.median(per_s)),
        "share_of_ceiling": {
            name: median_ratio(peer["decode_tokens_per_s"], per_s[:, i : i + 2].mean(axis=1))
            for i, (name, peer) in enumerate(peers.items())
        },
        f"ratio_to_{PEER}": {
            part: median_ratio(peers[OURS][f"{part}_tokens_per_s"], peers[PEER][f"{part}_tokens_per_s"])
            for part in ("prefill", "decode", "all")
        },
    }


def measure(
    workers: dict[str, Worker], job: dict[str, Any], reader: Reader, n_rounds: int
) -> list[dict[str, list[Any]]]:
    """Runs rounds until enough were quiet, at most three times as many; gives the quietest, in order."""
    rounds: list[dict[str, list[Any]]] = []
    while len(rounds) < MOST_TRIES * n_rounds and sum(map(is_quiet, rounds)) < n_rounds:
        wait_until_quiet()
        rounds.append(run_round(workers, job, reader))
    quietest = sorted(range(len(rounds)), key=lambda i: max(rounds[i]["others_share"]))[:n_rounds]
    return [rounds[i] for i in sorted(quietest)]


def run_round(workers: dict[str, Worker], job: dict[str, Any], reader: Reader) -> dict[str, list[Any]]:
    """Gives each peer's reply, what others took of the processor's time meanwhile, and the bandwidths around them."""
    result: dict[str, list[Any]] = {"ceilings": [reader.measure()["bytes_per_s"]], "replies": [], "others_share": []}
    for worker in workers.values():
        start_s, busy, own = time.perf_counter(), busy_s(), worker.cpu_s()
        result["replies"].append(worker.ask(**job))
        available_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
        others_s = max(0.0, (busy_s() - busy) - (worker.cpu_s() - own))
        result["others_share"].append(others_s / available_s)
        result["ceilings"].append(reader.measure()["bytes_per_s"])
    return result


def is_quiet(one_round: dict[str, list[Any]]) -> bool:
    return max(one_round["others_share"]) < QUIET


def wait_until_quiet(window_s: float = 0.5) -> None:
    """Waits until nobody uses the processor, at most ``PATIENCE_S``."""
    end_s = time.perf_counter() + PATIENCE_S
    while time.perf_counter() < end_s:
        busy = busy_s()
        time.sleep(window_s)
        if busy_s() - busy < QUIET * window_s * (os.cpu_count() or 1):
            return


def busy_s() -> float:
    """Gives the processor time that all programs, and other tenants of the machine, have taken; 0 if not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def find_parting(
    worker: Worker, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> dict[str, Any] | None:
    """Says where greedy ids first part, and how far apart the two logits are there; ``None`` if they agree."""
    for row, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        for i, pair in enumerate(zip(a, b, strict=True)):
            if pair[0] != pair[1]:
                logits = worker.logits([prompt + a[:i]])[0, -1]
                return {"row": row, "new_token": i, "ids": pair, "logit_gap": float(abs(np.subtract(*logits[[*pair]])))}
    return None


def describe(
    loaded: dict[str, Any], first: dict[str, Any], replies: list[dict[str, Any]], prompts: list[list[int]], n_new: int
) -> dict[str, Any]:
    """Turns a peer's replies into rates, and keeps the raw times."""
    batch, length = len(prompts), len(prompts[0])
    prefill_s, decode_s = ([reply[part] for reply in replies] for part in ("prefill_s", "decode_s"))
    all_s = np.add(prefill_s, decode_s)
    return {
        "versions": loaded["versions"],
        "load_s": loaded["load_s"],
        "ready_s": loaded["ready_s"],
        "first_prefill_s": first["prefill_s"],
        "first_decode_s": first["decode_s"],
        "compile_s": first["prefill_s"] + first["decode_s"] - statistics.median(all_s),
        "loaded_peak_bytes": loaded["peak_bytes"],
        "peak_bytes": first["peak_bytes"],
        "huge_page_bytes": first["huge_page_bytes"],
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "prefill_tokens_per_s": [batch * length / s for s in prefill_s],
        "decode_tokens_per_s": [batch * (n_new - 1) / s for s in decode_s],
        "all_tokens_per_s": [batch * n_new / s for s in all_s],
    }


def without_ids(reply: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in reply.items() if name != "ids"}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.median(np.divide(a, b)))


def print_comparison(pages: str, measured: dict[str, Any]) -> None:
    """Prints one table."""
    parting = measured["ids_part"]
    print(f"\n{pages} pages; greedy ids {'agree' if parting is None else f'part: {parting}'}")
    print("                prefill/s  decode/s  of ceiling  compile s  ready s  peak GB")
    for name, peer in measured["peers"].items():
        prefill, decode = (statistics.median(peer[f"{part}_tokens_per_s"]) for part in ("prefill", "decode"))
        print(
            f"{name:14}  {prefill:9.0f}  {decode:8.1f}  {measured['share_of_ceiling'][name]:10.0%}"
            f"  {peer['compile_s']:9.1f}  {peer['ready_s']:7.1f}  {peer['peak_bytes'] / 1e9:7.2f}"
        )
    ratios = measured[f"ratio_to_{PEER}"]
    print(f"{'x ' + PEER:14}  {ratios['prefill']:9.2f}  {ratios['decode']:8.2f}")
    bandwidth = np.median(measured["ceiling_bytes_per_s"]) / 1e9
    print(f"{'ceiling':14}             {measured['ceiling_tokens_per_s']:8.1f}  ({bandwidth:.1f} GB/s)")
    second = measured["peers"][OURS]["second_process"]
    first_call_s = second["prefill_s"] + second["decode_s"]
    print(f"{OURS}, second process: first call {first_call_s:.1f} s, peak {second['peak_bytes'] / 1e9:.2f} GB")
    noisy = sum(max(shares) >= QUIET for shares in measured["others_share"])
    if noisy:
        print(f"other programs disturbed {noisy} of the rounds: run again on a quiet machine")


if __name__ == "__main__":
    main()
