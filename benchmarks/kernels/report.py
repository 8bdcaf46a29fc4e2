# SPDX-License-Identifier: Apache-2.0
"""Tables of the kernel benchmarks."""

from collections.abc import Iterable

from rich.table import Table

from kernels.attention import AttentionRow
from kernels.compare import Row
from kernels.experts import ExpertsRow
from kernels.layer import LayerRow
from kernels.linear import LinearRow
from xgdn.bench.report import print_wide


def print_rows(rows: Iterable[Row]) -> None:
    print_wide(_ops_table(rows))


def print_layer_rows(rows: Iterable[LayerRow]) -> None:
    print_wide(_layer_table(rows))


def print_linear_rows(rows: Iterable[LinearRow]) -> None:
    print_wide(_linear_table(rows))


def print_attention_rows(rows: Iterable[AttentionRow]) -> None:
    print_wide(_attention_table(rows))


def print_experts_rows(rows: Iterable[ExpertsRow]) -> None:
    print_wide(_experts_table(rows))


def _ops_table(rows: Iterable[Row]) -> Table:
    """One line per row; lines of one case stand together."""
    shown = Table("case", "threads", "provider", box=None)
    for heading in ("min us", "median us", "rate", "roofline us", "of roofline", "error out", "error S"):
        shown.add_column(heading, justify="right")
    last = None
    for row in rows:
        if last is not None and last != (row.case, row.threads):
            shown.add_section()
        last = (row.case, row.threads)
        shown.add_row(
            row.case,
            str(row.threads),
            row.provider,
            f"{row.min:,.0f}",
            f"{row.median:,.0f}",
            f"{row.rate:,.1f} {row.unit}",
            f"{row.roofline:,.0f}",
            f"{row.share:.2f}",
            f"{row.out_error:.1e}",
            f"{row.state_error:.1e}",
        )
    return shown


def _layer_table(rows: Iterable[LayerRow]) -> Table:
    shown = Table("batch", "state", "threads", box=None)
    for heading in ("layer us", "projections us", "between us", "rule us", "between / rule"):
        shown.add_column(heading, justify="right")
    for row in rows:
        times = (row.layer, row.projections, row.between, row.rule)
        cells = (*(f"{time:,.0f}" for time in times), f"{row.between / row.rule:.2f}")
        shown.add_row(str(row.batch), row.state_dtype, str(row.threads), *cells)
    return shown


def _linear_table(rows: Iterable[LinearRow]) -> Table:
    shown = Table("matrix", "outputs", "depth", "tokens", "threads", box=None)
    headings = (
        "min us",
        "median us",
        "torch min us",
        "torch median us",
        "torch / xgdn",
        "GFLOP/s",
        "of roofline",
        "error",
    )
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        sizes = (row.outputs, row.depth, row.tokens, row.threads)
        times = (row.min, row.median, row.torch_min, row.torch_median)
        shown.add_row(
            row.matrix,
            *(str(size) for size in sizes),
            *(f"{time:,.0f}" for time in times),
            f"{row.ratio:.2f}",
            f"{row.gflops:,.0f}",
            f"{row.share:.2f}",
            f"{row.error:.1e}",
        )
    return shown


def _attention_table(rows: Iterable[AttentionRow]) -> Table:
    shown = Table("tokens", "context", "keys, values", "threads", box=None)
    for heading in ("min us", "median us", "torch min us", "torch median us", "torch / xgdn", "GFLOP/s", "error"):
        shown.add_column(heading, justify="right")
    for row in rows:
        times = (row.min, row.median, row.torch_min, row.torch_median)
        shown.add_row(
            *(str(size) for size in (row.tokens, row.context, row.kv_dtype, row.threads)),
            *(f"{time:,.0f}" for time in times),
            f"{row.ratio:.2f}",
            f"{row.gflops:,.0f}",
            f"{row.error:.1e}",
        )
    return shown


def _experts_table(rows: Iterable[ExpertsRow]) -> Table:
    shown = Table("shape", "format", "tokens", "experts", "threads", box=None)
    headings = (
        "min us",
        "median us",
        "loop min us",
        "grouped min us",
        "torch / xgdn",
        "GFLOP/s",
        "of roofline",
        "error",
    )
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        times = (row.min, row.median, row.loop_min, row.grouped_min)
        shown.add_row(
            row.shape,
            row.format,
            str(row.tokens),
            f"{row.visited:.0f}",
            str(row.threads),
            *("" if time is None else f"{time:,.0f}" for time in times),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.gflops:,.0f}",
            f"{row.share:.2f}",
            f"{row.error:.1e}",
        )
    return shown
