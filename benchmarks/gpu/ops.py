# SPDX-License-Identifier: Apache-2.0
"""The ops on an NVIDIA GPU, captured in CUDA graphs, against this device's own rooflines and other libraries.

    PYTHONPATH=benchmarks python -m gpu.ops [--only REGEX] [--peers fla,vllm,flashinfer,sdpa] [--json FILE]

Every provider is checked first: decode, verification and attention against float64, prompts against the op's exact
form, which itself is checked against float64 on the first tokens. Times are medians of graph replays; calls rotate over
inputs and states far larger than the L2.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from gpu.cases import (
    Attention,
    Case,
    Decode,
    DecodeStep,
    Heads,
    Prefill,
    Provider,
    ReplayDecode,
    ReplayPrefill,
    check,
    ragged,
)
from gpu.peers import PEERS
from gpu.report import device_facts, write_json
from xgdn.bench.report import print_wide
from xgdn.cli.failure import errors_in_one_line
from xgdn.cli.options import parse_counts
from xgdn.progress import Bar

app = typer.Typer(add_completion=False)

VERIFIED_BATCH, DRAFTS = 128, 4
# (heads, tokens, sequences; 0: of ragged lengths), as in docs/benchmarks.md.
PREFILL = [
    *((Heads(16, 32), 4096, n) for n in (1, 8, 0)),
    *((Heads(16, 32), 16384, n) for n in (1, 8)),
    *((Heads(16, 32), 65536, n) for n in (1, 8, 0)),
    (Heads(16, 16), 16384, 1),
    (Heads(4, 8), 4096, 1),
    (Heads(4, 8), 4096, 8),
    (Heads(4, 8), 65536, 1),
]
# (tokens, sequences) of prompts on replay states, from rings of none and of some tokens
REPLAY_PREFILL = [(4096, 1), (4096, 8), (16384, 1)]
RINGS = (0, 5)
# (sequences, tokens of each, context)
ATTENTION = [(1, 1, 16384), (32, 1, 4096), (128, 1, 2048), (1, 2048, 2048), (1, 16384, 16384)]


@dataclass(frozen=True)
class Row:
    """One provider of a case; times in microseconds."""

    case: str
    provider: str
    min: float
    median: float
    roofline: float
    limit: str  # what the roofline is: "rmw", "stream", "copy" or "gemm"
    gb_s: float
    tflop_s: float
    errors: list[float]

    @property
    def share(self) -> float:
        """Fraction of the roofline's speed."""
        return self.roofline / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def case_makers(decode: Sequence[int]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names to choose by, and functions that make the cases, one at a time."""
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in dtypes.items():
        for batch in decode:
            yield f"decode B={batch} {name}", lambda b=batch, d=dtype: Decode(b, d)
        yield f"decode B=1 4x8 {name}", lambda d=dtype: Decode(1, d, heads=Heads(4, 8))
    for name, dtype in dtypes.items():
        for batch in decode:
            yield f"decode step B={batch} {name}", lambda b=batch, d=dtype: DecodeStep(b, d)
    for name, dtype in dtypes.items():
        yield (
            f"verify T={DRAFTS} B={VERIFIED_BATCH} {name}",
            lambda d=dtype: Decode(VERIFIED_BATCH, d, tokens=DRAFTS),
        )
    for name, dtype in dtypes.items():
        for batch in decode:
            yield f"replay decode B={batch} {name}", lambda b=batch, d=dtype: ReplayDecode(b, d)
        yield (
            f"replay verify T={DRAFTS} B={VERIFIED_BATCH} {name}",
            lambda d=dtype: ReplayDecode(VERIFIED_BATCH, d, tokens=DRAFTS),
        )
    for heads, total, count in PREFILL:
        lengths = ragged(total) if count == 0 else [total // count] * count
        name = f"{total // 1024}K {f'x{count}' if count else f'ragged {len(lengths)}'}"
        yield (
            f"prefill {heads} {name}",
            lambda n=lengths, h=heads, title=name: Prefill(n, heads=h, name=title),
        )
    for name, dtype in dtypes.items():
        for total, count in REPLAY_PREFILL:
            for in_ring in RINGS:
                title = f"{total // 1024}K x{count}"
                yield (
                    f"replay prefill {Heads()} {title} {name} ring {in_ring}",
                    lambda n=[total // count] * count, d=dtype, r=in_ring, t=title: ReplayPrefill(
                        n, d, in_ring=r, name=t
                    ),
                )
    for batch, tokens, context in ATTENTION:
        yield (
            f"attention B={batch} T={tokens} C={context}",
            lambda b=batch, t=tokens, c=context: Attention(b, t, c),
        )


def limit_of(case: Case, copy_gb_s: float, gemm_tflop_s: float) -> tuple[float, str]:
    """Return the microseconds that the case's bytes or its flops take at the device's rates, and which it is."""
    by_copy, by_gemm = case.work.bytes / copy_gb_s / 1e3, case.work.flops / gemm_tflop_s / 1e6
    return (by_copy, "copy") if by_copy >= by_gemm else (by_gemm, "gemm")


class OpsBenchmark:
    def __init__(self, peers: Sequence[str], peer_seconds: float) -> None:
        """Other libraries get no further case once they have taken `peer_seconds`, compilation included."""
        from gpu import rooflines  # it needs triton, which comes with torch for CUDA

        self._rooflines = rooflines
        self.device = rooflines.measure_device()
        self._peers = list(peers)
        self._peer_seconds = peer_seconds
        self.left_out: list[str] = []
        self.without_time: list[str] = []  # cases of other libraries, one by one

    def run(self, case: Case) -> list[Row]:
        if case.streams is not None:
            roofline = self._rooflines.time_stream(case.pool, case.streams)
            limit = "rmw" if case.streams.shape[2] == 1 else "stream"
            case.reset()
        else:
            roofline, limit = limit_of(case, self.device.copy_gb_s, self.device.gemm_tflop_s)
        truth = case.truth()
        rows = [self._row(case, provider, truth, roofline, limit) for provider in case.providers()]
        for name in list(self._peers):
            start = time.monotonic()
            rows += self._peer_rows(name, case, truth, roofline, limit)
            self._peer_seconds -= time.monotonic() - start
        return rows

    def _peer_rows(
        self, name: str, case: Case, truth: Sequence[torch.Tensor], roofline: float, limit: str
    ) -> list[Row]:
        if self._peer_seconds <= 0:
            self.without_time.append(case.title)
            return []
        case.reset()  # a peer may copy its states when it is made
        try:
            return [self._row(case, provider, truth, roofline, limit) for provider in PEERS[name](case)]
        except ImportError as missing:
            self.left_out.append(f"{name}: {missing}")
            self._peers.remove(name)
        except Exception as failure:  # whatever code that is not ours may raise
            self.left_out.append(f"{case.title}, {name}: {failure}".splitlines()[0])
        return []

    def _row(self, case: Case, provider: Provider, truth: Sequence[torch.Tensor], roofline: float, limit: str) -> Row:
        from gpu.replay import time_replays

        errors = check(case, provider, truth)
        times = time_replays(provider.call, case.parts)
        return Row(
            case=case.title,
            provider=provider.name,
            min=times.min,
            median=times.median,
            roofline=roofline,
            limit=limit,
            gb_s=case.work.bytes / times.median / 1e3,
            tflop_s=case.work.flops / times.median / 1e6,
            errors=errors,
        )


def table(rows: Iterable[Row]) -> Table:
    shown = Table("case", "provider", box=None)
    for heading in ("min us", "median us", "roofline us", "limit", "of it", "GB/s", "TFLOP/s", "errors"):
        shown.add_column(heading, justify="right")
    last = None
    for row in rows:
        if last not in (None, row.case):
            shown.add_section()
        last = row.case
        shown.add_row(
            row.case,
            row.provider,
            f"{row.min:,.2f}",
            f"{row.median:,.2f}",
            f"{row.roofline:,.2f}",
            row.limit,
            f"{row.share:.2f}",
            f"{row.gb_s:,.0f}",
            f"{row.tflop_s:,.0f}" if row.tflop_s else "",
            " ".join(f"{error:.0e}" for error in row.errors),
        )
    return shown


def parse_peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(PEERS):
        raise typer.BadParameter(f"expected names among {', '.join(PEERS)}, got {min(unknown)!r}", param_hint="--peers")
    return names


@app.command()
def main(
    decode: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes of decode.")] = "1,8,32,128,256,1024",
    only: Annotated[str, typer.Option(metavar="REGEX", help="Cases to run, by a part of their name.")] = "",
    peers: Annotated[
        str, typer.Option(metavar="NAME,..", help="Other libraries; one that cannot be imported is named and left out.")
    ] = ",".join(PEERS),
    peer_seconds: Annotated[
        float, typer.Option(min=0, help="Time for all of them, after which no other case of theirs is started.")
    ] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures.")] = None,
) -> None:
    """Measure the ops on cuda tensors in the shape of Qwen3-Next-80B and of its shards."""
    chosen = [
        (name, make)
        for name, make in case_makers(parse_counts(decode, "--decode"))
        if re.search(only, name) is not None
    ]
    names = parse_peers(peers)
    torch.manual_seed(0)
    rows: list[Row] = []
    bar = Bar("measuring")
    with torch.no_grad(), errors_in_one_line():
        benchmark = OpsBenchmark(names, peer_seconds)
        try:
            for i, (_, make) in enumerate(chosen):
                bar.update(i, len(chosen))
                rows += benchmark.run(make())
                torch.cuda.empty_cache()
        finally:
            bar.hide()
    left_out = benchmark.left_out
    if benchmark.without_time:
        first, count = benchmark.without_time[0], len(benchmark.without_time)
        left_out.append(f"other libraries from {first} on, {count} in all: {peer_seconds:g} s were over")
    more = {"device": asdict(benchmark.device), "left_out": left_out}
    print("  ".join(f"{name} {value}" for name, value in {**device_facts(), **more["device"]}.items()))  # type: ignore[dict-item]
    print_wide(table(rows))
    for line in left_out:
        print(f"left out: {line}")
    if json_file is not None:
        write_json(json_file, rows, **more)


if __name__ == "__main__":
    app()
