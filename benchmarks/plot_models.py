# SPDX-License-Identifier: Apache-2.0
"""Draws what compare_models.py wrote with --json: tokens per second by batch size. Needs matplotlib.

python benchmarks/plot_models.py FIGURES.json OUT.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from figure import panels, save

COLOURS = {"xgdn": "#1b6ca8", "vLLM-CPU": "#d1495b", "transformers": "#8d96a3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.figures.read_text())["rows"]
    batches = sorted({row["batch"] for row in rows})
    names = [name for name in COLOURS if any(row["provider"] == name for row in rows)]
    figure, (all_axes,) = panels(1, len(batches), (2.6, 2.6))
    for axes, batch in zip(all_axes, batches, strict=True):
        median = {row["provider"]: row["median"] for row in rows if row["batch"] == batch}
        speeds = [1e3 * batch / median[name] for name in names]
        bars = axes.bar(names, speeds, color=[COLOURS[name] for name in names])
        axes.bar_label(bars, [f"{speed:,.1f}" for speed in speeds], fontsize=8)
        axes.tick_params(axis="both", labelsize=7)
        axes.set_title(f"batch {batch}", loc="left", fontsize=10)
        axes.set_ylabel("tokens/s", fontsize=8)
        axes.margins(y=0.15)
    save(figure, args.out)


if __name__ == "__main__":
    main()
