# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ops, a layer, its projections and its experts against the roofline, and of attention against torch's.

python benchmarks/bench.py ops|layer|linear|experts|attention --help
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import torch
import typer

from kernels.attention import AttentionBenchmark
from kernels.experts import FORMATS, ExpertsBenchmark
from kernels.experts import SHAPES as MIXTURES
from kernels.layer import LayerBenchmark
from kernels.linear import SHAPES, LinearBenchmark
from kernels.ops import OpsBenchmark, Plan
from kernels.report import (
    print_attention_rows,
    print_experts_rows,
    print_layer_rows,
    print_linear_rows,
    print_rows,
)
from xgdn.bench.report import show
from xgdn.cli.failure import errors_in_one_line
from xgdn.cli.options import JsonOption, parse_counts
from xgdn.progress import Bar

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measures kernels against the roofline, after a check of their results.",
)

Row = TypeVar("Row", covariant=True)

ThreadsOption = Annotated[str, typer.Option(metavar="N,..", help="Numbers of threads.")]


class _Benchmark(Protocol[Row]):
    def run(self, *case: Any) -> Row: ...


def _measured(make: Callable[[], _Benchmark[Row]], cases: Sequence[tuple[object, ...]]) -> list[Row]:
    """Run the benchmark on each case, with a bar."""
    bar = Bar("measuring")
    rows = []
    with torch.no_grad(), errors_in_one_line():
        benchmark = make()
        try:
            for i, case in enumerate(cases):
                bar.update(i, len(cases))
                rows.append(benchmark.run(*case))
        finally:
            bar.hide()
    return rows


@app.command()
def ops(
    decode: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes of decode.")] = "1,8,32",
    verify: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes of verification, 4 drafts each.")] = "8",
    prefill: Annotated[str, typer.Option(metavar="T,..", help="Prompt lengths in tokens.")] = "512,2048,8192",
    threads: ThreadsOption = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Time per provider and case.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure the ops in the shape of Qwen3-Next-80B and Qwen3.5-35B: 16 key and 32 value heads, head dims of 128."""
    plan = Plan(
        decode=parse_counts(decode, "--decode"),
        verify=parse_counts(verify, "--verify"),
        prefill=parse_counts(prefill, "--prefill"),
        threads=parse_counts(threads, "--threads"),
    )
    torch.manual_seed(0)
    bar = Bar("measuring")
    with torch.no_grad(), errors_in_one_line():
        try:
            rows = OpsBenchmark(seconds=seconds).run(plan, bar.update)
        finally:
            bar.hide()
    show(rows, print_rows, as_json)


@app.command()
def layer(
    batch: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes.")] = "1,8,32",
    threads: ThreadsOption = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Time per provider and batch size.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure a layer's decode step in bf16, of the same shape, hidden size 2048: the time beside its projections."""
    batches, counts = parse_counts(batch, "--batch"), parse_counts(threads, "--threads")
    torch.manual_seed(0)
    with torch.no_grad(), errors_in_one_line():
        benchmark = LayerBenchmark(seconds=seconds)
        rows = [
            benchmark.decode(size, dtype, count)
            for count in counts
            for dtype in (torch.float32, torch.bfloat16)
            for size in batches
        ]
    show(rows, print_layer_rows, as_json)


@app.command()
def linear(
    tokens: Annotated[str, typer.Option(metavar="T,..", help="Rows of the product.")] = "1,8,32,128,512,2048",
    threads: ThreadsOption = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Time per provider and product.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure the projections of a layer of Qwen3.5-0.8B in bf16, with torch's as the baseline."""
    sizes, counts = parse_counts(tokens, "--tokens"), parse_counts(threads, "--threads")
    torch.manual_seed(0)
    cases = [(matrix, size, count) for count in counts for matrix in SHAPES for size in sizes]
    show(_measured(lambda: LinearBenchmark(seconds=seconds), cases), print_linear_rows, as_json)


@app.command()
def experts(
    tokens: Annotated[str, typer.Option(metavar="T,..", help="Tokens, of a batch or of a prompt.")] = "1,8,32,512",
    threads: ThreadsOption = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Time per provider and case.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure the experts of a layer of Qwen3-Next and narrower ones in bf16, 8 and 4 bits, beside torch's in bf16."""
    sizes, counts = parse_counts(tokens, "--tokens"), parse_counts(threads, "--threads")
    torch.manual_seed(0)
    cases = [(shape, f, size, count) for count in counts for shape in MIXTURES for f in FORMATS for size in sizes]
    show(_measured(lambda: ExpertsBenchmark(seconds=seconds), cases), print_experts_rows, as_json)


@app.command()
def attention(
    tokens: Annotated[
        str, typer.Option(metavar="T,..", help="Tokens of the prompt, or of a piece of it.")
    ] = "512,2048",
    context: Annotated[
        str, typer.Option(metavar="C,..", help="Tokens of the context, these among them; shorter ones are left out.")
    ] = "512,2048,16384",
    kv_dtype: Annotated[
        str, typer.Option(metavar="NAME,..", help="Dtypes of keys and values: bfloat16, int8.")
    ] = "bfloat16,int8",
    threads: ThreadsOption = "1,2",
    seconds: Annotated[float, typer.Option(min=0, help="Time per provider and case.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Measure attention of one sequence in a layer of Qwen3.5-0.8B in bf16, with torch's as the baseline."""
    dtypes = kv_dtype.split(",")
    if unknown := set(dtypes) - {"bfloat16", "int8"}:
        raise typer.BadParameter(f"expected bfloat16 or int8, got {min(unknown)!r}", param_hint="--kv-dtype")
    sizes, contexts = parse_counts(tokens, "--tokens"), parse_counts(context, "--context")
    counts = parse_counts(threads, "--threads")
    torch.manual_seed(0)
    cases = [
        (size, rows, dtype, count)
        for count in counts
        for size in sizes
        for rows in contexts
        if rows >= size
        for dtype in dtypes
    ]
    show(_measured(lambda: AttentionBenchmark(seconds=seconds), cases), print_attention_rows, as_json)


if __name__ == "__main__":
    app()
