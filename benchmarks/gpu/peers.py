# SPDX-License-Identifier: Apache-2.0
"""Other libraries' kernels for the cases, where they can be imported. Their layouts are made beforehand."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.cases import Attention, Case, Decode, DecodeStep, K, Prefill, Provider, ReplayDecode, ReplayPrefill

_SCALE = K**-0.5


def _is_decode(case: Case) -> TypeGuard[Decode]:
    """Whether it is the rule alone, on a token of each sequence and plain states."""
    return isinstance(case, Decode) and not isinstance(case, DecodeStep | ReplayDecode) and case.tokens == 1


def _is_prefill(case: Case) -> TypeGuard[Prefill]:
    """Whether it is a prompt on plain states."""
    return isinstance(case, Prefill) and not isinstance(case, ReplayPrefill)


def fla(case: Case) -> list[Provider]:
    """flash-linear-attention. Its decode writes new states out of place."""
    rule = importlib.import_module("fla.ops.gated_delta_rule")
    if _is_prefill(case):
        return [_fla_prefill(case, rule.chunk_gated_delta_rule)]
    if _is_decode(case):
        return [_fla_decode(case, rule.fused_recurrent_gated_delta_rule)]
    return []


def _fla_decode(case: Decode, rule: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
    q, k, v = (x.unsqueeze(2).contiguous() for x in case.heads.split(case.mixed_qkv))
    initial = [case.pool[slots.long()] for slots in case.state_indices]
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def call(i: int) -> None:
        results[i] = rule(
            q[i],
            k[i],
            v[i],
            g=case.a[i].unsqueeze(1),
            beta=case.b[i].unsqueeze(1),
            initial_state=initial[i],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=case.A_log,
            dt_bias=case.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )

    def result() -> tuple[Tensor, ...]:
        out, states = results[0]
        return out[: case.checked, 0], states[: case.checked]

    return Provider("flash-linear-attention", call, result, (2e-2, 1e-2))


def _fla_prefill(case: Prefill, rule: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
    indices = importlib.import_module("fla.ops.utils.index").prepare_chunk_indices(case.cu_seqlens.long(), 64)
    initial, cu_seqlens = case.initial.transpose(-1, -2).contiguous(), case.cu_seqlens.long()
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def call(i: int) -> None:
        results[i] = rule(
            *(x[i].unsqueeze(0) for x in (case.q, case.k, case.v, case.g, case.beta)),
            scale=_SCALE,
            initial_state=initial[i],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            chunk_indices=indices,
        )

    def result() -> tuple[Tensor, ...]:
        out, states = results[0]
        return out[0], states.transpose(-1, -2)

    return Provider("flash-linear-attention", call, result, (2e-2, 2e-2))


def vllm(case: Case) -> list[Provider]:
    """vLLM's packed decode."""
    if not _is_decode(case):
        return []
    ops = importlib.import_module("vllm.third_party.flash_linear_attention.ops.fused_recurrent")
    out = case.empty_out()

    def call(i: int) -> None:
        ops.fused_recurrent_gated_delta_rule_packed_decode(
            case.mixed_qkv[i],
            case.a[i],
            case.b[i],
            case.A_log,
            case.dt_bias,
            _SCALE,
            case.pool,
            out[i].unsqueeze(1),
            case.state_indices[i],
            use_qk_l2norm_in_kernel=True,
        )

    return [replace(case.provider("vLLM packed decode", call, out), tolerances=(2e-2, 1e-2))]


def flashinfer(case: Case) -> list[Provider]:
    """FlashInfer's decode in place and its prefill, which chooses among its kernels."""
    if _is_prefill(case):
        return [_flashinfer_prefill(case)]
    if not _is_decode(case):
        return []
    decode = importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose
    q, k, v = (x.unsqueeze(2).contiguous() for x in case.heads.split(case.mixed_qkv))
    indices = [slots.clone() for slots in case.state_indices]  # it wants them aligned
    out = case.empty_out()

    def call(i: int) -> None:
        decode(
            q[i],
            k[i],
            v[i],
            None,
            case.A_log,
            case.a[i].unsqueeze(1),
            case.dt_bias,
            case.b[i].unsqueeze(1),
            scale=_SCALE,
            output=out[i].unsqueeze(1),
            use_qk_l2norm=True,
            initial_state=case.pool,
            initial_state_indices=indices[i],
            backend="flashinfer",
        )

    return [replace(case.provider("FlashInfer", call, out), tolerances=(2e-2, 1e-2))]


def _flashinfer_prefill(case: Prefill) -> Provider:
    prefill = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
    alpha, cu_seqlens = case.g.exp(), case.cu_seqlens.long()
    out, states = torch.full_like(case.v, torch.nan), torch.empty_like(case.initial)

    def call(i: int) -> None:
        prefill(
            *(x[i] for x in (case.q, case.k, case.v, alpha, case.beta)),
            scale=_SCALE,
            initial_state=case.initial[i],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            output=out[i],
            output_state=states[i],
            use_cp="auto",
            backend="flashinfer",
        )

    return Provider("FlashInfer", call, lambda: (out[0], states[0]), (2e-2, 2e-2))


def sdpa(case: Case) -> list[Provider]:
    """torch's attention over contexts that lie in one piece, without a table."""
    if not isinstance(case, Attention) or 1 < case.tokens < case.context:
        return []
    contexts = [tuple(x.contiguous() for x in case.gathered(i)) for i in range(case.parts)]
    q = case.q.unflatten(1, (case.batch, case.tokens)).transpose(2, 3)
    results: dict[int, Tensor] = {}

    def call(i: int) -> None:
        results[i] = F.scaled_dot_product_attention(q[i], *contexts[i], is_causal=case.tokens > 1, enable_gqa=True)

    last = min(case.tokens, 8)
    return [Provider("torch sdpa, no table", call, lambda: (results[0][-1].transpose(0, 1)[-last:],), (1e-2,))]


PEERS: dict[str, Callable[[Case], list[Provider]]] = {
    "fla": fla,
    "vllm": vllm,
    "flashinfer": flashinfer,
    "sdpa": sdpa,
}
