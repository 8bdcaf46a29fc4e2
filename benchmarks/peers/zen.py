# SPDX-License-Identifier: Apache-2.0
"""zentorch. Its states are [S, HV, V, K]; slot 0 means padding to it."""

from pathlib import Path

import torch

from peers import OUT_TOLERANCE, STATE_TOLERANCE
from xgdn.bench import Contestant, DecodeProblem, PrefillProblem, VerifyProblem

REQUIREMENT = "zentorch==2.13.0.2"
NAME = "zentorch 2.13.0.2"


def load(folder: Path) -> str:
    torch.ops.load_library(folder / "zentorch" / "libzentorch.so")
    return NAME


def _behind_slot_0(pool: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros_like(pool[:1]), pool))


def decode(problem: DecodeProblem) -> list[Contestant]:
    gates = problem.gates
    pool = _behind_slot_0(problem.pool.make())
    slots = [problem.pool.slots(i) + 1 for i in range(problem.pool.parts)]
    out = torch.empty(problem.batch, 1, *problem.v.shape[1:], dtype=problem.v.dtype)

    def call(i: int) -> None:
        torch.ops.zentorch.gdn_fused_recurrent_gated_delta_rule_packed_decode(
            problem.mixed_qkv,
            gates.a,
            gates.b,
            gates.A_log,
            gates.dt_bias,
            problem.q.shape[-1] ** -0.5,
            pool,
            out,
            slots[i % len(slots)],
            True,
        )

    return [Contestant(NAME, call, lambda: (out[:, 0], pool[1 : problem.batch + 1]), OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(problem: VerifyProblem) -> list[Contestant]:
    gates = problem.gates
    pool = _behind_slot_0(problem.pool.make())
    tables = [problem.indices(i) + 1 for i in range(problem.pool.parts)]
    out = torch.empty(0)

    def call(i: int) -> None:
        nonlocal out
        out = torch.ops.zentorch.gdn_fused_sigmoid_gating_delta_rule_update(
            gates.A_log,
            gates.a[None],
            gates.b[None],
            gates.dt_bias,
            problem.q[None],
            problem.k[None],
            problem.v[None],
            1.0,
            20.0,
            problem.q.shape[-1] ** -0.5,
            pool,
            problem.cu_seqlens,
            tables[i % len(tables)],
            problem.num_accepted,
            True,
        )

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return out.view_as(problem.v), pool[1 : len(problem.q) + 1]

    return [Contestant(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def prefill(problem: PrefillProblem) -> list[Contestant]:
    if problem.dtype != torch.bfloat16:
        return []
    zen = torch.ops.zentorch
    pool = problem.make_pool()
    results: tuple[torch.Tensor, torch.Tensor] = (pool, pool)

    def call(_: int) -> None:
        nonlocal results
        results = zen.gdn_chunk_gated_delta_rule_fwd(
            zen.gdn_l2norm_fwd(problem.q[None].contiguous(), 1e-6),
            zen.gdn_l2norm_fwd(problem.k[None].contiguous(), 1e-6),
            problem.v[None],
            problem.gates.g[None],
            problem.gates.beta[None],
            problem.q.shape[-1] ** -0.5,
            torch.zeros_like(pool),
            True,
            64,
            problem.cu_seqlens,
            problem.chunk.chunk_indices_chunk64,
            problem.chunk.chunk_offsets_chunk64,
        )

    return [Contestant(NAME, call, lambda: (results[0][0], results[1]), OUT_TOLERANCE, STATE_TOLERANCE)]
