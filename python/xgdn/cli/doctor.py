# SPDX-License-Identifier: Apache-2.0
"""`xgdn doctor`: which backend serves which op."""

import importlib.metadata
import json
from collections.abc import Sequence

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xgdn import backends
from xgdn.backends import BackendReport
from xgdn.cli.failure import errors_in_one_line
from xgdn.cli.options import JsonOption


def doctor(as_json: JsonOption = False) -> None:
    """Show which backend serves which op here, why the others do not, and which ops are batch-invariant."""
    versions = {
        "xgdn": importlib.metadata.version("xgdn"),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    with errors_in_one_line():
        reports = backends.doctor()
    if as_json:
        typer.echo(json.dumps({**versions, "backends": [report._asdict() for report in reports]}))
        return
    console = Console()
    console.print(Text("  ".join(f"{name} {value}" for name, value in versions.items())), soft_wrap=True)
    console.print(_table(reports))
    for backend in dict.fromkeys(report.backend for report in reports):
        for line in _notes([report for report in reports if report.backend == backend]):
            console.print(Text(f"{backend}: {line}"), soft_wrap=True)


def _table(reports: Sequence[BackendReport]) -> Table:
    """A row per op, a column per backend."""
    table = Table("op", *dict.fromkeys(report.backend for report in reports))
    for op in dict.fromkeys(report.op for report in reports):
        cells = [report for report in reports if report.op == op]
        words = ["selected" if c.is_selected else "-" if c.why_not else "yes" for c in cells]
        table.add_row(op, *(Text(word, style="bold green" if word == "selected" else "") for word in words))
    return table


def _notes(reports: Sequence[BackendReport]) -> list[str]:
    """Why one backend does not serve ops, and which of its ops are batch-invariant."""
    lines = []
    for why in dict.fromkeys(report.why_not for report in reports if report.why_not):
        ops = [report.op for report in reports if report.why_not == why]
        lines.append(f"{why}" if len(ops) == len(reports) else f"{why} ({', '.join(ops)})")
    if invariant := [report.op for report in reports if report.is_batch_invariant]:
        lines.append(f"batch-invariant: {', '.join(invariant)}")
    return lines
