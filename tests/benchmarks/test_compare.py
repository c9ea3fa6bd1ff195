"""The pure parts of the comparison: ratios, goals, partings, what got slower, groups. No peer, no TensorFlow."""

import argparse
import copy
import json
import math
import shlex
import sys

import numpy as np
import pytest

from benchmarks import compare, engines, environments, goals, processors, report, rounds, summary
from benchmarks.ceiling import DTYPES, bytes_per_token
from benchmarks.peers.protocol import Generated, answer
from tf_gpt2.checkpoint.params import leaves, param_shapes
from tf_gpt2.config import SIZES

OURS, INT8, INT4 = engines.ANCHORS
HF, CT2 = "huggingface:float32", "ctranslate2:float32"
KERAS = "keras_hub:float32"
N_BYTES = 1000
KIND = processors.describe_processor()["kind"]


def one_round(replies, ceilings=(), others=0.0):
    by_pages = [{"small": ceiling / 2, "huge": ceiling} for ceiling in ceilings]
    return {"replies": replies, "ceilings": by_pages, "others_share": dict.fromkeys(replies, others)}


def make_result(**jobs):
    """Two groups: ``jobs`` gives for each job the rounds of the first and of the second."""
    groups = [
        {"engines": [], "jobs": {job: {"parting": {}, "rounds": both[i]} for job, both in jobs.items()}} for i in (0, 1)
    ]
    result = {
        "groups": groups,
        "bytes_per_token": N_BYTES,
        "bytes_per_token_of": {"float32": N_BYTES, "int8": N_BYTES // 4, "int4": N_BYTES // 8},
        "machine": {"cpu": "a processor", "kind": KIND},
        "jobs": {job: engines.JOBS[job]._asdict() for job in jobs},
        "duration_s": 1.0,
        "labels": {},
        "skipped": {},
        "weight_bytes": 1e9,
        "settings": {"size": "124M", "pages": "huge", "threads": 2},
        "engines": {
            OURS: {"peak_bytes": 1.7e9, "ready_s": 4, "first_call_s": 7, "warm": {"ready_s": 4, "first_call_s": 2}},
            INT8: {"peak_bytes": 0.9e9, "ready_s": 4, "first_call_s": 9},
            KERAS: {"peak_bytes": 2e9, "ready_s": 8, "first_call_s": 10},
        },
    }
    return result | {"summary": summary.summarize(result)}


@pytest.fixture
def result():
    """The second group's machine is twice as slow; 127 tokens are timed in decode, 512 in prefill."""
    decode = (
        [one_round({OURS: [9, 1.0], INT8: [9, 0.5], HF: [9, 3.0]}, [100_000, 300_000, 500_000, 700_000])],
        [one_round({OURS: [9, 2.0], INT8: [9, 1.0], CT2: [9, 2.2]}, [100_000, 100_000, 100_000, 100_000])],
    )
    prefill = (
        [one_round({OURS: [2.0, 7], INT8: [2.1, 7], HF: [1.0, 7]})],
        [one_round({OURS: [4.0, 7], CT2: [5.0, 7]})],
    )
    near = ([one_round({OURS: [9, 51.0], INT8: [9, 5.1]})], [])
    far = ([one_round({OURS: [9, 118.0], INT8: [9, 7.0]})], [])
    return make_result(decode=decode, prefill_512=prefill, position_50=near, position_1000=far)


def test_ratios_are_taken_within_a_round(result):
    assert result["summary"]["ratios"]["decode"][OURS] == pytest.approx({HF: 3.0, CT2: 1.1})
    assert result["summary"]["ratios"]["decode"][INT8] == pytest.approx({HF: 6.0, CT2: 2.2})
    assert result["summary"]["tokens_per_s"]["decode"][OURS] == pytest.approx((127 + 63.5) / 2)


def test_the_median_is_of_ratios_not_of_times():
    times = [(1.0, 2.0), (10.0, 50.0), (2.0, 2.0)]
    result = make_result(decode=([one_round({OURS: [9, a], HF: [9, b]}, [1, 1, 1]) for a, b in times], []))
    assert result["summary"]["ratios"]["decode"][OURS][HF] == 2.0


def test_prefill_counts_the_time_to_the_first_token_and_all_prompt_tokens(result):
    assert result["summary"]["seconds"]["prefill_512"][HF] == 1.0
    assert result["summary"]["tokens_per_s"]["prefill_512"][HF] == 512
    assert result["summary"]["ratios"]["prefill_512"][OURS] == pytest.approx({HF: 0.5, CT2: 1.25})


def test_batch_counts_all_rows():
    result = make_result(batch=([one_round({OURS: [1, 2.0]})], []))
    assert result["summary"]["tokens_per_s"]["batch"][OURS] == 8 * 63 / 2


def test_share_of_ceiling_is_of_the_ceilings_around_the_engine(result):
    shares = result["summary"]["share_of_ceiling"]
    # ceilings in tokens/s: 200, 400, 600 between neighbours in the first round, 100 in the second
    assert shares[HF] == pytest.approx(127 / 3 / 600)
    assert shares[INT8] == pytest.approx(np.median([127 / 0.5 / 400, 127 / 1.0 / 100]))


def test_our_own_positions_have_no_ratio_to_peers(result):
    assert result["summary"]["ratios"].keys() == {"decode", "prefill_512"}


def test_goals(result):
    result["machine"]["kind"] = "amd-avx512"
    found = {goal["goal"].partition(" ≥")[0].partition(" ≤")[0]: goal for goal in goals.check_goals(result)}
    measured = {name: goal["measured"] for name, goal in found.items() if goal["measured"] is not None}
    assert measured == pytest.approx(
        {
            "decode: int8 to the ceiling of its own bytes": np.median([127 / 0.5 / 400, 127 / 1.0 / 100]) / 4,
            "decode: float32 to CTranslate2 float32": 1.1,
            "prefill 512: time of best of ours to that of the best peer": 2.0,
            "prefill 512: time of float32 to that of the best float32 peer": 2.0,
            "position 1000 to 50: int8's time per token": (7.0 / 59) / (5.1 / 51),
            "peak memory: int8 to our float32": 9 / 17,
        }
    )
    reached = {name for name, goal in found.items() if goal["reached"]}
    assert reached == {"decode: float32 to CTranslate2 float32", "position 1000 to 50: int8's time per token"}
    assert found["decode: int4 to llama.cpp Q4_0"]["reached"] is None
    assert {goal["kind"] for goal in found.values()} == {"amd-avx512"}


def test_the_ceiling_is_told_for_both_sizes_of_pages(result):
    assert result["summary"]["ceilings_tokens_per_s"] == {"small": 50, "huge": 100}
    small = result | {"settings": result["settings"] | {"pages": "default"}}
    shares = [summary.summarize(one)["share_of_ceiling"][HF] for one in (small, result)]
    assert shares[0] == pytest.approx(2 * shares[1])


def test_the_command_of_each_goal_is_one_that_measures_it(result, monkeypatch):
    for goal in goals.check_goals(result):
        program, *words = shlex.split(goal["command"])
        monkeypatch.setattr(sys, "argv", [program, *words])
        arguments = compare.parse_arguments()
        named = {engine for engine in engines.ENGINES if engines.label(engine) in goal["goal"]}
        assert {*named, OURS} <= set(arguments.engines)
        assert INT8 in arguments.engines or "int8" not in goal["goal"]
        assert goal["goal"].startswith((*(job.partition("_")[0] for job in arguments.jobs), "peak"))


def test_goals_take_the_best_peer_and_the_best_of_ours():
    peers = {"ctranslate2:int8": 3.0, "openvino:int8": 2.0, "llama_cpp:q8_0": 1.5, "llama_cpp:q4_0": 1.0}
    times = {OURS: [9, 1.0], INT8: [9, 0.8], INT4: [9, 0.5]} | {peer: [9, t] for peer, t in peers.items()}
    rounds_of_job = ([one_round(times, [1] * 8)], [])
    result = make_result(decode=rounds_of_job, batch=rounds_of_job)
    found = {g["goal"]: g for g in goals.check_goals(result)}
    assert found["batch 8: best of ours to the best peer in any precision ≥ 1.1"]["measured"] == 2.0
    assert found["decode: int8 to llama.cpp Q8_0 ≥ 1.1"]["measured"] == pytest.approx(1.5 / 0.8)
    assert found["decode: int4 to llama.cpp Q4_0 ≥ 1"]["reached"] is True


def test_one_of_ours_that_did_not_meet_all_peers_is_not_the_best():
    batch = ([one_round({OURS: [9, 1.0], INT4: [9, 0.5], HF: [9, 2.0]})], [one_round({OURS: [9, 1.0], CT2: [9, 0.4]})])
    result = make_result(batch=batch)
    assert result["summary"]["ratios"]["batch"][INT4] == {HF: 4.0}
    found = {g["goal"]: g for g in goals.check_goals(result)}
    assert found["batch 8: best of ours to the best peer in any precision ≥ 1.1"]["measured"] == 0.4


# ---- kinds of processors, and results of several runs


@pytest.mark.parametrize(
    ("maker", "flags", "kind"),
    [
        ("amd", "avx2 avx512f avx512_vnni", "amd-avx512"),
        ("intel", "avx2 avx512_vnni avx_vnni amx_int8", "intel-amx"),
        ("intel", "avx2 avx512f", "intel-avx2"),
        ("arm", "asimd asimddp", "arm-dotprod"),
        ("other", "", "other-base"),
    ],
)
def test_a_kind_is_a_maker_and_the_best_instruction_set(maker, flags, kind):
    assert processors.kind_of(maker, flags.split()) == kind


def test_the_processor_is_read_from_its_first_core(tmp_path, monkeypatch):
    core = "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) X: 5\nflags\t\t: fma avx2 amx_int8 sse\n"
    (tmp_path / "cpuinfo").write_text(f"{core}\nvendor_id\t: AuthenticAMD\n")
    facts = processors.read_cpuinfo(tmp_path / "cpuinfo")
    assert processors.read_cpuinfo(tmp_path / "nowhere") == {}
    monkeypatch.setattr(processors, "read_cpuinfo", lambda: facts)
    assert processors.describe_processor() == {
        "cpu": "Intel(R) X: 5",
        "kind": "intel-amx",
        "instruction_sets": ["amx_int8", "avx2", "fma"],
    }


def test_a_folder_of_results_stands_for_the_file_of_this_kind(tmp_path):
    assert report.file_of_kind(tmp_path) == tmp_path / f"{KIND}.json"
    assert report.file_of_kind(tmp_path / "one.json") == tmp_path / "one.json"


def test_joined_runs_have_the_rounds_of_both(result):
    batch = ([one_round({OURS: [9, 1.0], "llama_cpp:f32": [9, 2.0]})], [])
    later = make_result(batch=batch)
    later["groups"][0]["engines"] = [OURS, "llama_cpp:f32"]
    result["groups"][0]["engines"], result["groups"][1]["engines"] = [OURS, INT8, HF], [OURS, INT8, CT2]
    result["skipped"] = {"llama_cpp:f32": "no environment", "openvino:int8": "no environment"}
    later["engines"] = {"llama_cpp:f32": {"peak_bytes": 1}}
    joined = summary.summarize(both := summary.join(result, later))
    assert joined["ratios"]["decode"] == result["summary"]["ratios"]["decode"]
    assert joined["ratios"]["batch"][OURS] == {"llama_cpp:f32": 2.0}
    assert both["skipped"] == {"openvino:int8": "no environment"}
    assert both["engines"].keys() == {OURS, INT8, KERAS, "llama_cpp:f32"}
    assert both["duration_s"] == 2.0


def test_what_is_measured_again_replaces_what_was(result):
    later = make_result(decode=([one_round({OURS: [9, 1.0], HF: [9, 7.0]}, [1, 1, 1])], []))
    later["groups"][0]["engines"] = [OURS, HF]
    result["groups"][0]["engines"], result["groups"][1]["engines"] = [OURS, INT8, HF], [OURS, INT8, CT2]
    joined = summary.summarize(summary.join(result, later))
    assert joined["ratios"]["decode"][OURS] == pytest.approx({HF: 7.0, CT2: 1.1})
    assert joined["ratios"]["prefill_512"] == result["summary"]["ratios"]["prefill_512"]


def test_a_result_of_another_processor_is_not_added_to(result, tmp_path):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({name: result[name] for name in ("settings", "machine")}))
    options = argparse.Namespace(add=True, output=stored, size="124M", pages="huge", threads=2)
    assert compare.read_earlier(options)["machine"] == result["machine"]
    stored.write_text(json.dumps({"settings": result["settings"], "machine": {"kind": "another"}}))
    with pytest.raises(SystemExit, match=f"kind must be 'another' as in the stored result, got '{KIND}'"):
        compare.read_earlier(options)
    options.add = False
    assert compare.read_earlier(options) is None


def test_there_is_nothing_to_compare_with_where_no_result_of_this_kind_is_stored(tmp_path, capsys):
    options = argparse.Namespace(against=tmp_path, size="124M", pages="huge", threads=2)
    assert compare.read_alike(options) is None
    assert f"{KIND}.json" in capsys.readouterr().out


def test_a_token_reads_fewer_bytes_of_smaller_weights():
    config = SIZES["124M"]
    read = {dtype: bytes_per_token(config, dtype) for dtype in DTYPES}
    assert [round(read[dtype] / read["float32"], 3) for dtype in DTYPES] == [1, 0.5, 0.252, 0.176]


def slowed(result, job, engine, factor):
    """The same with one engine's times multiplied."""
    changed = copy.deepcopy(result)
    for one in summary.rounds_of(changed, job):
        if engine in one["replies"]:
            one["replies"][engine] = [value * factor for value in one["replies"][engine]]
    return changed | {"summary": summary.summarize(changed)}


def test_nothing_is_slower_than_itself(result):
    assert summary.find_slower(result, result, 0.0) == []


def test_what_got_slower_is_named(result):
    lines = summary.find_slower(result, slowed(result, "prefill_512", OURS, 1.08), 0.07)
    assert [line.partition(":float32 to")[0] for line in lines] == ["prefill_512, tf_gpt2"] * 2
    assert summary.find_slower(result, slowed(result, "prefill_512", OURS, 1.06), 0.07) == []
    # two peers, the ceiling, float32
    assert len(summary.find_slower(result, slowed(result, "decode", INT8, 1.2), 0.07)) == 4
    assert summary.find_slower(result, slowed(result, "decode", INT8, 0.5), 0.07) == []


def test_all_that_may_get_worse_is_compared(result):
    assert comparable_names(slowed(result, "decode", INT8, 1.2), result) >= {
        f"decode, {INT8} to {HF}",
        f"decode, {INT8} to the ceiling",
        f"decode, {INT8} to {OURS}",
    }
    assert comparable_names(slowed(result, "position_1000", OURS, 1.1), result) >= {f"position 1000 to 50, {OURS}"}
    for name, value, expected in [
        ("peak_bytes", 2e9, f"weights in float32 to peak memory, {OURS}"),
        ("first_call_s", 12, f"first call, {OURS}"),
        ("warm", {"ready_s": 4, "first_call_s": 5}, f"first call, second process, {OURS}"),
    ]:
        changed = result["engines"] | {OURS: result["engines"][OURS] | {name: value}}
        assert comparable_names(result | {"engines": changed}, result) == {expected}
    assert comparable_names(result | {"engines": {OURS: result["engines"][OURS]}}, result) >= {
        f"weights in float32 to peak memory, {INT8}",
        f"first call, {OURS}",
    }  # what is not measured is said


def comparable_names(worse, result):
    """Gives the names of what got worse."""
    return {line.partition(":  ")[0].rpartition(": ")[0] for line in summary.find_slower(result, worse, 0.07)}


def test_a_slower_machine_is_no_slower_program(result):
    slow = result
    for engine in (OURS, INT8, HF, CT2):
        slow = slowed(slow, "prefill_512", engine, 3.0)
    assert summary.find_slower(result, slow, 0.07) == []


@pytest.mark.parametrize("name", ["size", "pages", "threads"])
def test_only_like_is_compared_with_like(result, name):
    other = result | {"settings": result["settings"] | {name: "other"}}
    with pytest.raises(ValueError, match=f"{name} must be"):
        summary.check_alike(result, other["settings"])
    summary.check_alike(result, dict(result["settings"]))


def test_what_cannot_be_compared_is_refused_before_the_run(result, tmp_path):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({name: result[name] for name in ("settings", "machine")}))
    options = argparse.Namespace(against=stored, size="124M", pages="huge", threads=1)
    with pytest.raises(SystemExit, match=r"stored.json: threads must be 2 as in the stored result, got 1"):
        compare.read_alike(options)
    options.threads = 2
    assert compare.read_alike(options) == {name: result[name] for name in ("settings", "machine")}
    options.against = tmp_path / "nowhere"
    with pytest.raises(SystemExit, match="nowhere"):
        compare.read_alike(options)


class Ours:
    """Stands for our worker; remembers what it is asked."""

    def logits(self, ids):
        self.asked = ids
        return np.arange(20, dtype=np.float32)[None, None] ** 2


def test_parting_names_row_token_and_gap():
    worker = Ours()
    prompts, ours, theirs = [[1, 2], [3, 4]], [[5, 6, 7], [8, 9, 10]], [[5, 6, 7], [8, 12, 11]]
    found = rounds.find_parting(worker, prompts, ours, theirs)
    assert found == {"row": 1, "new_token": 1, "ids": (9, 12), "logit_gap": 144 - 81}
    assert worker.asked == [[3, 4, 8]]
    assert rounds.find_parting(worker, prompts, ours, ours) is None


@pytest.mark.parametrize("theirs", [[[5, 6]], [[5, 6, 7, 8]], [[5, 6, 7], [1, 2, 3]]])
def test_engines_that_stop_early_or_add_tokens_are_refused(theirs):
    with pytest.raises(ValueError, match="3 new ids"):
        rounds.find_parting(Ours(), [[1, 2]], [[5, 6, 7]], theirs)


class Worker:
    """Stands for a process that takes a second at each job."""

    def __init__(self, log, name, busy):
        self.log, self.name, self.busy = log, name, busy

    def ask(self, **task):
        self.log.append(self.name)
        self.busy[0] += self.busy.pop(1) if len(self.busy) > 1 else 0
        return {"prefill_s": 1.0, "decode_s": 2.0, "ids": []}

    def cpu_s(self):
        return 0.0


def test_rounds_are_interleaved_and_noisy_ones_repeated(monkeypatch):
    log, busy = [], [0.0, 1e6]  # others take all the time during the first job only
    monkeypatch.setattr(rounds, "busy_s", lambda: busy[0])
    monkeypatch.setattr(rounds, "wait_until_quiet", lambda patience_s: None)
    workers = {name: Worker(log, name, busy) for name in "ab"}
    found = rounds.measure(workers, {"decode": {}}, {}, n_rounds=2, patience_s=1)["decode"]
    assert log == ["a", "b"] * 3
    assert len(found) == 2
    assert all(map(rounds.is_quiet, found))
    assert found[0]["replies"] == {"a": [1.0, 2.0], "b": [1.0, 2.0]}


def test_jobs_that_are_held_against_each_other_take_turns(monkeypatch):
    log = []
    monkeypatch.setattr(rounds, "wait_until_quiet", lambda patience_s: None)
    worker = Worker(log, "a", [0.0])
    worker.ask = lambda length: log.append(length) or {"prefill_s": 0.0, "decode_s": float(length)}
    tasks = {"position_50": {"length": 1}, "position_1000": {"length": 3}}
    found = rounds.measure({OURS: worker}, tasks, {}, n_rounds=2, patience_s=0)
    assert log == [1, 3, 1, 3]
    assert [one["replies"][OURS][1] for one in found["position_1000"]] == [3.0, 3.0]
    assert compare.in_turn(["decode", "position_50", "batch", "position_1000"]) == [
        ["decode"],
        ["batch"],
        ["position_50", "position_1000"],
    ]


def test_positions_are_compared_within_a_round():
    near = ([one_round({OURS: [9, 51.0 * s]}) for s in (1, 2, 5)], [])
    far = ([one_round({OURS: [9, 59.0 * 2 * s]}) for s in (1, 2, 5)], [])
    assert summary.speed_far(make_result(position_50=near, position_1000=far), OURS) == pytest.approx(0.5)


def test_disturbed_rounds_are_counted():
    noisy, quiet = (
        one_round({OURS: [1, 1], HF: [1, 1]}, [1, 1, 1], others=0.06),
        one_round({OURS: [1, 1]}, [1, 1], others=0.04),
    )
    groups = make_result(decode=([noisy, quiet], [noisy]), batch=([quiet], []))["groups"]
    assert rounds.count_disturbed(groups) == {"n_rounds": 4, "n_disturbed": 2}


def test_each_group_has_ours_in_float32_int8_and_int4():
    groups = engines.make_groups(list(engines.ENGINES), 4)
    assert all(group[:3] == list(engines.ANCHORS) for group in groups)
    assert [len(group) for group in groups] == [7, 7, 5]
    assert {engine for group in groups for engine in group} == set(engines.ENGINES)
    assert engines.make_groups(list(engines.ANCHORS), 4) == [list(engines.ANCHORS)]


def test_labels():
    assert engines.label("llama_cpp:q8_0") == "llama.cpp Q8_0"
    assert {engines.label(engine) for engine in engines.ENGINES} > {"tf_gpt2 int8", "Hugging Face float32"}


def test_all_jobs_fit_the_window():
    assert all(job.prompt + job.new <= SIZES["124M"].n_ctx for job in engines.JOBS.values())


def test_each_adapter_has_requirements_and_ours_has_none():
    adapters = {engines.adapter_of(engine) for engine in engines.ENGINES} - {engines.OURS}
    assert adapters == set(environments.ENGINES)


def test_a_missing_environment_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "PEERS_DIR", tmp_path / ".peers")
    assert "make bench-peers" in engines.why_missing("openvino:int8")
    assert engines.why_missing(OURS) is None


def test_an_environment_is_current_until_its_requirements_change(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    ran = []
    monkeypatch.setattr(environments.subprocess, "run", lambda command: ran.append(command) or Done(len(ran) == 4))
    folder = tmp_path / "peer"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (tmp_path / "peer.txt").write_text("a==1")
    assert environments.build("peer", folder)
    assert environments.build("peer", folder)
    assert len(ran) == 1
    (tmp_path / "peer.no_deps.txt").write_text("b==2")
    assert environments.build("peer", folder)
    assert ["--no-deps" in command for command in ran] == [False, False, True]
    (tmp_path / "peer.txt").write_text("a==2")
    assert not environments.build("peer", folder)  # the fourth fails
    (tmp_path / "peer.txt").write_text("a==1")  # as last built, but who knows what the failure has left
    assert environments.build("peer", folder)  # so it is tried again
    assert len(ran) == 6


class Done:
    def __init__(self, returncode):
        self.returncode = int(returncode)


def test_a_peer_without_logits_says_so():
    class Peer:
        def generate(self, prompts, max_new_tokens):
            return Generated([[max_new_tokens]], 1.0, 2.0)

    assert answer(Peer(), {"task": "generate", "prompts": [[1]], "max_new_tokens": 3})["ids"] == [[3]]
    with pytest.raises(ValueError, match="where the peer can"):
        answer(Peer(), {"task": "logits", "ids": [[1]], "output": ""})


def test_a_token_reads_all_weights_but_the_positions():
    config = SIZES["124M"]
    n_params = sum(math.prod(shape) for _, shape in leaves(param_shapes(config)))
    assert bytes_per_token(config) == 4 * (n_params - config.n_ctx * config.n_embd)


class Asked:
    """A worker that gives ids, or fails at prompts longer than it can take."""

    def __init__(self, longest):
        self.longest = longest

    def ask(self, prompts, **_):
        if len(prompts[0]) > self.longest:
            raise RuntimeError("too long")
        return {"ids": [[1]] * len(prompts)}


def test_an_engine_that_fails_at_a_job_is_left_out_of_it(tmp_path):
    options = argparse.Namespace(size="toy")
    comparison = compare.Comparison(tmp_path, options)
    workers = {OURS: Asked(2000), HF: Asked(600)}
    assert comparison.greedy_ids("prefill_512", workers).keys() == {OURS, HF}
    assert comparison.greedy_ids("prefill_1000", workers).keys() == {OURS}
    assert comparison.skipped == {HF: "prefill_1000: too long"}
    with pytest.raises(RuntimeError, match="too long"):
        comparison.greedy_ids("prefill_1000", {OURS: Asked(1)})
