# SPDX-License-Identifier: Apache-2.0
"""Draws what compare_ops.py or gpu/ops.py wrote with --json, and prints it as Markdown.

    python benchmarks/plot_ops.py FIGURES.json OUT.svg [--threads 1]

Bars: the fraction of the roofline that each provider reaches; 1 is the roofline measured in the same run. Needs
matplotlib.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from figure import panels, save
from markdown_table import markdown

COLOURS = {
    "xgdn": "#1b6ca8",
    "vLLM": "#d1495b",
    "zentorch": "#edae49",
    "ONNX": "#66a182",
    "transformers": "#8d96a3",
    "flash-linear-attention": "#8d96a3",
    "FlashInfer": "#66a182",
    "torch": "#edae49",
}


def colour(provider: str) -> str:
    return next(value for name, value in COLOURS.items() if provider.startswith(name))


def kind(row: dict[str, Any]) -> str:
    """decode, decode step, verify, prefill or attention."""
    return re.match(r"decode step|\w+", row["case"])[0]


def case(row: dict[str, Any]) -> str:
    return row["case"].removeprefix(kind(row) + " ")


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def us(time: float) -> str:
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def draw(axes: Axes, title: str, rows: list[dict[str, Any]]) -> None:
    """One group of bars per case."""
    cases = unique(case(row) for row in rows)
    providers = unique(row["provider"] for row in rows)
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        own = [row for row in rows if row["provider"] == provider]
        places = [cases.index(case(row)) + (i - (len(providers) - 1) / 2) * width for row in own]
        shade = 1.0 - 0.3 * sum(other.split()[0] == provider.split()[0] for other in providers[:i])
        axes.bar(places, [row["share"] for row in own], width, label=provider, color=colour(provider), alpha=shade)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("fraction of the roofline", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def table(rows: list[dict[str, Any]]) -> str:
    """A line per case, a column per provider: median in microseconds, in brackets the fraction of the roofline."""
    providers = unique(row["provider"] for row in rows)
    lines = []
    for name in unique(case(row) for row in rows):
        found = {row["provider"]: row for row in rows if case(row) == name}
        cells = [f"{us(found[c]['median'])} ({found[c]['share']:.2f})" if c in found else "" for c in providers]
        lines.append([name, us(next(iter(found.values()))["roofline"]), *cells])
    return markdown([kind(rows[0]), "roofline", *providers], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = json.loads(args.figures.read_text())["rows"]
    rows = [row for row in rows if row.get("threads", args.threads) == args.threads]
    by_kind = {name: [row for row in rows if kind(row) == name] for name in unique(kind(row) for row in rows)}
    figure, grid = panels(len(by_kind), 1, (10, 2.3))
    for (name, own), (axes,) in zip(by_kind.items(), grid, strict=True):
        threads = f", {args.threads} thread{'s' * (args.threads > 1)}" if "threads" in own[0] else ""  # none of a GPU
        draw(axes, name + threads, own)
        print(table(own), end="\n\n")
    save(figure, args.out)


if __name__ == "__main__":
    main()
