# SPDX-License-Identifier: Apache-2.0
"""Decode and prefill of the delta rule beside their roofs and beside transformers, measured in one run.

    python benchmarks/bench_ops.py [--decode 1 8 32 128] [--prefill 512 2048 8192] [--threads 1 2] [--backend cpu]

Every line is preceded by a check against the float64 recurrence (of longer prompts: a prompt of 1024 tokens). The
contestants take turns, call by call; times are the minimum and the median. Decode's states rotate over at least
--rotate-mib of memory, so that they come from DRAM.

The roofs: for decode an in-place `x.mul_(c)` over as many bytes as the states have; for prefill the least number of
flops of the chunk form (122,880 per token and value head at K = V = 128, C = 64) at the rate of a bf16 matmul.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import xgdn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "py"))
import reference  # noqa: E402  (the tests' float64 recurrence)

H, HV, K, V = 16, 32, 128, 128  # Qwen3-Next-80B, Qwen3.5-35B
CONV_WIDTH = 4
VERIFIED = 4  # tokens that a sequence verifies
PREFILL_FLOPS_PER_TOKEN = HV * 122_880
LONGEST_CHECK = 1024  # tokens of a prompt that are compared with the float64 recurrence
CHECK_PIECE = 64
TOLERANCE = 4e-3  # bf16 inputs and outputs
STATE_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


# ---- measuring -------------------------------------------------------------------------------------------------------


class Times:
    """Microseconds of one contestant's calls."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def take_turns(contestants: dict[str, tuple[Callable[[int], object], int]]) -> dict[str, Times]:
    """Calls f(i) of each (f, how often) in turn, i = 0, 1, ..., after one call to warm up."""
    times = {name: Times() for name in contestants}
    for call, _ in contestants.values():
        call(0)
    for i in range(max(often for _, often in contestants.values())):
        for name, (call, often) in contestants.items():
            if i >= often:
                continue
            start = time.perf_counter()
            call(i + 1)
            times[name].samples.append((time.perf_counter() - start) * 1e6)
    return times


def matmul_flops_per_second(size: int = 2048) -> float:
    x, y = (torch.randn(size, size).bfloat16() for _ in range(2))
    times = take_turns({"matmul": (lambda _: x @ y, 10)})
    return 2 * size**3 / (times["matmul"].min * 1e-6)


# ---- inputs ----------------------------------------------------------------------------------------------------------


class Tokens:
    """`count` tokens as a layer hands them over: bf16, f32 gates."""

    def __init__(self, count: int) -> None:
        self.q = torch.randn(count, H, K).bfloat16()
        self.k = torch.randn(count, H, K).bfloat16()
        self.v = torch.randn(count, HV, V).bfloat16()
        self.g = -torch.rand(count, HV)
        self.beta = torch.rand(count, HV)

    def packed(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def batched(self, batch: int) -> tuple[Tensor, ...]:
        """transformers' layout: [B, T / B, ...]."""
        return tuple(x.unflatten(0, (batch, -1)) for x in self.packed())


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def recurrence(tokens: Tokens, rows: range, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and last state in float64, in pieces: the reference keeps the state of every token."""
    outs = []
    for begin in range(rows.start, rows.stop, CHECK_PIECE):
        piece = slice(begin, min(begin + CHECK_PIECE, rows.stop))
        out, states = reference.gated_delta_rule(*(x[piece] for x in tokens.packed()), state)
        outs.append(out)
        state = states[-1]
    return torch.cat(outs), state


def check_against_recurrence(name: str, tokens: Tokens, lengths: list[int], before: Tensor, out: Tensor, after: Tensor):
    """Leaves the program when one sequence's outputs or state are off."""
    begin = 0
    for n, length in enumerate(lengths):
        rows = range(begin, begin + length)
        want_out, want_state = recurrence(tokens, rows, before[n])
        errors = relative_error(out[rows.start : rows.stop], want_out), relative_error(after[n], want_state)
        if not (errors[0] <= TOLERANCE and errors[1] <= STATE_TOLERANCE[after.dtype]):
            sys.exit(
                f"{name}: sequence {n} differs from the float64 recurrence: out {errors[0]:.1e}, S {errors[1]:.1e}"
            )
        begin += length


# ---- decode ----------------------------------------------------------------------------------------------------------


def bench_decode(batch: int, state_dtype: torch.dtype, threads: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(threads)
    slot_bytes = HV * V * K * state_dtype.itemsize
    batches = max(2, -(-args.rotate_mib * 2**20 // (batch * slot_bytes)))
    state = torch.randn(batches * batch, HV, V, K).to(state_dtype)
    stream = torch.ones(batches, batch * slot_bytes // 4)
    slots = torch.arange(batches * batch, dtype=torch.int32).unflatten(0, (batches, batch)).unbind()
    tokens = Tokens(batch)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32)
    out = torch.empty_like(tokens.v)

    def ours(i: int) -> None:
        xgdn.ops.recurrent_gated_delta_rule(
            *tokens.packed(),
            state,
            cu_seqlens=cu_seqlens,
            state_indices=slots[i % batches],
            out=out,
            backend=args.backend,
        )

    before = state[:batch].clone()
    ours(0)
    check_against_recurrence("decode", tokens, [1] * batch, before, out, state[:batch])

    often = max(8, int(args.seconds * 1e6 / (150 * batch)))
    contestants: dict[str, tuple[Callable[[int], object], int]] = {
        "ours": (ours, often),
        "roof": (lambda i: stream[i % batches].mul_(1.0001), often),
    }
    if state_dtype == torch.float32 and args.transformers:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

        theirs = tokens.batched(batch)
        contestants["transformers"] = (
            # Its state is [K, V]; the times do not depend on what is in it.
            lambda i: torch_recurrent_gated_delta_rule(
                *theirs,
                initial_state=state[(i % batches) * batch :][:batch],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            ),
            min(often, 3 if batch >= 32 else 20),
        )
    times = take_turns(contestants)
    print_row(
        op=("recurrent_gated_delta_rule", f"B={batch}", short(state_dtype), threads),
        times=times,
        rate=f"{2 * batch * slot_bytes / times['ours'].median / 1e3:.1f} GB/s",
        roof=(times["roof"].min, times["roof"].median),
    )


class Layer:
    """What a layer hands to its decode step, with pools that rotate through the memory of --rotate-mib."""

    def __init__(self, batch: int, state_dtype: torch.dtype, rotate_mib: int) -> None:
        slot_bytes = HV * V * K * state_dtype.itemsize
        self.batches = max(2, -(-rotate_mib * 2**20 // (batch * slot_bytes)))
        slots = torch.arange(self.batches * batch, dtype=torch.int32)
        self.slots = slots.unflatten(0, (self.batches, batch)).unbind()
        self.stream = torch.ones(self.batches, batch * slot_bytes // 4)
        self.state = torch.randn(len(slots), HV, V, K).to(state_dtype)
        channels = 2 * H * K + HV * V
        self.conv_state = torch.randn(len(slots), CONV_WIDTH - 1, channels).bfloat16()
        self.conv_weight = (0.5 * torch.randn(channels, CONV_WIDTH)).bfloat16()
        self.projected = torch.randn(batch, channels + HV * V + 2 * HV).bfloat16()
        self.mixed_qkv, self.z, self.b, self.a = self.projected.split([channels, HV * V, HV, HV], 1)
        self.A_log, self.dt_bias = torch.randn(HV), torch.randn(HV)
        self.norm_weight = torch.randn(V)
        self.out = torch.empty(batch, HV, V, dtype=torch.bfloat16)
        self.cu_seqlens = torch.arange(batch + 1, dtype=torch.int32)

    def step(self, i: int, backend: str) -> Tensor:
        return xgdn.ops.gdn_decode_step(
            self.projected,
            self.conv_weight,
            self.conv_state,
            self.A_log,
            self.dt_bias,
            self.state,
            self.norm_weight,
            state_indices=self.slots[i % self.batches],
            cu_seqlens=self.cu_seqlens,
            out=self.out,
            backend=backend,
        )

    def rule(self, i: int, mixed_qkv: Tensor, backend: str) -> Tensor:
        return xgdn.ops.packed_decode(
            mixed_qkv,
            self.a,
            self.b,
            self.A_log,
            self.dt_bias,
            self.state,
            state_indices=self.slots[i % self.batches],
            out=self.out,
            backend=backend,
        )

    def op_by_op(self, i: int, backend: str) -> Tensor:
        mixed_qkv = xgdn.ops.causal_conv1d_update(
            self.mixed_qkv,
            self.conv_weight,
            self.conv_state,
            cu_seqlens=self.cu_seqlens,
            state_indices=self.slots[i % self.batches],
            backend=backend,
        )
        o, z = self.rule(i, mixed_qkv, backend), self.z.unflatten(1, (HV, V))
        return xgdn.ops.rms_norm_gated(o, z, self.norm_weight, out=self.out, backend=backend)


def bench_decode_step(batch: int, state_dtype: torch.dtype, threads: int, args: argparse.Namespace) -> None:
    """Between the projections of a layer; the roof is the stream over the states, as for the rule alone."""
    torch.set_num_threads(threads)
    layer = Layer(batch, state_dtype, args.rotate_mib)
    often = max(8, int(args.seconds * 1e6 / (150 * batch)))
    apart = max(1, layer.batches // 3)  # so that none finds in the cache what another has just read
    contestants: dict[str, tuple[Callable[[int], object], int]] = {
        "ours": (lambda i: layer.step(i, args.backend), often),
        "rule": (lambda i: layer.rule(i + apart, layer.mixed_qkv, args.backend), often),
        "op by op": (lambda i: layer.op_by_op(i + 2 * apart, args.backend), often),
        "roof": (lambda i: layer.stream[i % layer.batches].mul_(1.0001), often),
    }
    times = take_turns(contestants)
    for name, op in (("ours", "gdn_decode_step"), ("rule", "packed_decode"), ("op by op", "conv + rule + norm")):
        print_row(
            op=(op, f"B={batch}", short(state_dtype), threads),
            times={"ours": times[name]},
            rate=f"{times[name].median / times['rule'].median:.2f}x rule",
            roof=(times["roof"].min, times["roof"].median),
        )


def bench_verify(batch: int, state_dtype: torch.dtype, threads: int, args: argparse.Namespace) -> None:
    """Every sequence verifies VERIFIED tokens and writes all their states; the roof reads one and writes them all."""
    torch.set_num_threads(threads)
    slot_bytes = HV * V * K * state_dtype.itemsize
    batches = max(2, -(-args.rotate_mib * 2**20 // (batch * VERIFIED * slot_bytes)))
    state = torch.randn(batches * batch * VERIFIED, HV, V, K).to(state_dtype)
    pool = torch.ones(batches, batch, VERIFIED, slot_bytes // 4)
    tables = torch.arange(len(state), dtype=torch.int32).view(batches, batch, VERIFIED).unbind()
    tokens = Tokens(batch * VERIFIED)
    arguments = {
        "cu_seqlens": VERIFIED * torch.arange(batch + 1, dtype=torch.int32),
        "num_accepted": torch.ones(batch, dtype=torch.int32),
        "out": torch.empty_like(tokens.v),
        "backend": args.backend,
    }

    def ours(i: int) -> None:
        table = tables[i % batches]
        xgdn.ops.recurrent_gated_delta_rule(*tokens.packed(), state, state_indices=table, **arguments)

    def roof(i: int) -> None:
        written = pool[i % batches]
        for sequence in written:
            torch.mul(sequence[0], 1.0001, out=sequence[0])
            for slot in sequence[1:]:
                slot.copy_(sequence[0])

    before = state[0 : batch * VERIFIED : VERIFIED].clone()
    ours(0)
    after = state[VERIFIED - 1 : batch * VERIFIED : VERIFIED]
    check_against_recurrence("verify", tokens, [VERIFIED] * batch, before, arguments["out"], after)
    often = max(8, int(args.seconds * 1e6 / (600 * batch)))
    times = take_turns({"ours": (ours, often), "roof": (roof, often)})
    print_row(
        op=("recurrent_gated_delta_rule", f"B={batch} T={VERIFIED}", short(state_dtype), threads),
        times=times,
        rate=f"{(1 + VERIFIED) * batch * slot_bytes / times['ours'].median / 1e3:.1f} GB/s",
        roof=(times["roof"].min, times["roof"].median),
    )


# ---- prefill ---------------------------------------------------------------------------------------------------------


class Prefill:
    """A prompt that starts from nothing, called as a layer calls it."""

    def __init__(self, length: int, backend: str) -> None:
        self.tokens = Tokens(length)
        self.state = torch.full((1, HV, V, K), torch.nan)
        self.out = torch.empty_like(self.tokens.v)
        self.arguments = {
            "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
            "state_indices": torch.zeros(1, dtype=torch.int32),
            "chunk": xgdn.ops.build_chunk_metadata([length], HV),
            "has_initial_state": torch.tensor([False]),
            "out": self.out,
            "backend": backend,
        }

    def run(self) -> None:
        xgdn.ops.chunk_gated_delta_rule(*self.tokens.packed(), self.state, **self.arguments)


def bench_prefill(length: int, threads: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(threads)
    checked = Prefill(min(length, LONGEST_CHECK), args.backend)
    checked.run()
    zeros = torch.zeros_like(checked.state)
    check_against_recurrence("prefill", checked.tokens, [len(checked.tokens.q)], zeros, checked.out, checked.state)

    ours = Prefill(length, args.backend)
    often = max(3, int(args.seconds * 1e6 / (60 * length)))
    contestants: dict[str, tuple[Callable[[int], object], int]] = {"ours": (lambda _: ours.run(), often)}
    if args.transformers:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        theirs = ours.tokens.batched(1)
        contestants["transformers"] = (
            lambda _: torch_chunk_gated_delta_rule(*theirs, output_final_state=True, use_qk_l2norm_in_kernel=True),
            3,
        )
    times = take_turns(contestants)
    flops = length * PREFILL_FLOPS_PER_TOKEN
    roof = flops / matmul_flops_per_second() * 1e6
    print_row(
        op=("chunk_gated_delta_rule", f"T={length}", "f32", threads),
        times=times,
        rate=f"{flops / times['ours'].median / 1e3:.0f} GFLOP/s",
        roof=(roof, roof),
    )


# ---- printing --------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("op", 27),
    ("backend", 10),
    ("case", 10),
    ("state", 6),
    ("threads", 8),
    ("min us", 10),
    ("median us", 10),
    ("rate", 14),
    ("roof min", 10),
    ("roof median", 12),
    ("x roof", 7),
    ("transformers", 13),
    ("faster", 7),
)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def print_cells(cells: tuple[str, ...]) -> None:
    padded = (c.ljust(w) if i < 4 else c.rjust(w) for i, (c, (_, w)) in enumerate(zip(cells, COLUMNS, strict=True)))
    print(" ".join(padded), flush=True)


def print_row(op: tuple[str, str, str, int], times: dict[str, Times], rate: str, roof: tuple[float, float]) -> None:
    name, case, state, threads = op
    ours = times["ours"]
    peer = times.get("transformers")
    print_cells(
        (
            name,
            xgdn.last_backend(name) if name in xgdn.ops.__all__ else "",
            case,
            state,
            str(threads),
            f"{ours.min:,.0f}",
            f"{ours.median:,.0f}",
            rate,
            f"{roof[0]:,.0f}",
            f"{roof[1]:,.0f}",
            f"{ours.median / roof[1]:.2f}",
            f"{peer.median:,.0f}" if peer else "-",
            f"{peer.median / ours.median:.1f}x" if peer else "-",
        )
    )


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 32, 128], metavar="B", help="batch sizes")
    parser.add_argument("--verify", type=int, nargs="*", default=[8], metavar="B", help="batch sizes of verification")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048, 8192], metavar="T", help="prompt lengths")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--backend", default="auto", help="auto or a name of xgdn.available_backends()")
    parser.add_argument("--seconds", type=float, default=1.0, help="rough time per line and contestant")
    parser.add_argument("--rotate-mib", type=int, default=256, help="memory that decode's states rotate over")
    args = parser.parse_args()
    args.transformers = importlib.util.find_spec("transformers") is not None
    if args.transformers:
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns that its optional kernels are absent, which is what is compared here
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    print(f"{machine()} | torch {torch.__version__} | xgdn {commit()} | {date}")
    print(f"H={H} HV={HV} K={K} V={V}, q k v out bf16; times in us; x roof and faster compare medians")
    print_cells(tuple(name for name, _ in COLUMNS))
    for threads in args.threads:
        for state_dtype in (torch.float32, torch.bfloat16):
            for batch in args.decode:
                bench_decode(batch, state_dtype, threads, args)
                bench_decode_step(batch, state_dtype, threads, args)
            for batch in args.verify:
                bench_verify(batch, state_dtype, threads, args)
        for length in args.prefill:
            bench_prefill(length, threads, args)


if __name__ == "__main__":
    main()
