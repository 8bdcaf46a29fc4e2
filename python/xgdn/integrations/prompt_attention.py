# SPDX-License-Identifier: Apache-2.0
"""Attention of sequences that begin, on the keys and values that have just been computed for them: a pool of as many
blocks as there are tokens, of one row each. A host keeps them in a cache of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xgdn import ops

__all__ = ["Prompts", "attend", "prompts_of"]


class Prompts(NamedTuple):
    """Tables of `paged_attention`."""

    block_table: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor


def prompts_of(cu_seqlens: Tensor, longest: int) -> Prompts:
    """Sequences between these offsets, i32 `[N + 1]`, of at most `longest` tokens."""
    rows = torch.arange(longest, dtype=torch.int32, device=cu_seqlens.device)
    return Prompts(cu_seqlens[:-1, None] + rows, cu_seqlens.diff(), cu_seqlens)


def attend(prompts: Prompts, q: Tensor, k: Tensor, v: Tensor, *, scale: float, out: Tensor | None = None) -> Tensor:
    """Causal attention of `q` `[T, HQ, D]` over `k` and `v` `[T, HKV, D]`; returns `[T, HQ, D]`."""
    return ops.paged_attention(
        q,
        k.unsqueeze(1).contiguous(),
        v.unsqueeze(1).contiguous(),
        block_table=prompts.block_table,
        context_lens=prompts.context_lens,
        cu_seqlens=prompts.cu_seqlens,
        out=out,
        scale=scale,
    )
