# SPDX-License-Identifier: Apache-2.0
"""transformers' functions of a GDN layer, with its signatures and its semantics, computed by the ops here.

Each takes the function that it replaces as its first argument and hands it the calls that it cannot serve. Nothing
that the host passes is changed, except the state of `causal_conv1d_update`, as by the host's own.

A final state is `[B, HV, K, V]` in float32, as the host's, but with the memory of `[B, HV, V, K]`, which the kernels
work on. The host's caches keep an entry's strides, so that the state comes back as it was written.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xgdn import fla, ops
from xgdn.backends import available_backends
from xgdn.integrations import calls
from xgdn.integrations.reasons import why_not_activation, why_not_dtype, why_not_taps

__all__ = [
    "HOST",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "count_of",
    "fused_recurrent_gated_delta_rule",
    "rms_norm_gated",
    "sequences",
    "step_history",
    "why_not_options",
    "why_not_tensors",
]

HOST = "transformers"

# What FLA's functions take beyond the host's arguments changes the result. Anything else that reaches a function is
# meant for other parts of the model, and the host drops it too.
_HOST_ARGUMENTS = {"q", "k", "v", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}
_RULE_OPTIONS = tuple(
    sorted(
        {
            name
            for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule)
            for name in inspect.signature(function).parameters
        }
        - _HOST_ARGUMENTS
        - {"kwargs"}
    )
)
_CONV_OPTIONS = ("seq_idx", "cu_seqlens", "initial_states", "return_final_states", "final_states_out")


_devices = frozenset({"cpu"})  # types that some backend serves; constant while a model is traced


def look_up_devices() -> None:
    """Ask which devices are served. When models are patched, because an import does not ask for backends."""
    global _devices
    _devices = frozenset({"cpu", *available_backends()})


def chunk_gated_delta_rule(
    original: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_size` has no effect on the result and is ignored."""
    reason = _why_not_rule(query, key, value, g, beta, initial_state, kwargs)
    if not _serves("chunk_gated_delta_rule", reason, query):
        kwargs |= {"initial_state": initial_state, "output_final_state": output_final_state}
        kwargs |= {"chunk_size": chunk_size, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return original(query, key, value, g=g, beta=beta, **kwargs)  # type: ignore[no-any-return]
    B, T = query.shape[:2]
    cu_seqlens, slots = sequences(B, T, query.device)
    state = _pool(initial_state, key, value)
    o = ops.chunk_gated_delta_rule(
        *_tokens(query, key, value, g, beta),
        state,
        cu_seqlens=cu_seqlens,
        state_indices=slots,
        chunk=ops.build_chunk_metadata([T] * B, device=query.device),
        may_have_padding=False,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o.view(value.shape), state.transpose(-1, -2) if output_final_state else None


def fused_recurrent_gated_delta_rule(
    original: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    reason = _why_not_rule(query, key, value, g, beta, initial_state, kwargs)
    if not _serves("fused_recurrent_gated_delta_rule", reason, query):
        kwargs |= {"initial_state": initial_state, "output_final_state": output_final_state}
        kwargs |= {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return original(query, key, value, g=g, beta=beta, **kwargs)  # type: ignore[no-any-return]
    cu_seqlens, slots = sequences(query.shape[0], query.shape[1], query.device)
    state = _pool(initial_state, key, value)
    o = ops.recurrent_gated_delta_rule(
        *_tokens(query, key, value, g, beta),
        state,
        cu_seqlens=cu_seqlens,
        state_indices=slots,
        may_have_padding=False,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o.view(value.shape), state.transpose(-1, -2) if output_final_state else None


def causal_conv1d_fn(
    original: Callable[..., Any],
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """`hidden_states` and the result are `[B, D, T]`; the result has the memory of `[B, T, D]`."""
    reason = why_not_tensors(hidden_states, weight, bias) or why_not_options(kwargs, _CONV_OPTIONS)
    if not _serves("causal_conv1d_fn", reason or _why_not_conv(hidden_states, weight, activation), hidden_states):
        return original(hidden_states, weight, bias, activation=activation, **kwargs)  # type: ignore[no-any-return]
    B, D, T = hidden_states.shape
    cu_seqlens, slots = sequences(B, T, hidden_states.device)
    out = ops.causal_conv1d(
        hidden_states.transpose(1, 2).reshape(B * T, D),
        weight,
        hidden_states.new_zeros(B, weight.shape[1] - 1, D),
        cu_seqlens=cu_seqlens,
        state_indices=slots,
        bias=bias,
        silu=activation is not None,
    )
    return out.view(B, T, D).transpose(1, 2)


def causal_conv1d_update(
    original: Callable[..., Any],
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One token of each sequence, `[B, D, 1]`; `conv_state` `[B, D, S]` moves on by one column, in place."""
    reason = why_not_tensors(hidden_states, conv_state, weight, bias)
    reason = reason or _why_not_conv(hidden_states, weight, activation)
    if reason is None and hidden_states.shape[2] != 1:
        reason = "more than one token"
    if not _serves("causal_conv1d_update", reason, hidden_states):
        return original(hidden_states, conv_state, weight, bias, activation)  # type: ignore[no-any-return]
    B = hidden_states.shape[0]
    cu_seqlens, slots = sequences(B, 1, hidden_states.device)
    x = hidden_states.squeeze(2)
    out = step_history(
        conv_state,
        x,
        weight.shape[1] - 1,
        lambda history: ops.causal_conv1d_update(
            x if x.stride(1) == 1 else x.contiguous(),
            weight,
            history,
            cu_seqlens=cu_seqlens,
            state_indices=slots,
            bias=bias,
            may_have_padding=False,
            silu=activation is not None,
        ),
    )
    return out.unsqueeze(2)


def rms_norm_gated(original: Callable[..., Any], self: nn.Module, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The `forward` of the host's gated norm, which norms before it gates."""
    weight: Tensor = self.weight  # type: ignore[assignment]
    reason = why_not_tensors(hidden_states, gate, weight) or why_not_activation(self.activation)
    if reason is None and (hidden_states.dtype != gate.dtype or weight.dtype not in (gate.dtype, torch.float32)):
        reason = "mixed dtypes"
    if not _serves("RMSNormGated", reason, hidden_states):
        return original(self, hidden_states, gate)  # type: ignore[no-any-return]
    rows = (-1, 1, hidden_states.shape[-1])
    out = ops.rms_norm_gated(
        hidden_states.reshape(rows),
        gate.reshape(rows),
        weight,
        eps=self.variance_epsilon,  # type: ignore[arg-type]
    )
    return out.view(hidden_states.shape)


def step_history(conv_state: Tensor, x: Tensor, taps: int, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Call `step` with the last `taps` columns of `conv_state` `[B, D, S]` as `[B, taps, D]`, which it moves on by one
    token, `x` `[B, D]`; afterwards all of `conv_state` has moved on. Returns what `step` returns.
    """
    rows = conv_state.transpose(1, 2)
    spare = rows.shape[1] - taps  # columns that the host keeps and the convolution does not read
    if rows.stride(2) == 1 and 0 <= spare <= 1:
        if spare == 1:
            rows[:, 0].copy_(rows[:, 1])
        return step(rows[:, spare:])
    out = step(rows[:, spare:].contiguous())
    conv_state.copy_(torch.cat([conv_state[:, :, 1:], x.unsqueeze(2).to(conv_state.dtype)], dim=2))
    return out


def sequences(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the offsets and the slots of `batch` sequences of `length` tokens, each in the slot of its number."""
    build = _sequences if torch.compiler.is_compiling() else _kept_sequences
    return build(batch, length, device)


def _sequences(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    slots = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return slots * length, slots[:batch]


_kept_sequences = functools.lru_cache(maxsize=64)(_sequences)


def why_not_tensors(*tensors: Tensor | None) -> str | None:
    """Say why the kernels cannot take these tensors of a call, of which the first is its input."""
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "a gradient is required"
    if given[0].device.type not in _devices:
        return f"device {given[0].device.type}"
    if given[0].numel() == 0:
        return "no tokens"
    for t in given:
        if type(t) not in (Tensor, nn.Parameter):
            return "a subclass of torch.Tensor"
        if reason := why_not_dtype(t.dtype):
            return reason
        if t.device != given[0].device:
            return "tensors on different devices"
    return None


def why_not_options(kwargs: dict[str, Any], options: tuple[str, ...]) -> str | None:
    """Name the first of `options` that is set in `kwargs`."""
    for option in options:
        if kwargs.get(option) is not None and kwargs[option] is not False:
            return f"argument {option}"
    return None


def _why_not_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    if reason := why_not_tensors(q, k, v, g, beta, initial_state) or why_not_options(kwargs, _RULE_OPTIONS):
        return reason
    return None if q.dtype == k.dtype == v.dtype else "mixed dtypes"


def _why_not_conv(x: Tensor, weight: Tensor, activation: str | None) -> str | None:
    if reason := why_not_taps(weight.shape[1]):
        return reason
    if weight.dtype != x.dtype:
        return "mixed dtypes"
    return None if activation is None else why_not_activation(activation)


def count_of(function: str, reason: str | None, x: Tensor) -> None:
    calls.count(HOST, function, reason, x.device)


def _serves(function: str, reason: str | None, x: Tensor) -> bool:
    """Count a call, and return whether it is served here. An exported program shall hold none of the ops here."""
    if torch.compiler.is_exporting():
        return False
    count_of(function, reason, x)
    return reason is None


def _tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `[B, T, ...]` as `[B T, ...]` with a contiguous last dimension, in dtypes that the ops take."""

    def rows(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if x.stride(-1) == 1 else x.contiguous()

    beta = beta if beta.dtype == q.dtype else beta.float()
    return rows(q), rows(k), rows(v), rows(g.float()), rows(beta)


def _pool(initial_state: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    """Return a new pool of states, `[B, HV, V, K]` f32."""
    if initial_state is not None:
        state = initial_state.transpose(-1, -2)
        return state.to(dtype=torch.float32, memory_format=torch.contiguous_format, copy=True)
    B, HV, V, K = value.shape[0], value.shape[2], value.shape[3], key.shape[3]
    return value.new_zeros((B, HV, V, K), dtype=torch.float32)
