# SPDX-License-Identifier: Apache-2.0
"""Draws what `xgdn bench serving --json` wrote, and prints it as Markdown.

    python benchmarks/plot_serving.py FIGURES.json OUT.svg

Times and throughput against the arrival rate. The axis of rates is no scale: `inf` stands at its end. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from figure import panels, save
from markdown_table import markdown

PERCENTILES = {"p50": "#1b6ca8", "p90": "#66a182", "p99": "#d1495b"}

Row = dict[str, Any]


def draw_times(axes: Axes, title: str, rows: list[Row], kind: str) -> None:
    for name, colour in PERCENTILES.items():
        known = [(i, 1e3 * row[kind][name]) for i, row in enumerate(rows) if row[kind] is not None]
        axes.plot(*zip(*known, strict=True), marker="o", markersize=3, linewidth=1.2, label=name, color=colour)
    axes.set_yscale("log")
    finish(axes, title, "ms", rows)


def draw_throughput(axes: Axes, title: str, rows: list[Row]) -> None:
    values = [row["output_tokens_per_second"] for row in rows]
    axes.plot(values, marker="o", markersize=3, linewidth=1.2, color="#1b6ca8", label="received")
    mean = rows[0]["tokens_asked"] / rows[0]["sent"]
    offered = [(i, row["rate"] * mean) for i, row in enumerate(rows) if row["rate"] != "inf"]
    axes.plot(*zip(*offered, strict=True), linestyle="--", linewidth=1, color="#8d96a3", label="asked for")
    axes.set_ylim(bottom=0)
    finish(axes, title, "output tokens/s", rows)


def finish(axes: Axes, title: str, unit: str, rows: list[Row]) -> None:
    axes.set_xticks(range(len(rows)), [str(rate(row)) for row in rows], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("requests/s", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def rate(row: Row) -> str:
    return "inf" if row["rate"] == "inf" else f"{row['rate']:g}"


def line(row: Row) -> list[str]:
    def times(kind: str) -> str:
        found = row[kind]
        return "" if found is None else " / ".join(f"{1e3 * found[name]:,.1f}" for name in ("p50", "p90", "p95", "p99"))

    counts = [f"{row['finished']} of {row['sent']}", str(row["short"]), str(row["failed"])]
    speeds = [f"{row[f'{what}_per_second']:,.1f}" for what in ("requests", "output_tokens", "total_tokens")]
    return [rate(row), *counts, *speeds, times("ttft"), times("itl"), times("e2e"), f"{1e3 * row['lag']['max']:,.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows: list[Row] = json.loads(args.figures.read_text())["rows"]
    figure, ((first_token, between, throughput),) = panels(1, 3, (4, 2.8))
    draw_times(first_token, "time to first token", rows, "ttft")
    draw_times(between, "time between tokens", rows, "itl")
    draw_throughput(throughput, "throughput", rows)
    save(figure, args.out)
    headings = ["req/s", "finished", "short", "failed", "requests/s", "output tokens/s", "all tokens/s"]
    headings += ["to first token", "between tokens", "to the end", "client's lag at worst"]
    print(markdown(headings, map(line, rows)))


if __name__ == "__main__":
    main()
