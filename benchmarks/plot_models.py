# SPDX-License-Identifier: Apache-2.0
"""Draws what compare_models.py wrote with --json: tokens per second of decode and prompts. Needs matplotlib.

python benchmarks/plot_models.py FIGURES.json OUT.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from figure import panels, save

COLOURS = {"xgdn": "#1b6ca8", "llama.cpp": "#e9a23b", "vLLM-CPU": "#d1495b", "transformers": "#8d96a3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.figures.read_text())["rows"]
    cases = list(dict.fromkeys((row["kind"], row["size"]) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, (all_axes,) = panels(1, len(cases), (2.6, 0.8 + 0.3 * len(names)))
    for axes, (kind, size) in zip(all_axes, cases, strict=True):
        median = {row["provider"]: row["median"] for row in rows if (row["kind"], row["size"]) == (kind, size)}
        speeds = [1e3 * size / median[name] for name in names]
        bars = axes.barh(names, speeds, color=[COLOURS[name.split()[0]] for name in names])
        axes.bar_label(bars, [f"{speed:,.1f}" for speed in speeds], fontsize=8, padding=2)
        axes.invert_yaxis()
        axes.tick_params(axis="both", labelsize=7)
        axes.set_title(f"batch {size}" if kind == "decode" else f"prompt of {size:,}", loc="left", fontsize=10)
        axes.set_xlabel("tokens/s", fontsize=8)
        axes.margins(x=0.35)
    save(figure, args.out)


if __name__ == "__main__":
    main()
