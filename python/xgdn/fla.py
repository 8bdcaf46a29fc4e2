# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule with the names, order and defaults of flash-linear-attention's two functions.

    q, k   [B, T, H, K]        v, o   [B, T, HV, V]        g, beta   [B, T, HV]
    state  [N, HV, K, V], or [N, HV, V, K] with `state_v_first=True`; N = B, or len(cu_seqlens) - 1

Unlike the serving functions of `xgdn.ops` these are pure: `initial_state` is not modified, the final state is a new f32
tensor. Inference only. Options that xgdn does not have raise `NotImplementedError`.
"""

from typing import Any

import torch
from torch import Tensor

from xgdn import ops

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Process whole sequences in chunks of 64 tokens; for prompts.

    `cu_seqlens_cpu` spares reading `cu_seqlens` back from a device. `chunk_indices` is accepted and its shape checked;
    the tables that the kernels need are built from the lengths. As in FLA, `use_gate_in_kernel`, `A_log` and `dt_bias`
    are further keyword arguments: `g` then holds the raw gate.
    """
    name = "chunk_gated_delta_rule"
    _refuse(name, allow_neg_eigval=allow_neg_eigval, cp_context=cp_context)
    use_gate_in_kernel, A_log, dt_bias = (kwargs.pop(key, None) for key in ("use_gate_in_kernel", "A_log", "dt_bias"))
    _refuse_unknown(name, kwargs)

    cu_seqlens = cu_seqlens_cpu if cu_seqlens is None else cu_seqlens
    lengths = _lengths(name, q, cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    # One head: the tables of these functions' kernels do not depend on the heads, and large head counts stay legal.
    chunk = ops.build_chunk_metadata(lengths, 1)
    if chunk_indices is not None and tuple(chunk_indices.shape) != tuple(chunk.chunk_indices_chunk64.shape):
        raise ValueError(
            f"[{name}] chunk_indices: expected [M, 2] with M={chunk.chunk_indices_chunk64.shape[0]} (chunks of 64 "
            f"tokens in cu_seqlens), got {list(chunk_indices.shape)}"
        )
    g, beta = _gates(name, g, beta, use_gate_in_kernel, use_beta_sigmoid_in_kernel, A_log, dt_bias)
    state = _pool(name, v, k, len(lengths), initial_state, state_v_first)
    o = ops.chunk_gated_delta_rule(
        *_packed(q, k, v, g, beta),
        state,
        cu_seqlens=_cu_seqlens(q, cu_seqlens),
        state_indices=torch.arange(len(lengths), dtype=torch.int32, device=q.device),
        chunk=ops.ChunkMetadata(*(table.to(q.device) for table in chunk)),
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o.view(v.shape), _final_state(state, state_v_first) if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Process sequences token by token; for decode. Without `g` nothing decays, without `beta` it is one."""
    name = "fused_recurrent_gated_delta_rule"
    _refuse(name, gk=gk, gv=gv, allow_neg_eigval=allow_neg_eigval)
    _refuse_unknown(name, kwargs)

    gates = v.shape[:3]
    g = v.new_zeros(gates, dtype=torch.float32) if g is None else g
    beta = v.new_ones(gates, dtype=torch.float32) if beta is None else beta
    g, beta = _gates(name, g, beta, use_gate_in_kernel, use_beta_sigmoid_in_kernel, A_log, dt_bias)
    num_sequences = _num_sequences(name, q, cu_seqlens)
    state = _pool(name, v, k, num_sequences, initial_state, state_v_first)
    o = ops.recurrent_gated_delta_rule(
        *_packed(q, k, v, g, beta),
        state,
        cu_seqlens=_cu_seqlens(q, cu_seqlens),
        state_indices=torch.arange(num_sequences, dtype=torch.int32, device=q.device),
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o.view(v.shape), _final_state(state, state_v_first) if output_final_state else None


def _refuse(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"[{name}] {option}: xgdn does not support this option")


def _refuse_unknown(name: str, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("head_first", False):
        raise NotImplementedError(f"[{name}] head_first: inputs are [B, T, H, ...]")
    if "transpose_state_layout" in kwargs:
        raise NotImplementedError(f"[{name}] transpose_state_layout: this option is called state_v_first")
    if kwargs:
        raise TypeError(f"[{name}] got unexpected keyword arguments: {', '.join(sorted(kwargs))}")


def _num_sequences(name: str, q: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        return q.shape[0]
    if q.shape[0] != 1:
        raise ValueError(
            f"[{name}] q: expected a batch of 1 with cu_seqlens (sequences packed along T), got {q.shape[0]}"
        )
    return cu_seqlens.shape[0] - 1


def _lengths(name: str, q: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    num_sequences = _num_sequences(name, q, cu_seqlens)
    return [q.shape[1]] * num_sequences if cu_seqlens is None else cu_seqlens.diff().tolist()


def _packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`[B, T, ...]` as `[B T, ...]`."""
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), g.flatten(0, 1), beta.flatten(0, 1)


def _cu_seqlens(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.to(device=q.device, dtype=torch.int32)
    return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]


def _gates(
    name: str,
    g: Tensor,
    beta: Tensor,
    use_gate_in_kernel: bool | None,
    use_beta_sigmoid_in_kernel: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The log decay in f32 and beta after its sigmoid, both `[B, T, HV]`."""
    if beta.dim() != 3:
        raise NotImplementedError(f"[{name}] beta: expected [B, T, HV], got {list(beta.shape)}")
    if use_gate_in_kernel:
        if A_log is None:
            raise ValueError(f"[{name}] A_log: expected [HV] with use_gate_in_kernel=True, got None")
        dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
        log_decay, sigmoid = ops.gdn_gating(
            g.flatten(0, 1).float(), beta.flatten(0, 1).float(), A_log.float(), dt_bias.float()
        )
        g = log_decay.view(g.shape)
        return g, sigmoid.view(beta.shape) if use_beta_sigmoid_in_kernel else beta
    return g.float(), beta.float().sigmoid() if use_beta_sigmoid_in_kernel else beta


def _pool(
    name: str, v: Tensor, k: Tensor, num_sequences: int, initial_state: Tensor | None, state_v_first: bool
) -> Tensor:
    """A state pool of `num_sequences` slots, `[N, HV, V, K]` f32, that the caller does not hold."""
    heads, key_dim, value_dim = v.shape[2], k.shape[3], v.shape[3]
    if initial_state is None:
        return v.new_zeros((num_sequences, heads, value_dim, key_dim), dtype=torch.float32)
    dims = (value_dim, key_dim) if state_v_first else (key_dim, value_dim)
    expected = (num_sequences, heads, *dims)
    if tuple(initial_state.shape) != expected:
        layout = "[N, HV, V, K]" if state_v_first else "[N, HV, K, V]"
        raise ValueError(
            f"[{name}] initial_state: expected {layout} = {list(expected)}, got {list(initial_state.shape)}"
        )
    pool = initial_state if state_v_first else initial_state.transpose(-1, -2)
    return pool.to(dtype=torch.float32, memory_format=torch.contiguous_format, copy=True)


def _final_state(state: Tensor, state_v_first: bool) -> Tensor:
    return state if state_v_first else state.transpose(-1, -2).contiguous()
