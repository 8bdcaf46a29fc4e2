# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule with the names, order and defaults of flash-linear-attention's two functions.

    q, k   [B, T, H, K]        v, o   [B, T, HV, V]        g, beta   [B, T, HV]
    state  [N, HV, K, V], or [N, HV, V, K] with `state_v_first=True`; N = B, or len(cu_seqlens) - 1

Unlike the serving functions of `xgdn.ops` these are pure: `initial_state` is not modified, the final state is a new f32
tensor. They take tensors of any strides, which are copied where a kernel needs it, and q, k, v of different dtypes, of
which the widest is computed with. Inference only. Options that xgdn does not have raise `NotImplementedError`.

`cu_seqlens` is of int32 or int64, from 0 to T; values that are out of range or fall are an `IndexError`, checked where
it is on the CPU.
"""

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from xgdn import ops

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]

_MAX_INDEX = 2**31 - 1  # of the ops' index tensors


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
    """Process whole sequences in chunks of 64 tokens, for prompts; `o` has the dtype of `q`.

    `cu_seqlens_cpu` avoids reading `cu_seqlens` back from a device. `chunk_indices` is accepted and its shape checked;
    the tables that the kernels need are built from the lengths. As in FLA, `use_gate_in_kernel`, `A_log` and `dt_bias`
    are further keyword arguments: `g` then holds the raw gate. So is `chunk_size` of 16, 32 or 64, which the kernels
    here ignore.
    """
    name = "chunk_gated_delta_rule"
    _refuse(name, cp_context=cp_context)
    use_gate_in_kernel, A_log, dt_bias = (kwargs.pop(key, None) for key in ("use_gate_in_kernel", "A_log", "dt_bias"))
    chunk_size = kwargs.pop("chunk_size", 64)
    if chunk_size not in (16, 32, 64):
        raise ValueError(f"[{name}] chunk_size: expected 16, 32 or 64, got {chunk_size}")
    state_v_first = _state_v_first(name, state_v_first, kwargs)
    _refuse_unknown(name, kwargs)

    _check_tokens(name, q, k, v, g, beta)
    cu_seqlens = cu_seqlens_cpu if cu_seqlens is None else cu_seqlens
    lengths = _lengths(name, q, cu_seqlens, cu_seqlens_cpu)
    chunk = ops.build_chunk_metadata(lengths, device=q.device)
    if chunk_indices is not None:
        num_chunks = sum((length + chunk_size - 1) // chunk_size for length in lengths)
        if tuple(chunk_indices.shape) != (num_chunks, 2):
            raise ValueError(
                f"[{name}] chunk_indices: expected [M, 2] with M={num_chunks} (chunks of {chunk_size} tokens in "
                f"cu_seqlens), got {list(chunk_indices.shape)}"
            )
    g, beta = _gates(name, g, beta, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, A_log, dt_bias)
    state = _pool(name, v, k, len(lengths), initial_state, state_v_first)
    tokens = _packed(q, k, v, g, beta)
    o = ops.chunk_gated_delta_rule(
        *tokens,
        state,
        cu_seqlens=_cu_seqlens(name, q, cu_seqlens),
        state_indices=torch.arange(len(lengths), dtype=torch.int32, device=q.device),
        chunk=chunk,
        out=_out(tokens[2], q.dtype),
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o.to(q.dtype).view(v.shape), _final_state(state, state_v_first) if output_final_state else None


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
    """Process sequences token by token, for decode; `o` has the dtype of `v`.

    Without `g` nothing decays; without `beta` it is 1.
    """
    name = "fused_recurrent_gated_delta_rule"
    _refuse(name, gk=gk, gv=gv)
    state_v_first = _state_v_first(name, state_v_first, kwargs)
    _refuse_unknown(name, kwargs)

    gates = v.shape[:3]
    if g is None:
        if use_gate_in_kernel:
            raise ValueError(f"[{name}] g: expected the raw gate [B, T, HV] with use_gate_in_kernel=True, got None")
        g = v.new_zeros(gates, dtype=torch.float32)
    beta = v.new_ones(gates, dtype=torch.float32) if beta is None else beta
    _check_tokens(name, q, k, v, g, beta)
    g, beta = _gates(name, g, beta, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, A_log, dt_bias)
    num_sequences = _num_sequences(name, q, cu_seqlens)
    state = _pool(name, v, k, num_sequences, initial_state, state_v_first)
    tokens = _packed(q, k, v, g, beta)
    o = ops.recurrent_gated_delta_rule(
        *tokens,
        state,
        cu_seqlens=_cu_seqlens(name, q, cu_seqlens),
        state_indices=torch.arange(num_sequences, dtype=torch.int32, device=q.device),
        out=_out(tokens[2], v.dtype),
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o.to(v.dtype).view(v.shape), _final_state(state, state_v_first) if output_final_state else None


def _refuse(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"[{name}] {option}: xgdn does not support this option")


def _state_v_first(name: str, state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """Return the option, also under its former name `transpose_state_layout`."""
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError(f"[{name}] transpose_state_layout: expected it not beside state_v_first, its newer name")
    warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
    return bool(kwargs.pop("transpose_state_layout"))


def _refuse_unknown(name: str, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("head_first", False):
        raise NotImplementedError(f"[{name}] head_first: inputs are [B, T, H, ...]")
    if kwargs:
        raise TypeError(f"[{name}] got unexpected keyword arguments: {', '.join(sorted(kwargs))}")


def _check_tokens(name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    """Check what the ops cannot see once batch and tokens are one dimension."""
    if q.dim() != 4:
        raise ValueError(f"[{name}] q: expected [B, T, H, K], got {list(q.shape)}")
    if beta.dim() == 4:
        raise NotImplementedError(f"[{name}] beta: expected [B, T, HV], got {list(beta.shape)}")
    for argument, t, dims in (("k", k, 4), ("v", v, 4), ("g", g, 3), ("beta", beta, 3)):
        expected = v.shape[:3] if dims == 3 else q.shape[:2]
        if t.dim() != dims or t.shape[: len(expected)] != expected:
            letters, source = ("[B, T, HV]", "v") if dims == 3 else ("[B, T, ...]", "q")
            raise ValueError(
                f"[{name}] {argument}: expected {letters} = {list(expected)} (set by {source}), got {list(t.shape)}"
            )
    if q.shape[0] * q.shape[1] > _MAX_INDEX:
        raise IndexError(f"[{name}] q: expected at most {_MAX_INDEX} tokens, got {q.shape[0]} x {q.shape[1]}")


def _check_cu_seqlens(name: str, argument: str, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"[{name}] {argument}: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"[{name}] {argument}: expected [N + 1], got {list(cu_seqlens.shape)}")


def _num_sequences(name: str, q: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        return q.shape[0]
    _check_cu_seqlens(name, "cu_seqlens", cu_seqlens)
    if q.shape[0] != 1:
        raise ValueError(
            f"[{name}] q: expected a batch of 1 with cu_seqlens (sequences packed along T), got {q.shape[0]}"
        )
    return cu_seqlens.shape[0] - 1


def _lengths(name: str, q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> list[int]:
    num_sequences = _num_sequences(name, q, cu_seqlens)
    if cu_seqlens is None:
        return [q.shape[1]] * num_sequences
    argument, ends = ("cu_seqlens", cu_seqlens) if cu_seqlens_cpu is None else ("cu_seqlens_cpu", cu_seqlens_cpu)
    _check_cu_seqlens(name, argument, ends)
    if ends.shape != cu_seqlens.shape:
        raise ValueError(
            f"[{name}] {argument}: expected [{num_sequences + 1}] (set by cu_seqlens), got {list(ends.shape)}"
        )
    return _checked_lengths(name, argument, ends, q.shape[1])


def _checked_lengths(name: str, argument: str, cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != num_tokens:
        raise IndexError(
            f"[{name}] {argument}: expected values from 0 to T={num_tokens} (set by q), got {ends[0]} to {ends[-1]}"
        )
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    for i, length in enumerate(lengths):
        if length < 0:
            raise IndexError(
                f"[{name}] {argument}: expected values that never fall ({ends[i]} before), got {ends[i + 1]} at "
                f"index {i + 1}"
            )
    return lengths


def _packed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `[B, T, ...]` as `[B T, ...]` with a contiguous last dimension; q, k and v in one dtype."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)

    def rows(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if x.stride(-1) == 1 else x.contiguous()

    # The ops take beta in f32 too, which holds every value that the inputs' dtypes hold.
    beta = beta if beta.dtype == dtype else beta.float()
    return rows(q.to(dtype)), rows(k.to(dtype)), rows(v.to(dtype)), rows(g), rows(beta)


def _out(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate the result in `dtype` if the ops can write it, else in f32, to be rounded once."""
    return v.new_empty(v.shape, dtype=dtype if dtype == v.dtype else torch.float32)


def _cu_seqlens(name: str, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the offsets in int32 on the device of q, as the ops expect them."""
    if cu_seqlens is None:
        return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        _checked_lengths(name, "cu_seqlens", cu_seqlens, q.shape[1])
    # A value that int32 does not hold shall not come out as a small one.
    return cu_seqlens.clamp(-1, _MAX_INDEX).to(device=q.device, dtype=torch.int32)


def _gates(
    name: str,
    g: Tensor,
    beta: Tensor,
    use_gate_in_kernel: bool | None,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the log decay in f32 and beta after its sigmoid, both `[B, T, HV]`."""
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError(f"[{name}] allow_neg_eigval: expected it with use_beta_sigmoid_in_kernel=True, got it alone")
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    if not use_gate_in_kernel:
        return g.float(), beta
    if A_log is None:
        raise ValueError(f"[{name}] A_log: expected [HV] with use_gate_in_kernel=True, got None")
    dt_bias = torch.zeros_like(A_log) if dt_bias is None else dt_bias
    raw = g.float().flatten(0, 1).contiguous()
    log_decay, _ = ops.gdn_gating(raw, raw, A_log.float().contiguous(), dt_bias.float().contiguous())
    return log_decay.view(g.shape), beta


def _pool(
    name: str, v: Tensor, k: Tensor, num_sequences: int, initial_state: Tensor | None, state_v_first: bool
) -> Tensor:
    """Return a new state pool of `num_sequences` slots, `[N, HV, V, K]` f32."""
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
