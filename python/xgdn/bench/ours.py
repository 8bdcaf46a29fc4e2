# SPDX-License-Identifier: Apache-2.0
"""xgdn's own contestants. Their tolerances are those of bf16 inputs and outputs, or the accuracy that is asked for."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import xgdn
from xgdn.bench.measure import Contestant
from xgdn.bench.problems import NORM_EPS, DecodeProblem, DecodeStepProblem, PrefillProblem, RuleProblem, VerifyProblem

_OUT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}  # rounding out to bf16 costs 1.7e-3
_STATE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


def decode(problem: DecodeProblem) -> list[Contestant]:
    return [_recurrent(problem), _packed_decode(problem)]


def _recurrent(problem: RuleProblem) -> Contestant:
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
            state_indices=problem.indices(i),
            num_accepted=problem.num_accepted,
            out=out,
        )

    return _contestant("xgdn recurrent_gated_delta_rule", call, out, pool, len(problem.q))


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


def decode_step(problem: DecodeStepProblem) -> list[Contestant]:
    """The fused step; decode() has the rule alone to compare it with."""
    pool, conv_pool = problem.pool.make(), problem.make_conv_pool()
    out = torch.full_like(problem.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.gdn_decode_step(
            problem.projected,
            problem.conv_weight,
            conv_pool,
            problem.gates.A_log,
            problem.gates.dt_bias,
            pool,
            problem.norm_weight,
            state_indices=problem.pool.slots(i),
            norm_eps=NORM_EPS,
            out=out,
        )

    # The rule's input and output are rounded to bf16, as they are between the ops that the step consists of; a few
    # values lie so close to the middle of two that they round the other way than the truth does.
    contestant = _contestant("xgdn gdn_decode_step", call, out, pool, problem.batch)
    state_tolerance = contestant.state_tolerance + 1e-4
    return [dataclasses.replace(contestant, out_tolerance=5e-3, state_tolerance=state_tolerance)]


def verify(problem: VerifyProblem) -> list[Contestant]:
    contestant = _recurrent(problem)
    if problem.pool.dtype == torch.bfloat16:  # a token starts from the state as the one before it was written, rounded
        contestant = dataclasses.replace(contestant, out_tolerance=4e-3, state_tolerance=4e-3)
    return [contestant]


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
            accuracy=accuracy,
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
