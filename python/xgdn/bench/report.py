# SPDX-License-Identifier: Apache-2.0
"""How figures are printed, and what they were measured on."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from xgdn.bench.layer import LayerRow
from xgdn.bench.measure import Row


def machine() -> dict[str, str | int]:
    """The processor, its vector width as torch sees it, cores, and the versions that decide speed."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "xgdn": importlib.metadata.version("xgdn"),
        "torch": torch.__version__,
    }


def table(rows: Iterable[Row]) -> Table:
    """One line per row; lines of one problem stand together."""
    shown = Table("problem", "threads", "contestant", box=None)
    for heading in ("min us", "median us", "rate", "limit us", "of limit", "error out", "error S"):
        shown.add_column(heading, justify="right")
    last = None
    for row in rows:
        if last is not None and last != (row.problem, row.threads):
            shown.add_section()
        last = (row.problem, row.threads)
        shown.add_row(
            row.problem,
            str(row.threads),
            row.contestant,
            f"{row.min:,.0f}",
            f"{row.median:,.0f}",
            f"{row.rate:,.1f} {row.unit}",
            f"{row.limit:,.0f}",
            f"{row.share:.2f}",
            f"{row.out_error:.1e}",
            f"{row.state_error:.1e}",
        )
    return shown


def layer_table(rows: Iterable[LayerRow]) -> Table:
    shown = Table("batch", "state", "threads", box=None)
    for heading in ("layer us", "projections us", "between us", "rule us", "between / rule"):
        shown.add_column(heading, justify="right")
    for row in rows:
        times = (row.layer, row.projections, row.between, row.rule)
        cells = (*(f"{time:,.0f}" for time in times), f"{row.between / row.rule:.2f}")
        shown.add_row(str(row.batch), row.state_dtype, str(row.threads), *cells)
    return shown


def _print(shown: Table) -> None:
    # Wide enough for a whole line, so that a file or a pipe gets the figures unbroken.
    Console(width=max(Console().width, 150)).print(shown)


def print_rows(rows: Iterable[Row]) -> None:
    _print(table(rows))


def print_layer_rows(rows: Iterable[LayerRow]) -> None:
    _print(layer_table(rows))
