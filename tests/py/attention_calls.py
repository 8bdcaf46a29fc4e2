# SPDX-License-Identifier: Apache-2.0
"""Calls of paged_attention and moe_experts, with what they must compute in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xgdn import ops


def int8_rows(x: Tensor) -> Tensor:
    """Rows `[..., D]` as a cache of int8 holds them, `[..., D + 4]`."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = largest / torch.tensor(127.0)
    codes = (x * (torch.tensor(127.0) / largest)).round()
    zero, special = largest < 2**-100, ~largest.isfinite()
    codes = codes.masked_fill(zero | special, 0).to(torch.int8)
    return torch.cat([codes, scale.masked_fill(zero, 0).masked_fill(special, torch.nan).view(torch.int8)], -1)


def from_int8_rows(rows: Tensor) -> Tensor:
    """What they stand for, in float64."""
    return rows[..., :-4].double() * rows[..., -4:].contiguous().view(torch.float32).double()


@dataclass
class AttentionCall:
    """Sequences of (tokens of this call, context with them); the cache is NaN outside their contexts."""

    sequences: tuple[tuple[int, int], ...]
    HQ: int = 4
    HKV: int = 2
    D: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    strided: bool = False
    scale: float | None = None
    q_size: float = 1.0  # of a component of q; where it is large, few rows have all the weight
    int8: bool = False  # of the cache

    def __str__(self) -> str:
        parts = ["+".join(f"{t}of{c}" for t, c in self.sequences), f"{self.HQ}to{self.HKV}", f"D{self.D}"]
        parts += [f"B{self.block_size}", str(self.dtype).removeprefix("torch.")]
        parts += ["strided"] * self.strided + ["scale"] * (self.scale is not None) + ["int8"] * self.int8
        return "-".join(parts + ([f"q{self.q_size:g}"] if self.q_size != 1 else []))

    @property
    def bound(self) -> float:
        """The error of a score, which is the relative one of its weight, grows with the score."""
        return ROUNDING[self.dtype] * max(1.0, self.q_size)

    def make(self) -> AttentionCall:
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        num_blocks = sum(counts) + 3
        self.blocks = torch.randperm(num_blocks)[: sum(counts)].int().split(counts)
        shape = (num_blocks, self.block_size, self.HKV, self.D)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2))
        self.rows = []
        for blocks, (_, context) in zip(self.blocks, self.sequences, strict=True):
            row = (blocks.unsqueeze(1) * self.block_size + torch.arange(self.block_size)).flatten()[:context]
            self.rows.append(row)
            for pool in (self.k, self.v):
                pool.flatten(0, 1)[row.long()] = torch.randn(context, self.HKV, self.D).to(self.dtype)
        if self.int8:  # codes without a meaning behind a scale of NaN
            self.k, self.v = (int8_rows(pool) for pool in (self.k, self.v))
        T = sum(t for t, _ in self.sequences)
        wide = (self.q_size * torch.randn(T, self.HQ, 2 * self.D)).to(self.dtype)
        self.q = wide[..., : self.D] if self.strided else wide[..., : self.D].contiguous()
        return self

    def alone(self, n: int) -> AttentionCall:
        """Sequence n of this call, over the same cache."""
        call = replace(self, sequences=(self.sequences[n],))
        call.k, call.v, call.blocks, call.rows = self.k, self.v, (self.blocks[n],), [self.rows[n]]
        call.q = self.q.split([t for t, _ in self.sequences])[n]
        return call

    def numbers(self, pool: Tensor) -> Tensor:
        return from_int8_rows(pool) if self.int8 else pool.double()

    def lengths(self) -> tuple[Tensor, Tensor]:
        """context_lens and cu_seqlens."""
        context_lens = torch.tensor([context for _, context in self.sequences], dtype=torch.int32)
        ends = torch.tensor([t for t, _ in self.sequences]).cumsum(0)
        return context_lens, torch.cat([torch.zeros(1), ends]).int()

    def block_table(self) -> Tensor:
        """A column that is none of the table's, then the blocks; what no context needs is out of range."""
        table = torch.full((len(self.blocks), 2 + max(map(len, self.blocks))), -7, dtype=torch.int32)
        for row, blocks in zip(table, self.blocks, strict=True):
            row[1 : 1 + len(blocks)] = blocks
        return table

    def run(
        self, device: str = "cpu", *, with_rows: bool = True, with_lengths: bool = True, backend: str = "auto"
    ) -> Tensor:
        out = torch.full((*self.q.shape,), torch.nan, dtype=self.dtype).to(device)
        q = self.q.to(device)
        if self.strided:
            q = torch.cat([q, torch.full_like(q, torch.nan)], -1)[..., : self.D]
        context_lens, cu_seqlens = self.lengths()
        ops.paged_attention(
            q,
            self.k.to(device),
            self.v.to(device),
            block_table=self.block_table().to(device)[:, 1:],
            context_lens=context_lens.to(device),
            cu_seqlens=cu_seqlens.to(device),
            out=out,
            context_rows=torch.cat(self.rows).int().to(device) if with_rows else None,
            cu_seqlens_cpu=cu_seqlens if with_lengths else None,
            context_lens_cpu=context_lens if with_lengths else None,
            scale=self.scale,
            backend=backend,
        )
        return out.cpu()

    def expected(self) -> Tensor:
        parts, begin = [], 0
        for row, (t, context) in zip(self.rows, self.sequences, strict=True):
            k, v = (
                self.numbers(pool).flatten(0, 1)[row.long()].repeat_interleave(self.HQ // self.HKV, 1)
                for pool in (self.k, self.v)
            )
            q = self.q[begin : begin + t].double() * (self.D**-0.5 if self.scale is None else self.scale)
            logits = torch.einsum("thd,chd->htc", q, k)
            hidden = torch.ones(t, context, dtype=torch.bool).triu(context - t + 1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            parts.append(torch.einsum("htc,chd->thd", weights, v))
            begin += t
        return torch.cat(parts)


@dataclass
class ExpertsCall:
    """Tokens that each choose A of E experts."""

    T: int
    E: int = 6
    A: int = 2
    D: int = 64
    I: int = 32  # noqa: E741
    dtype: torch.dtype = torch.bfloat16
    only: tuple[int, ...] | None = None  # the experts that are ever chosen
    strided: bool = False  # rows of x lie apart

    def __str__(self) -> str:
        parts = [f"T{self.T}", f"{self.A}of{self.E}", f"D{self.D}", f"I{self.I}"]
        parts += [str(self.dtype).removeprefix("torch.")]
        parts += [] if self.only is None else ["only" + "_".join(map(str, self.only))]
        return "-".join(parts + ["strided"] * self.strided)

    def make(self) -> ExpertsCall:
        known = torch.tensor(range(self.E) if self.only is None else self.only)
        self.x = torch.randn(self.T, self.D + 3 * self.strided).to(self.dtype)[:, : self.D]
        self.weights = torch.rand(self.T, self.A).to(self.dtype)
        choices = [known[torch.randperm(len(known))[: self.A]] for _ in range(self.T)]
        self.chosen = torch.stack(choices) if choices else torch.empty(0, self.A, dtype=torch.int64)
        self.gate_up = (torch.randn(self.E, 2 * self.I, self.D) / self.D**0.5).to(self.dtype)
        self.down = (torch.randn(self.E, self.D, self.I) / self.I**0.5).to(self.dtype)
        return self

    def run(self, device: str = "cpu", backend: str = "auto") -> Tensor:
        out = torch.full((self.T, self.D), torch.nan, dtype=self.dtype).to(device)
        tensors = (self.x, self.weights, self.chosen, self.gate_up, self.down)
        ops.moe_experts(*(t.to(device) for t in tensors), out=out, backend=backend)
        return out.cpu()

    def expected(self) -> Tensor:
        x, weights, gate_up, down = (t.double() for t in (self.x, self.weights, self.gate_up, self.down))
        out = torch.zeros(self.T, self.D, dtype=torch.float64)
        for t in range(self.T):
            for a in range(self.A):
                gate, up = (gate_up[self.chosen[t, a]] @ x[t]).chunk(2)
                out[t] += weights[t, a] * (down[self.chosen[t, a]] @ (F.silu(gate) * up))
        return out


# One token with contexts around the tile of 16 rows in which the CPU kernel reads them.
DECODE = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 33), (1, 130))
MIXED = ((8, 8), (9, 9), (1, 40), (8, 50), (9, 30), (20, 20), (2, 17))
# Around the tiles and the blocks of queries of the CPU kernel, whole prompts and pieces of them.
PROMPTS = tuple((t, t) for t in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129, 300))
PIECES = ((65, 300), (7, 71), (64, 128), (100, 163), (1, 300), (9, 0), (33, 97))

ATTENTION = [
    AttentionCall(((1, 1),)),
    AttentionCall(((1, 17), (1, 1), (1, 16), (1, 40))),  # decode
    AttentionCall(((5, 5), (33, 33), (1, 1))),  # prompts
    AttentionCall(((4, 30), (16, 16), (7, 64))),  # pieces of prompts
    AttentionCall(((1, 20), (3, 9), (18, 18), (1, 3)), block_size=8),  # all of them
    AttentionCall(((2, 5), (0, 7), (3, 3))),
    AttentionCall(((3, 21), (1, 9)), HQ=8, HKV=1),
    AttentionCall(((3, 21), (1, 9)), HQ=3, HKV=3),
    AttentionCall(((3, 21), (1, 9)), HQ=6, HKV=2, D=256),
    AttentionCall(((3, 21), (1, 9)), strided=True),
    AttentionCall(((3, 21), (1, 9)), scale=0.3),
    AttentionCall(((3, 21), (1, 9)), dtype=torch.float32),
    AttentionCall(((3, 21), (1, 9)), dtype=torch.float16),
    *(
        AttentionCall(DECODE, HQ=HQ, HKV=2, D=D, block_size=block_size, dtype=dtype)
        for HQ, D, block_size in ((2, 64, 16), (8, 256, 1), (16, 80, 16))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
    AttentionCall(MIXED, HQ=8, D=64),
    AttentionCall(MIXED, HQ=16, D=80, block_size=1, strided=True),
    AttentionCall(MIXED, D=40, dtype=torch.float16),
    *(
        AttentionCall(sequences, HQ=HQ, HKV=2, D=D, block_size=block_size, dtype=dtype)
        for sequences in (PROMPTS, PIECES)
        for HQ, D, block_size, dtype in (
            (2, 64, 16, torch.float16),
            (4, 128, 7, torch.float32),
            (8, 256, 16, torch.bfloat16),
            (16, 64, 48, torch.float32),
        )
    ),
    AttentionCall(PIECES, HQ=30, HKV=1, D=20, strided=True),
    *(AttentionCall(DECODE, D=64, dtype=dtype, q_size=30) for dtype in (torch.float32, torch.bfloat16)),
    *(
        AttentionCall(sequences, HQ=HQ, HKV=2, D=D, block_size=block_size, dtype=dtype, int8=True)
        for sequences in (DECODE, MIXED, PROMPTS, PIECES)
        for HQ, D, block_size, dtype in (
            (2, 64, 16, torch.float16),
            (4, 20, 7, torch.float32),
            (8, 256, 1, torch.bfloat16),
        )
    ),
    AttentionCall(PIECES, HQ=30, HKV=1, D=68, strided=True, int8=True),
    AttentionCall(DECODE, D=64, dtype=torch.float32, q_size=30, int8=True),
]

EXPERTS = [
    ExpertsCall(1),
    ExpertsCall(9),
    ExpertsCall(0),
    ExpertsCall(40, E=8, A=4),
    ExpertsCall(7, A=1),
    ExpertsCall(7, E=5, A=5),
    ExpertsCall(9, only=(5, 1)),
    *(
        ExpertsCall(T, E=E, A=A, D=D, I=width, dtype=dtype, only=only, strided=strided)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for T, E, A, D, width, only, strided in (
            (9, 6, 2, 64, 32, None, False),
            (5, 6, 3, 48, 24, None, True),
            (35, 3, 1, 96, 64, (2,), True),  # all tokens to one
            (300, 4, 2, 64, 96, (0, 3), False),
        )
    ),
]

# Attention rounds the probabilities and the sum; a mixture each product, the activation, and each weighted sum.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
