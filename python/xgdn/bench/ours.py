# SPDX-License-Identifier: Apache-2.0
"""xgdn's own contestants. Their tolerances are those of bf16 inputs and outputs, or the accuracy that is asked for."""

from collections.abc import Callable

import torch
from torch import Tensor

import xgdn
from xgdn.bench.measure import Contestant
from xgdn.bench.problems import DecodeProblem, PrefillProblem, VerifyProblem

_OUT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}  # rounding out to bf16 costs 1.7e-3
_STATE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


def decode(problem: DecodeProblem) -> list[Contestant]:
    return [_recurrent(problem), _packed_decode(problem)]


def _recurrent(problem: DecodeProblem) -> Contestant:
    pool = problem.pool.make()
    out = torch.full_like(problem.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.recurrent_gated_delta_rule(
            problem.q,
            problem.k,
            problem.v,
            problem.gates.g,
            problem.gates.beta,
            pool,
            cu_seqlens=problem.cu_seqlens,
            state_indices=problem.pool.slots(i),
            out=out,
        )

    return _contestant("xgdn recurrent_gated_delta_rule", call, out, pool, problem.batch)


def _packed_decode(problem: DecodeProblem) -> Contestant:
    pool = problem.pool.make()
    out = torch.full_like(problem.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.packed_decode(
            problem.mixed_qkv,
            problem.gates.a,
            problem.gates.b,
            problem.gates.A_log,
            problem.gates.dt_bias,
            pool,
            state_indices=problem.pool.slots(i),
            out=out,
        )

    return _contestant("xgdn packed_decode", call, out, pool, problem.batch)


def verify(problem: VerifyProblem) -> list[Contestant]:
    pool = problem.pool.make()
    out = torch.full_like(problem.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.recurrent_gated_delta_rule(
            problem.q,
            problem.k,
            problem.v,
            problem.gates.g,
            problem.gates.beta,
            pool,
            cu_seqlens=problem.cu_seqlens,
            state_indices=problem.table(i),
            num_accepted=problem.num_accepted,
            out=out,
        )

    return [_contestant("xgdn recurrent_gated_delta_rule", call, out, pool, len(problem.q))]


def prefill(problem: PrefillProblem) -> list[Contestant]:
    accuracies = ("fast", "exact") if problem.dtype == torch.bfloat16 else ("exact",)
    return [_prefill(problem, accuracy) for accuracy in accuracies]


def _prefill(problem: PrefillProblem, accuracy: str) -> Contestant:
    pool = problem.make_pool()
    out = torch.full_like(problem.v, torch.nan)
    has_initial_state = torch.zeros(len(problem.lengths), dtype=torch.bool)

    def call(_: int) -> None:
        xgdn.ops.chunk_gated_delta_rule(
            problem.q,
            problem.k,
            problem.v,
            problem.gates.g,
            problem.gates.beta,
            pool,
            cu_seqlens=problem.cu_seqlens,
            state_indices=problem.state_indices,
            chunk=problem.chunk,
            has_initial_state=has_initial_state,
            out=out,
            # accuracy=accuracy,
        )

    return Contestant(
        name=f"xgdn chunk_gated_delta_rule {accuracy}",
        call=call,
        result=lambda: (out, pool),
        out_tolerance=_OUT[problem.dtype],
        state_tolerance=1.5e-3 if accuracy == "fast" else 1e-6,
    )


def _contestant(name: str, call: Callable[[int], None], out: Tensor, pool: Tensor, num_slots: int) -> Contestant:
    return Contestant(
        name=name,
        call=call,
        result=lambda: (out, pool[:num_slots]),
        out_tolerance=_OUT[out.dtype],
        state_tolerance=_STATE[pool.dtype],
    )
