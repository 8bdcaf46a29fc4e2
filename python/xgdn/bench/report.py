# SPDX-License-Identifier: Apache-2.0
"""Tables of the figures, and the machine that they were measured on."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from xgdn.bench.model import ModelRow
from xgdn.bench.op_times import StepProfile
from xgdn.bench.timeline import Distribution, ServingRow


class _Row(Protocol):
    def document(self) -> dict[str, Any]: ...


_AnyRow = TypeVar("_AnyRow", bound=_Row)


def machine() -> dict[str, str | int]:
    """Return the processor, its vector width as torch sees it, cores, and the versions that decide speed."""
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


def show(
    rows: Sequence[_AnyRow], print_rows: Callable[[Sequence[_AnyRow]], None], as_json: bool, **more: object
) -> None:
    """Print the machine and the rows: by `print_rows`, or as one JSON document, which has `more` too."""
    if as_json:
        print(json.dumps({"machine": machine(), **more, "rows": [row.document() for row in rows]}))
        return
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    print_rows(rows)


def model_table(rows: Iterable[ModelRow]) -> Table:
    shown = Table("batch", "threads", box=None)
    for heading in (
        "steps",
        "min ms",
        "median ms",
        "tokens/s",
        "roofline ms",
        "of roofline",
        "engine",
        "prompt tokens/s",
    ):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            str(row.batch),
            str(row.threads),
            str(len(row.times)),
            f"{min(row.times):,.1f}",
            f"{row.median:,.1f}",
            f"{row.tokens_per_second:,.1f}",
            f"{row.roofline:,.1f}",
            f"{row.share:.2f}",
            f"{row.engine:.2%}",
            f"{row.prefill:,.0f}",
        )
    return shown


def profile_table(profile: StepProfile) -> Table:
    """Ops by their time; at the end the rest of the step."""
    shown = Table("op", "sizes", box=None)
    for heading in ("calls", "us", "us each", "share", "us before"):
        shown.add_column(heading, justify="right")
    for row in sorted(profile.ops, key=lambda row: row.inside, reverse=True):
        shown.add_row(
            row.op,
            " x ".join(f"{size:,}" for size in row.sizes),
            f"{row.calls:,.4g}",
            f"{row.inside:,.0f}",
            f"{row.inside / row.calls:,.1f}",
            f"{row.inside / profile.step:.1%}",
            f"{row.before:,.0f}",
        )
    for name, time in (("between ops", profile.between), ("after the last op", profile.after)):
        shown.add_row(name, "", "", f"{time:,.0f}", "", f"{time / profile.step:.1%}", "")
    return shown


def load_table(rows: Iterable[ServingRow]) -> Table:
    """Counts and throughput of each run."""
    shown = Table("req/s", box=None)
    for heading in ("sent", "finished", "short", "failed", "tokens requested", "received", "in shared events"):
        shown.add_column(heading, justify="right")
    for heading in ("seconds", "requests/s", "output tok/s", "all tok/s", "as alone", "errors"):
        shown.add_column(heading, justify="right")
    for row in rows:
        counts = (row.sent, row.finished, row.short, row.failed)
        tokens = (row.tokens_asked, row.tokens_received, row.tokens_sharing_an_event)
        speeds = (row.seconds, row.requests_per_second, row.output_tokens_per_second, row.total_tokens_per_second)
        shown.add_row(
            f"{row.rate:g}",
            *(f"{count:,}" for count in (*counts, *tokens)),
            *(f"{speed:,.1f}" for speed in speeds),
            f"{row.equal} of {row.compared}",
            ", ".join(f"{count} x {name}" for name, count in row.errors.items()),
        )
    return shown


def latency_table(rows: Iterable[ServingRow]) -> Table:
    """Latencies, a line per run and kind of time."""
    shown = Table("req/s", "ms", box=None)
    for heading in ("count", "mean", "p50", "p90", "p95", "p99", "max"):
        shown.add_column(heading, justify="right")
    for row in rows:
        kinds: dict[str, Distribution | None] = {
            "to first token": row.ttft,
            "between tokens": row.itl,
            "per output token": row.tpot,
            "to the end": row.e2e,
            "client's lag": row.lag,
            "held back": row.held if row.held is not None and row.held.max > 0 else None,
        }
        for name, times in kinds.items():
            if times is not None:
                values = (times.mean, times.p50, times.p90, times.p95, times.p99, times.max)
                shown.add_row(f"{row.rate:g}", name, f"{times.count:,}", *(f"{1e3 * value:,.1f}" for value in values))
        shown.add_section()
    return shown


def metrics_sentence(row: ServingRow) -> str:
    if row.metrics is None:
        return f"rate {row.rate:g}: the server has no metrics of xgdn's to compare"
    if all(figure.agrees for figure in row.metrics):
        return f"rate {row.rate:g}: {len(row.metrics)} figures of /metrics agree with the answers"
    return f"rate {row.rate:g}: /metrics disagrees with the answers"


def print_wide(shown: Table) -> None:
    """Print a table wide enough for whole lines, so that a file or a pipe gets the figures unbroken."""
    Console(width=max(Console().width, 150)).print(shown)


def print_model_rows(rows: Sequence[ModelRow]) -> None:
    print_wide(model_table(rows))
    for row in rows:
        for profile in row.profiles:
            steps = f"mean of {profile.steps} steps of {profile.tokens:,.4g} tokens"
            print(f"\n{profile.kind}, batch {row.batch}, threads {row.threads}: {profile.step:,.0f} us, {steps}")
            print_wide(profile_table(profile))


def print_serving_rows(rows: Sequence[ServingRow]) -> None:
    print_wide(load_table(rows))
    print_wide(latency_table(rows))
    for row in rows:
        print(metrics_sentence(row))
