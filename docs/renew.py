"""Renews what documents quote: help texts, measurements, modules. ``--check`` only tells what is out of date."""

from __future__ import annotations

import argparse
import ast
import configparser
import json
import os
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGE = ROOT / "tf_gpt2"
INTERNALS = PACKAGE / "runtime" / "tf_internals.py"

REFERENCE = "tf_gpt2:float32"

COMMAND_LINE = """# Command line

`-` and `_` are the same in the names of options. Exit codes: 0, 1 for a failure (one line on standard error; `--debug`
shows the stack), 2 for wrong usage, 130 after Ctrl-C. `python -m tf_gpt2` is the same program.
"""


def main() -> int:
    """Renews the documents; with ``--check`` returns 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in renewed().items() if not is_current(path, text)}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is out of date" if check else f"renewed {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


def renewed() -> dict[Path, str]:
    """Returns each document's text as it should be."""
    sections = {
        "generation": generation_table(),
        "generation_short": short_generation_table(),
        "speed": speed_line(),
        "step": step_table(),
        "serving": serving_table(),
        "tokenizer": tokenizer_table(),
        "jobs": jobs_table(),
        "jobs_arithmetic": jobs_arithmetic(),
        "training": training_table(),
        "layers": layers(),
        "modules": modules(),
        "internals": internals_table(),
    }
    names = ("design", "performance", "serving", "batch", "training")
    paths = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in names))
    documents = {ROOT / path: fill(ROOT / path, sections) for path in paths}
    return {**documents, ROOT / "docs" / "command_line.md": command_line()}


def is_current(path: Path, text: str) -> bool:
    """Whether a document is there and says what it should."""
    return path.is_file() and path.read_text(encoding="utf-8") == text


def fill(path: Path, sections: dict[str, str]) -> str:
    """Puts each section between its marks."""
    text = path.read_text(encoding="utf-8")
    for name, section in sections.items():
        marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        text = re.sub(
            f"{marks[0]}.*?{marks[1]}", lambda _, s=section, m=marks: f"{m[0]}\n{s}\n{m[1]}", text, flags=re.S
        )
    return text


def command_line() -> str:
    """Returns the help text of each command."""
    os.environ["COLUMNS"] = "100"
    from tf_gpt2.cli import leaf_commands, make_parser

    parts = [
        f"## {command.prog.removeprefix('tf-gpt2 ')}\n\n```text\n{command.format_help().rstrip()}\n```\n"
        for command in leaf_commands(make_parser())
    ]
    return "\n".join([COMMAND_LINE, *parts])


def load(name: str) -> dict[str, Any]:
    """Reads one result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def load_kinds() -> dict[str, dict[str, Any]]:
    """Reads the stored comparison of each kind of processor."""
    return {path.stem: load(f"compare/{path.stem}") for path in sorted((RESULTS / "compare").glob("*.json"))}


def training_table() -> str:
    """Returns the tables of training steps, one for each kind of processor."""
    parts = []
    for kind, report in load("training").items():
        names = list(dict.fromkeys(engine for cell in report["cells"].values() for engine in cell))
        lines = ["| tokens/s (peak, GB) | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for cell, engines in report["cells"].items():
            figures = [
                f"{engines[name]['tokens_per_s']:.0f} ({engines[name]['peak_bytes'] / 1e9:.1f})"
                if name in engines
                else ""
                for name in names
            ]
            lines.append(f"| {cell} | " + " | ".join(figures) + " |")
        found = {
            name: version
            for cell in report["cells"].values()
            for engine in cell.values()
            for name, version in engine["versions"].items()
        }
        of = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
        lines += [
            "",
            f"{report['machine']['cpu']} ({kind}), {report['settings']['threads']} threads, "
            f"{report['date'][:10]}; {of}.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def generation_table() -> str:
    """Returns the tables of all engines, one per kind of processor, and the goals side by side."""
    kinds = load_kinds()
    parts = [part for kind, result in kinds.items() for part in (f"### {kind}", kind_table(result))]
    return "\n\n".join([*parts, "### Goals", goals_table(kinds)])


def kind_table(result: dict[str, Any]) -> str:
    """Returns the table of all engines on one kind of processor, with machine, versions and date."""
    lines = [
        "| | tokens/s | × our float32 | of the ceiling | batch 8, tokens/s | prefill 512 / 1000, s "
        "| position 1000 to 50 | start + first call, s | peak, GB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(engine_row(result, engine) for engine in by_speed(result)),
        *(f"| {label(result, engine)} | not measured | | | | | | | |" for engine in result["skipped"]),
        "",
        caption(result),
    ]
    warm = [
        f"{facts['warm']['ready_s']:.1f} + {facts['warm']['first_call_s']:.1f} s in {engine.partition(':')[2]}"
        for engine, facts in result["engines"].items()
        if "warm" in facts
    ]
    lines += [
        "",
        f"A second process of ours finds what the first compiled: {', '.join(warm)}. Versions: {versions(result)}.",
        "",
        partings(result),
    ]
    return "\n".join(lines)


def engine_row(result: dict[str, Any], engine: str) -> str:
    """Returns an engine's row; what was not measured stays empty."""
    summary, facts = result["summary"], result["engines"][engine]
    rates, seconds = summary["tokens_per_s"], summary["seconds"]
    near, far = (rates.get(f"position_{position}", {}).get(engine) for position in (50, 1000))
    cells = [
        label(result, engine),
        f"{rates['decode'][engine]:.1f}",
        f"{relative(result, engine):.2f}",
        f"{summary['share_of_ceiling'][engine]:.0%}",
        cell(rates.get("batch", {}).get(engine), ".1f"),
        " / ".join(cell(seconds.get(f"prefill_{length}", {}).get(engine), ".2f") for length in (512, 1000)),
        cell(near / far if near and far else None, ".2f"),
        f"{facts['ready_s']:.1f} + {facts['first_call_s']:.1f}",
        f"{facts['peak_bytes'] / 1e9:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def cell(value: float | None, form: str) -> str:
    """Writes a figure; nothing for one that was not measured."""
    return "" if value is None else format(value, form)


def partings(result: dict[str, Any]) -> str:
    """Names the engines whose greedy ids are not ours, and from which new token on."""
    found: dict[str, str] = {}
    for group in result["groups"]:
        for engine, parting in group["jobs"].get("decode", {"parting": {}})["parting"].items():
            if parting:
                found[engine] = f"{parting['new_token']} in {result['labels'][engine]} ({parting['logit_gap']:.2g})"
    new = result["jobs"]["decode"]["new"]
    if not found:
        return f"The {new} greedy ids of all are those of our float32."
    return (
        f"Where greedy ids leave those of our float32, after how many of {new}, and how far apart our logits of the "
        f"two are there: {', '.join(found.values())}. In all others nowhere."
    )


def short_generation_table() -> str:
    """Returns the speeds alone, kinds of processors side by side."""
    kinds = load_kinds()
    engines = dict.fromkeys(engine for result in kinds.values() for engine in by_speed(result))
    header = "".join(f" {kind}: tokens/s | batch 8, tokens/s | prefill of 512, s |" for kind in kinds)
    rows = [
        f"| {next(label(result, engine) for result in kinds.values() if engine in result['labels'])} |"
        + "".join(f" {' | '.join(short_cells(result, engine))} |" for result in kinds.values())
        for engine in engines
    ]
    captions = [f"{kind}: {caption(result)}" for kind, result in kinds.items()]
    return "\n".join([f"| |{header}", f"|---|{'---|' * 3 * len(kinds)}", *rows, "", "\n\n".join(captions)])


def short_cells(result: dict[str, Any], engine: str) -> list[str]:
    """Returns an engine's three speeds on one kind of processor."""
    rates, seconds = result["summary"]["tokens_per_s"], result["summary"]["seconds"]
    found = (rates["decode"], ".1f"), (rates.get("batch", {}), ".1f"), (seconds.get("prefill_512", {}), ".2f")
    return [cell(values.get(engine), form) for values, form in found]


def speed_line() -> str:
    """Returns per kind of processor one line per precision: tokens per second of one sequence, the fastest first."""
    return "\n\n".join(map(speed_of_kind, load_kinds().values()))


def speed_of_kind(result: dict[str, Any]) -> str:
    """Returns the lines of one kind of processor."""
    settings, rates = result["settings"], result["summary"]["tokens_per_s"]["decode"]
    lines = [
        f"Tokens per second of GPT-2 {settings['size']}, one sequence, {settings['threads']} threads of an "
        f"{processor(result)}, {result['date'][:10]}."
    ]
    bits = {"32-bit floats": ("float32", "f32"), "8-bit weights": ("int8", "q8_0"), "4-bit weights": ("int4", "q4_0")}
    for words, names in bits.items():
        alike = [engine for engine in by_speed(result) if engine.partition(":")[2] in names]
        found = [f"{name_of(result, engine)} {rates[engine]:.0f}" for engine in alike]
        lines += [f"With {words}: {', '.join(found)}."] if found else []
    return "\n".join(lines) + warning(result)


def processor(result: dict[str, Any]) -> str:
    """Names the processor and its kind."""
    return f"{result['machine']['cpu']} ({result['machine']['kind']})"


def goals_table(kinds: dict[str, dict[str, Any]]) -> str:
    """Returns each goal with what was measured on each kind of processor; a toy reaches none."""
    if any(result["settings"]["size"] == "toy" for result in kinds.values()):
        return "The goals are for the real shapes."
    found = {kind: {goal["goal"]: goal for goal in result["goals"]} for kind, result in kinds.items()}
    goals = {name: goal for of_kind in found.values() for name, goal in of_kind.items()}
    rows = [
        f"| {name} | {' | '.join(goal_cell(of_kind.get(name)) for of_kind in found.values())} | `{goal['command']}` |"
        for name, goal in goals.items()
    ]
    rows += [
        f"| {goal['goal']} | {' | '.join(goal_cell(goal if kind == goal['kind'] else None) for kind in kinds)} "
        f"| `{goal['command']}` |"
        for goal in tokenizer_goals()
    ]
    lines = [f"| goal | {' | '.join(kinds)} | `python -m benchmarks.` … |", f"|---|{'---|' * len(kinds)}---|"]
    return "\n".join([*lines, *rows])


def goal_cell(goal: dict[str, Any] | None) -> str:
    """Returns what was measured, and whether that reaches the goal."""
    if goal is None or goal["measured"] is None:
        return "not measured"
    return f"{goal['measured']:.2f}, {'reached' if goal['reached'] else '**missed**'}"


def tokenizer_goals() -> list[dict[str, Any]]:
    """Returns the goals for ``Encoder``, from a result of its own."""
    result = load("tokenizer")
    return [
        {
            "goal": f"tokenizer: to tiktoken, one thread, with a {cache} cache ≥ 0.5",
            "kind": result["machine"]["kind"],
            "measured": measured,
            "reached": measured >= 0.5,
            "command": "tokenizer",
        }
        for cache in ("warm", "cold")
        for measured in [result["ratio_to_tiktoken"][f"encoder_{cache}"]]
    ]


def by_speed(result: dict[str, Any]) -> list[str]:
    """Orders the engines that were measured, fastest decoding first."""
    rates = result["summary"]["tokens_per_s"]["decode"]
    return sorted(rates, key=lambda engine: -rates[engine])


def label(result: dict[str, Any], engine: str) -> str:
    """Returns an engine's name as a reader knows it, ours in bold."""
    name = result["labels"][engine]
    return f"**{name}**" if engine.startswith("tf_gpt2:") else name


def name_of(result: dict[str, Any], engine: str) -> str:
    """Returns an engine's name without its precision, ours in bold."""
    name = result["labels"][engine].rpartition(" ")[0]
    return f"**{name}**" if engine.startswith("tf_gpt2:") else name


def relative(result: dict[str, Any], engine: str) -> float:
    """Returns an engine's decoding speed over that of ours in float32, within rounds where the engine is a peer."""
    rates, ratios = result["summary"]["tokens_per_s"]["decode"], result["summary"]["ratios"]["decode"][REFERENCE]
    return 1 / ratios[engine] if engine in ratios else rates[engine] / rates[REFERENCE]


def caption(result: dict[str, Any]) -> str:
    """Describes what was measured where."""
    settings, machine, jobs = result["settings"], result["machine"], result["jobs"]
    return (
        f"{settings['size']} shapes, random weights; {jobs['decode']['prompt']} prompt tokens and "
        f"{jobs['decode']['new']} new, in the batch {jobs['batch']['new']} new each; "
        f"{settings['threads']} threads, {settings['pages']} pages, "
        f"medians of {settings['repetitions']}; ceiling {ceilings(result)} tokens/s; products "
        f"{result['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s; "
        f"{processor(result)}, {machine['n_cores']} cores{sets(result)}, {result['date'][:10]}.{warning(result)}"
    )


def sets(result: dict[str, Any]) -> str:
    """Names the instruction sets, where they were noted."""
    found = result["machine"].get("instruction_sets", [])
    return f" with {', '.join(found)}" if found else ""


def ceilings(result: dict[str, Any]) -> str:
    """Returns what the memory gives with each size of pages."""
    by_pages = result["summary"]["ceilings_tokens_per_s"]
    return " and ".join(f"{rate:.1f} with {pages} pages" for pages, rate in by_pages.items())


def warning(result: dict[str, Any]) -> str:
    """Returns what speaks against the figures: toy shapes, or rounds that other programs disturbed."""
    size, n_disturbed, n_rounds = result["settings"]["size"], result["n_disturbed"], result["n_rounds"]
    disturbed = f" {n_disturbed} of {n_rounds} rounds were disturbed by other programs." if n_disturbed else ""
    return disturbed + (" **A trial of the program, no measurement: toy shapes.**" if size == "toy" else "")


def versions(result: dict[str, Any]) -> str:
    """Names each package that computes, with its version."""
    found: dict[str, str] = {}
    for facts in result["engines"].values():
        name, version = next(iter(facts["versions"].items()))
        found[name] = version
    return ", ".join(f"{name} {version}" for name, version in found.items())


def step_table() -> str:
    """Returns the parts of a decoding step, as measured by leaving them out."""
    result = load("growth")
    lines = ["| part of a step | float32, ms | int8, ms |", "|---|---|---|"]
    steps = {
        dtype: {e["at"]: 1e3 * median(e["times"]) for e in result["step_s"] if is_part_of_step(e, dtype)}
        for dtype in ("float32", "int8")
    }
    shares = {}
    for dtype, of in steps.items():
        parts = {part: of["nothing"] - ms for part, ms in of.items() if part != "nothing"}
        shares[dtype] = parts | {"the rest": of["nothing"] - sum(parts.values()), "whole": of["nothing"]}
    lines += [f"| {part} | {ms(shares['float32'][part])} | {ms(shares['int8'][part])} |" for part in shares["int8"]]
    note = f"\n124M, one sequence, cache of 256 places; {result['machine']['cpu']}, {result['date'][:10]}."
    return "\n".join([*lines, note])


def ms(duration_ms: float) -> str:
    """Writes a difference of durations; one of less than nothing is noise."""
    return f"{duration_ms:.2f}" if duration_ms > 0 else "within the noise"


def is_part_of_step(entry: dict[str, Any], dtype: str) -> bool:
    """Whether a measurement of growth is one of a step without a part."""
    return (entry["question"], entry["dtype"]) == ("without", dtype)


def serving_table() -> str:
    """Returns the table of an export's requests, beside ``TextGenerator``."""
    result = load("serving")
    lines = [
        "| model | tokens | rows | plain | compiled | `TextGenerator` | plain of compiled "
        "| compiled of `TextGenerator` | a request, plain / compiled | the first one |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {model['model']} | {choice} | {rows} | {serving_cells(one)} |"
        for model in result["models"]
        for choice, batches in model["choices"].items()
        for rows, one in batches.items()
    ]
    made = [
        f"{model['model']} was exported in {model['export_s']:.0f} s with both kinds of signatures, has "
        f"{model['size_bytes'] / 1e6:.0f} MB, and was loaded in {model['load_s']:.1f} s"
        for model in result["models"]
    ]
    n_tokens = result["settings"]["n_tokens"]
    drawn = " and ".join(f"`{name}` {value}" for name, value in result["choices"]["drawn"].items())
    note = (
        f"\nTokens/s of all rows, {result['prompt']} prompt tokens and {n_tokens} new ones a row, float32, medians; "
        f"drawn are those of {drawn}. "
    )
    return "\n".join(lines) + f"\n{note}{'; '.join(made)}. {result['machine']['cpu']}, {result['date'][:10]}."


def serving_cells(one: dict[str, Any]) -> str:
    """Returns what is told of one kind of request."""
    steady = {name: median(times) for name, times in one["steady_s"].items()}
    rates = [f"{one['n_tokens'] / steady[name]:.0f}" for name in ("plain", "xla", "generator")]
    ratios = [f"{one['ratios'][goal]:.2f}" for goal in ("plain of xla", "xla of generator")]
    durations = [f"{steady['plain']:.2f} / {steady['xla']:.2f} s"]
    first = [f"{one['first_s']['plain']:.1f} / {one['first_s']['xla']:.1f} s"]
    return " | ".join(rates + ratios + durations + first)


def tokenizer_table() -> str:
    """Returns the table of encoding speeds, with machine and date."""
    result = load("tokenizer")
    names = {"encoder_warm": "tf_gpt2, warm", "encoder_cold": "tf_gpt2, cold", "tiktoken": "tiktoken"}
    rows = [
        f"| {label} | {result['median_mb_per_s'][name]:.1f} | {result['ratio_to_tiktoken'].get(name, 1.0):.2f} |"
        for name, label in names.items()
    ]
    return "\n".join(
        [
            "| one thread | MB/s | × tiktoken |",
            "|---|---|---|",
            *rows,
            f"\n{result['text']['n_bytes'] / 1e6:.1f} MB of English ({result['text']['source']}); "
            f"{result['machine']['cpu']}, {result['date'][:10]}.",
        ]
    )


JOB_ENGINES = {
    "loop": "a loop over `TextGenerator.generate`",
    "here": "`batch`, one process, two cores",
    "one worker, one core": "`batch --workers 1 --threads 1`",
    "two workers, one core each": "`batch --workers 2`",
    "spark": "`batch --spark`, one executor of two cores",
}
"""The ways to answer records that were measured, as a reader knows them."""


def jobs_table() -> str:
    """Returns the rates of jobs beside that of a plain loop."""
    result = load("jobs")
    sizes = result["sizes"]
    heads = [f"{size}, {of['n_prompts']} prompts | × loop | start, s" for size, of in sizes.items()]
    lines = [
        f"| records/s | {' | '.join(heads)} |",
        f"|---|{'---|---|---|' * len(sizes)}",
    ]
    for engine, name in JOB_ENGINES.items():
        lines.append(f"| {name} | {' | '.join(job_cells(of, engine) for of in sizes.values())} |")
    settings = result["settings"]
    one, two = [*JOB_ENGINES][2:4]
    gains = [
        f"{of[two]['records_per_s'] / of[one]['records_per_s']:.2f} ({size})"
        for size, of in sizes.items()
        if one in of and two in of
    ]
    note = (
        f"\n{settings['n_tokens']} new tokens a prompt of 4 to 16 words, greedy, batches of {settings['batch_size']}, "
        f"float32; 124M's shapes have random weights. The start is what passes until the first batch is answered, with "
        f"Spark the first part. From one worker of one core to two: {' and '.join(gains)} times. "
        f"`python -m benchmarks.jobs`; {result['machine']['cpu']}, {result['machine']['n_cores']} cores, "
        f"{result['date'][:10]}."
    )
    return "\n".join([*lines, note])


def job_cells(of: dict[str, Any], engine: str) -> str:
    """Returns the rate of one way with one model, its ratio to the loop's, and its start."""
    if engine not in of:
        return "not measured | | "
    rate = of[engine]["records_per_s"]
    if engine == "loop":
        return f"{rate:.1f} | 1.00 | "
    return f"{rate:.1f} | {of[engine]['ratio']:.2f} | {of[engine]['start_s']:.1f}"


def jobs_arithmetic() -> str:
    """Returns what ten million prompts take, computed from the measured rates."""
    result, compared = load("jobs"), next(iter(load_kinds().values()))
    n_tokens, n_prompts = result["settings"]["n_tokens"], 10_000_000
    rates = {}
    for size, of in result["sizes"].items():
        engine = "spark" if "spark" in of else "here"
        rates[f"{size}, {JOB_ENGINES[engine]}"] = of[engine]["records_per_s"]
    if "124M" not in result["sizes"]:
        rate = compared["summary"]["tokens_per_s"]["batch"][REFERENCE] / n_tokens
        rates["124M, the batch of 8 in [performance.md](performance.md)"] = rate
    rows = []
    for name, rate in rates.items():
        part_h = 1024 / rate / 3600
        hours = {n: n_prompts / rate / n / 3600 + part_h for n in (10, 100)}
        cells = [f"{hours[n]:.1f} h, {hours[n] * n:.0f} machine-hours" for n in hours]
        rows.append(f"| {name} | {rate:.1f} | {3600 * part_h:.0f} s | {' | '.join(cells)} |")
    note = (
        f"\nFor {n_tokens} new tokens each, on machines like this, of {result['machine']['n_cores']} cores: ten "
        f"million records at one machine's rate, divided by the machines, and the last part of 1024 records. "
        f"Computed, not run; the price of a machine-hour times the last figures is the cost."
    )
    head = ["| model and rate | records/s | a part | 10 machines | 100 machines |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, note])


def layers() -> str:
    """Returns the order of the layers, as import-linter's contract in ``setup.cfg`` has it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    rows = setup["importlinter:contract:layers"]["layers"].split("\n")
    names = [" · ".join(name.strip().rpartition(".")[2] for name in row.split("|")) for row in rows if row]
    return f"```\n{' → '.join(names)}\n```"


def modules() -> str:
    """Returns a table of modules for each folder of the package, with the first sentence of each docstring."""
    parts = []
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        first = folder / "__init__.py"
        parts += [f"### {folder.relative_to(ROOT)}\n", f"{first_sentence(first)}\n", "| | |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            if path != first:
                cell = first_sentence(path).replace("|", "\\|")
                parts.append(f"| [{path.name}](../{path.relative_to(ROOT)}) | {cell} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def first_sentence(path: Path) -> str:
    """Returns the first sentence of a module's docstring, as Markdown."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0].replace("``", "`")


def internals_table() -> str:
    """Returns a table of what the package needs of TensorFlow beyond its documented interface, each with its test."""
    lines = ["| function | what it does | test |", "|---|---|---|"]
    for node in ast.parse(INTERNALS.read_text(encoding="utf-8")).body:
        docstring = (isinstance(node, ast.FunctionDef) and ast.get_docstring(node)) or ""
        if "Test: " in docstring:
            summary = " ".join(docstring.partition("\n")[0].split()).replace("``", "`")
            path, name = re.findall(r"``([^`]+)``", docstring.partition("Test: ")[2])
            lines.append(f"| `{node.name}` | {summary} | [{Path(path).name}]({path}), `{name}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
