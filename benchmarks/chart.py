"""Draws the stored comparisons: decoding speed of each engine, one sequence and a batch, on each kind of processor.

python -m benchmarks.chart

Needs matplotlib: pip install 'tf_gpt2[bench]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from benchmarks.engines import is_ours, label
from benchmarks.summary import pages_of

ROOT = Path(__file__).parents[1]
OUR_COLOR, PEER_COLOR, TEXT_COLOR = "#d9480f", "#adb5bd", "#212529"
PANELS = {"decode": "one sequence", "batch": "batch of 8, all rows"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "compare", help="folder of one file per kind"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "speed.png")
    arguments = parser.parse_args()
    mpl.use("Agg")
    paths = sorted(arguments.results.glob("*.json"))
    draw([json.loads(path.read_text(encoding="utf-8")) for path in paths], arguments.output)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Writes one picture with a row of panels per kind of processor."""
    heights = [0.36 * len(result["summary"]["tokens_per_s"]["decode"]) + 1.5 for result in results]
    figure = plt.figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(results), squeeze=False, height_ratios=heights)[:, 0]
    for row, result in zip(rows, results, strict=True):
        draw_kind(row, result)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_kind(figure: SubFigure, result: dict[str, Any]) -> None:
    """Draws a panel per job; engines are in the order of their decoding speed."""
    rates = result["summary"]["tokens_per_s"]
    engines = sorted(rates["decode"], key=rates["decode"].get)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (job, title) in zip(panels, PANELS.items(), strict=True):
        draw_bars(axes, engines, rates[job])
        axes.set_title(f"{title}, tokens/s", fontsize=11, color=TEXT_COLOR)
    panels[0].set_yticks(range(len(engines)), [label(engine) for engine in engines])
    for text, engine in zip(panels[0].get_yticklabels(), engines, strict=True):
        text.set_fontweight("bold" if is_ours(engine) else "normal")
    ceiling = result["summary"]["ceilings_tokens_per_s"][pages_of(result)]
    panels[0].axvline(ceiling, color=TEXT_COLOR, linewidth=1, linestyle="--")
    panels[0].annotate(
        "float32 weights read once",
        (ceiling, 0),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        rotation=90,
        va="bottom",
        color=TEXT_COLOR,
    )
    settings, machine = result["settings"], result["machine"]
    trial = "A trial, no measurement: " if settings["size"] == "toy" else ""
    figure.suptitle(
        f"{trial}GPT-2 {settings['size']} on {settings['threads']} threads of {machine['cpu']} ({machine['kind']}), "
        f"{result['date'][:10]}",
        fontsize=12,
        color=TEXT_COLOR,
    )


def draw_bars(axes: Axes, engines: list[str], rates: dict[str, float]) -> None:
    values = [rates.get(engine, 0.0) for engine in engines]
    colors = [OUR_COLOR if is_ours(engine) else PEER_COLOR for engine in engines]
    bars = axes.barh(range(len(engines)), values, color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=9, color=TEXT_COLOR)
    axes.margins(x=0.12)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
