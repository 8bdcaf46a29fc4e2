# SPDX-License-Identifier: Apache-2.0
"""zentorch. Its states are [S, HV, V, K]; slot 0 means padding to it."""

from pathlib import Path

import torch

from kernels.cases import DecodeCase, PrefillCase, VerifyCase
from kernels.compare import Provider
from peers import OUT_TOLERANCE, STATE_TOLERANCE

REQUIREMENT = "zentorch==2.13.0.2"
NAME = "zentorch 2.13.0.2"


def load(folder: Path) -> str:
    torch.ops.load_library(folder / "zentorch" / "libzentorch.so")
    return NAME


def _behind_slot_0(pool: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros_like(pool[:1]), pool))


def decode(case: DecodeCase) -> list[Provider]:
    gates = case.gates
    pool = _behind_slot_0(case.pool.make())
    slots = [case.pool.slots(i) + 1 for i in range(case.pool.parts)]
    out = torch.empty(case.batch, 1, *case.v.shape[1:], dtype=case.v.dtype)

    def call(i: int) -> None:
        torch.ops.zentorch.gdn_fused_recurrent_gated_delta_rule_packed_decode(
            case.mixed_qkv,
            gates.a,
            gates.b,
            gates.A_log,
            gates.dt_bias,
            case.q.shape[-1] ** -0.5,
            pool,
            out,
            slots[i % len(slots)],
            True,
        )

    return [Provider(NAME, call, lambda: (out[:, 0], pool[1 : case.batch + 1]), OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(case: VerifyCase) -> list[Provider]:
    gates = case.gates
    pool = _behind_slot_0(case.pool.make())
    tables = [case.indices(i) + 1 for i in range(case.pool.parts)]
    out = torch.empty(0)

    def call(i: int) -> None:
        nonlocal out
        out = torch.ops.zentorch.gdn_fused_sigmoid_gating_delta_rule_update(
            gates.A_log,
            gates.a[None],
            gates.b[None],
            gates.dt_bias,
            case.q[None],
            case.k[None],
            case.v[None],
            1.0,
            20.0,
            case.q.shape[-1] ** -0.5,
            pool,
            case.cu_seqlens,
            tables[i % len(tables)],
            case.num_accepted,
            True,
        )

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return out.view_as(case.v), pool[1 : len(case.q) + 1]

    return [Provider(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def prefill(case: PrefillCase) -> list[Provider]:
    if case.dtype != torch.bfloat16:
        return []
    zen = torch.ops.zentorch
    pool = case.make_pool()
    results: tuple[torch.Tensor, torch.Tensor] = (pool, pool)

    def call(_: int) -> None:
        nonlocal results
        results = zen.gdn_chunk_gated_delta_rule_fwd(
            zen.gdn_l2norm_fwd(case.q[None].contiguous(), 1e-6),
            zen.gdn_l2norm_fwd(case.k[None].contiguous(), 1e-6),
            case.v[None],
            case.gates.g[None],
            case.gates.beta[None],
            case.q.shape[-1] ** -0.5,
            torch.zeros_like(pool),
            True,
            64,
            case.cu_seqlens,
            case.chunk.chunk_indices_chunk64,
            case.chunk.chunk_offsets_chunk64,
        )

    return [Provider(NAME, call, lambda: (results[0][0], results[1]), OUT_TOLERANCE, STATE_TOLERANCE)]
