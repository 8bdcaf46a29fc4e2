# SPDX-License-Identifier: Apache-2.0
"""Draws what compare_ops.py --json wrote, and prints it as Markdown.

    python benchmarks/plot_ops.py FIGURES.json OUT.svg [--threads 1]

Bars: the share of the machine's limit that each contestant reaches; 1 is the limit measured in the same run. Needs
matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

COLOURS = {"xgdn": "#1b6ca8", "vLLM": "#d1495b", "zentorch": "#edae49", "ONNX": "#66a182", "transformers": "#8d96a3"}


def colour(contestant: str) -> str:
    return next(value for name, value in COLOURS.items() if contestant.startswith(name))


def draw(axes: plt.Axes, title: str, rows: list[dict[str, Any]]) -> None:
    """One group of bars per problem."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    width = 0.8 / len(contestants)
    for i, contestant in enumerate(contestants):
        own = [row for row in rows if row["contestant"] == contestant]
        places = [problems.index(row["problem"]) + (i - (len(contestants) - 1) / 2) * width for row in own]
        shade = 1.0 - 0.25 * sum(other.split()[0] == contestant.split()[0] for other in contestants[:i])
        axes.bar(places, [row["share"] for row in own], width, label=contestant, color=colour(contestant), alpha=shade)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(problems)), [problem.split(" ", 1)[1] for problem in problems])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("share of the limit")
    axes.legend(fontsize=7, ncols=3, frameon=False)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line per problem; a cell is the median in microseconds and, of xgdn, the share of the limit."""
    lines = [
        "| problem | contestant | us | share of the limit | error of out | error of S |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row["problem"], row["contestant"], f"{row['median']:,.0f}", f"{row['share']:.2f}")
        lines.append("| " + " | ".join((*cells, f"{row['out_error']:.1e}", f"{row['state_error']:.1e}")) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = [row for row in json.loads(args.figures.read_text())["rows"] if row["threads"] == args.threads]
    kinds = [kind for kind in ("decode", "verify", "prefill") if any(row["problem"].startswith(kind) for row in rows)]
    plt.rcParams["svg.hashsalt"] = "xgdn"  # the same figures give the same file
    figure, panels = plt.subplots(len(kinds), 1, figsize=(9, 2.8 * len(kinds)), squeeze=False)
    for kind, axes in zip(kinds, panels[:, 0], strict=True):
        draw(axes, f"{kind}, {args.threads} thread(s)", [row for row in rows if row["problem"].startswith(kind)])
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})
    print(markdown(rows))


if __name__ == "__main__":
    main()
