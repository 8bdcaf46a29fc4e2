# SPDX-License-Identifier: Apache-2.0
"""What the drawings of this folder have in common. Needs matplotlib."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a grid of axes; `size` in inches, of one of them."""
    plt.rcParams["svg.hashsalt"] = "xgdn"  # the same figures give the same file
    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    return figure, axes.tolist()


def save(figure: Figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
