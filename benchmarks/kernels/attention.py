# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged cache in bf16 or int8, with torch's over gathered contexts in bf16 as the baseline."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import xgdn
from kernels.compare import WrongResult, relative_error
from xgdn.bench.turns import take_turns

# A full-attention layer of Qwen3.5-0.8B.
HQ, HKV, D = 8, 2, 256
BLOCK_SIZE = 16
# Rounding out to bf16 costs 1.7e-3, rounding the weights, where tiles do, 0.8e-3; beside int8 more, since there the
# scales of the values come to the weights behind the sum that divides them.
_TOLERANCES = {"bfloat16": 2.5e-3, "int8": 3e-3}
_CHECKED = 4  # tokens at either end


@dataclass(frozen=True)
class AttentionRow:
    """One sequence; times in microseconds."""

    tokens: int
    context: int
    kv_dtype: str
    threads: int
    min: float
    median: float
    torch_min: float
    torch_median: float
    error: float  # ||got - truth|| / ||truth||

    @property
    def gflops(self) -> float:
        """GFLOP/s of the median, without what the mask hides."""
        pairs = self.tokens * (self.context - (self.tokens - 1) / 2)
        return 4e-3 * HQ * D * pairs / self.median

    @property
    def ratio(self) -> float:
        """Speedup over torch: its median time over xgdn's."""
        return self.torch_median / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "gflops": self.gflops, "ratio": self.ratio}


class AttentionBenchmark:
    def __init__(self, *, seconds: float = 1.0) -> None:
        """`seconds` is the time for each of xgdn and torch."""
        self._seconds = seconds

    def run(self, tokens: int, context: int, kv_dtype: str, threads: int) -> AttentionRow:
        """Raises WrongResult where xgdn's attention is further from float64 than rounding takes it."""
        torch.set_num_threads(threads)
        num_blocks = -(-context // BLOCK_SIZE)
        k, v = torch.randn(2, num_blocks, BLOCK_SIZE, HKV, D).bfloat16()
        table = torch.randperm(num_blocks).int()
        caches = {"auto": (k, v) if kv_dtype == "bfloat16" else _as_int8(k, v), "reference": (k, v)}
        q = torch.randn(tokens, HQ, D).bfloat16()
        context_lens = torch.tensor([context], dtype=torch.int32)
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)

        def attend(backend: str) -> Tensor:
            return xgdn.ops.paged_attention(
                q,
                *caches[backend],
                block_table=table.unsqueeze(0),
                context_lens=context_lens,
                cu_seqlens=cu_seqlens,
                backend=backend,
            )

        checked = sorted({*range(min(_CHECKED, tokens)), *range(max(tokens - _CHECKED, 0), tokens)})
        rows = [_numbers(pool[table.long()].flatten(0, 1)[:context]) for pool in caches["auto"]]
        truth = torch.stack(
            [_truth(q[t].double(), *(pool[: context - tokens + 1 + t] for pool in rows)) for t in checked]
        )
        error = relative_error(attend("auto")[checked], truth)
        if not error <= _TOLERANCES[kv_dtype]:
            raise WrongResult(
                f"attention of {tokens} tokens: expected an error of at most {_TOLERANCES[kv_dtype]}, got {error:.1e}"
            )
        # The composition of ATen copies the context, makes the mask and calls scaled_dot_product_attention.
        ours, theirs = take_turns([lambda _: attend("auto"), lambda _: attend("reference")], self._seconds)
        return AttentionRow(
            tokens=tokens,
            context=context,
            kv_dtype=kv_dtype,
            threads=threads,
            min=min(ours),
            median=statistics.median(ours),
            torch_min=min(theirs),
            torch_median=statistics.median(theirs),
            error=error,
        )


def _as_int8(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The caches `[P, B, HKV, D + 4]` of keys and values `[P, B, HKV, D]`."""
    caches = torch.empty(2, *k.shape[:-1], D + 4, dtype=torch.int8).unbind()
    slots = torch.arange(k[..., 0, 0].numel(), dtype=torch.int32)
    xgdn.ops.store_kv(k.flatten(0, 1), v.flatten(0, 1), *caches, slot_mapping=slots)
    return caches


def _numbers(rows: Tensor) -> Tensor:
    """What rows of a cache stand for, in float64."""
    if rows.dtype != torch.int8:
        return rows.double()
    return rows[..., :D].double() * rows[..., D:].contiguous().view(torch.float32).double()


def _truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token's result `[HQ, D]` from `[HQ, D]` and rows `[context, HKV, D]`."""
    k, v = (rows.repeat_interleave(HQ // HKV, 1) for rows in (k, v))
    weights = torch.einsum("hd,chd->hc", q, k).mul(D**-0.5).softmax(-1)
    return torch.einsum("hc,chd->hd", weights, v)
