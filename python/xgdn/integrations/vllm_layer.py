# SPDX-License-Identifier: Apache-2.0
"""What a GDN layer of vLLM computes, by the ops here, on vLLM's own pools and metadata; its projections are those of
vllm_projections.py or vLLM's.

A layer's `kv_cache` is its two pools, slots of one page each: `conv_state` `[S, R, D]` and `state` `[S, HV, V, K]`. A
step's metadata names the decoded sequences first, then the prompts: where their tokens begin, the slot of each, and
which of the prompts continue. Pools are read and written where they are.

vLLM's CPU kernels keep a state in the same slot as `[HV, K, V]`, so that a layer is always served or never.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xgdn import ops
from xgdn.integrations import calls
from xgdn.integrations.reasons import name_of, why_not_activation, why_not_dtype, why_not_taps
from xgdn.integrations.vllm_projections import Projections, in_row_order, is_few

__all__ = ["DECODE", "HOST", "PREFILL", "PROJECTIONS", "forward", "why_not"]

HOST = "vllm"
DECODE = "GatedDeltaNet, decode"
PREFILL = "GatedDeltaNet, prefill"
PROJECTIONS = "GatedDeltaNet, projections"

_STATE_DTYPES = (torch.float32, torch.bfloat16)
_BATCH = "_xgdn_batch"  # on a step's metadata, which all layers of a group share


def why_not(layer: Any, *, is_conv_state_dim_first: bool) -> str | None:
    """Say why a layer cannot be served, from what is known when it is built."""
    dtype = layer.model_config.dtype
    conv_dtype, state_dtype = layer.get_state_dtype()
    if layer.num_spec > 0:
        return "speculative decoding"
    if is_conv_state_dim_first:
        return "convolution states of [channels, rows]"
    if conv_dtype not in (dtype, torch.float32):
        return f"convolution states of {name_of(conv_dtype)}"
    if state_dtype not in _STATE_DTYPES:
        return f"states of {name_of(state_dtype)}"
    return (
        why_not_dtype(dtype)
        or why_not_taps(layer.conv_kernel_size)
        or why_not_activation(layer.activation)
        or why_not_activation(layer.norm.activation)
    )


def forward(layer: Any, hidden_states: Tensor, metadata: Any) -> Tensor:
    """The layer's output for the tokens of a step, whose sequences it advances. Rows behind those of the step are
    zero before the last projection.
    """
    batch = _batch_of(metadata)
    projections = _projections(layer, hidden_states)
    projected = _project(layer, hidden_states, projections)
    state = layer.kv_cache[1]
    o = hidden_states.new_empty(hidden_states.shape[0], *state.shape[1:3])
    if batch.num_decodes > 0:
        rows = slice(batch.num_decodes)
        _decode(layer, projected.row(rows), batch, o[rows])
        calls.count(HOST, DECODE, None, o.device)
    if batch.prefill is not None:
        rows = slice(batch.num_decodes, batch.num_tokens)
        _prefill(layer, projected.qkvz[rows], projected.ba[rows], batch.prefill, o[rows])
        calls.count(HOST, PREFILL, None, o.device)
    o[batch.num_tokens :].zero_()
    if projections is not None:
        return projections.project_out(o.flatten(1))
    return layer.out_proj(o.flatten(1))[0]  # type: ignore[no-any-return]


def _projections(layer: Any, x: Tensor) -> Projections | None:
    """Those that serve the tokens `x` `[T, D]`; None: vLLM's do."""
    projections: Projections | None = layer.xgdn_projections
    if projections is None or not is_few(x):
        return None
    reason = projections.why_not(layer)
    calls.count(HOST, PROJECTIONS, reason, x.device)
    return projections if reason is None else None


class _Projected(NamedTuple):
    """Rows of `qkvz` and `ba`, and both `together` where they have come so."""

    qkvz: Tensor
    ba: Tensor
    together: Tensor | None = None

    def row(self, rows: slice) -> Tensor:
        if self.together is not None:
            return self.together[rows]
        return torch.cat([self.qkvz[rows], self.ba[rows]], dim=1)


def _project(layer: Any, x: Tensor, projections: Projections | None) -> _Projected:
    if projections is None:
        return _Projected(*in_row_order(layer, layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]))
    together = projections.project(x)
    num_gates = 2 * layer.kv_cache[1].shape[1]
    return _Projected(together[:, :-num_gates], together[:, -num_gates:], together)


@dataclass
class _Prompts:
    cu_seqlens: Tensor
    slots: Tensor
    has_initial_state: Tensor
    chunk: ops.ChunkMetadata
    convolved: Tensor | None = None  # memory for [q | k | v], which one layer after another uses


class _Batch(NamedTuple):
    num_decodes: int
    num_tokens: int
    decode_slots: Tensor
    prefill: _Prompts | None


def _batch_of(metadata: Any) -> _Batch:
    """What the ops take of a step's metadata, made by the first layer that asks."""
    kept = vars(metadata).get(_BATCH)
    if kept is None:
        kept = _read(metadata)
        setattr(metadata, _BATCH, kept)
    return kept  # type: ignore[no-any-return]


def _read(metadata: Any) -> _Batch:
    N, P = metadata.num_decodes, metadata.num_prefills
    slots, starts = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
    prefill = None
    if P > 0:
        cu_seqlens = starts[N : N + P + 1] - metadata.num_decode_tokens
        prefill = _Prompts(
            cu_seqlens,
            slots[N : N + P].contiguous(),
            metadata.has_initial_state[N : N + P],
            ops.build_chunk_metadata(cu_seqlens.diff().tolist()),
        )
    num_tokens = metadata.num_decode_tokens + metadata.num_prefill_tokens
    return _Batch(N, num_tokens, slots[:N].contiguous(), prefill)


def _decode(layer: Any, projected: Tensor, batch: _Batch, out: Tensor) -> None:
    conv_state, state = layer.kv_cache
    ops.gdn_decode_step(
        projected,
        _conv_weight(layer),
        conv_state,
        layer.A_log,
        layer.dt_bias,
        state,
        layer.norm.weight,
        state_indices=batch.decode_slots,
        conv_bias=layer.conv1d.bias,
        may_have_padding=False,
        norm_eps=layer.norm.eps,
        out=out,
    )


def _prefill(layer: Any, qkvz: Tensor, ba: Tensor, prompts: _Prompts, out: Tensor) -> None:
    conv_state, state = layer.kv_cache
    HV, V, K = state.shape[1:]
    qkv, z = torch.split(qkvz, [qkvz.shape[1] - HV * V, HV * V], dim=1)
    b, a = torch.split(ba, HV, dim=1)
    if prompts.convolved is None or prompts.convolved.shape != qkv.shape:
        prompts.convolved = qkv.new_empty(qkv.shape)
    mixed = ops.causal_conv1d(
        qkv,
        _conv_weight(layer),
        conv_state,
        cu_seqlens=prompts.cu_seqlens,
        state_indices=prompts.slots,
        bias=layer.conv1d.bias,
        has_initial_state=prompts.has_initial_state,
        out=prompts.convolved,
    )
    g, beta = ops.gdn_gating(a, b, layer.A_log, layer.dt_bias)
    heads, v = torch.split(mixed, [mixed.shape[1] - HV * V, HV * V], dim=1)
    q, k = heads.view(len(heads), 2, -1, K).unbind(1)
    ops.chunk_gated_delta_rule(
        q,
        k,
        v.view(-1, HV, V),
        g,
        beta,
        state,
        cu_seqlens=prompts.cu_seqlens,
        state_indices=prompts.slots,
        chunk=prompts.chunk,
        has_initial_state=prompts.has_initial_state,
        may_have_padding=False,
        out=out,
    )
    ops.rms_norm_gated(out, z.view(-1, HV, V), layer.norm.weight, eps=layer.norm.eps, out=out)


def _conv_weight(layer: Any) -> Tensor:
    """The taps `[D, W]`; where vLLM has packed them for its kernels it keeps them beside."""
    conv = layer.conv1d
    unpacked: Tensor | None = getattr(conv, "_cpu_unpacked_conv_weight", None)
    return conv.weight.flatten(1) if unpacked is None else unpacked
