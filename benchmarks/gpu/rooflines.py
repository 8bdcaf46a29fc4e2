# SPDX-License-Identifier: Apache-2.0
"""Rates that a kernel cannot exceed on this device: a copy, a product of matrices, and a stream over indexed states."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.replay import time_replays

_COPY_BYTES = 2**32
_GEMM_SIZE = 8192
# Rows of a state that a program takes, and its warps; the roofline is the fastest for the case.
_TILES = ((8, 1), (32, 4), (64, 4))


@dataclass(frozen=True)
class Device:
    copy_gb_s: float  # bytes read and written
    gemm_tflop_s: float  # bf16, f32 sums


def measure_device() -> Device:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Eager: a copy in a graph is a node of its own kind, which is slower.
    start, *_, end = events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    target.copy_(source)
    for event in events:
        event.record()
        target.copy_(source)
    end.synchronize()
    copy_ms = start.elapsed_time(end) / (len(events) - 1)
    del source, target
    factors = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE, device="cuda").bfloat16().unbind()
    product = torch.empty_like(factors[0])
    gemm = time_replays(lambda _: torch.mm(*factors, out=product), parts=5)
    return Device(copy_gb_s=2 * _COPY_BYTES / copy_ms / 1e6, gemm_tflop_s=2 * _GEMM_SIZE**3 / gemm.median / 1e6)


@triton.jit
def _stream(pool, table, slots: tl.constexpr, elements: tl.constexpr, tile: tl.constexpr):
    sequence = tl.program_id(1)
    offset = tl.program_id(0) * tile + tl.arange(0, tile)
    first = tl.load(table + sequence * slots).to(tl.int64)
    x = tl.load(pool + first * elements + offset).to(tl.float32) * 0.999
    for t in tl.static_range(slots):
        slot = tl.load(table + sequence * slots + t).to(tl.int64)
        tl.store(pool + slot * elements + offset, x.to(pool.dtype.element_ty))


def time_stream(pool: Tensor, tables: Tensor) -> float:
    """Return the median microseconds of reading the state of the first slot of each row of a table `[R, N, L]` and
    writing it to all of its slots: `rmw` for L = 1, the floor of a verification that keeps every state otherwise."""
    parts, sequences, slots = tables.shape
    elements, K = pool[0].numel(), pool.shape[-1]

    def call(i: int, rows: int, warps: int) -> None:
        tile = rows * K
        _stream[(elements // tile, sequences)](pool, tables[i], slots, elements, tile, num_warps=warps)

    return min(
        time_replays(lambda i, rows=rows, warps=warps: call(i, rows, warps), parts).median for rows, warps in _TILES
    )
